"""The model in training: its optimizer and averages, its steps, and the checkpoints that it resumes from.

A resumed run ends with the same bits as one that was never interrupted: last.pt also holds the random numbers
of each rank and the place within the epoch.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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
from torch.optim.swa_utils import AveragedModel

from config import Config
from data.cache import Cache
from data.extra import Extra
from data.folds import is_held_out
from dataset import EpochSampler, TrainingSet, batches_per_epoch, make_loader, normalize, unpack_masks
from engine.checkpoint import CheckpointWriter, load_checkpoint, load_model_state
from engine.distributed import Ranks
from engine.inference import amp_dtype, autocast
from engine.optim import FiniteBuffers, build_optimizer, lr_factor, update_bn
from losses import segmentation_loss
from models import SegModel, memory_format
from networks.depthwise import depthwise_backward
from submission import metric_of
from utils.errors import BadInput, CheckFailed, Interrupted
from utils.log import log
from utils.progress import Bar
from utils.signals import StopRequest

READ_EVERY = 8  # batches on a GPU, which stands still while losses are read; then a run may stop, too
MIN_SCALE = 1e-4  # of the loss in fp16, below which its gradients vanish; as in fairseq


@dataclass(frozen=True)
class PseudoLabels:
    """Photos of the test cache with a teacher's labels as masks, and the epochs that train on them: all
    (full), the first half, or (pretrain) the first half, on them alone, each half with a learning rate
    schedule of its own.
    """

    cache: Cache
    schedule: Literal['full', 'half', 'pretrain']
    held_out: str | None  # hash of the photos whose labels neither a teacher nor its own teachers saw


@dataclass(frozen=True)
class TrainingData:
    """The photos of one training: the rows of the cache to train on and to validate on."""

    fold: int
    cache: Cache
    train_rows: np.ndarray
    valid_rows: np.ndarray
    held_out: str | None  # hash of the photos whose labels the model never sees; None if it sees all
    pseudo: PseudoLabels | None = None
    extra: tuple[Extra, ...] = ()  # photos of other data roots
    remarks: tuple[str, ...] = ()  # on the photos to validate on

    @property
    def fingerprint(self) -> str:
        """A hash of the annotations of all data roots."""
        if not self.extra:
            return self.cache.coco.fingerprint
        parts = [self.cache.coco.fingerprint, *(extra.cache.coco.fingerprint for extra in self.extra)]
        return hashlib.sha256(' '.join(parts).encode()).hexdigest()


class Trainer:
    """A model in training with all that a checkpoint holds: optimizer, averages, position, best score."""

    def __init__(
        self,
        cfg: Config,
        model: SegModel,
        ranks: Ranks,
        data: TrainingData,
        folder: Path | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """`writer` writes the checkpoints into `folder`, which only rank 0 has."""
        self.cfg, self.ranks, self.data, self.folder = cfg, ranks, data, folder
        self.stop = stop or StopRequest()
        self.pseudo_schedule = data.pseudo.schedule if data.pseudo else 'none'
        if ranks.sync_bn(cfg):
            model = convert_sync_batchnorm(model)  # timm's: torch's drops the activation of BatchNormAct2d
        self.model = model.to(ranks.device, memory_format=memory_format(cfg))
        self.ema = ModelEmaV3(self.model, decay=cfg.ema, use_warmup=True) if cfg.ema else None
        self.swa_epochs = math.ceil(cfg.swa * cfg.epochs - 1e-9)  # .7 * 10 is above 7
        self.swa = AveragedModel(self.model) if self.swa_epochs else None
        self.optimizer = build_optimizer(self.model, cfg)
        fp16 = amp_dtype(cfg, ranks.device) == torch.float16
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        # torch.compile and checkpointing may run a convolution again, outside of this context
        runs_again = cfg.compile or cfg.grad_checkpointing
        dtype = torch.float32 if runs_again else amp_dtype(cfg, ranks.device)
        self.convolutions = depthwise_backward(self.model, dtype)
        self.compiled = torch.compile(self.model) if cfg.compile else self.model
        self.encoder_parameters = [p for p in self.model.encoder.parameters() if p.requires_grad]
        self.is_frozen = False
        self.forward = self.join_ranks()
        pseudo_cache = data.pseudo.cache if data.pseudo else None
        self.samples = TrainingSet(cfg, data.cache, data.train_rows, model.fill, pseudo_cache, data.extra)
        self.sampler = EpochSampler(cfg.batch_size, cfg.seed, ranks.rank, ranks.world)
        self.loader = make_loader(self.samples, cfg.workers, batch_sampler=self.sampler)
        self.total_steps = self.steps_in(range(cfg.epochs))
        pretrain_epochs = cfg.epochs // 2 if self.pseudo_schedule == 'pretrain' else 0
        self.pretrain_steps = self.steps_in(range(pretrain_epochs))
        self.epoch = self.step = 0  # done so far
        self.best, self.best_epoch = math.nan, -1
        self.batch, self.total = 0, 0.0  # done of the current epoch: batches, and the sum of their losses
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # number, loss and positions of the last batches
        self.read_every = READ_EVERY if ranks.device.type == 'cuda' else 1
        self.writer, self.saved_at = CheckpointWriter(), time.monotonic()
        self._score = math.nan

    def join_ranks(self) -> torch.nn.Module:
        """Return the model whose gradients are added up over the ranks: of what has gradients now."""
        if not self.ranks.joined:
            return self.compiled
        devices = [self.ranks.device] if self.ranks.device.type == 'cuda' else None
        return DistributedDataParallel(self.compiled, device_ids=devices)

    @property
    def averaged(self) -> SegModel:
        """The model that is validated and saved as best.pt: the EMA if the config asks for one."""
        return self.ema.module if self.ema is not None else self.model

    @property
    def rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group['lr'] for group in self.optimizer.param_groups]

    @property
    def lr(self) -> float:
        """The current learning rate of neck and head."""
        groups = self.optimizer.param_groups
        return next(group['lr'] for group in groups if group['peak_lr'] == self.cfg.lr)

    def positions_in(self, epoch: int) -> Sequence[int]:
        """Return the positions of an epoch's samples; those from other data roots come last, and are beside
        the clean photos alone.
        """
        own = self.own_positions(epoch)
        if not self.data.extra or own.start:
            return own
        return np.concatenate([own, self.samples.extra_positions(epoch, len(own))])

    def own_positions(self, epoch: int) -> range:
        """Return the positions of an epoch in data_root; pseudo-labelled photos are the last ones."""
        clean, schedule = len(self.data.train_rows), self.pseudo_schedule
        if schedule == 'none' or (schedule != 'full' and epoch >= self.cfg.epochs // 2):
            return range(clean)
        return range(clean if schedule == 'pretrain' else 0, self.samples.own_size)

    def batches_in(self, epochs: range) -> list[int]:
        """Count the batches of each of the epochs."""
        return [batches_per_epoch(len(self.positions_in(epoch)), self.cfg.batch_size) for epoch in epochs]

    def steps_in(self, epochs: range) -> int:
        """Count the optimizer steps of the epochs."""
        return sum(math.ceil(count / self.cfg.accumulate) for count in self.batches_in(epochs))

    def bar(self) -> Bar:
        """Open a bar over the steps of the whole training, from where it is now."""
        quiet = not self.ranks.is_main
        return Bar(quiet=quiet, desc='train', unit='step', total=self.total_steps, initial=self.step)

    def train_epoch(self, epoch: int, bar: Bar) -> float:
        """Train for the rest of an epoch; return its mean loss. Raises CheckFailed and Interrupted."""
        bar.set_description_str(f'epoch {epoch + 1}/{self.cfg.epochs}', refresh=False)
        label = metric_of(self.cfg.competition).label
        score = {} if math.isnan(self._score) else {label: f'{self._score:.3f}'}
        for _ in self.steps(epoch):
            must_stop = self.stop.asked and self.ranks.world == 1  # several ranks stop at the same step
            if len(self.unread) >= self.read_every or must_stop:
                self.read_losses()
                self.save_or_stop()
                bar.set_postfix(loss=f'{self.total / self.batch:.3f}', **score, refresh=False)
            bar.update()
        self.read_losses()
        torch.backends.cudnn.benchmark = False  # photos to validate on may have many shapes
        self.epoch = epoch + 1
        if epoch >= self.cfg.epochs - self.swa_epochs:
            self.swa.update_parameters(self.model)
        mean = torch.tensor(self.total / len(self.sampler) / self.ranks.world, device=self.ranks.device)
        self.batch, self.total = 0, 0.0
        loss = float(self.ranks.sum(mean))
        self.ranks.broadcast(self.averaged)
        return loss

    def steps(self, epoch: int) -> Iterator[int]:
        """Train on an epoch; yield the number of each optimizer step once it is done, its losses unread."""
        accumulate = self.cfg.accumulate
        self.start_epoch(epoch)
        for number, (images, masks, positions) in enumerate(self.loader, start=self.batch):
            first = number // accumulate * accumulate  # batch of this step
            is_last = (number + 1) % accumulate == 0 or number + 1 == len(self.sampler)
            try:
                # the ranks add up their gradients once a step
                with nullcontext() if is_last or not self.ranks.joined else self.forward.no_sync():
                    loss = self.compute_loss(images, masks)
                    self.scaler.scale(loss / min(accumulate, len(self.sampler) - first)).backward()
                self.unread.append((number, loss.detach(), positions))
                if is_last:
                    self.update()
            except torch.OutOfMemoryError:
                raise self.too_large(number) from None
            if is_last:
                self.batch = number + 1
                yield self.step

    def too_large(self, number: int) -> BadInput:
        """Make the error of a batch that does not fit into the GPU's memory."""
        cfg, ranks = self.cfg, self.ranks
        half, odd = divmod(cfg.batch_size, 2)
        changes = [f'a crop_size below {cfg.crop_size}']
        if not odd and half % ranks.world == 0 and half >= ranks.min_batch(cfg):
            changes.insert(0, f'batch_size={half} accumulate={2 * cfg.accumulate}, as many photos a step')
        if not cfg.grad_checkpointing:
            changes.append('grad_checkpointing=true')
        fault = f'the GPU is out of memory in epoch {self.epoch + 1}, batch {number + 1}'
        ways = f'start again with --overwrite and a change by --set: {", or ".join(changes)}'
        return BadInput(f'{fault}; {ways}; or end what else fills it (nvidia-smi), and go on with --resume')

    def read_losses(self) -> None:
        """Add up the losses since the last call. Raises CheckFailed, on all ranks together, if one of them is
        not finite; in fp16, whose scaler skips such a step, once the scale is below MIN_SCALE.
        """
        fault = None
        try:
            self._add_losses()
        except CheckFailed as error:
            fault = error
        if any(self.ranks.any_rank(fault is not None)):
            raise fault or CheckFailed('stopped, for the loss of another rank is not finite')

    def _add_losses(self) -> None:
        losses = torch.stack([loss for _, loss, _ in self.unread]).tolist() if self.unread else []
        for (number, _, positions), loss in zip(self.unread, losses, strict=True):
            if math.isfinite(loss):
                self.total += loss
                continue
            names = ', '.join(self.samples.name(position) for position in positions.tolist())
            fault = f'loss is {loss} in epoch {self.epoch + 1}, batch {number + 1}, on {names}'
            if not self.scaler.is_enabled():
                raise CheckFailed(f'{fault}; try a lower lr, clip_norm=1 or amp=off')
            log.warning(f'warning: {fault}: its step is skipped')
            self.total += self.total / max(1, number)  # it counts as the mean of those before it
        self.unread.clear()
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_SCALE:
            fault = f'gradients are not finite in fp16 even of {self.scaler.get_scale():.0e} times the loss'
            raise CheckFailed(f'{fault}; try a lower lr, clip_norm=1, amp=bf16 or amp=off')

    def start_epoch(self, epoch: int) -> None:
        """Point the loader at an epoch, and log which photos it trains on if that has changed."""
        positions = self.own_positions(epoch)
        if self.data.pseudo and (epoch == 0 or positions != self.own_positions(epoch - 1)):
            count = max(0, positions.stop - len(self.data.train_rows))
            log.info(f'epoch {epoch + 1}: training on {len(positions)} photos, {count} pseudo-labelled')
        self.sampler.set_epoch(epoch, self.positions_in(epoch), start=self.batch)
        self.model.train()
        self.freeze_encoder(epoch)
        self.buffers = FiniteBuffers(self.model) if self.scaler.is_enabled() else None
        torch.backends.cudnn.benchmark = not self.cfg.deterministic  # all batches have one shape

    def freeze_encoder(self, epoch: int) -> None:
        """Freeze the encoder in the first epochs if the config asks for it, and train it afterwards."""
        is_frozen = epoch < self.cfg.freeze_encoder
        if is_frozen != self.is_frozen:
            self.is_frozen = is_frozen
            for parameter in self.encoder_parameters:
                parameter.requires_grad_(not is_frozen)
            self.forward = self.join_ranks()
            log.info(f'epoch {epoch + 1}: the encoder is {"frozen" if is_frozen else "trained, too"}')
        if is_frozen:
            self.model.encoder.eval()

    def compute_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return the loss of (N, C, S, S) images and their masks, (N, S, S) or packed (N, S, S, 2P)."""
        cfg, device = self.cfg, self.ranks.device
        with autocast(cfg, device), self.convolutions:
            outputs = self.forward(self.prepare(images))
        masks = unpack_masks(masks.to(device, non_blocking=True), len(cfg.classes))
        options = {'label_smoothing': cfg.label_smoothing, 'class_weights': cfg.class_weights}
        return segmentation_loss(outputs, masks, self.model.loss_weights, cfg.loss, **options)

    def end_epoch(self, score: float | None, swa_score: float | None = None) -> None:
        """Save last.pt, and a model as best.pt if the config keeps it; raise Interrupted if asked to stop.
        Takes the validation scores of the averaged model and, if there is one, of finish_swa's: nan without
        validation photos, None if this epoch has no validation.
        """
        self._score = math.nan if score is None else score
        if self.ranks.is_main:
            models = [(self.averaged, score)]
            if swa_score is not None:
                models.append((self.swa.module, swa_score))
            for model, score in models:
                if self.is_best(score):
                    self.save_best(model, score)
            if self.cfg.keep == 'last' and self.epoch == self.cfg.epochs:
                self.save_best(*models[-1])
        self.save_or_stop()

    def save_or_stop(self) -> None:
        """Save last.pt if that is due, at the end of the training, or if a rank was asked to stop. Raises
        Interrupted in the last case, and the error of an earlier checkpoint that could not be written.
        """
        self.writer.check()
        every, minutes = self.cfg.checkpoint_minutes, (time.monotonic() - self.saved_at) / 60
        due = minutes >= every if every else self.batch == 0  # between two epochs
        due, asked = self.ranks.any_rank(due and self.ranks.is_main, self.stop.asked)
        is_end = self.epoch == self.cfg.epochs
        if due or asked or is_end:
            self.save()
        if asked and not is_end:
            self.writer.wait()
            self.ranks.wait()  # torchrun ends the others as soon as one has ended
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """Make the error that ends a training that was asked to stop."""
        cause = f'{self.stop.caught.name}: ' if self.stop.caught else ''
        position = f'epoch {self.epoch}'
        if self.batch:
            position = f'batch {self.batch} of {len(self.sampler)} in epoch {self.epoch + 1}'
        return Interrupted(f'{cause}stopped after {position}, with a checkpoint; go on with --resume')

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise (N, C, S, S) images on the model's device, in its memory format."""
        images = normalize(images.to(self.ranks.device, non_blocking=True), self.model.mean, self.model.std)
        return images.contiguous(memory_format=memory_format(self.cfg))

    def update(self) -> None:
        """Step the optimizer at the learning rate of this iteration."""
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
        if self.buffers is not None:
            self.buffers.restore()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.step += 1

    def finish_swa(self) -> SegModel | None:
        """Return the mean of the last epochs' weights, or None before the end (SWA, arXiv:1803.05407)."""
        if self.swa is None or self.epoch < self.cfg.epochs:
            return None
        # one more epoch for its BatchNorm statistics
        self.sampler.set_epoch(self.cfg.epochs, range(len(self.data.train_rows)))
        inputs = (self.prepare(images) for images, *_ in self.loader)
        with autocast(self.cfg, self.ranks.device):
            update_bn(self.swa, inputs)
        self.ranks.broadcast(self.swa.module)
        return self.swa.module

    def metadata(self, score: float) -> dict:
        """Return the entries of a checkpoint that are no weights."""
        return {
            'config': self.cfg.model_dump(mode='json'),
            'fold': self.data.fold,
            'epoch': self.epoch - 1,
            'score': score,
            'held_out': self.data.held_out,
            'torch': str(torch.__version__),
        }

    def is_best(self, score: float | None) -> bool:
        """Tell whether the best model is to be kept, and this score is the best so far, or nan."""
        return self.cfg.keep == 'best' and score is not None and not score <= self.best

    def save_best(self, model: SegModel, score: float) -> None:
        """Save the model as best.pt."""
        self.best, self.best_epoch = score, self.epoch - 1
        self.writer.save(self.folder / 'best.pt', {'model': model.state_dict(), **self.metadata(score)})

    def save(self) -> None:
        """Save last.pt, with the score of the last whole epoch; all ranks have to call it."""
        ranks = self.ranks
        cuda = ranks.device.type == 'cuda'
        by_rank = {
            'totals': ranks.gather(torch.tensor(self.total, dtype=torch.float64)),
            'cpu_rng': ranks.gather(torch.get_rng_state()),
            'cuda_rng': ranks.gather(torch.cuda.get_rng_state()) if cuda else None,
        }
        self.saved_at = time.monotonic()
        if not ranks.is_main:
            return
        resume = {
            'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None,
            'swa': self.swa.state_dict() if self.swa else None,
            'scaler': self.scaler.state_dict(),
            **{key: getattr(self, key) for key in ('step', 'best', 'best_epoch', 'batch')},
            **by_rank,
            'pseudo_schedule': self.pseudo_schedule,
        }
        content = {'model': self.model.state_dict(), **self.metadata(self._score), 'resume': resume}
        self.writer.save(self.folder / 'last.pt', content)

    def resume(self, path: Path) -> None:
        """Continue after the step at which last.pt was written. Raises BadInput."""
        checkpoint = load_checkpoint(path)
        state = checkpoint.get('resume')
        if state is None or 'batch' not in state:
            raise BadInput(f'{path}: cannot be resumed from; expected a last.pt')
        if not is_held_out(checkpoint['held_out'], self.data.cache, self.data.valid_rows):
            raise BadInput(f'{path}: was trained with other folds or teachers; start again with --overwrite')
        schedule = state.get('pseudo_schedule', self.pseudo_schedule)
        if schedule != self.pseudo_schedule:
            schedules = f'the schedule {schedule} of pseudo-labels, now {self.pseudo_schedule}'
            raise BadInput(f'{path}: was trained with {schedules}; start again with --overwrite')
        load_model_state(self.model, checkpoint['model'], path)
        if self.ema is not None:
            load_model_state(self.ema.module, state['ema'], path)
        if self.swa is not None:
            load_model_state(self.swa, state['swa'], path)
        # copied, since mapped tensors would keep the disk space of the file when it is replaced
        self.optimizer.load_state_dict(deepcopy(state['optimizer']))
        if state['scaler']:  # empty unless mixed precision was fp16
            self.scaler.load_state_dict(state['scaler'])
        self.step, self.best, self.best_epoch = state['step'], state['best'], state['best_epoch']
        self.epoch, self._score, self.batch = checkpoint['epoch'] + 1, checkpoint['score'], state['batch']
        best = path.with_name('best.pt')
        # a run that is killed may leave a best.pt of a later epoch
        if best.exists() and (later := load_checkpoint(best))['epoch'] > checkpoint['epoch']:
            self.best, self.best_epoch = later['score'], later['epoch']
        self.restore_rank(state)
        batch = f'batch {self.batch} of epoch {self.epoch + 1}, ' if self.batch else ''
        log.info(f'resumed after epoch {self.epoch}, {batch}step {self.step}')

    def restore_rank(self, state: dict) -> None:
        """Restore this rank's random numbers and loss; with another number of ranks, only the mean loss."""
        rank, world = self.ranks.rank, len(state['cpu_rng'])
        if world != self.ranks.world:
            self.total = float(state['totals'].sum()) / self.ranks.world
            now = self.ranks.world
            log.info(f'the checkpoint is of {world} ranks, now {now}: the run goes on, but not to the bit')
            return
        self.total = float(state['totals'][rank])
        torch.set_rng_state(state['cpu_rng'][rank].clone())  # torch misreads a slice of a tensor
        if state['cuda_rng'] is not None and self.ranks.device.type == 'cuda':
            torch.cuda.set_rng_state(state['cuda_rng'][rank].clone())
