"""What a person sees in a terminal, and what a log file gets."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

import config

ROOT = Path(config.__file__).parent
# each script, and the function that run_script is given
SCRIPTS = {
    path.name: match[1]
    for path in sorted(ROOT.glob('*.py'))
    if (match := re.search(r'^    run_script\((\w+)\)$', path.read_text(), re.MULTILINE))
}
PREFIXES = {'ensemble.py': (['compare'], ['calibrate'])}  # commands that it parses by itself


class Parsed(Exception):
    """Carries a script's parser out of it."""


def parser_of(script, words, monkeypatch):
    def stop(self, argv=None):
        raise Parsed(self)

    monkeypatch.setattr(sys, 'argv', [script, *words])
    with monkeypatch.context() as patch:
        patch.setattr(config.ArgumentParser, 'parse_args', stop)
        with pytest.raises(Parsed) as caught:
            getattr(importlib.import_module(script[:-3]), SCRIPTS[script])(words)
    return caught.value.args[0]


def commands_of(parser):
    """The parser, or those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.values())
    return [parser]


def test_all_scripts_are_looked_at():
    assert {'prepare.py', 'train.py', 'infer.py', 'pseudo.py', 'ensemble.py', 'viz.py'} <= SCRIPTS.keys()


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_has_an_example_and_each_default(script, monkeypatch):
    starts = [parser_of(script, words, monkeypatch) for words in ([], *PREFIXES.get(script, ()))]
    for parser in [command for start in starts for command in commands_of(start)]:
        shown = parser.format_help()
        assert f'python {parser.prog}' in shown, f'{parser.prog}: --help has no example'
        formatter = parser._get_formatter()
        for action in parser._actions:
            if action.option_strings and action.dest != 'help':
                text = formatter._expand_help(action)
                where = f'{parser.prog} {action.option_strings[0]}: {text!r}'
                assert 'default' in text or 'required' in text, where
                assert ('required' in text) >= action.required, where
                assert len(text.split()) > 2, f'{where} says too little'


def test_help_names_the_default_that_is_used():
    parser = config.ArgumentParser('Tests.')
    parser.add_argument('--side', type=int, default=7, help='of a thing')
    parser.add_argument('--views', nargs='*', default=['h', 'v'], help='to try')
    parser.add_argument('--all', action='store_true', help='of them')
    parser.add_argument('--name', required=True, help='of it')
    shown = ' '.join(parser.format_help().split())
    for text in ('of a thing; default 7', 'to try; default h v', 'of them; default off', 'of it; required'):
        assert text in shown
