"""Samples and loaders: augmented crops to train on, whole photos to predict, and how images are normalised.

Shapes: N batch, C channels, S side of a crop, H W a whole image, K classes, 2P bytes of a pixel's packed
planes (data/planes.py). A row counts the photos of a cache; a position counts the samples of a TrainingSet.
"""

import atexit
import math
import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from data.augment import Augment, Sample, chance, cut_part, cutmix, mosaic, paste_object
from data.cache import Cache, fit_size, resize_image, resize_mask
from data.coco import IGNORED
from data.extra import Extra
from networks.layers import to_device
from utils.errors import BadInput
from utils.signals import leave_to_parent

# open files: of the process besides those of workers; of a worker, with the tensors on their way from it
FILES_OPEN, FILES_OF_WORKER = 16, 10


class TrainingSet(Dataset):
    """Augmented samples: the given rows of the training cache, then all pseudo-labelled photos, if any, then
    the photos of other data roots.

    The index of a sample is (epoch, position); its random choices depend only on these and the seed. `fill`
    is the colour outside a photo.
    """

    def __init__(
        self,
        cfg: Config,
        cache: Cache,
        rows: np.ndarray,
        fill: tuple[int, ...],
        pseudo: Cache | None = None,
        extra: Sequence[Extra] = (),
    ) -> None:
        self.cfg, self.fill = cfg, fill
        self.augment = Augment(cfg, fill)
        self.sources = [(cache, int(row)) for row in rows]
        if pseudo is not None:
            self.sources += [(pseudo, row) for row in range(len(pseudo))]
        self.clean_size = len(rows)
        self.own_size = len(self.sources)
        self.extra = [ExtraSamples(one, self.sources) for one in extra]
        self.max_side = math.ceil(cfg.crop_size / cfg.scale_range[0])  # of what a crop shows, at scale 1
        self.donors = find_donors(cache, rows)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the image (C, S, S) and its mask, (S, S) or packed (S, S, 2P), both of crop_size S, and the
        position of its photo.
        """
        epoch, position = index
        rng = np.random.default_rng((self.cfg.seed, epoch, position))
        donors = self.donors_beside(position)
        if donors and chance(self.cfg.balance, rng):
            position = int(rng.choice(donors[int(rng.choice(sorted(donors)))]))
        sample = self.mix(self.pixels(position, rng), rng)
        image, mask = self.augment(*sample, rng)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), position

    def donors_beside(self, position: int) -> dict[int, list[int]]:
        """Return the photos with each class that are from the same data root as a photo."""
        return next((one.donors for one in self.extra if position in one.positions), self.donors)

    def extra_positions(self, epoch: int, others: int) -> np.ndarray:
        """Draw the positions from other data roots, beside so many others: all photos of a root come before
        one of them comes again.
        """
        total = others / (1 - sum(one.share for one in self.extra))
        drawn = [one.draw(self.cfg.seed, epoch, round(total * one.share)) for one in self.extra]
        return np.concatenate(drawn) if drawn else np.zeros(0, int)

    def pixels(self, position: int, rng: np.random.Generator) -> Sample:
        """Return a photo and its mask: of several annotators' masks one at random, whose expected cross
        entropy is that of their mean (arXiv:2202.07550 compares both). A soft pseudo-label is ignored as
        often as its teacher doubts it.
        """
        cache, row = self.sources[position]
        mask = cache.masks[row]
        if cache.annotators is not None:
            mask = cache.annotators[row][rng.integers(len(cache.annotators[row]))]
        if cache.confidence is not None:
            confidence = cache.confidence[row]
            mask = keep_pixels(mask, rng.integers(0, 255, confidence.shape, np.uint8) < confidence)
        return cache.photos[row], mask

    def mix(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Mix a sample with other training photos, by mosaic, CutMix and copy-paste, each as often as the
        config says.
        """
        cfg = self.cfg
        if chance(cfg.mosaic, rng):
            sample = self.cut(sample, rng)
            parts = [sample, *(self.random_photo(sample, rng) for _ in range(3))]
            sample = mosaic(parts, rng, self.fill)
        if chance(cfg.cutmix, rng):
            sample = self.cut(sample, rng)
            sample = cutmix(sample, self.random_photo(sample, rng), rng)
        if self.donors and chance(cfg.copy_paste, rng):
            sample = self.paste(self.cut(sample, rng), rng)
        return sample

    def cut(self, sample: Sample, rng: np.random.Generator, category: int | None = None) -> Sample:
        """Cut a random part out of a photo that is larger than any crop, so that less of it is copied; with
        an object of a class, if one is given. A photo that is scaled by its own size stays whole.
        """
        if self.cfg.image_size or max(sample[1].shape[:2]) <= self.max_side:
            return sample
        return cut_part(sample, self.max_side, rng, category)

    def random_photo(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Draw a training photo, at the scale of a sample."""
        photo, mask = self.cut(self.pixels(int(rng.integers(self.clean_size)), rng), rng)
        if self.cfg.image_size:
            size = fit_size(mask.shape[:2], max(sample[1].shape[:2]))
            photo, mask = resize_image(photo, size), resize_mask(mask, size)
        return photo, mask

    def paste(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Paste an object of another photo; a class in half as many photos is drawn twice as often."""
        categories = sorted(self.donors)
        weights = np.array([1 / len(self.donors[category]) for category in categories])
        category = int(rng.choice(categories, p=weights / weights.sum()))
        donor = self.cut(self.pixels(int(rng.choice(self.donors[category])), rng), rng, category)
        sides = [max(mask.shape[:2]) for _, mask in (sample, donor)]
        scale = sides[0] / sides[1] if self.cfg.image_size else 1.0
        return paste_object(sample, donor, category, rng, scale)

    def name(self, position: int) -> str:
        """Return the file name of a sample's photo."""
        cache, row = self.sources[position]
        return cache.coco.photos[row].file_name


def find_donors(cache: Cache, rows: np.ndarray, first: int = 0) -> dict[int, list[int]]:
    """Return the positions of the rows, counted from `first`, whose photos have each class."""
    donors: dict[int, list[int]] = {}
    classes = cache.coco.photos.classes()
    for position, row in enumerate(rows, first):
        for category in classes[row]:
            donors.setdefault(category, []).append(position)
    return donors


class ExtraSamples:
    """The samples of one other data root, which are added to those of a TrainingSet."""

    def __init__(self, extra: Extra, sources: list[tuple[Cache, int]]) -> None:
        self.share, first = extra.share, len(sources)
        sources += [(extra.cache, int(row)) for row in extra.rows]
        self.positions = range(first, len(sources))
        self.donors = find_donors(extra.cache, extra.rows, first)

    def draw(self, seed: int, epoch: int, count: int) -> np.ndarray:
        """Draw so many positions of an epoch, at least one."""
        rng = np.random.default_rng((seed, epoch, self.positions.start, 1))
        rounds = -(-max(1, count) // len(self.positions))
        return np.concatenate([rng.permutation(self.positions) for _ in range(rounds)])[: max(1, count)]


def keep_pixels(mask: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Ignore the pixels of a mask that are not kept, (H, W) bool; of packed planes by class, (H, W, K)."""
    if mask.ndim == 2:
        return np.where(kept, mask, np.uint8(IGNORED))
    true, known = np.split(mask, 2, axis=2)
    return np.concatenate([true, known & np.packbits(kept, axis=2, bitorder='little')], axis=2)


class WholePhotos(Dataset):
    """Whole photos at image_size, for validation and prediction; a sample is (image (C, H, W), row)."""

    def __init__(self, cache: Cache, rows: np.ndarray, image_size: int) -> None:
        self.cache, self.rows, self.image_size = cache, rows, image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[position])
        photo = np.array(self.cache.photos[row])
        image = resize_image(photo, fit_size(photo.shape[:2], self.image_size))
        return torch.from_numpy(image).permute(2, 0, 1), row


class EpochSampler(Sampler):
    """A batch sampler of (epoch, position): a seeded permutation of an epoch's positions in equal batches.

    Each rank gets its part of the same global batches. The last, smaller batch is dropped unless it is alone.
    """

    def __init__(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.set_epoch(0, range(0))

    def set_epoch(self, epoch: int, positions: Sequence[int], start: int = 0) -> None:
        """Choose the epoch and its positions; a run that is resumed within an epoch skips `start` batches."""
        self.epoch, self.positions, self.start = epoch, positions, start

    def __len__(self) -> int:
        """Count the batches of the whole epoch, the skipped ones included."""
        return batches_per_epoch(len(self.positions), self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.positions)
        for number in range(self.start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, int(position)) for position in batch[self.rank :: self.world]]


def batches_per_epoch(size: int, batch_size: int) -> int:
    """Count the full batches of `size` samples; at least one."""
    return max(1, size // batch_size)


def make_loader(dataset: Dataset, workers: int, **kwargs) -> DataLoader:
    """Build a DataLoader whose workers stay between epochs and use one core each. Raises BadInput if too few
    files may be open for them, or they could share no memory.
    """
    if workers:
        allow_files(FILES_OPEN + FILES_OF_WORKER * workers, workers)
        require_semaphores(workers)
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # an epoch's start draws nothing from torch's global generator
        **kwargs,
    )


def allow_files(needed: int, workers: int) -> None:
    """Raise the limit of open files as far as one may. Raises BadInput if that is not enough: a worker that
    cannot open one more would be waited for without end.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed += len(os.listdir('/dev/fd'))  # noqa: PTH208 - what is open already
    if most != resource.RLIM_INFINITY and most < needed:
        fault = f'{most} open files are allowed, and workers={workers} may need {needed}'
        raise BadInput(f'ulimit -n: {fault}; raise it to 65536, or set workers=0')


def require_semaphores(workers: int) -> None:
    """Raise BadInput if processes cannot share semaphores, as where /dev/shm is missing or full."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        fault = f'workers={workers} share memory in /dev/shm, which cannot be used: {error.strerror}'
        raise BadInput(f'{fault}; mount it (docker run --shm-size=8g), or set workers=0') from None


@atexit.register
def _end_workers() -> None:
    """End the workers that an error has left: they do not heed the first SIGTERM (leave_to_parent), and
    multiprocessing, which waits for them afterwards, sends one.
    """
    for worker in multiprocessing.active_children():
        worker.terminate()


def _start_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)
    leave_to_parent()


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalise (N, C, H, W) uint8 or uint16 to float32, by the mean and std of values from 0 to 1."""
    top = 65535 if images.dtype == torch.uint16 else 255
    mean_t, std_t = (to_device(values, images.device).view(-1, 1, 1) * top for values in (mean, std))
    return (images.float() - mean_t) / std_t


def unpack_masks(masks: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Unpack the planes of a batch, (N, H, W, 2P) uint8 → (N, K, H, W) of 0, 1, IGNORED; keep ids."""
    if masks.dim() == 3:
        return masks
    depth, planes = masks.shape[-1] // 2, []
    for k in range(num_classes):
        true, known = (masks[..., first + k // 8] >> (k % 8) & 1 for first in (0, depth))
        planes.append(true.masked_fill(known == 0, IGNORED))  # torch.where would copy the number to a GPU
    return torch.stack(planes, dim=1)
