"""Stage 1: trains one config on one fold.

    python train.py --cfg configs/convnext.yaml --fold 0
    python train.py --cfg configs/convnext.yaml --fold 0 --dry-run    # its size, memory and time
    python train.py --cfg configs/convnext.yaml --fold 0 --resume
    python train.py --cfg configs/convnext.yaml --fold 0 --set epochs=1 batch_size=4
    torchrun --standalone --nproc-per-node=8 train.py --cfg configs/convnext.yaml --fold 0

Writes output/<name>/fold<k>/: best.pt (best validation mIoU), last.pt (to resume from), metrics.csv,
log.txt, config.yaml, provenance.yaml (what made it). --fold -1 trains on everything into
output/<name>/all/, where best.pt is the last epoch's.
"""

import math
import time
from contextlib import ExitStack

import numpy as np
import torch

from config import Config, load_config
from data.cache import open_cache
from data.folds import held_out_hash, read_folds, split_fold
from engine.checkpoint import load_checkpoint, load_model_state
from engine.distributed import seed_everything, start_ranks
from engine.dry_run import DryTrainer, rehearse
from engine.inference import evaluate
from engine.provenance import compare_provenance, write_provenance
from engine.runs import check_run, lock_run, open_run
from engine.sanity import check_classes, check_epoch, check_first_batch, check_rates
from engine.tracking import Tracking, draw_predictions, require_tracker, start_tracker
from engine.trainer import PseudoRows, Trainer
from metrics import interval, iou_of_counts, miou_of_counts
from models import SegModel
from networks.mmseg import is_mmseg
from networks.pretrained import load_mmseg, read_state
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import BadInput
from utils.log import log, start_log
from utils.progress import gpu_memory
from utils.signals import StopRequest, stop_requests


