"""Cache the decoded photos and drawn masks of a split as memory-mapped arrays, made once."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np

from config import Config
from data.coco import (
    CocoSet,
    draw_mask,
    draw_plane,
    read_photo,
    refuse_outside,
    scale_truth,
    scored_truth,
)
from data.index import open_coco
from data.paths import find_photo
from data.planes import pack_nothing, packed_depth, unpack, write_plane
from data.records import Photo, damaged
from metrics import IGNORED
from utils.errors import BadInput
from utils.files import lock, save_array, whole_folder, write_text
from utils.progress import Bar
from utils.ragged import Ragged, Shards, allocate_ragged

CACHE_VERSION = 4  # raise it when photos or masks come out differently, or are kept in other files
SHARD_PHOTOS, SHARD_VALUES = 10_000, 2**33  # limits of a shard: its photos, and the values of their bands
FILES, SUMS = 'files.npy', 'sums.npy'  # of a shard: describe_file of each photo; the total of sum_bands
MOST_BANDS = 4  # that cv2 resizes and warps in one go
PIXELS_AT_ONCE = 200_000_000  # of the photos that are decoded at the same time; one needs about 10 bytes


@dataclass(frozen=True)
class Cache:
    """Hold the photos and masks of a split, memory-mapped; the longer side of each is cache_size.

    A mask is (h, w) ids, or the (h, w, 2P) packed planes of classes that may overlap.
    """

    coco: CocoSet
    photos: Shards  # (h, w, channels) uint8, or uint16 if depth is 16
    masks: Shards | Ragged
    confidence: Ragged | None = None  # of pseudo-labels: (h, w), or (h, w, K) if classes may overlap
    annotators: Shards | None = None  # a mask of each annotator, if photos have several: (n, h, w[, 2P])

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def folder(self) -> Path:
        return self.photos.paths[0].parents[1]

    def truth(self, row: int) -> np.ndarray:
        """Return the mask of a photo at the scored size, (h, w) ids or (K, h, w) planes."""
        photo, competition, mask = self.coco.photos[row], self.coco.competition, self.masks[row]
        if mask.shape[:2] != photo.size:
            return scored_truth(photo, competition)
        return scale_truth(mask if mask.ndim == 2 else unpack(mask, len(competition.classes)), competition)

    def names(self, rows: np.ndarray) -> list[str]:
        names = self.coco.photos.names()
        return [names[row] for row in rows]

    def contents(self, rows: np.ndarray) -> np.ndarray:
        """Return (n, 2) the size and the CRC-32 of the file of each photo, as it was cached."""
        return np.concatenate([np.load(path.with_name(FILES)) for path in self.photos.paths])[rows, ::2]


def open_cache(cfg: Config, split: str) -> Cache:
    """Open the cache of a split ('train' or 'test'); build it if it does not exist. Raises BadInput."""
    return open_set(open_coco(cfg.data_root, split, cfg.competition, cfg.cache_dir), cfg)


def open_set(coco: CocoSet, cfg: Config) -> Cache:
    """Open the cache of a set of photos; build it if it does not exist. Raises BadInput.

    Its folder is named by the size and a hash of the annotations, so a changed data set gets a new cache.
    It has a folder for each shard: some rows' photos and masks, and the sizes and times of their files.
    """
    key = hashlib.sha256(f'{CACHE_VERSION} {cfg.cache_size} {coco.fingerprint}'.encode()).hexdigest()[:16]
    folder = cfg.cache_dir / f'{coco.split}-{cfg.cache_size}-{key}'
    if not folder.is_dir():
        with lock(cfg.cache_dir / f'.{folder.name}.lock', f'making the cache of {coco.split}', wait=True):
            if not folder.is_dir():
                build_cache(coco, folder, cfg.cache_size)
    try:
        starts = json.loads((folder / 'meta.json').read_text())['starts']
        files = np.concatenate([np.load(path) for path in parts_of(folder, starts, FILES)])
        files = files.reshape(len(coco.photos), 3)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, error) from None
    check_photos(coco, folder, files)
    shapes, types = cached_shapes(coco, cfg.cache_size), cached_types(coco)
    arrays = {k: Shards(parts_of(folder, starts, f'{k}.npy'), starts, shapes[k], types[k]) for k in shapes}
    try:
        for array, number in product(arrays.values(), range(len(starts))):
            array.shard(number)  # a damaged file ends the run here
    except BadInput as error:
        raise damaged(folder, error) from None
    return Cache(coco, **arrays)


def parts_of(folder: Path, starts: Sequence[int], name: str) -> list[Path]:
    """Return where the files of a name are, one of each shard."""
    return [folder / f'{number:05d}' / name for number in range(len(starts))]


def check_photos(coco: CocoSet, folder: Path, files: np.ndarray) -> None:
    """Raise BadInput if a photo was replaced since it was cached, by the (N, 3) describe_file of all photos;
    one that was deleted is not needed.
    """
    for name, (size, modified, checksum) in zip(coco.photos.names(), files.tolist(), strict=True):
        with suppress(OSError):  # first in the fast way, which finds most
            stat = os.stat(f'{coco.root}/{name}')  # noqa: PTH116
            if (stat.st_size, stat.st_mtime_ns) == (size, modified):
                continue
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

    Keeps the shards that a build has finished before it was killed or met a bad photo. Several machines may
    build at once, where a lock holds on one alone: the first to finish names a folder. Raises BadInput.
    """
    partial, count = folder.with_name(f'.{folder.name}.partial'), len(coco.photos)
    shapes = cached_shapes(coco, side)
    starts = split_shards(shapes['photos'])
    rows = [range(*pair) for pair in pairwise([*starts, count])]
    shards = {partial / f'{number:05d}': part for number, part in enumerate(rows)}
    done = sum(len(part) for shard, part in shards.items() if shard.is_dir())
    try:
        partial.mkdir(exist_ok=True)
        with Bar(total=count, initial=done, desc=f'cache {coco.split}', unit='photo') as bar:
            for shard, part in shards.items():
                if not shard.is_dir():
                    of_part = {name: every[part.start : part.stop] for name, every in shapes.items()}
                    build_shard(coco, shard, part, of_part, bar)
        meta = {'photos': count, 'side': side, 'fingerprint': coco.fingerprint, 'starts': starts}
        if needs_statistics(coco):
            total = np.sum([np.load(path) for path in parts_of(partial, starts, SUMS)], axis=0)
            meta |= describe_bands(total, coco.competition.max_value)
        write_text(partial / 'meta.json', json.dumps(meta))
        partial.rename(folder)
        for left in folder.glob('.*.partial'):  # shards that another machine has begun
            shutil.rmtree(left, ignore_errors=True)
    except (OSError, BadInput):
        if not folder.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        with suppress(OSError):
            partial.rmdir()  # unless it has a finished shard


