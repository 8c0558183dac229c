"""Test prepare.py yolo and from-masks: masks survive a round trip, and each fault ends in one line."""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_set
from PIL import Image
from pycocotools import mask as rle_codec

import prepare
import train
from config import CLASSES, HOME, Competition, load_config, read_competition
from data.coco import draw_mask, draw_planes, read_coco, read_labels
from utils.cli import run_script
from utils.errors import BadInput

NAMES = ['can', 'big bottle', 'bag']
CORNERS = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])  # of a rectangle
OTHER = Competition(classes=('Background', *NAMES))


def write_yolo(root: Path, data: Path, names: tuple[str, ...] = CLASSES[1:]) -> Path:
    """Write a data root as a YOLO set of train, val and test; return its data.yaml."""
    photos = read_coco(data, 'train', HOME).photos
    parts = {
        'train': photos[:-4],
        'val': photos[-4:],
        'test': read_labels(data / 'test_labels.json', HOME).photos,
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
                box = rle_codec.toBbox({'size': [photo.height, photo.width], 'counts': one.rle})
                points = (box[:2] + box[2:] * CORNERS) / (photo.width, photo.height)
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
    coco = read_coco(out, 'train', HOME)
    assert_same(masks_of(coco.photos), masks_of(read_coco(data, 'train', HOME).photos))
    labels = read_labels(out / 'test_labels.json', HOME).photos
    assert_same(masks_of(labels), masks_of(read_labels(data / 'test_labels.json', HOME).photos))
    assert json.loads((out / 'test.json').read_text())['annotations'] == []
    assert (out / 'images/train/0000.jpg').read_bytes() == (data / 'batch_01/0000.jpg').read_bytes()
    assert 'train_all.json: 10 photos, 30 annotations, 0 photos with none' in capsys.readouterr().out
    prepare.command(['check', '--data', str(out)])
    assert 'nothing wrong found' in capsys.readouterr().out


def small_yolo(root: Path, label: str | None = '1 0 0 1 0 1 0.5', **settings) -> Path:
    """Write a set of one photo, 20 x 40 pixels, in the layout of Roboflow."""
    add_photo(root / 'train', 'a', label)
    settings = {'train': '../train/images', 'nc': 3, 'names': NAMES} | settings
    (root / 'data.yaml').write_text(yaml.safe_dump(settings))
    return root / 'data.yaml'


def add_photo(folder: Path, name: str, label: str | None, suffix: str = 'png') -> None:
    """Write a photo of 20 x 40 pixels and its label into the folders images and labels."""
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 20), (80, 90, 100)).save(folder / f'images/{name}.{suffix}')
    if label is not None:
        (folder / f'labels/{name}.txt').write_text(label)


def test_yolo_without_the_test_folder_that_roboflow_names(tmp_path, capsys):
    run_yolo(small_yolo(tmp_path / 'y', '0 0 0 1 0 1 1', test='../test/images'), tmp_path / 'out')
    assert 'test/images: no such folder, so the set has no test.json' in capsys.readouterr().out
    assert not (tmp_path / 'out/test.json').exists()


def test_yolo_set_of_roboflow_with_other_classes(tmp_path):
    run_yolo(small_yolo(tmp_path / 'y', '1 0 0 1 0 1 0.5 0 0.5\n\n'), tmp_path / 'out')
    mask = draw_mask(read_coco(tmp_path / 'out', 'train', OTHER).photos[0])
    assert mask.shape == (20, 40) and (mask[:10] == 2).all() and (mask[10:] == 0).all()
    assert read_competition(tmp_path / 'out').classes == ('Background', *NAMES)


def test_yolo_with_a_background_among_its_names(tmp_path):
    names = ['__background__', 'can', 'bag']
    label = '1 0 0 1 0 1 1 0 1\n0 0 0 0.5 0 0.5 1 0 1'
    run_yolo(small_yolo(tmp_path / 'y', label, names=names), tmp_path / 'out')
    assert read_competition(tmp_path / 'out').classes == ('Background', 'can', 'bag')
    mask = draw_mask(read_coco(tmp_path / 'out', 'train', read_competition(tmp_path / 'out')).photos[0])
    assert (mask[:, :20] == 0).all() and (mask[:, 20:] == 1).all()
    run_yolo(tmp_path / 'y/data.yaml', tmp_path / 'many', '--task', 'multilabel')
    competition = read_competition(tmp_path / 'many')
    assert competition.classes == ('can', 'bag')
    planes = draw_planes(read_coco(tmp_path / 'many', 'train', competition).photos[0], 2)
    assert planes[0].all() and not planes[1].any()


