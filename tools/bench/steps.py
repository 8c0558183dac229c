"""Benchmark training steps and prediction, on the CPU or a GPU: one model at a time, each way in its turn.

Ours is an epoch of the Trainer on photos from the loader, with augmentation, clipping and EMA. The other way
gets the same samples, weights and loss, and does the rest as mmsegmentation does: NCHW, attention by matrix
products, `foreach` AdamW on a GPU, and the loss read after each step.
"""

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import ttach
from timm.layers import set_fused_attn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from config import Config
from data.cache import Cache, open_cache
from dataset import EpochSampler, TrainingSet, make_loader, normalize
from engine.distributed import Ranks
from engine.inference import Predictor, amp_dtype, autocast, decide, finish_mask, main_logits
from engine.optim import parameter_groups
from engine.trainer import Trainer, TrainingData
from losses import segmentation_loss
from models import SegModel, count_model, memory_format
from networks.blocks import use_plain_blocks
from tools.bench.fixtures import Benchmark, Way
from tools.bench.samples import demo_config

WARMUP, STEPS = 3, 8  # steps of a round that are not timed, and that are
PASSES = 3  # forward passes with the FLOPs of a training step
VIEWS = {'tta_flips': ('h',), 'tta_scales': (0.75, 1.0, 1.25, 1.5)}
PHOTOS = 4  # of a prediction
SIDES = {'cpu': 2048, 'cuda': 8192}  # of the matrices in matmul_peak

Clock = Callable[[], float]  # returns seconds


def bench_train(args: Namespace) -> list[Benchmark]:
    """Train some steps of a config, with the Trainer and as mmsegmentation does."""
    cfg, device = model_config(args), torch.device(args.device)
    cache = open_cache(cfg, 'train')
    rows = np.resize(np.arange(len(cache)), cfg.batch_size * (WARMUP + STEPS))
    plain = {'compile': False, 'channels_last': False, 'amp': 'fp16' if device.type == 'cuda' else 'off'}
    plain_cfg = cfg.model_copy(update=plain)
    at_peak = step_flops(cfg) / matmul_peak(device, amp_dtype(cfg, device), SIDES[device.type])
    ours = Way(measure=lambda: our_step(cfg, device, cache, rows, args.now), at_peak=at_peak)
    name = 'fp16, NCHW, foreach AdamW' if device.type == 'cuda' else 'fp32, NCHW, plain AdamW'
    theirs = Way(measure=lambda: mmseg_step(plain_cfg, device, cache, rows, args.now), target=1.5)
    return [(f'train {cfg.name}, a batch of {cfg.batch_size}', {'ours': ours, name: theirs})]


def step_flops(cfg: Config) -> float:
    """Return the FLOPs of a training step: those of PASSES forward passes of a batch."""
    return PASSES * 2 * count_model(cfg, cfg.crop_size).macs * cfg.batch_size