def build_shard(
    coco: CocoSet, folder: Path, rows: range, shapes: dict[str, list[tuple[int, ...]]], bar: Bar
) -> None:
    """Cache the photos of some rows in arrays of their cached_shapes; `folder` appears only when it is
    complete. Raises BadInput.
    """
    types = cached_types(coco)
    files, sums = np.zeros((len(rows), 3), np.int64), np.zeros((len(rows), 3, coco.competition.channels))
    resolved: dict[Path, Path] = {}

    def fill(position: int) -> None:
        photo, size = coco.photos[rows[position]], shapes['masks'][position][:2]
        refuse_outside(coco.root, coco.files[0], photo.file_name, resolved)
        pixels = resize_image(read_photo(coco, photo), size)
        arrays['photos'][position] = pixels
        if needs_statistics(coco):
            sums[position] = sum_bands(pixels)
        arrays['masks'][position] = draw_cached_mask(coco, photo, size)
        if 'annotators' in arrays:
            for number, one in enumerate(photo.by_annotator()):
                arrays['annotators'][position][number] = draw_cached_mask(coco, one, size)
        files[position] = describe_file(coco.path(photo))

    with whole_folder(folder) as partial:
        arrays = {k: allocate_ragged(partial / f'{k}.npy', types[k], shapes[k]) for k in shapes}
        largest = max(prod(coco.photos[row].size) for row in rows)
        with ThreadPoolExecutor(max(1, min(os.cpu_count(), PIXELS_AT_ONCE // largest))) as pool:
            for _ in pool.map(fill, range(len(rows))):
                bar.update()
        for array in arrays.values():
            array.flush()
        save_array(partial / FILES, files)
        if needs_statistics(coco):
            save_array(partial / SUMS, sums.sum(axis=0))


def split_shards(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the first row of each shard, of photos of these shapes."""
    starts, values = [0], 0
    for row, shape in enumerate(shapes):
        values += prod(shape)
        if (values > SHARD_VALUES and row > starts[-1]) or row - starts[-1] == SHARD_PHOTOS:
            starts.append(row)
            values = prod(shape)
    return starts


def cached_shapes(coco: CocoSet, side: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the arrays of a cache whose longer sides are `side`: photos, masks, and annotators
    if photos have several.
    """
    competition = coco.competition
    depth = (packed_depth(len(competition.classes)),) if competition.is_multilabel else ()
    fitted = {size: fit_size(size, side) for size in {*coco.photos.sizes()}}
    sizes = [fitted[size] for size in coco.photos.sizes()]
    shapes = {
        'photos': [(*size, competition.channels) for size in sizes],
        'masks': [(*size, *depth) for size in sizes],
    }
    if coco.has_annotators:
        counts = zip(coco.photos.annotator_counts(), shapes['masks'], strict=True)
        shapes['annotators'] = [(max(1, count), *shape) for count, shape in counts]
    return shapes


def cached_types(coco: CocoSet) -> dict[str, type]:
    """Return the types of the values of a cache's arrays."""
    deep = coco.competition.depth == 16
    return {'photos': np.uint16 if deep else np.uint8, 'masks': np.uint8, 'annotators': np.uint8}


def needs_statistics(coco: CocoSet) -> bool:
    """Tell whether a cache keeps the mean and std of its photos: no encoder has them for so many bands."""
    return coco.split == 'train' and coco.competition.channels not in (1, 3)


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
    meta = json.loads((cache.folder / 'meta.json').read_text())
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
