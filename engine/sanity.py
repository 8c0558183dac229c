"""What is looked at before training begins, and after each epoch: nothing goes wrong without a word.

A fault that makes the run worthless is CheckFailed; what may be meant is a warning in the log, with figures.
Shapes: N samples, K classes, C a crop's side.
"""

import numpy as np
import torch

from config import Config
from dataset import TrainingSet, normalize
from engine.inference import main_logits
from metrics import IGNORED
from models import SegModel
from utils.errors import CheckFailed
from utils.log import log

BATCH = 4  # samples that are looked at
MOST_IGNORED = 0.9  # of the pixels, before a warning


def check_first_batch(
    model: SegModel, samples: TrainingSet, cfg: Config, device: torch.device, positions: range
) -> None:
    """Of the first samples: labels within range, how many pixels are ignored, what the model is shown, and
    that its output depends on it. Draws no random number that training draws, and leaves the model as it was.
    Raises CheckFailed.
    """
    taken = [samples[0, position] for position in positions[:BATCH]]
    images, masks = torch.stack([one[0] for one in taken]), torch.stack([one[1] for one in taken])
    check_labels(masks.numpy(), len(cfg.classes))
    log.info(f'first batch: {describe_labels(masks.numpy(), cfg)}')
    inputs = normalize(images.to(device), model.mean, model.std)
    mean, std = float(inputs.mean()), float(inputs.std())
    log.info(f'first batch: mean {mean:+.2f} and deviation {std:.2f} after normalisation')
    if abs(mean) > 3 or not 0.1 < std < 10:
        log.warning('warning: expected a mean near 0 and a deviation near 1')
    if len(images) > 1 and not torch.equal(inputs[0], inputs[1]):
        check_output(model, inputs)


def check_labels(masks: np.ndarray, num_classes: int) -> None:
    """(N, C, C) ids: each is a class or IGNORED, and enough of them are classes. Raises CheckFailed."""
    wrong = np.unique(masks[(masks >= num_classes) & (masks != IGNORED)])
    if len(wrong):
        expected = f'expected 0 to {num_classes - 1}, or {IGNORED}'
        raise CheckFailed(f'first batch: found the labels {wrong.tolist()}, {expected}')
    ignored = float((masks == IGNORED).mean())
    if ignored == 1:
        raise CheckFailed('first batch: every pixel is ignored, so that there is nothing to learn')
    if ignored > MOST_IGNORED:
        log.warning(f'warning: {ignored:.0%} of the pixels of the first batch are ignored')


def describe_labels(masks: np.ndarray, cfg: Config) -> str:
    """The share of (N, C, C) pixels that is ignored, and of each class among the others; a warning where
    there is background alone.
    """
    known = masks[masks != IGNORED]
    shares = np.bincount(known, minlength=len(cfg.classes)) / known.size
    if shares[0] == 1:
        log.warning(f'warning: the first {len(masks)} samples show {cfg.classes[0]} alone')
    listed = [f'{cfg.classes[k]} {shares[k]:.1%}' for k in np.flatnonzero(shares)]
    return f'{1 - known.size / masks.size:.1%} ignored; {", ".join(listed)}'


def check_output(model: SegModel, inputs: torch.Tensor) -> None:
    """(N, 3, C, C) of different photos have different logits. Raises CheckFailed."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = main_logits(model(inputs)).float()
    model.train(training)
    if not torch.isfinite(logits).all():
        raise CheckFailed('first batch: the model gives logits that are not finite, before any training')
    if torch.equal(logits[0], logits[1]):
        raise CheckFailed("first batch: the model's output does not change with the photo")


def check_classes(present: list[set[int]], cfg: Config) -> None:
    """Warns of classes that no training photo has, given the classes of each."""
    absent = [name for k, name in enumerate(cfg.classes) if k and not any(k in ids for ids in present)]
    if absent:
        log.warning(f'warning: no training photo has {", ".join(absent)}')


def check_rates(rates: list[float], before: list[float] | None, epoch: int, cfg: Config) -> list[float]:
    """Warns where no learning rate is another than an epoch ago, though the schedule says so; the rates."""
    if before is not None and cfg.lr_schedule != 'constant' and rates == before:
        shown = f'{max(rates):.2e} in all {len(rates)} groups'
        log.warning(f'warning: the learning rate did not move in epoch {epoch + 1}: {shown}')
    return rates


def check_epoch(counts: np.ndarray, before: np.ndarray | None, cfg: Config) -> None:
    """Warns of classes that are in the truth and were predicted an epoch ago, but are no more; (n, 3, K)
    counts of the validation photos. Raises CheckFailed where a photo has other pixels than then.
    """
    if before is None:
        return
    _, predicted, true = counts.sum(0)
    vanished = (predicted == 0) & (true > 0) & (before.sum(0)[1] > 0)
    if vanished.any():
        names = ', '.join(f'{cfg.classes[k]} ({true[k]:,} pixels)' for k in np.flatnonzero(vanished))
        log.warning(f'warning: predicted an epoch ago, and no more: {names}')
    if (counts[:, 2].sum(1) != before[:, 2].sum(1)).any():
        raise CheckFailed('validation: the pixels of a photo are not as many as an epoch ago')