def main(
    cfg: Config,
    fold: int,
    resume: bool = False,
    overwrite: bool = False,
    pseudo: PseudoRows | None = None,
    dry_run: bool = False,
) -> float:
    """Trains, and returns the best validation mIoU (nan where nothing is validated). dry_run: says what that
    would take, and writes nothing but the cache and the folds. Raises BadInput and CheckFailed.
    """
    ranks = start_ranks(cfg)
    if cfg.batch_size % ranks.world:
        raise BadInput(
            f"config key 'batch_size': found {cfg.batch_size}, expected a multiple of the {ranks.world} ranks"
        )
    if cfg.batch_size == ranks.world and not ranks.sync_bn(cfg):
        raise BadInput(
            f"config key 'batch_size': found {cfg.batch_size} for {ranks.world} ranks: BatchNorm has no "
            'statistics of one image each; expected 2 or more each'
        )
    changes = check_run(cfg, fold, resume, overwrite) if ranks.is_main else []
    if ranks.is_main:
        require_tracker(cfg)
    seed_everything(cfg.seed, cfg.deterministic)
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'train'))
    folds = ranks.main_process_first(lambda: read_folds(cfg, cache))
    train_rows, valid_rows = split_fold(folds, fold)
    needed = ranks.world if ranks.sync_bn(cfg) else 2 * ranks.world  # as with batch_size
    if len(train_rows) < needed:
        raise BadInput(
            f'--fold {fold}: found {len(train_rows)} photos to train on, expected at least {needed}'
        )
    published = read_state(cfg.weights) if cfg.weights is not None else {}
    is_published = is_mmseg(published)
    start = load_checkpoint(cfg.weights) if cfg.weights is not None and not is_published else None
    teachers = ([pseudo.held_out] if pseudo else []) + ([start['held_out']] if start else [])
    held_out = held_out_hash(cache.names(valid_rows))
    if any(other != held_out for other in teachers):
        held_out = None
        valid_rows = valid_rows[:0]  # a score on labels that the model has seen would be a lie
    resume = resume and (cfg.run_dir(fold) / 'last.pt').exists()
    if resume and ranks.is_main:
        changes += compare_provenance(cfg.run_dir(fold), cache.coco.fingerprint)
    model = SegModel(cfg, load_weights=not resume)
    if start is not None and not resume:
        load_model_state(model, start['model'], cfg.weights)
    left_out = load_mmseg(model, published, cfg.encoder, cfg.weights) if is_published and not resume else []
    torch.manual_seed(cfg.seed + ranks.rank)  # the same weights on every rank, but not the same dropout
    with ExitStack() as stack:
        writes = ranks.is_main and not dry_run
        stack.enter_context(lock_run(cfg.run_dir(fold) if writes else None))
        tracker = start_tracker(cfg, fold, resume) if writes else None
        tracking = stack.enter_context(Tracking(cfg, fold, tracker)) if writes else None
        folder = open_run(cfg, fold, overwrite) if writes else None
        start_log(folder, quiet=not ranks.is_main)
        present = [cache.coco.photos[row].classes for row in train_rows]
        log.info(first_line(cfg, fold, present, len(valid_rows)))
        check_classes(present, cfg)
        for change in changes:
            log.warning(f'warning: not as before: {change}')
        for line in model.encoder_report:
            log.info(line)
        if left_out:
            log.info(f'{cfg.weights}: of another number of classes, and left out: {", ".join(left_out)}')
        if pseudo is not None:
            log.info(f'{len(pseudo.cache)} pseudo-labelled photos beside them, schedule {pseudo.schedule}')
        stop = StopRequest() if dry_run else stack.enter_context(stop_requests())
        kind = DryTrainer if dry_run else Trainer
        trainer = kind(cfg, fold, held_out, model, ranks, cache, train_rows, pseudo, stop, folder)
        rates = [group['peak_lr'] for group in trainer.optimizer.param_groups]
        if min(rates) < max(rates) or dry_run:
            log.info(
                f'learning rates: {min(rates):.1e} to {max(rates):.1e} in {len(rates)} groups of parameters'
            )
        if resume:
            trainer.resume(cfg.run_dir(fold) / 'last.pt')
        if writes:
            write_provenance(folder, cache.coco.fingerprint, ranks.world)
        if ranks.is_main:
            check_first_batch(trainer.model, trainer.samples, cfg, ranks.device, trainer.positions_in(0))
        if dry_run:
            rehearse(trainer, len(valid_rows))
            log.info(f'dry run: nothing was written to {cfg.run_dir(fold)}')
            return math.nan

        def validate(model: SegModel) -> np.ndarray | None:
            return evaluate(model, cache, valid_rows, cfg, ranks) if len(valid_rows) else None

        before = rates = None  # what was counted, and the learning rates, an epoch ago
        if writes:
            tracking.start(trainer.epoch)
        bar = stack.enter_context(trainer.bar())
        for epoch in range(trainer.epoch, cfg.epochs):
            started = time.monotonic()
            loss = trainer.train_epoch(epoch, bar)
            rates = check_rates([group['lr'] for group in trainer.optimizer.param_groups], rates, epoch, cfg)
            ranks.broadcast(trainer.averaged)
            counts = validate(trainer.averaged)
            trainer.score = score_of(counts)
            if counts is not None:
                check_epoch(counts, before, cfg)
                before = counts
            if ranks.is_main:
                seconds = time.monotonic() - started
                log.info(epoch_line(cfg, trainer, loss, counts, seconds, bar.left()))
                tracking.log(epoch_values(cfg, trainer, loss, counts))
                if counts is not None and tracking.wants_picture(epoch):
                    shown = draw_predictions(trainer.averaged, cache, valid_rows, cfg, ranks.device)
                    tracking.picture(shown, epoch)
                bar.show(mIoU=f'{trainer.score:.3f}')
                trainer.keep_best(trainer.averaged, trainer.score)
            if trainer.swa is not None and epoch == cfg.epochs - 1:
                trainer.finish_swa()
                counts = validate(trainer.swa.module)
                swa_score = score_of(counts)
                if ranks.is_main:
                    shown = '' if counts is None else f': mIoU {interval(counts)}'
                    log.info(f'weights averaged over the last {trainer.swa_epochs} epochs{shown}')
                    trainer.keep_best(trainer.swa.module, swa_score)
            trainer.save()
            if epoch < cfg.epochs - 1:
                trainer.stop_if_asked()
    if ranks.is_main and len(valid_rows):
        log.info(
            f'best mIoU {trainer.best:.4f} in epoch {trainer.best_epoch + 1}; wrote '
            f'{cfg.run_dir(fold) / "best.pt"}'
        )
        log.info(next_line('infer.py', '--cfg', folder / 'config.yaml', '--fold', fold, '--split', 'oof'))
    elif ranks.is_main:
        seen = 'a teacher, or the model it started from, saw their labels'
        why = 'fold -1 trains on all photos' if fold == -1 else seen
        log.info(f'no photos to validate on ({why}); wrote {cfg.run_dir(fold) / "best.pt"}, the last epoch')
        if (cfg.data_root / 'test.json').is_file():
            log.info(
                next_line('infer.py', '--cfg', folder / 'config.yaml', '--fold', fold, '--split', 'test')
            )
    return trainer.best


