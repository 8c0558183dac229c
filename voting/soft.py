"""Vote softly: take the weighted mean of the models' probabilities; search its weights.

    result = search_soft(samples, num_models, num_classes, metric, calibrations)
    result = search_soft_planes(samples, num_models, num_classes, metric)        # where classes may overlap

The class of the highest mean wins. A pixel at which all models find the same class likeliest keeps it under
any weights, so the search compares candidates on the other pixels only.

If classes may overlap, a pixel is of each class whose mean, rounded to a byte as a model's is, reaches the
threshold of the class. Thresholds are chosen with the weights, without the part that they are scored on. The
pixels at which all models have the same byte are counted once for all candidates.

Shapes: M models, K classes, P pixels, n candidates, T thresholds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from metrics import IGNORED, Metric
from voting.calibration import Calibration, apply_temperature
from voting.choices import best_of
from voting.members import OofSample
from voting.thresholds import BYTES, byte_of, counts_at_thresholds, threshold_counts, threshold_of
from voting.weights import weight_grid

TOP_WEIGHTS = {2: 3, 3: 3, 4: 2}  # the highest whole weight tried, by the number of models; 1 with more
MAX_GRID_MODELS = 8  # up to here all combinations are tried
FEW_BYTES = BYTES[BYTES % 8 == 0]  # thresholds among which a draw of the bootstrap chooses, and
FEW_WEIGHTS = 8  # weights: those that score highest
BLOCK = 1 << 22  # pixels, or pixels and classes, whose means are held at a time


def mean_probs(
    probs: Sequence[np.ndarray], table: np.ndarray, temperatures: Sequence[float] | None = None
) -> np.ndarray:
    """Sum weight times probability over the models, M of (K, ...) uint8 → (K, ...); table (M, K)."""
    temperatures = temperatures or [1.0] * len(probs)
    total = np.zeros(probs[0].shape, np.float32)
    for model_probs, weights, temperature in zip(probs, table.astype(np.float32), temperatures, strict=True):
        total += weights.reshape(-1, *[1] * (total.ndim - 1)) * calibrated_probs(model_probs, temperature)
    return total


def mean_bytes(probs: Sequence[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Round the weighted mean of M of (K, ...) uint8 probabilities to bytes, halves up; table (M, K).

    A class without any weight has the probability 0.
    """
    total = np.maximum(table.sum(0, dtype=np.float32), np.finfo(np.float32).tiny)
    mean = mean_probs(probs, table) / total.reshape(-1, *[1] * (probs[0].ndim - 1))
    return (mean + np.float32(0.5)).astype(np.uint8)


