"""Stage 3: train again with a teacher's predictions on the test photos as labels.

    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext --schedule half
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext swin_knet --schedule full
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext-pseudo --round 2 --schedule full

The teachers' own fold k labels for fold k, so the student is validated on photos whose labels never reached
it. --teacher-folds all averages every fold: better labels, but no validation score. Writes
output/<name>-pseudo/fold<k>/ as train.py does, and pseudo_masks.npy, the labels at cache_size.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import Config, load_config, read_yaml
from utils.cli import (
    ArgumentParser,
    add_training_arguments,
    at_least,
    parse_early,
    run_script,
)


def read_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line and the config that it names."""
    parser = ArgumentParser(__doc__)
    add_training_arguments(parser)
    parser.add_argument(
        '--teacher', nargs='+', required=True, metavar='NAME', help='runs in output/ that label'
    )
    parser.add_argument(
        '--schedule',
        choices=['full', 'half', 'pretrain'],
        default='full',
        help='train on them in all epochs, in the first half, or (pretrain) on only them in the first half',
    )
    parser.add_argument('--round', type=at_least(1), default=1, help='2 writes output/<name>-pseudo2/')
    parser.add_argument(
        '--teacher-folds', choices=['own', 'all'], default='own', help='all: every fold of the teachers'
    )
    args = parser.parse_args(argv)
    return args, load_config(args.cfg, args.set)


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch
import yaml

import train
from data.cache import Cache, open_cache
from engine.checkpoint import load_checkpoint, load_run
from engine.distributed import start_ranks
from engine.inference import make_eval_loader, predict_probs
from engine.runs import check_run, lock_run
from engine.trainer import PseudoLabels
from metrics import IGNORED
from utils.errors import BadInput
from utils.files import allocate_array, file_hash, map_array, write_text
from utils.log import start_log
from utils.progress import progress
from voting.calibration import apply_temperature, read_temperature

MASKS_FILE, CONFIDENCE_FILE = 'pseudo_masks.npy', 'pseudo_sure.npy'
ORIGIN_FILE = 'pseudo_masks.yaml'  # what the labels were made from


@dataclass(frozen=True)
class Labelling:
    """Who labels the photos, and how the student trains on them."""

    teachers: list[str]  # names of runs
    schedule: str = 'full'  # see engine.trainer.PseudoLabels
    round: int = 1  # the student's name gets it from 2 on
    all_folds: bool = False  # every fold of the teachers instead of the student's own


class Teacher(NamedTuple):
    """A run that labels, and the temperature that calibrates its probabilities."""

    cfg: Config
    fold: int
    temperature: float


def main(
    cfg: Config, fold: int, labelling: Labelling, resume: bool = False, overwrite: bool = False
) -> float:
    """Label the test photos, train on them, and return what train.main does. Raises BadInput, CheckFailed."""
    ranks = start_ranks(cfg)
    number = labelling.round if labelling.round > 1 else ''
    student = cfg.model_copy(update={'name': f'{cfg.name}-pseudo{number}'})
    folder = student.run_dir(fold)
    if ranks.is_main:
        check_run(student, fold, resume, overwrite)
    cache = open_cache(cfg, 'test')
    if ranks.is_main:
        teachers = find_teachers(cfg, fold, labelling)
        origin = label_origin(cfg, teachers, cache)
        with lock_run(folder, 'labelling'):
            if not has_labels(folder, origin, resume, overwrite):
                (folder / MASKS_FILE).unlink(missing_ok=True)
                if overwrite:  # a run must not go on with other labels
                    (folder / 'last.pt').unlink(missing_ok=True)
                write_text(folder / ORIGIN_FILE, yaml.safe_dump(origin, sort_keys=False))
                label(cfg, teachers, cache, folder, ranks.device)
    ranks.wait()
    return train.main(student, fold, resume, overwrite, read_labels(cfg, cache, folder, labelling.schedule))


def find_teachers(cfg: Config, fold: int, labelling: Labelling) -> list[Teacher]:
    """Return the runs that label, with their temperatures. Raises BadInput."""
    folds = range(cfg.folds) if labelling.all_folds else [fold]
    configs = [cfg.model_copy(update={'name': name}) for name in labelling.teachers]
    temperatures = [read_temperature(cfg.output_dir / name) for name in labelling.teachers]
    return [Teacher(c, k, t) for c, t in zip(configs, temperatures, strict=True) for k in folds]


def label_origin(cfg: Config, teachers: list[Teacher], cache: Cache) -> dict:
    """Return all that the labels depend on, and a hash of the photos no teacher saw. Raises BadInput."""
    paths = [teacher.cfg.run_dir(teacher.fold) / 'best.pt' for teacher in teachers]
    held_out = {load_checkpoint(path)['held_out'] for path in paths}
    return {
        'teachers': {str(path.relative_to(cfg.output_dir)): file_hash(path) for path in paths},
        'threshold': cfg.pseudo_threshold,
        'keep': cfg.pseudo_keep,
        'soft': cfg.pseudo_soft,
        'temperatures': [teacher.temperature for teacher in teachers],
        'views': {
            'flips': list(cfg.tta_flips),
            'rotations': list(cfg.tta_rotations),
            'scales': list(cfg.tta_scales),
        },
        'photos': cache.coco.fingerprint,
        'side': cfg.cache_size,
        'held_out': held_out.pop() if len(held_out) == 1 else None,
    }


