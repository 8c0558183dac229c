"""Stage 1: trains one config on one fold.

    python train.py --cfg configs/convnext.yaml --fold 0
    python train.py --cfg configs/convnext.yaml --fold 0 --resume
    python train.py --cfg configs/convnext.yaml --fold 0 --set epochs=1 batch_size=4
    torchrun --standalone --nproc-per-node=8 train.py --cfg configs/convnext.yaml --fold 0

Writes output/<name>/fold<k>/: best.pt (best validation mIoU), last.pt (to resume from), metrics.csv,
log.txt, config.yaml. --fold -1 trains on everything into output/<name>/all/, where best.pt is the last
epoch's.
"""

import math
import time
from collections.abc import Iterator
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import (
    ArgumentParser,
    BadInput,
    CheckFailed,
    Config,
    add_config_arguments,
    load_config,
    run_script,
)
from convert import is_mmseg
from dataset import (
    Cache,
    EpochBatches,
    TrainingSet,
    held_out_hash,
    make_loader,
    normalize,
    open_cache,
    read_folds,
    split_fold,
    steps_per_epoch,
)
from intervals import interval
from losses import segmentation_loss
from metrics import iou_of_counts, miou_of_counts
from models import SegModel, parameter_groups
from predict import amp_dtype, autocast, evaluate
from utils import (
    Ranks,
    append_metrics,
    check_run,
    hold_run,
    load_checkpoint,
    load_model_state,
    log,
    open_run,
    save_checkpoint,
    seed_everything,
    start_log,
    start_ranks,
)
from weights import load_mmseg, read_state


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


def main(
    cfg: Config, fold: int, resume: bool = False, overwrite: bool = False, pseudo: PseudoRows | None = None
) -> float:
    """Trains, and returns the best validation mIoU (nan where nothing is validated). Raises BadInput and
    CheckFailed.
    """
    ranks = start_ranks(cfg)
    if cfg.batch_size == ranks.world and not ranks.sync_bn(cfg):
        raise BadInput(
            f"config key 'batch_size': found {cfg.batch_size} for {ranks.world} ranks: BatchNorm has no "
            'statistics of one image each; expected 2 or more each'
        )
    if ranks.is_main:
        check_run(cfg, fold, resume, overwrite)
    seed_everything(cfg.seed)
    if ranks.is_main:
        cache = open_cache(cfg, 'train')  # built by one rank, then found by the others
        folds = read_folds(cfg, cache)
    ranks.wait()
    if not ranks.is_main:
        cache = open_cache(cfg, 'train')
        folds = read_folds(cfg, cache)
    train_rows, valid_rows = split_fold(folds, fold)
    if len(train_rows) < ranks.world:
        raise BadInput(f'--fold {fold}: {len(train_rows)} photos are too few for {ranks.world} ranks')
    published = read_state(cfg.weights) if cfg.weights is not None else {}
    is_published = is_mmseg(published)
    start = load_checkpoint(cfg.weights) if cfg.weights is not None and not is_published else None
    teachers = ([pseudo.held_out] if pseudo else []) + ([start['held_out']] if start else [])
    held_out = held_out_hash(cache.names(valid_rows))
    if any(other != held_out for other in teachers):
        held_out = None
        valid_rows = valid_rows[:0]  # a score on labels that the model has seen would be a lie
    resume = resume and (cfg.run_dir(fold) / 'last.pt').exists()
    model = SegModel(cfg, load_weights=not resume)
    if start is not None and not resume:
        load_model_state(model, start['model'], cfg.weights)
    left_out = load_mmseg(model, published, cfg.encoder, cfg.weights) if is_published and not resume else []
    torch.manual_seed(cfg.seed + ranks.rank)  # the same weights on every rank, but not the same dropout
    with hold_run(cfg.run_dir(fold) if ranks.is_main else None):
        folder = open_run(cfg, fold, overwrite) if ranks.is_main else None
        start_log(folder, quiet=not ranks.is_main)
        log.info(first_line(cfg, fold, cache, train_rows, valid_rows))
        if left_out:
            log.info(f'{cfg.weights}: of another number of classes, and left out: {", ".join(left_out)}')
        if pseudo is not None:
            log.info(f'{len(pseudo.cache)} pseudo-labelled photos beside them, schedule {pseudo.schedule}')
        trainer = Trainer(cfg, fold, held_out, model, ranks, cache, train_rows, pseudo)
        rates = [group['peak_lr'] for group in trainer.optimizer.param_groups]
        if min(rates) < max(rates):
            log.info(
                f'learning rates: {min(rates):.1e} to {max(rates):.1e} in {len(rates)} groups of parameters'
            )
        if resume:
            trainer.resume(cfg.run_dir(fold) / 'last.pt')

        def validate(model: SegModel) -> np.ndarray | None:
            return evaluate(model, cache, valid_rows, cfg, ranks) if len(valid_rows) else None

        board = SummaryWriter(str(folder / 'tensorboard'), purge_step=trainer.epoch) if folder else None
        for epoch in range(trainer.epoch, cfg.epochs):
            started = time.monotonic()
            loss = trainer.train_epoch(epoch)
            ranks.share(trainer.averaged)
            counts = validate(trainer.averaged)
            score = score_of(counts)
            if ranks.is_main:
                report_epoch(folder, board, cfg, epoch, trainer, loss, counts, time.monotonic() - started)
                trainer.keep_best(folder, trainer.averaged, score)
            if trainer.swa is not None and epoch == cfg.epochs - 1:
                trainer.finish_swa()
                counts = validate(trainer.swa.module)
                swa_score = score_of(counts)
                if ranks.is_main:
                    shown = '' if counts is None else f': mIoU {interval(counts)}'
                    log.info(f'weights averaged over the last {trainer.swa_epochs} epochs{shown}')
                    trainer.keep_best(folder, trainer.swa.module, swa_score)
            if ranks.is_main:
                trainer.save(folder, score)
            ranks.wait()
        if board is not None:
            board.close()
    if ranks.is_main and len(valid_rows):
        log.info(
            f'best mIoU {trainer.best:.4f} in epoch {trainer.best_epoch}; wrote '
            f'{cfg.run_dir(fold) / "best.pt"}'
        )
        log.info(f'next: python infer.py --cfg {folder / "config.yaml"} --fold {fold} --split oof')
    elif ranks.is_main:
        seen = 'a teacher, or the model it started from, saw their labels'
        why = 'fold -1 trains on all photos' if fold == -1 else seen
        log.info(f'no photos to validate on ({why}); wrote {cfg.run_dir(fold) / "best.pt"}, the last epoch')
    return trainer.best


