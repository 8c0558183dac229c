"""What a training would be, with nothing written: its size, and memory and time from a few real steps.

    python train.py --cfg configs/convnext.yaml --fold 0 --dry-run

The steps are those of a training, with its loader, loss, optimizer and average; then the model is forgotten.
"""

import resource
import time
from contextlib import suppress

import numpy as np
import torch
from tqdm import tqdm

from engine.trainer import Trainer
from models import count_model
from utils.log import log
from utils.progress import Bar

STEPS = 6  # of the optimizer; the first one warms up and is not counted


class EnoughSteps(Exception):
    """Ends an epoch."""


class DryTrainer(Trainer):
    """Training that ends after STEPS, notes when each was done, and saves nothing."""

    done_at: list[float]

    def save_or_stop(self) -> None:
        self.done_at.append(time.monotonic())
        if len(self.done_at) > STEPS:
            raise EnoughSteps


def rehearse(trainer: DryTrainer, valid: int) -> None:
    """Logs what the training would take, of which `valid` photos are validated after each epoch. Raises
    CheckFailed, as training does.
    """
    cfg, left = trainer.cfg, trainer.total_steps - trainer.step
    cost = count_model(cfg, cfg.crop_size)
    log.info(
        f'model: {cost.encoder / 1e6:.1f} M parameters in the encoder, {cost.head / 1e6:.1f} M in neck and '
        f'head; {cost.macs / 1e9:.1f} GMACs a photo of {cfg.crop_size}x{cfg.crop_size}'
    )
    batches = sum(trainer.batches_in(range(cfg.epochs)))
    done = f', {trainer.step:,} of them done' if trainer.step else ''
    log.info(
        f'steps: {trainer.total_steps:,} in {cfg.epochs} epochs{done}; {batches:,} batches of '
        f'{cfg.batch_size} photos'
    )
    if not left:
        return
    trainer.done_at = [time.monotonic()]
    number = min(STEPS, left)
    with (
        Bar('dry run', 'batch', number * cfg.accumulate, quiet=not trainer.ranks.is_main) as bar,
        suppress(EnoughSteps),
    ):
        for epoch in range(trainer.epoch, cfg.epochs):
            trainer.train_epoch(epoch, bar)
    seconds = np.diff(trainer.done_at)
    step = float(np.median(seconds[1:] if len(seconds) > 1 else seconds))
    log.info(f'memory: {peak_memory(trainer.ranks.device)}, of {len(seconds)} steps')
    log.info(
        f'time: {tqdm.format_interval(left * step)} for {left:,} steps of {step:.3g} s, the median after the '
        f'first; {valid} photos to validate after each epoch come on top'
    )


def peak_memory(device: torch.device) -> str:
    """The most that this process has taken so far, and how that was measured."""
    if device.type == 'cuda':
        most, there = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        return f"{most / 2**30:.1f} of the GPU's {there / 2**30:.1f} GB (torch.cuda.max_memory_allocated)"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB
    return f"{most / 2**20:.1f} GB (this process's peak RSS; workers of the loader not counted)"