def soft_vote(
    probs: Sequence[np.ndarray],
    table: np.ndarray,
    temperatures: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
) -> np.ndarray:
    """Vote with M of (K, H, W) uint8 probabilities → (H, W) ids, or (K, H, W) planes if there are thresholds.

    The lower class wins if means are equal.
    """
    num_classes, height, width = probs[0].shape
    winner = np.empty((height, width) if thresholds is None else probs[0].shape, np.uint8)
    limits = None if thresholds is None else np.array([*map(byte_of, thresholds)])[:, None, None]
    step = max(1, BLOCK // (num_classes * width))
    for rows in (np.s_[start : start + step] for start in range(0, height, step)):
        block = [model_probs[:, rows] for model_probs in probs]
        if limits is None:
            winner[rows] = mean_probs(block, table, temperatures).argmax(0)
        else:
            winner[:, rows] = mean_bytes(block, table) >= limits
    return winner


def calibrated_probs(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Apply a temperature to (K, ...) uint8 probabilities; return floats from 0 to 255."""
    if temperature == 1:
        return probs.astype(np.float32)
    return 255 * apply_temperature(probs.astype(np.float32) / 255, temperature, 0)


@dataclass(frozen=True)
class SoftResult:
    """The best soft vote. Out of sample: a part's choice was made on the other parts."""

    metric: Metric  # of all scores
    weights: tuple[int, ...]
    temperatures: tuple[float, ...]
    best: float  # in sample
    out_of_sample: float
    part_weights: tuple[tuple[int, ...], ...]
    part_temperatures: tuple[tuple[float, ...], ...]
    uncalibrated_out_of_sample: float = float('nan')  # all temperatures are 1
    thresholds: tuple[float, ...] | None = None  # (K,) where classes may overlap
    part_thresholds: tuple[tuple[float, ...], ...] = ()
    # (n, C, 3, K) of each photo and candidate, to choose again; the candidates of each family, or, where each
    # class takes its own, the groups of one family (see voting.choices.Search)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3, 0)), compare=False, repr=False)
    families: tuple[range, ...] = ()
    groups: tuple[range, ...] = ()


def search_soft(
    samples: Iterable[OofSample],
    num_models: int,
    num_classes: int,
    metric: Metric,
    calibrations: Sequence[Calibration],
) -> SoftResult:
    """Search the weights with the highest score; use temperatures if they score higher out of sample."""
    candidates = soft_grid(num_models)
    modes = [[replace(calibration, helps=False) for calibration in calibrations]]  # without temperatures
    modes += [calibrations] if any(calibration.helps for calibration in calibrations) else []
    tallies, counts = [Tally(metric) for _ in modes], []
    for sample in samples:
        photo_counts = []
        labelled = sample.truth != IGNORED
        truth = sample.truth[labelled]
        probs = [np.ascontiguousarray(model_probs[:, labelled]) for model_probs in sample.probs]
        true = np.bincount(truth, minlength=num_classes)
        likeliest = np.stack([model_probs.argmax(0) for model_probs in probs])
        agreed = (likeliest == likeliest[0]).all(0)
        agreed_sums = class_sums(likeliest[0][agreed], truth[agreed], num_classes)
        contested = [model_probs[:, ~agreed] for model_probs in probs]
        for mode, tally in zip(modes, tallies, strict=True):
            temperatures = [calibration.used_for(sample.part) for calibration in mode]
            sums = agreed_sums + contested_sums(contested, truth[~agreed], candidates, temperatures)
            trues = np.broadcast_to(true, (len(sums), 1, num_classes))
            photo_counts.append(np.concatenate([sums, trues], 1))
            tally.add(sample.part, photo_counts[-1])
        counts.append(np.concatenate(photo_counts).astype(np.int32))  # enough for a photo, not for a part
    results = [choose_weights(tally, candidates, mode) for mode, tally in zip(modes, tallies, strict=True)]
    best = max(results, key=lambda result: result.out_of_sample)  # in a tie the one without temperatures
    return replace(
        best,
        uncalibrated_out_of_sample=results[0].out_of_sample,
        counts=np.stack(counts),
        families=tuple(range(m * len(candidates), (m + 1) * len(candidates)) for m in range(len(modes))),
    )


class Tally:
    """The summands of a metric for each candidate, added up over the photos of each part."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.parts: list[np.ndarray] = []  # of each part: (..., 3, K)

    def add(self, part: int, counts: np.ndarray) -> None:
        """Add the (..., 3, K) int64 counts of a photo."""
        sums = self.metric.summands(counts[None])[0]
        while len(self.parts) <= part:
            self.parts.append(np.zeros_like(sums))
        self.parts[part] += sums

    def without(self) -> np.ndarray:
        """Add up the sums of all parts, and of all without each one → (1 + parts, ...)."""
        parts = np.stack(self.parts)
        total = parts.sum(0)
        return np.concatenate([total[None], total - parts])


def class_sums(pred: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count by class the correct and the predicted pixels, (P,) and (P,) → (2, K)."""
    correct = np.bincount(pred[pred == truth], minlength=num_classes)
    return np.stack([correct, np.bincount(pred, minlength=num_classes)])


def contested_sums(
    probs: Sequence[np.ndarray], truth: np.ndarray, candidates: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """Count the class_sums of each candidate, (n, 2, K), from (K, P) uint8 probabilities of each model."""
    num_classes, num_pixels = probs[0].shape
    calibrated = np.stack([calibrated_probs(p, t) for p, t in zip(probs, temperatures, strict=True)])
    flat = calibrated.reshape(len(probs), -1)
    sums = np.zeros((len(candidates), 2, num_classes), np.int64)
    for number, weights in enumerate(candidates.astype(np.float32)):
        pred = (weights @ flat).reshape(num_classes, num_pixels).argmax(0)
        sums[number] = class_sums(pred, truth, num_classes)
    return sums


def choose_weights(tally: Tally, candidates: np.ndarray, calibrations: Sequence[Calibration]) -> SoftResult:
    """Choose the best candidate for all parts and for all but each one, from the sums of each part."""
    metric, sums = tally.metric, tally.without()
    scores = metric.mean(metric.class_scores(sums))  # (1 + parts, n)
    best, *chosen = best_of(scores)
    out_sums = sum(part[candidate] for part, candidate in zip(tally.parts, chosen, strict=True))
    return SoftResult(
        metric=metric,
        weights=tuple(candidates[best].tolist()),
        temperatures=tuple(c.used for c in calibrations),
        best=float(scores[0, best]),
        out_of_sample=float(metric.mean(metric.class_scores(out_sums))),
        part_weights=tuple(tuple(candidates[candidate].tolist()) for candidate in chosen),
        part_temperatures=tuple(tuple(c.used_for(part) for c in calibrations) for part in range(len(chosen))),
    )


def search_soft_planes(
    samples: Iterable[OofSample], num_models: int, num_classes: int, metric: Metric
) -> SoftResult:
    """Search the weights and thresholds with the highest score, where classes may overlap."""
    candidates, tally, true, few = soft_grid(num_models), Tally(metric), [], []
    for sample in samples:
        histograms = [
            plane_histograms([p[k] for p in sample.probs], sample.truth[k], candidates)
            for k in range(num_classes)
        ]
        tally.add(
            sample.part, np.concatenate([counts_at_thresholds(counts, BYTES) for counts in histograms], -1)
        )
        few.append(np.concatenate([counts_at_thresholds(counts, FEW_BYTES) for counts in histograms], -1))
        few[-1] = few[-1].astype(np.int32)  # (n, T, 3, K)
        while len(true) <= sample.part:
            true.append(np.zeros(num_classes, np.int64))
        true[sample.part] += np.array([counts[0, 0].sum() for counts in histograms])
    scores = metric.class_scores(tally.without())  # (1 + parts, n, T, K)
    present = np.stack([sum(true), *(sum(true) - true)]) > 0  # (1 + parts, K)
    limits = best_of(scores.swapaxes(2, 3)) * present[:, None]  # (1 + parts, n, K); 0 is the threshold 0.5
    at_limits = np.take_along_axis(scores, limits[:, :, None], 2)[:, :, 0]
    totals = metric.mean(at_limits)  # (1 + parts, n)
    rows, chosen = np.arange(len(totals)), best_of(totals)
    limits = limits[rows, chosen]  # (1 + parts, K)
    pairs = zip(tally.parts, chosen[1:], limits[1:], strict=True)
    out_sums = sum(part[number, limit, :, np.arange(num_classes)].T for part, number, limit in pairs)
    weights = [tuple(candidates[number].tolist()) for number in chosen]
    thresholds = [tuple(threshold_of(byte) for byte in BYTES[row]) for row in limits]
    out_of_sample = float(metric.mean(metric.class_scores(out_sums)))
    kept = np.sort(np.argsort(-totals[0], kind='stable')[:FEW_WEIGHTS])
    number = len(FEW_BYTES)
    return SoftResult(
        metric=metric,
        weights=weights[0],
        temperatures=(1.0,) * num_models,
        best=float(totals[0, chosen[0]]),
        out_of_sample=out_of_sample,
        part_weights=tuple(weights[1:]),
        part_temperatures=((1.0,) * num_models,) * len(weights[1:]),
        uncalibrated_out_of_sample=out_of_sample,
        thresholds=thresholds[0],
        part_thresholds=tuple(thresholds[1:]),
        counts=np.stack([counts[kept].reshape(-1, *counts.shape[2:]) for counts in few]),
        groups=tuple(range(row * number, (row + 1) * number) for row in range(len(kept))),
    )


def plane_histograms(probs: Sequence[np.ndarray], truth: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Count the pixels of each mean byte: M of (H, W) uint8, (H, W) of 0, 1, IGNORED → (n, 2, 256)."""
    differs = np.zeros(truth.shape, bool)
    for model_probs in probs[1:]:
        differs |= model_probs != probs[0]
    agreed = np.where(differs, np.uint8(IGNORED), truth)
    differs &= truth != IGNORED
    contested = [model_probs[None, differs] for model_probs in probs]
    offset = np.where(truth[differs] == 1, 0, 256)
    histograms = np.empty((len(candidates), 2, 256), np.int64)
    histograms[:] = threshold_counts(probs[0][None], agreed[None])
    for histogram, weights in zip(histograms, candidates, strict=True):
        mean = mean_bytes(contested, weights[:, None])[0]
        histogram += np.bincount(offset + mean, minlength=512).reshape(2, 256)
    return histograms


def soft_grid(num_models: int) -> np.ndarray:
    """List (n, M) whole weights of at least two models; with many models, all of them or all but one."""
    if num_models <= MAX_GRID_MODELS:
        grid = weight_grid(num_models, TOP_WEIGHTS.get(num_models, 1))
        several = grid[np.count_nonzero(grid, axis=1) > 1]
        return several if len(several) else grid
    return np.concatenate([np.ones((1, num_models), np.int64), 1 - np.eye(num_models, dtype=np.int64)])
