"""Benchmark training steps and prediction, on the CPU or a GPU."""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import ttach

from config import Config, load_config
from dataset import normalize
from engine.inference import Predictor, autocast, main_logits
from engine.optim import build_optimizer
from losses import segmentation_loss
from models import SegModel
from submission import probs_to_ids
from tools.bench.fixtures import Benchmark, Way, random_masks


def bench_train(args: Namespace) -> list[Benchmark]:
    """Take a training step of a config, and one as in mmsegmentation: NCHW, plain AdamW, not compiled."""
    cfg, device = model_config(args), torch.device(args.device)
    plain = cfg.model_copy(update={'compile': False, 'amp': 'fp16' if device.type == 'cuda' else 'off'})
    way = 'fp16, NCHW, plain AdamW' if device.type == 'cuda' else 'fp32, NCHW, plain AdamW'
    ways = {'ours': Way(training_step(cfg, device, True)), way: Way(training_step(plain, device, False), 1.5)}
    return [(f'train {cfg.name}, a batch of {cfg.batch_size}', ways)]


def training_step(cfg: Config, device: torch.device, as_ours: bool) -> Callable[[], None]:
    """Return a function that does a training step; on a GPU print the peak memory of the first."""
    memory_format = torch.channels_last if as_ours and cfg.channels_last else torch.contiguous_format
    model = SegModel(cfg, load_weights=False).to(device, memory_format=memory_format).train()
    forward = torch.compile(model) if cfg.compile else model
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    optimizer = build_optimizer(model, cfg) if as_ours else plain
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == 'fp16')
    images, masks = sample_batch(cfg, cfg.batch_size)

    def run() -> None:
        inputs = normalize(images.to(device), model.mean, model.std).contiguous(memory_format=memory_format)
        with autocast(cfg, device):
            outputs = forward(inputs)
        loss = segmentation_loss(outputs, masks.to(device), model.loss_weights, cfg.loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == 'cuda':
            torch.cuda.synchronize()

    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f'{"ours" if as_ours else "plain"}: {peak:.2f} GiB at the peak')
    return run


def bench_infer(args: Namespace) -> list[Benchmark]:
    """Predict a batch of four at four scales, each with a flip, down to the ids of a submission."""
    views = {'tta_flips': ('h',), 'tta_scales': (0.75, 1.0, 1.25, 1.5)}
    cfg, device = model_config(args).model_copy(update=views), torch.device(args.device)
    images, _ = sample_batch(cfg, 4)
    model = SegModel(cfg, load_weights=False).to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def ours() -> None:
        size = (cfg.cache_size, cfg.cache_size)
        probs = Predictor.of(model, cfg).batch(images, size, cfg.downsample)
        probs_to_ids(probs, cfg.downsample).cpu()

    ways = {
        'ours': Way(ours),
        "ttach's plain loop, fp32": Way(ttach_loop(model, images, cfg, device, 'off')),
        "ttach's plain loop, autocast": Way(ttach_loop(model, images, cfg, device, 'auto'), 3),
    }
    return [(f'infer {cfg.name}, 4 photos x 8 views', ways)]


def ttach_loop(
    model: SegModel, images: torch.Tensor, cfg: Config, device: torch.device, amp: str
) -> Callable[[], None]:
    """Return a function that predicts view after view with ttach, resizes each and copies it to the CPU."""
    cfg = cfg.model_copy(update={'amp': amp})
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


def model_config(args: Namespace) -> Config:
    """Load the config, for the device of the command line."""
    cfg = load_config(args.cfg or 'configs/demo.yaml', args.set)
    return cfg.model_copy(update={'device': args.device})


def sample_batch(cfg: Config, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images of noise (N, 3, C, C) uint8 and masks (N, C, C), where C is the crop size."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, cfg.crop_size, cfg.crop_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.from_numpy(np.stack(list(random_masks(size, cfg.crop_size, seed=0))))
