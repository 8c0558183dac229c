"""Test the commands of prepare.py: a clean set passes, and each fault ends in one line and status 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set
from entry_points import ROOT
from PIL import Image

import prepare
from config import CLASSES, HOME, read_competition
from data.coco import draw_mask, read_coco
from data.photos import warn_once
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
    names = 'check competition test masks folds demo taco coco yolo from-masks from-json cvat'
    for name in names.split():
        assert re.search(rf'^    {name}\s+\S', printed, re.MULTILINE)
    assert run('check', '--data', str(shapes)).endswith('\n[]\n')


# --- classes that overlap -----------------------------------------------------------------------------------

LARGE, SMALL = [2, 2, 30, 2, 30, 20, 2, 20], [10, 5, 20, 5, 20, 40, 10, 40]


def write_overlaps(root: Path, names: tuple[str, str] = ('can', 'lid')) -> dict[str, np.ndarray]:
    """Write a COCO file of two objects over each other; return the whole mask of each."""
    root.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 48)).save(root / 'a.png')
    annotations = [
        {'id': k, 'image_id': 0, 'category_id': k + 1, 'iscrowd': 0, 'segmentation': [polygon]}
        for k, polygon in enumerate((LARGE, SMALL))
    ]
    content = {
        'images': [{'id': 0, 'file_name': 'a.png', 'height': 48, 'width': 40}],
        'categories': [{'id': k + 1, 'name': name} for k, name in enumerate(names)],
        'annotations': annotations,
    }
    (root / 'train_all.json').write_text(json.dumps(content))
    masks = {name: np.zeros((48, 40), np.uint8) for name in names}
    masks[names[0]][2:20, 2:30], masks[names[1]][5:40, 10:20] = 1, 1
    return masks


def test_classes_of_a_multilabel_task(tmp_path, capsys):
    whole = write_overlaps(tmp_path / 'd')
    prepare.command(['competition', '--data', str(tmp_path / 'd'), '--task', 'multilabel'])
    competition = read_competition(tmp_path / 'd')
    assert competition.classes == ('can', 'lid') and competition.is_multilabel
    assert competition.score_size == 'own'
    prepare.command(['masks', '--data', str(tmp_path / 'd'), '--out', str(tmp_path / 'm')])
    for name, mask in whole.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f'm/{name}/a.png.png')), mask)
    capsys.readouterr()
    prepare.command(['check', '--data', str(tmp_path / 'd')])
    out = capsys.readouterr().out
    both = int((whole['can'] & whole['lid']).sum())
    for name, mask in whole.items():
        assert re.search(rf'^{name} +1 +1 +{mask.sum()} +{mask.mean():.2%}$', out, re.MULTILINE)
    total = 2 * both / sum(map(np.sum, whole.values()))
    shares = [f'{name} ({both / mask.sum():.0%})' for name, mask in reversed(whole.items())]
    assert f"{total:.1%} of the objects' pixels have several classes, most of {', '.join(shares)}" in out
    assert 'Background' not in out


def test_check_says_how_much_lies_under_others(tmp_path, capsys):
    whole = write_overlaps(tmp_path / 'd')
    prepare.command(['competition', '--data', str(tmp_path / 'd')])
    capsys.readouterr()
    prepare.command(['check', '--data', str(tmp_path / 'd')])
    both, pixels = int((whole['can'] & whole['lid']).sum()), [int(mask.sum()) for mask in whole.values()]
    text = f"{both / sum(pixels):.1%} of the objects' pixels lie under others"
    out = capsys.readouterr().out
    assert f'{text}, most of can ({both / pixels[0]:.0%})' in out and 'task: multilabel' in out


def test_names_of_classes_that_are_no_folders(tmp_path):
    """They stay inside of the folder, and apart."""
    write_overlaps(tmp_path / 'd', ('../a', '__.a'))
    prepare.command(['competition', '--data', str(tmp_path / 'd'), '--task', 'multilabel'])
    prepare.command(['masks', '--data', str(tmp_path / 'd'), '--out', str(tmp_path / 'm/x')])
    folders = {path.parent.relative_to(tmp_path / 'm/x').as_posix() for path in tmp_path.rglob('*.png.png')}
    assert len(folders) == 2 and not any('/' in folder or folder.startswith('.') for folder in folders)


# --- test.json of a folder ----------------------------------------------------------------------------------


def write_photos(folder: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30 + k, 20)).save(folder / name)


def test_photos_below_the_root(tmp_path):
    """They stay where they are, in the order in which a person counts, also of one name in two folders."""
    root = tmp_path / 'd'
    write_photos(root / 'test', 'a10.png', 'a9.png', 'x/a9.png')
    before = {path: path.read_bytes() for path in root.rglob('*.png')}
    prepare.command(['test', '--photos', str(root / 'test'), '--data', str(root)])
    coco = read_coco(root, 'test', HOME)
    assert [photo.file_name for photo in coco.photos] == ['test/a9.png', 'test/a10.png', 'test/x/a9.png']
    assert [photo.size for photo in coco.photos] == [(20, 31), (20, 30), (20, 32)]
    assert {path: path.read_bytes() for path in root.rglob('*.png')} == before


def test_photos_elsewhere_are_copied(tmp_path):
    write_photos(tmp_path / 'p', 'a.png', 'x/a.png')
    write_photos(tmp_path / 'd', 'a.png')
    words = ['test', '--photos', str(tmp_path / 'p'), '--data', str(tmp_path / 'd')]
    prepare.command(words)
    coco = read_coco(tmp_path / 'd', 'test', HOME)
    assert [photo.file_name for photo in coco.photos] == ['test/a.png', 'test/x/a.png']
    for photo in coco.photos:
        source = tmp_path / 'p' / photo.file_name.removeprefix('test/')
        assert coco.path(photo).read_bytes() == source.read_bytes()
    before = (tmp_path / 'd/test.json').read_bytes()
    with pytest.raises(BadInput, match='test.json: already exists; --overwrite replaces it'):
        prepare.command(words)
    Image.new('RGB', (9, 9)).save(tmp_path / 'p/a.png')
    with pytest.raises(BadInput, match='test/a.png: is in the way of .*p/a.png'):
        prepare.command([*words, '--overwrite'])
    assert (tmp_path / 'd/test.json').read_bytes() == before
    (tmp_path / 'd/test/a.png').unlink()
    prepare.command([*words, '--overwrite'])
    assert read_coco(tmp_path / 'd', 'test', HOME).photos[0].size == (9, 9)


def write_noise(path: Path, cut: int = 0) -> bytes:
    """Write a JPEG of noise without its last bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path, 'JPEG')
    path.write_bytes(path.read_bytes()[: -cut or None])
    return path.read_bytes()


