"""The score: confusion matrix → IoU of each class → mIoU, as the organiser computes them.

confusion (K, K): rows are true classes, columns predicted ones. Counts of images are added up, not averaged.
"""

from dataclasses import dataclass

import numpy as np

IGNORED = 255  # in the truth: these pixels do not count
CHUNK = 1 << 18  # pixels at a time: their codes stay in the processor's cache


def confusion_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64 pixel counts of two id arrays of one shape; IGNORED pixels of the truth are left out.

    Raises ValueError for any other id that is not a class.
    """
    if truth.shape != pred.shape:
        raise ValueError(f'truth is {truth.shape}, pred is {pred.shape}; expected one shape')
    truth, pred = _as_bytes(truth, 'truth'), _as_bytes(pred, 'pred')
    # codes are truth * K + pred; of IGNORED they are beyond K * K, modulo 256 too, up to 15 classes
    dtype = np.uint8 if num_classes <= 15 else np.uint16
    counts = np.zeros(np.iinfo(dtype).max + 1, np.int64)
    for start in range(0, truth.size, CHUNK):
        true, guess = truth[start : start + CHUNK], pred[start : start + CHUNK]
        if (true + np.uint8(1)).max() > num_classes:  # modulo 256 IGNORED becomes 0
            wrong = true[(true >= num_classes) & (true != IGNORED)][0]
            raise ValueError(f'truth has the id {wrong}, expected 0 to {num_classes - 1} or {IGNORED}')
        if guess.max() >= num_classes:
            raise ValueError(f'pred has the id {guess.max()}, expected 0 to {num_classes - 1}')
        _count(true.astype(dtype, copy=False) * dtype(num_classes) + guess, counts)
    return counts[: num_classes**2].reshape(num_classes, num_classes)


def image_counts(confusion: np.ndarray) -> np.ndarray:
    """(K, K) → (3, K) int64: pixels of each class that are right, predicted, and true. All that IoU needs."""
    return np.stack([np.diag(confusion), confusion.sum(0), confusion.sum(1)])


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(K,) intersection over union; nan for a class that is neither in the truth nor predicted."""
    return iou_of_counts(np.diag(confusion), confusion.sum(0), confusion.sum(1))


def iou_of_counts(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(..., K) IoU of pixel counts (..., K): those that are right, those predicted, those of the truth."""
    union = predicted + true - hits
    return np.divide(hits, union, out=np.full(union.shape, np.nan), where=union > 0)


def miou_of_counts(counts: np.ndarray) -> np.ndarray:
    """(...) mIoU of (..., 3, K) image_counts."""
    return mean_of_iou(iou_of_counts(*np.moveaxis(counts, -2, 0)))


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the classes that are in the truth or predicted; nan where there are none."""
    return float(mean_of_iou(class_iou(confusion)))


def mean_of_iou(iou: np.ndarray) -> np.ndarray:
    """(...) mean over the last axis of (..., K), nan left out; nan where all are."""
    present = ~np.isnan(iou)
    total = np.where(present, iou, 0.0).sum(-1)
    return np.divide(total, present.sum(-1), out=np.full(total.shape, np.nan), where=present.any(-1))


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of the pixels that are right; nan where there are no pixels."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float('nan')


def format_table(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """Of (n, 3, K) image_counts, a line a class: IoU, pixels and images of the truth; then pixel accuracy."""
    width = max(map(len, classes), default=0)
    hits, predicted, true = counts.sum(0)
    images = np.count_nonzero(counts[:, 2], axis=0)
    lines = [f'{"class":<{width}}     IoU        pixels   share  images']
    for k, (name, iou) in enumerate(zip(classes, iou_of_counts(hits, predicted, true), strict=True)):
        share = true[k] / max(1, true.sum())
        shown = '-' if np.isnan(iou) else f'{iou:.4f}'
        lines.append(f'{name:<{width}}  {shown:>6}  {true[k]:>12,}  {share:>6.2%}  {images[k]:>6}')
    lines.append(f'pixel accuracy {hits.sum() / max(1, true.sum()):.4f}')
    return '\n'.join(lines)


def _as_bytes(ids: np.ndarray, name: str) -> np.ndarray:
    """The ids, flat, as uint8."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f'{name} is {ids.dtype}, expected ids of an integer type')
    if ids.dtype != np.uint8 and ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise ValueError(f'{name} has ids from {ids.min()} to {ids.max()}, expected 0 to 255')
    return ids.astype(np.uint8, copy=False).ravel()


def _count(codes: np.ndarray, counts: np.ndarray) -> None:
    """Adds up how often each code is there; by runs of one code where they are long, as in masks they are."""
    changes = codes[1:] != codes[:-1]
    if np.count_nonzero(changes) > len(codes) // 16:
        counts += np.bincount(codes, minlength=len(counts))
        return
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(starts, append=len(codes))
    counts += np.bincount(codes[starts], lengths, len(counts)).astype(np.int64)


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


def verdict(difference: Interval, photos: int) -> str:
    """Say in words whether a paired difference is significant: whether its interval leaves out 0."""
    if difference.low > 0:
        return f'the first is better, a significant difference on {photos} photos'
    if difference.high < 0:
        return f'the second is better, a significant difference on {photos} photos'
    return f'no significant difference on {photos} photos'


def _iou(counts: np.ndarray) -> np.ndarray:
    """(..., 3, K) → (..., K)."""
    return iou_of_counts(*np.moveaxis(counts, -2, 0))


def _interval(value: float, draws: np.ndarray) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(float(value), float('nan'), float('nan'))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
