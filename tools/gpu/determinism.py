"""Items 3 and 4: equal bits twice with `deterministic: true`, and a resumed run as if it had not stopped."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from config import Config
from engine.distributed import seed_everything
from engine.optim import build_optimizer
from engine.trainer import Trainer
from losses import LOSSES
from models import SegModel
from networks.heads import HEADS
from tools.bench.steps import build_model
from tools.gpu.numerics import loss_of
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part
from tools.gpu.workload import (
    ENCODERS,
    ShortTrainer,
    encoder_config,
    make_config,
    make_trainer,
    network_config,
    random_batch,
    with_data,
)
from utils.errors import Interrupted
from utils.signals import StopRequest

SIDE, STEPS = 128, 5
# those of smp with deterministic operations alone
SMP = ('smp-deeplabv3', 'smp-deeplabv3plus', 'smp-fpn', 'smp-segformer', 'smp-unetplusplus')
VIT = {'encoder': 'vit_tiny_patch16_224', 'neck': 'none'}  # SETR's head takes an encoder of one stride
TERMS = [term for term in LOSSES if term != 'bce']  # bce is for classes that may overlap
STOPPED_AFTER, BATCHES = 3, 6


def determinism_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 3."""
    heads = [*HEADS] if options.tiny else [*HEADS, *SMP]
    encoders = () if options.tiny else ENCODERS
    return {
        'heads': partial(run_all, heads, head_config),
        'losses': partial(run_all, TERMS, loss_config),
        'encoders': partial(run_all, encoders, partial(encoder_config, deterministic=True)),
    }


def head_config(head: str, options: Options) -> Config:
    """Make a config of a head over a small encoder."""
    small = {'head_channels': 64} if head in HEADS else {}
    more = VIT if head == 'setr_naive' else {'encoder': 'test_resnet.r160_in1k'}
    if head in ('smp-deeplabv3', 'smp-deeplabv3plus'):
        more = {'encoder': 'resnet18', 'output_stride': 16}
    if head == 'mask2former':
        small |= {'queries': 8 if options.tiny else 100, 'aux_weight': 0.4}
    return network_config(options, deterministic=True, head=head, **small, **more)


def loss_config(term: str, options: Options) -> Config:
    """Make a config of one term of the loss."""
    small = {'encoder': 'test_resnet.r160_in1k', 'head_channels': 16}
    return network_config(options, deterministic=True, loss={term: 1}, **small)


def run_all(
    names: Sequence[str], config: Callable[[str, Options], Config], options: Options, report: Report
) -> None:
    """Train each of them twice; an operation without a deterministic form is a failure."""
    steps = 2 if options.tiny else STEPS
    for name in names:
        cfg, fault = config(name, options), ''
        try:
            equal = torch.equal(*(train_afresh(cfg, steps) for _ in range(2)))
        except RuntimeError as error:  # of torch.use_deterministic_algorithms
            equal, fault = False, str(error).split('.')[0]
        report.holds(f'{name}: {steps} steps twice, equal bits', equal, fault)
    torch.use_deterministic_algorithms(False)


def train_afresh(cfg: Config, steps: int) -> Tensor:
    """Train a network from its seed on one batch; return its losses and weights, flat."""
    seed_everything(cfg.seed, cfg.deterministic)
    device = torch.device(cfg.device)
    model = build_model(cfg, device).to(device, memory_format=torch.channels_last).train()
    optimizer, batch, losses = build_optimizer(model, cfg), random_batch(cfg), []
    for _ in range(steps):
        loss = loss_of(model, cfg, batch, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.cat([torch.stack(losses), flat_state(model)])


def flat_state(model: SegModel) -> Tensor:
    """Return all weights and statistics of a model, flat."""
    return torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])


def resume_parts(options: Options) -> dict[str, Part]:
    """Return the parts of item 4."""
    names = {'off': 'fp32', 'bf16': 'bf16', 'fp16': 'fp16 with the scaler'}
    return {name: partial(resume, amp, name) for amp, name in names.items()}


def resume(amp: str, name: str, options: Options, report: Report) -> None:
    """Compare a run that was stopped after some batches and resumed with one that was not stopped."""
    side, batch = (32, 4) if options.tiny else (SIDE, 8)
    sizes = {'image_size': side, 'crop_size': side, 'batch_size': batch, 'workers': 0, 'epochs': 1}
    for deterministic in (True, False):
        settings = {'amp': amp, 'ema': 0.9, 'deterministic': deterministic, **sizes}
        cfg = make_config('demo', options, **settings)
        whole = finish(start(cfg, options, f'whole-{amp}-{deterministic}'))
        stop = StopAfter()
        stopped = start(cfg, options, f'stopped-{amp}-{deterministic}', stop)
        stop.trainer = stopped
        with suppress(Interrupted):
            finish(stopped)
        resumed = start(cfg, options, f'stopped-{amp}-{deterministic}')
        resumed.resume(resumed.folder / 'last.pt')
        assert resumed.batch == STOPPED_AFTER, resumed.batch
        finish(resumed)
        label = f'{name}: weights and EMA of a run resumed after {STOPPED_AFTER} batches'
        states = [torch.cat([flat_state(one.model), flat_state(one.averaged)]) for one in (whole, resumed)]
        if deterministic:
            report.holds(f'{label}, deterministic: equal bits', torch.equal(*states))
        else:
            distance = float((states[0] - states[1]).norm() / states[0].norm())
            report.measured(f'{label}, not deterministic: relative distance', distance)


class StopAfter(StopRequest):
    """Ask a trainer to stop once it has done STOPPED_AFTER steps."""

    trainer: Trainer | None = None

    @property
    def asked(self) -> bool:
        return self.trainer is not None and self.trainer.step >= STOPPED_AFTER


def start(cfg: Config, options: Options, name: str, stop: StopRequest | None = None) -> ShortTrainer:
    """Make a trainer on all photos, in a run folder of this name."""
    return make_trainer(with_data(cfg, options, name), fold=-1, stop=stop, steps=BATCHES)


def finish(trainer: ShortTrainer) -> ShortTrainer:
    """Train to the end. Raises Interrupted."""
    with trainer.bar() as bar:
        trainer.train_epoch(trainer.epoch, bar)
    return trainer
