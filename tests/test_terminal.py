"""What a person sees in a terminal, and what a log file gets."""

import argparse
import io
import re
import sys

import pytest
from entry_points import SCRIPTS, entry
from tqdm import tqdm

import config
import train
from engine import dry_run
from engine.trainer import Trainer
from models import count_model
from utils import progress as terminal
from utils.progress import Bar, progress


class Parsed(Exception):
    """Carries a script's parser out of it."""


def parser_of(script, words, monkeypatch):
    def stop(self, argv=None):
        raise Parsed(self)

    monkeypatch.setattr(sys, 'argv', [script, *words])
    with monkeypatch.context() as patch:
        patch.setattr(config.ArgumentParser, 'parse_args', stop)
        with pytest.raises(Parsed) as caught:
            entry(script)(words)
    return caught.value.args[0]


def commands_of(parser):
    """The parser, or those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.values())
    return [parser]


def test_all_scripts_are_looked_at():
    assert {
        'prepare.py',
        'train.py',
        'infer.py',
        'pseudo.py',
        'ensemble.py',
        'viz.py',
        '-m tools.soup',
    } <= SCRIPTS.keys()


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_has_an_example_and_each_default(script, monkeypatch):
    for parser in commands_of(parser_of(script, [], monkeypatch)):
        shown = parser.format_help()
        assert f'python {parser.prog.removeprefix("python ")}' in shown, (
            f'{parser.prog}: --help has no example'
        )
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_bar(monkeypatch):
    monkeypatch.setattr(Bar, 'outer', None)
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')


def two_epochs():
    with Bar('train', 'batch', total=4) as bar:
        for epoch in range(2):
            bar.desc = f'epoch {epoch + 1}/2'
            for _ in range(2):
                bar.step(loss='0.512')
            assert list(progress(range(3), 'valid', 'batch')) == [0, 1, 2]
            bar.show(mIoU='0.250')
    assert Bar.outer is None


@pytest.mark.parametrize('every', [60, 0])
def test_progress_in_a_log_is_lines_and_few(every, no_bar, monkeypatch, capsys):
    monkeypatch.setattr(terminal, 'EVERY', every)
    two_epochs()
    out, shown = capsys.readouterr()
    assert out == '' and '\r' not in shown and '\033' not in shown
    lines = shown.splitlines()
    assert len(lines) == (0 if every else 10)
    if lines:
        assert re.fullmatch(r'epoch 1/2 50%, 2/4, \d\d:\d\d left, .+ batch/s, loss 0.512', lines[1])
        assert lines[4].startswith('epoch 1/2, valid 3/3 50%') and lines[-1].endswith('mIoU 0.250')


def test_progress_on_a_terminal_is_one_bar(no_bar, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    monkeypatch.setattr(tqdm, 'monitor_interval', 0)
    two_epochs()
    shown = sys.stderr.getvalue()
    assert 'epoch 1/2' in shown or 'train' in shown
    assert '\n' not in shown, 'a bar stays on its line'


@pytest.mark.parametrize(
    'stream, no_color, coloured',
    [(Terminal(), '', True), (Terminal(), '1', False), (io.StringIO(), '', False)],
)
def test_colours_on_a_terminal_alone(stream, no_color, coloured, no_bar, monkeypatch):
    monkeypatch.setenv('NO_COLOR', no_color)
    terminal.say('train.py: error: bad\nnext: python infer.py', stream)
    plain = re.sub(r'\033\[\d+m', '', stream.getvalue())
    assert plain == 'train.py: error: bad\nnext: python infer.py\n'
    assert ('\033[31merror:\033[0m' in stream.getvalue()) == coloured


def test_epochs_are_lines_of_one_order(tiny, capsys):
    train.main(tiny.model_copy(update={'epochs': 2}), 0)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith('epoch ')]
    order = r'epoch \d/2  loss [\d.]+  mIoU [\d.]+ \[.+\]  lr \S+  \d+ s  [\d:]+ left(  best)?'
    assert len(lines) == 2 and all(re.fullmatch(order, line) for line in lines), lines
    assert f'next: python infer.py --cfg {tiny.run_dir(0) / "config.yaml"}' in out


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def dry(tiny, tiny_yaml, monkeypatch, capsys):
    """Runs train.py --dry-run on 9 steps; its lines, and how many steps of the optimizer it took."""
    updates = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, 'update', lambda self: (updates.append(self.step), update(self)))

    def run(*words):
        argv = ['--cfg', str(tiny_yaml), '--fold', '0', '--set', 'epochs=3']
        updates.clear()
        train.command([*argv, *words])
        return capsys.readouterr().out, len(updates)

    return run


def test_dry_run_says_what_training_would_take_and_writes_nothing(dry, tiny):
    out, updates = dry('--dry-run')
    assert updates == dry_run.STEPS and not tiny.output_dir.exists()
    size = count_model(tiny, 64)
    parameters = f'model: {size.encoder / 1e6:.1f} M parameters in the encoder, {size.head / 1e6:.1f} M in'
    assert parameters in out and 'GMACs a photo of 64x64' in out
    assert 'fold 0: 12 train, 12 valid' in out and 'steps: 9 in 3 epochs; 9 batches of 4 photos' in out
    assert re.search(r'^learning rates: \S+ to \S+ in \d+ groups', out, re.MULTILINE)
    gigabytes = float(re.search(r"^memory: ([\d.]+) GB \(this process's peak RSS", out, re.MULTILINE)[1])
    assert 0.1 < gigabytes < 100
    line = r'^time: [\d:]+ for 9 steps of (\S+) s, the median after the first; 12 photos to validate'
    assert 0 < float(re.search(line, out, re.MULTILINE)[1]) < 30


def test_dry_run_leaves_a_run_as_it_was(dry, tiny):
    dry()
    before = contents_of(tiny.output_dir)
    with pytest.raises(config.BadInput, match='holds this run already'):
        dry('--dry-run')
    out, updates = dry('--dry-run', '--overwrite')
    assert updates == dry_run.STEPS and 'nothing was written' in out
    out, updates = dry('--dry-run', '--resume')
    assert updates == 0 and 'steps: 9 in 3 epochs, 9 of them done' in out
    assert contents_of(tiny.output_dir) == before
