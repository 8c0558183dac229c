"""Vote softly: take the class of the highest weighted mean of the models' probabilities; search its weights.

    result = search_soft(samples, num_models, num_classes, calibrations)

A pixel at which all models find the same class likeliest keeps it under any weights, so the search compares
candidates on the other pixels only.

Shapes: M models, K classes, P pixels, n candidates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from metrics import IGNORED
from voting.calibration import Calibration, apply_temperature
from voting.hard import member_table, miou_of_sums, weight_grid
from voting.members import OofSample

TOP_WEIGHTS = {2: 3, 3: 3, 4: 2}  # the highest whole weight tried, by the number of models; 1 with more
MAX_GRID_MODELS = 8  # up to here all combinations are tried


def mean_probs(
    probs: Sequence[np.ndarray], table: np.ndarray, temperatures: Sequence[float] | None = None
) -> np.ndarray:
    """Sum weight times probability over the models, M of (K, ...) uint8 → (K, ...); table (M, K)."""
    temperatures = temperatures or [1.0] * len(probs)
    total = np.zeros(probs[0].shape, np.float32)
    for model_probs, weights, temperature in zip(probs, table.astype(np.float32), temperatures, strict=True):
        total += weights.reshape(-1, *[1] * (total.ndim - 1)) * calibrated_probs(model_probs, temperature)
    return total


def calibrated_probs(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Apply a temperature to (K, ...) uint8 probabilities; return floats from 0 to 255."""
    if temperature == 1:
        return probs.astype(np.float32)
    return 255 * apply_temperature(probs.astype(np.float32) / 255, temperature, 0)


@dataclass(frozen=True)
class SoftResult:
    """The best soft vote. Scores are mIoU; out of sample: a part's choice was made on the other parts."""

    weights: tuple[int, ...]
    temperatures: tuple[float, ...]
    best: float  # in sample
    out_of_sample: float
    part_weights: tuple[tuple[int, ...], ...]
    part_temperatures: tuple[tuple[float, ...], ...]
    uncalibrated_out_of_sample: float = float('nan')  # all temperatures are 1

    def predict(self, sample: OofSample) -> np.ndarray:
        """Vote with what was chosen without the part of the sample; return ids."""
        table = member_table(self.part_weights[sample.part], len(sample.probs[0]))
        return mean_probs(sample.probs, table, self.part_temperatures[sample.part]).argmax(0)


def search_soft(
    samples: Iterable[OofSample], num_models: int, num_classes: int, calibrations: Sequence[Calibration]
) -> SoftResult:
    """Search the weights with the highest mIoU; use temperatures if they score higher out of sample."""
    candidates = soft_grid(num_models)
    modes = [[replace(calibration, helps=False) for calibration in calibrations]]  # without temperatures
    modes += [calibrations] if any(calibration.helps for calibration in calibrations) else []
    part_sums: list[list[np.ndarray]] = [[] for _ in modes]  # per mode and part: (n, 2, K)
    part_true: list[np.ndarray] = []  # per part: (K,)
    for sample in samples:
        while len(part_true) <= sample.part:
            part_true.append(np.zeros(num_classes, np.int64))
            for sums in part_sums:
                sums.append(np.zeros((len(candidates), 2, num_classes), np.int64))
        labelled = sample.truth != IGNORED
        truth = sample.truth[labelled]
        probs = [np.ascontiguousarray(model_probs[:, labelled]) for model_probs in sample.probs]
        part_true[sample.part] += np.bincount(truth, minlength=num_classes)
        likeliest = np.stack([model_probs.argmax(0) for model_probs in probs])
        agreed = (likeliest == likeliest[0]).all(0)
        agreed_sums = class_sums(likeliest[0][agreed], truth[agreed], num_classes)
        contested = [model_probs[:, ~agreed] for model_probs in probs]
        for mode, sums in zip(modes, part_sums, strict=True):
            temperatures = [calibration.used_for(sample.part) for calibration in mode]
            sums[sample.part] += agreed_sums
            sums[sample.part] += contested_sums(contested, truth[~agreed], candidates, temperatures)
    results = [
        choose_weights(np.stack(sums), np.stack(part_true), candidates, mode)
        for mode, sums in zip(modes, part_sums, strict=True)
    ]
    best = max(results, key=lambda result: result.out_of_sample)  # in a tie the one without temperatures
    return replace(best, uncalibrated_out_of_sample=results[0].out_of_sample)


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


def choose_weights(
    part_sums: np.ndarray, part_true: np.ndarray, candidates: np.ndarray, calibrations: Sequence[Calibration]
) -> SoftResult:
    """Choose the best candidate for all parts and for all but each one, from (parts, n, 2, K) class_sums and
    (parts, K) pixels of each true class.
    """
    sums, true = part_sums.sum(0), part_true.sum(0)
    scores = miou_of_sums(sums, true)
    parts = zip(part_sums, part_true, strict=True)
    chosen = [miou_of_sums(sums - part, true - one_true).argmax() for part, one_true in parts]
    out_sums = sum(part[candidate] for part, candidate in zip(part_sums, chosen, strict=True))
    return SoftResult(
        weights=tuple(candidates[scores.argmax()].tolist()),
        temperatures=tuple(c.used for c in calibrations),
        best=float(scores.max()),
        out_of_sample=float(miou_of_sums(out_sums, true)),
        part_weights=tuple(tuple(candidates[candidate].tolist()) for candidate in chosen),
        part_temperatures=tuple(tuple(c.used_for(part) for c in calibrations) for part in range(len(chosen))),
    )


def soft_grid(num_models: int) -> np.ndarray:
    """List (n, M) whole weights of at least two models; with many models, all of them or all but one."""
    if num_models <= MAX_GRID_MODELS:
        grid = weight_grid(num_models, TOP_WEIGHTS.get(num_models, 1))
        several = grid[np.count_nonzero(grid, axis=1) > 1]
        return several if len(several) else grid
    return np.concatenate([np.ones((1, num_models), np.int64), 1 - np.eye(num_models, dtype=np.int64)])
