"""Augment a training sample: crop, flips, colours, albumentations; mix samples: copy-paste, mosaic, CutMix.

    augment = Augment(cfg, fill=(124, 116, 104))
    image, mask = augment(photo, mask, np.random.default_rng((seed, epoch, index)))

Shapes: photo (H, W, C) as cached, its mask (H, W) ids or (H, W, 2P) packed planes. Outside of a photo its
mask is IGNORED, or 0, which is unknown, in packed planes. The standard chain is that of mmsegmentation's
ADE20K configs: RandomResize, RandomCrop(cat_max_ratio), RandomFlip, PhotoMetricDistortion. Only the pixels of
the crop are read and resampled.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from config import Config
from data.cache import MOST_BANDS, fit_size, resize
from data.planes import read_plane
from metrics import IGNORED

if TYPE_CHECKING:
    import albumentations as A

CROP_TRIES = 10  # the last crop is used even if one class fills too much of it
QUARTER_TURNS = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
EDGE = np.ones((3, 3), np.uint8)
PASTE_AREA = 64  # pixels; smaller objects are not pasted
PASTE_SCALES = (0.5, 1.5)
MAX_SCANNED = 4_000_000  # pixels of a mask in which an object is looked for; of more, every second or third

Rng = np.random.Generator
Sample = tuple[np.ndarray, np.ndarray]  # a photo and its mask
Point = tuple[float, float]  # (y, x)
Size = tuple[int, int]  # (h, w)


class Augment:
    """Apply the augmentation of a config; `fill` is the colour outside the photo, a value a band."""

    def __init__(self, cfg: Config, fill: tuple[int, ...]) -> None:
        self.cfg = cfg
        self.fill = fill
        self.heavy = heavy_transforms(cfg, fill)

    def __call__(self, photo: np.ndarray, mask: np.ndarray, rng: Rng) -> Sample:
        """Return an image of crop_size and its mask, contiguous and writable."""
        cfg = self.cfg
        focus = object_pixel(mask, rng) if chance(cfg.crop_balance, rng) else None
        image, mask = scale_and_crop(photo, mask, rng, cfg, self.fill, focus)
        for axis, probability in ((1, cfg.hflip), (0, cfg.vflip)):
            if rng.random() < probability:
                image, mask = flip(image, axis), flip(mask, axis)
        if rng.random() < cfg.rot90:
            turns = 1 + int(rng.integers(3))
            image, mask = turn(image, turns), turn(mask, turns)
        # without a crop or a flip this is still a view of the cache, which is read-only
        image, mask = np.require(image, requirements='CW'), np.require(mask, requirements='CW')
        if rng.random() < cfg.photometric:
            image = photometric_distortion(image, rng, cfg.competition.is_rgb)
        if self.heavy is not None:
            # albumentations' own generator gives the same numbers in every worker
            self.heavy.set_random_seed(int(rng.integers(2**31)))
            if image.shape[2] <= MOST_BANDS:
                out = self.heavy(image=image, mask=mask)
            else:  # albumentations has one fill for all of so many bands, which shines through at the edges
                out = self.heavy(image=image, mask=mask, inside=np.ones(mask.shape[:2], np.uint8))
                out['image'][cv2.erode(out['inside'] % IGNORED, EDGE) == 0] = self.fill
            image, mask = out['image'], out['mask']
        return image, mask


def chance(probability: float, rng: Rng) -> bool:
    """Return True with a probability; draw no number if it is 0."""
    return probability > 0 and rng.random() < probability


def outside(mask: np.ndarray) -> int:
    """Return the value of a mask outside of its photo: IGNORED, or 0 if its planes are packed."""
    return IGNORED if mask.ndim == 2 else 0


def class_pixels(mask: np.ndarray, category: int) -> np.ndarray:
    """Return where a class is, (H, W) bool."""
    return mask == category if mask.ndim == 2 else read_plane(mask, category) == 1


def depth_of(array: np.ndarray) -> int:
    """Return the length of the last axis of (H, W, C); 1 for (H, W)."""
    return array.shape[2] if array.ndim == 3 else 1


def flip(array: np.ndarray, axis: int) -> np.ndarray:
    """Flip (H, W) or (H, W, C): 1 from left to right, 0 upside down."""
    if depth_of(array) > MOST_BANDS:
        return np.flip(array, axis)
    return with_depth(cv2.flip(array, axis), array)


def turn(array: np.ndarray, turns: int) -> np.ndarray:
    """Turn (H, W) or (H, W, C) counterclockwise by so many quarters, 1 to 3."""
    if depth_of(array) > MOST_BANDS:
        return np.rot90(array, turns)
    return with_depth(cv2.rotate(array, QUARTER_TURNS[turns - 1]), array)


def with_depth(result: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return what cv2 made of `source` with its last axis, which cv2 drops if its length is 1."""
    return result.reshape(*result.shape[:2], *source.shape[2:])


