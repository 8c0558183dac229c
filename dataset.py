"""Samples and loaders: augmented crops to train on, whole photos to predict, and how images are normalised.

Shapes: N batch, C side of a crop or of a whole image. A row counts the photos of a cache; a position counts
the samples of a TrainingSet.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config
from data.augment import Augment, Sample, chance, cutmix, mosaic, paste_object
from data.cache import Cache, resize_image
from data.coco import IGNORED
from utils.signals import leave_to_parent


class TrainingSet(Dataset):
    """Augmented samples: the given rows of the training cache, then all pseudo-labelled photos, if any.

    The index of a sample is (epoch, position); its random choices depend only on these and the seed. `fill`
    is the colour outside a photo.
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
        self.donors: dict[int, list[int]] = {}  # class -> positions of photos that have it
        for position, row in enumerate(rows):
            for category in cache.coco.photos[row].classes:
                self.donors.setdefault(category, []).append(position)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the image (3, C, C) and mask (C, C), both uint8, and the position of its photo."""
        epoch, position = index
        rng = np.random.default_rng((self.cfg.seed, epoch, position))
        if self.donors and chance(self.cfg.balance, rng):
            position = int(rng.choice(self.donors[int(rng.choice(sorted(self.donors)))]))
        image, mask = self.pixels(position, rng)
        if chance(self.cfg.mosaic, rng):
            image, mask = mosaic([(image, mask), *(self.random_photo(rng) for _ in range(3))], rng)
        if chance(self.cfg.cutmix, rng):
            image, mask = cutmix(image, mask, *self.random_photo(rng), rng)
        if self.donors and chance(self.cfg.copy_paste, rng):
            image, mask = self.paste(image, mask, rng)
        image, mask = self.augment(image, mask, rng)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), position

    def pixels(self, position: int, rng: np.random.Generator) -> Sample:
        """Return a photo and its mask; a soft pseudo-label is ignored as often as its teacher doubts it."""
        cache, row = self.sources[position]
        mask = cache.masks[row]
        if cache.confidence is not None:
            thresholds = rng.integers(0, 255, mask.shape, np.uint8)
            mask = np.where(thresholds < cache.confidence[row], mask, np.uint8(IGNORED))
        return cache.photos[row], mask

    def random_photo(self, rng: np.random.Generator) -> Sample:
        """Draw a training photo."""
        return self.pixels(int(rng.integers(self.clean_size)), rng)

    def paste(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
        """Paste an object of another photo; a class in half as many photos is drawn twice as often."""
        categories = sorted(self.donors)
        weights = np.array([1 / len(self.donors[category]) for category in categories])
        category = int(rng.choice(categories, p=weights / weights.sum()))
        donor = self.pixels(int(rng.choice(self.donors[category])), rng)
        return paste_object(image, mask, *donor, category, rng)

    def name(self, position: int) -> str:
        """Return the file name of a sample's photo."""
        cache, row = self.sources[position]
        return cache.coco.photos[row].file_name


class WholePhotos(Dataset):
    """Whole photos at image_size, for validation and prediction; a sample is (image (3, C, C) uint8, row)."""

    def __init__(self, cache: Cache, rows: np.ndarray, image_size: int) -> None:
        self.cache, self.rows, self.image_size = cache, rows, image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[position])
        image = resize_image(np.array(self.cache.photos[row]), self.image_size)
        return torch.from_numpy(image).permute(2, 0, 1), row


class EpochSampler(Sampler):
    """A batch sampler of (epoch, position): a seeded permutation of an epoch's positions in equal batches.

    Each rank gets its part of the same global batches. The last, smaller batch is dropped unless it is alone.
    """

    def __init__(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.set_epoch(0, range(0))

    def set_epoch(self, epoch: int, positions: range, start: int = 0) -> None:
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
    """Build a DataLoader whose workers stay between epochs and use one core each."""
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # an epoch's start draws nothing from torch's global generator
        **kwargs,
    )


def _start_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)
    leave_to_parent()


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise (N, 3, C, C) uint8 to float32, by the encoder's mean and std of values from 0 to 1."""
    mean_t, std_t = torch.tensor([mean, std], device=images.device).view(2, 1, 3, 1, 1) * 255
    return (images.float() - mean_t) / std_t
