"""Pixels: the cache of decoded photos and drawn masks, folds, samples, loaders, normalisation.

    cache = open_cache(cfg, 'train')                  # built once, memory-mapped afterwards
    folds = read_folds(cfg, cache)                    # (n,) fold of each photo
    train_rows, valid_rows = split_fold(folds, 0)

Shapes: n photos of the cache, S its side, C a crop's or an image's side, N batch. A row is a photo's place
in the cache.
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

# --- the cache


# --- folds


# --- samples


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
        if self.donors and chance(self.cfg.balance, rng):
            position = self.places[self.row_with(int(rng.choice(sorted(self.donors))), rng)]
        image, mask = self.pixels(position, rng)
        if chance(self.cfg.mosaic, rng):
            image, mask = mosaic([(image, mask), *(self.pixels(self.other(rng), rng) for _ in range(3))], rng)
        if chance(self.cfg.cutmix, rng):
            image, mask = cutmix(image, mask, *self.pixels(self.other(rng), rng), rng)
        if self.donors and chance(self.cfg.copy_paste, rng):
            image, mask = self.paste(image, mask, rng)
        image, mask = self.augment(image, mask, rng)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), position

    def pixels(self, position: int, rng: np.random.Generator) -> Sample:
        """A photo and its mask; of a teacher's soft one each pixel by the chance of its confidence."""
        cache, row = self.sources[position]
        mask = cache.masks[row]
        if cache.confidence is not None:
            drawn = rng.integers(0, 255, mask.shape, np.uint8)
            mask = np.where(drawn < cache.confidence[row], mask, np.uint8(IGNORED))
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
