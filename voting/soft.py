"""Soft votes: the class of the highest weighted mean of the models' probabilities; weights searched.

    result = search_soft(samples, num_models, num_classes, calibrations)

Where all models have one class likeliest, so has every mean of them: only the other pixels are looked at.

Shapes: M models, K classes, P pixels, n candidates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from metrics import IGNORED, iou_of_counts, mean_of_iou
from voting.calibration import Calibration, apply_temperature
from voting.hard import weight_grid
from voting.members import OofSample

TOP_WEIGHTS = {2: 3, 3: 3, 4: 2}  # the highest whole weight tried, by the number of models; 1 with more
MOST_MODELS = 8


def mean_probs(
    probs: Sequence[np.ndarray], table: np.ndarray, temperatures: Sequence[float] | None = None
) -> np.ndarray:
    """(K, ...) sum over the models of weight times probability, from (K, ...) uint8 each; table (M, K)."""
    temperatures = temperatures or [1.0] * len(probs)
    total = np.zeros(probs[0].shape, np.float32)
    for own, weights, temperature in zip(probs, table.astype(np.float32), temperatures, strict=True):
        total += weights.reshape(-1, *[1] * (total.ndim - 1)) * calibrated_probs(own, temperature)
    return total


def calibrated_probs(probs: np.ndarray, temperature: float) -> np.ndarray:
    """(K, ...) uint8 probabilities at a temperature, still from 0 to 255."""
    if temperature == 1:
        return probs.astype(np.float32)
    return 255 * apply_temperature(probs.astype(np.float32) / 255, temperature, 0)


@dataclass(frozen=True)
class SoftResult:
    """The best soft vote; out of sample is with weights and temperatures chosen on the other parts."""

    weights: tuple[int, ...]
    temperatures: tuple[float, ...]
    best: float  # in sample
    out_of_sample: float
    part_weights: tuple[tuple[int, ...], ...]
    part_temperatures: tuple[tuple[float, ...], ...]
    plain_out_of_sample: float = float('nan')  # without temperatures


def search_soft(
    samples: Iterable[OofSample], num_models: int, num_classes: int, calibrations: Sequence[Calibration]
) -> SoftResult:
    """The weights with the highest mIoU, with the temperatures where that is better out of sample.

    A part is scored with temperatures that were fitted without it; weights for it are chosen on the others.
    """
    candidates = soft_grid(num_models)
    modes = (False, True) if any(c.helps for c in calibrations) else (False,)
    sums: list[list[np.ndarray]] = [[] for _ in modes]  # a mode, a part: (n, 2, K)
    true: list[np.ndarray] = []
    for sample in samples:
        while len(true) <= sample.part:
            true.append(np.zeros(num_classes, np.int64))
            for own in sums:
                own.append(np.zeros((len(candidates), 2, num_classes), np.int64))
        known = sample.truth != IGNORED
        truth = sample.truth[known]
        probs = [np.ascontiguousarray(own[:, known]) for own in sample.probs]
        true[sample.part] += np.bincount(truth, minlength=num_classes)
        likeliest = np.stack([own.argmax(0) for own in probs])
        agreed = (likeliest == likeliest[0]).all(0)
        said, right = likeliest[0][agreed], likeliest[0][agreed] == truth[agreed]
        same = np.stack(
            [np.bincount(said[right], minlength=num_classes), np.bincount(said, minlength=num_classes)]
        )
        contested = [own[:, ~agreed] for own in probs]
        for mode, own in zip(modes, sums, strict=True):
            levels = [c.used_for(sample.part) if mode else 1.0 for c in calibrations]
            own[sample.part] += same + contested_sums(contested, truth[~agreed], candidates, levels)
    truths = np.stack(true)
    results = [
        _choose(np.stack(own), truths, candidates, mode, calibrations)
        for mode, own in zip(modes, sums, strict=True)
    ]
    best = max(results, key=lambda result: result.out_of_sample)  # without temperatures where equal
    return replace(best, plain_out_of_sample=results[0].out_of_sample)


def contested_sums(
    probs: Sequence[np.ndarray], truth: np.ndarray, candidates: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """(n, 2, K) pixels that are right, and those predicted, of (K, P) uint8 probabilities of each model."""
    num_classes, count = probs[0].shape
    levels = np.stack([calibrated_probs(own, t) for own, t in zip(probs, temperatures, strict=True)])
    sums = np.zeros((len(candidates), 2, num_classes), np.int64)
    flat = levels.reshape(len(probs), -1)
    for number, weights in enumerate(candidates.astype(np.float32)):
        won = (weights @ flat).reshape(num_classes, count).argmax(0)
        sums[number, 0] = np.bincount(won[won == truth], minlength=num_classes)
        sums[number, 1] = np.bincount(won, minlength=num_classes)
    return sums


def _choose(
    sums: np.ndarray,
    true: np.ndarray,
    candidates: np.ndarray,
    mode: bool,
    calibrations: Sequence[Calibration],
) -> SoftResult:
    """Of (parts, n, 2, K) sums and (parts, K) true pixels."""

    def scores(tallies: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        return mean_of_iou(iou_of_counts(tallies[..., 0, :], tallies[..., 1, :], pixels))

    total, pixels = sums.sum(0), true.sum(0)
    everywhere = scores(total, pixels)
    without = [int(scores(total - own, pixels - t).argmax()) for own, t in zip(sums, true, strict=True)]
    out = sum(own[chosen] for own, chosen in zip(sums, without, strict=True))
    temperatures = [
        tuple(c.used_for(part) if mode else 1.0 for c in calibrations) for part in range(len(true))
    ]
    return SoftResult(
        weights=tuple(candidates[everywhere.argmax()].tolist()),
        temperatures=tuple(c.used if mode else 1.0 for c in calibrations),
        best=float(everywhere.max()),
        out_of_sample=float(scores(out, pixels)),
        part_weights=tuple(tuple(candidates[chosen].tolist()) for chosen in without),
        part_temperatures=tuple(temperatures),
    )


def soft_grid(num_models: int) -> np.ndarray:
    """(n, M) whole weights of two models or more; with many models all of them, and all but one."""
    if num_models <= MOST_MODELS:
        grid = weight_grid(num_models, TOP_WEIGHTS.get(num_models, 1))
        several = grid[np.count_nonzero(grid, axis=1) > 1]
        return several if len(several) else grid
    return np.concatenate([np.ones((1, num_models), np.int64), 1 - np.eye(num_models, dtype=np.int64)])
