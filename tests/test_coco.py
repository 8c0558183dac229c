"""Test masks of COCO annotations, and every fault of an annotation file."""

import copy
import json

import numpy as np
import pytest
from conftest import write_set
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from config import CLASSES
from data.coco import IGNORED, Annotation, Photo, draw_mask, read_coco
from utils.errors import BadInput


def polygon(x, y, w, h):
    return (x, y, x + w, y, x + w, y + h, x, y + h)


def photo(*annotations):
    return Photo(0, 'a.jpg', 40, 30, annotations)


def test_larger_area_is_painted_first_and_ties_by_order():
    small = Annotation(1, 25.0, False, polygons=(polygon(5, 5, 5, 5),))
    large = Annotation(2, 400.0, False, polygons=(polygon(0, 0, 20, 20),))
    mask = draw_mask(photo(small, large))
    assert mask.shape == (40, 30) and mask[7, 7] == 1 and mask[1, 1] == 2 and mask[30, 25] == 0
    first, second = (Annotation(k, 100.0, False, polygons=(polygon(0, 0, 10, 10),)) for k in (3, 4))
    assert draw_mask(photo(first, second))[5, 5] == 4  # the later one is on top


def test_a_hole_is_a_smaller_object_on_top_and_crowds_are_ignored():
    ring = Annotation(6, 400.0, False, polygons=(polygon(0, 0, 20, 20),))
    crowd = Annotation(6, 16.0, True, polygons=(polygon(8, 8, 4, 4),))
    mask = draw_mask(photo(ring, crowd))
    assert mask[10, 10] == IGNORED and mask[2, 2] == 6


def test_both_rle_forms_equal_the_polygon(tmp_path):
    root = write_set(tmp_path / 'd', train=4, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    expected = [draw_mask(p) for p in read_coco(root, 'train', CLASSES).photos]
    for form in ('compressed', 'plain'):
        changed = copy.deepcopy(data)
        for a in changed['annotations']:
            rle = rle_codec.merge(rle_codec.frPyObjects(a['segmentation'], 64, 64))
            flat = rle_codec.decode(rle).ravel(order='F')
            edges = np.flatnonzero(np.diff(flat)) + 1
            counts = np.diff([0, *edges, flat.size]).tolist()
            plain = ([0] if flat[0] else []) + counts
            a['segmentation'] = {
                'size': [64, 64],
                'counts': plain if form == 'plain' else rle['counts'].decode(),
            }
        (root / 'train_all.json').write_text(json.dumps(changed))
        drawn = [draw_mask(p) for p in read_coco(root, 'train', CLASSES).photos]
        assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True)), form


def test_masks_equal_pycocotools_on_the_competitions_photos(boostcamp60, capsys):
    coco = read_coco(boostcamp60, 'train', CLASSES)
    theirs = {}
    for name in ('train.json', 'val.json'):
        api = COCO(str(boostcamp60 / name))
        for image in api.dataset['images']:
            mask = np.zeros((image['height'], image['width']), np.uint8)
            for a in sorted(api.imgToAnns[image['id']], key=lambda a: -a['area']):
                mask[api.annToMask(a) == 1] = a['category_id']
            theirs[image['file_name']] = mask
    assert len(coco.photos) == 60 and len({p.image_id for p in coco.photos}) == 60
    assert all(np.array_equal(draw_mask(p), theirs[p.file_name]) for p in coco.photos)


