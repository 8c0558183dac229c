"""How sure a score is: bootstrap intervals over images, of one prediction and of the difference of two.

    score = interval(counts)                    # counts: metrics.image_counts of each image, stacked
    difference = paired_interval(ours, theirs)  # of the same images, in the same order

Images are drawn with replacement, as many as there are, and the mIoU of all their pixels is computed, DRAWS
times (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals). What
differs between trainings (the seed) is not in it.

Shapes: n images, K classes, B draws.
"""

from dataclasses import dataclass

import numpy as np

from config import BadInput
from metrics import iou_of_counts, miou_of_counts

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the middle LEVEL of its draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]'


def interval(counts: np.ndarray) -> Interval:
    """The mIoU of (n, 3, K) counts."""
    return _interval(miou_of_counts(counts.sum(0)), miou_of_counts(draw(counts)))


def by_class(counts: np.ndarray) -> list[Interval]:
    """The IoU of each class of (n, 3, K) counts; nan for a class that is nowhere."""
    draws = _iou(draw(counts))
    return [_interval(value, own) for value, own in zip(_iou(counts.sum(0)), draws.T, strict=True)]


def paired_interval(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """By how much the mIoU of (n, 3, K) counts is above that of others, on the same draws of the images."""
    draws = miou_of_counts(draw(ours)) - miou_of_counts(draw(theirs))
    return _interval(miou_of_counts(ours.sum(0)) - miou_of_counts(theirs.sum(0)), draws)


def paired_by_class(ours: np.ndarray, theirs: np.ndarray) -> list[Interval]:
    """The same for the IoU of each class; nan for a class that is nowhere."""
    draws = _iou(draw(ours)) - _iou(draw(theirs))
    values = _iou(ours.sum(0)) - _iou(theirs.sum(0))
    return [_interval(value, own) for value, own in zip(values, draws.T, strict=True)]


def draw(counts: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(n, 3, K) → (B, 3, K): the sums over images drawn with replacement, the same images for the same n."""
    n = len(counts)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)  # (B, n)
    return (times @ counts.reshape(n, -1).astype(np.float64)).reshape(draws, *counts.shape[1:])


def cross_fit(totals: np.ndarray) -> tuple[int, np.ndarray]:
    """Of (parts, C, 3, K) counts of C candidates: the best on all parts, and for each part the best on the
    others. The first of equal ones. Raises BadInput for one part alone, which has no others.
    """
    if len(totals) < 2:
        raise BadInput('found fewer than 2 photos out of fold: nothing can be chosen on some for the others')
    everything = totals.sum(0)
    without = [miou_of_counts(everything - own).argmax() for own in totals]
    return int(miou_of_counts(everything).argmax()), np.array(without)


def verdict(difference: Interval, images: int) -> str:
    """A plain sentence on a paired difference."""
    if difference.low > 0:
        return f'the first is better, on these {images} images and others like them'
    if difference.high < 0:
        return f'the second is better, on these {images} images and others like them'
    return f'not to be told apart on {images} images'


def _iou(counts: np.ndarray) -> np.ndarray:
    """(..., 3, K) → (..., K)."""
    return iou_of_counts(*np.moveaxis(counts, -2, 0))


def _interval(value: float, draws: np.ndarray) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(float(value), float('nan'), float('nan'))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