def has_labels(folder: Path, origin: dict, resume: bool, overwrite: bool) -> bool:
    """Tell whether a resumed run has these labels. Raises BadInput for others, or labels without a flag."""
    path = folder / MASKS_FILE
    if not path.exists():
        return False
    if resume and read_yaml(folder / ORIGIN_FILE) != origin:
        raise BadInput(f'{path}: was made by other teachers or settings; start again with --overwrite')
    if not resume and not overwrite:
        raise BadInput(
            f'{folder}: holds this run already; go on with --resume, or start again with --overwrite'
        )
    return resume


def read_labels(cfg: Config, cache: Cache, folder: Path, schedule: str) -> PseudoLabels:
    """Map the labels of a run folder. Raises BadInput."""
    shape = cache.photos.shape[:3]
    masks = map_array(folder / MASKS_FILE, shape)
    confidence = map_array(folder / CONFIDENCE_FILE, shape) if cfg.pseudo_soft else None
    held_out = read_yaml(folder / ORIGIN_FILE)['held_out']
    return PseudoLabels(Cache(cache.coco, cache.photos, masks, confidence), schedule, held_out)


def label(cfg: Config, teachers: list[Teacher], cache: Cache, folder: Path, device: torch.device) -> None:
    """Write (n, S, S) uint8 labels, IGNORED below the cutoffs; with pseudo_soft also their confidence."""
    start_log(None)
    path = folder / MASKS_FILE
    partial, partial_confidence = (folder / f'.{path.name}{end}.partial' for end in ('', '.sure'))
    shape = cache.photos.shape[:3]
    try:
        masks = allocate_array(partial, np.uint8, shape)
        confidence = allocate_array(partial_confidence, np.uint8, shape)
        predict_labels(teachers, cache, masks, confidence, device)
        no_cutoffs = np.zeros(len(cfg.classes), int)
        cutoffs = no_cutoffs if cfg.pseudo_soft else class_cutoffs(masks, confidence, cfg)
        known = 0
        for mask, values in zip(masks, confidence, strict=True):
            mask[values < cutoffs[mask]] = IGNORED
            known += np.count_nonzero(mask != IGNORED)
        masks.flush()
        if cfg.pseudo_soft:
            confidence.flush()
            partial_confidence.replace(folder / CONFIDENCE_FILE)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        partial_confidence.unlink(missing_ok=True)
    use = 'used, each by its confidence' if cfg.pseudo_soft else 'confident enough'
    print(f'pseudo-labels of {len(masks)} photos: {known / masks.size:.1%} of the pixels are {use}')
    if cfg.pseudo_keep:
        thresholds = ', '.join(f'{name} {cutoffs[k] / 255:.2f}' for k, name in enumerate(cfg.classes))
        print(f'thresholds: {thresholds}')


def predict_labels(
    teachers: list[Teacher], cache: Cache, masks: np.ndarray, confidence: np.ndarray, device: torch.device
) -> None:
    """Fill masks (n, S, S) with the likeliest class, and confidence with 255 times its mean probability,
    rounded down. All teachers are in memory together, so that no probabilities have to be stored.
    """
    runs = [load_run(teacher.cfg, teacher.fold, device) for teacher in teachers]
    loaders = [make_eval_loader(cache, np.arange(len(cache)), run.cfg) for run in runs]
    side = masks.shape[1:]
    for batches in progress(zip(*loaders, strict=True), 'pseudo-labels', 'batch', len(loaders[0])):
        total = 0.0
        for run, teacher, (images, _) in zip(runs, teachers, batches, strict=True):
            with torch.inference_mode():
                probs = predict_probs(run.model, images, run.cfg, side)
                total = total + apply_temperature(probs, teacher.temperature, axis=1)
        values, classes = (total / len(runs)).max(dim=1)
        rows = batches[0][1].numpy()
        masks[rows] = classes.to(torch.uint8).cpu().numpy()
        confidence[rows] = (values * 255).to(torch.uint8).cpu().numpy()


def class_cutoffs(masks: np.ndarray, confidence: np.ndarray, cfg: Config) -> np.ndarray:
    """Return the confidence, in 255ths, from which pixels of each class are kept: pseudo_threshold, or what
    leaves the share pseudo_keep of its pixels (class-balanced self-training, arXiv:1810.07911).
    """
    num_classes = len(cfg.classes)
    if not cfg.pseudo_keep:
        return np.full(num_classes, math.ceil(255 * cfg.pseudo_threshold))
    counts = np.zeros((num_classes, 256), np.int64)
    for mask, values in zip(masks, confidence, strict=True):
        codes = mask.astype(np.int64) * 256 + values
        counts += np.bincount(codes.ravel(), minlength=counts.size).reshape(counts.shape)
    cumulative = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels with this confidence or more
    return np.maximum((cumulative >= cfg.pseudo_keep * cumulative[:, :1]).sum(axis=1) - 1, 0)


def command(argv: list[str] | None = None) -> None:
    args, cfg = read_arguments(argv)
    labelling = Labelling(args.teacher, args.schedule, args.round, all_folds=args.teacher_folds == 'all')
    main(cfg, args.fold, labelling, args.resume, args.overwrite)


if __name__ == '__main__':
    run_script(command)
