"""The cache of photos of any size, whose classes may overlap."""

import pickle

import cv2
import numpy as np
import pytest
from conftest import TINY
from overlaps import paint, write_overlaps

from config import make_config, read_competition
from data.cache import Cache, cached_shapes, fit_size, open_cache
from data.coco import read_photo, scored_truth
from data.folds import read_folds
from data.planes import pack, pack_nothing, read_plane, unpack, write_plane
from metrics import IGNORED

SIZES = [(60, 90), (90, 60), (48, 200), (64, 64), (50, 50)]
EQUAL = [(60, 90)] * 5


def config_of(tmp_path, **keys):
    """Make a config over the data set in a folder, with a cache there."""
    root = tmp_path / 'data'
    paths = {'data_root': root, 'cache_dir': tmp_path / 'cache', 'output_dir': tmp_path / 'output'}
    values = {**TINY, 'name': 'run', 'competition': read_competition(root), **paths, **keys}
    return make_config(values, where='test')


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
@pytest.mark.parametrize('sizes', [SIZES, EQUAL], ids=['mixed', 'equal'])
@pytest.mark.parametrize('side', [0, 64])
def test_photos_keep_their_aspect(tmp_path, task, sizes, side):
    planes = write_overlaps(tmp_path / 'data', sizes, task=task)
    cache = open_cache(config_of(tmp_path, cache_size=side), 'train')
    assert (cache.photos.shard(0).array.ndim == 4) == (sizes == EQUAL)  # else one row of values
    masks = planes if task == 'multilabel' else paint(planes)
    for row, photo in enumerate(cache.coco.photos):
        height, width = photo.size
        scale = side / max(height, width) if side else 1
        size = round(height * scale), round(width * scale)
        expected = read_photo(cache.coco, photo)
        if side:
            shrinks = cv2.INTER_AREA if height > size[0] and width > size[1] else cv2.INTER_LINEAR
            expected = cv2.resize(expected, size[::-1], interpolation=shrinks)
        assert np.array_equal(cache.photos[row], expected)
        mask = masks[photo.file_name]
        resized = [
            cv2.resize(p, size[::-1], interpolation=cv2.INTER_NEAREST) for p in np.atleast_3d(mask.T).T
        ]
        mine = cache.masks[row] if task == 'multiclass' else unpack(cache.masks[row], 3)
        assert np.array_equal(mine, np.squeeze(np.stack(resized)))
        assert np.array_equal(cache.truth(row), mask)  # at its own size, whatever the cache's
        assert np.array_equal(scored_truth(photo, cache.coco.competition), mask)


def test_truth_of_a_fixed_size(tmp_path):
    planes = write_overlaps(tmp_path / 'data', EQUAL, score_size=32, submission={})
    cache = open_cache(config_of(tmp_path, cache_size=64), 'train')
    resized = [cv2.resize(p, (32, 32), interpolation=cv2.INTER_NEAREST) for p in planes['001.png']]
    assert np.array_equal(cache.truth(1), resized)


def test_cache_goes_to_another_process_by_name(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES)
    cache = open_cache(config_of(tmp_path, cache_size=0), 'train')
    sent = pickle.dumps(cache)
    assert len(sent) < 5000
    again = pickle.loads(sent)
    assert isinstance(again, Cache) and np.array_equal(again.photos[2], cache.photos[2])
    assert np.array_equal(again.masks[0], cache.masks[0])


def test_what_changes_no_pixel_needs_no_other_cache(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES)
    cfg = config_of(tmp_path, cache_size=0)
    open_cache(cfg, 'train')

    def caches_with(**keys):
        competition = cfg.competition.model_copy(update=keys)
        open_cache(cfg.model_copy(update={'competition': competition}), 'train')
        return len(list(cfg.cache_dir.glob('train-*')))

    other = {'metric': 'image_dice', 'empty_score': None, 'score_size': 64, 'group': '(.*)'}
    assert caches_with(**other, score_background=True) == 1
    assert caches_with(crowds='objects') == 2
    assert caches_with(task='multiclass', classes=('Background', 'red', 'green', 'blue')) == 3


def test_folds_of_photos_of_mixed_sizes(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES * 4)
    cfg = config_of(tmp_path, cache_size=0)
    cache = open_cache(cfg, 'train')
    assert cache.coco.photos[0].classes == {0, 1, 2}
    assert set(read_folds(cfg, cache).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ('size', 'side', 'expected'),
    [((512, 512), 512, (512, 512)), ((300, 400), 0, (300, 400)), ((300, 400), 800, (600, 800)),
     ((4000, 3000), 512, (512, 384)), ((1, 900), 90, (1, 90))],
)  # fmt: skip
def test_longer_side_is_fitted(size, side, expected):
    assert fit_size(size, side) == expected


@pytest.mark.parametrize('num_classes', [1, 3, 8, 9, 29])
def test_planes_are_read_and_written_one_by_one(num_classes):
    rng = np.random.default_rng(num_classes)
    planes = rng.choice(np.array([0, 1, IGNORED], np.uint8), (num_classes, 7, 11))
    packed = pack_nothing((7, 11), num_classes)
    assert not unpack(packed, num_classes).any()
    for _ in range(2):  # the second time over what is there
        planes = rng.permuted(planes, axis=1)
        for k, plane in enumerate(planes):
            write_plane(packed, k, plane)
        assert np.array_equal(packed, pack(planes))
    assert all(np.array_equal(read_plane(packed, k), plane) for k, plane in enumerate(planes))


def test_shapes_of_150_classes(tmp_path):
    names = [f'class {k}' for k in range(150)]
    planes = write_overlaps(tmp_path / 'data', [(24, 36)] * 3, names)
    cache = open_cache(config_of(tmp_path, cache_size=0), 'train')
    assert cached_shapes(cache.coco, 0)['masks'] == [(24, 36, 38)] * 2
    assert np.array_equal(cache.truth(0), planes['000.png'])
