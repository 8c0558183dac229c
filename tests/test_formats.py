"""Test prepare.py yolo and from-masks: masks survive a round trip, and each fault ends in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_set
from PIL import ExifTags, Image

import prepare
import train
from config import CLASSES, load_config
from data.coco import draw_mask, read_coco, read_labels, read_photo
from utils.cli import run_script
from utils.errors import BadInput

NAMES = ['can', 'big bottle', 'bag']


def write_yolo(root: Path, data: Path, names: tuple[str, ...] = CLASSES[1:]) -> Path:
    """Write a data root as a YOLO set of train, val and test; return its data.yaml."""
    photos = read_coco(data, 'train', CLASSES).photos
    parts = {
        'train': photos[:-4],
        'val': photos[-4:],
        'test': read_labels(data / 'test_labels.json', CLASSES).photos,
    }
    for split, photos in parts.items():
        for photo in photos:
            stem = Path(photo.file_name).stem
            image, label = root / f'images/{split}/{stem}.jpg', root / f'labels/{split}/{stem}.txt'
            image.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes((data / photo.file_name).read_bytes())
            lines = []
            for one in photo.annotations:
                points = np.array(one.polygons[0]).reshape(-1, 2) / (photo.width, photo.height)
                lines.append(f'{one.category_id - 1} ' + ' '.join(f'{v:.6f}' for v in points.ravel()))
            label.write_text('\n'.join(lines))
    settings = {split: f'images/{split}' for split in parts} | {'names': dict(enumerate(names))}
    (root / 'data.yaml').write_text(yaml.safe_dump(settings))
    return root / 'data.yaml'


def run_yolo(path: Path, out: Path, *options: str) -> None:
    prepare.command(['yolo', '--yaml', str(path), '--out', str(out), *options])


def masks_of(photos) -> dict[str, np.ndarray]:
    return {Path(photo.file_name).stem: draw_mask(photo) for photo in photos}


def assert_same(masks: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert masks.keys() == expected.keys()
    assert all(np.array_equal(masks[name], expected[name]) for name in expected)


def test_yolo_import_gives_the_same_masks(tmp_path, capsys):
    data, out = write_set(tmp_path / 'd', train=10, test=3, side=96), tmp_path / 'out'
    run_yolo(write_yolo(tmp_path / 'yolo', data), out)
    coco = read_coco(out, 'train', CLASSES)
    assert_same(masks_of(coco.photos), masks_of(read_coco(data, 'train', CLASSES).photos))
    labels = read_labels(out / 'test_labels.json', CLASSES).photos
    assert_same(masks_of(labels), masks_of(read_labels(data / 'test_labels.json', CLASSES).photos))
    assert json.loads((out / 'test.json').read_text())['annotations'] == []
    assert (out / 'images/train/0000.jpg').read_bytes() == (data / 'batch_01/0000.jpg').read_bytes()
    assert 'train_all.json: 10 photos, 30 annotations, 0 photos with none' in capsys.readouterr().out
    prepare.command(['check', '--data', str(out)])
    assert 'nothing wrong found' in capsys.readouterr().out


def small_yolo(root: Path, label: str | None = '1 0 0 1 0 1 0.5', **settings) -> Path:
    """Write a set of one photo, 20 x 40 pixels, in the layout of Roboflow."""
    (root / 'train/images').mkdir(parents=True)
    (root / 'train/labels').mkdir()
    Image.new('RGB', (40, 20), (80, 90, 100)).save(root / 'train/images/a.png')
    if label is not None:
        (root / 'train/labels/a.txt').write_text(label)
    settings = {'train': '../train/images', 'nc': 3, 'names': NAMES} | settings
    (root / 'data.yaml').write_text(yaml.safe_dump(settings))
    return root / 'data.yaml'


def test_yolo_set_of_roboflow_with_other_classes(tmp_path, capsys):
    run_yolo(small_yolo(tmp_path / 'y', '1 0 0 1 0 1 0.5 0 0.5\n\n'), tmp_path / 'out')
    mask = draw_mask(read_coco(tmp_path / 'out', 'train', ('Background', *NAMES)).photos[0])
    assert mask.shape == (20, 40) and (mask[:10] == 2).all() and (mask[10:] == 0).all()
    assert 'classes: [Background, can, big bottle, bag]' in capsys.readouterr().out


def test_yolo_split_that_is_a_list_and_a_photo_without_a_label(tmp_path):
    path = small_yolo(tmp_path / 'y', None, train=['train.txt'])
    (tmp_path / 'y/train.txt').write_text('./train/images/a.png\n')
    run_yolo(path, tmp_path / 'out')
    photo = read_coco(tmp_path / 'out', 'train', ('Background', *NAMES)).photos[0]
    assert photo.file_name == 'train/images/a.png' and not draw_mask(photo).any()


@pytest.mark.parametrize(
    ('label', 'message'),
    [
        ('3 0 0 1 0 1 1', "a.txt: line 1: found the class '3', expected 0 to 2"),
        ('can 0 0 1 0 1 1', "found the class 'can'"),
        ('0 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2', 'line 2: found a box'),
        ('0 0 0 1 0 1', 'found 5 coordinates'),
        ('0 0 0 20 0 1 1', "found the coordinate '20', expected 0 to 1"),
        ('0 0 0 x 0 1 1', "found the coordinate 'x'"),
        ('0 0 0 nan 0 1 1', "found the coordinate 'nan'"),
    ],
)
def test_yolo_labels_that_are_refused(tmp_path, label, message, monkeypatch, capfd):
    path, out = small_yolo(tmp_path / 'y', label), tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'yolo', '--yaml', str(path), '--out', str(out)])
    with pytest.raises(SystemExit) as stopped:
        run_script(prepare.command)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count('\n') == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'names': 3}, 'names is'),
        ({'names': {0: 'a', 2: 'b'}}, 'names is'),
        ({'names': ['a', 'a']}, 'names must be unique'),
        ({'train': 'none'}, 'no such folder or list'),
        ({'train': None}, 'lists no photos under train or val'),
        ({'val': 'train/images'}, 'is listed twice in train, val and test'),
        ({'train': '/'}, 'lies outside'),
    ],
)
def test_yolo_settings_that_are_refused(tmp_path, settings, message):
    path = small_yolo(tmp_path / 'y', **settings)
    if settings.get('train') == '/':
        other = tmp_path / 'other'
        other.mkdir()
        Image.new('RGB', (4, 4)).save(other / 'b.png')
        path.write_text(yaml.safe_dump({'train': str(other), 'names': NAMES}))
    with pytest.raises(BadInput, match=message):
        run_yolo(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_an_import_does_not_overwrite_a_data_set(tmp_path):
    path, out = small_yolo(tmp_path / 'y'), tmp_path / 'out'
    out.mkdir()
    (out / 'train_all.json').write_text('mine')
    (out / 'test.json').write_text('of another set')
    with pytest.raises(BadInput, match='already exists'):
        run_yolo(path, out)
    assert (out / 'train_all.json').read_text() == 'mine'
    run_yolo(path, out, '--overwrite')
    assert len(read_coco(out, 'train', ('Background', *NAMES)).photos) == 1
    assert not (out / 'test.json').exists()


def test_written_masks_can_be_imported_again(tmp_path):
    data, masks, out = write_set(tmp_path / 'd', train=6, test=2, side=96), tmp_path / 'm', tmp_path / 'out'
    content = json.loads((data / 'train_all.json').read_text())
    content['annotations'][0]['iscrowd'] = 1
    (data / 'train_all.json').write_text(json.dumps(content))
    for split in ('train', 'test'):
        for photo in read_coco(data, split, CLASSES).photos:
            (tmp_path / split / photo.file_name).parent.mkdir(parents=True, exist_ok=True)
            (data / photo.file_name).rename(tmp_path / split / photo.file_name)
    prepare.command(['masks', '--data', str(data), '--out', str(masks)])
    (masks / 'batch_01/0003.jpg.png').rename(masks / 'batch_01/0003.png')
    words = ['--photos', str(tmp_path / 'train'), '--masks', str(masks), '--test', str(tmp_path / 'test')]
    prepare.command(['from-masks', *words, '--out', str(out)])
    imported, expected = (masks_of(read_coco(root, 'train', CLASSES).photos) for root in (out, data))
    assert_same(imported, expected)
    assert any((mask == 255).any() for mask in imported.values())
    assert [photo.file_name for photo in read_coco(out, 'test', CLASSES).photos] == [
        f'batch_01/{i:04d}.jpg' for i in (6, 7)
    ]
    prepare.command(['check', '--data', str(out)])


def write_pair(root: Path, mask: Image.Image, name: str = 'a.png') -> list[str]:
    for folder in ('p', 'm'):
        (root / folder).mkdir()
    Image.new('RGB', (4, 3)).save(root / 'p/a.jpg')
    mask.save(root / 'm' / name)
    return ['from-masks', '--photos', str(root / 'p'), '--masks', str(root / 'm'), '--out', str(root / 'out')]


@pytest.mark.parametrize(
    ('mask', 'name', 'message'),
    [
        (Image.new('L', (4, 3), 11), 'a.png', 'found the id 11, expected 0 to 10, or 255'),
        (Image.new('RGB', (4, 3)), 'a.png', 'found mode RGB'),
        (Image.new('L', (3, 4)), 'a.png', 'found 4x3 pixels, its photo has 3x4'),
        (Image.new('L', (4, 3)), 'b.png', 'a.jpg: has no mask; expected'),
    ],
)
def test_masks_that_are_refused(tmp_path, mask, name, message):
    with pytest.raises(BadInput, match=message):
        prepare.command(write_pair(tmp_path, mask, name))
    assert not (tmp_path / 'out').exists()


def test_a_mask_without_a_photo_and_a_photo_with_two_masks(tmp_path):
    words = write_pair(tmp_path, Image.new('L', (4, 3)))
    (tmp_path / 'm/b.png').write_bytes((tmp_path / 'm/a.png').read_bytes())
    with pytest.raises(BadInput, match='b.png: no photo under .* has this mask'):
        prepare.command(words)
    (tmp_path / 'm/b.png').rename(tmp_path / 'm/a.jpg.png')
    with pytest.raises(BadInput, match='has two masks'):
        prepare.command(words)


def test_photos_are_stored_upright_in_rgb(tmp_path):
    """Import photos with an EXIF orientation, two pictures in one file as phones write them, grey, with
    alpha.
    """
    (tmp_path / 'p').mkdir()
    (tmp_path / 'm').mkdir()
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / 'p/turned.jpg', exif=exif, quality=97)
    turned.save(tmp_path / 'p/two.jpg', 'MPO', exif=exif, quality=97, save_all=True, append_images=[turned])
    Image.fromarray(upright).convert('L').save(tmp_path / 'p/grey.png')
    Image.fromarray(upright).convert('RGBA').save(tmp_path / 'p/alpha.png')
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :8] = 4
    for name in ('turned', 'two', 'grey', 'alpha'):
        Image.fromarray(mask).save(tmp_path / f'm/{name}.png')
    out = tmp_path / 'out'
    words = ['--photos', str(tmp_path / 'p'), '--masks', str(tmp_path / 'm'), '--out', str(out)]
    prepare.command(['from-masks', *words])
    coco = read_coco(out, 'train', CLASSES)
    assert len(coco.photos) == 4
    assert (out / 'two.jpg').read_bytes() == (out / 'turned.jpg').read_bytes()
    for photo in coco.photos:
        assert np.array_equal(draw_mask(photo), mask)
        assert np.abs(read_photo(coco, photo).astype(int) - upright).max() < 30


def test_a_second_data_set_from_end_to_end(tmp_path, tiny_yaml, capsys):
    """Import YOLO labels of three classes and train an epoch with the settings that are printed."""
    data = write_set(tmp_path / 'd', train=12, test=2, side=96)
    for file in ('train_all.json', 'test_labels.json'):
        content = json.loads((data / file).read_text())
        for one in content['annotations']:
            one['category_id'] = 1 + one['category_id'] % 3
        (data / file).write_text(json.dumps(content))
    run_yolo(write_yolo(tmp_path / 'yolo', data, tuple(NAMES)), tmp_path / 'mine')
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if line.startswith('classes: ')]
    config = tmp_path / 'mine.yaml'
    config.write_text(tiny_yaml.read_text() + f'\n{line}\n')
    (last,) = [line for line in printed if line.startswith('add to each command --set ')]
    cfg = load_config(config, last.split(' --set ')[1].split())
    assert cfg.data_root == tmp_path / 'mine' and cfg.classes == ('Background', *NAMES)
    assert 0 <= train.main(cfg, 0) <= 1
