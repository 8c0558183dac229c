"""Score masks: confusion matrix → IoU of each class → mIoU, as the organiser computes them, with intervals.

A confusion matrix (K, K) has true classes as rows and predicted ones as columns. The counts of images are
added up, not averaged: the score is that of all pixels together.

Intervals come from a bootstrap over images (the percentile interval of Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13). They show how much a score depends on the choice of the images, not how
much it changes with the seed of a training.

Shapes: n images, K classes, B draws.
"""

from dataclasses import dataclass

import numpy as np

IGNORED = 255  # in the truth: these pixels do not count
DRAWS = 2000  # of the bootstrap
LEVEL = 0.95  # share of the draws that an interval holds


def confusion_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each true and predicted class: two integer arrays of one shape → (K, K) int64.

    Pixels that are IGNORED in the truth do not count. Raises ValueError for any other value that is no class.
    """
    if truth.shape != pred.shape:
        raise ValueError(f'truth is {truth.shape}, pred is {pred.shape}; expected one shape')
    known = truth != IGNORED
    truth = truth[known]
    _check_class_ids(truth, num_classes, 'truth')
    _check_class_ids(pred, num_classes, 'pred')
    codes = truth.astype(np.int64) * num_classes + pred[known]
    return np.bincount(codes, minlength=num_classes**2).reshape(num_classes, num_classes)


def _check_class_ids(mask: np.ndarray, num_classes: int, name: str) -> None:
    if not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f'{name} is {mask.dtype}, expected class ids of an integer type')
    if mask.size and (mask.min() < 0 or mask.max() >= num_classes):
        wrong = mask.min() if mask.min() < 0 else mask.max()
        allowed = f'0 to {num_classes - 1}, or {IGNORED} in the truth'
        raise ValueError(f'{name} has the class id {wrong}, expected {allowed}')


def image_counts(confusion: np.ndarray) -> np.ndarray:
    """Count the pixels of each class that are right, predicted, and true: (K, K) → (3, K)."""
    return np.stack([np.diag(confusion), confusion.sum(0), confusion.sum(1)])


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Compute the (K,) intersection over union; nan for a class that is in neither truth nor prediction."""
    return iou_of_counts(*image_counts(confusion))


def iou_of_counts(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute the (..., K) IoU from (..., K) pixels that are right, predicted, and true; nan without any."""
    union = predicted + true - hits
    return np.divide(hits, union, out=np.full(union.shape, np.nan), where=union > 0)


def miou_of_counts(counts: np.ndarray) -> np.ndarray:
    """Compute the mIoU of image_counts: (..., 3, K) → (...)."""
    return mean_of_iou(_iou(counts))


def mean_iou(confusion: np.ndarray) -> float:
    """Average the IoU over the classes that are in the truth or predicted; nan if there are none."""
    return float(mean_of_iou(class_iou(confusion)))


def mean_of_iou(iou: np.ndarray) -> np.ndarray:
    """Average (..., K) over the classes that are not nan: (...); nan if all are."""
    present = ~np.isnan(iou)
    total = np.where(present, iou, 0.0).sum(-1)
    return np.divide(total, present.sum(-1), out=np.full(total.shape, np.nan), where=present.any(-1))


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Compute the share of the pixels that are right; nan if there are no pixels."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float('nan')


def format_table(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """Format the scores of (n, 3, K) image_counts: a line a class, and the pixel accuracy."""
    width = max(map(len, classes), default=0)
    hits, predicted, true = counts.sum(0)
    images = np.count_nonzero(counts[:, 2], axis=0)
    lines = [f'{"class":<{width}}     IoU        pixels   share  images']
    for k, (name, iou) in enumerate(zip(classes, iou_of_counts(hits, predicted, true), strict=True)):
        share = true[k] / max(1, true.sum())
        score = '-' if np.isnan(iou) else f'{iou:.4f}'
        lines.append(f'{name:<{width}}  {score:>6}  {true[k]:>12,}  {share:>6.2%}  {images[k]:>6}')
    lines.append(f'pixel accuracy {hits.sum() / max(1, true.sum()):.4f}')
    return '\n'.join(lines)


@dataclass(frozen=True)
class Interval:
    """A score or a difference, and its bootstrap interval; `str` gives '0.7222 [0.6769, 0.7658]'."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]'


def interval(counts: np.ndarray) -> Interval:
    """Compute the mIoU of (n, 3, K) image_counts and its interval."""
    return _interval(miou_of_counts(counts.sum(0)), miou_of_counts(draw(counts)))


def by_class(counts: np.ndarray) -> list[Interval]:
    """Compute the IoU of each class and its interval; nan for a class that is in no image."""
    draws = _iou(draw(counts))
    return [_interval(*pair) for pair in zip(_iou(counts.sum(0)), draws.T, strict=True)]


def paired_interval(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Compute the mIoU of `ours` minus that of `theirs`, both (n, 3, K), and its interval."""
    draws = miou_of_counts(draw(ours)) - miou_of_counts(draw(theirs))
    return _interval(miou_of_counts(ours.sum(0)) - miou_of_counts(theirs.sum(0)), draws)


def paired_by_class(ours: np.ndarray, theirs: np.ndarray) -> list[Interval]:
    """Compute the difference of each class's IoU and its interval; nan for a class that is in no image."""
    draws = _iou(draw(ours)) - _iou(draw(theirs))
    values = _iou(ours.sum(0)) - _iou(theirs.sum(0))
    return [_interval(*pair) for pair in zip(values, draws.T, strict=True)]


def draw(counts: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Add up the counts of images drawn with replacement, alike for the same n: → (B, 3, K) float64."""
    n = len(counts)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)  # (B, n)
    return (times @ counts.reshape(n, -1).astype(np.float64)).reshape(draws, *counts.shape[1:])


def verdict(difference: Interval, images: int) -> str:
    """Say in plain words which of two is better, given their paired difference on so many images."""
    if not (difference.low > 0 or difference.high < 0):
        return f'no significant difference on {images} photos'
    better = 'first' if difference.low > 0 else 'second'
    return f'the {better} is better: a significant difference on {images} photos'


def _iou(counts: np.ndarray) -> np.ndarray:
    """Compute the IoU of each class: (..., 3, K) image_counts → (..., K)."""
    return iou_of_counts(*np.moveaxis(counts, -2, 0))


def _interval(value: float, draws: np.ndarray) -> Interval:
    """Build the interval of a value from its (B,) draws; draws without any class, nan, do not count."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))
