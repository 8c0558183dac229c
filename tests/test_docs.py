"""What the pages say is so: docs/add_*.md are followed to the end in a copy of the repository; every command
of README.md is parsed by the script that it calls, and the real run is run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, write_set
from entry_points import MODULES, entry, parse_command, split_command

from config import load_config

ROOT = Path(__file__).resolve().parents[1]
# runs commands in one process, as if each had been typed: an import of torch takes longer than most of them
RUNNER = """
import json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    print('$', script, *words, flush=True)
    sys.argv = words if script == '-m' else [script, *words]
    try:
        if script == '-m':
            runpy.run_module(words[0], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        if end.code:
            raise
"""
PAGES = ['add_head', 'add_loss', 'add_encoder']


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r'^```(\w+)\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)


def apply_block(root: Path, language: str, text: str) -> None:
    """Does to a file what a block says, whose first line names it: a diff, lines to put above another, or the
    whole of a new file.
    """
    first, body = text.split('\n', 1)
    name, _, above = first.removeprefix('# ').partition(', above: ')
    path = root / name
    if language == 'diff':
        old = ''.join(line[1:] for line in body.splitlines(True) if not line.startswith('+'))
        new = ''.join(line[1:] for line in body.splitlines(True) if not line.startswith('-'))
    elif above:
        old = next(line for line in path.read_text().splitlines(True) if line.startswith(above))
        new = body + '\n' * 2 + old
    else:
        assert not path.exists(), path
        path.write_text(body)
        return
    whole = path.read_text()
    assert whole.count(old) == 1, f'{name} has this {whole.count(old)} times:\n{old}'
    path.write_text(whole.replace(old, new))


@pytest.fixture(scope='module')
def copy(tmp_path_factory) -> Path:
    """The repository without what git ignores and hidden files, and with what earlier pages added."""
    root = tmp_path_factory.mktemp('docs') / 'copy'
    skip = shutil.ignore_patterns('.*', '__pycache__', 'input', 'output', 'mutants', 'build', '*.pt')
    shutil.copytree(ROOT, root, ignore=skip)
    return root


def test_pages_can_be_followed_to_the_end(copy):
    """One page after the other, as a person who adds all three things."""
    commands = []
    for page in PAGES:
        for language, text in blocks_of(ROOT / f'docs/{page}.md'):
            if language == 'bash':
                commands += [words_of(line)[1:] for line in text.splitlines()]
            else:
                apply_block(copy, language, text)
    demo = next(words for words in commands if words[0] == 'prepare.py')
    commands = [words for words in commands if words is demo or words != demo]  # made once
    run = subprocess.run(
        [sys.executable, '-c', RUNNER, json.dumps(commands)],
        cwd=copy,
        env={**os.environ, 'PYTHONPATH': str(copy), 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    output = run.stdout + run.stderr
    assert len(re.findall(r'[1-9]\d* passed', output)) == len(PAGES)
    assert len(re.findall('(?:best|last) (?:epoch )?mIoU', output)) == len(PAGES)
    ruff = [sys.executable, '-m', 'ruff']
    for check in (['check'], ['format', '--check']):
        done = subprocess.run([*ruff, *check, '.'], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def words_of(line: str) -> list[str]:
    """A command's words, as a shell would split it."""
    return shlex.split(line, comments=True)


# --- README.md --------------------------------------------------------------------------------------------

# a shell that writes down what it would run: loops, braces and globs are its own
RECORDER = """
record() { printf '%s\\0' "$@" >> "$LOG"; printf '\\n\\0' >> "$LOG"; }
for name in python torchrun bash sbatch source; do eval "$name() { record $name \\"\\$@\\"; }"; done
"""
SHELL = {  # what is not a Python script, and why it is not run here
    'scripts/setup.sh': 'made the environment that this runs in',
    'scripts/demo.sh': 'nine minutes; its own stages are those of the real run',
    'scripts/test.sh': 'runs this',
    'scripts/run.sh': 'tests/test_train.py has its stages; hours at their real size',
    'scripts/slurm.sh': 'needs SLURM',
    'scripts/compare.sh': 'tests/test_compare.py; trainings of hours',
}
NOT_RUN = {  # parsed, but not run
    '-m tools.share': 'tests/test_share.py',
    '-m tools.gpu': 'tests/test_gpu_check.py',
    '-m tools.export_onnx': 'tests/test_export.py',
    'viz.py suspects': 'tests/test_suspects.py',
    'viz.py app': 'tests/test_app.py',
}


def commands_of_page(page: Path, folder: Path) -> list[list[str]]:
    """The words of every command of a page, as bash would give them to it in `folder`."""
    script = RECORDER + '\n'.join(text for language, text in blocks_of(page) if language == 'bash')
    log = folder / 'commands'
    log.write_text('')
    subprocess.run(['bash', '-euc', script], cwd=folder, env={**os.environ, 'LOG': str(log)}, check=True)
    return [part.rstrip('\0').split('\0') for part in log.read_text().split('\n\0') if part]


@pytest.fixture(scope='module')
def commands(tmp_path_factory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp('readme')
    for name in ('convnext_knet-pseudo', 'swin_knet-pseudo'):
        for fold in range(5):
            (folder / f'output/{name}/fold{fold}').mkdir(parents=True)
            (folder / f'output/{name}/fold{fold}/test.csv').touch()
    return commands_of_page(ROOT / 'README.md', folder)


def test_the_real_run_trains_every_fold_of_two_models(commands):
    trainings = [words for words in commands if words[1] == 'train.py' and '--dry-run' not in words]
    assert len(trainings) == 10


def test_every_command_is_one_that_its_script_takes(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, *words in commands:
        if program == 'torchrun':
            while words[0].startswith('-'):
                words.pop(0)
        elif program != 'python':
            if words != ['.venv/bin/activate']:
                assert words[0] in SHELL and (ROOT / words[0]).is_file(), words
                subprocess.run(['bash', '-n', words[0]], check=True)
                if words[0] == 'scripts/compare.sh':
                    args = parse_command(['-m', 'tools.compare', *words[1:]], monkeypatch)
                    load_config(ROOT / f'configs/{args.base}.yaml', args.changes)
                    continue
                for name in words[1:]:
                    assert (ROOT / f'configs/{name}.yaml').is_file() or name.isdigit(), words
            continue
        args = parse_command(words, monkeypatch)
        if getattr(args, 'cfg', None):
            load_config(args.cfg, args.set)


def test_the_real_run_runs(commands, tmp_path, monkeypatch, capsys):
    """Its commands as they stand, of one model and two folds, with a small network and few photos."""
    photos = write_set(tmp_path / 'input/data', train=8, test=2) / 'batch_01'
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'photos').mkdir()
    for name in ('photo.jpg', 'photos/1.jpg'):
        shutil.copy(next(photos.iterdir()), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    small = {key: value for key, value in TINY.items() if key != 'head'}
    small |= {'stages': 1, 'dropout': 0, 'tta_scales': [1]}
    run = set()
    for program, *words in commands:
        if program != 'python' or ' '.join(words).startswith(tuple(NOT_RUN)) or '--dry-run' in words:
            continue
        words = [re.sub(r'convnext\b(?!_)', 'convnext_knet', word) for word in words]
        script, argv = split_command(words)
        if '--search' in argv:  # the other model and folds are left out
            argv = [word for word in argv if not re.search(r'swin_knet|fold[234]', word)]
        if re.search(r'swin_knet|--fold [234]', ' '.join(argv)):
            continue
        if 'fold*' in ' '.join(argv):
            argv = [argv[0], *(f'output/convnext_knet/fold{k}/oof.csv' for k in (0, 1))]
        if '--cfg' in argv:
            argv += ['--set', *(f'{key}={json.dumps(value)}' for key, value in small.items())]
        monkeypatch.setattr('sys.argv', [script, *argv])
        status = entry(script)()
        assert status in (None, 0), words
        run.add(script)
    assert run == {
        'prepare.py', 'train.py', 'infer.py', 'pseudo.py', 'ensemble.py', 'evaluate.py', 'submission.py',
        'viz.py', '-m tools.postprocess',
    }  # fmt: skip
    for path in ('convnext_knet/fold1/best.pt', 'convnext_knet-pseudo/fold0/test.csv', 'submission.csv'):
        assert (tmp_path / 'output' / path).is_file(), path


def test_both_languages_have_the_same_commands_tables_and_files():
    def parts(page):
        fences = blocks_of(ROOT / page)
        commands = [re.sub(r' +#.*', '', text) for language, text in fences if language == 'bash']
        files = [re.findall(r'^ *\S+', text, re.MULTILINE) for language, text in fences if language == 'text']
        table = re.findall(r'^\|.*', (ROOT / page).read_text(), re.MULTILINE)
        cells = [cell.lstrip('0') for cell in re.findall(r'\d*\.\d+|`[^`]+`', '\n'.join(table))]
        return commands, files, cells

    commands, files, cells = parts('README.md')
    assert parts('README.ko.md') == (commands, files, cells)
    assert len(commands) >= 2 and len(cells) >= 2


def test_the_tree_names_every_module():
    tree = next(text for language, text in blocks_of(ROOT / 'CONTRIBUTING.md') if language == 'text')
    named = re.findall(r'\w+\.py\b', tree, re.ASCII)
    modules = [Path(name).name for name in MODULES]
    assert sorted(named) == sorted(name for name in modules if name != '__init__.py')


@pytest.mark.parametrize('page', [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text):
        assert (page.parent / target).exists(), f'{page.name}: {target}'
