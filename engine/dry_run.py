"""Estimate what a training costs: parameters, memory and time, from a few of its own steps."""

import resource
import time
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from engine.optim import groups_table
from engine.trainer import Trainer
from models import count_model
from utils.log import log
from utils.progress import progress

STEPS = 6  # optimizer steps at most; the first one warms up and is not counted


def estimate_cost(trainer: Trainer) -> None:
    """Log the size of the training, then the memory and time of a few of its steps. Raises CheckFailed."""
    cfg, steps_left = trainer.cfg, trainer.total_steps - trainer.step
    cost = count_model(cfg, cfg.crop_size)
    log.info(
        f'model: {cost.encoder / 1e6:.1f} M parameters in the encoder, {cost.head / 1e6:.1f} M in neck and '
        f'head; {cost.macs / 1e9:.1f} GMACs a photo of {cfg.crop_size}x{cfg.crop_size}'
    )
    for line in groups_table(trainer.optimizer.param_groups):
        log.info(line)
    batches = f'{sum(trainer.batches_in(range(cfg.epochs))):,} batches of {cfg.batch_size} photos'
    done = f', {trainer.step:,} of them done' if trainer.step else ''
    log.info(f'steps: {trainer.total_steps:,} in {cfg.epochs} epochs{done}; {batches}')
    if not steps_left:
        return
    times = [time.monotonic()]
    epoch = max(trainer.epoch, min(cfg.freeze_encoder, cfg.epochs - 1))  # frozen ones cost less
    steps = islice(trainer.steps(epoch), STEPS)
    for _ in progress(steps, 'dry run', 'step', min(STEPS, steps_left), quiet=not trainer.ranks.is_main):
        trainer.read_losses()  # which waits for a GPU
        times.append(time.monotonic())
    seconds = np.diff(times)
    step = float(np.median(seconds[1:] if len(seconds) > 1 else seconds))
    log.info(f'memory: {peak_memory(trainer.ranks.device)}, of {len(seconds)} steps')
    time_left = tqdm.format_interval(steps_left * step)
    validation = f'the validations on {len(trainer.data.valid_rows)} photos'
    per_step = f'{steps_left:,} steps of {step:.3g} s, the median after the first'
    log.info(f'time: {time_left} for {per_step}, without {validation}')


def peak_memory(device: torch.device) -> str:
    """Describe the most memory that this process has taken so far, and how it was measured."""
    if device.type == 'cuda':
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        return f"{peak / 2**30:.1f} of the GPU's {total / 2**30:.1f} GB (torch.cuda.max_memory_allocated)"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    return f"{peak / 2**20:.1f} GB (this process's peak RSS; workers of the loader not counted)"