def paste_object(sample: Sample, donor: Sample, category: int, rng: Rng, scale: float = 1.0) -> Sample:
    """Paste a connected component of a class from a donor at a random scale and place, mirrored or not.

    Its pixels show the donor, so they get the donor's mask, with all classes that overlap there. `scale` is
    that of the sample relative to the donor. Simple copy-paste, arXiv:2012.07177. Changes nothing if the
    donor has no component of at least PASTE_AREA pixels.
    """
    (photo, mask), (donor_photo, donor_mask) = sample, donor
    component = find_component(class_pixels(donor_mask, category), rng)
    if component is None:
        return photo, mask
    box, shape = component
    (height, width), (box_height, box_width) = mask.shape[:2], shape.shape
    scale = min(rng.uniform(*PASTE_SCALES) * scale, width / box_width, height / box_height)
    size = (max(1, int(box_width * scale)), max(1, int(box_height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = resize(donor_photo[box], size[::-1], interpolation)
    shape, labels = (
        cv2.resize(part, size, interpolation=cv2.INTER_NEAREST) for part in (shape, donor_mask[box])
    )
    if rng.random() < 0.5:
        picture, shape, labels = picture[:, ::-1], shape[:, ::-1], labels[:, ::-1]
    left = int(rng.integers(0, width - size[0] + 1))
    top = int(rng.integers(0, height - size[1] + 1))
    photo, mask = photo.copy(), mask.copy()
    where = slice(top, top + size[1]), slice(left, left + size[0])
    alpha = cv2.GaussianBlur(shape.astype(np.float32), (3, 3), 0)[..., None]  # else the model learns the edge
    photo[where] = (photo[where] * (1 - alpha) + picture * alpha).round().astype(photo.dtype)
    mask[where][shape > 0] = labels[shape > 0]
    return photo, mask


def find_component(pixels: np.ndarray, rng: Rng) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Choose a connected component of at least PASTE_AREA of the pixels that are True; return its box, and
    its (h, w) uint8 shape there; None if there is none.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(pixels.astype(np.uint8))
    large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= PASTE_AREA) + 1
    if not len(large):
        return None
    label = int(rng.choice(large))
    x, y, width, height = (int(v) for v in stats[label, :4])
    box = slice(y, y + height), slice(x, x + width)
    return box, (labels[box] == label).astype(np.uint8)


def mosaic(parts: Sequence[Sample], rng: Rng, fill: Sequence[int]) -> Sample:
    """Fill the quarters around a random point with random crops of four photos (YOLOv4, arXiv:2004.10934).

    The result has the size of the first; a quarter that is larger than its photo shows `fill` beside it.
    """
    photo, mask = (np.empty_like(part) for part in parts[0])
    height, width = mask.shape[:2]
    side = max(height, width)
    y, x = (int(v) for v in rng.integers(side // 4, side - side // 4, 2))
    y, x = y * height // side, x * width // side
    corners = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    for (top, left, bottom, right), (other, other_mask) in zip(corners, parts, strict=True):
        quarter = slice(top, bottom), slice(left, right)
        has = [min(a, b) for a, b in zip(mask[quarter].shape, other_mask.shape[:2], strict=False)]
        from_y, from_x = (
            int(rng.integers(n - part + 1)) for n, part in zip(other_mask.shape, has, strict=False)
        )
        source = slice(from_y, from_y + has[0]), slice(from_x, from_x + has[1])
        if has != [bottom - top, right - left]:
            photo[quarter], mask[quarter] = fill, outside(mask)
        filled = slice(top, top + has[0]), slice(left, left + has[1])
        photo[filled], mask[filled] = other[source], other_mask[source]
    return photo, mask


def cutmix(sample: Sample, other: Sample, rng: Rng) -> Sample:
    """Copy a random rectangle, of the photo's own aspect, of another photo to the same place (CutMix,
    arXiv:1905.04899, with alpha 1), as far as it has that place.
    """
    (photo, mask), (other_photo, other_mask) = sample, other
    sides = mask.shape[:2]
    side, share = max(sides), np.sqrt(rng.random())
    center = [int(v) * length // side for v, length in zip(rng.integers(side, size=2), sides, strict=True)]
    where = []
    for v, length, other_length in zip(center, sides, other_mask.shape, strict=False):
        part = round(length * share)
        where.append(slice(max(0, v - part // 2), min(length, other_length, v + part - part // 2)))
    photo, mask, where = photo.copy(), mask.copy(), tuple(where)
    photo[where], mask[where] = other_photo[where], other_mask[where]
    return photo, mask


def cut_part(sample: Sample, side: int, rng: Rng, category: int | None = None) -> Sample:
    """Cut a random part of at most side x side pixels, with a pixel of a class if that is there."""
    photo, mask = sample
    point = object_pixel(mask, rng, category) if category is not None else None
    where = []
    for axis, length in enumerate(mask.shape[:2]):
        low, high = 0, max(0, length - side)
        if point is not None:
            middle = int(point[axis] * length)
            low, high = max(low, middle - side + 1), min(high, middle)
        start = int(rng.integers(low, high + 1))
        where.append(slice(start, start + side))
    return photo[tuple(where)], mask[tuple(where)]


def object_pixel(mask: np.ndarray, rng: Rng, category: int | None = None) -> Point | None:
    """Pick a random object class, if none is given, and a random pixel (y, x) of it, from 0 to 1; None
    without an object.
    """
    height, width = mask.shape[:2]
    step = math.ceil(math.sqrt(height * width / MAX_SCANNED))
    scanned = mask[::step, ::step]
    if category is None:
        present = present_objects(scanned)
        if not len(present):
            return None
        category = rng.choice(present)
    pixels = np.flatnonzero(class_pixels(scanned, category))
    if not len(pixels):
        return None
    y, x = divmod(int(rng.choice(pixels)), scanned.shape[1])
    return y * step / height, x * step / width


def present_objects(mask: np.ndarray) -> np.ndarray:
    """Return the ids of the classes of objects in a mask."""
    if mask.ndim == 2:
        counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
        return np.flatnonzero(counts[1:]) + 1
    true = np.bitwise_or.reduce(mask[..., : mask.shape[2] // 2], axis=(0, 1))
    return np.flatnonzero(np.unpackbits(true, bitorder='little'))


def scale_and_crop(
    photo: np.ndarray,
    mask: np.ndarray,
    rng: Rng,
    cfg: Config,
    fill: Sequence[int],
    focus: Point | None = None,
) -> Sample:
    """Scale the photo by a random factor of `scale_range` and cut out `crop_size`; unknown outside the photo.

    The position is drawn again while one class fills more than `crop_max_share` of the labelled pixels. The
    crop contains `focus`, if one is given.
    """
    longer = max(photo.shape[:2])
    scaled = fit_size(
        photo.shape[:2], max(1, round((cfg.image_size or longer) * rng.uniform(*cfg.scale_range)))
    )
    crop_size, max_share = cfg.crop_size, cfg.crop_max_share
    room = np.array(scaled) - crop_size
    low, high = np.minimum(0, room), np.maximum(0, room)
    if focus is not None:
        point = (np.array(focus) * scaled).astype(int)
        low, high = np.maximum(low, point - crop_size + 1), np.minimum(high, point)
    for _ in range(CROP_TRIES):
        corner = tuple(int(v) for v in rng.integers(low, high + 1))
        if max_share >= 1 or largest_share(mask[window(mask.shape, corner, crop_size, scaled)]) <= max_share:
            break
    # down to half the size bilinear uses every pixel, and it is six times as fast as INTER_AREA
    interpolation = cv2.INTER_AREA if longer > 2 * max(scaled) else cv2.INTER_LINEAR
    image = resample(photo, corner, crop_size, scaled, interpolation, fill)
    return image, resample(
        mask, corner, crop_size, scaled, cv2.INTER_NEAREST, (outside(mask),) * depth_of(mask)
    )


def window(shape: Sequence[int], corner: Size, crop: int, scaled: Size) -> tuple[slice, ...]:
    """Return the rows and columns of a photo (H, W, ...) that a crop at a corner (y, x) of the scaled one
    shows.
    """

    def span(length: int, start: int, side: int) -> slice:
        first, last = max(start, 0), min(start + crop, side)
        low = min(round(first * length / side), length - 1)
        return slice(low, max(low + 1, round(last * length / side)))

    return tuple(span(*parts) for parts in zip(shape[:2], corner, scaled, strict=True))


def resample(
    source: np.ndarray, corner: Size, crop: int, scaled: Size, interpolation: int, fill: Sequence[int]
) -> np.ndarray:
    """Cut a crop at the corner (y, x) out of `source` as if it had been resized to `scaled` (h, w) first."""
    y, x = corner
    top, left = max(y, 0) - y, max(x, 0) - x
    bottom, right = min(y + crop, scaled[0]) - y, min(x + crop, scaled[1]) - x
    part = source[window(source.shape, corner, crop, scaled)]
    size = (right - left, bottom - top)
    if part.shape[1::-1] != size:
        part = resize(part, size[::-1], interpolation)
    if size == (crop, crop):
        return part
    if source.shape[2:] > (MOST_BANDS,):
        whole = np.empty((crop, crop, *source.shape[2:]), source.dtype)
        whole[...] = fill
        whole[top:bottom, left:right] = part
        return whole
    edges = (top, crop - bottom, left, crop - right)
    return with_depth(cv2.copyMakeBorder(part, *edges, cv2.BORDER_CONSTANT, value=fill), source)


def largest_share(mask: np.ndarray) -> float:
    """Return the most frequent class's share of the labelled pixels, where none at all counts as a class;
    0 if nothing is labelled.
    """
    mask = mask[::4, ::4]
    if mask.ndim == 2:
        counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
        return counts.max() / max(1, counts.sum())
    true, known = np.split(mask.reshape(-1, mask.shape[2]), 2, axis=1)
    known = known.any(1)
    counts = np.unpackbits(true, axis=1, bitorder='little').sum(0, dtype=np.int64)
    nothing = np.count_nonzero(known & ~true.any(1))
    return max(counts.max(), nothing) / max(1, np.count_nonzero(known))


def photometric_distortion(image: np.ndarray, rng: Rng, is_rgb: bool = True) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes before or after the colours (SSD, arXiv:1512.02325, as in mmsegmentation). Bands other than
    8-bit RGB have no hue and no saturation: all get the same brightness and contrast.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if not is_rgb:
        return change_light(image, brightness, contrast)
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


def change_light(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Add a brightness, of 255, to all bands, and multiply them by a contrast."""
    top = np.iinfo(image.dtype).max
    if brightness or contrast != 1:
        values = (image.astype(np.float32) + np.float32(brightness * top / 255)).clip(0, top)
        image = (values * np.float32(contrast)).round().clip(0, top).astype(image.dtype)
    return image


def heavy_transforms(cfg: Config, fill: tuple[int, ...]) -> 'A.Compose | None':
    """Build the albumentations part of the chain; None if the config asks for none of its transforms."""
    if not any((cfg.shift_rotate, cfg.elastic, cfg.blur, cfg.noise, cfg.clahe)):
        return None
    import albumentations as A  # imports torch, which everything else here does without

    many = len(fill) > MOST_BANDS
    border = dict(
        border_mode=cv2.BORDER_CONSTANT,
        fill=0 if many else fill,
        fill_mask=0 if cfg.competition.is_multilabel else IGNORED,
    )
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
    targets = {'inside': 'mask'} if many else None
    return A.Compose([transform for transform in transforms if transform.p > 0], additional_targets=targets)
