"""Calibrate probabilities: measure the expected calibration error and fit one temperature per model.

    python evaluate.py calibrate output/convnext       # fits it on oof_probs.npy, writes calibration.yaml

A temperature T replaces each probability p by p^(1/T) and scales them to the sum 1: above 1 the model becomes
less confident, below 1 more (Guo et al., arXiv:1706.04599); a probability of 0 stays 0. Each part of the
photos out of fold is judged at the temperature that was fitted on the others.

A stored byte stands for an interval of probabilities. That of 0 has no lower end in logits, and no floor in
its place is right for all temperatures. But a temperature scales the log odds of any two classes, whatever
else there is: it is fitted by the likelihood of the true class among the classes of its pixel whose byte is
not 0, if it is one of them, with the mean of p^(1/T) in the interval of each byte.

Shapes: N pixels, K classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metrics import IGNORED
from utils.errors import BadInput
from utils.files import write_text
from utils.yaml_files import read_yaml
from voting.choices import require_parts
from voting.members import OofSample
from voting.origin import refuse_outdated_fit

BINS = 15  # of confidence
STEP = 8  # calibrate on every 8th pixel of every 8th row
FLOOR = 0.5 / 255  # the least probability in the log loss: a stored byte of 0 does not mean impossible
RANGE = (0.2, 5.0)  # of a temperature
FILE = 'calibration.yaml'


def apply_temperature(probs: Any, temperature: float, axis: int) -> Any:
    """Apply a temperature to NumPy or torch probabilities that sum to 1 over `axis`; 1 returns `probs`."""
    if temperature == 1:
        return probs
    powers = probs ** (1 / temperature)
    return powers / powers.sum(axis, keepdims=True)


def calibration_error(probs: np.ndarray, truth: np.ndarray) -> float:
    """Compute the expected calibration error of (N, K) probabilities against (N,) true classes, in BINS."""
    confidence, correct = probs.max(1), probs.argmax(1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence, BINS) - np.bincount(bins, correct, BINS)
    return float(np.abs(gaps).sum() / len(truth))


def log_loss(probs: np.ndarray, truth: np.ndarray) -> float:
    """Compute the mean of -log p of the true class from (N, K) probabilities and (N,) true classes."""
    return float(-np.log(np.maximum(probs[np.arange(len(truth)), truth], FLOOR)).mean())


def fit_temperature(stored: np.ndarray, truth: np.ndarray) -> float:
    """Find the temperature of (N, K) uint8 probabilities that makes the (N,) true classes likeliest; 1
    without any pixel that tells.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and only a calibration needs it

    rows = np.flatnonzero((stored[np.arange(len(truth)), truth] > 0) & (np.count_nonzero(stored, axis=1) > 1))
    if not len(rows):
        return 1.0
    stored, true = stored[rows], stored[rows, truth[rows]]

    def loss(exponent: float) -> float:
        powers = byte_powers(float(np.exp(-exponent)))
        return float((np.log(powers[stored].sum(1)) - np.log(powers[true])).mean())

    minimum = minimize_scalar(loss, bounds=np.log(RANGE), method='bounded', options={'xatol': 1e-3})
    return round(float(np.exp(minimum.x)), 3)


def byte_powers(power: float) -> np.ndarray:
    """Return the mean of p^power over the probabilities p of each byte, (256,), 0 for the byte of 0.

    p is as likely on each stretch of its logarithm, as there are more small probabilities than large ones.
    """
    low, high = (np.arange(1, 256) - 0.5) / 255, (np.arange(1, 256) + 0.5) / 255
    means = (high**power - low**power) / (power * np.log(high / low))
    return np.concatenate([[0.0], means])


@dataclass(frozen=True)
class Calibration:
    """The temperature of one model, and its calibration errors out of sample."""

    temperature: float
    part_temperatures: tuple[float, ...]
    error_before: float
    error_after: float
    helps: bool  # out of sample it lowers both the calibration error and the log loss

    @property
    def used(self) -> float:
        """Return the temperature, or 1 if it does not help."""
        return self.temperature if self.helps else 1.0

    def used_for(self, part: int) -> float:
        """Return the temperature that was fitted without a part, or 1 if temperatures do not help."""
        return self.part_temperatures[part] if self.helps else 1.0

    def __str__(self) -> str:
        return (
            f'temperature {self.temperature:.3f}, expected calibration error {self.error_before:.4f} before, '
            f'{self.error_after:.4f} after, out of sample: {"used" if self.helps else "not used"}'
        )


def calibrate(samples: Iterable[OofSample], num_models: int) -> list[Calibration]:
    """Fit the temperature of each model on samples with probabilities. Raises BadInput for one part only."""
    parts, truths, probs = [], [], [[] for _ in range(num_models)]
    for sample in samples:
        truth = sample.truth[::STEP, ::STEP]
        labelled = truth != IGNORED
        parts.append(np.full(np.count_nonzero(labelled), sample.part))
        truths.append(truth[labelled])
        for model_probs, sample_probs in zip(probs, sample.probs, strict=True):
            model_probs.append(sample_probs[:, ::STEP, ::STEP][:, labelled].T)
    part, truth = np.concatenate(parts), np.concatenate(truths)
    require_parts(part, 'calibration: ')
    return [calibrate_pixels(np.concatenate(model_probs), truth, part) for model_probs in probs]


def calibrate_pixels(stored: np.ndarray, truth: np.ndarray, part: np.ndarray) -> Calibration:
    """Fit one model's temperature on (N, K) uint8 probabilities, (N,) true classes and (N,) parts."""
    probs = stored.astype(np.float32) / 255
    probs /= probs.sum(1, keepdims=True)
    calibrated = probs.copy()
    temperatures = []
    for number in range(int(part.max()) + 1):
        inside = part == number
        temperatures.append(fit_temperature(stored[~inside], truth[~inside]))
        calibrated[inside] = apply_temperature(probs[inside], temperatures[-1], 1)
    before, after = calibration_error(probs, truth), calibration_error(calibrated, truth)
    helps = after < before and log_loss(calibrated, truth) < log_loss(probs, truth)
    return Calibration(fit_temperature(stored, truth), tuple(temperatures), before, after, helps)


def write_calibration(folder: Path, calibration: Calibration, fitted: dict[str, Any]) -> Path:
    """Write calibration.yaml into a model's folder, with what it was fitted_on."""
    values = {
        'temperature': calibration.temperature,
        'used': calibration.helps,
        'error_before': round(calibration.error_before, 5),
        'error_after': round(calibration.error_after, 5),
        'fitted_on': fitted,
    }
    write_text(folder / FILE, yaml.safe_dump(values, sort_keys=False))
    return folder / FILE


def read_temperature(folder: Path) -> float:
    """Read the temperature to use for a model: 1 if none was fitted or it did not help. Raises BadInput, also
    if a best.pt or an oof.csv that it was fitted on has changed.
    """
    path = folder / FILE
    if not path.exists():
        return 1.0
    values = read_yaml(path)
    try:
        temperature, used = float(values['temperature']), values['used']
        refuse_outdated_fit(path, values.get('fitted_on'), 'calibrate')
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f'{path}: not a file that evaluate.py calibrate wrote; run it again') from None
    if not RANGE[0] <= temperature <= RANGE[1]:
        raise BadInput(f'{path}: temperature {temperature}, expected {RANGE[0]} to {RANGE[1]}')
    return temperature if used else 1.0