def score_of(counts: np.ndarray | None) -> float:
    """The mIoU of (n, 3, K) counts; nan where nothing was validated."""
    return math.nan if counts is None else float(miou_of_counts(counts.sum(0)))


def first_line(cfg: Config, fold: int, cache: Cache, train_rows: np.ndarray, valid_rows: np.ndarray) -> str:
    """What is trained on: photos, and how many of the training photos have each class."""
    present = [{a.category_id for a in cache.coco.photos[row].annotations} for row in train_rows]
    counts = [f'{name} {sum(k in ids for ids in present)}' for k, name in enumerate(cfg.classes) if k]
    return f'fold {fold}: {len(train_rows)} train, {len(valid_rows)} valid, classes {", ".join(counts)}'


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
    ) -> None:
        self.cfg, self.fold, self.held_out, self.ranks, self.pseudo = cfg, fold, held_out, ranks, pseudo
        if ranks.sync_bn(cfg):
            model = convert_sync_batchnorm(model)  # timm's: torch's drops the activation of BatchNormAct2d
        memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.model = model.to(ranks.device, memory_format=memory_format)
        self.ema = ModelEmaV3(self.model, decay=cfg.ema, use_warmup=True) if cfg.ema else None
        self.swa_epochs = math.ceil(cfg.swa * cfg.epochs)
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
        fill = tuple(round(255 * value) for value in model.mean)
        self.samples = TrainingSet(cfg, cache, rows, fill, pseudo.cache if pseudo else None)
        self.clean_size = len(rows)
        self.batches = EpochBatches(cfg.batch_size, cfg.seed, ranks.rank, ranks.world)
        self.loader = make_loader(self.samples, cfg.workers, batch_sampler=self.batches)
        self.total_steps = self.updates_in(range(cfg.epochs))
        pretrains = pseudo is not None and pseudo.schedule == 'pretrain'
        self.pretrain_steps = self.updates_in(range(cfg.epochs // 2)) if pretrains else 0
        self.epoch, self.step, self.best, self.best_epoch = 0, 0, math.nan, -1

    @property
    def averaged(self) -> SegModel:
        """The model that is validated and kept: the EMA where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def positions_in(self, epoch: int) -> range:
        """Samples that an epoch draws from: pseudo-labelled ones are the last."""
        if self.pseudo is None or not self.pseudo.used_in(epoch, self.cfg.epochs):
            return range(self.clean_size)
        return range(self.clean_size if self.pseudo.schedule == 'pretrain' else 0, len(self.samples))

    def updates_in(self, epochs: range) -> int:
        """Steps of the optimizer in those epochs."""
        batches = [steps_per_epoch(len(self.positions_in(epoch)), self.cfg.batch_size) for epoch in epochs]
        return sum(math.ceil(number / self.cfg.accumulate) for number in batches)

    def train_epoch(self, epoch: int) -> float:
        """One pass; the mean loss."""
        cfg, device = self.cfg, self.ranks.device
        positions = self.positions_in(epoch)
        if self.pseudo and (epoch == 0 or positions != self.positions_in(epoch - 1)):
            pseudo_labelled = max(0, positions.stop - self.clean_size)
            log.info(f'epoch {epoch}: training on {len(positions)} photos, {pseudo_labelled} pseudo-labelled')
        self.batches.epoch, self.batches.positions = epoch, positions
        self.model.train()
        total = 0.0
        bar = tqdm(
            self.loader,
            desc=f'epoch {epoch}',
            unit='batch',
            leave=False,
            disable=None if self.ranks.is_main else True,
        )
        for number, (images, masks, places) in enumerate(bar):
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
                    f'loss is {value} in epoch {epoch}, step {number}, on {names}; try a lower lr, '
                    'clip_norm=1 or amp=off'
                )
            self.scaler.scale(loss / group_size).backward()
            total += value
            bar.set_postfix(loss=f'{value:.3f}')
            if (number + 1) % cfg.accumulate == 0 or number + 1 == len(self.batches):
                self.update()
        self.epoch = epoch + 1
        if epoch >= cfg.epochs - self.swa_epochs:
            self.swa.update_parameters(self.model)
        mean = torch.tensor(total / len(self.batches) / self.ranks.world, device=device)
        return float(self.ranks.sum(mean))

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

        def inputs() -> Iterator[Tensor]:
            for images, _, _ in self.loader:
                yield self.prepared(images)

        with autocast(self.cfg, self.ranks.device):
            update_bn(inputs(), self.swa)
        self.ranks.share(self.swa.module)

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

    def keep_best(self, folder: Path, model: SegModel, score: float) -> None:
        """Writes best.pt where the model's score is the best so far, or where there is none (nan)."""
        if not score <= self.best:
            self.best, self.best_epoch = score, self.epoch - 1
            save_checkpoint(folder / 'best.pt', {'model': model.state_dict(), **self.public(score)})

    def save(self, folder: Path, score: float) -> None:
        """last.pt, after every epoch, with its score."""
        resume = {
            'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None,
            'swa': self.swa.state_dict() if self.swa else None,
            'scaler': self.scaler.state_dict(),
            'step': self.step,
            'best': self.best,
            'best_epoch': self.best_epoch,
            'cpu_rng': torch.get_rng_state(),
            'cuda_rng': torch.cuda.get_rng_state() if self.ranks.device.type == 'cuda' else None,
        }
        content = {'model': self.model.state_dict(), **self.public(score), 'resume': resume}
        save_checkpoint(folder / 'last.pt', content)

    def resume(self, path: Path) -> None:
        """Goes on after the epoch that last.pt was written at. Raises BadInput."""
        checkpoint = load_checkpoint(path)
        state = checkpoint.get('resume')
        if state is None:
            raise BadInput(f'{path}: cannot be resumed from; expected a last.pt')
        if checkpoint['held_out'] != self.held_out:
            raise BadInput(f'{path}: was trained with other folds or teachers; start again with --overwrite')
        load_model_state(self.model, checkpoint['model'], path)
        if self.ema is not None:
            load_model_state(self.ema.module, state['ema'], path)
        if self.swa is not None:
            load_model_state(self.swa, state['swa'], path)
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:  # empty where mixed precision was bf16 or off
            self.scaler.load_state_dict(state['scaler'])
        self.step, self.best, self.best_epoch = state['step'], state['best'], state['best_epoch']
        self.epoch = checkpoint['epoch'] + 1
        if self.ranks.is_main:
            torch.set_rng_state(state['cpu_rng'])
            if state['cuda_rng'] is not None and self.ranks.device.type == 'cuda':
                torch.cuda.set_rng_state(state['cuda_rng'])
        log.info(f'resumed after epoch {checkpoint["epoch"]}, step {self.step}')


def build_optimizer(model: SegModel, cfg: Config) -> torch.optim.Optimizer:
    """The optimizer over parameter_groups; each group keeps its own peak rate as `peak_lr`. Raises BadInput
    without apex.
    """
    groups = [{**group, 'peak_lr': group['lr']} for group in parameter_groups(model, cfg)]
    if cfg.optimizer == 'adamw':
        return torch.optim.AdamW(groups, fused=True)
    if cfg.optimizer == 'adam':
        return torch.optim.Adam(groups, fused=True)
    if cfg.optimizer == 'sgd':
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise BadInput(
            "config key 'optimizer': apex_fused_adam needs NVIDIA's apex, built from "
            'github.com/NVIDIA/apex with its CUDA extensions '
            "(PyPI's apex is something else); adamw is torch's own fused one"
        ) from None
    return FusedAdam(groups, adam_w_mode=True)


def lr_factor(cfg: Config, step: int, total: int) -> float:
    """The learning rate of an iteration as a share of the way from min_lr to the peak: linear warm-up, then
    the schedule.
    """
    warmup = min(cfg.warmup_iters, total // 10)
    if step < warmup:
        return cfg.warmup_ratio + (1 - cfg.warmup_ratio) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if cfg.schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** cfg.poly_power if cfg.schedule == 'poly' else 1.0


def report_epoch(
    folder: Path,
    board: SummaryWriter,
    cfg: Config,
    epoch: int,
    trainer: Trainer,
    loss: float,
    counts: np.ndarray | None,
    seconds: float,
) -> None:
    """One line in the log, one row in metrics.csv, the curves in TensorBoard; counts (n, 3, K) of the photos
    that were validated.
    """
    lr = max(group['lr'] for group in trainer.optimizer.param_groups)
    row = {'epoch': epoch, 'step': trainer.step, 'lr': f'{lr:.3e}', 'loss': f'{loss:.6f}', 'miou': ''}
    row |= {'miou_low': '', 'miou_high': ''}
    line = f'epoch {epoch + 1}/{cfg.epochs}  loss {loss:.4f}  lr {lr:.2e}'
    board.add_scalar('loss', loss, epoch)
    board.add_scalar('lr', lr, epoch)
    if counts is not None:
        score = interval(counts)
        row['miou'] = f'{score.value:.6f}'
        row |= {'miou_low': f'{score.low:.6f}', 'miou_high': f'{score.high:.6f}'}
        values = iou_of_counts(*counts.sum(0))
        iou = {f'iou_{name}': value for name, value in zip(cfg.classes, values, strict=True)}
        row |= {key: '' if math.isnan(value) else f'{value:.6f}' for key, value in iou.items()}
        line += f'  mIoU {score}'
        board.add_scalar('miou', score.value, epoch)
        for key, value in iou.items():
            board.add_scalar(key, value, epoch)
    append_metrics(folder / 'metrics.csv', row)
    log.info(f'{line}  {seconds:.0f} s')


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--fold', type=int, required=True, help='the fold to validate on; -1 trains on everything'
    )
    parser.add_argument('--resume', action='store_true', help='go on from last.pt, where there is one')
    parser.add_argument(
        '--overwrite', action='store_true', help='start again where the run folder holds a run'
    )
    args = parser.parse_args(argv)
    main(load_config(args.cfg, args.set), args.fold, args.resume, args.overwrite)


if __name__ == '__main__':
    run_script(command)
