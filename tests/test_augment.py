"""Test augmentation: sizes, alignment of image and mask, reproducibility, the effect of each config key."""

import resource

import cv2
import numpy as np
import pytest

from config import Competition, Config
from data.augment import (
    Augment,
    cut_part,
    cutmix,
    flip,
    largest_share,
    mosaic,
    object_pixel,
    paste_object,
    photometric_distortion,
    resample,
    scale_and_crop,
    turn,
)
from data.coco import IGNORED
from data.planes import pack, unpack

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
        resample(mask, (10, 20), 64, (128, 128), cv2.INTER_NEAREST, IGNORED), resized[10:74, 20:84]
    )
    halved = cv2.resize(photo, (32, 32), interpolation=cv2.INTER_AREA)
    padded = resample(photo, (-8, -16), 64, (32, 32), cv2.INTER_AREA, FILL)
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
        new, new_mask = paste_object((photo, mask), (donor, donor_mask), 9, rng)
        assert set(np.unique(new_mask).tolist()) == {0, 9}
        inside = cv2.erode((new_mask == 9).astype(np.uint8), np.ones((3, 3))) > 0
        outside = cv2.dilate((new_mask == 9).astype(np.uint8), np.ones((3, 3))) == 0
        assert (new[inside] == 200).all() and (new[outside] == 10).all()
        areas.add(int((new_mask == 9).sum()))
    assert len(areas) > 5 and min(areas) >= 180 and max(areas) <= 1.5**2 * 800
    assert not mask.any() and (photo == 10).all()  # the cache is not changed


def test_a_donor_without_the_class_changes_nothing():
    photo, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    new, new_mask = paste_object((photo, mask), (photo, mask), 3, rng())
    assert new is photo and new_mask is mask


def four_pictures():
    return [
        (np.roll(photo, k * 9, 0), np.roll(mask, k * 9, 0)) for k, (photo, mask) in enumerate([picture()] * 4)
    ]


@pytest.mark.parametrize('seed', range(5))
def test_mosaic_and_cutmix_keep_photo_and_mask_together(seed):
    parts = four_pictures()
    before = [photo.copy() for photo, _ in parts]
    for photo, mask in (mosaic(parts, rng(seed), FILL), cutmix(parts[0], parts[1], rng(seed))):
        assert photo.shape == (128, 128, 3) and np.array_equal(photo[..., 0], mask * 20)
    assert all(np.array_equal(photo, old) for (photo, _), old in zip(parts, before, strict=True))


def test_mosaic_has_a_quarter_of_each_and_cutmix_a_rectangle_of_the_other():
    flat = [(np.full((64, 64, 3), k, np.uint8), np.full((64, 64), k, np.uint8)) for k in range(4)]
    shares = []
    for seed in range(50):
        mask = mosaic(flat, rng(seed), FILL)[1]
        assert set(np.unique(mask)) == {0, 1, 2, 3} and mask[0, 0] == 0 and mask[-1, -1] == 3
        mixed = cutmix(flat[0], flat[1], rng(seed))[1]
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


# --- photos that are not square, and classes that may overlap

CLASSES = 12  # so that packed planes have more channels than cv2 takes in one go


def scene(seed, height=90, width=150):
    """Make a photo of noise with rectangles of classes 1 to 12, and its mask, which is IGNORED in places."""
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for k in random.permutation(np.arange(1, CLASSES + 1))[:6]:
        y, x = random.integers(height - 30), random.integers(max(1, width - 40))
        mask[y : y + 30, x : x + 40] = k
    mask[:7, :9] = IGNORED
    photo = random.integers(0, 30, (height, width, 3), np.uint8)
    photo[..., 0] += mask % 20 * 10
    return photo, mask


def planes_of(mask):
    """Return the planes of a mask of ids: a class is there or not, and unknown where the mask is."""
    planes = (mask == np.arange(1, CLASSES + 1)[:, None, None]).astype(np.uint8)
    planes[:, mask == IGNORED] = IGNORED
    return planes


