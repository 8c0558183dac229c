"""Define a benchmark as some work and the ways of doing it, ours first; make the masks that they work on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.id_csv import IdWriter

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Way:
    """A way of doing the work."""

    run: Callable[[], object] | None = None
    target: float | None = None  # it should take at least this many times as long as ours
    share: float = 1.0  # the part of the work that `run` does; times are scaled up
    measure: Callable[[], float] | None = None  # in place of `run`: warms up, and returns the seconds
    at_peak: float | None = None  # seconds that its FLOPs take at the peak


Benchmark = tuple[str, dict[str, Way]]  # some work and the ways of doing it, ours first


def random_masks(count: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """Draw (side, side) uint8 masks of a few rectangles of the eleven classes, as a network predicts them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 8)):
            y, x, h, w = rng.integers(0, side, 4)
            mask[y : y + h // 2 + 1, x : x + w // 2 + 1] = rng.integers(1, 11)
        yield mask


def perturb_masks(masks: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Vary masks as another model would: move them by a few pixels, and change the class of some objects."""
    rng = np.random.default_rng(seed)
    for mask in masks:
        other = np.roll(mask, tuple(rng.integers(-4, 5, 2)), (0, 1))
        if rng.random() < 0.3:
            other = np.where(other == rng.integers(1, 11), rng.integers(1, 11), other).astype(np.uint8)
        yield other


def write_masks(path: Path, masks: list[np.ndarray]) -> Path:
    """Write a submission CSV of masks; return its path."""
    with IdWriter(path) as writer:
        for index, mask in enumerate(masks):
            writer.write(f'batch_01/{index:04d}.jpg', mask)
    return path
