"""Augment a training sample: crop, flips, colours, albumentations; mix samples: copy-paste, mosaic, CutMix.

    augment = Augment(cfg, fill=(124, 116, 104))
    image, mask = augment(photo, mask, np.random.default_rng((seed, epoch, index)))

Shapes: photo (S, S, 3) and mask (S, S) uint8 as cached, C the crop's side. The standard chain is that of
mmsegmentation's ADE20K configs: RandomResize, RandomCrop(cat_max_ratio), RandomFlip, PhotoMetricDistortion.
Only the pixels of the crop are resampled.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from config import Config
from metrics import IGNORED

if TYPE_CHECKING:
    import albumentations as A

CROP_TRIES = 10  # the last crop is used even if one class fills too much of it
QUARTER_TURNS = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
PASTE_AREA = 64  # pixels; smaller objects are not pasted
PASTE_SCALES = (0.5, 1.5)

Rng = np.random.Generator
Sample = tuple[np.ndarray, np.ndarray]  # a photo (S, S, 3) and its mask (S, S), both uint8
Point = tuple[float, float]  # (y, x)


class Augment:
    """Apply the augmentation of a config; `fill` is the colour (RGB, 0 to 255) outside the photo."""

    def __init__(self, cfg: Config, fill: tuple[int, int, int]) -> None:
        self.cfg = cfg
        self.fill = fill
        self.heavy = heavy_transforms(cfg, fill)

    def __call__(self, photo: np.ndarray, mask: np.ndarray, rng: Rng) -> Sample:
        """Return a (C, C, 3) image and its (C, C) mask, both uint8, contiguous and writable."""
        cfg = self.cfg
        focus = object_pixel(mask, rng) if chance(cfg.crop_balance, rng) else None
        image, mask = scale_and_crop(photo, mask, rng, cfg, self.fill, focus)
        for axis, probability in ((1, cfg.hflip), (0, cfg.vflip)):
            if rng.random() < probability:
                image, mask = cv2.flip(image, axis), cv2.flip(mask, axis)
        if rng.random() < cfg.rot90:
            turn = QUARTER_TURNS[int(rng.integers(3))]
            image, mask = cv2.rotate(image, turn), cv2.rotate(mask, turn)
        # without a crop or a flip this is still a view of the cache, which is read-only
        image, mask = np.require(image, requirements='CW'), np.require(mask, requirements='CW')
        if rng.random() < cfg.photometric:
            image = photometric_distortion(image, rng)
        if self.heavy is not None:
            # albumentations' own generator gives the same numbers in every worker
            self.heavy.set_random_seed(int(rng.integers(2**31)))
            out = self.heavy(image=image, mask=mask)
            image, mask = out['image'], out['mask']
        return image, mask


def chance(probability: float, rng: Rng) -> bool:
    """Return True with a probability; draw no number if it is 0."""
    return probability > 0 and rng.random() < probability


def paste_object(
    photo: np.ndarray, mask: np.ndarray, donor: np.ndarray, donor_mask: np.ndarray, category: int, rng: Rng
) -> Sample:
    """Paste a connected component of a class from a donor at a random scale and place, mirrored or not.

    Simple copy-paste, arXiv:2012.07177. Changes nothing if the donor has none of at least PASTE_AREA pixels.
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
    alpha = cv2.GaussianBlur(shape.astype(np.float32), (3, 3), 0)[..., None]  # else the model learns the edge
    photo[where] = (photo[where] * (1 - alpha) + picture * alpha).round().astype(np.uint8)
    mask[where][shape > 0] = category
    return photo, mask


