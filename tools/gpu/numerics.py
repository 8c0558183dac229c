"""Item 2: losses and gradients on CUDA and the CPU, in each precision and layout; fp16; calls that wait.

Dropout is off, and random points are drawn on the CPU, so that all compute the same function.
"""

import warnings
from collections import Counter
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config import Config
from dataset import normalize
from engine.inference import autocast
from losses import segmentation_loss
from models import SegModel
from tools.bench.steps import build_model
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part
from tools.gpu.workload import (
    ENCODERS,
    Batch,
    ShortTrainer,
    device_of,
    encoder_config,
    make_config,
    make_trainer,
    random_batch,
    with_data,
)

SIDE = 128
NETWORKS = {
    'demo': ('demo', {}),
    'ConvNeXt K-Net': ('convnext_knet', {'encoder': 'convnext_atto.d2_in1k', 'head_channels': 128}),
    'Swin-T Mask2Former': ('mask2former_swin', {'encoder': 'swin_tiny_patch4_window7_224.ms_in1k'}),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
# limits of the relative difference of a loss from that in fp32, and of the gradient's norm
SAME, SAME_NORM, BF16, FP16 = 1e-5, 1e-3, 1e-2, 2e-3
STEPS = 30  # in fp16
OVERFLOWING, USUAL = 2.0**40, 2.0**16  # scales of the loss


def parts(options: Options) -> dict[str, Part]:
    """Return the parts of the item."""
    return {
        **{name: partial(compare, name) for name in NETWORKS},
        'encoders': compare_encoders,
        'fp16': train_in_fp16,
        **{f'{name}: synchronising calls': partial(list_syncs, name) for name in NETWORKS},
        'demo: compiled': compare_compiled,
    }


class HostRandom(TorchFunctionMode):
    """Draw torch.rand on the CPU and copy it, so that all devices see the same numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.rand and 'device' in kwargs:
            device = kwargs.pop('device')
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Outcome(NamedTuple):
    """Hold the loss of a batch and its gradient, flat and on the CPU."""

    loss: float
    gradient: Tensor


def relative(value: float, expected: float) -> float:
    """Return the difference of two values, relative to the second."""
    return abs(value - expected) / abs(expected)


def small_config(name: str, options: Options, **more) -> Config:
    """Make the config of one of NETWORKS, without dropout and in fp32."""
    stem, changes = NETWORKS[name]
    side = 64 if options.tiny else SIDE
    settings = {'image_size': side, 'crop_size': side, 'batch_size': 4, 'drop_path': 0, 'amp': 'off'}
    if stem != 'mask2former_swin':  # its head has none
        settings['dropout'] = 0
    return make_config(stem, options, **{**({} if options.tiny else changes), **settings, **more})


def run_step(model: SegModel, cfg: Config, batch: Batch, device: torch.device, memory_format=NHWC) -> Outcome:
    """Compute the loss of a batch and its gradient, on a copy of the model."""
    model, loss = run_forward(model, cfg, batch, device, memory_format)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return Outcome(loss.item(), torch.cat(gradients).cpu())


def run_forward(
    model: SegModel, cfg: Config, batch: Batch, device: torch.device, memory_format=NHWC
) -> tuple[SegModel, Tensor]:
    """Compute the loss of a batch on a copy of the model; return both."""
    model = deepcopy(model).to(device, memory_format=memory_format).train()
    torch.manual_seed(0)
    with HostRandom():
        return model, loss_of(model, cfg, batch, device, memory_format)


def loss_of(model, cfg: Config, batch: Batch, device: torch.device, memory_format=NHWC) -> Tensor:
    """Compute the loss of a batch by a model, compiled or not."""
    images, masks, _ = batch
    inputs = normalize(images.to(device), model.mean, model.std).contiguous(memory_format=memory_format)
    with autocast(cfg, device):
        outputs = model(inputs)
    options = {'class_weights': cfg.class_weights}
    return segmentation_loss(outputs, masks.to(device), model.loss_weights, cfg.loss, **options)


def exact_matmul() -> None:
    """Compute fp32 products in fp32, not in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def compare(name: str, options: Options, report: Report) -> None:
    """Compare a network's loss and gradient between devices, precisions and layouts."""
    exact_matmul()
    cfg, device = small_config(name, options), device_of(options)
    model, batch = build_model(cfg, torch.device('cpu')), random_batch(cfg)
    expected = run_step(model, cfg, batch, torch.device('cpu'), NCHW)
    norm = expected.gradient.norm()
    found = run_step(model, cfg, batch, device)
    label = device.type.upper()
    report.at_most(f'{name}: loss, {label} fp32 against CPU', relative(found.loss, expected.loss), SAME)
    difference = relative(float(found.gradient.norm()), float(norm))
    report.at_most(f'{name}: norm of the gradient, {label} fp32 against CPU', difference, SAME_NORM)
    distance = float((found.gradient - expected.gradient).norm() / norm)
    report.measured(f'{name}: distance of the gradients, of their norm', distance)
    other = run_step(model, cfg, batch, device, NCHW)
    report.at_most(f'{name}: loss, NHWC against NCHW', relative(found.loss, other.loss), SAME)
    for amp, limit in (('bf16', BF16), ('fp16', FP16)):
        with torch.no_grad():
            _, loss = run_forward(model, cfg.model_copy(update={'amp': amp}), batch, device)
        report.at_most(f'{name}: loss, {amp} against fp32', relative(loss.item(), found.loss), limit)


def compare_encoders(options: Options, report: Report) -> None:
    """Compare each family of encoders; several have blocks of their own on a GPU (networks/blocks.py)."""
    exact_matmul()
    device = device_of(options)
    for encoder in ENCODERS[:1] if options.tiny else ENCODERS:
        cfg = encoder_config(encoder, options, amp='off', dropout=0)
        model, batch = build_model(cfg, torch.device('cpu')), random_batch(cfg)
        expected = run_step(model, cfg, batch, torch.device('cpu'))
        found = run_step(model, cfg, batch, device)
        label = f'{encoder}: {{}}, {device.type.upper()} fp32 against CPU'
        report.at_most(label.format('loss'), relative(found.loss, expected.loss), SAME)
        difference = relative(float(found.gradient.norm()), float(expected.gradient.norm()))
        report.at_most(label.format('norm of the gradient'), difference, SAME_NORM)


def compare_compiled(options: Options, report: Report) -> None:
    """Compare the loss of the smallest network compiled and eager."""
    exact_matmul()
    cfg, device = small_config('demo', options), device_of(options)
    model = build_model(cfg, device).to(device, memory_format=NHWC).train()
    batch, compiled = random_batch(cfg), torch.compile(model, backend=backend(options))
    with torch.no_grad():
        eager, found = (loss_of(one, cfg, batch, device).item() for one in (model, compiled))
    report.at_most('demo: loss, compiled against eager', relative(found, eager), SAME)


def backend(options: Options) -> str:
    """Return the compiler: a tiny check only traces, as compiling for a CPU takes minutes."""
    return 'eager' if options.tiny else 'inductor'


def train_in_fp16(options: Options, report: Report) -> None:
    """Train in fp16 through the scaler on one batch: the loss falls, and an overflow is skipped."""
    few = {'image_size': 32, 'crop_size': 32, 'batch_size': 2} if options.tiny else {}  # slow on a CPU
    count = 4 if options.tiny else STEPS
    cfg = small_config('demo', options, amp='fp16', lr=3e-3, warmup_iters=0, **few)
    trainer = make_trainer(with_data(cfg, options, 'fp16'), batches=[random_batch(cfg)] * (count + 2))
    steps = trainer.steps(0)
    for _ in range(count):
        next(steps)
    losses, some = trainer.losses, min(5, count // 2)
    ratio = sum(losses[-some:]) / sum(losses[:some])
    report.at_most(f'fp16: loss of the last {some} of {count} steps over that of the first', ratio, 0.99)
    before = weights(trainer)
    trainer.scaler.update(OVERFLOWING)
    next(steps)
    skipped, scale = torch.equal(weights(trainer), before), trainer.scaler.get_scale()
    report.holds('fp16: a step that overflows is skipped', skipped, f'scale {OVERFLOWING:g} → {scale:g}')
    trainer.scaler.update(USUAL)
    next(steps)
    report.holds('fp16: the run goes on after it', not torch.equal(weights(trainer), before))


def weights(trainer: ShortTrainer) -> Tensor:
    """Return a copy of all weights, flat."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])


def list_syncs(name: str, options: Options, report: Report) -> None:
    """List the calls of a training step that wait for the GPU, with their lines."""
    what = f'{name}: synchronising calls of a step'
    if options.device != 'cuda':
        report.not_applicable(what, 'only CUDA has them')
        return
    cfg = with_data(small_config(name, options, amp='auto', ema=0.99, clip_norm=1), options, 'syncs')
    steps = make_trainer(cfg, batches=[random_batch(cfg)] * 3).steps(0)
    next(steps), next(steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        next(steps)
        torch.cuda.set_sync_debug_mode('default')
    lines = Counter(
        '/'.join(f'{warning.filename}:{warning.lineno}'.split('/')[-2:])
        for warning in caught
        if 'synchronizing' in str(warning.message)
    )
    note = ', '.join(f'{line} x {count}' for line, count in lines.most_common())
    report.measured(what, sum(lines.values()), note=note)
