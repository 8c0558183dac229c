"""What the benches measure: a case is some work, with the ways of doing it, ours first.

Made-up inputs too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from submission import SubmissionWriter


@dataclass(frozen=True)
class Way:
    """A way of doing the work: all of it, or a share of it; `target`: how many times as long as ours is
    aimed at.
    """

    run: Callable[[], object]
    target: float | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    name: str
    ways: dict[str, Way]


def blobs(count: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """Masks (side, side) uint8 of a few rectangles of the eleven classes, as a network predicts them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 8)):
            y, x, h, w = rng.integers(0, side, 4)
            mask[y : y + h // 2 + 1, x : x + w // 2 + 1] = rng.integers(1, 11)
        yield mask


def disagreeing(masks: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """The masks as another model sees them: moved by a few pixels, at times an object of another class."""
    rng = np.random.default_rng(seed)
    for mask in masks:
        other = np.roll(mask, tuple(rng.integers(-4, 5, 2)), (0, 1))
        if rng.random() < 0.3:
            other = np.where(other == rng.integers(1, 11), rng.integers(1, 11), other).astype(np.uint8)
        yield other


def sample_csv(path: Path, masks: list[np.ndarray]) -> Path:
    with SubmissionWriter(path) as writer:
        for index, mask in enumerate(masks):
            writer.write(f'batch_01/{index:04d}.jpg', mask)
    return path
