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

from config import Config
from data.coco import CocoSet, draw_mask, read_coco, read_photo
from data.paths import find_photo
from submission import downsample_mask
from utils.errors import BadInput, one_line
from utils.files import allocate_array, lock, map_array, write_text
from utils.progress import progress

CACHE_VERSION = 2  # raise it when photos or masks come out differently


@dataclass(frozen=True)
class Cache:
    """Hold the photos and masks of a split at one size S, memory-mapped uint8."""

    coco: CocoSet
    photos: np.ndarray  # (n, S, S, 3) RGB
    masks: np.ndarray  # (n, S, S)
    confidence: np.ndarray | None = None  # (n, S, S) of pseudo-labels

    def __len__(self) -> int:
        return len(self.photos)

    def truth(self, row: int) -> np.ndarray:
        """Return the mask of a photo at the scored size, (256, 256) uint8."""
        return downsample_mask(self.masks[row])

    def __reduce__(self) -> tuple:
        """Pickle the file names: a spawned process maps the files again instead of receiving them."""
        arrays = (self.photos, self.masks, self.confidence)
        return _open_mapped, (self.coco, *(None if array is None else array.filename for array in arrays))

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.coco.photos[row].file_name for row in rows]


def _open_mapped(coco: CocoSet, *paths: str | Path | None) -> Cache:
    return Cache(coco, *(None if path is None else np.load(path, mmap_mode='r') for path in paths))


def open_cache(cfg: Config, split: str) -> Cache:
    """Open the cache of a split ('train' or 'test'); build it if it does not exist. Raises BadInput.

    Its folder is named by the size and a hash of the annotations, so a changed data set gets a new cache.
    """
    coco = read_coco(cfg.data_root, split, cfg.competition)
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
    """Decode every photo and draw every mask at side x side; `folder` appears only when it is complete."""
    partial, count = folder.with_name(f'.{folder.name}.partial'), len(coco.photos)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    def fill(row: int) -> None:
        photo = coco.photos[row]
        photos[row] = resize_image(read_photo(coco, photo), side)
        masks[row] = resize_mask(draw_mask(photo), side)

    try:
        photos = allocate_array(partial / 'photos.npy', np.uint8, (count, side, side, 3))
        masks = allocate_array(partial / 'masks.npy', np.uint8, (count, side, side))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(progress(pool.map(fill, range(count)), f'cache {coco.split}', 'photo', count))
        photos.flush()
        masks.flush()
        files = {photo.file_name: describe_file(coco.path(photo)) for photo in coco.photos}
        meta = {'photos': count, 'side': side, 'fingerprint': coco.fingerprint, 'files': files}
        write_text(partial / 'meta.json', json.dumps(meta))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def resize_image(image: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W, 3) to (side, side, 3): area-averaged if it shrinks, else bilinear."""
    if image.shape[:2] == (side, side):
        return image
    interpolation = cv2.INTER_AREA if min(image.shape[:2]) > side else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=interpolation)


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W) to (side, side), nearest neighbour: class ids must not be mixed."""
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
