"""Augmentation of one training sample: scale and crop, flips, photometric distortion, and albumentations'
heavier distortions.

    augment = Augment(cfg, fill=(124, 116, 104))
    image, mask = augment(photo, mask, np.random.default_rng((seed, epoch, index)))

Shapes: photo (S, S, 3) and mask (S, S) uint8 as cached, C the crop's side. Every random number comes from
the generator passed in. The standard chain is that of mmsegmentation's ADE20K configs: RandomResize,
RandomCrop(cat_max_ratio), RandomFlip, PhotoMetricDistortion. Only what the crop keeps is resampled.
"""

from collections.abc import Sequence

import albumentations as A
import cv2
import numpy as np

from config import Config
from data.coco import IGNORED

CROP_TRIES = 10  # before a crop that is too full of one class is taken all the same
QUARTER_TURNS = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
PASTE_AREA = 64  # pixels of an object that is worth pasting
PASTE_SCALES = (0.5, 1.5)

Sample = tuple[np.ndarray, np.ndarray]  # a photo (S, S, 3) and its mask (S, S), both uint8


class Augment:
    """The training augmentation that a config asks for; `fill` is the colour (RGB, 0 to 255) outside the
    photo.
    """

    def __init__(self, cfg: Config, fill: tuple[int, int, int]) -> None:
        self.cfg = cfg
        self.fill = fill
        self.heavy = heavy_transforms(cfg, fill)

    def __call__(self, photo: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
        """A (C, C, 3) image and its (C, C) mask, both uint8 and contiguous."""
        cfg = self.cfg
        focus = object_pixel(mask, rng) if chance(cfg.crop_balance, rng) else None
        image, mask = scale_and_crop(
            photo,
            mask,
            rng,
            cfg.image_size,
            cfg.crop_size,
            cfg.scale_range,
            cfg.crop_max_share,
            self.fill,
            focus,
        )
        if rng.random() < cfg.hflip:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        if rng.random() < cfg.vflip:
            image, mask = cv2.flip(image, 0), cv2.flip(mask, 0)
        if rng.random() < cfg.rot90:
            turn = QUARTER_TURNS[int(rng.integers(3))]
            image, mask = cv2.rotate(image, turn), cv2.rotate(mask, turn)
        # copied where it is still a view of the cache, which nobody may write to
        image, mask = np.require(image, requirements='CW'), np.require(mask, requirements='CW')
        if rng.random() < cfg.photometric:
            image = photometric_distortion(image, rng)
        if self.heavy is not None:
            # its own generator repeats itself across workers
            self.heavy.set_random_seed(int(rng.integers(2**31)))
            out = self.heavy(image=image, mask=mask)
            image, mask = out['image'], out['mask']
        return image, mask


def chance(probability: float, rng: np.random.Generator) -> bool:
    """True with that probability; draws nothing where it is 0."""
    return probability > 0 and rng.random() < probability


def paste_object(
    photo: np.ndarray,
    mask: np.ndarray,
    donor: np.ndarray,
    donor_mask: np.ndarray,
    category: int,
    rng: np.random.Generator,
) -> Sample:
    """One object of `category` out of a donor's photo (S, S, 3) and mask (S, S), at a random scale, side and
    place, over another photo and its mask; those as they are where the donor has none of PASTE_AREA pixels.

    An object is what hangs together in the mask (simple copy-paste, arXiv:2012.07177).
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats((donor_mask == category).astype(np.uint8))
    large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= PASTE_AREA) + 1
    if not len(large):
        return photo, mask
    label = int(rng.choice(large))
    x, y, width, height = (int(v) for v in stats[label, :4])
    shape = (labels[y : y + height, x : x + width] == label).astype(np.uint8)
    picture = donor[y : y + height, x : x + width]
    side = len(mask)
    scale = min(rng.uniform(*PASTE_SCALES), side / width, side / height)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    shape = cv2.resize(shape, size, interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        picture, shape = picture[:, ::-1], shape[:, ::-1]
    left = int(rng.integers(0, side - size[0] + 1))
    top = int(rng.integers(0, side - size[1] + 1))
    photo, mask = photo.copy(), mask.copy()
    where = slice(top, top + size[1]), slice(left, left + size[0])
    soft = cv2.GaussianBlur(shape.astype(np.float32), (3, 3), 0)[..., None]  # no hard edge to learn from
    photo[where] = (photo[where] * (1 - soft) + picture * soft).round().astype(np.uint8)
    mask[where][shape > 0] = category
    return photo, mask


def mosaic(parts: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Four photos (S, S, 3) with their masks in one: each fills a quarter around a random point, cut out of
    itself at a random place (YOLOv4, arXiv:2004.10934).
    """
    side = len(parts[0][1])
    photo, mask = np.empty_like(parts[0][0]), np.empty_like(parts[0][1])
    y, x = (int(v) for v in rng.integers(side // 4, side - side // 4, 2))
    corners = [(0, 0, y, x), (0, x, y, side), (y, 0, side, x), (y, x, side, side)]
    for (top, left, bottom, right), (other, other_mask) in zip(corners, parts, strict=True):
        height, width = bottom - top, right - left
        from_y, from_x = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        source = slice(from_y, from_y + height), slice(from_x, from_x + width)
        photo[top:bottom, left:right] = other[source]
        mask[top:bottom, left:right] = other_mask[source]
    return photo, mask


def cutmix(
    photo: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray, rng: np.random.Generator
) -> Sample:
    """A rectangle of another photo, with its mask, in the same place; its area is uniform from 0 to all
    (CutMix, arXiv:1905.04899, with alpha 1).
    """
    side = len(mask)
    length = round(side * np.sqrt(rng.random()))
    y, x = (int(v) for v in rng.integers(side, size=2))
    where = tuple(slice(max(0, v - length // 2), min(side, v + length - length // 2)) for v in (y, x))
    photo, mask = photo.copy(), mask.copy()
    photo[where], mask[where] = other[where], other_mask[where]
    return photo, mask


def object_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    """A random pixel of a random class that is in the mask, not the background, as shares of its side; None
    where there is none.
    """
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
    present = np.flatnonzero(counts[1:]) + 1
    if not len(present):
        return None
    pixels = np.flatnonzero(mask == rng.choice(present))
    y, x = divmod(int(rng.choice(pixels)), mask.shape[1])
    return y / len(mask), x / len(mask)


def scale_and_crop(
    photo: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    image_size: int,
    crop_size: int,
    scale_range: tuple[float, float],
    max_share: float,
    fill: tuple[int, int, int],
    focus: tuple[float, float] | None = None,
) -> Sample:
    """A crop of crop_size from the photo at a random scale of image_size; what lies outside the photo is
    `fill` and IGNORED.

    The position is drawn again while one class fills more than max_share of the crop's known pixels. focus:
    a point, as shares of the photo's side, that the crop has to have in it.
    """
    scaled = max(1, round(image_size * rng.uniform(*scale_range)))
    room = scaled - crop_size
    low, high = np.full(2, min(0, room)), np.full(2, max(0, room))
    if focus is not None:
        point = (np.array(focus) * scaled).astype(int)
        low, high = np.maximum(low, point - crop_size + 1), np.minimum(high, point)
    for _ in range(CROP_TRIES):
        y, x = (int(v) for v in rng.integers(low, high + 1))
        if max_share >= 1 or largest_share(mask[window(len(mask), y, x, crop_size, scaled)]) <= max_share:
            break
    # bilinear takes all pixels in down to a half, and is six times as fast as the mean of what is covered
    smooth = cv2.INTER_AREA if photo.shape[0] > 2 * scaled else cv2.INTER_LINEAR
    crop = resample(mask, y, x, crop_size, scaled, cv2.INTER_NEAREST, (IGNORED,))
    return resample(photo, y, x, crop_size, scaled, smooth, fill), crop


def window(side: int, y: int, x: int, crop: int, scaled: int) -> tuple[slice, slice]:
    """The part of a (side, side) picture that the window (y, x, crop, crop) of it has, resized to scaled."""

    def stretch(start: int) -> slice:
        first, last = max(start, 0), min(start + crop, scaled)
        low = round(first * side / scaled)
        return slice(low, max(low + 1, round(last * side / scaled)))

    return stretch(y), stretch(x)


def resample(
    source: np.ndarray, y: int, x: int, crop: int, scaled: int, interpolation: int, fill: Sequence[int]
) -> np.ndarray:
    """The window (y, x, crop, crop) of `source` as if it had been resized to scaled x scaled first."""
    top, left = max(y, 0) - y, max(x, 0) - x
    bottom, right = min(y + crop, scaled) - y, min(x + crop, scaled) - x
    seen = source[window(len(source), y, x, crop, scaled)]
    size = (right - left, bottom - top)
    if seen.shape[1::-1] != size:
        seen = cv2.resize(seen, size, interpolation=interpolation)
    if size == (crop, crop):
        return seen
    edges = (top, crop - bottom, left, crop - right)
    return cv2.copyMakeBorder(seen, *edges, cv2.BORDER_CONSTANT, value=fill)


def largest_share(mask: np.ndarray) -> float:
    """The share of known pixels that the commonest class has; 0 where none is known."""
    counts = np.bincount(mask[::4, ::4].ravel(), minlength=IGNORED + 1)[:IGNORED]
    return counts.max() / max(1, counts.sum())


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness (+-32), contrast (0.5 to 1.5), saturation (0.5 to 1.5) and hue (+-18 degrees of
    180), each by half a chance.

    SSD's (arXiv:1512.02325) as in mmsegmentation; contrast comes before or after the colour changes, by half
    a chance.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if brightness:
        image = cv2.add(image, (brightness, brightness, brightness, 0))  # clips, as all below
    if contrast_first and contrast != 1:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    if saturation != 1 or hue:
        hues, saturations, values = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        if hue:
            hues = cv2.LUT(hues, ((np.arange(256) + hue) % 180).astype(np.uint8))
        if saturation != 1:
            saturations = cv2.convertScaleAbs(saturations, alpha=saturation)
        image = cv2.cvtColor(cv2.merge([hues, saturations, values]), cv2.COLOR_HSV2RGB)
    if not contrast_first and contrast != 1:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    return image


def heavy_transforms(cfg: Config, fill: tuple[int, int, int]) -> A.Compose | None:
    """albumentations' part of the chain; None where the config asks for none of it."""
    border = dict(border_mode=cv2.BORDER_CONSTANT, fill=fill, fill_mask=IGNORED)
    choices = [
        (
            cfg.shift_rotate,
            A.Affine(
                translate_percent=(-0.0625, 0.0625),
                scale=(0.9, 1.1),
                rotate=(-45, 45),
                p=cfg.shift_rotate,
                **border,
            ),
        ),
        (
            cfg.elastic,
            A.OneOf(
                [A.ElasticTransform(alpha=40, sigma=8, **border), A.Perspective(scale=(0.05, 0.1), **border)],
                p=cfg.elastic,
            ),
        ),
        (cfg.blur, A.OneOf([A.GaussianBlur(blur_limit=(3, 7)), A.MotionBlur(blur_limit=(3, 7))], p=cfg.blur)),
        (cfg.noise, A.GaussNoise(std_range=(0.02, 0.08), p=cfg.noise)),
        (cfg.clahe, A.CLAHE(clip_limit=(1, 4), p=cfg.clahe)),
    ]
    chosen = [transform for probability, transform in choices if probability > 0]
    return A.Compose(chosen) if chosen else None
