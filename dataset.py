"""Pixels: the cache of decoded photos and drawn masks, folds, samples, loaders, normalisation.

    cache = open_cache(cfg, 'train')                  # built once, memory-mapped afterwards
    folds = read_folds(cfg, cache)                    # (n,) fold of each photo
    train_rows, valid_rows = split_fold(folds, 0)

Shapes: n photos of the cache, S its side, C a crop's or an image's side, N batch. A row is a photo's place
in the cache.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader, Dataset, Sampler

from config import BadInput, Config, one_line
from data.augment import Augment, Sample, cutmix, happens, mosaic, paste_object
from data.coco import IGNORED, CocoSet, board_truth, draw_mask, read_coco, read_photo
from utils.files import allocated, hold, map_array, write_text
from utils.progress import progress
from utils.signals import leave_to_parent

CACHE_VERSION = 1  # to be raised when what is drawn or decoded changes
DUPLICATE_CORRELATION = 0.985  # of two photos' thumbnails; from it on they are taken for the same scene
THUMBNAIL = 24


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
        return board_truth(self.masks[row])

    def __reduce__(self) -> tuple:
        """A process that is not a fork maps the files again, instead of getting their content."""
        mapped = (self.photos, self.masks, self.sure)
        return _open_mapped, (self.coco, *(None if m is None else m.filename for m in mapped))

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.coco.photos[row].file_name for row in rows]


def _open_mapped(coco: CocoSet, *paths: str | Path | None) -> Cache:
    return Cache(coco, *(None if path is None else np.load(path, mmap_mode='r') for path in paths))


# --- the cache


def open_cache(cfg: Config, split: str) -> Cache:
    """The cache of `split` ('train' or 'test'), built where it is not there yet. Raises BadInput.

    Keyed by the content of the annotations and by the size, so that a changed data set is another cache. Two
    processes that ask for it at once build it once: the second waits for the first.
    """
    coco = read_coco(cfg.data_root, split, cfg.classes)
    key = hashlib.sha256(f'{CACHE_VERSION} {cfg.cache_size} {coco.fingerprint}'.encode()).hexdigest()[:16]
    folder = cfg.cache_dir / f'{split}-{cfg.cache_size}-{key}'
    if not folder.is_dir():
        with hold(cfg.cache_dir / f'.{folder.name}.lock', f'making the cache of {split}', wait=True):
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
        photos = allocated(partial / 'photos.npy', np.uint8, (count, side, side, 3))
        masks = allocated(partial / 'masks.npy', np.uint8, (count, side, side))
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


# --- folds


def folds_path(cfg: Config) -> Path:
    return cfg.folds_csv or cfg.cache_dir / 'folds.csv'


def read_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """(n,) int64, the fold of each photo of the training cache. Made once where folds.csv is not there.
    Raises BadInput.
    """
    path = folds_path(cfg)
    if not path.exists():
        if cfg.folds_csv is not None:
            raise BadInput(f'{path}: no such file (folds_csv)')
        with hold(cfg.cache_dir / '.folds.lock', 'assigning folds', wait=True):
            if not path.exists():
                write_folds(path, cache, make_folds(cfg, cache))
    try:
        rows = list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))
        found = {row['file_name']: int(row['fold']) for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of image_id,file_name,fold: {one_line(error)}') from None
    names = [photo.file_name for photo in cache.coco.photos]
    if len(rows) != len(found) or set(found) != set(names):
        missing = next((name for name in names if name not in found), None)
        what = (
            f'lacks {missing!r}' if missing else 'lists images that the data set does not have, or one twice'
        )
        raise BadInput(
            f'{path}: is not of the data set in {cfg.data_root}: it {what}; use another cache_dir '
            'or folds_csv'
        )
    folds = np.array([found[name] for name in names])
    if set(folds.tolist()) != set(range(cfg.folds)):
        raise BadInput(
            f'{path}: has the folds {sorted(set(folds.tolist()))}, but the config key folds is {cfg.folds}'
        )
    return folds


def write_folds(path: Path, cache: Cache, folds: np.ndarray) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image_id', 'file_name', 'fold'])
    writer.writerows(
        (photo.image_id, photo.file_name, fold) for photo, fold in zip(cache.coco.photos, folds, strict=True)
    )
    write_text(path, text.getvalue())


def make_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """(n,) folds: stratified over the classes that are present in each photo, near-duplicates together,
    seeded. Raises BadInput where there are fewer scenes than folds.
    """
    labels = np.zeros((len(cache), len(cfg.classes)), bool)
    for row, photo in enumerate(cache.coco.photos):
        labels[row, list(photo.classes)] = True
    groups = near_duplicates(np.stack([thumbnail(photo) for photo in cache.photos]))
    if groups.max() + 1 < cfg.folds:
        raise BadInput(
            f'{cfg.data_root}: {len(cache)} photos of {groups.max() + 1} scenes cannot be {cfg.folds} folds'
        )
    return stratify(labels, groups, cfg.folds, cfg.seed)


def stratify(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,) folds for (n, K) labels, each group whole: iterative stratification (Sechidis et al., ECML PKDD
    2011).

    The rarest label that is left goes first, its largest groups first, each into the fold that still wants
    it most.
    """
    rng = np.random.default_rng(seed)
    members = np.zeros((groups.max() + 1, labels.shape[1] + 1))
    np.add.at(
        members, groups, np.hstack([labels, np.ones((len(labels), 1))])
    )  # photos with each label; photos
    wanted = np.tile(members.sum(0) / folds, (folds, 1))
    fold_of = np.full(len(members), -1)
    order = rng.permutation(len(members))
    while (left := order[fold_of[order] < 0]).size:
        remaining = members[left, :-1].sum(0)
        if remaining.any():
            label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
            left = left[members[left, label] > 0]
        else:
            label = -1
        for group in left[np.argsort(-members[left, label], kind='stable')]:
            ties = rng.random(folds)
            best = max(range(folds), key=lambda k: (wanted[k, label], wanted[k, -1], ties[k]))
            fold_of[group] = best
            wanted[best] -= members[group]
    return fold_of[groups]


