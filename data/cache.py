"""Cache the decoded photos and drawn masks of a split as memory-mapped arrays, made once."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np

from config import Competition, Config
from data.coco import (
    CocoSet,
    Photo,
    draw_mask,
    draw_plane,
    read_coco,
    read_photo,
    scale_truth,
    scored_truth,
)
from data.paths import find_photo
from data.planes import pack_nothing, packed_depth, unpack, write_plane
from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.files import lock, write_text
from utils.progress import progress
from utils.ragged import Ragged, allocate_ragged, map_ragged

CACHE_VERSION = 3  # raise it when photos or masks come out differently
MOST_BANDS = 4  # that cv2 resizes and warps in one go
PIXELS_AT_ONCE = 200_000_000  # of the photos that are decoded at the same time; one needs about 10 bytes


@dataclass(frozen=True)
class Cache:
    """Hold the photos and masks of a split, memory-mapped; the longer side of each is cache_size.

    A mask is (h, w) ids, or the (h, w, 2P) packed planes of classes that may overlap.
    """

    coco: CocoSet
    photos: Ragged  # (h, w, channels) uint8, or uint16 if depth is 16
    masks: Ragged
    confidence: Ragged | None = None  # of pseudo-labels: (h, w), or (h, w, K) if classes may overlap
    annotators: Ragged | None = None  # a mask of each annotator, if photos have several: (n, h, w[, 2P])

    def __len__(self) -> int:
        return len(self.photos)

    def truth(self, row: int) -> np.ndarray:
        """Return the mask of a photo at the scored size, (h, w) ids or (K, h, w) planes."""
        photo, competition, mask = self.coco.photos[row], self.coco.competition, self.masks[row]
        if mask.shape[:2] != photo.size:
            return scored_truth(photo, competition)
        return scale_truth(mask if mask.ndim == 2 else unpack(mask, len(competition.classes)), competition)

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.coco.photos[row].file_name for row in rows]


def open_cache(cfg: Config, split: str) -> Cache:
    """Open the cache of a split ('train' or 'test'); build it if it does not exist. Raises BadInput."""
    return open_set(read_coco(cfg.data_root, split, cfg.competition), cfg)


def open_set(coco: CocoSet, cfg: Config) -> Cache:
    """Open the cache of a set of photos; build it if it does not exist. Raises BadInput.

    Its folder is named by the size and a hash of the annotations, so a changed data set gets a new cache.
    """
    key = hashlib.sha256(f'{CACHE_VERSION} {cfg.cache_size} {coco.fingerprint}'.encode()).hexdigest()[:16]
    folder = cfg.cache_dir / f'{coco.split}-{cfg.cache_size}-{key}'
    if not folder.is_dir():
        with lock(cfg.cache_dir / f'.{folder.name}.lock', f'making the cache of {coco.split}', wait=True):
            if not folder.is_dir():
                build_cache(coco, folder, cfg.cache_size)
    check_photos(coco, folder)
    photo_shapes, mask_shapes = cached_shapes(coco, cfg.cache_size)
    photos = map_ragged(folder / 'photos.npy', photo_shapes, photo_type(cfg.competition))
    annotators = None
    if coco.has_annotators:
        annotators = map_ragged(folder / 'annotators.npy', annotator_shapes(coco, mask_shapes))
    return Cache(coco, photos, map_ragged(folder / 'masks.npy', mask_shapes), annotators=annotators)


def check_photos(coco: CocoSet, folder: Path) -> None:
    """Raise BadInput if a photo was replaced since it was cached; one that was deleted is not needed."""
    try:
        files = json.loads((folder / 'meta.json').read_text())['files']
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f'{folder}: is damaged ({one_line(error)}); remove it to cache it again') from None
    for name, (size, modified, checksum) in files.items():
        path = find_photo(coco.root, name)
        if not path.exists():
            continue
        stat = path.stat()
        if stat.st_size != size or (stat.st_mtime_ns != modified and crc32(path.read_bytes()) != checksum):
            fault = f'is not the photo that was cached ({size:,} bytes, now {stat.st_size:,})'
            raise BadInput(f'{path}: {fault}; remove {folder} to cache it again')


def describe_file(path: Path) -> tuple[int, int, int]:
    """Return the size, the time of modification (ns) and the CRC-32 of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, crc32(path.read_bytes())


