"""Test augmentation: sizes, alignment of image and mask, reproducibility, the effect of each config key."""

import cv2
import numpy as np
import pytest

from data.augment import (
    Augment,
    cutmix,
    largest_share,
    mosaic,
    object_pixel,
    paste_object,
    photometric_distortion,
    resample,
    scale_and_crop,
)
from data.coco import IGNORED

FILL = (124, 116, 104)
OFF = dict(scale_range=(1.0, 1.0), crop_max_share=1.0, hflip=0.0, photometric=0.0)


def picture(side=128):
    """Make a photo and a mask of stripes; the red channel is 20 times the mask."""
    mask = np.repeat(np.arange(side, dtype=np.uint8)[None] // 16, side, axis=0)
    mask[: side // 2] += 2
    photo = np.stack([mask * 20, np.full_like(mask, 7), np.full_like(mask, 9)], axis=-1)
    return photo, mask


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_config_that_asks_for_nothing_changes_nothing(tiny):
    photo, mask = picture(64)
    image, out = Augment(tiny.model_copy(update=OFF), FILL)(photo, mask, rng())
    assert np.array_equal(image, photo) and np.array_equal(out, mask)


@pytest.mark.parametrize('key', ['hflip', 'vflip', 'rot90', 'shift_rotate', 'elastic'])
def test_geometry_moves_image_and_mask_together(tiny, key):
    photo, mask = picture(64)
    augment = Augment(tiny.model_copy(update={**OFF, key: 1.0}), FILL)
    for seed in range(4):
        image, out = augment(photo, mask, rng(seed))
        known = out != IGNORED
        assert not np.array_equal(out, mask) and known.mean() > 0.4
        assert np.mean(np.abs(image[..., 0].astype(int) - out.astype(int) * 20)[known] < 12) > 0.85


@pytest.mark.parametrize('key', ['photometric', 'blur', 'noise', 'clahe'])
def test_colour_changes_leave_the_mask_alone(tiny, key):
    photo, mask = picture(64)
    augment = Augment(tiny.model_copy(update={**OFF, key: 1.0}), FILL)
    outs = [augment(photo, mask, rng(seed)) for seed in range(4)]
    assert any(not np.array_equal(image, photo) for image, _ in outs)
    assert all(np.array_equal(out, mask) for _, out in outs)


def test_a_sample_depends_only_on_its_generator(tiny):
    everything = dict(shift_rotate=1.0, elastic=1.0, blur=1.0, noise=1.0, clahe=1.0)
    photo, mask = picture(64)
    augment = Augment(tiny.model_copy(update=everything), FILL)
    first, again, other = (
        augment(photo, mask, rng(1)),
        augment(photo, mask, rng(1)),
        augment(photo, mask, rng(2)),
    )
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_crop_equals_resize_then_crop():
    """Compare with resizing the whole photo, which is exact at integer scales."""
    photo, mask = picture(64)
    resized = cv2.resize(mask, (128, 128), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(
        resample(mask, (10, 20), 64, 128, cv2.INTER_NEAREST, IGNORED), resized[10:74, 20:84]
    )
    halved = cv2.resize(photo, (32, 32), interpolation=cv2.INTER_AREA)
    padded = resample(photo, (-8, -16), 64, 32, cv2.INTER_AREA, FILL)
    assert np.array_equal(padded[8:40, 16:48], halved) and (padded[0, 0] == FILL).all()


def crop(tiny, photo, mask, seed, **keys):
    return scale_and_crop(photo, mask, rng(seed), tiny.model_copy(update=keys), FILL)[1]


def test_crop_avoids_one_class_filling_it(tiny):
    photo = np.zeros((256, 256, 3), np.uint8)
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 224:] = 3  # a crop is all background unless it reaches the right edge
    keys = {'image_size': 256, 'crop_size': 64, 'scale_range': (1.0, 1.0)}
    limited, free = (
        np.array([largest_share(crop(tiny, photo, mask, s, **keys, crop_max_share=most)) for s in range(40)])
        for most in (0.75, 1.0)
    )
    assert np.mean(limited <= 0.75) > 0.6 > 0.4 > np.mean(free <= 0.75)


def test_scale_covers_its_range(tiny):
    photo, mask = picture(128)
    keys = {'image_size': 128, 'crop_size': 128, 'scale_range': (0.5, 2.0), 'crop_max_share': 1.0}
    known = [(crop(tiny, photo, mask, s, **keys) != IGNORED).mean() for s in range(60)]
    assert min(known) < 0.4 and max(known) == 1


def test_photometric_distortion_keeps_shape_and_type():
    photo = rng().integers(0, 256, (32, 32, 3), np.uint8)
    outs = [photometric_distortion(photo, rng(seed)) for seed in range(30)]
    assert all(out.dtype == np.uint8 and out.shape == photo.shape for out in outs)
    assert sum(not np.array_equal(out, photo) for out in outs) > 20
    means = [out.mean() for out in outs]
    assert max(means) - min(means) > 20


def test_an_object_is_pasted_into_photo_and_mask():
    rng = np.random.default_rng(0)
    photo, mask = np.full((128, 128, 3), 10, np.uint8), np.zeros((128, 128), np.uint8)
    donor, donor_mask = np.full((128, 128, 3), 200, np.uint8), np.zeros((128, 128), np.uint8)
    donor_mask[20:60, 30:50] = 9
    donor_mask[100:102, 100:102] = 9  # too small to be pasted
    donor_mask[80:120, 10:90] = 4  # another class
    areas = set()
    for _ in range(20):
        new, new_mask = paste_object(photo, mask, donor, donor_mask, 9, rng)
        assert set(np.unique(new_mask).tolist()) == {0, 9}
        inside = cv2.erode((new_mask == 9).astype(np.uint8), np.ones((3, 3))) > 0
        outside = cv2.dilate((new_mask == 9).astype(np.uint8), np.ones((3, 3))) == 0
        assert (new[inside] == 200).all() and (new[outside] == 10).all()
        areas.add(int((new_mask == 9).sum()))
    assert len(areas) > 5 and min(areas) >= 180 and max(areas) <= 1.5**2 * 800
    assert not mask.any() and (photo == 10).all()  # the cache is not changed


def test_a_donor_without_the_class_changes_nothing():
    photo, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    new, new_mask = paste_object(photo, mask, photo, mask, 3, np.random.default_rng(0))
    assert new is photo and new_mask is mask


def four_pictures():
    return [
        (np.roll(photo, k * 9, 0), np.roll(mask, k * 9, 0)) for k, (photo, mask) in enumerate([picture()] * 4)
    ]


@pytest.mark.parametrize('seed', range(5))
def test_mosaic_and_cutmix_keep_photo_and_mask_together(seed):
    parts = four_pictures()
    before = [photo.copy() for photo, _ in parts]
    for photo, mask in (mosaic(parts, rng(seed)), cutmix(*parts[0], *parts[1], rng(seed))):
        assert photo.shape == (128, 128, 3) and np.array_equal(photo[..., 0], mask * 20)
    assert all(np.array_equal(photo, old) for (photo, _), old in zip(parts, before, strict=True))


def test_mosaic_has_a_quarter_of_each_and_cutmix_a_rectangle_of_the_other():
    flat = [(np.full((64, 64, 3), k, np.uint8), np.full((64, 64), k, np.uint8)) for k in range(4)]
    shares = []
    for seed in range(50):
        mask = mosaic(flat, rng(seed))[1]
        assert set(np.unique(mask)) == {0, 1, 2, 3} and mask[0, 0] == 0 and mask[-1, -1] == 3
        mixed = cutmix(*flat[0], *flat[1], rng(seed))[1]
        rows, columns = np.flatnonzero(mixed.any(1)), np.flatnonzero(mixed.any(0))
        assert mixed.sum() == len(rows) * len(columns)  # a rectangle
        shares.append(mixed.mean())
    assert min(shares) < 0.1 and max(shares) > 0.5


def test_balanced_crops_contain_an_object(tiny):
    mask = np.zeros((256, 256), np.uint8)
    mask[200:204, 20:24] = 5
    photo = np.repeat(mask[..., None] * 40, 3, 2)
    update = {**OFF, 'crop_size': 64, 'image_size': 256, 'scale_range': (0.7, 2.0)}
    found = {}
    for chance in (0.0, 1.0):
        augment = Augment(tiny.model_copy(update={**update, 'crop_balance': chance}), FILL)
        found[chance] = sum((augment(photo, mask, rng(seed))[1] == 5).any() for seed in range(60))
    assert found[1.0] == 60 and found[0.0] < 30
    assert object_pixel(np.zeros((8, 8), np.uint8), rng()) is None
    assert object_pixel(np.full((8, 8), IGNORED, np.uint8), rng()) is None


def test_balanced_crops_choose_each_class_equally_often():
    mask = np.zeros((64, 64), np.uint8)
    mask[:32], mask[60:, 60:] = 2, 3
    drawn = [object_pixel(mask, rng(seed)) for seed in range(200)]
    classes = [mask[round(y * 64), round(x * 64)] for y, x in drawn]
    assert 70 < classes.count(3) < 130 and classes.count(2) + classes.count(3) == 200