@pytest.mark.parametrize('start', ['/content/set/', 'C:\\Users\\kim\\set\\', '/'])
def test_yolo_with_paths_of_another_machine(tmp_path, start):
    path = small_yolo(tmp_path / 'y', train=f'{start}train/images')
    add_photo(tmp_path / 'y/val', 'b', '0 0 0 1 0 1 1')
    (tmp_path / 'y/val.txt').write_text(f'{start}val/images/b.png')
    path.write_text(path.read_text() + 'val: val.txt')
    run_yolo(path, tmp_path / 'out')
    assert len(read_coco(tmp_path / 'out', 'train', OTHER).photos) == 2


@pytest.mark.parametrize('folders', [('Images', 'Labels'), ('images', 'Labels'), ('Images', 'labels')])
def test_yolo_folders_in_capitals(tmp_path, folders):
    path = small_yolo(tmp_path / 'y', train=f'train/{folders[0]}')
    for old, new in zip(('images', 'labels'), folders, strict=True):
        (tmp_path / 'y/train' / old).rename(tmp_path / 'y/train' / new)
    run_yolo(path, tmp_path / 'out')
    assert draw_mask(read_coco(tmp_path / 'out', 'train', OTHER).photos[0]).any()


def test_yolo_of_label_studio_has_names_alone(tmp_path):
    """Its export has images/, labels/, classes.txt and notes.json."""
    root = tmp_path / 'y'
    add_photo(root, 'a', '1 0 0 1 0 1 1 0 1')
    (root / 'classes.txt').write_text('\n'.join(NAMES))
    (root / 'notes.json').write_text('{"categories": [], "info": {}}')
    with pytest.raises(BadInput, match='found classes.txt, .*python prepare.py yolo --yaml .*classes.txt'):
        prepare.command(['check', '--data', str(root)])
    run_yolo(root / 'classes.txt', tmp_path / 'out')
    assert (draw_mask(read_coco(tmp_path / 'out', 'train', OTHER).photos[0]) == 2).all()