def test_a_cut_off_test_photo_is_taken(tmp_path, caplog):
    """No way in refuses it; a training photo is refused."""
    write_photos(tmp_path / 'p', 'a.png')
    write_photos(tmp_path / 'm', 'a.png')
    Image.new('L', (30, 20), 1).save(tmp_path / 'm/a.png')
    content = write_noise(tmp_path / 't/b.jfif', cut=200)
    words = ['from-masks', '--photos', str(tmp_path / 'p'), '--masks', str(tmp_path / 'm')]
    words += ['--classes', 'can', '--test', str(tmp_path / 't'), '--out', str(tmp_path / 'd')]
    prepare.command(words)
    assert (tmp_path / 'd/b.jfif').read_bytes() == content
    assert 'b.jfif: is cut off' in caplog.text and 'will be predicted from what decodes' in caplog.text
    warn_once.cache_clear()
    caplog.clear()
    prepare.command(['test', '--photos', str(tmp_path / 't'), '--data', str(tmp_path / 'd'), '--overwrite'])
    assert read_coco(tmp_path / 'd', 'test', HOME).photos.names() == ['test/b.jfif']
    assert 'b.jfif: is cut off' in caplog.text
    write_noise(tmp_path / 'p/a.jpg', cut=200)
    (tmp_path / 'p/a.png').unlink()
    with pytest.raises(BadInput, match='a.jpg: cannot be decoded: .*truncated.*; copy or download it again'):
        prepare.command([*words, '--overwrite'])


def test_training_photos_are_no_test_photos(tmp_path):
    write_overlaps(tmp_path / 'd')
    words = ['test', '--photos', str(tmp_path / 'd'), '--data', str(tmp_path / 'd')]
    with pytest.raises(BadInput, match=r'has the training photo a.png \(one of 1\)'):
        prepare.command(words)
    (tmp_path / 'd/test').mkdir()
    (tmp_path / 'd/test/b.png').write_bytes(b'no photo')
    with pytest.raises(BadInput, match='b.png: cannot be decoded'):
        prepare.command([*words[:2], str(tmp_path / 'd/test'), *words[3:]])
    assert not (tmp_path / 'd/test.json').exists()
