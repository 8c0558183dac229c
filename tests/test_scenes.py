"""Test the demo set: its masks are exact, it is reproducible, and it has the layout of the competition."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from config import CLASSES, HOME
from data.coco import draw_mask, read_coco, read_photo
from data.demo import scenes
from data.demo.objects import DRAWERS
from data.demo.scenes import SIDE, draw_scene, make_demo_set
from data.demo.shapes import Cutout
from data.demo.textures import GROUNDS

TRAIN, TEST = 24, 12
LIGHT = np.array([-0.48, -0.36, 0.8])


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folder of a demo set that this process drew, and its scenes by split and index."""
    root, drawn = tmp_path_factory.mktemp('demo'), {}

    def keep(seed, split, index):
        drawn[split, index] = draw_scene(seed, split, index)
        return drawn[split, index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, 'worker_pool', ThreadPoolExecutor)
        patch.setattr(scenes, 'draw_scene', keep)
        make_demo_set(root, TRAIN, TEST, seed=3)
    return root, drawn


@pytest.fixture
def demo(drawn):
    return drawn[0]


def repaint(coco: COCO, image_id: int) -> np.ndarray:
    """Paint the mask of an image: largest area first, ties in the order of the file."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for annotation in sorted(coco.loadAnns(coco.getAnnIds(image_id)), key=lambda a: -a['area']):
        mask[coco.annToMask(annotation) > 0] = annotation['category_id']
    return mask


@pytest.mark.parametrize(('split', 'name'), [('train', 'train_all'), ('test', 'test_labels')])
def test_painting_the_annotations_gives_the_exact_mask(drawn, split, name):
    root, drawings = drawn
    coco = COCO(root / f'{name}.json')
    overlaps = 0
    for index, image_id in enumerate(sorted(coco.imgs)):
        scene = drawings[split, index]
        np.testing.assert_array_equal(repaint(coco, image_id), scene.mask)
        areas = [a['area'] for a in scene.annotations]
        assert areas == [coco.annToMask(a).sum() for a in coco.loadAnns(coco.getAnnIds(image_id))]
        assert areas == sorted(areas, reverse=True)
        overlaps += sum(areas) > (scene.mask > 0).sum()
    assert overlaps >= 3  # else the order of painting is not tested


def test_read_coco_and_draw_mask_give_the_same_masks(drawn):
    demo, drawings = drawn
    coco = read_coco(demo, 'train', HOME)
    assert len(coco.photos) == TRAIN and len(read_coco(demo, 'test', HOME).photos) == TEST
    for index in (0, 7, TRAIN - 1):
        scene = drawings['train', index]
        np.testing.assert_array_equal(draw_mask(coco.photos[index]), scene.mask)
        photo = read_photo(coco, coco.photos[index])
        assert photo.shape == (SIDE, SIDE, 3)
        assert np.abs(photo.astype(int) - scene.photo).mean() < 6  # JPEG loses a little


def test_layout(demo):
    train, test, labels = (
        json.loads((demo / f'{n}.json').read_text()) for n in ('train_all', 'test', 'test_labels')
    )
    assert test['annotations'] == [] and test['images'] == labels['images'] and labels['annotations']
    for content in (train, test, labels):
        assert set(content) == {'info', 'licenses', 'images', 'categories', 'annotations'}
        assert [(c['id'], c['name']) for c in content['categories']] == list(enumerate(CLASSES))[1:]
    ids = [image['id'] for image in train['images'] + test['images']]
    assert ids == list(range(TRAIN + TEST))
    names = [image['file_name'] for image in train['images'] + test['images']]
    assert names[0] == 'batch_01/0000.jpg' and names[TRAIN] == 'batch_02/0000.jpg'
    files = {str(path.relative_to(demo)) for path in demo.rglob('*.jpg')}
    assert files == set(names)
    for content in (train, labels):
        assert [a['id'] for a in content['annotations']] == list(range(len(content['annotations'])))
        images = {image['id'] for image in content['images']}
        for annotation in content['annotations']:
            assert annotation['image_id'] in images and annotation['iscrowd'] == 0
            assert all(0 <= v <= SIDE and v * 2 % 1 == 0 for p in annotation['segmentation'] for v in p)


def test_every_class_is_in_train_and_test_and_bags_are_frequent(demo):
    for name, photos in (('train_all', TRAIN), ('test_labels', TEST)):
        annotations = json.loads((demo / f'{name}.json').read_text())['annotations']
        count = Counter(a['category_id'] for a in annotations)
        assert set(count) == set(range(1, 11)) and 2.5 < len(annotations) / photos < 7
        assert count[8] + count[2] > len(annotations) * 0.3 and max(count, key=count.get) in (2, 8)
        assert max(count[9], count[5]) < count[8]
    shares = [(draw_mask(photo) == 0).mean() for photo in read_coco(demo, 'train', HOME).photos]
    assert 0.65 < np.mean(shares) < 0.85 and min(shares) > 0.1


def test_a_scene_depends_only_on_seed_split_and_index(demo, tmp_path):
    make_demo_set(tmp_path, 2, 1, seed=3)
    for name in ('batch_01/0000.jpg', 'batch_01/0001.jpg', 'batch_02/0000.jpg'):
        assert (tmp_path / name).read_bytes() == (demo / name).read_bytes()
    small, large = (json.loads((p / 'train_all.json').read_text())['annotations'] for p in (tmp_path, demo))
    assert small == large[: len(small)]
    first = draw_scene(0, 'train', 1).photo
    for other in (draw_scene(1, 'train', 1), draw_scene(0, 'test', 1), draw_scene(0, 'train', 2)):
        assert np.abs(first.astype(int) - other.photo).mean() > 5


@pytest.mark.parametrize(('train', 'test'), [(1, 0), (0, 1), (1, 1)])
def test_any_size(tmp_path, train, test):
    make_demo_set(tmp_path, train, test)
    assert len(list(tmp_path.rglob('*.jpg'))) == train + test
    assert len(json.loads((tmp_path / 'test.json').read_text())['images']) == test


def test_an_object_is_drawn_only_inside_its_mask():
    outline = np.float32([(10, 10), (110, 20), (90, 80), (60, 50), (15, 90)])
    white = Cutout(outline, np.ones((100, 120, 3), np.float32), np.ones((100, 120), np.float32))
    matrix = np.array([[0.8, -0.6, 200.0], [0.6, 0.8, 470.0]])  # a part of it lies below the photo
    polygon = scenes.clip_outline(outline @ matrix[:, :2].T + matrix[:, 2])
    item = scenes.PlacedObject(1, polygon, scenes.rasterise(polygon), white, matrix, 100)
    picture = np.zeros((SIDE, SIDE, 3), np.float32)
    scenes.paint(picture, item)
    np.testing.assert_array_equal(picture[..., 0] > 0.5, item.mask)
    assert item.mask[-1].any() and polygon[:, 1].max() == SIDE


def test_an_outline_outside_the_photo_leaves_nothing():
    outside = np.float32([(-50, 10), (-10, 10), (-10, 60), (-50, 60)])
    assert len(scenes.clip_outline(outside)) == 0 and not scenes.rasterise(scenes.clip_outline(outside)).any()


@pytest.mark.parametrize('category_id', range(1, 11))
def test_every_drawer_fills_its_outline(category_id):
    assert set(DRAWERS) == set(range(1, 11))
    for drawer in dict.fromkeys(DRAWERS[category_id]):
        for size in (50, 260):
            cutout = drawer(np.random.default_rng(size), size, LIGHT)
            h, w = cutout.opacity.shape
            assert (
                cutout.image.shape == (h, w, 3) and cutout.image.dtype == cutout.opacity.dtype == np.float32
            )
            assert np.isfinite(cutout.image).all() and 0 <= cutout.opacity.min() <= cutout.opacity.max() <= 1
            width, height = np.ptp(cutout.outline, 0)
            assert 0.5 * size < max(width, height) < 1.7 * size
            inside = cv2.fillPoly(np.zeros((h, w), np.uint8), [np.int32(cutout.outline)], 1) > 0
            assert cutout.image[inside].std() > 0.02  # textured, lit


def test_every_ground_is_a_picture():
    for ground in GROUNDS:
        image = ground(np.random.default_rng(0), (96, 128))
        assert image.shape == (96, 128, 3) and np.isfinite(image).all() and 0.1 < image.mean() < 1
