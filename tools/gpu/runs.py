"""Items 9, 10 and 11: waiting for photos and checkpoints, a whole training, a step of each other config."""

import math
import time
from functools import partial

import torch

import train
from config import Config
from engine.optim import build_optimizer
from tools.bench.steps import build_model, now, peak_memory, reset_peak, seconds_of
from tools.gpu import speed
from tools.gpu.numerics import loss_of
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part
from tools.gpu.speed import speed_config
from tools.gpu.workload import (
    CONFIGS,
    device_of,
    make_config,
    make_trainer,
    random_batch,
    with_data,
)

WORKERS = (4, 8, 16)
STEPS, WARMUP = 30, 3
WAITING = 0.05  # limit of the share of a step spent waiting for photos, with the most workers
SECONDS = 35  # for the training of item 10
EPOCHS = (3, 60)  # fewest and most
CPU_SCORE = 'the CPU, at 256 in 18 epochs and with a flip: .759 (docs/results.md)'


def loader_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 9."""
    return {'loader': wait_for_photos, 'last.pt': write_checkpoint}


def wait_for_photos(options: Options, report: Report) -> None:
    """Compare steps on photos from the loader with steps on one batch."""
    name = 'demo' if options.tiny else 'convnext_knet'
    alone = step_seconds(speed_config(name, options), options, loaded=False)
    workers = (0,) if options.tiny else WORKERS
    for count in workers:
        loaded = step_seconds(speed_config(name, options, workers=count), options, loaded=True)
        share = max(0.0, 1 - alone / loaded)
        what = f'{name}: share of a step spent waiting for photos, {count} workers'
        note = f'{1e3 * loaded:.1f} ms a step, {1e3 * alone:.1f} on one batch'
        if options.tiny or count < workers[-1]:
            report.measured(what, share, note=note)
        else:
            report.at_most(what, share, WAITING, note=note)


def step_seconds(cfg: Config, options: Options, loaded: bool) -> float:
    """Return the mean seconds of a training step, with photos from the loader or on one batch."""
    warmup, count = (1, 2) if options.tiny else (WARMUP, STEPS)
    total = warmup + count
    epoch = {'steps': total} if loaded else {'batches': [random_batch(cfg)] * total}
    steps = make_trainer(cfg, fold=-1, **epoch).steps(0)
    return seconds_of(partial(next, steps), device_of(options), count, warmup)


def write_checkpoint(options: Options, report: Report) -> None:
    """Write last.pt of a whole training state after a step; say how long the training stood still."""
    cfg = speed_config('demo' if options.tiny else 'convnext_knet', options)
    trainer, device = make_trainer(cfg, fold=-1, batches=[random_batch(cfg)]), device_of(options)
    next(trainer.steps(0))
    path = trainer.folder / 'last.pt'
    began = now(device)
    trainer.save()
    stood = time.perf_counter() - began
    trainer.writer.wait()
    note = f'{path.stat().st_size / 1e9:.2f} GB, on the disk after {time.perf_counter() - began:.2f} s'
    report.measured('last.pt: seconds for which the training stands still', stood, 's', note)
    path.unlink()


def training_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 10."""
    return {'trash481': train_for_real}


def train_for_real(options: Options, report: Report) -> None:
    """Train fold 0 of configs/trash481.yaml at 512, for as many epochs as the time takes."""
    size = 64 if options.tiny else 512
    sizes = {'image_size': size, 'crop_size': size, **speed.workers(options)}
    weights = 'none' if options.tiny else 'efficientnet-lite2'
    began = time.monotonic()
    cfg = with_data(make_config('trash481', options, encoder_weights=weights, **sizes), options, 'real')
    cfg = cfg.model_copy(update={'folds': 5, 'cache_dir': options.folder / 'five_folds'})
    train.main(cfg.model_copy(update={'epochs': 1, 'name': 'first'}), 0)
    took = time.monotonic() - began
    fewest, most = (1, 1) if options.tiny else EPOCHS
    epochs = min(most, max(fewest, int((SECONDS - took) / took)))
    began = time.monotonic()
    score = train.main(cfg.model_copy(update={'epochs': epochs}), 0)
    seconds = (time.monotonic() - began) / epochs
    report.measured(f'fold 0 at {size}: seconds an epoch, with validation', seconds, 's')
    note = f'{epochs} epochs; {CPU_SCORE}' if options.data else f'{epochs} epochs of a demo set'
    report.measured(f'fold 0 at {size}: best mIoU', score, note=note)


def other_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 11."""
    names = sorted({path.stem for path in CONFIGS.glob('*.yaml')} - set(speed.CONFIGS))
    names = ['fpn_resnet101', 'upernet_dinov3'] if options.tiny else names
    return {name: partial(take_step, name) for name in names}


def take_step(name: str, options: Options, report: Report) -> None:
    """Take a training step of a config at its full size."""
    small = {'features': [3, 6, 9, 12], 'encoder': 'vit_tiny_patch16_224'} if name == 'upernet_dinov3' else {}
    cfg, device = make_config(name, options, **(small if options.tiny else {})), device_of(options)
    reset_peak(device)
    model = build_model(cfg, device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, cfg)
    loss = loss_of(model, cfg, random_batch(cfg), device)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf)
    optimizer.step()
    values = {'loss': loss.item(), 'norm of the gradient': norm.item()}
    is_finite = all(math.isfinite(value) for value in values.values())
    shown = ', '.join(f'{key} {value:.4g}' for key, value in values.items())
    what = f'{name}, batch {cfg.batch_size} at {cfg.crop_size}: finite loss and gradient'
    report.holds(what, is_finite, f'{shown}, peak {peak_memory():.1f} GiB')
