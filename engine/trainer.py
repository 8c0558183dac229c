"""The model in training: its optimizer, averages, position, and the checkpoints that bring all of them back.

    trainer = Trainer(cfg, fold, held_out, model, ranks, cache, rows, pseudo, stop, folder)
    with trainer.bar() as bar:
        loss = trainer.train_epoch(epoch, bar)

Resumed from last.pt, a run goes on to the bit: the weights and everything that changes them are in it, the
state of every rank's random numbers and the place in the epoch as well.
"""

import math
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn

from config import Config
from data.cache import Cache
from dataset import EpochBatches, TrainingSet, make_loader, normalize, steps_per_epoch
from engine.checkpoint import load_checkpoint, load_model_state, save_checkpoint
from engine.distributed import Ranks
from engine.inference import amp_dtype, autocast
from engine.optim import build_optimizer, lr_factor
from losses import segmentation_loss
from models import SegModel
from utils.errors import BadInput, CheckFailed, Interrupted
from utils.log import log
from utils.progress import Bar
from utils.signals import StopRequest


@dataclass(frozen=True)
class PseudoRows:
    """Photos of the test cache with a teacher's labels as masks, and when to train on them.

    full: in every epoch. half: in the first half of the epochs; the second half sees clean labels alone.
    pretrain: they alone in the first half, clean labels alone in the second, each with its own warm-up and
    schedule of the learning rate.
    """

    cache: Cache
    schedule: Literal['full', 'half', 'pretrain']
    held_out: str | None  # hash of the photos whose labels no teacher ever saw, nor its own teachers

    def used_in(self, epoch: int, epochs: int) -> bool:
        return self.schedule == 'full' or epoch < epochs // 2