def packed(sample):
    return sample[0], pack(planes_of(sample[1]))


def overlapping(cfg):
    competition = cfg.competition.model_copy(update={'task': 'multilabel'})
    return cfg.model_copy(update={'competition': competition})


EVERYTHING = {
    'crops': {'crop_balance': 0.5, 'crop_max_share': 0.4},
    'turns': {'vflip': 0.5, 'rot90': 1.0, 'photometric': 0.0},
    'warps': {'shift_rotate': 1.0, 'elastic': 0.5, 'blur': 0.5, 'noise': 0.5, 'clahe': 0.5},
    'small': {'scale_range': (0.1, 0.9)},
}


@pytest.mark.parametrize('name', EVERYTHING)
@pytest.mark.parametrize('image_size', [0, 96])
def test_packed_planes_are_augmented_as_ids_are(tiny, name, image_size):
    cfg = tiny.model_copy(update={'crop_size': 64, 'image_size': image_size, **EVERYTHING[name]})
    one, other = Augment(cfg, FILL), Augment(overlapping(cfg), FILL)
    for seed in range(6):
        sample = scene(seed)
        image, mask = one(*sample, rng(seed))
        same_image, planes = other(*packed(sample), rng(seed))
        assert image.shape == (64, 64, 3) and np.array_equal(image, same_image)
        assert np.array_equal(unpack(planes, CLASSES), planes_of(mask))
        assert planes.flags.c_contiguous and planes.flags.writeable


MIXES = {
    'mosaic': lambda samples, random, _: mosaic(samples, random, FILL),
    'cutmix': lambda samples, random, _: cutmix(samples[0], samples[1], random),
    'paste': lambda samples, random, first: paste_object(samples[0], samples[1], 3 - first, random, 0.8),
    'cut': lambda samples, random, first: cut_part(samples[0], 50, random, 5 - first),
}


