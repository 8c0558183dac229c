"""Test which file on disk a photo's name means, and what an error says of a name that means none."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_set

import prepare
from config import HOME, Config
from data.cache import open_cache
from data.coco import read_coco, read_labels, read_photo
from data.paths import find_photo, inside
from utils.errors import BadInput
from utils.files import normal_name

NAME = '사진/유리병 é.jpg'
NFC, NFD = (unicodedata.normalize(form, NAME) for form in ('NFC', 'NFD'))


def rename(root: Path, on_disk: str, in_json: str) -> Path:
    """Give the first photo of a data root a name on disk and one in train_all.json."""
    path = root / 'train_all.json'
    data = json.loads(path.read_text())
    (root / on_disk).parent.mkdir(parents=True, exist_ok=True)
    (root / data['images'][0]['file_name']).rename(root / on_disk)
    data['images'][0]['file_name'] = in_json
    path.write_text(json.dumps(data))
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    return write_set(tmp_path / 'd', train=2, test=1, side=64)


@pytest.mark.parametrize(
    ('on_disk', 'in_json'),
    [
        (NFC, NFD),
        (NFD, NFC),
        ('a/b/0.jpg', 'a\\b\\0.jpg'),
        ('a/b/0.jpg', '.\\a\\b\\0.jpg'),
        ('a/0.jpg', './a/0.jpg'),
        ('a/0.jpg', './/./a/0.jpg'),
        (NFD, NFC.replace('/', '\\')),
        ('a\\0.jpg', 'a\\0.jpg'),
        ('a\\0.jpg', 'a/0.jpg'),
    ],
)
def test_names_that_differ_in_form_alone_are_found(data, on_disk, in_json):
    pixels = read_photo(coco := read_coco(data, 'train', HOME), coco.photos[0])
    coco = read_coco(rename(data, on_disk, in_json), 'train', HOME)
    photo = coco.photos[0]
    assert photo.file_name == in_json  # which the CSV has, too
    assert coco.path(photo) == data / on_disk
    assert np.array_equal(read_photo(coco, photo), pixels)
    assert read_labels(data / 'train_all.json', HOME).path(photo) == data / on_disk


@pytest.mark.parametrize(
    ('on_disk', 'in_json'),
    [
        ('img/IMG_1.JPG', 'img/img_1.jpg'),
        ('img/IMG_1.JPG', 'img/IMG_1.jpg'),
        ('IMG/1.jpg', 'img/1.jpg'),
        ('img/my photo.jpg', 'img/my%20photo.jpg'),
        ('img/1.png', 'img/1.jpg'),
        ('img/1.jpg', 'images/1.jpg'),
        ('img/1.jpg', '1.jpg'),
        ('1.jpg', 'img/1.jpg'),
        ('img/1.jpg', 'C:\\Users\\kim\\img\\1.jpg'),
        ('img/1.jpg', 'https://host/img/1.jpg'),
        (f'img/{NFD}', NFC),
    ],
)
def test_other_differences_are_an_error_that_names_the_file(data, on_disk, in_json):
    coco = read_coco(rename(data, on_disk, in_json), 'train', HOME)
    with pytest.raises(BadInput) as error:
        read_photo(coco, coco.photos[0])
    hint = (
        f'no such image; {on_disk} is there: rename it, or change file_name {in_json!r} in the JSON file to'
    )
    assert hint in str(error.value)


@pytest.mark.parametrize('other', ['a.jpg', 'masks/b.png', 'img/b.json', 'img/bb.jpg'])
def test_a_name_that_nothing_is_like(data, other):
    coco = read_coco(rename(data, other, 'img/b.jpg'), 'train', HOME)
    with pytest.raises(BadInput, match=r'b\.jpg: no such image$'):
        read_photo(coco, coco.photos[0])
    coco.path(coco.photos[1]).unlink()  # after the files were listed
    with pytest.raises(BadInput, match=r'0001\.jpg: no such image$'):
        read_photo(coco, coco.photos[1])


def test_the_nearest_of_several_files_is_named(data):
    for name in ('train/0001.jpg', 'batch_02/x/0000.jpg', 'val/batch_01/0000.jpg', 'val/0000.jpg'):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b'')
    coco = read_coco(rename(data, 'z.jpg', 'images/batch_01/0000.jpg'), 'train', HOME)
    with pytest.raises(BadInput, match='no such image; val/batch_01/0000.jpg is there'):
        read_photo(coco, coco.photos[0])


def test_the_exact_name_wins(tmp_path):
    for name in (NFC, NFD, 'a\\b.jpg', 'a/b.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (NFC, NFD, 'a\\b.jpg', 'a/b.jpg'):
        assert find_photo(tmp_path, name).read_text() == name


def test_a_file_that_comes_later_is_found(tmp_path):
    (tmp_path / 'a').mkdir()
    assert find_photo(tmp_path, 'a\\é.jpg') == tmp_path / 'a/é.jpg'
    path = tmp_path / 'a' / unicodedata.normalize('NFD', 'é.jpg')
    path.write_bytes(b'')
    assert find_photo(tmp_path, 'a\\é.jpg') == path


def test_a_photo_that_is_found_stays_below_the_root(tmp_path):
    root = tmp_path / 'root'
    root.mkdir()
    (root / NFD.split('/')[0]).symlink_to(tmp_path)
    assert not inside(root, NFC)
    assert not inside(root, '..\\a.jpg') and not inside(root, '.\\..\\..\\a.jpg')
    assert inside(root, 'b\\..\\a.jpg')


def test_cache_and_masks_of_names_in_another_form(data, tmp_path):
    values = {key: TINY[key] for key in ('cache_size', 'image_size', 'crop_size')}
    cfg = Config(name='x', data_root=data, cache_dir=tmp_path / 'cache', **values)
    before = open_cache(cfg, 'train')
    rename(data, NFD, NFC.replace('/', '\\'))
    cache = open_cache(cfg, 'train')
    assert np.array_equal(cache.photos, before.photos) and np.array_equal(cache.masks, before.masks)
    assert len(open_cache(cfg, 'train')) == 2
    prepare.command(['masks', '--data', str(data), '--out', str(tmp_path / 'masks')])
    masks = {path.relative_to(tmp_path / 'masks').as_posix() for path in (tmp_path / 'masks').rglob('*.png')}
    assert masks == {f'{NFC}.png', 'batch_01/0001.jpg.png'}
    (data / NFD).write_bytes(b'another photo')
    with pytest.raises(BadInput, match='is not the photo that was cached'):
        open_cache(cfg, 'train')


def test_normal_names():
    names = {
        NFC: [NFC, NFD, f'./{NFD}', NFC.replace('/', '\\')],
        '../a': ['../a', './../a', '..\\a'],
        '.a': ['.a'],
    }
    assert all(normal_name(name) == same for same, group in names.items() for name in group)