@pytest.mark.parametrize('line', ['./train/images/{}', 'data/train/images/{}', 'train\\images\\{}', '{}'])
def test_yolo_split_that_is_a_list_and_a_photo_without_a_label(tmp_path, line, capsys):
    path = small_yolo(tmp_path / 'y', train=['train.txt'])
    add_photo(tmp_path / 'y/train', 'b', None)
    add_photo(tmp_path / 'y/train', 'left_out', '0 0 0 1 0 1 1')
    prefix = f'{tmp_path}/y/train/images/' if line == '{}' else ''
    lines = [line.format(f'{prefix}{name}.png') for name in 'ab']
    (tmp_path / 'y/train.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    run_yolo(path, tmp_path / 'out')
    first, second = read_coco(tmp_path / 'out', 'train', OTHER).photos
    assert first.file_name == 'train/images/a.png' and draw_mask(first).any()
    assert second.file_name == 'train/images/b.png' and not draw_mask(second).any()
    assert 'train: 1 photos have no label file, so no objects' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('label', 'message'),
    [
        ('3 0 0 1 0 1 1', "a.txt: line 1: found the class '3', expected 0 to 2"),
        ('can 0 0 1 0 1 1', "found the class 'can'"),
        ('0 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2', 'line 2: found a box'),
        ('0 0 0 1 0 1', 'found 5 coordinates'),
        ('0 0.5 0.5 0.2 0.2', 'as are all 1 objects: these are detection labels'),
        ('0 0 0 1 0 1 1 0 1 0.87', 'a confidence is of predictions'),
        ('0 0.5 0.5 0.2 0.2 0.9', 'a confidence is of predictions'),
        ('0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 1', 'a box and 2 keypoints with their visibility'),
        ('0 0.5 0.5 0.4 0.4 0.4 0.4 1 0.6 0.6 1\n' * 2, 'all 2 labels are boxes with 2 keypoints each'),
        ('0,0,0,1,0,1,1', "found the class '0,0,0,1,0,1,1'"),
        ('0 0 0 1e999 0 1 1', "found the coordinate '1e999'"),
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
        ({'names': ['a', 'A ', 'b']}, 'two of them have the same name'),
        ({'names': ['a', 'background']}, 'nc is 3, but names has 2'),
        ({'names': ['a', True, 'b']}, 'put it in quotes'),
        ({'names': ['a\nb', 'b', 'c']}, 'not a name for a class'),
        ({'nc': 4}, 'nc is 4, but names has 3'),
        ({'kpt_shape': [17, 3]}, 'its labels are poses'),
        ({'train': 'none'}, 'no such folder or list'),
        ({'train': None}, 'lists no photos under train or val'),
        ({'test': 'train/images'}, 'is in train or val, and in test'),
        ({'train': ['train/images', 'train/images']}, 'is listed twice'),
        ({'train': ['train/images', 'train/../train/images']}, 'is listed twice'),
        ({'val': 'test/images'}, 'leave val out if there are none'),
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


@pytest.mark.parametrize(
    'names',
    [['can', 'big bottle', 'bag'], {'0': 'can', '1': 'big bottle', '2': 'bag'}, dict(enumerate(NAMES))],
)
def test_yolo_files_of_windows(tmp_path, names):
    """Begin with a byte order mark, end lines with CRLF, and repeat a line, in data.yaml and a label."""
    path = small_yolo(tmp_path / 'y', names=names)
    for file in (path, tmp_path / 'y/train/labels/a.txt'):
        lines = file.read_text().replace('1 0 0', '1.0 0 0').splitlines()
        lines += lines[:1] if file.suffix == '.txt' else []
        file.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    run_yolo(path, tmp_path / 'out')
    (photo,) = read_coco(tmp_path / 'out', 'train', OTHER).photos
    assert set(np.unique(draw_mask(photo))) == {0, 2}


@pytest.mark.parametrize(
    'text', ['0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9', '0 0 0 1 0 1 0.5 0 0.5 0 0', '0 0.1 0.1 0.5 0.1 0.3 0.9']
)
def test_yolo_quadrilaterals_and_closed_polygons_are_polygons(tmp_path, text):
    run_yolo(small_yolo(tmp_path / 'y', text), tmp_path / 'out')
    assert draw_mask(read_coco(tmp_path / 'out', 'train', OTHER).photos[0]).any()


def test_yolo_boxes_are_refused_left_out_or_filled(tmp_path, capsys):
    """A box touches the right side of the photo; one photo has a box alone."""
    path = small_yolo(tmp_path / 'y', '0 0 0 0.5 0 0.5 0.5 0 0.5\n1 0.75 0.75 0.5 0.3')
    add_photo(tmp_path / 'y/train', 'b', '2 0.5 0.5 1 1')
    with pytest.raises(
        BadInput, match=r'line 2: found a box, as are 2 of 3 objects.*--boxes skip.*--boxes fill'
    ):
        run_yolo(path, tmp_path / 'out')
    run_yolo(path, tmp_path / 'skip', '--boxes', 'skip')
    assert 'boxes left out: 2 of 3 objects' in capsys.readouterr().out
    run_yolo(path, tmp_path / 'fill', '--boxes', 'fill')
    expected = np.zeros((20, 40), np.uint8)
    expected[:10, :20] = 1
    skipped, filled = (masks_of(read_coco(tmp_path / k, 'train', OTHER).photos) for k in ('skip', 'fill'))
    assert_same(skipped, {'a': expected, 'b': np.zeros_like(expected)})
    expected = expected.copy()
    expected[12:18, 20:] = 2
    assert_same(filled, {'a': expected, 'b': np.full_like(expected, 3)})


def test_yolo_labels_in_the_wrong_place(tmp_path):
    path = small_yolo(tmp_path / 'y', None)
    with pytest.raises(
        BadInput, match=r'no photo of train has a label file; that of a.png would be .*labels/a.txt'
    ):
        run_yolo(path, tmp_path / 'out')
    label = tmp_path / 'y/train/labels/a.txt'
    label.write_text('0 0 0 1 0 1 1')
    (label.parent / 'classes.txt').write_text('\n'.join(NAMES))
    (label.parent / '._a.txt').write_bytes(b'\0\xff')
    (label.parent / 'a_1.txt').write_text('0 0 0 1 0 1 1')
    with pytest.raises(BadInput, match=r'a_1.txt: there is no photo of that name \(label files .*: 1\)'):
        run_yolo(path, tmp_path / 'out')
    (label.parent / 'a_1.txt').unlink()
    add_photo(tmp_path / 'y/train', 'a', '0 0 0 1 0 1 1', suffix='jpg')
    with pytest.raises(BadInput, match=r'a.txt: would be the label of a.jpg and of a.png'):
        run_yolo(path, tmp_path / 'out')
    (tmp_path / 'y/train/images/a.jpg').rename(tmp_path / 'y/train/images/b.HEIC')
    with pytest.raises(BadInput, match=r'b.HEIC: found .HEIC, expected .*; convert it, or move it away'):
        run_yolo(path, tmp_path / 'out')
    (tmp_path / 'y/train/images/b.HEIC').unlink()
    run_yolo(path, tmp_path / 'out')


@pytest.mark.parametrize('layout', ['beside', 'images/train', 'train/images', 'valid', 'val is train'])
def test_yolo_layouts(tmp_path, layout):
    root = tmp_path / 'images' if layout == 'beside' else tmp_path / 'y'  # not the set's own folder `images`
    folder = {'beside': 'all', 'images/train': 'images/train'}.get(layout, 'train/images')
    path = small_yolo(root, train=folder)
    if layout == 'valid':
        add_photo(root / 'valid', 'v', '0 0 0 1 0 1 1')
        settings = yaml.safe_load(path.read_text()) | {'valid': '../valid/images'}
        path.write_text(yaml.safe_dump(settings))
    elif layout == 'val is train':
        path.write_text(path.read_text() + f'val: {folder}\n')
    elif layout == 'beside':
        (root / 'train/images').rename(root / 'all')
        (root / 'train/labels/a.txt').rename(root / 'all/a.txt')
    elif layout == 'images/train':
        for kind in ('images', 'labels'):
            (root / kind).mkdir()
            (root / f'train/{kind}').rename(root / f'{kind}/train')
    run_yolo(path, tmp_path / 'out')
    photos = read_coco(tmp_path / 'out', 'train', OTHER).photos
    assert len(photos) == 1 + (layout == 'valid') and all(draw_mask(photo).any() for photo in photos)


def test_yolo_test_photos_without_labels_get_no_test_labels(tmp_path, capsys):
    path = small_yolo(tmp_path / 'y', test='test/images')
    add_photo(tmp_path / 'y/test', 't', None)
    run_yolo(path, tmp_path / 'out')
    assert (tmp_path / 'out/test.json').exists() and not (tmp_path / 'out/test_labels.json').exists()
    assert 'no label file' not in capsys.readouterr().out


def test_files_of_darknet_are_refused(tmp_path):
    path = tmp_path / 'obj.data'
    path.write_text('classes = 2\ntrain = train.txt\nnames = obj.names\n')
    with pytest.raises(BadInput, match=r'is a file of Darknet, expected a data.yaml; write'):
        run_yolo(path, tmp_path / 'out')


def test_names_of_labels_in_another_unicode_form(tmp_path):
    path = small_yolo(tmp_path / 'y', None)
    folder = tmp_path / 'y/train'
    (folder / 'images/a.png').rename(folder / f'images/{unicodedata.normalize("NFD", "사진é")}.png')
    (folder / f'labels/{unicodedata.normalize("NFC", "사진é")}.txt').write_text('0 0 0 1 0 1 1')
    run_yolo(path, tmp_path / 'out')
    (photo,) = read_coco(tmp_path / 'out', 'train', OTHER).photos
    assert (
        photo.file_name == unicodedata.normalize('NFC', 'train/images/사진é.png') and draw_mask(photo).any()
    )


def test_an_import_does_not_overwrite_a_data_set(tmp_path):
    path, out = small_yolo(tmp_path / 'y'), tmp_path / 'out'
    out.mkdir()
    (out / 'train_all.json').write_text('mine')
    (out / 'test.json').write_text('of another set')
    with pytest.raises(BadInput, match='already exists'):
        run_yolo(path, out)
    assert (out / 'train_all.json').read_text() == 'mine'
    run_yolo(path, out, '--overwrite')
    assert len(read_coco(out, 'train', OTHER).photos) == 1
    assert not (out / 'test.json').exists()


def test_a_second_data_set_from_end_to_end(tmp_path, tiny_yaml, capsys):
    """Import YOLO labels of three classes, check them as is printed, and train an epoch as that prints."""
    data = write_set(tmp_path / 'd', train=12, test=2, side=96)
    for file in ('train_all.json', 'test_labels.json'):
        content = json.loads((data / file).read_text())
        for one in content['annotations']:
            one['category_id'] = 1 + one['category_id'] % 3
        (data / file).write_text(json.dumps(content))
    run_yolo(write_yolo(tmp_path / 'yolo', data, tuple(NAMES)), tmp_path / 'mine')
    config = tmp_path / 'mine.yaml'
    config.write_text(tiny_yaml.read_text() + '\n')
    assert capsys.readouterr().out.endswith(f'next: python prepare.py check --data {tmp_path / "mine"}\n')
    prepare.command(['check', '--data', str(tmp_path / 'mine')])
    last = capsys.readouterr().out.splitlines()[-1]
    cfg = load_config(config, last.split(' --set ')[1].split())
    assert cfg.data_root == tmp_path / 'mine' and cfg.classes == ('Background', *NAMES)
    assert 0 <= train.main(cfg, 0) <= 1


def test_yolo_classes_that_overlap(tmp_path):
    label = '0 0 0 1 0 1 0.5 0 0.5\n2 0.5 0 1 0 1 1 0.5 1\n'
    run_yolo(small_yolo(tmp_path / 'y', label), tmp_path / 'out', '--task', 'multilabel')
    competition = read_competition(tmp_path / 'out')
    assert competition.classes == tuple(NAMES) and competition.score_size == 'own'
    (photo,) = read_coco(tmp_path / 'out', 'train', competition).photos
    planes = draw_planes(photo, 3)
    assert planes[0, :10].all() and planes[2, :, 20:].all() and planes.sum() == 800
