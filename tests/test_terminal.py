"""What a person sees in a terminal, and what a log file gets."""

import argparse
import io
import os
import re
import subprocess
import sys

import pytest
from entry_points import ROOT, SCRIPTS, parser_of

import config
import train
from engine import dry_run
from engine.trainer import Trainer
from models import count_model
from utils import progress as progress_module
from utils.cli import ArgumentParser
from utils.log import say
from utils.progress import Bar, progress


def commands_of(parser):
    """Return the parsers of a parser's commands, or the parser itself."""
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
        command = f'python {parser.prog.removeprefix("python ")}'
        assert command in parser.format_help(), f'{command}: --help has no example'
        for action in parser._actions:
            if action.option_strings and action.dest != 'help' and action.help != argparse.SUPPRESS:
                where = f'{command} {action.option_strings[0]}: {action.help!r}'
                is_shown = repr(action.default) not in ('None', 'False', '[]')
                assert not (is_shown and 'default' in action.help), f'{where} says its default twice'
                if action.default is None and not action.required:
                    assert re.search('default|required', action.help), f'{where} does not say its default'
                assert len(action.help.split()) > 1, f'{where} says too little'


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_each_command_with_its_line(script, monkeypatch):
    parser = parser_of(script, [], monkeypatch)
    for command in commands_of(parser):
        if command is not parser:
            name = command.prog.split()[-1]
            assert re.search(rf'^    {name}\s+\w', parser.format_help(), re.MULTILINE), command.prog


def test_help_names_the_default_that_is_used():
    parser = ArgumentParser('Tests.')
    parser.add_argument('--side', type=int, default=7, help='side of a square')
    parser.add_argument('--views', nargs='*', default=['h', 'v'], help='views to try')
    parser.add_argument('--all', action='store_true', help='all of them')
    parser.add_argument('--extra', nargs='*', default=[], help='more views')
    parser.add_argument('--out', help='a file; by default the screen')
    lines = ' '.join(parser.format_help().split())
    for text in ('square (default: 7)', "views to try (default: ['h', 'v'])", 'by default the screen'):
        assert text in lines
    assert lines.count('(default: ') == 2


def test_examples_of_a_command_are_its_own_lines():
    doc = 'Test.\n\n    python x.py check a\n    python x.py checks b\n    python x.py check c   # 100 %\n'
    parser = ArgumentParser(doc, prog='x.py')
    commands = parser.add_subparsers(dest='command', required=True)
    check = commands.add_parser('check', doc='Check 100 % of it.')
    commands.add_parser('other', doc='Do something else.')
    assert re.search(r'^    check +Check 100 % of it\.$', parser.format_help(), re.MULTILINE)
    assert check.format_help().endswith(
        'examples:\n    python x.py check a\n    python x.py check c   # 100 %\n'
    )
    assert 'examples' not in commands.add_parser('third', doc='Do a third thing.').format_help()


def test_errors_of_a_module_say_what_was_typed():
    def error_of(*words):
        words = [sys.executable, '-m', 'tools.postprocess', 'apply', *words]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stderr

    usage = error_of()
    assert usage.startswith('python -m tools.postprocess apply: error: the following arguments are required')
    missing = error_of('none.csv', '--out', 'output/x.csv')
    assert missing.startswith('python -m tools.postprocess: error: none.csv: ')
    assert usage.count('\n') == missing.count('\n') == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_bar(monkeypatch):
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')


def two_epochs(quiet=False):
    with Bar(desc='train', unit='step', total=4, quiet=quiet) as bar:
        for epoch in range(2):
            bar.set_description_str(f'epoch {epoch + 1}/2', refresh=False)
            for _ in range(2):
                bar.set_postfix(loss='0.512', mIoU='0.250', refresh=False)
                bar.update()
            assert list(progress(range(3), 'valid', 'batch', quiet=quiet)) == [0, 1, 2]
        assert quiet or re.fullmatch(r'[\d:]+ left', bar.time_left())


def test_quiet_progress_shows_nothing(no_bar, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, 'SECONDS', 0)
    two_epochs(quiet=True)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('seconds', [60, 0])