# each fault: a change of the data, and a pattern of the error line
FAULTS = {
    'no images': (lambda d: d.pop('images'), "lacks the key 'images'"),
    'no categories': (lambda d: d.pop('categories'), "lacks the key 'categories'"),
    'no annotations': (lambda d: d.pop('annotations'), "lacks the key 'annotations'"),
    'no file name': (lambda d: d['images'][0].pop('file_name'), "lacks the key 'file_name'"),
    'no segmentation': (
        lambda d: d['annotations'][0].pop('segmentation'),
        "annotation 0 lacks the key 'segmentation'",
    ),
    'image id twice': (lambda d: d['images'][1].update(id=0), 'id 0 appears twice'),
    'annotation id twice': (
        lambda d: d['annotations'][1].update(id=0),
        'annotation 0: the id appears twice',
    ),
    'file name twice': (
        lambda d: d['images'][1].update(file_name=d['images'][0]['file_name']),
        'listed twice',
    ),
    'image_id unknown': (lambda d: d['annotations'][0].update(image_id=999), 'image_id 999 is not among'),
    'category_id unknown': (
        lambda d: d['annotations'][0].update(category_id=11),
        'category_id 11 is not among',
    ),
    'two points': (lambda d: d['annotations'][0].update(segmentation=[[1, 1, 2, 2]]), 'at least 3 points'),
    'odd coordinates': (
        lambda d: d['annotations'][0].update(segmentation=[[1, 1, 2, 2, 3, 3, 4]]),
        'at least 3 points',
    ),
    'not a number': (
        lambda d: d['annotations'][0].update(segmentation=[[1, 1, 2, float('nan'), 3, 3]]),
        'coordinate nan',
    ),
    'far outside': (
        lambda d: d['annotations'][0].update(segmentation=[[1, 1, 2, 1e9, 3, 3]]),
        'coordinate 1000000000',
    ),
    'no polygon': (lambda d: d['annotations'][0].update(segmentation=[]), 'has no polygon'),
    'a string': (lambda d: d['annotations'][0].update(segmentation=[['a'] * 6]), 'list of numbers'),
    'short rle': (
        lambda d: d['annotations'][0].update(segmentation={'size': [64, 64], 'counts': [5, 5]}),
        'add up to 10',
    ),
    'rle size': (
        lambda d: d['annotations'][0].update(segmentation={'size': [6, 6], 'counts': [36]}),
        'RLE size',
    ),
    'bad rle': (
        lambda d: d['annotations'][0].update(segmentation={'size': [64, 64], 'counts': 'ooo~'}),
        'compressed RLE',
    ),
    'cut rle': (
        lambda d: d['annotations'][0].update(segmentation={'size': [64, 64], 'counts': 'PP'}),
        'cut off',
    ),
    'area': (lambda d: d['annotations'][0].update(area=float('inf')), 'area is inf'),
    'other category': (lambda d: d['categories'][0].update(name='Wood'), "category 1 is 'Wood'"),
    'missing category': (lambda d: d['categories'].pop(), "category 10 is None.*'Clothing'"),
    'outside the root': (lambda d: d['images'][0].update(file_name='../x.jpg'), 'leads out of'),
    'absolute': (lambda d: d['images'][0].update(file_name='/etc/passwd'), 'leads out of'),
    'height': (lambda d: d['images'][0].update(height=0), 'height is 0'),
    'list': (lambda d: d['images'].__setitem__(0, []), 'expected an object'),
    'none left': (lambda d: d.update(images=[], annotations=[]), 'no images'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_of_an_annotation_file(tmp_path, fault):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    change, message = FAULTS[fault]
    change(data)
    (root / 'train_all.json').write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message) as error:
        read_coco(root, 'train', CLASSES)
    assert 'train_all.json' in str(error.value) and '\n' not in str(error.value)


def test_fault_names_its_own_file(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    (root / 'train_all.json').rename(root / 'val.json')
    images = [dict(image) for image in data['images']]
    for names, message in [
        (['a.jpg', 'a.jpg'], r"train\.json: image 'a.jpg' is listed twice$"),
        (['a.jpg', '../b.jpg'], r"train\.json: image '\.\./b.jpg' leads out"),
        (
            ['a.jpg', data['images'][0]['file_name']],
            r'val\.json: .* twice, first in .*/train\.json$',
        ),
    ]:
        for image, name in zip(images, names, strict=True):
            image['file_name'] = name
        (root / 'train.json').write_text(json.dumps({**data, 'images': images}))
        with pytest.raises(BadInput, match=message):
            read_coco(root, 'train', CLASSES)


def test_crowds_do_not_count_as_objects(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    data['annotations'][0]['iscrowd'] = 1
    (root / 'train_all.json').write_text(json.dumps(data))
    assert read_coco(root, 'train', CLASSES).photos[0].classes == {2, 3}


def test_truncated_and_missing_files(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    text = (root / 'train_all.json').read_text()
    (root / 'train_all.json').write_text(text[: len(text) // 2])
    with pytest.raises(BadInput, match='not JSON, or cut off'):
        read_coco(root, 'train', CLASSES)
    (root / 'train_all.json').write_text('[1]')
    with pytest.raises(BadInput, match='expected an object'):
        read_coco(root, 'train', CLASSES)
    (root / 'train_all.json').unlink()
    with pytest.raises(BadInput, match=r'expected train_all.json, or train.json \+ val.json'):
        read_coco(root, 'train', CLASSES)
    with pytest.raises(BadInput, match='no such folder'):
        read_coco(root / 'none', 'train', CLASSES)


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    (tmp_path / 'secret.jpg').write_bytes(b'x')
    (root / 'batch_01/0000.jpg').unlink()
    (root / 'batch_01/0000.jpg').symlink_to(tmp_path / 'secret.jpg')
    with pytest.raises(BadInput, match='leads out of'):
        read_coco(root, 'train', CLASSES)
