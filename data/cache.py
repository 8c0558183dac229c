"""The cache: decoded photos and drawn masks as memory-mapped arrays, made once."""

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

from config import Config
from data.coco import CocoSet, draw_mask, read_coco, read_photo
from submission import downsample_mask
from utils.errors import BadInput, one_line
from utils.files import allocate_array, lock, map_array, write_text
from utils.progress import progress

CACHE_VERSION = 1  # to be raised when what is drawn or decoded changes


@dataclass(frozen=True)
class Cache:
    """The photos of a split at one size, memory-mapped: `photos` (n, S, S, 3) RGB and `masks` (n, S, S),
    both uint8; where the masks are a teacher's, `sure` (n, S, S) may be 255 times its confidence.
    """

    coco: CocoSet
    photos: np.ndarray
    masks: np.ndarray
    sure: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.photos)

    def truth(self, row: int) -> np.ndarray:
        """(256, 256) uint8: the mask that the board scores with."""
        return downsample_mask(self.masks[row])

    def __reduce__(self) -> tuple:
        """A process that is not a fork maps the files again, instead of getting their content."""
        mapped = (self.photos, self.masks, self.sure)
        return _open_mapped, (self.coco, *(None if m is None else m.filename for m in mapped))

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.coco.photos[row].file_name for row in rows]


def _open_mapped(coco: CocoSet, *paths: str | Path | None) -> Cache:
    return Cache(coco, *(None if path is None else np.load(path, mmap_mode='r') for path in paths))


def open_cache(cfg: Config, split: str) -> Cache:
    """The cache of `split` ('train' or 'test'), built where it is not there yet. Raises BadInput.

    Keyed by the content of the annotations and by the size, so that a changed data set is another cache. Two
    processes that ask for it at once build it once: the second waits for the first.
    """
    coco = read_coco(cfg.data_root, split, cfg.classes)
    key = hashlib.sha256(f'{CACHE_VERSION} {cfg.cache_size} {coco.fingerprint}'.encode()).hexdigest()[:16]
    folder = cfg.cache_dir / f'{split}-{cfg.cache_size}-{key}'
    if not folder.is_dir():
        with lock(cfg.cache_dir / f'.{folder.name}.lock', f'making the cache of {split}', wait=True):
            if not folder.is_dir():
                build_cache(coco, folder, cfg.cache_size)
    check_photos(coco, folder)
    shape = (len(coco.photos), cfg.cache_size, cfg.cache_size)
    photos, masks = map_array(folder / 'photos.npy', (*shape, 3)), map_array(folder / 'masks.npy', shape)
    return Cache(coco, photos, masks)


def check_photos(coco: CocoSet, folder: Path) -> None:
    """Raises BadInput where a photo's file is not the one that was decoded: of another size, or, where it was
    written since, of other content. A photo that is gone is not missed.
    """
    try:
        kept = json.loads((folder / 'meta.json').read_text()).get('files', {})
    except (OSError, ValueError) as error:
        raise BadInput(f'{folder}: is damaged ({one_line(error)}); remove it to cache it again') from None
    for photo in coco.photos:
        path = coco.path(photo)
        if photo.file_name not in kept or not path.exists():
            continue
        size, written, checksum = kept[photo.file_name]
        now = path.stat()
        if now.st_size == size and (now.st_mtime_ns == written or crc32(path.read_bytes()) == checksum):
            continue
        raise BadInput(
            f'{path}: is not the photo that was cached ({size:,} bytes, now {now.st_size:,}); '
            f'remove {folder} to cache it again'
        )


def describe_file(path: Path) -> tuple[int, int, int]:
    """Size, time of writing, and checksum of what is in it."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, crc32(path.read_bytes())


def build_cache(coco: CocoSet, folder: Path, side: int) -> None:
    """Decodes every photo and draws every mask at side x side into `folder`, which appears only when it is
    whole.
    """
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    count = len(coco.photos)
    partial.mkdir()

    def fill(row: int) -> None:
        photo = coco.photos[row]
        photos[row] = resize_image(read_photo(coco, photo), side)
        masks[row] = resize_mask(draw_mask(photo), side)

    try:
        photos = allocate_array(partial / 'photos.npy', np.uint8, (count, side, side, 3))
        masks = allocate_array(partial / 'masks.npy', np.uint8, (count, side, side))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = pool.map(fill, range(count))
            for _ in progress(jobs, f'cache {coco.split}', 'photo', count):
                pass
        photos.flush()
        masks.flush()
        files = {photo.file_name: describe_file(coco.path(photo)) for photo in coco.photos}
        meta = {'photos': count, 'side': side, 'fingerprint': coco.fingerprint, 'files': files}
        write_text(partial / 'meta.json', json.dumps(meta))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def resize_image(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) → (side, side, 3); averaged when it shrinks, bilinear when it grows."""
    if image.shape[:2] == (side, side):
        return image
    smooth = cv2.INTER_AREA if min(image.shape[:2]) > side else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=smooth)


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """(H, W) → (side, side); nearest, since ids are never mixed."""
    if mask.shape == (side, side):
        return mask
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