def build_cache(coco: CocoSet, folder: Path, side: int) -> None:
    """Decode every photo and draw every mask, the longer side resized to `side`, or none if that is 0;
    `folder` appears only when it is complete.
    """
    partial, count = folder.with_name(f'.{folder.name}.partial'), len(coco.photos)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    needs_statistics = coco.split == 'train' and coco.competition.channels not in (1, 3)
    sums: dict[int, np.ndarray] = {}

    def fill(row: int) -> None:
        photo = coco.photos[row]
        size = photos.shapes[row][:2]
        photos[row] = resize_image(read_photo(coco, photo), size)
        if needs_statistics:
            sums[row] = sum_bands(photos[row])
        masks[row] = draw_cached_mask(coco, photo, size)
        if annotators is not None:
            for number, one in enumerate(photo.by_annotator()):
                annotators[row][number] = draw_cached_mask(coco, one, size)

    try:
        photo_shapes, mask_shapes = cached_shapes(coco, side)
        photos = allocate_ragged(partial / 'photos.npy', photo_type(coco.competition), photo_shapes)
        masks = allocate_ragged(partial / 'masks.npy', np.uint8, mask_shapes)
        annotators = None
        if coco.has_annotators:
            shapes = annotator_shapes(coco, mask_shapes)
            annotators = allocate_ragged(partial / 'annotators.npy', np.uint8, shapes)
        largest = max(photo.height * photo.width for photo in coco.photos)
        with ThreadPoolExecutor(max(1, min(os.cpu_count(), PIXELS_AT_ONCE // largest))) as pool:
            list(progress(pool.map(fill, range(count)), f'cache {coco.split}', 'photo', count))
        photos.flush()
        masks.flush()
        if annotators is not None:
            annotators.flush()
        files = {photo.file_name: describe_file(coco.path(photo)) for photo in coco.photos}
        meta = {'photos': count, 'side': side, 'fingerprint': coco.fingerprint, 'files': files}
        if needs_statistics:
            total = np.sum([sums[row] for row in range(count)], axis=0)
            meta |= describe_bands(total, coco.competition.max_value)
        write_text(partial / 'meta.json', json.dumps(meta))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached_shapes(coco: CocoSet, side: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of the photos and of the masks of a cache whose longer sides are `side`."""
    sizes = [fit_size(photo.size, side) for photo in coco.photos]
    competition = coco.competition
    depth = (packed_depth(len(competition.classes)),) if competition.is_multilabel else ()
    return [(*size, competition.channels) for size in sizes], [(*size, *depth) for size in sizes]


def annotator_shapes(coco: CocoSet, mask_shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the shapes of the annotators' masks of a cache, from those of its masks."""
    counts = (max(1, len(photo.annotators)) for photo in coco.photos)
    return [(count, *shape) for count, shape in zip(counts, mask_shapes, strict=True)]


def photo_type(competition: Competition) -> type:
    """Return the type of the values of cached photos."""
    return np.uint8 if competition.depth == 8 else np.uint16


def sum_bands(photo: np.ndarray) -> np.ndarray:
    """Return the pixels, the sum and the sum of squares of each band: (H, W, C) → (3, C) float64."""
    bands = (photo[..., band].astype(np.float64).ravel() for band in range(photo.shape[2]))
    return np.array([(band.size, band.sum(), band @ band) for band in bands]).T


def describe_bands(sums: np.ndarray, top: int) -> dict[str, list[float]]:
    """Return mean and std of each band, of values from 0 to 1, from the (3, C) sum_bands of all photos."""
    count, total, squares = sums
    mean = total / count
    std = np.sqrt(np.maximum(0, squares / count - mean**2))
    std = np.maximum(std, 1)  # of a band that is the same everywhere: one level
    return {'mean': (mean / top).tolist(), 'std': (std / top).tolist()}


def with_statistics(cfg: Config, cache: Cache) -> Config:
    """Fill in the mean and std of the training photos where a config leaves them open and no encoder has any
    for so many bands.
    """
    if cfg.competition.channels in (1, 3) or (cfg.mean and cfg.std):
        return cfg
    meta = json.loads((Path(cache.photos.array.filename).parent / 'meta.json').read_text())
    values = {key: getattr(cfg, key) or tuple(meta[key]) for key in ('mean', 'std')}
    return cfg.model_copy(update=values)


def fit_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size (h, w) of a photo (H, W) whose longer side becomes `side`; (H, W) if that is 0."""
    if not side:
        return size
    height, width = (max(1, round(side * length / max(size))) for length in size)
    return height, width


def draw_cached_mask(coco: CocoSet, photo: Photo, size: tuple[int, int]) -> np.ndarray:
    """Draw a photo's mask at a size (h, w): (h, w) ids, or (h, w, 2P) packed planes, one after another.

    Where the absence of a class is not known, its plane is IGNORED, and so is the background of ids.
    """
    if not coco.competition.is_multilabel:
        mask = resize_mask(draw_mask(photo), size)
        if coco.unlabelled:
            mask[mask == 0] = IGNORED
        return mask
    packed = pack_nothing(size, len(coco.competition.classes))
    for class_id in {*coco.unlabelled, *(annotation.category_id for annotation in photo.annotations)}:
        plane = resize_mask(draw_plane(photo, class_id), size)
        if class_id in coco.unlabelled:
            plane[plane == 0] = IGNORED
        write_plane(packed, class_id, plane)
    return packed


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, ...) to a size (h, w): area-averaged if it shrinks, else bilinear."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] > height and image.shape[1] > width
    return resize(image, size, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """Resize (H, W, ...) to a size (h, w), as many bands at once as cv2 can; the last axis stays."""
    if image.ndim == 3 and image.shape[2] > MOST_BANDS:
        starts = range(0, image.shape[2], MOST_BANDS)
        parts = (np.ascontiguousarray(image[..., start : start + MOST_BANDS]) for start in starts)
        return np.concatenate([resize(part, size, interpolation) for part in parts], axis=2)
    resized = cv2.resize(image, size[::-1], interpolation=interpolation)
    return resized.reshape(*size, *image.shape[2:])


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) to a size (h, w), nearest neighbour: class ids must not be mixed."""
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
