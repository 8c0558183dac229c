"""Items 1 and 6: the peaks of the GPU, and training steps beside the same network as mmsegmentation trains it
(tools.bench.steps.mmseg_steps), in fp16.

Ours always clips the gradient and keeps a moving average; the other way clips if the config says so, and
keeps none.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from config import Config
from data.cache import open_cache
from engine.inference import autocast
from losses import segmentation_loss
from tools.bench.steps import (
    SIDES,
    STEPS,
    WARMUP,
    matmul_peak,
    mmseg_steps,
    now,
    peak_memory,
    reset_peak,
    seconds_of,
    step_flops,
)
from tools.gpu.results import PEAK, Report
from tools.gpu.runner import Options, Part
from tools.gpu.workload import (
    ShortTrainer,
    device_of,
    make_config,
    make_trainer,
    random_batch,
    with_data,
)

CONFIGS = ('convnext_knet', 'convnext', 'swin_knet', 'svt', 'beit', 'mask2former_swin')
ROUNDS = 3  # of STEPS steps
WORKERS = 12
FASTER = 1.5  # least ratio of their time to ours


def peak_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 1."""
    return {'peaks': measure_peaks}


def measure_peaks(options: Options, report: Report) -> None:
    """Measure a matrix product and a copy."""
    device = device_of(options)
    side, size = (256, 2**21) if options.tiny else (SIDES[device.type], 2**31)
    flops = matmul_peak(device, torch.bfloat16, side, 20)
    report.measured(PEAK, flops / 1e12, 'TFLOP/s', f'{side} x {side} x {side}')
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 20, warmup=3)
    report.measured('copy', 2 * size / seconds / 1e12, 'TB/s', f'{size / 1e9:.2g} GB read and written')


def train_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 6."""
    names = ('demo',) if options.tiny else CONFIGS
    return {name: partial(compare, name) for name in names}


def compare(name: str, options: Options, report: Report) -> None:
    """Time both ways in turn; in the first round each is alone in memory, so that its peak is its own."""
    cfg, device = speed_config(name, options), device_of(options)
    rounds, count = (2, 1) if options.tiny else (ROUNDS, STEPS)
    most = WARMUP + rounds * (1 + count)  # enough steps for a way

    # 1. each alone
    reset_peak(device)
    trainer = make_trainer(cfg, fold=-1, steps=most)
    ours = trainer.steps(0)
    our_times, our_peak = [round_of(ours, device, count, WARMUP)], peak_memory()
    report_parts(name, trainer, count, report)
    del trainer, ours
    reset_peak(device)
    theirs = their_steps(name, options, most)
    their_times, their_peak = [round_of(theirs, device, count, WARMUP)], peak_memory()

    # 2. in turn
    ours = make_trainer(cfg, fold=-1, steps=most).steps(0)
    for _ in range(rounds - 1):
        our_times.append(round_of(ours, device, count))
        their_times.append(round_of(theirs, device, count))
    our_time, their_time = statistics.median(our_times), statistics.median(their_times)

    for way, times, peak in (('ours', our_times, our_peak), ('theirs', their_times, their_peak)):
        note = f'peak {peak:.1f} GiB; rounds ' + ' '.join(f'{1e3 * seconds:.1f}' for seconds in times)
        report.measured(f'{name}: {way}', 1e3 * statistics.median(times), 'ms a step', note)
    if options.tiny:
        report.measured(f'{name}: times as fast as theirs', their_time / our_time)
    else:
        report.at_least(f'{name}: times as fast as theirs', their_time / our_time, FASTER)
        report.at_most(f'{name}: our peak of memory, not above theirs', our_peak, their_peak, 'GiB')
    report_use(f'{name}: model FLOP use', cfg, our_time, options, report)


def speed_config(name: str, options: Options, **changes) -> Config:
    """Make a config with clipping and a moving average, on photos."""
    cfg = make_config(name, options, **{'ema': 0.999, **workers(options), **changes})
    return with_data(cfg.model_copy(update={'clip_norm': cfg.clip_norm or 1.0}), options, 'speed')


def workers(options: Options) -> dict[str, int]:
    return {'workers': 0 if options.tiny else WORKERS}


def their_steps(name: str, options: Options, count: int) -> Iterator[None]:
    """Train as mmsegmentation does; yield after each step."""
    amp = 'fp16' if options.device == 'cuda' else 'off'
    plain = {'amp': amp, 'ema': 0, 'compile': False, 'channels_last': False}
    cfg = with_data(make_config(name, options, **plain, **workers(options)), options, 'speed')
    cache = open_cache(cfg, 'train')
    rows = np.resize(np.arange(len(cache)), count * cfg.batch_size)
    return mmseg_steps(cfg, torch.device(cfg.device), cache, rows)


def round_of(steps: Iterator, device: torch.device, count: int, warmup: int = 1) -> float:
    """Return the mean seconds of so many steps after some to warm up."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # what the other way holds
    return seconds_of(partial(next, steps), device, count, warmup)


def report_use(
    what: str, cfg: Config, seconds: float, options: Options, report: Report, least: float | None = None
) -> None:
    """Report the FLOP/s of a step, in % of item 1's peak, with the `least` that it has to be, if any."""
    flops = step_flops(cfg)
    note = f'{flops / 1e12:.3g} TFLOP a step'
    if options.peak is None:
        report.not_applicable(what, f'item 1 did not run; {note}')
    elif least is None or options.tiny:
        report.measured(what, 100 * flops / seconds / options.peak, '%', note)
    else:
        report.at_least(what, 100 * flops / seconds / options.peak, least, '%', note)


def report_parts(name: str, trainer: ShortTrainer, count: int, report: Report) -> None:
    """Report the median time of each part of a step, waiting for the GPU after each."""
    cfg, model, device = trainer.cfg, trainer.model, trainer.ranks.device
    batch = [part.to(device) for part in random_batch(cfg)]
    times: dict[str, list[float]] = {}
    last = now(device)

    def note(part: str) -> None:
        nonlocal last
        moment = now(device)
        times.setdefault(part, []).append(moment - last)
        last = moment

    for _ in range(count):
        last = now(device)
        with autocast(cfg, device), trainer.convolutions:
            outputs = trainer.forward(trainer.prepare(batch[0]))
        note('forward')
        loss = segmentation_loss(outputs, batch[1].long(), model.loss_weights, cfg.loss)
        note('loss')
        trainer.scaler.scale(loss).backward()
        note('backward')
        trainer.update()
        note('update')
        trainer.ema.update(model, step=trainer.step)
        note('EMA')
    medians = {part: 1e3 * statistics.median(values) for part, values in times.items()}
    medians['clip and optimizer'] = medians.pop('update') - medians['EMA']  # an update has both
    shown = ', '.join(f'{part} {value:.1f}' for part, value in medians.items())
    report.measured(f'{name}: parts of a step, in ms', sum(medians.values()), 'ms', shown)