def test_progress_in_a_log_is_lines_and_few(seconds, no_bar, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, 'SECONDS', seconds)
    two_epochs()
    out, shown = capsys.readouterr()
    assert out == '' and '\r' not in shown and '\033' not in shown
    lines = shown.splitlines()
    assert len(lines) == (0 if seconds else 13)  # each bar begins with a line
    if lines:
        numbers = r'2/4 \[\d\d:\d\d<\d\d:\d\d, .+step/s, loss=0.512, mIoU=0.250\]'
        assert re.fullmatch(rf'epoch 1/2:  50%, {numbers}', lines[2])
        assert lines[6].startswith('valid: 100%, 3/3') and 'batch/s]' in lines[6]


def test_progress_on_a_terminal_is_a_bar_that_is_cleared(no_bar, monkeypatch):
    """Validation has a bar of its own below that of the training, and both are gone at the end."""
    monkeypatch.setattr(sys, 'stderr', Terminal())
    two_epochs()
    output = sys.stderr.getvalue()
    assert 'train:   0%|' in output and '\n\rvalid:   0%|' in output
    assert not output.rsplit('\r', 2)[1].strip() and output.endswith('\r')


@pytest.mark.parametrize(
    'stream, no_color, coloured',
    [(Terminal(), '', True), (Terminal(), '1', False), (io.StringIO(), '', False)],
)
def test_colours_on_a_terminal_alone(stream, no_color, coloured, no_bar, monkeypatch):
    monkeypatch.setenv('NO_COLOR', no_color)
    say('train.py: error: bad\nnext: python infer.py', stream)
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
    """Run train.py on 3 epochs of 6 steps; return its output, and how many optimizer steps it took."""
    updates = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, 'update', lambda self: (updates.append(self.step), update(self)))

    def run(*words):
        argv = ['--cfg', str(tiny_yaml), '--fold', '0', '--set', 'epochs=3', 'batch_size=2']
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
    assert 'fold 0: 12 train, 12 valid' in out and 'steps: 18 in 3 epochs; 18 batches of 2 photos' in out
    assert re.search(
        r'^ +0 +1.000e-04 +0.01 +\d+ +[\d,]+  encoder\.model\.stem_0\.weight$', out, re.MULTILINE
    )
    gigabytes = float(re.search(r"^memory: ([\d.]+) GB \(this process's peak RSS", out, re.MULTILINE)[1])
    assert 0.1 < gigabytes < 100
    line = r'^time: [\d:]+ for 18 steps of (\S+) s, the median after the first, without .+ 12 photos'
    assert 0 < float(re.search(line, out, re.MULTILINE)[1]) < 30


def test_dry_run_leaves_a_run_as_it_was(dry, tiny):
    dry()
    before = contents_of(tiny.output_dir)
    with pytest.raises(config.BadInput, match='holds this run already'):
        dry('--dry-run')
    out, updates = dry('--dry-run', '--overwrite')
    assert updates == dry_run.STEPS and 'nothing was written' in out
    out, updates = dry('--dry-run', '--resume')
    assert updates == 0 and 'steps: 18 in 3 epochs, 18 of them done' in out
    assert contents_of(tiny.output_dir) == before


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('script', ['config.py', 'models.py --help', 'prepare.py check --data {data}'])
def test_a_reader_that_leaves_is_no_error(script, unbuffered, shapes):
    words = [sys.executable, *script.format(data=shapes).split()]
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {'PYTHONUNBUFFERED': unbuffered}
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 0 and b'rror' not in done.stderr, done.stderr


def test_an_import_is_whole_if_its_reader_leaves(shapes, tmp_path):
    (tmp_path / 'batch_01').symlink_to(shapes / 'batch_01')
    for name in ('train_all', 'test_labels'):
        (tmp_path / f'instances_{name}.json').write_bytes((shapes / f'{name}.json').read_bytes())
    words = f'{sys.executable} prepare.py coco --data {tmp_path} | true; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(['bash', '-c', words], cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / 'train_all.json').exists() and (tmp_path / 'test_labels.json').exists()


@pytest.mark.parametrize(('place', 'status'), [('>&-', 0), ('> /dev/full', 75)])
def test_no_output_and_no_room_for_it(place, status):
    command = f'env -u PYTHONUNBUFFERED {sys.executable} config.py {place}'
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr.count('\n') == (1 if status else 0), done.stderr