class StepTimer:
    """Stand in for a progress bar, and time the steps after the first WARMUP ones."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self.clock, self.steps = device, clock, 0

    def update(self) -> None:
        self.steps += 1
        if self.steps == WARMUP:
            self.start = now(self.device, self.clock)

    def seconds(self) -> float:
        """Return the seconds a step."""
        assert self.steps > WARMUP
        return (now(self.device, self.clock) - self.start) / (self.steps - WARMUP)

    def set_postfix(self, **_) -> None:
        pass

    def set_description_str(self, *_, **__) -> None:
        pass


def our_step(cfg: Config, device: torch.device, cache: Cache, rows: np.ndarray, clock: Clock) -> float:
    """Train for an epoch of the rows; return the seconds a step."""
    data = TrainingData(-1, cache, rows, rows[:0], None)
    trainer = Trainer(cfg, new_model(cfg, device), Ranks(0, 1, device), data)
    timer = StepTimer(device, clock)
    trainer.train_epoch(0, timer)
    return timer.seconds()


def mmseg_step(cfg: Config, device: torch.device, cache: Cache, rows: np.ndarray, clock: Clock) -> float:
    """Train on the same samples as mmsegmentation does; return the seconds a step."""
    timer = StepTimer(device, clock)
    for _ in mmseg_steps(cfg, device, cache, rows):
        timer.update()
    return timer.seconds()


def mmseg_steps(cfg: Config, device: torch.device, cache: Cache, rows: np.ndarray) -> Iterator[None]:
    """Train on an epoch of the rows as mmsegmentation does; yield after each step."""
    model = plain_model(cfg, device).train()
    is_cuda = device.type == 'cuda'
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg), foreach=is_cuda, fused=False)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == 'fp16')
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(cfg.ema)) if cfg.ema else None
    sampler = EpochSampler(cfg.batch_size, cfg.seed)
    sampler.set_epoch(0, range(len(rows)))
    loader = make_loader(TrainingSet(cfg, cache, rows, model.fill), cfg.workers, batch_sampler=sampler)
    options = {'label_smoothing': cfg.label_smoothing, 'class_weights': cfg.class_weights}
    for images, masks, _ in loader:
        inputs = normalize(images.to(device, non_blocking=True), model.mean, model.std).contiguous()
        with autocast(cfg, device):
            outputs = model(inputs)
        loss = segmentation_loss(outputs, masks.to(device), model.loss_weights, cfg.loss, **options)
        loss.item()
        scaler.scale(loss).backward()
        if cfg.clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        yield


def plain_model(cfg: Config, device: torch.device) -> SegModel:
    """Build a model with the blocks of timm and smp themselves, and attention by matrix products."""
    set_fused_attn(False)
    try:
        model = new_model(cfg, device).to(device)
    finally:
        set_fused_attn(True)
    use_plain_blocks(model.encoder)
    return model


def bench_infer(args: Namespace) -> list[Benchmark]:
    """Predict a batch of four at four scales, each with a flip, down to the ids of a submission."""
    cfg, device = model_config(args).model_copy(update=VIEWS), torch.device(args.device)
    photos = open_cache(cfg, 'train').photos
    images = np.stack([photos[n % len(photos)][: cfg.crop_size, : cfg.crop_size] for n in range(PHOTOS)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def measured(make: Callable[..., Callable[[], None]], amp: str) -> Callable[[], float]:
        changed = cfg.model_copy(update={'amp': amp})
        return lambda: seconds_of(make(changed, images, device), device, clock=args.now)

    ways = {
        'ours': Way(measure=measured(our_loop, cfg.amp)),
        "ttach's plain loop, fp32": Way(measure=measured(ttach_loop, 'off')),
        "ttach's plain loop, autocast": Way(measure=measured(ttach_loop, 'auto'), target=3),
    }
    return [(f'infer {cfg.name}, {PHOTOS} photos x 8 views', ways)]


def our_loop(cfg: Config, images: Tensor, device: torch.device) -> Callable[[], None]:
    """Build a model, as infer.py does; return a function that predicts the ids of a submission."""
    model = new_model(cfg, device).to(device, memory_format=memory_format(cfg)).eval()
    if cfg.compile:
        model.compile(dynamic=True)

    @torch.inference_mode()
    def run() -> None:
        size = (cfg.cache_size, cfg.cache_size)
        probs = Predictor.of(model, cfg).batch(images, size, cfg.downsample)
        finish_mask(decide(probs, cfg), cfg).cpu()

    return run


def ttach_loop(cfg: Config, images: Tensor, device: torch.device) -> Callable[[], None]:
    """Build a model; return a function that predicts view after view with ttach, resizes each and copies it
    to the CPU.
    """
    model = plain_model(cfg, device).eval()
    size = (cfg.cache_size, cfg.cache_size)
    scales = ttach.Scale([0.75, 1, 1.25, 1.5], interpolation='nearest')
    views = ttach.Compose([ttach.HorizontalFlip(), scales])

    @torch.inference_mode()
    def run() -> None:
        total = torch.zeros(())
        for view in views:
            inputs = view.augment_image(normalize(images.to(device), model.mean, model.std))
            inputs = F.pad(inputs, [0, -inputs.shape[-1] % 32, 0, -inputs.shape[-2] % 32])
            with autocast(cfg, device):
                logits = main_logits(model(inputs)).float()
                logits = F.interpolate(logits, inputs.shape[-2:], mode='bilinear')
            total = total + F.interpolate(logits, size, mode='bilinear').softmax(1).cpu()
        total.argmax(1)[:, ::2, ::2]

    return run


def new_model(cfg: Config, device: torch.device) -> SegModel:
    """Free the memory of the model before, and build one."""
    reset_peak(device)
    return build_model(cfg, device)


def build_model(cfg: Config, device: torch.device) -> SegModel:
    """Build a model whose random weights are drawn on its device, seeded by the config."""
    torch.manual_seed(cfg.seed)
    with device:
        return SegModel(cfg, load_weights=False)


def reset_peak(device: torch.device) -> None:
    """Free what is no longer used, and measure the peak from here."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Return the GiB of a GPU's memory at the peak since reset_peak; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30


def seconds_of(
    run: Callable[[], object],
    device: torch.device,
    repeats: int = 1,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the mean seconds of a call, out of some in a row."""
    for _ in range(warmup):
        run()
    began = now(device, clock)
    for _ in range(repeats):
        run()
    return (now(device, clock) - began) / repeats


def now(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return the time once the device has done its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return clock()


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int, repeats: int = 5) -> float:
    """Measure the FLOP/s of a square product."""
    a = torch.randn(side, side, device=device).to(dtype)  # with ones a GPU needs less power, and is faster
    return 2 * side**3 / seconds_of(lambda: a @ a, device, repeats, warmup=3)


def model_config(args: Namespace) -> Config:
    """Load the config, for the device of the command line and the photos of the benchmark."""
    cfg = demo_config(args, 'configs/demo.yaml')
    workers = {'workers': 0} if args.clock == 'cpu' else {}  # the clock does not see the CPU time of others
    return cfg.model_copy(update={'device': args.device, 'accumulate': 1, 'checkpoint_minutes': 0, **workers})