def score_of(counts: np.ndarray | None) -> float:
    """The mIoU of (n, 3, K) counts; nan where nothing was validated."""
    return math.nan if counts is None else float(miou_of_counts(counts.sum(0)))


def first_line(cfg: Config, fold: int, present: list[set[int]], valid: int) -> str:
    """What is trained on: photos, and how many of the training photos have each class."""
    counts = [f'{name} {sum(k in ids for ids in present)}' for k, name in enumerate(cfg.classes) if k]
    return f'fold {fold}: {len(present)} train, {valid} valid, classes {", ".join(counts)}'


def epoch_line(
    cfg: Config, trainer: Trainer, loss: float, counts: np.ndarray | None, seconds: float, left: str
) -> str:
    """What an epoch came to, always in this order; counts (n, 3, K) of the photos that were validated."""
    lr = max(group['lr'] for group in trainer.optimizer.param_groups)
    score = '-' if counts is None else interval(counts)
    parts = [
        f'epoch {trainer.epoch:>{len(str(cfg.epochs))}}/{cfg.epochs}',
        f'loss {loss:.4f}',
        f'mIoU {score}',
    ]
    parts += [f'lr {lr:.2e}', f'{seconds:.0f} s', left, gpu_memory()]
    parts += ['best'] if counts is not None and not trainer.score <= trainer.best else []
    return '  '.join(part for part in parts if part)


def epoch_values(cfg: Config, trainer: Trainer, loss: float, counts: np.ndarray | None) -> dict[str, float]:
    """A row of metrics.csv; nan for what is not known. Counts (n, 3, K) of the photos that were validated."""
    lr = max(group['lr'] for group in trainer.optimizer.param_groups)
    values = {'epoch': trainer.epoch - 1, 'step': trainer.step, 'lr': lr, 'loss': loss}
    if counts is None:
        return {**values, 'miou': math.nan, 'miou_low': math.nan, 'miou_high': math.nan}
    score = interval(counts)
    values |= {'miou': score.value, 'miou_low': score.low, 'miou_high': score.high}
    iou = iou_of_counts(*counts.sum(0))
    return values | {f'iou_{name}': float(value) for name, value in zip(cfg.classes, iou, strict=True)}


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
    parser.add_argument(
        '--dry-run', action='store_true', help='say what it would take, from a few steps, and write no run'
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.cfg, args.set)
    main(cfg, args.fold, args.resume, args.overwrite, dry_run=args.dry_run)
    if args.dry_run:
        flags = [f'--{name}' for name in ('resume', 'overwrite') if getattr(args, name)]
        log.info(next_line('train.py', '--fold', args.fold, *flags, cfg=args.cfg, changes=args.set))


if __name__ == '__main__':
    run_script(command)
