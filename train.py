"""Stage 1: train one config on one fold.

    python train.py --cfg configs/convnext.yaml --fold 0
    python train.py --cfg configs/convnext.yaml --fold 0 --dry-run    # parameters, memory and time
    python train.py --cfg configs/convnext.yaml --fold 0 --resume
    python train.py --cfg configs/convnext.yaml --fold 0 --set epochs=1 batch_size=4
    torchrun --standalone --nproc-per-node=8 train.py --cfg configs/convnext.yaml --fold 0

Writes best.pt (of the epoch with the best validation score, or with keep=last of the last one), last.pt (to
resume from), metrics.csv, log.txt, config.yaml and provenance.yaml into output/<name>/fold<k>/, or with
--fold -1 into output/<name>/all/, where best.pt is the last epoch's.
"""

import argparse
import math
import time
from contextlib import ExitStack
from pathlib import Path

from config import Config, load_config, make_config
from utils.cli import (
    ArgumentParser,
    add_training_arguments,
    next_line,
    parse_early,
    run_script,
)


def read_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line and the config that it names."""
    parser = ArgumentParser(__doc__)
    add_training_arguments(parser)
    parser.add_argument('--dry-run', action='store_true', help='run a few steps to estimate memory and time')
    args = parser.parse_args(argv)
    return args, load_config(args.cfg, args.set)


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch

from data.cache import open_cache, with_statistics
from data.extra import open_extra
from data.folds import (
    describe_split,
    folds_path,
    held_out_hash,
    is_held_out,
    read_folds,
    read_pairs,
    split_fold,
)
from engine.checkpoint import current_names, is_checkpoint, load_checkpoint, load_model_state
from engine.distributed import Ranks, seed_everything, start_ranks
from engine.dry_run import estimate_cost
from engine.hub import find_models
from engine.inference import Evaluation
from engine.probe import fit_probe
from engine.provenance import compare_provenance, write_provenance
from engine.runs import (
    FoldRun,
    check_run,
    describe_replaced,
    lock_run,
    open_run,
    read_metrics,
)
from engine.sanity import check_classes, check_epoch, check_first_batch
from engine.tracking import EpochResult, Tracking, draw_predictions, require_tracker, score_of, start_tracker
from engine.trainer import PseudoLabels, Trainer, TrainingData
from models import SegModel
from networks.pretrained import adapt_bands, find_mmseg, load_mmseg, load_whole_or_encoder, read_groups
from submission import metric_of
from utils.errors import BadInput, plural
from utils.log import log, start_log
from utils.progress import gpu_memory
from utils.signals import StopRequest, stop_requests

MANY_CLASSES, FEW_CLASSES = 20, 5  # above so many, so many of the commonest are named
ROUNDING = 1e-6  # of the scores in metrics.csv


def main(
    cfg: Config,
    fold: int,
    resume: bool = False,
    overwrite: bool = False,
    pseudo: PseudoLabels | None = None,
    dry_run: bool = False,
) -> float:
    """Train a fold and return the validation score of its best.pt (nan without one); a dry run only estimates
    the cost. Raises BadInput and CheckFailed.
    """
    ranks = start_ranks(cfg)
    if resume and not dry_run and (score := finished_score(cfg, fold)) is not None:
        return score
    check_batch(cfg, ranks)
    changes = check_run(cfg, fold, resume, overwrite) if ranks.is_main else []
    if resume and dry_run and (score := finished_score(cfg, fold)) is not None:
        return score
    require_tracker(cfg)
    seed_everything(cfg.seed, cfg.deterministic)
    start = load_start(cfg, fold)
    data = load_data(cfg, fold, ranks, start, pseudo)
    cfg = with_statistics(cfg, data.cache)
    if ranks.is_main:
        check_run(cfg, fold, resume, overwrite)  # with the mean and std of the photos as they are now
    resume = resume and has_checkpoint(cfg, fold, ranks)
    if resume and ranks.is_main:
        changes += compare_provenance(cfg.run_dir(fold), data.fingerprint)
    model, notes = build_model(cfg, None if resume else start, resume)
    torch.manual_seed(cfg.seed + ranks.rank)  # the ranks share their first weights, but not their dropout
    with ExitStack() as stack:
        folder, tracking = cfg.run_dir(fold) if ranks.is_main and not dry_run else None, None
        if folder:
            stack.enter_context(lock_run(folder))
            tracking = stack.enter_context(Tracking(cfg, fold, start_tracker(cfg, fold, resume)))
            open_run(cfg, fold, overwrite)
        start_log(folder, quiet=not ranks.is_main)
        log_header(cfg, data, changes, notes)
        stop = StopRequest() if dry_run else stack.enter_context(stop_requests())
        if model.probe is not None and not (resume or dry_run):
            model.to(ranks.device)
            count = fit_probe(model, data.cache, data.train_rows, cfg)
            log.info(f'the probe of the encoder was fitted to {plural(count, "photo")}')
        trainer = Trainer(cfg, model, ranks, data, folder, stop)
        if resume:
            trainer.resume(cfg.run_dir(fold) / 'last.pt')
        if folder:
            write_provenance(folder, data.fingerprint, ranks.world)
        if ranks.is_main:
            check_first_batch(trainer.model, trainer.samples, cfg, ranks.device, trainer.positions_in(0))
        if dry_run:
            estimate_cost(trainer)
            return math.nan
        train_epochs(trainer, tracking)
    log_end(cfg, trainer)
    return trainer.best


def check_batch(cfg: Config, ranks: Ranks) -> None:
    """Raise BadInput if the batch cannot be shared by the ranks."""
    found = f"config key 'batch_size': found {cfg.batch_size}"
    if cfg.batch_size % ranks.world:
        raise BadInput(f'{found}, expected a multiple of the {ranks.world} ranks')
    if cfg.batch_size < ranks.min_batch(cfg):
        cause = 'BatchNorm has no statistics of one image each; expected 2 or more each'
        raise BadInput(f'{found} for {ranks.world} ranks: {cause}')


def finished_score(cfg: Config, fold: int) -> float | None:
    """Return the score of a run that has ended, and whose last.pt was removed since; None for any other."""
    folder = cfg.run_dir(fold)
    if (folder / 'last.pt').exists() or not (folder / 'best.pt').exists():
        return None
    run = FoldRun(fold, folder, cfg, read_metrics(folder / 'metrics.csv', cfg.competition.metric))
    score = load_checkpoint(folder / 'best.pt')['score']
    if len(run.metrics) < cfg.epochs or score < run.score - ROUNDING:  # it was killed before the last best.pt
        return None
    print(f'{folder}: has ended, with {cfg.epochs} epochs in metrics.csv; its last.pt is gone')
    return score


def has_checkpoint(cfg: Config, fold: int, ranks: Ranks) -> bool:
    """Tell whether there is a last.pt to resume from. Raises BadInput if only some of the ranks see it."""
    path = cfg.run_dir(fold) / 'last.pt'
    present, absent = ranks.any_rank(path.exists(), not path.exists())
    if present and absent:
        raise BadInput(f'{path}: not every rank sees it; expected an output_dir that all nodes share')
    return present


def load_start(cfg: Config, fold: int | None = None) -> dict | None:
    """Load the checkpoint to start from, if any, that of this fold where `weights` has several;
    mmsegmentation's has only `model`, and a file of another origin only `groups`. Raises BadInput.
    """
    if cfg.weights is None:
        return None
    paths = find_models(cfg.weights)
    path = paths.get(fold, next(iter(paths.values())))
    if is_checkpoint(path):
        return load_checkpoint(path)
    groups = read_groups(path)
    state = find_mmseg(groups)
    is_whole = state and any(name.startswith('decode_head.') for name in state)
    return {'model': state} if is_whole else {'groups': groups}


def load_data(
    cfg: Config, fold: int, ranks: Ranks, start: dict | None, pseudo: PseudoLabels | None
) -> TrainingData:
    """Open the cache and split off the fold, with no validation photos if the model knows their labels."""
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'train'))
    folds = ranks.main_process_first(lambda: read_folds(cfg, cache))
    train_rows, valid_rows = split_fold(folds, fold)
    count, least = len(train_rows), ranks.min_batch(cfg)
    if count < least:
        raise BadInput(f'--fold {fold}: found {count} photos to train on, expected at least {least}')
    if pseudo and pseudo.schedule == 'pretrain' and len(pseudo.cache) < least:
        fault = f'found {plural(len(pseudo.cache), "labelled photo")}, expected at least {least}'
        raise BadInput(f'--schedule pretrain: {fault}')
    extra = ranks.main_process_first(lambda: open_extra(cfg, cache, valid_rows))
    held_out = held_out_hash(cache, valid_rows)
    teachers = [pseudo.held_out] if pseudo else []
    teachers += [start['held_out']] if start and 'held_out' in start else []
    encoder = Path(cfg.encoder_weights)
    if start is None and encoder.is_file() and is_checkpoint(encoder):
        teachers.append(load_checkpoint(encoder)['held_out'])
    if not all(is_held_out(teacher, cache, valid_rows) for teacher in teachers):  # a score would be too good
        held_out, valid_rows = None, valid_rows[:0]
    remarks = []
    if len(valid_rows):
        pairs = ranks.main_process_first(lambda: read_pairs(cache))
        in_fold = (folds == fold)[pairs].any(axis=1)
        remarks = filter(None, [describe_split(cache.coco.photos.names(), pairs[in_fold], folds)])
    return TrainingData(fold, cache, train_rows, valid_rows, held_out, pseudo, extra, tuple(remarks))


def build_model(cfg: Config, start: dict | None, resume: bool) -> tuple[SegModel, list[str]]:
    """Build the model and load its first weights; return it with what to log about them. Raises BadInput."""
    model = SegModel(cfg, load_weights=not resume and start is None)
    notes = list(model.encoder_report)
    if start and 'held_out' in start:
        refuse_other_classes(cfg, start)
        state, adapted = adapt_bands(current_names(start['model']), model.state_dict())
        load_model_state(model, state, cfg.weights)
        notes += [f'{cfg.weights}: {name} was made from RGB to other bands' for name in adapted]
    elif start and 'groups' in start:
        notes += load_whole_or_encoder(model, start['groups'], cfg)
    elif start:
        left_out = load_mmseg(model, start['model'], cfg.encoder, cfg.weights)
        if left_out:
            notes.append(f'{cfg.weights}: left out, for another number of classes: {", ".join(left_out)}')
    return model, notes


def refuse_other_classes(cfg: Config, start: dict) -> None:
    """Raise BadInput if the checkpoint that `weights` names is of another number of classes."""
    there, here = len(make_config(start['config'], str(cfg.weights)).classes), len(cfg.classes)
    if there != here:
        fault = f'is of a model of {there} classes, the data has {here}'
        advice = 'encoder_weights: FILE takes the encoder of such a file alone'
        raise BadInput(f"config key 'weights': {cfg.weights}: {fault}; {advice}")


def log_header(cfg: Config, data: TrainingData, changes: list[str], notes: list[str]) -> None:
    """Log the photos, classes and weights; warn of absent classes and of changes since the last start."""
    classes = data.cache.coco.photos.classes()
    present = [classes[row] for row in data.train_rows]
    sizes = f'{len(data.train_rows)} train, {len(data.valid_rows)} valid'
    counts = count_classes(present, cfg.classes, cfg.competition.object_ids)
    log.info(f'fold {data.fold}: {sizes}, classes {counts}')
    for extra in data.extra:
        classes = extra.cache.coco.photos.classes()
        theirs = [classes[row] for row in extra.rows]
        present = present + theirs
        counts = count_classes(theirs, cfg.classes, cfg.competition.object_ids)
        origin = f'{len(theirs)} photos of {extra.cache.coco.root}, classes {counts}'
        log.info('; '.join([f'extra data: {extra.share:.0%} of the samples from {origin}', *extra.remarks]))
    check_classes(present, cfg)
    for remark in data.remarks:
        log.warning(f'warning: {folds_path(cfg)}: {remark}')
    for place in describe_replaced(cfg.run_dir(data.fold)):
        log.warning(f'warning: {place}')
    for change in changes:
        log.warning(f'warning: changed since the last start: {change}')
    for note in notes:
        log.info(note)
    if data.pseudo:
        log.info(f'with {len(data.pseudo.cache)} pseudo-labelled photos, schedule {data.pseudo.schedule}')


def count_classes(present: list[set[int]], classes: tuple[str, ...], object_ids: range) -> str:
    """List the classes of objects with the photos of each, by the class ids of each photo; of many the
    commonest.
    """
    counts = {classes[k]: sum(k in ids for ids in present) for k in object_ids}
    if len(counts) <= MANY_CLASSES:
        return ', '.join(f'{name} {count}' for name, count in counts.items())
    common = sorted(counts, key=counts.__getitem__, reverse=True)[:FEW_CLASSES]
    listed = ', '.join(f'{name} {counts[name]}' for name in common)
    return f'{listed}, and {len(counts) - FEW_CLASSES} with as many or fewer'


def train_epochs(trainer: Trainer, tracking: Tracking | None) -> None:
    """Train, validate, report and save each epoch. Raises CheckFailed, and Interrupted if asked to stop."""
    cfg, data, before = trainer.cfg, trainer.data, (None, None)
    metric = metric_of(cfg.competition)
    evaluation = Evaluation(data.cache, data.valid_rows, cfg, trainer.ranks) if len(data.valid_rows) else None

    def validate(model: SegModel | None) -> np.ndarray | None:
        return None if model is None or evaluation is None else evaluation.count(model)

    if tracking:
        tracking.start(trainer.epoch)
    with trainer.bar() as bar, trainer.writer:
        for epoch in range(trainer.epoch, cfg.epochs):
            started = time.monotonic()
            loss = trainer.train_epoch(epoch, bar)
            is_due = (epoch + 1) % cfg.val_interval == 0 or epoch + 1 == cfg.epochs
            counts = validate(trainer.averaged) if is_due else None
            now = trainer.rates, counts
            check_epoch(cfg, epoch, now, before)
            before = now
            is_skipped = evaluation is not None and not is_due
            result = EpochResult(epoch, trainer.step, trainer.lr, loss, counts, metric, is_skipped)
            if tracking:
                report(trainer, tracking, result, time.monotonic() - started, bar.time_left())
            swa = trainer.finish_swa()
            swa_counts = validate(swa)
            if swa is not None:
                shown = '' if swa_counts is None else f': {metric.label} {metric.interval(swa_counts)}'
                log.info(f'weights averaged over the last {trainer.swa_epochs} epochs{shown}')
            score = None if is_skipped else result.score
            trainer.end_epoch(score, None if swa is None else score_of(swa_counts, metric))


def report(trainer: Trainer, tracking: Tracking, result: EpochResult, seconds: float, left: str) -> None:
    """Log the line of an epoch, its metrics, and now and then a picture of predictions."""
    cfg, data, metric = trainer.cfg, trainer.data, result.metric
    parts = [
        f'epoch {result.epoch + 1:>{len(str(cfg.epochs))}}/{cfg.epochs}',
        f'loss {result.loss:.4f}',
        f'{metric.label} {"-" if result.counts is None else metric.interval(result.counts)}',
        f'lr {result.lr:.2e}',
        f'{seconds:.0f} s',
        left,
        gpu_memory(),
        'best' if result.counts is not None and trainer.is_best(result.score) else '',
    ]
    log.info('  '.join(part for part in parts if part))
    tracking.log(result.values(cfg.classes))
    if len(data.valid_rows) and tracking.wants_picture(result.epoch):
        picture = draw_predictions(trainer.averaged, data.cache, data.valid_rows, cfg)
        tracking.picture(picture, result.epoch)


def log_end(cfg: Config, trainer: Trainer) -> None:
    """Log the best score and what to type next; nothing on ranks above 0."""
    if trainer.folder is None:
        return
    fold, folder, split = trainer.data.fold, trainer.folder, 'oof' if len(trainer.data.valid_rows) else 'test'
    if split == 'oof':
        score = f'{cfg.keep} {metric_of(trainer.cfg.competition).label} {trainer.best:.4f}'
        log.info(f'{score} in epoch {trainer.best_epoch + 1}; wrote {folder / "best.pt"}')
    else:
        seen = 'a teacher, or the model it started from, saw their labels'
        why = 'fold -1 trains on all photos' if fold == -1 else seen
        log.info(f'no photos to validate on ({why}); wrote {folder / "best.pt"}, the last epoch')
    if split == 'oof' or (cfg.data_root / 'test.json').is_file():
        log.info(next_line('infer.py', '--cfg', folder / 'config.yaml', '--fold', fold, '--split', split))


def command(argv: list[str] | None = None) -> None:
    args, cfg = read_arguments(argv)
    main(cfg, args.fold, args.resume, args.overwrite, dry_run=args.dry_run)
    if args.dry_run:
        log.info(f'dry run: nothing was written to {cfg.run_dir(args.fold)}')
        flags = [f'--{name}' for name in ('resume', 'overwrite') if getattr(args, name)]
        log.info(next_line('train.py', '--fold', args.fold, *flags, cfg=args.cfg, changes=args.set))


if __name__ == '__main__':
    run_script(command)
