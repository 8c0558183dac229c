"""Test masks of COCO annotations, and every fault of an annotation file."""

import hashlib
import json
import re

import cv2
import numpy as np
import pytest
from conftest import write_set
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from config import CLASSES, HOME, Competition, Slices
from data.coco import (
    IGNORED,
    Photo,
    draw_mask,
    draw_truth,
    fingerprint_of,
    pixel_conventions,
    read_coco,
    read_labels,
    read_photo,
    scale_truth,
    scored_truth,
    sizes_of,
    training_photos,
)
from data.masks import Annotation, LeftOut, encode_segmentation
from data.photos import MAX_PIXELS, MAX_SIDE
from submission import read_test_sizes
from utils.errors import BadInput


def rectangle(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def photo_of(*objects, annotators=()):
    """Return a (40, 30) photo of rectangles (class, iscrowd, x, y, w, h), each of one of the annotators."""
    annotations = []
    for n, (category, crowd, *box) in enumerate(objects):
        encoded = encode_segmentation('', {'segmentation': [rectangle(*box)]}, (40, 30), LeftOut())
        annotations.append(Annotation(category, crowd, *encoded, annotators[n] if annotators else None))
    return Photo(0, 'a.jpg', 40, 30, tuple(annotations), annotators=tuple(dict.fromkeys(annotators)))


def drawn(*objects):
    return draw_mask(photo_of(*objects))


def test_the_object_of_more_pixels_is_painted_first_and_ties_by_order():
    mask = drawn((1, False, 5, 5, 5, 5), (2, False, 0, 0, 20, 20))
    assert mask.shape == (40, 30) and mask[7, 7] == 1 and mask[1, 1] == 2 and mask[30, 25] == 0
    assert drawn((3, False, 0, 0, 10, 10), (4, False, 0, 0, 10, 10))[5, 5] == 4  # the later one is on top
    # pixels outside the photo do not count: 4 x 40 of 30 x 40 are left
    assert drawn((1, False, -26, 0, 30, 40), (2, False, 0, 0, 20, 20))[5, 2] == 1


def test_a_hole_is_a_smaller_object_on_top_and_crowds_are_ignored():
    mask = drawn((6, False, 0, 0, 20, 20), (6, True, 8, 8, 4, 4))
    assert mask[10, 10] == IGNORED and mask[2, 2] == 6


MANY = Competition(classes=('a', 'b', 'c'), task='multilabel', score_size='own')


def test_planes_are_drawn_apart_and_objects_over_crowds():
    objects = [(0, False, 0, 0, 20, 4), (0, True, 10, 0, 20, 4), (2, True, 0, 0, 4, 40)]
    expected = np.zeros((3, 40, 30), np.uint8)
    expected[0, :4], expected[0, :4, :20], expected[2, :, :4] = IGNORED, 1, IGNORED
    for order in (objects, objects[::-1]):
        planes = draw_truth(photo_of(*order), MANY)
        assert planes.dtype == np.uint8 and np.array_equal(planes, expected)
    assert np.array_equal(scored_truth(photo_of(*objects), MANY), expected)
    squares = MANY.model_copy(update={'score_size': 8})
    scaled = np.stack([cv2.resize(plane, (8, 8), interpolation=cv2.INTER_NEAREST) for plane in expected])
    assert np.array_equal(scored_truth(photo_of(*objects), squares), scaled)
    assert np.array_equal(scale_truth(expected[0], squares), scaled[0])


def test_most_annotators_decide_and_the_first_of_them_in_a_tie():
    boxes = [(1, False, 0, 0, 20, 9), (2, False, 0, 0, 10, 9), (2, False, 0, 0, 5, 9)]
    ids = draw_truth(photo_of(*boxes, annotators='abc'), HOME)[0]
    assert ids.tolist() == [2] * 5 + [1] * 5 + [0] * 20
    assert draw_truth(photo_of(*boxes[:2], annotators='ab'), HOME)[0].tolist() == [1] * 20 + [0] * 10
    planes = draw_truth(photo_of(*boxes, annotators='abc'), MANY)[:, 0]
    assert planes[1].tolist() == [0] * 30 and planes[2].tolist() == [1] * 5 + [0] * 25
    crowds = [(1, True, 0, 0, 20, 9), (1, False, 0, 0, 10, 9)]  # who does not know has no vote
    assert draw_truth(photo_of(*crowds, annotators='ab'), HOME)[0].tolist() == [1] * 10 + [0] * 20


def test_masks_equal_pycocotools_on_the_competitions_photos(boostcamp60, capsys):
    coco = read_coco(boostcamp60, 'train', HOME)
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


@pytest.mark.parametrize(
    'segmentation',
    [
        '[[2, 3, 12, 3, 12, 9, 2, 9]]',
        [['2.0', '3', '12', '3', '12', '9', '2', '9']],
        [[[2, 3, 12, 3, 12, 9, 2, 9]]],
        {'size': [30, 40], 'counts': [63.0, 6, *[24, 6] * 9, 861.0]},
        {'size': [30, 40], 'counts': f'63 6 {"24 6 " * 9}861'},
        {'size': [30, 40], 'counts': f'[63, 6, {"24, 6, " * 9}861]'},
        json.dumps({'size': [30, 40], 'counts': [63, 6, *[24, 6] * 9, 861]}),
    ],
    ids=['JSON', 'text', 'nested', 'floats', 'counts as text', 'list as text', 'RLE as JSON'],
)
def test_segmentations_in_other_forms(segmentation):
    rle, pixels = encode_segmentation('', {'segmentation': segmentation}, (30, 40), LeftOut())
    mask = rle_codec.decode({'size': [30, 40], 'counts': rle})
    assert pixels == 60 and mask[3:9, 2:12].all()


# each fault: a change of the data, and a pattern of the error line
def change(**values):
    """Return a change of the first annotation."""
    return lambda d: d['annotations'][0].update(values)


def change_image(**values):
    return lambda d: d['images'][0].update(values)


FAULTS = {
    'no images': (lambda d: d.pop('images'), "lacks the key 'images'"),
    'no categories': (lambda d: d.pop('categories'), "lacks the key 'categories'"),
    'no annotations': (lambda d: d.pop('annotations'), "lacks the key 'annotations'"),
    'no file name': (lambda d: d['images'][0].pop('file_name'), "lacks the key 'file_name'; expected"),
    **{
        f'{key} in its place': (
            lambda d, key=key: d['images'][0].update({key: '/kim/0.jpg', 'file_name': None}),
            f"lacks the key 'file_name'; it has {key} '/kim/0.jpg'; expected the photo's path below",
        )
        for key in ('path', 'filename', 'name', 'coco_url', 'flickr_url', 'url')
    },
    'image id twice': (change_image(id=1), r'images\[1\]: id 1 appears twice'),
    'image id twice, once as text': (change_image(id='1'), r'images\[1\]: id 1 appears twice'),
    'image id null': (change_image(id=None), "id is 'None'"),
    'image id 0.5': (change_image(id=0.5), "id is '0.5', expected a whole number or text"),
    'no image id': (lambda d: d['images'][0].pop('id'), "lacks the key 'id'"),
    'file name twice': (
        lambda d: d['images'][1].update(file_name=d['images'][0]['file_name']),
        r"'batch_01/0000\.jpg' is listed twice; give its annotations one image_id",
    ),
    'file name twice, once with a backslash': (
        lambda d: d['images'][1].update(file_name='batch_01\\0000.jpg'),
        r"jpg' is listed twice, in another spelling; give",
    ),
    'image_id unknown': (
        change(image_id=999),
        'annotation 0: image_id 999 is not among the images, which have ids such as 0; remove',
    ),
    'no images at all': (lambda d: d.update(images=[]), 'image_id 0 is not among the images; remove'),
    'no image_id': (lambda d: d['annotations'][0].pop('image_id'), "lacks the key 'image_id'"),
    'category_id unknown': (change(category_id=11), 'category_id 11 of 1 annotation is not among'),
    'odd coordinates': (change(segmentation=[[1, 1, 2, 2, 3, 3, 4]]), 'at least 3 points'),
    'odd coordinates of a point': (change(segmentation=[[1, 1, 2]]), 'at least 3 points'),
    'not a number': (change(segmentation=[[1, 1, 2, float('nan'), 3, 3]]), 'coordinate nan'),
    'far outside': (change(segmentation=[[1, 1, 2, 1e9, 3, 3]]), 'coordinate 1000000000'),
    'a string': (change(segmentation=[['a'] * 6]), 'list of numbers'),
    'a true value': (change(segmentation=[[1, 1, 9, True, 9, 9]]), 'list of numbers'),
    'points as objects': (change(segmentation=[{'x': 1, 'y': 2}, {'x': 3, 'y': 4}]), 'list of numbers'),
    'rings': (
        change(segmentation=[[[1, 1], [9, 1], [9, 9]], [[2, 2], [3, 2], [3, 3]]]),
        '2 rings of points, which may be holes',
    ),
    'a text': (change(segmentation='1 1 9 1 9 9'), "segmentation is '1 1 9 1 9 9', expected polygons or RLE"),
    'short rle': (change(segmentation={'size': [64, 64], 'counts': [5, 5]}), 'add up to 10'),
    'rle without a size': (change(segmentation={'counts': [4096]}), "lacks the key 'size'"),
    'rle size': (change(segmentation={'size': [6, 6], 'counts': [36]}), r'RLE size is \[6, 6\], the image'),
    'turned rle size': (
        lambda d: (d['images'][0].update(height=32), change(segmentation={'size': [64, 32]})(d)),
        r'RLE size is \[64, 32\], which is turned, the image is \[32, 64\]',
    ),
    'bad rle': (change(segmentation={'size': [64, 64], 'counts': 'ooo~'}), 'compressed RLE'),
    'cut rle': (change(segmentation={'size': [64, 64], 'counts': 'PP'}), 'cut off'),
    'iscrowd': (change(iscrowd=2), "annotation 0: iscrowd is '2', expected 0 or 1"),
    'iscrowd as text': (change(iscrowd='yes'), "iscrowd is 'yes'"),
    'iscrowd as a list': (change(iscrowd=[1]), r"iscrowd is '\[1\]', expected 0 or 1"),
    'other category': (
        lambda d: d['categories'][0].update(name='Generol trash'),
        r"category 'Generol trash' has 1 annotation, but is no class; did you mean 'General trash'\? the "
        'classes are Background, General trash, .*Clothing; rename it, or let python prepare.py competition '
        '--data .*/d write',
    ),
    'category like no other': (
        lambda d: d['categories'][0].update(name='xyz'),
        "category 'xyz' has 1 annotation, but is no class; the classes are Background",
    ),
    'category without a name': (
        lambda d: d['categories'][0].update(name=None),
        'category 1 has 1 annotation, but the name None',
    ),
    'category with two names': (
        lambda d: d['categories'].append({'id': '1', 'name': 'Paper'}),
        "category 1 is 'General trash' and 'Paper'",
    ),
    'missing category': (lambda d: d['categories'].pop(0), 'category_id 1 of 1 annotation is not among'),
    'outside the root': (change_image(file_name='../x.jpg'), 'leads out of'),
    'outside the root, as on Windows': (change_image(file_name='..\\x.jpg'), 'leads out of'),
    'absolute': (change_image(file_name='/etc/passwd'), 'leads out of [^ ]*$'),
    "a path of the author's machine": (
        change_image(file_name='/home/kim/batch_01/0000.JPG'),
        'leads out of .*; batch_01/0000.jpg is there: rename it, or change file_name',
    ),
    'height': (change_image(height=0), 'height is 0, expected 1 to .*export again'),
    'no height': (change_image(height=None), "lacks the key 'height'; write the size of the photo"),
    'too high': (change_image(height=MAX_SIDE + 1, width=1), f'height is {MAX_SIDE + 1}, expected 1 to'),
    'too wide': (change_image(height=1, width=MAX_SIDE + 1), f'width is {MAX_SIDE + 1}, expected 1 to'),
    'too many pixels': (
        change_image(height=MAX_PIXELS // 8192 + 1, width=8192),
        f'has {MAX_PIXELS + 8192:,} pixels, expected at most {MAX_PIXELS:,}',
    ),
    'broken height': (change_image(height=63.5), 'height is 63.5'),
    'list': (lambda d: d['images'].__setitem__(0, []), 'expected an object'),
    'list of annotations': (lambda d: d['annotations'].__setitem__(0, 5), r'annotations\[0\]: found int'),
    'none left': (lambda d: d.update(images=[], annotations=[]), 'no images'),
    'boxes alone': (
        lambda d: [a.update(segmentation=[]) for a in d['annotations']],
        r'6 annotations and no mask: 6 no polygon \(a box alone\); expected polygons.*masks, not boxes',
    ),
    'shares of the photo': (
        lambda d: [a.update(segmentation=[[0, 0, 1, 0, 1, 0.9, 0, 1]]) for a in d['annotations']],
        '6 coordinates from 0 to 1, which are no pixels; expected polygons or RLE, in pixels',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_of_an_annotation_file(tmp_path, fault):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    edit, message = FAULTS[fault]
    edit(data)
    (root / 'train_all.json').write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message) as error:
        read_coco(root, 'train', HOME)
    assert 'train_all.json' in str(error.value) and '\n' not in str(error.value)


def test_fault_names_its_own_file(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    (root / 'train_all.json').rename(root / 'val.json')
    images = [dict(image) for image in data['images']]
    for names, message in [
        (['a.jpg', 'a.jpg'], r"train\.json: image 'a.jpg' is listed twice; give"),
        (['a.jpg', '../b.jpg'], r"train\.json: image '\.\./b.jpg' leads out"),
        (
            ['a.jpg', data['images'][0]['file_name']],
            r'val\.json: .* twice, first in .*/train\.json; give',
        ),
    ]:
        for image, name in zip(images, names, strict=True):
            image['file_name'] = name
        (root / 'train.json').write_text(json.dumps({**data, 'images': images}))
        with pytest.raises(BadInput, match=message):
            read_coco(root, 'train', HOME)


def test_truncated_and_missing_files(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    text = (root / 'train_all.json').read_text()
    (root / 'train_all.json').write_text(text[: len(text) // 2])
    with pytest.raises(BadInput, match='not JSON, or cut off'):
        read_coco(root, 'train', HOME)
    (root / 'train_all.json').write_text('[1]')
    with pytest.raises(BadInput, match='found list, expected COCO JSON, an object'):
        read_coco(root, 'train', HOME)
    (root / 'train_all.json').unlink()
    with pytest.raises(BadInput, match=r'expected train_all.json, or train.json \+ val.json'):
        read_coco(root, 'train', HOME)
    with pytest.raises(BadInput, match='no such folder'):
        read_coco(root / 'none', 'train', HOME)


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    (tmp_path / 'secret.jpg').write_bytes(b'x')
    (root / 'batch_01/0000.jpg').unlink()
    (root / 'batch_01/0000.jpg').symlink_to(tmp_path / 'secret.jpg')
    with pytest.raises(BadInput, match='leads out of .* by a link; link the data root as a whole'):
        read_coco(root, 'train', HOME)


def set_all(key, value):
    """Return a change of a key of all annotations; None removes it, a function changes it."""

    def edit(data):
        for annotation in data['annotations']:
            new = value(annotation[key]) if callable(value) else value
            annotation.pop(key) if new is None else annotation.update({key: new})

    return edit


def renumber(new_id, *more):
    """Return a change of the ids of the categories, which adds categories that nothing uses."""

    def edit(data):
        for category in data['categories']:
            category['id'] = new_id(category['id'])
        set_all('category_id', new_id)(data)
        data['categories'] = [*more, *data['categories']]

    return edit


def as_rle(form):
    """Return a change of all polygons to RLE of a form, made by a function of (counts, text)."""

    def edit(data):
        for a in data['annotations']:
            packed = rle_codec.merge(rle_codec.frPyObjects(a['segmentation'], 64, 64))
            flat = rle_codec.decode(packed).ravel(order='F')
            edges = np.flatnonzero(np.diff(flat)) + 1
            counts = ([0] if flat[0] else []) + np.diff([0, *edges, flat.size]).tolist()
            a['segmentation'] = form(counts, packed['counts'])

    return edit


def rename(category, name):
    return lambda data: data['categories'][category - 1].update(name=name)


# changes that leave the masks as they are
SAME = {
    'gaps between category ids': renumber(lambda k: 3 * k + 4),
    'category ids from 0': renumber(lambda k: k - 1),
    'category ids in another order': renumber(lambda k: 11 - k),
    'category ids as text': renumber(str),
    'category ids as text on one side': set_all('category_id', str),
    'category ids as words': renumber('c{}'.format),
    'category ids as floats': renumber(float),
    "Roboflow's root category": renumber(int, {'id': 0, 'name': 'Paper', 'supercategory': 'none'}),
    'categories that are not used': renumber(
        int,
        {'id': 77, 'name': None},
        {'name': 'Dog'},
        {'id': 1.5, 'name': 3},
        'cat',
        {'id': 1, 'name': 'general trash'},
    ),
    'a class without a category': lambda d: d['categories'].pop(),
    'case and spaces of names': rename(1, ' general  Trash'),
    'image ids as text': lambda d: [
        *(image.update(id=str(image['id'])) for image in d['images']),
        set_all('image_id', str)(d),
    ],
    'image ids as text on one side': set_all('image_id', str),
    'image ids as floats': set_all('image_id', float),
    'image ids as words': lambda d: [
        *(image.update(id=f'a-{image["id"]}') for image in d['images']),
        set_all('image_id', 'a-{}'.format)(d),
    ],
    'no annotation ids': set_all('id', None),
    'annotation ids repeat': set_all('id', 1),
    'annotation ids as text': set_all('id', 'a{}'.format),
    'no area': set_all('area', None),
    'area of the photo': set_all('area', 4096),
    'area as text': set_all('area', 'unknown'),
    'no iscrowd': set_all('iscrowd', None),
    'iscrowd null': lambda d: [a.update(iscrowd=None) for a in d['annotations']],
    'iscrowd as text': set_all('iscrowd', '0'),
    'iscrowd false': set_all('iscrowd', False),
    'iscrowd false as text': set_all('iscrowd', 'False'),
    'iscrowd as an empty text': set_all('iscrowd', ''),
    'iscrowd as a float': set_all('iscrowd', 0.0),
    'no boxes': set_all('bbox', None),
    'sizes as floats': lambda d: [image.update(height=64.0, width=64.0) for image in d['images']],
    'sizes as text': lambda d: [image.update(height='64', width='64') for image in d['images']],
    'keys of no use': lambda d: d.update(info=None, licenses='none', extra=[]),
    'a list of points': set_all('segmentation', lambda s: np.reshape(s[0], (-1, 2)).tolist()),
    'a polygon of points': set_all('segmentation', lambda s: [np.reshape(s[0], (-1, 2)).tolist()]),
    'a polygon that is not in a list': set_all('segmentation', lambda s: s[0]),
    'parts without pixels': set_all('segmentation', lambda s: [[5, 5], [7, 7, 8, 8], *s, [9, 9] * 3, []]),
    'plain RLE': as_rle(lambda counts, text: {'size': [64, 64], 'counts': counts}),
    'compressed RLE': as_rle(lambda counts, text: {'size': [64, 64], 'counts': text.decode()}),
    'RLE of printed bytes': as_rle(lambda counts, text: {'size': [64, 64], 'counts': str(text)}),
    'RLE in a list': as_rle(lambda counts, text: [{'size': [64.0, '64'], 'counts': counts}]),
}


@pytest.mark.parametrize('edit', SAME)
def test_what_tools_write_differently_gives_the_same_masks(tmp_path, edit):
    root = write_set(tmp_path / 'd', train=3, test=1, side=64)
    text = (root / 'train_all.json').read_text()
    expected = [draw_mask(p) for p in read_coco(root, 'train', HOME).photos]
    data = json.loads(text)
    SAME[edit](data)
    assert json.dumps(data) != text
    (root / 'train_all.json').write_text(json.dumps(data))
    coco = read_coco(root, 'train', HOME)
    assert all(np.array_equal(draw_mask(a), b) for a, b in zip(coco.photos, expected, strict=True))
    assert [p.image_id for p in coco.photos] == [0, 1, 2]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-le'])
def test_encodings_with_which_windows_writes_json(tmp_path, encoding):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    for name in ('train_all.json', 'test.json'):
        (root / name).write_text((root / name).read_text(), encoding=encoding)
    assert len(read_coco(root, 'train', HOME).photos) == 2 and [*read_test_sizes(root, HOME)] == [
        'batch_01/0002.jpg'
    ]
    (root / 'test.json').write_text('{"images": [{"file_name": "유리.jpg"}]}', encoding='cp949')
    for read in (lambda root: read_test_sizes(root, HOME), lambda root: read_coco(root, 'test', HOME)):
        with pytest.raises(BadInput, match=r'test\.json: not JSON, or in no Unicode.*save it as UTF-8'):
            read(root)


SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]
LEFT_OUT = {
    'no segmentation': (None, {'no polygon (a box alone)': 1}),
    'empty list': ([], {'no polygon (a box alone)': 1}),
    'list of an empty list': ([[]], {'no polygon (a box alone)': 1}),
    'empty object': ({}, {'no polygon (a box alone)': 1}),
    'a point': ([[5, 5]], {'fewer than 3 points': 1}),
    'two points': ([[5, 5, 9, 9]], {'fewer than 3 points': 1}),
    'a line': ([[5, 5, 5, 5, 5, 5]], {'covers no pixel': 1}),
    'outside the photo': ([[-9, -9, -5, -9, -5, -5]], {'outside the photo': 1}),
    'in tenths of a pixel': (
        [[0.2, 0.2, 0.4, 0.2, 0.4, 0.4]],
        {'coordinates from 0 to 1, which are no pixels': 1},
    ),
    'RLE without a pixel': ({'size': [64, 64], 'counts': [4096]}, {'covers no pixel': 1}),
    'RLE without counts': ({'size': [64, 64], 'counts': []}, {'covers no pixel': 1}),
    'shares of the photo': ([[0, 0, 1, 0, 1, 1, 0, 1]], {'coordinates from 0 to 1, which are no pixels': 1}),
    'parts': (
        [[5, 5], *SQUARE, [7, 7] * 3],
        {'a part with fewer than 3 points': 1, 'a part that covers no pixel': 1},
    ),
}


@pytest.mark.parametrize('case', LEFT_OUT)
def test_what_has_no_mask_is_left_out_and_counted(tmp_path, case):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    segmentation, expected = LEFT_OUT[case]
    data['annotations'][0]['segmentation'] = segmentation
    (root / 'train_all.json').write_text(json.dumps(data))
    coco = read_coco(root, 'train', HOME)
    assert coco.left_out == expected
    assert len(coco.photos[0].annotations) == (3 if case == 'parts' else 2)
    data['annotations'][0].pop('bbox')
    (root / 'train_all.json').write_text(json.dumps(data))
    without_box = {reason.removesuffix(' (a box alone)'): count for reason, count in expected.items()}
    assert read_labels(root / 'train_all.json', HOME).left_out == without_box


def test_two_files_are_counted_together(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    for name, k in (('train.json', 0), ('val.json', 1)):
        part = {**data, 'images': data['images'][k : k + 1], 'annotations': data['annotations'][3 * k :][:3]}
        part['annotations'][0]['segmentation'] = []
        for record, key in [(part['images'][0], 'id'), *((a, 'image_id') for a in part['annotations'])]:
            record[key] = 7  # in both files
        (root / name).write_text(json.dumps(part))
    whole = read_labels(root / 'train_all.json', HOME)
    (root / 'train_all.json').unlink()
    coco = read_coco(root, 'train', HOME)
    assert coco.left_out == {'no polygon (a box alone)': 2} and coco.files == tuple(
        root / name for name in ('train.json', 'val.json')
    )
    assert [photo.image_id for photo in coco.photos] == [0, 1]
    assert sizes_of(coco.photos) == {photo.file_name: (64, 64) for photo in whole.photos}
    assert [photo.image_id for photo in read_labels(root / 'val.json', HOME).photos] == [7]
    assert training_photos(root, HOME) == {photo.file_name: photo for photo in coco.photos}


def test_the_fingerprint_is_of_the_files_and_of_what_changes_pixels(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    for name, k in (('train.json', 0), ('val.json', 1)):
        part = {'images': data['images'][k : k + 1], 'annotations': data['annotations'][3 * k :][:3]}
        (root / name).write_text(json.dumps({**data, **part}))
    (root / 'train_all.json').unlink()
    parts = [(root / name).read_bytes() for name in ('train.json', 'val.json')]
    content = b''.join(len(part).to_bytes(8, 'little') + part for part in parts)
    other = Competition(metric='dice', score_size='own', crowds='objects')
    for competition, conventions in ((HOME, b''), (other, b'{"crowds":"objects"}')):
        assert pixel_conventions(competition) == conventions
        coco = read_coco(root, 'train', competition)
        assert coco.fingerprint == hashlib.sha256(content + conventions).hexdigest()
        assert coco.fingerprint == fingerprint_of(coco.files, competition)
        labels = read_labels(root / 'val.json', competition)
        assert labels.fingerprint == hashlib.sha256(parts[1] + conventions).hexdigest()
        assert (labels.root, labels.split, labels.files) == (root, 'labels', (root / 'val.json',))


def test_labels_without_photos_or_with_a_name_twice(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    name = data['images'][0]['file_name']
    data['images'][1]['file_name'] = f'./{name}'
    for images, message in (([], 'no images'), (data['images'], 'two images have the same file_name')):
        path = root / 'labels.json'
        path.write_text(json.dumps({'images': images, 'annotations': [], 'categories': []}))
        with pytest.raises(BadInput, match=f'^{re.escape(str(path))}: {message}$'):
            read_labels(path, HOME)


def test_slices_are_named_by_the_path_below_the_root(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    (root / 'batch_02').mkdir()
    (root / 'batch_02/0000.jpg').write_bytes((root / 'batch_01/0001.jpg').read_bytes())
    coco = read_coco(root, 'train', HOME)
    first, second = (read_photo(coco, photo) for photo in coco.photos)
    days = Competition(channels=6, slices=Slices(pattern=r'^batch_(\d+)/', offsets=(0, 1)))
    coco = read_coco(root, 'train', days)
    assert np.array_equal(read_photo(coco, coco.photos[0]), np.dstack([first, second]))


def test_a_cut_off_photo_is_read_for_the_test_alone(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    for name, split in (('0000.jpg', 'train'), ('0001.jpg', 'test')):
        path = root / 'batch_01' / name
        path.write_bytes(path.read_bytes()[:-40])
        coco = read_coco(root, split, HOME)
        if split == 'test':
            assert read_photo(coco, coco.photos[0]).shape == (64, 64, 3)
        else:
            with pytest.raises(BadInput, match=r'0000\.jpg: cannot be decoded'):
                read_photo(coco, coco.photos[0])


def test_categories_of_other_names_are_mapped_to_classes(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    expected = draw_mask(read_coco(root, 'train', HOME).photos[0])
    text = (root / 'train_all.json').read_text()
    (root / 'train_all.json').write_text(text.replace('"Paper"', '"Newspaper"'))
    with pytest.raises(BadInput, match="category 'Newspaper' has .*, but is no class; did you mean 'Paper'?"):
        read_coco(root, 'train', HOME)
    mapped = Competition(categories={'newspaper': 'Paper', 'Cup': 'Glass'})
    assert np.array_equal(draw_mask(read_coco(root, 'train', mapped).photos[0]), expected)
    data = json.loads(text)
    for category in data['categories']:
        category['name'] = category['id']  # a number
    (root / 'train_all.json').write_text(json.dumps(data))
    numbers = Competition(classes=('Background', *map(str, range(1, 11))))
    assert np.array_equal(draw_mask(read_coco(root, 'train', numbers).photos[0]), expected)


def test_objects_of_the_background_are_drawn_as_0_and_are_no_class(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    data['categories'].append({'id': 90, 'name': 'background'})
    whole = {'image_id': 0, 'category_id': 90, 'segmentation': [[0, 0, 64, 0, 64, 64, 0, 64]]}
    expected = draw_mask(read_coco(root, 'train', HOME).photos[0])
    for annotations in ([whole, *data['annotations']], [*data['annotations'], whole]):
        (root / 'train_all.json').write_text(json.dumps({**data, 'annotations': annotations}))
        photo = read_coco(root, 'train', HOME).photos[0]
        assert np.array_equal(draw_mask(photo), expected) and photo.classes == {1, 2, 3}
    hole = {**whole, 'segmentation': [rectangle(30, 30, 2, 2)]}
    (root / 'train_all.json').write_text(json.dumps({**data, 'annotations': [hole, *data['annotations']]}))
    assert not draw_mask(read_coco(root, 'train', HOME).photos[0])[30:32, 30:32].any()


@pytest.mark.parametrize('crowd', [1, '1', True, 1.0, ' True '])
def test_crowds_are_ignored_or_objects(tmp_path, crowd):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    data = json.loads((root / 'train_all.json').read_text())
    expected = draw_mask(read_coco(root, 'train', HOME).photos[0])
    for annotation in data['annotations']:
        annotation['iscrowd'] = crowd
    (root / 'train_all.json').write_text(json.dumps(data))
    ignored, objects = (
        read_coco(root, 'train', HOME.model_copy(update={'crowds': crowds}))
        for crowds in ('ignored', 'objects')
    )
    assert np.array_equal(draw_mask(objects.photos[0]), expected) and objects.photos[0].classes == {1, 2, 3}
    assert np.array_equal(draw_mask(ignored.photos[0]) == IGNORED, expected > 0)
    assert ignored.photos[0].classes == set() and ignored.fingerprint != objects.fingerprint


@pytest.mark.parametrize(
    'edit',
    [
        lambda d: (d.pop('annotations'), d.pop('categories')),
        lambda d: d.update(annotations=None, categories=None),
        lambda d: (d.update(annotations=[]), d['images'][0].pop('id')),
    ],
)
def test_photos_alone_will_do_for_the_test(tmp_path, edit):
    root = write_set(tmp_path / 'd', train=1, test=2, side=64)
    data = json.loads((root / 'test.json').read_text())
    edit(data)
    (root / 'test.json').write_text(json.dumps(data))
    names = [photo.file_name for photo in read_coco(root, 'test', HOME).photos]
    ids = [photo.image_id for photo in read_coco(root, 'test', HOME).photos]
    assert ids == [data['images'][0].get('id', 0), 2]
    assert names == [*read_test_sizes(root, HOME)] == ['batch_01/0001.jpg', 'batch_01/0002.jpg']
    data['images'][1]['file_name'] = '.\\batch_01\\0001.jpg'
    (root / 'test.json').write_text(json.dumps(data))
    for read in (lambda root: read_test_sizes(root, HOME), lambda root: read_coco(root, 'test', HOME)):
        with pytest.raises(BadInput, match=r'test\.json: image .* is listed twice'):
            read(root)


FOREIGN = {
    'LabelMe': (
        {'version': '5', 'shapes': [], 'imagePath': 'a.jpg'},
        'seems to be LabelMe JSON.* prepare.py from-json imports it',
    ),
    'Label Studio': (
        [{'id': 1, 'data': {}, 'annotations': []}],
        'seems to be Label Studio JSON.* label-studio',
    ),
    'results': (
        [{'image_id': 0, 'category_id': 1, 'segmentation': {}, 'score': 0.5}],
        'seems to be COCO results, predictions without',
    ),
    'panoptic': (
        {'images': [], 'categories': [], 'annotations': [{'image_id': 0, 'segments_info': []}]},
        'seems to be COCO panoptic JSON',
    ),
    'VIA': ({'a.jpg123': {'filename': 'a.jpg', 'regions': []}}, 'seems to be VIA JSON'),
    'VIA project': ({'_via_img_metadata': {}, '_via_settings': {}}, 'seems to be a project of VIA'),
    'CVAT': (
        '<?xml version="1.0"?>\n<annotations><version>1.1</version>',
        'seems to be CVAT XML.* prepare.py cvat',
    ),
    'VOC': (
        '<annotation>\n<folder>x</folder>',
        'seems to be Pascal VOC XML.* export the annotations as COCO',
    ),
    'page': ('<!DOCTYPE html>\n<html>', 'seems to be a web page'),
    'lines': ('{"image": "a"}\n{"image": "b"}\n', 'seems to be JSON lines'),
    'LFS': ('version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
    'ZIP': ('PK\x03\x04abc', 'is a ZIP archive.*unpack it'),
    'empty': ('', 'is empty'),
    'cut off': ('{\n{', 'not JSON, or cut off'),
}


@pytest.mark.parametrize('kind', FOREIGN)
def test_what_is_not_coco_is_named(tmp_path, kind):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    content, message = FOREIGN[kind]
    for name in ('train_all.json', 'test.json'):
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    reads = [lambda: read_coco(root, 'train', HOME), lambda: read_labels(root / 'test.json', HOME)]
    for read in [*reads, lambda: read_test_sizes(root, HOME)]:
        with pytest.raises(BadInput, match=message) as error:
            read()
        assert 'COCO' in str(error.value) or kind == 'cut off'
        assert '\n' not in str(error.value)


def test_an_object_is_not_drawn_as_background_for_being_the_first_class(tmp_path):
    write_set(tmp_path, train=2, test=1, side=64)
    competition = Competition(classes=CLASSES[1:])
    message = (
        "'General trash' has . annotations?, but is the first class, the background; .* write Background"
    )
    with pytest.raises(BadInput, match=message):
        read_coco(tmp_path, 'train', competition)
    data = json.loads((tmp_path / 'train_all.json').read_text())
    for annotation in data['annotations']:
        annotation['iscrowd'] = int(annotation['category_id'] == 1)
    (tmp_path / 'train_all.json').write_text(json.dumps(data))
    ignored = draw_mask(read_coco(tmp_path, 'train', competition).photos[0])  # of no class
    assert set(np.unique(ignored)) == {0, 1, 2, IGNORED}
    with pytest.raises(BadInput, match=message):
        read_coco(tmp_path, 'train', competition.model_copy(update={'crowds': 'objects'}))
    data['annotations'][0]['iscrowd'] = 'x'
    (tmp_path / 'crowd.json').write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"crowd\.json: iscrowd is 'x'"):
        read_labels(tmp_path / 'crowd.json', competition)
    floor = competition.model_copy(
        update={'categories': {'General trash': 'General trash'}, 'crowds': 'objects'}
    )
    assert (draw_mask(read_coco(tmp_path, 'train', floor).photos[0]) < 10).all()


def test_taco_whole_with_its_own_and_with_shifted_ids(taco, tmp_path):
    data = json.loads(taco.read_text())
    names = [category['name'] for category in data['categories']]
    competition = Competition(classes=('Background', *names))
    coco = read_labels(taco, competition)
    assert len(coco.photos) == 1500 and sum(len(p.annotations) for p in coco.photos) == 4784
    assert not coco.left_out
    for category in data['categories']:
        category['id'] += 1
    for annotation in data['annotations']:
        annotation['category_id'] += 1
    (tmp_path / 'shifted.json').write_text(json.dumps(data))
    assert read_labels(tmp_path / 'shifted.json', competition).photos == coco.photos