def thumbnail(photo: np.ndarray) -> np.ndarray:
    """An (H, W, 3) photo as one vector, of its 24x24 picture, of mean 0 and length 1: the same, but for
    rounding, whether taken from the photo or from its picture in a cache.
    """
    small = cv2.resize(photo, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def near_duplicates(thumbnails: np.ndarray) -> np.ndarray:
    """(n,) group of each thumbnail: photos whose thumbnails correlate are of one scene, transitively."""
    return connected_components(thumbnails @ thumbnails.T > DUPLICATE_CORRELATION, directed=False)[1]


def split_fold(folds: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those to validate on; fold -1 trains on all of them and validates on none.
    Raises BadInput.
    """
    if not -1 <= fold <= folds.max():
        raise BadInput(
            f'--fold {fold}: found no such fold; there are 0 to {folds.max()}, and -1 to train on everything'
        )
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)


# --- samples


def held_out_hash(names: list[str]) -> str | None:
    """What a checkpoint keeps of the photos whose labels it never saw: a hash of their names, or None."""
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest() if names else None


class TrainingSet(Dataset):
    """Augmented samples: first the rows of the training cache, then pseudo-labelled photos of the test
    cache, if there are any.

    A key is (epoch, position), so that a sample's randomness depends on seed, epoch and position alone,
    whichever worker makes it.
    """

    def __init__(
        self,
        cfg: Config,
        cache: Cache,
        rows: np.ndarray,
        fill: tuple[int, int, int],
        pseudo: Cache | None = None,
    ) -> None:
        self.cfg = cfg
        self.augment = Augment(cfg, fill)
        self.sources = [(cache, int(row)) for row in rows]
        if pseudo is not None:
            self.sources += [(pseudo, row) for row in range(len(pseudo))]
        self.clean_size = len(rows)
        self.donors: dict[int, list[int]] = {}  # rows with an object of each class
        self.places = {int(row): position for position, row in enumerate(rows)}
        for row in rows:
            for category in cache.coco.photos[row].classes:
                self.donors.setdefault(category, []).append(int(row))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """image (3, C, C) and mask (C, C), both uint8, and the position."""
        epoch, position = key
        rng = np.random.default_rng((self.cfg.seed, epoch, position))
        if self.donors and happens(self.cfg.balance, rng):
            position = self.places[self.row_with(int(rng.choice(sorted(self.donors))), rng)]
        image, mask = self.pixels(position, rng)
        if happens(self.cfg.mosaic, rng):
            image, mask = mosaic([(image, mask), *(self.pixels(self.other(rng), rng) for _ in range(3))], rng)
        if happens(self.cfg.cutmix, rng):
            image, mask = cutmix(image, mask, *self.pixels(self.other(rng), rng), rng)
        if self.donors and happens(self.cfg.copy_paste, rng):
            image, mask = self.paste(image, mask, rng)
        image, mask = self.augment(image, mask, rng)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), position

    def pixels(self, position: int, rng: np.random.Generator) -> Sample:
        """A photo and its mask; of a teacher's soft one each pixel by the chance of its confidence."""
        cache, row = self.sources[position]
        mask = cache.masks[row]
        if cache.sure is not None:
            drawn = rng.integers(0, 255, mask.shape, np.uint8)
            mask = np.where(drawn < cache.sure[row], mask, np.uint8(IGNORED))
        return cache.photos[row], mask

    def other(self, rng: np.random.Generator) -> int:
        """The position of a random training photo."""
        return int(rng.integers(self.clean_size))

    def row_with(self, category: int, rng: np.random.Generator) -> int:
        """The row of a random training photo that has an object of the class."""
        return int(rng.choice(self.donors[category]))

    def paste(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
        """An object of a random training photo in it; a class in half as many photos comes twice as often."""
        categories = sorted(self.donors)
        chances = np.array([1 / len(self.donors[category]) for category in categories])
        category = int(rng.choice(categories, p=chances / chances.sum()))
        donor = self.pixels(self.places[self.row_with(category, rng)], rng)
        return paste_object(image, mask, *donor, category, rng)

    def name(self, position: int) -> str:
        cache, row = self.sources[position]
        return cache.coco.photos[row].file_name


class WholePhotos(Dataset):
    """Whole photos at image_size, for validation and prediction: (image (3, C, C) uint8, row)."""

    def __init__(self, cache: Cache, rows: np.ndarray, image_size: int) -> None:
        self.cache, self.rows, self.image_size = cache, rows, image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[position])
        image = resize_image(np.array(self.cache.photos[row]), self.image_size)
        return torch.from_numpy(image).permute(2, 0, 1), row


class EpochBatches(Sampler):
    """Batches of (epoch, position) for one rank: a seeded permutation of `positions`, cut into equal batches.

    Every rank takes its part of the same global batches, so that the samples of a step do not depend on how
    many ranks share it. The last, smaller batch is left out, unless it is the only one. `epoch`,
    `positions` and `start`, how many batches of the epoch are done already, are set before each epoch; its
    length is that of a whole epoch.
    """

    def __init__(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.epoch, self.positions, self.start = 0, range(0), 0

    def __len__(self) -> int:
        return steps_per_epoch(len(self.positions), self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.positions)
        for step in range(self.start, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(position)) for position in batch[self.rank :: self.world]]


def steps_per_epoch(size: int, batch_size: int) -> int:
    return max(1, size // batch_size)


def make_loader(dataset: Dataset, workers: int, **kwargs) -> DataLoader:
    """A DataLoader whose workers live on between epochs and leave the cores to each other."""
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: a new epoch takes nothing from the model's random numbers
        **kwargs,
    )


def _start_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)
    leave_to_parent()


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(N, 3, C, C) uint8 on any device → float32, by the encoder's own mean and std (of values from 0 to
    1).
    """
    shape = (1, 3, 1, 1)
    mean_t = torch.tensor(mean, device=images.device).view(shape) * 255
    std_t = torch.tensor(std, device=images.device).view(shape) * 255
    return (images.float() - mean_t) / std_t
