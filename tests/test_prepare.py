"""Test the commands of prepare.py: a clean set passes, and each fault ends in one line and status 2."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_set
from entry_points import ROOT
from PIL import Image

import prepare
from config import CLASSES, HOME
from data.coco import draw_mask, read_coco
from utils.cli import run_script
from utils.errors import BadInput


def test_check_of_a_clean_set(shapes, capsys):
    prepare.command(['check', '--data', str(shapes)])
    out = capsys.readouterr().out
    assert 'train: 24 photos' in out and 'test: 6 photos' in out and 'nothing wrong found' in out


def test_check_of_the_competitions_photos(boostcamp60, capsys):
    prepare.command(['check', '--data', str(boostcamp60)])
    out = capsys.readouterr().out
    assert 'train: 60 photos' in out and 'nothing wrong found' in out


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda root: (root / 'batch_01/0000.jpg').unlink(), '0000.jpg: no such image'),
        (
            lambda root: (root / 'batch_01/0001.jpg').write_bytes(
                (root / 'batch_01/0001.jpg').read_bytes()[:900]
            ),
            'cannot be decoded',
        ),
        (
            lambda root: Image.new('I;16', (64, 64)).save(root / 'batch_01/0002.jpg', 'PNG'),
            'write intensity: [0, 1] into',
        ),
        (lambda root: Image.new('RGB', (65, 64)).save(root / 'batch_01/0002.jpg'), 'its record says 64x64'),
        (lambda root: (root / 'train_all.json').write_text('{"images": ['), 'not JSON, or cut off'),
        (lambda root: (root / 'train_all.json').unlink(), 'has no annotations'),
        (
            lambda root: [p.unlink() for p in root.glob('batch_01/000[01].jpg')],
            '(one of 2 faulty photos among 4)',
        ),
    ],
)
def test_check_ends_in_one_line_and_status_2(tmp_path, damage, message, monkeypatch, capfd):
    root = write_set(tmp_path / 'd', train=3, test=1, side=64)
    damage(root)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'check', '--data', str(root)])
    with pytest.raises(SystemExit) as stopped:
        run_script(prepare.command)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count('\n') == 1


def test_masks_are_png_ids_at_the_photos_own_size(shapes, tmp_path):
    prepare.command(['masks', '--data', str(shapes), '--out', str(tmp_path / 'masks')])
    coco = read_coco(shapes, 'train', HOME)
    for photo in coco.photos:
        written = np.asarray(Image.open(tmp_path / 'masks' / f'{photo.file_name}.png'))
        assert written.dtype == np.uint8 and np.array_equal(written, draw_mask(photo))
    (tmp_path / 'file').write_text('')
    with pytest.raises(BadInput, match='cannot be written'):
        prepare.command(['masks', '--data', str(shapes), '--out', str(tmp_path / 'file' / 'x')])


def test_folds_are_printed_and_saved(shapes, tiny_yaml, tmp_path, capsys):
    prepare.command(['folds', '--cfg', str(tiny_yaml), '--set', f'cache_dir={tmp_path / "c"}'])
    assert 'photos of each class in each fold' in capsys.readouterr().out
    assert (tmp_path / 'c' / 'folds.csv').exists()


def test_folds_of_long_class_names_stand_below_each_other(tiny_yaml, tmp_path, capsys):
    names = ', '.join(['Background', *CLASSES[1:-1], 'Clothing of all kinds'])
    root = write_set(tmp_path / 'd', train=6, test=2, side=64)
    text = f'classes: [{names}]\ncategories: {{Clothing: Clothing of all kinds}}'
    (root / 'competition.yaml').write_text(text)
    places = [f'data_root={root}', f'cache_dir={tmp_path / "c"}']
    prepare.command(['folds', '--cfg', str(tiny_yaml), '--set', *places])
    _, *table, _ = capsys.readouterr().out.splitlines()
    assert len(table) == 12 and len({len(line) for line in table}) == 1


def test_demo_set_is_a_clean_set(tmp_path, capsys):
    out = tmp_path / 'demo'
    prepare.command(['demo', '--out', str(out), '--train', '5', '--test', '2', '--seed', '3'])
    prepare.command(['check', '--data', str(out)])
    assert 'nothing wrong found' in capsys.readouterr().out
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/file').write_text('')
    with pytest.raises(BadInput, match='not empty and not a demo set'):
        prepare.command(['demo', '--out', str(tmp_path / 'mine')])


def test_demo_sizes_that_are_refused(tmp_path, capsys):
    for option in ('--train=-1', '--test=0', '--seed=-1'):
        with pytest.raises(SystemExit) as stopped:
            prepare.command(['demo', '--out', str(tmp_path / 'demo'), option])
        assert stopped.value.code == 2 and 'expected a whole number' in capsys.readouterr().err
    assert not (tmp_path / 'demo').exists()


def test_help_and_check_import_nothing_slow(shapes):
    """--help lists every command; neither it nor a check loads torch."""
    code = (
        'import sys, prepare\n'
        'try: prepare.command(sys.argv[1:])\n'
        'except SystemExit: pass\n'
        'print(sorted({"torch", "scipy", "albumentations", "urllib3"} & sys.modules.keys()))'
    )

    def run(*words):
        done = subprocess.run(
            [sys.executable, '-c', code, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    printed = run('--help')
    assert printed.endswith('\n[]\n')
    for name in ('check', 'competition', 'masks', 'folds', 'demo', 'taco', 'coco', 'yolo', 'from-masks'):
        assert re.search(rf'^    {name}\s+\S', printed, re.MULTILINE)
    assert run('check', '--data', str(shapes)).endswith("\n['scipy']\n")  # of the near-duplicates
