"""Find the scripts, as a person types them: `python train.py ...`, `python -m tools.soup ...`."""

import importlib
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.cli import ArgumentParser

ROOT = Path(__file__).resolve().parents[1]
SOURCES = subprocess.check_output(['git', 'ls-files', '*.py'], cwd=ROOT, text=True).split()
MODULES = [name for name in SOURCES if not name.startswith('tests/')]


def _find_scripts() -> dict[str, tuple[str, str]]:
    """Map 'train.py' or '-m tools.soup' to its module, and to the function there that run_script gets."""
    scripts = {}
    for name in MODULES:
        match = re.search(r'^    run_script\((\w+)\)$', (ROOT / name).read_text(), re.MULTILINE)
        if match:
            module = name.removesuffix('.py').replace('/', '.')
            script = f'-m {module.removesuffix(".__main__")}' if '/' in name else name
            scripts[script] = (module, match[1])
    return scripts


SCRIPTS = _find_scripts()


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """Split the words after `python` into the script, as in SCRIPTS, and its arguments."""
    count = 2 if words[0] == '-m' else 1
    return ' '.join(words[:count]), words[count:]


def entry(script: str) -> Callable:
    """Return the function that a script of SCRIPTS runs."""
    module, function = SCRIPTS[script]
    return getattr(importlib.import_module(module), function)


class Parsed(Exception):
    """Carries the parser that a script was about to use."""


def parser_of(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    """Return the parser to which a script gives these arguments; fail if it has none."""

    def stop(self, argv=None):
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *argv])
        patch.setattr(ArgumentParser, 'parse_args', stop)
        with pytest.raises(Parsed) as caught:
            entry(script)(argv)
    return caught.value.args[0]


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Return what a script's parser makes of the words after `python`; it exits if it refuses them."""
    script, argv = split_command(words)
    return parser_of(script, argv, monkeypatch).parse_args(argv)