class Trainer:
    """The model in training, with all that a checkpoint has to hold: optimizer, average, scaler, position,
    best score.
    """

    def __init__(
        self,
        cfg: Config,
        fold: int,
        held_out: str | None,
        model: SegModel,
        ranks: Ranks,
        cache: Cache,
        rows: np.ndarray,
        pseudo: PseudoRows | None,
        stop: StopRequest,
        folder: Path | None,
    ) -> None:
        """`folder` is where checkpoints are written: the run's, None on ranks above 0."""
        self.stop, self.folder, self.saved_at = stop, folder, time.monotonic()
        self.cfg, self.fold, self.held_out, self.ranks, self.pseudo = cfg, fold, held_out, ranks, pseudo
        self.pseudo_schedule = pseudo.schedule if pseudo else 'none'
        if ranks.sync_bn(cfg):
            model = convert_sync_batchnorm(model)  # timm's: torch's drops the activation of BatchNormAct2d
        memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.model = model.to(ranks.device, memory_format=memory_format)
        self.ema = ModelEmaV3(self.model, decay=cfg.ema, use_warmup=True) if cfg.ema else None
        self.swa_epochs = math.ceil(cfg.swa * cfg.epochs - 1e-9)  # .7 * 10 is above 7
        self.swa = AveragedModel(self.model) if self.swa_epochs else None
        self.optimizer = build_optimizer(self.model, cfg)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, enabled=amp_dtype(cfg, ranks.device) == torch.float16
        )
        self.forward = torch.compile(self.model) if cfg.compile else self.model
        if ranks.world > 1:
            self.forward = DistributedDataParallel(
                self.forward, device_ids=[ranks.device] if ranks.device.type == 'cuda' else None
            )
        self.samples = TrainingSet(cfg, cache, rows, model.fill, pseudo.cache if pseudo else None)
        self.clean_size = len(rows)
        self.batches = EpochBatches(cfg.batch_size, cfg.seed, ranks.rank, ranks.world)
        self.loader = make_loader(self.samples, cfg.workers, batch_sampler=self.batches)
        self.total_steps = self.updates_in(range(cfg.epochs))
        pretrain_epochs = range(cfg.epochs // 2 if self.pseudo_schedule == 'pretrain' else 0)
        self.pretrain_steps = self.updates_in(pretrain_epochs)
        self.epoch, self.step, self.score, self.best, self.best_epoch = 0, 0, math.nan, math.nan, -1
        self.batch, self.total = 0, 0.0  # of the epoch in hand: batches done, and the sum of their losses

    @property
    def averaged(self) -> SegModel:
        """The model that is validated and kept: the EMA where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def positions_in(self, epoch: int) -> range:
        """Samples that an epoch draws from: pseudo-labelled ones are the last."""
        if self.pseudo is None or not self.pseudo.used_in(epoch, self.cfg.epochs):
            return range(self.clean_size)
        return range(self.clean_size if self.pseudo_schedule == 'pretrain' else 0, len(self.samples))

    def batches_in(self, epochs: range) -> list[int]:
        """Batches of each of those epochs."""
        return [steps_per_epoch(len(self.positions_in(epoch)), self.cfg.batch_size) for epoch in epochs]

    def updates_in(self, epochs: range) -> int:
        """Steps of the optimizer in those epochs."""
        return sum(math.ceil(number / self.cfg.accumulate) for number in self.batches_in(epochs))

    def bar(self) -> Bar:
        """The progress of all epochs, from where the run is."""
        total, done = (sum(self.batches_in(range(n))) for n in (self.cfg.epochs, self.epoch))
        return Bar('train', 'batch', total, done + self.batch, quiet=not self.ranks.is_main)

    def train_epoch(self, epoch: int, bar: Bar) -> float:
        """One pass, or what is left of it; the mean loss. Raises CheckFailed, and Interrupted after a
        checkpoint.
        """
        cfg, device = self.cfg, self.ranks.device
        positions = self.positions_in(epoch)
        if self.pseudo and (epoch == 0 or positions != self.positions_in(epoch - 1)):
            pseudo_labelled = max(0, positions.stop - self.clean_size)
            log.info(
                f'epoch {epoch + 1}: training on {len(positions)} photos, {pseudo_labelled} pseudo-labelled'
            )
        self.batches.epoch, self.batches.positions, self.batches.start = epoch, positions, self.batch
        self.model.train()
        bar.desc = f'epoch {epoch + 1}/{cfg.epochs}'
        for number, (images, masks, places) in enumerate(self.loader, start=self.batch):
            group_size = min(cfg.accumulate, len(self.batches) - number // cfg.accumulate * cfg.accumulate)
            with autocast(cfg, device):
                outputs = self.forward(self.prepared(images))
            loss = segmentation_loss(
                outputs,
                masks.to(device, non_blocking=True),
                self.model.loss_weights,
                cfg.loss,
                label_smoothing=cfg.label_smoothing,
                class_weights=cfg.class_weights,
            )
            value = loss.item()
            if not math.isfinite(value):
                names = ', '.join(self.samples.name(position) for position in places.tolist())
                raise CheckFailed(
                    f'loss is {value} in epoch {epoch + 1}, batch {number + 1}, on {names}; try a lower lr, '
                    'clip_norm=1 or amp=off'
                )
            self.scaler.scale(loss / group_size).backward()
            self.total += value
            if (number + 1) % cfg.accumulate == 0 or number + 1 == len(self.batches):
                self.update()
                self.batch = number + 1
                self.save_or_stop()
            bar.step(loss=f'{self.total / (number + 1):.3f}')
        self.epoch = epoch + 1
        if epoch >= cfg.epochs - self.swa_epochs:
            self.swa.update_parameters(self.model)
        mean = torch.tensor(self.total / len(self.batches) / self.ranks.world, device=device)
        self.batch, self.total = 0, 0.0
        return float(self.ranks.sum(mean))

    def save_or_stop(self) -> None:
        """A checkpoint where one is due or some rank was asked to stop. Raises Interrupted."""
        minutes = (time.monotonic() - self.saved_at) / 60
        due = self.ranks.is_main and 0 < self.cfg.checkpoint_minutes <= minutes
        due, asked = self.ranks.any_rank(due, self.stop.asked)
        if due or asked:
            self.save()
        if asked:
            self.ranks.wait()  # torchrun ends the others as soon as one has ended
            raise self.interrupted()

    def stop_if_asked(self) -> None:
        """Raises Interrupted where some rank was asked to stop; nothing has changed since the checkpoint."""
        if self.ranks.any_rank(self.stop.asked)[0]:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        cause = f'{self.stop.caught.name}: ' if self.stop.caught else ''
        where = f'batch {self.batch} of {len(self.batches)} in epoch {self.epoch + 1}'
        where = where if self.batch else f'epoch {self.epoch}'
        return Interrupted(f'{cause}stopped after {where}, with a checkpoint; go on with --resume')

    def prepared(self, images: Tensor) -> Tensor:
        """(N, 3, C, C) uint8 → what the model takes, on its device."""
        images = normalize(images.to(self.ranks.device, non_blocking=True), self.model.mean, self.model.std)
        memory_format = torch.channels_last if self.cfg.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=memory_format)

    def update(self) -> None:
        """One step of the optimizer, at the rate of this iteration."""
        start, end = self.pretrain_steps, self.total_steps
        if self.step < self.pretrain_steps:
            start, end = 0, self.pretrain_steps
        factor = lr_factor(self.cfg, self.step - start, end - start)
        for group in self.optimizer.param_groups:
            floor = min(self.cfg.min_lr, group['peak_lr'])
            group['lr'] = floor + (group['peak_lr'] - floor) * factor
        if self.cfg.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.step += 1

    def finish_swa(self) -> None:
        """Gives the average of the weights BatchNorm statistics of its own, over one more epoch of training
        samples (Izmailov et al., arXiv:1803.05407, section 3.2).
        """
        self.batches.epoch, self.batches.positions = self.cfg.epochs, range(self.clean_size)
        self.batches.start = 0

        def inputs() -> Iterator[Tensor]:
            for images, _, _ in self.loader:
                yield self.prepared(images)

        with autocast(self.cfg, self.ranks.device):
            update_bn(inputs(), self.swa)
        self.ranks.broadcast(self.swa.module)

    def public(self, score: float) -> dict:
        """What every checkpoint says of itself."""
        return {
            'config': self.cfg.model_dump(mode='json'),
            'fold': self.fold,
            'epoch': self.epoch - 1,
            'score': score,
            'held_out': self.held_out,
            'torch': str(torch.__version__),
        }

    def keep_best(self, model: SegModel, score: float) -> None:
        """Writes best.pt where the model's score is the best so far, or where there is none (nan)."""
        if not score <= self.best:
            self.best, self.best_epoch = score, self.epoch - 1
            save_checkpoint(self.folder / 'best.pt', {'model': model.state_dict(), **self.public(score)})

    def save(self) -> None:
        """last.pt, with the score of the last whole epoch; all ranks together."""
        ranks = self.ranks
        cuda = ranks.device.type == 'cuda'
        cpu_rng = ranks.gather(torch.get_rng_state())
        cuda_rng = ranks.gather(torch.cuda.get_rng_state()) if cuda else None
        totals = ranks.gather(torch.tensor(self.total, dtype=torch.float64))
        self.saved_at = time.monotonic()
        if not ranks.is_main:
            return
        resume = {
            'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None,
            'swa': self.swa.state_dict() if self.swa else None,
            'scaler': self.scaler.state_dict(),
            'step': self.step,
            'best': self.best,
            'best_epoch': self.best_epoch,
            'batch': self.batch,
            'totals': totals,
            'cpu_rng': cpu_rng,
            'cuda_rng': cuda_rng,
            'pseudo_schedule': self.pseudo_schedule,
        }
        content = {'model': self.model.state_dict(), **self.public(self.score), 'resume': resume}
        save_checkpoint(self.folder / 'last.pt', content)

    def resume(self, path: Path) -> None:
        """Goes on after the step that last.pt was written at. Raises BadInput."""
        checkpoint = load_checkpoint(path)
        state = checkpoint.get('resume')
        if state is None or 'batch' not in state:
            raise BadInput(f'{path}: cannot be resumed from; expected a last.pt')
        if checkpoint['held_out'] != self.held_out:
            raise BadInput(f'{path}: was trained with other folds or teachers; start again with --overwrite')
        if (found := state.get('pseudo_schedule', self.pseudo_schedule)) != self.pseudo_schedule:
            raise BadInput(
                f'{path}: was trained with the schedule {found} of pseudo-labels, '
                f'now {self.pseudo_schedule}; start again with --overwrite'
            )
        load_model_state(self.model, checkpoint['model'], path)
        if self.ema is not None:
            load_model_state(self.ema.module, state['ema'], path)
        if self.swa is not None:
            load_model_state(self.swa, state['swa'], path)
        # a copy: tensors that stay mapped would keep the room of a file that is replaced
        self.optimizer.load_state_dict(deepcopy(state['optimizer']))
        if state['scaler']:  # empty where mixed precision was bf16 or off
            self.scaler.load_state_dict(state['scaler'])
        self.step, self.best, self.best_epoch = state['step'], state['best'], state['best_epoch']
        self.epoch = checkpoint['epoch'] + 1
        self.score, self.batch = checkpoint['score'], state['batch']
        if len(state['cpu_rng']) == self.ranks.world:
            self.total = float(state['totals'][self.ranks.rank])
            torch.set_rng_state(
                state['cpu_rng'][self.ranks.rank].clone()
            )  # torch misreads a part of a tensor
            if state['cuda_rng'] is not None and self.ranks.device.type == 'cuda':
                torch.cuda.set_rng_state(state['cuda_rng'][self.ranks.rank].clone())
        else:
            self.total = float(state['totals'].sum()) / self.ranks.world
            ranks = f'{len(state["cpu_rng"])} ranks, now {self.ranks.world}'
            log.info(f'the checkpoint is of {ranks}: the run goes on, but not to the bit')
        where = f'batch {self.batch} of epoch {self.epoch + 1}, ' if self.batch else ''
        log.info(f'resumed after epoch {checkpoint["epoch"] + 1}, {where}step {self.step}')