@pytest.mark.parametrize('name', MIXES)
def test_packed_planes_are_mixed_as_ids_are(name):
    sizes, changed = [(90, 150), (150, 90), (60, 60), (200, 70)], 0
    for seed in range(8):
        samples = [scene(10 * seed + k, *size) for k, size in enumerate(sizes)]
        before = [[part.copy() for part in sample] for sample in samples]
        photo, mask = MIXES[name](samples, rng(seed), 0)
        same_photo, planes = MIXES[name]([packed(sample) for sample in samples], rng(seed), 1)
        assert np.array_equal(photo, same_photo)
        assert np.array_equal(unpack(planes, CLASSES), planes_of(mask))
        known = mask != IGNORED
        if name != 'paste':  # whose edges are smooth
            assert (photo[..., 0][known] // 10 - mask[known] % 20 < 3).all()
        assert photo.shape[:2] == mask.shape == ((50, 50) if name == 'cut' else (90, 150))
        changed += not np.array_equal(mask, samples[0][1])
        assert all(np.array_equal(*pair) for sample in zip(samples, before) for pair in zip(*sample))
    assert changed > 1


def test_all_classes_that_overlap_are_pasted():
    donor_planes, planes = np.zeros((2, 3, 64, 64), np.uint8)
    donor_planes[0, 10:30, 10:40], donor_planes[2, 10:30, 20:40] = 1, 1
    donor_planes[1] = IGNORED
    planes[1] = 1
    photo = np.zeros((64, 64, 3), np.uint8)
    _, mask = paste_object((photo, pack(planes)), (photo, pack(donor_planes)), 0, rng())
    first, second, third = unpack(mask, 3)
    assert first.any() and (second[first == 1] == IGNORED).all() and (second[first == 0] == 1).all()
    assert third.sum() == pytest.approx(first.sum() * 2 / 3, rel=0.1) and not third[first == 0].any()


@pytest.mark.parametrize('size', [(40, 160), (160, 40), (64, 100)])
def test_longer_side_becomes_image_size(tiny, size):
    """At scale 1 a photo with sides of image_size is neither turned, squashed nor resampled."""
    photo, mask = scene(0, *size)
    keys = {'image_size': 160 if max(size) == 160 else 0, 'crop_size': 192}
    image, out = Augment(tiny.model_copy(update={**OFF, **keys}), FILL)(photo, mask, rng())
    height, width = size
    inside = np.argwhere((image != FILL).any(2))
    (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
    assert (bottom - top, right - left) == size
    assert np.array_equal(image[top:bottom, left:right], photo)
    assert np.array_equal(out[top:bottom, left:right], mask)
    out[top:bottom, left:right] = IGNORED
    assert (out == IGNORED).all() and out.size - height * width > 0


@pytest.mark.parametrize(('size', 'scaled'), [((60, 90), (120, 180)), ((90, 60), (45, 30))])
def test_crop_of_a_long_photo_equals_resize_then_crop(size, scaled):
    _, mask = scene(1, *size)
    resized = cv2.resize(mask, scaled[::-1], interpolation=cv2.INTER_NEAREST)
    if scaled[0] > 64:
        crop = resample(mask, (10, 24), 64, scaled, cv2.INTER_NEAREST, (255,))
        assert np.array_equal(crop, resized[10:74, 24:88])
    else:
        crop = resample(mask, (-9, -20), 64, scaled, cv2.INTER_NEAREST, (255,))
        assert np.array_equal(crop[9:54, 20:50], resized) and (crop != 255).sum() <= resized.size


def test_balanced_crops_of_a_long_photo_contain_the_object(tiny):
    mask = np.zeros((100, 400), np.uint8)
    mask[90:94, 20:24] = 5
    photo = np.repeat(mask[..., None] * 40, 3, 2)
    keys = {**OFF, 'crop_size': 64, 'image_size': 400, 'scale_range': (0.7, 2.0), 'crop_balance': 1.0}
    augment = Augment(tiny.model_copy(update=keys), FILL)
    assert all((augment(photo, mask, rng(seed))[1] == 5).any() for seed in range(60))


@pytest.mark.parametrize('channels', [1, 2, 64])
def test_any_number_of_channels_is_turned(channels):
    array = np.random.default_rng(0).integers(0, 255, (5, 7, channels), np.uint8)
    assert all(np.array_equal(turn(array, k), np.rot90(array, k)) for k in (1, 2, 3))
    assert all(np.array_equal(flip(array, axis), np.flip(array, axis)) for axis in (0, 1))


def test_crop_reads_only_its_part_of_a_large_photo(tiny, tmp_path):
    """Count the pages that are touched: 4 kB each, of a photo of 1.2 GB."""
    shape, options = (20_000, 20_000), {'mode': 'w+', 'dtype': np.uint8}
    photo = np.lib.format.open_memmap(tmp_path / 'photo.npy', shape=(*shape, 3), **options)
    mask = np.lib.format.open_memmap(tmp_path / 'mask.npy', shape=shape, **options)
    keys = {'image_size': 0, 'crop_size': 256}
    augment = Augment(tiny.model_copy(update=keys), FILL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    augment(photo, mask, rng())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 30_000


# --- bands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('depth', [8, 16])
@pytest.mark.parametrize('channels', [1, 2, 4, 6, 20, 150])
def test_every_transform_takes_any_number_of_bands(channels, depth):
    """Give all bands the same pixels: they must stay the same, inside the photo, and be `fill` outside."""
    top = 2**depth - 1
    competition = Competition(channels=channels, depth=depth, intensity=(0, top))
    keys = dict.fromkeys(('hflip', 'vflip', 'rot90', 'shift_rotate', 'elastic', 'blur'), 1.0)
    cfg = Config(
        competition=competition, cache_size=256, image_size=64, crop_size=96, scale_range=(0.3, 1.2), **keys
    )
    band = rng(0).integers(0, top, (70, 90, 1)).astype(np.uint8 if depth == 8 else np.uint16)
    photo, mask = np.repeat(band, channels, axis=2), np.full((70, 90), 3, np.uint8)
    augment = Augment(cfg, tuple(range(7, 7 + channels)))
    for seed in range(4):
        image, ids = augment(photo, mask, rng(seed))
        assert image.shape == (96, 96, channels) and image.dtype == photo.dtype and image.flags.c_contiguous
        inside = cv2.erode((ids == 3).astype(np.uint8), np.ones((15, 15))) > 0
        assert inside.any()
        spread = np.ptp(image[inside].astype(int), axis=1)
        assert spread.max() <= (1 if depth == 8 else 4)  # cv2 rounds differently by the number of bands


def test_outside_of_a_photo_each_band_has_its_fill():
    competition = Competition(channels=6, depth=16, intensity=(0, 9))
    for keys in ({}, {'shift_rotate': 1.0}, {'elastic': 1.0}):
        cfg = Config(
            competition=competition, cache_size=256, image_size=64, crop_size=96, scale_range=(1, 1),
            photometric=0, **keys,
        )  # fmt: skip
        fill = (1, 200, 3000, 40_000, 5, 60_000)
        image, ids = Augment(cfg, fill)(
            np.full((64, 64, 6), 9, np.uint16), np.zeros((64, 64), np.uint8), rng(1)
        )
        outside = cv2.erode((ids == IGNORED).astype(np.uint8), np.ones((5, 5))) > 0
        assert (image[outside] == fill).all(1).mean() > 0.98  # a distorted edge is blended with the photo


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 3, 6])
def test_bands_other_than_rgb_get_brightness_and_contrast_alone(channels, dtype):
    image = rng(0).integers(0, np.iinfo(dtype).max, (8, 8, channels)).astype(dtype)
    top, seen = np.iinfo(dtype).max, set()
    for seed in range(40):
        found = photometric_distortion(image, rng(seed), is_rgb=False)
        draws = rng(seed)
        brightness = draws.uniform(-32, 32) * top / 255 if draws.random() < 0.5 else 0.0
        contrast = draws.uniform(0.5, 1.5) if draws.random() < 0.5 else 1.0
        expected = np.clip(np.clip(image + brightness, 0, top) * contrast, 0, top)
        assert found.dtype == dtype and np.abs(found - expected).max() <= 0.51
        seen.add((brightness != 0, contrast != 1))
    assert len(seen) == 4


@pytest.mark.parametrize('seed', range(3))
def test_mixing_takes_bands_of_16_bits(seed):
    draws = rng(seed)
    parts = [(np.full((64, 80, 6), 1000 * k, np.uint16), np.full((64, 80), k, np.uint8)) for k in range(1, 5)]
    for photo, mask in (
        mosaic(parts, draws, (0,) * 6),
        cutmix(*parts[:2], draws),
        paste_object(*parts[:2], 2, draws),
    ):
        assert photo.dtype == np.uint16 and photo.shape[2] == 6
        known = cv2.erode(np.isin(mask, (1, 2, 3, 4)).astype(np.uint8), np.ones((3, 3))) > 0
        exact = (photo == 1000 * mask[..., None].astype(int)).all(2)
        assert exact[known].mean() > 0.9


@pytest.mark.parametrize(
    ('values', 'key'),
    [
        ({'channels': 4}, 'clahe'),
        ({'depth': 16}, 'clahe'),
        ({'channels': 1, 'depth': 16}, 'clahe'),
        ({'channels': 3, 'slices': {}}, 'clahe'),
        ({'channels': 1, 'depth': 16}, 'noise'),
    ],
)
def test_transforms_that_are_not_for_such_photos_are_refused(values, key):
    Config(competition=Competition(channels=1), clahe=0.5, noise=0.5)
    with pytest.raises(ValueError, match=f'{key}: found 0.5, but .* remove the key'):
        Config(competition=Competition(**values), **{key: 0.5})
