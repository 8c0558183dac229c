"""Calibration of probabilities: expected calibration error, and one temperature a model against it.

    python ensemble.py calibrate output/convnext       # fitted on its oof_probs.npy, kept in calibration.yaml

A temperature T makes p^(1/T) of a probability p, over their sum: above 1 less sure, below 1 surer (Guo et
al., arXiv:1706.04599). It is fitted on photos out of fold, and judged on parts of them that it was not
fitted on.

Shapes: N pixels, K classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import minimize_scalar

from config import read_yaml
from metrics import IGNORED
from utils.errors import BadInput
from utils.files import write_text
from voting.members import OofSample

BINS = 15  # of confidence
STEP = 8  # every 8th pixel of every 8th row is looked at
FLOOR = 0.5 / 255  # of a probability: what is kept as the byte 0 is not impossible
RANGE = (0.2, 5.0)  # of a temperature
FILE = 'calibration.yaml'


def apply_temperature(probs: Any, temperature: float, axis: int) -> Any:
    """Probabilities at a temperature, over `axis`; those given, of numpy or torch, where it is 1."""
    if temperature == 1:
        return probs
    powers = probs.clip(FLOOR) ** (1 / temperature)
    return powers / powers.sum(axis, keepdims=True)


def calibration_error(probs: np.ndarray, truth: np.ndarray) -> float:
    """By how much confidence and share of right pixels differ: the mean over BINS of equal width, weighted by
    their pixels; probs (N, K), truth (N,).
    """
    confidence, right = probs.max(1), probs.argmax(1) == truth
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, confidence, BINS) - np.bincount(place, right, BINS)
    return float(np.abs(gaps).sum() / len(truth))


def log_loss(probs: np.ndarray, truth: np.ndarray) -> float:
    """The mean of -log p of the true class, (N, K) and (N,)."""
    return float(-np.log(np.maximum(probs[np.arange(len(truth)), truth], FLOOR)).mean())


def fit_temperature(probs: np.ndarray, truth: np.ndarray) -> float:
    """The temperature with the lowest log loss."""
    found = minimize_scalar(
        lambda power: log_loss(apply_temperature(probs, float(np.exp(power)), 1), truth),
        bounds=np.log(RANGE),
        method='bounded',
        options={'xatol': 1e-3},
    )
    return round(float(np.exp(found.x)), 3)


@dataclass(frozen=True)
class Calibration:
    """One model's temperature; errors are out of sample, each part's with the temperature of the others."""

    temperature: float
    part_temperatures: tuple[float, ...]
    error_before: float
    error_after: float
    helps: bool  # out of sample both the calibration error and the log loss are lower with it

    @property
    def used(self) -> float:
        """The temperature, or 1 where it does not help."""
        return self.temperature if self.helps else 1.0

    def used_for(self, part: int) -> float:
        return self.part_temperatures[part] if self.helps else 1.0

    def __str__(self) -> str:
        return (
            f'temperature {self.temperature:.3f}, expected calibration error {self.error_before:.4f} before, '
            f'{self.error_after:.4f} after, out of sample: {"used" if self.helps else "not used"}'
        )


def calibrate(samples: Iterable[OofSample], num_models: int) -> list[Calibration]:
    """Each model's temperature, of samples with probabilities. Raises BadInput for fewer than 2 parts."""
    parts: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    found: list[list[np.ndarray]] = [[] for _ in range(num_models)]
    for sample in samples:
        truth = sample.truth[::STEP, ::STEP]
        known = truth != IGNORED
        parts.append(np.full(np.count_nonzero(known), sample.part))
        truths.append(truth[known])
        for own, probs in zip(found, sample.probs, strict=True):
            own.append(probs[:, ::STEP, ::STEP][:, known].T)
    part, truth = np.concatenate(parts), np.concatenate(truths)
    if part.max(initial=0) < 1:
        raise BadInput('calibration: found fewer than 2 photos out of fold')
    return [_calibrate(np.concatenate(own), truth, part) for own in found]


def _calibrate(kept: np.ndarray, truth: np.ndarray, part: np.ndarray) -> Calibration:
    probs = kept.astype(np.float32) / 255
    probs /= probs.sum(1, keepdims=True)
    after = probs.copy()
    temperatures = []
    for number in range(int(part.max()) + 1):
        own = part == number
        temperatures.append(fit_temperature(probs[~own], truth[~own]))
        after[own] = apply_temperature(probs[own], temperatures[-1], 1)
    before_error, after_error = calibration_error(probs, truth), calibration_error(after, truth)
    lower_loss = log_loss(after, truth) < log_loss(probs, truth)
    return Calibration(
        fit_temperature(probs, truth),
        tuple(temperatures),
        before_error,
        after_error,
        after_error < before_error and lower_loss,
    )


def write_calibration(folder: Path, calibration: Calibration, hashes: Sequence[str]) -> Path:
    """calibration.yaml in a model's folder, with the hashes of the oof.csv that it was fitted on."""
    values = {
        'temperature': calibration.temperature,
        'used': calibration.helps,
        'error_before': round(calibration.error_before, 5),
        'error_after': round(calibration.error_after, 5),
        'oof': list(hashes),
    }
    write_text(folder / FILE, yaml.safe_dump(values, sort_keys=False))
    return folder / FILE


def read_temperature(folder: Path) -> float:
    """The temperature to use of a model: 1 where none was fitted, or it did not help. Raises BadInput."""
    path = folder / FILE
    if not path.exists():
        return 1.0
    values = read_yaml(path)
    try:
        temperature, used = float(values['temperature']), values['used']
    except (KeyError, TypeError, ValueError):
        raise BadInput(f'{path}: not what ensemble.py calibrate writes') from None
    if not RANGE[0] <= temperature <= RANGE[1]:
        raise BadInput(f'{path}: temperature {temperature}, expected {RANGE[0]} to {RANGE[1]}')
    return temperature if used else 1.0
