"""The last line of a script, "next: python ...", is a command that runs as it is printed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_csv, write_rectangles, write_set
from entry_points import entry, parse_command, split_command
from test_formats import write_yolo

import prepare
import train
from config import load_config
from utils.cli import python_command
from utils.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def trained(shapes, shared_cache, tmp_path_factory) -> Path:
    """A folder whose name has a space, with a trained fold under it, and the config of that."""
    folder = tmp_path_factory.mktemp('next') / 'a folder'
    folder.mkdir()
    places = {'data_root': shapes, 'cache_dir': shared_cache, 'output_dir': folder / 'output'}
    lines = {**TINY, **{key: str(path) for key, path in places.items()}}
    (folder / 'tiny.yaml').write_text(
        '\n'.join(f'{key}: {json.dumps(value)}' for key, value in lines.items())
    )
    train.main(load_config(folder / 'tiny.yaml'), 0)
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """A copy of it, to change."""
    shutil.copytree(trained, tmp_path / 'a folder')
    path = tmp_path / 'a folder/tiny.yaml'
    path.write_text(path.read_text().replace(str(trained), str(path.parent)))
    return path.parent


@pytest.fixture
def follow(monkeypatch, capsys):
    """Types a command, and what each says is next; the scripts and commands typed, and the last's lines. One
    of the script `until` is parsed, and its config read, but not run, unless it is the first.
    """

    def typed(words: list[str], until: str) -> tuple[list[str], list[str]]:
        path = []
        while True:
            script, argv = split_command(words)
            path.append(f'{script} {argv[0]}' if re.fullmatch('[a-z][a-z-]+', argv[0]) else script)
            monkeypatch.setattr(sys, 'argv', [script, *argv])
            run = entry(script)
            if script == until and path[1:]:
                parsed(words)
                return path, []
            capsys.readouterr()
            assert run() in (None, 0)
            lines = capsys.readouterr().out.splitlines()
            following = [line for line in lines if line.startswith('next: ')]
            if not following:
                return path, lines
            assert following == lines[-1:]
            python, *words = shlex.split(following[0].removeprefix('next: '))
            assert python == 'python'

    def parsed(words) -> None:
        args = parse_command(words, monkeypatch)
        if hasattr(args, 'cfg'):
            cfg = load_config(args.cfg, args.set)
            assert words[0] != 'infer.py' or (cfg.run_dir(args.fold) / 'best.pt').is_file()

    monkeypatch.chdir(ROOT)
    return lambda *words, until='': typed([str(word) for word in words], until)


PREDICTIONS = ['infer.py', 'infer.py', 'submission.py check']  # out of fold, of the test photos


def test_from_folds_to_a_checked_submission(place, follow):
    """Two folds, whose mean is predicted, as the first would decide their vote; with a third CSV the second
    ends with the vote. Settings that a shell would split go along.
    """
    rest = ('--cfg', place / 'tiny.yaml', '--set', 'tta_scales=[1, 0.5]', 'name=two')
    path, lines = follow('prepare.py', 'folds', *rest)
    assert path == ['prepare.py folds', 'train.py', *PREDICTIONS] and lines[-1] == 'ok'
    path, lines = follow('train.py', '--fold', '1', *rest)
    assert path == ['train.py', 'infer.py', *PREDICTIONS] and lines[-1] == 'ok'
    third = place / 'output/two/fold2/test.csv'
    third.parent.mkdir()
    shutil.copy(place / 'output/two/fold1/test.csv', third)
    path, lines = follow('infer.py', '--fold', '1', '--split', 'test', *rest)
    assert path == ['infer.py', 'ensemble.py', PREDICTIONS[2]] and lines[-1] == 'ok'
    shutil.rmtree(third.parent)
    assert (place / 'output/submission.csv').is_file()
    path, _ = follow('infer.py', '--fold', 'all', '--split', 'oof', '--no-tta', *rest)
    assert path == PREDICTIONS
    path, _ = follow('prepare.py', 'folds', *rest, until='train.py')
    assert path == ['prepare.py folds', 'train.py']


@pytest.mark.parametrize(
    ('words', 'then'),
    [
        (['pseudo.py', '--teacher', 'tiny'], 'infer.py'),
        (['-m', 'tools.search_tta', '--flips', 'h', '--rotations', '--scales', '1'], 'infer.py'),
        (['-m', 'tools.soup', 'best.pt', 'last.pt'], 'infer.py'),
        (['train.py', '--dry-run'], 'train.py'),
    ],
    ids=lambda value: split_command(value)[0] if isinstance(value, list) else 'then',
)
def test_from_a_trained_fold(words, then, place, follow):
    last = torch.load(place / 'output/tiny/fold0/last.pt')  # other weights than those of best.pt
    last['model'] = {key: tensor * 2 for key, tensor in last['model'].items()}
    torch.save(last, place / 'output/tiny/fold0/last.pt')
    words = [place / 'output/tiny/fold0' / word if word.endswith('.pt') else word for word in words]
    name = ['--set', 'name=another'] if {'tools.soup', 'train.py'} & {*words} else []
    typed = (*words, '--fold', '0', '--cfg', place / 'tiny.yaml', *name)
    assert follow(*typed, until=then)[0] == [split_command(words)[0], then]


@pytest.mark.parametrize('option', ['--resume', '--overwrite'])
def test_a_dry_run_is_followed_by_the_same_command(option, place, capsys):
    train.command(['--cfg', str(place / 'tiny.yaml'), '--fold', '0', '--dry-run', option])
    (words,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('next: ')]
    assert f'--fold 0 {option} --cfg' in words


def test_without_test_photos_a_report_is_next(place, follow, shapes):
    data = place / 'data'
    shutil.copytree(shapes, data)
    (data / 'test.json').unlink()
    rest = ('--cfg', place / 'tiny.yaml', '--set', f'data_root={data}')
    path, _ = follow('infer.py', '--fold', '0', '--split', 'oof', *rest, until='viz.py')
    assert path == ['infer.py', 'viz.py report']


def test_from_clean_masks(place, follow, shapes):
    """What the search of tools/postprocess.py found is applied to the test photos, and that is checked."""
    data, folder = place / 'data', place / 'output/tiny/fold0'
    masks = write_rectangles(data, 256, 256, {f'{n}.jpg': (10 + 5 * n, 20, 60, 80, 1) for n in range(12)})
    (data / 'test.json').write_text((data / 'train_all.json').read_text())
    for mask in masks.values():
        mask[::32, ::32] = 9
    for split in ('oof', 'test'):
        write_csv(folder / f'{split}.csv', masks)
    path, lines = follow('-m', 'tools.postprocess', 'search', folder / 'oof.csv', '--data', data)
    assert path == ['-m tools.postprocess search', '-m tools.postprocess apply', 'submission.py check']
    assert lines[-1] == 'ok' and (folder / 'test_cleaned.csv').is_file()


@pytest.mark.parametrize('typed', [[], ['folds=4']])
def test_folds_that_are_made_already(typed, tmp_path, follow, capsys):
    """Two, where the config or --set asks for others; what asks for them by hand is told in a line."""
    data = write_set(tmp_path / 'a set', train=10, test=2, side=64)
    keys = [f'data_root={data}', f'cache_dir={data}_cache']
    prepare.command(['folds', '--cfg', 'configs/trash481.yaml', '--set', *keys, 'folds=2'])
    rest = ['--cfg', 'configs/trash481.yaml', '--set', *typed] if typed else []
    path, _ = follow('prepare.py', 'check', '--data', data, *rest, until='train.py')
    assert path == ['prepare.py check', 'prepare.py folds', 'train.py']
    wanted = typed[0] if typed else 'folds=5'
    with pytest.raises(BadInput, match=r'has the folds \[0, 1\], but .*; set folds=2, or give another'):
        prepare.command(['folds', '--cfg', 'configs/trash481.yaml', '--set', *keys, wanted])


def test_typed_elsewhere_without_this_python(tmp_path, monkeypatch):
    """From another folder, and where `python` is none or another one, the command has whole paths."""
    folder = tmp_path / 'a folder'
    folder.mkdir()
    python = Path(sys.executable)
    monkeypatch.chdir(ROOT)
    assert python_command('train.py', '--set', 'a=[1, 2]') == "python train.py --set 'a=[1, 2]'"
    assert python_command('-m', 'tools.soup') == 'python -m tools.soup'
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    assert python_command('-m', 'tools.soup').split()[0].endswith('bin/python')
    monkeypatch.chdir(folder)
    assert python_command('-m', 'tools.soup') == f'{python} -m tools.soup'
    typed = python_command('prepare.py', 'check', '--help')
    assert typed == f'{python} {ROOT / "prepare.py"} check --help'
    done = subprocess.run(['bash', '-c', typed], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('usage: prepare.py check')


@pytest.mark.parametrize('name', ['check', 'masks', 'demo', 'yolo', 'from-masks'])
def test_from_data_to_folds(name, tmp_path, follow):
    """With the classes and the places of the set, under a config of the repository."""
    data, out = write_set(tmp_path / 'a set', train=10, test=2, side=64), tmp_path / 'an out'
    photos = tmp_path / 'photos/batch_01'
    photos.mkdir(parents=True)
    for n in range(10):
        shutil.copy(data / f'batch_01/{n:04d}.jpg', photos)
    names = [f'class {n}, made up' for n in range(1, 11)]
    if name == 'from-masks':
        prepare.command(['masks', '--data', str(data), '--out', str(tmp_path / 'masks')])
    words = {
        'check': ['--data', data],
        'masks': ['--data', data, '--out', out],
        'demo': ['--out', out, '--train', '2', '--test', '1'],
        'yolo': ['--yaml', write_yolo(tmp_path / 'yolo', data, names), '--out', out],
        'from-masks': ['--photos', photos.parent, '--masks', tmp_path / 'masks', '--out', out],
    }
    path, _ = follow('prepare.py', name, *words[name], until='train.py')
    checked = ['prepare.py check'] if name in ('yolo', 'from-masks') else []
    assert path == [f'prepare.py {name}', *checked, 'prepare.py folds', 'train.py']
    made = tmp_path / ('a set_cache' if name in ('check', 'masks') else 'an out_cache')
    assert (made / 'folds.csv').is_file()