def mosaic(parts: Sequence[Sample], rng: Rng) -> Sample:
    """Fill the quarters around a random point with random crops of four photos (YOLOv4, arXiv:2004.10934)."""
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
    photo: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray, rng: Rng
) -> Sample:
    """Copy a random square of another photo to the same place (CutMix, arXiv:1905.04899, with alpha 1)."""
    side = len(mask)
    length = round(side * np.sqrt(rng.random()))
    y, x = (int(v) for v in rng.integers(side, size=2))
    where = tuple(slice(max(0, v - length // 2), min(side, v + length - length // 2)) for v in (y, x))
    photo, mask = photo.copy(), mask.copy()
    photo[where], mask[where] = other[where], other_mask[where]
    return photo, mask


def object_pixel(mask: np.ndarray, rng: Rng) -> Point | None:
    """Pick a random object class and a random pixel (y, x) of it, from 0 to 1; None without an object."""
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
    rng: Rng,
    cfg: Config,
    fill: Sequence[int],
    focus: Point | None = None,
) -> Sample:
    """Scale the photo by a random factor of `scale_range` and cut out `crop_size`; IGNORED outside the photo.

    The position is drawn again while one class fills more than `crop_max_share` of the labelled pixels. The
    crop contains `focus`, if one is given.
    """
    scaled = max(1, round(cfg.image_size * rng.uniform(*cfg.scale_range)))
    crop_size, max_share = cfg.crop_size, cfg.crop_max_share
    room = scaled - crop_size
    low, high = np.full(2, min(0, room)), np.full(2, max(0, room))
    if focus is not None:
        point = (np.array(focus) * scaled).astype(int)
        low, high = np.maximum(low, point - crop_size + 1), np.minimum(high, point)
    for _ in range(CROP_TRIES):
        y, x = (int(v) for v in rng.integers(low, high + 1))
        if max_share >= 1 or largest_share(mask[window(len(mask), y, x, crop_size, scaled)]) <= max_share:
            break
    # down to half the size bilinear uses every pixel, and it is six times as fast as INTER_AREA
    interpolation = cv2.INTER_AREA if photo.shape[0] > 2 * scaled else cv2.INTER_LINEAR
    image = resample(photo, (y, x), crop_size, scaled, interpolation, fill)
    return image, resample(mask, (y, x), crop_size, scaled, cv2.INTER_NEAREST, (IGNORED,))


def window(side: int, y: int, x: int, crop: int, scaled: int) -> tuple[slice, slice]:
    """Return the rows and columns of a (side, side) photo that a crop at (y, x) of the scaled photo shows."""

    def span(start: int) -> slice:
        first, last = max(start, 0), min(start + crop, scaled)
        low = round(first * side / scaled)
        return slice(low, max(low + 1, round(last * side / scaled)))

    return span(y), span(x)


def resample(
    source: np.ndarray, corner: Point, crop: int, scaled: int, interpolation: int, fill: Sequence[int]
) -> np.ndarray:
    """Cut a crop at the corner (y, x) out of `source` as if it had been resized to scaled x scaled first."""
    y, x = corner
    top, left = max(y, 0) - y, max(x, 0) - x
    bottom, right = min(y + crop, scaled) - y, min(x + crop, scaled) - x
    part = source[window(len(source), y, x, crop, scaled)]
    size = (right - left, bottom - top)
    if part.shape[1::-1] != size:
        part = cv2.resize(part, size, interpolation=interpolation)
    if size == (crop, crop):
        return part
    edges = (top, crop - bottom, left, crop - right)
    return cv2.copyMakeBorder(part, *edges, cv2.BORDER_CONSTANT, value=fill)


def largest_share(mask: np.ndarray) -> float:
    """Return the most frequent class's share of the labelled pixels; 0 if all are IGNORED."""
    counts = np.bincount(mask[::4, ::4].ravel(), minlength=IGNORED + 1)[:IGNORED]
    return counts.max() / max(1, counts.sum())


def photometric_distortion(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes before or after the colours (SSD, arXiv:1512.02325, as in mmsegmentation).
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if brightness:
        image = cv2.add(image, (brightness, brightness, brightness, 0))  # clips to 0 to 255, as below
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


def heavy_transforms(cfg: Config, fill: tuple[int, int, int]) -> 'A.Compose | None':
    """Build the albumentations part of the chain; None if the config asks for none of its transforms."""
    if not any((cfg.shift_rotate, cfg.elastic, cfg.blur, cfg.noise, cfg.clahe)):
        return None
    import albumentations as A  # imports torch, which everything else here does without

    border = dict(border_mode=cv2.BORDER_CONSTANT, fill=fill, fill_mask=IGNORED)
    warps = [A.ElasticTransform(alpha=40, sigma=8, **border), A.Perspective(scale=(0.05, 0.1), **border)]
    blurs = [A.GaussianBlur(blur_limit=(3, 7)), A.MotionBlur(blur_limit=(3, 7))]
    shift = dict(translate_percent=(-0.0625, 0.0625), scale=(0.9, 1.1), rotate=(-45, 45))
    transforms = [
        A.Affine(**shift, **border, p=cfg.shift_rotate),
        A.OneOf(warps, p=cfg.elastic),
        A.OneOf(blurs, p=cfg.blur),
        A.GaussNoise(std_range=(0.02, 0.08), p=cfg.noise),
        A.CLAHE(clip_limit=(1, 4), p=cfg.clahe),
    ]
    return A.Compose([transform for transform in transforms if transform.p > 0])
