"""Items 7 and 8: training compiled, and prediction beside ttach's loop, compiled too."""

from collections import Counter
from contextlib import AbstractContextManager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from config import Config
from tools.bench.steps import (
    STEPS,
    VIEWS,
    WARMUP,
    our_loop,
    peak_memory,
    reset_peak,
    seconds_of,
    ttach_loop,
)
from tools.gpu.numerics import backend
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part
from tools.gpu.speed import report_use, speed_config
from tools.gpu.workload import device_of, make_config, make_trainer, random_batch

CONFIGS = ('convnext_knet', 'swin_knet')
SHARE = {'convnext_knet': 45.0}  # least model FLOP use of the compiled network, in %
PHOTOS = 16
FASTER = 3.0  # least ratio of the time of ttach's loop to ours


def train_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 7."""
    names = ('demo',) if options.tiny else CONFIGS
    return {name: partial(compare, name) for name in names}


def compare(name: str, options: Options, report: Report) -> None:
    """Time training steps of a config on one batch, compiled and then eager."""
    device, times = device_of(options), {}
    for compiled in (True, False):
        cfg = speed_config(name, options, compile=compiled)
        label = f'{name}: {"compiled" if compiled else "eager"}'
        reset_peak(device)
        counters.clear()
        with compiler(options):
            trainer = make_trainer(cfg, fold=-1, batches=[random_batch(cfg)] * (WARMUP + STEPS + 1))
        step = partial(next, trainer.steps(0))
        first = seconds_of(step, device, 1, 0)
        graphs = counters['stats']['unique_graphs']
        count, warmup = (1, 0) if options.tiny else (STEPS, WARMUP)
        times[compiled] = seconds_of(step, device, count, warmup)
        report.measured(label, 1e3 * times[compiled], 'ms a step', f'peak {peak_memory():.1f} GiB')
        if compiled:
            report_graphs(name, graphs, first, report)
        del trainer, step
    report.measured(f'{name}: eager over compiled', times[False] / times[True])
    saved = times[False] - times[True]
    if saved > 0:
        report.measured(f'{name}: steps until compiling has paid', first / saved)
    report_use(f'{name}: compiled, model FLOP use', cfg, times[True], options, report, SHARE.get(name))


def report_graphs(name: str, graphs: int, seconds: float, report: Report) -> None:
    """Report what compiling took, the graph breaks, the graphs, and those compiled after the first step."""
    report.measured(f'{name}: seconds of the first step, which compiles', seconds, 's')
    reasons = Counter(counters['graph_break'])
    note = '; '.join(f'{" ".join(reason.split())[:80]} x {count}' for reason, count in reasons.most_common(5))
    report.measured(f'{name}: graph breaks', sum(reasons.values()), note=note)
    report.measured(f'{name}: graphs', graphs)
    report.at_most(f'{name}: recompilations', counters['stats']['unique_graphs'] - graphs, 0)


def predict_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 8."""
    return {'prediction': predict, 'prediction, compiled': predict_compiled}


def prediction(options: Options) -> tuple[Config, Tensor]:
    """Make a config of eight views, and a batch of images."""
    name, count = ('demo', 2) if options.tiny else ('convnext_knet', PHOTOS)
    cfg = make_config(name, options, cache_size=512, **VIEWS)
    return cfg, random_batch(cfg, count)[0]


def predict(options: Options, report: Report) -> None:
    """Predict photos down to ids: ours, and ttach's loop with a model of its own."""
    (cfg, images), device, times = prediction(options), device_of(options), {}
    for way, make in (('ours', our_loop), ("ttach's loop", ttach_loop)):
        run = make(cfg, images, device)
        times[way] = seconds_of(run, device, 1 if options.tiny else 3, 0 if options.tiny else 1)
        report.measured(f'{way}: {len(images)} photos x 8 views', times[way], 's')
        del run
    ratio = times["ttach's loop"] / times['ours']
    if options.tiny:
        report.measured("ttach's time over ours", ratio)
    else:
        report.at_least("ttach's time over ours", ratio, FASTER)


def predict_compiled(options: Options, report: Report) -> None:
    """Predict with the network compiled for images of many sizes, as infer.py does with `compile: true`."""
    (cfg, images), device = prediction(options), device_of(options)
    fewer = {'tta_scales': (1.0,)} if options.tiny else {}  # tracing each size takes seconds on a CPU
    with compiler(options):
        run = our_loop(cfg.model_copy(update={'compile': True, **fewer}), images, device)
    first = seconds_of(run, device, 1, 0)
    report.measured('ours, compiled: seconds of the first call', first, 's')
    report.measured('ours, compiled', seconds_of(run, device, 1 if options.tiny else 3, 0), 's')


def compiler(options: Options) -> AbstractContextManager:
    """Compile by the backend of the options."""
    return patch.object(torch, 'compile', partial(torch.compile, backend=backend(options)))
