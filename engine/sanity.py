"""Check the first batch before training and the scores after each epoch.

A fault that makes the run worthless raises CheckFailed; what may be intended is a warning in the log.
Shapes: N samples, C channels, K classes, S side of a crop, n validation photos. Masks are (N, S, S) ids, or
(N, K, S, S) planes of classes that may overlap.
"""

from collections.abc import Sequence

import numpy as np
import torch

from config import Config
from dataset import TrainingSet, normalize, unpack_masks
from engine.inference import main_logits
from metrics import IGNORED
from models import SegModel
from utils.errors import CheckFailed
from utils.log import log

BATCH = 4  # samples to check
MAX_IGNORED = 0.9  # share of the pixels above which there is a warning


def check_first_batch(
    model: SegModel, samples: TrainingSet, cfg: Config, device: torch.device, positions: Sequence[int]
) -> None:
    """Check labels, normalisation and logits of the first samples; change nothing. Raises CheckFailed."""
    batch = [samples[0, position] for position in positions[:BATCH]]
    images, masks = (torch.stack([sample[n] for sample in batch]) for n in (0, 1))
    masks = unpack_masks(masks, len(cfg.classes)).numpy()
    check_labels(masks, len(cfg.classes))
    log.info(f'first batch: {describe_labels(masks, cfg)}')
    inputs = normalize(images.to(device), model.mean, model.std)
    mean, std = float(inputs.mean()), float(inputs.std())
    log.info(f'first batch: mean {mean:+.2f} and deviation {std:.2f} after normalisation')
    if abs(mean) > 3 or not 0.1 < std < 10:
        log.warning('warning: expected a mean near 0 and a deviation near 1')
    if len(images) > 1 and not torch.equal(inputs[0], inputs[1]):
        check_output(model, inputs)


def check_labels(masks: np.ndarray, num_classes: int) -> None:
    """Check that masks hold classes or IGNORED, and not only IGNORED; planes 0 and 1. Raises CheckFailed."""
    values = num_classes if masks.ndim == 3 else 2
    wrong = np.unique(masks[(masks >= values) & (masks != IGNORED)])
    if len(wrong):
        found, expected = wrong.tolist(), f'0 to {values - 1}, or {IGNORED}'
        raise CheckFailed(f'first batch: found the labels {found}, expected {expected}')
    ignored = float((masks == IGNORED).mean())
    if ignored == 1:
        raise CheckFailed('first batch: every pixel is ignored, so there is nothing to learn')
    if ignored > MAX_IGNORED:
        log.warning(f'warning: {ignored:.0%} of the pixels of the first batch are ignored')


def describe_labels(masks: np.ndarray, cfg: Config) -> str:
    """Describe the ignored share of masks and that of the classes; warn if there is no object."""
    known = masks[masks != IGNORED]
    if masks.ndim == 3:
        shares = np.bincount(known, minlength=len(cfg.classes)) / known.size
    else:
        shares = (masks == 1).sum((0, 2, 3)) / np.maximum(1, (masks != IGNORED).sum((0, 2, 3)))
    if not shares[cfg.competition.object_ids.start :].any():
        shown = cfg.classes[0] if masks.ndim == 3 else 'photos without an object'
        log.warning(f'warning: the first {len(masks)} samples show only {shown}')
    texts = [f'{cfg.classes[k]} {shares[k]:.1%}' for k in np.flatnonzero(shares)]
    return f'{1 - known.size / masks.size:.1%} ignored; {", ".join(texts) or "no object"}'


def check_output(model: SegModel, inputs: torch.Tensor) -> None:
    """Check that (N, C, S, S) different photos get different, finite logits. Raises CheckFailed."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = main_logits(model(inputs)).float()
    model.train(training)
    if not torch.isfinite(logits).all():
        raise CheckFailed('first batch: the logits are not finite before any training')
    if torch.equal(logits[0], logits[1]):
        raise CheckFailed("first batch: the model's output does not change with the photo")


def check_classes(present: list[set[int]], cfg: Config) -> None:
    """Warn of classes that no training photo has, given the classes of each photo."""
    object_ids = cfg.competition.object_ids
    absent = [cfg.classes[k] for k in object_ids if not any(k in ids for ids in present)]
    if absent:
        log.warning(f'warning: no training photo has {", ".join(absent)}')


def check_epoch(cfg: Config, epoch: int, now: tuple, before: tuple) -> None:
    """Compare the learning rates and (n, 3, K) counts, if any, with those before. Raises CheckFailed."""
    (rates, counts), (old_rates, old_counts) = now, before
    if rates == old_rates and cfg.lr_schedule != 'constant':
        groups = f'{max(rates):.2e} in all {len(rates)} groups'
        log.warning(f'warning: the learning rate did not change in epoch {epoch + 1}: {groups}')
    if counts is not None and old_counts is not None:
        check_counts(counts, old_counts, cfg)


def check_counts(counts: np.ndarray, before: np.ndarray, cfg: Config) -> None:
    """Warn of classes that are no longer predicted; raise CheckFailed if a photo's labels have changed."""
    _, predicted, true = counts.sum(0)
    vanished = (predicted == 0) & (true > 0) & (before.sum(0)[1] > 0)
    if vanished.any():
        names = ', '.join(f'{cfg.classes[k]} ({true[k]:,} pixels)' for k in np.flatnonzero(vanished))
        log.warning(f'warning: classes that are no longer predicted: {names}')
    if (counts[:, 2] != before[:, 2]).any():
        raise CheckFailed('validation: a photo has more or fewer labelled pixels than in the epoch before')
