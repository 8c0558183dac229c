"""Stage 3: train again with a teacher's predictions on the test photos as labels.

    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext --schedule half
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext swin_knet --schedule full
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext-pseudo --round 2 --schedule full
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext --photos more_photos

The teachers' own fold k labels for fold k, so the student is validated on photos whose labels never reached
it. --teacher-folds all averages every fold: better labels, but no validation score. --photos DIR labels the
photos of any folder with a test.json (prepare.py test makes one) in place of the test photos. Writes
output/<name>-pseudo/fold<k>/ as train.py does, and pseudo_masks.npy, the labels at the size of the cache.

Of classes that may overlap a pixel of a class is known if its probability is at least pseudo_threshold, or at
most 1 - pseudo_threshold; the others are ignored for that class.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import VIEW_KEYS, Config, load_config
from utils.cli import (
    ArgumentParser,
    add_training_arguments,
    at_least,
    parse_early,
    python_command,
    run_script,
)
from utils.yaml_files import read_yaml


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
    photos_help = 'data root whose test.json lists the photos to label; by default the test photos'
    parser.add_argument('--photos', type=Path, metavar='DIR', help=photos_help)
    args = parser.parse_args(argv)
    return args, load_config(args.cfg, args.set)


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch
import yaml

import train
from data.cache import Cache, open_cache
from data.folds import held_out_hash
from data.planes import pack, unpack
from engine.checkpoint import load_checkpoint, load_run
from engine.distributed import start_ranks
from engine.inference import Predictor, predict_sizes
from engine.runs import CONFIDENCE_FILE, MASKS_FILE, ORIGIN_FILE, check_run, lock_run, move_aside
from engine.trainer import PseudoLabels
from metrics import IGNORED
from utils.errors import BadInput
from utils.files import file_hash, lies_in, write_text
from utils.log import start_log
from utils.ragged import Ragged, allocate_ragged, map_ragged
from voting.calibration import apply_temperature, read_temperature


@dataclass(frozen=True)
class Labelling:
    """Who labels the photos, and how the student trains on them."""

    teachers: list[str]  # names of runs
    schedule: str = 'full'  # see engine.trainer.PseudoLabels
    round: int = 1  # the student's name gets it from 2 on
    all_folds: bool = False  # every fold of the teachers instead of the student's own
    photos: Path | None = None  # data root of the photos; None: the test photos


class Teacher(NamedTuple):
    """A run that labels, and the temperature that calibrates its probabilities."""

    cfg: Config
    fold: int
    temperature: float


def main(
    cfg: Config, fold: int, labelling: Labelling, resume: bool = False, overwrite: bool = False
) -> float:
    """Label the test photos, train on them, and return what train.main does. Raises BadInput, CheckFailed."""
    check_labelling(cfg, labelling)
    ranks = start_ranks(cfg)
    number = labelling.round if labelling.round > 1 else ''
    student = cfg.model_copy(update={'name': f'{cfg.name}-pseudo{number}'})
    folder = student.run_dir(fold)
    if ranks.is_main:
        refuse_own_teacher(cfg, fold, labelling, folder)
        check_run(student, fold, resume, overwrite)
        if not resume and not overwrite and (folder / MASKS_FILE).exists():
            again = 'go on with --resume, or start again with --overwrite'
            raise BadInput(f'{folder}: holds the labels of this run already; {again}')
    photos = cfg if labelling.photos is None else cfg.model_copy(update={'data_root': labelling.photos})
    cache = ranks.main_process_first(lambda: open_cache(photos, 'test'))
    if ranks.is_main:
        teachers = find_teachers(cfg, fold, labelling)
        origin = label_origin(cfg, teachers, cache)
        with lock_run(folder, 'labelling'):
            if overwrite:
                move_aside(folder)
            if not has_labels(folder, origin):
                write_text(folder / ORIGIN_FILE, yaml.safe_dump(origin, sort_keys=False))
                label(cfg, teachers, cache, folder, ranks.device)
    ranks.wait()
    return train.main(student, fold, resume, pseudo=read_labels(cfg, cache, folder, labelling.schedule))


def check_labelling(cfg: Config, labelling: Labelling) -> None:
    """Raise BadInput for photos that are not listed, and for labels that nothing can be left out of."""
    root = labelling.photos
    if root is not None and not (root / 'test.json').is_file():
        command = python_command('prepare.py', 'test', '--photos', root)
        raise BadInput(f'--photos {root}: has no test.json, which lists the photos; {command} makes one')
    if cfg.competition.is_multilabel and cfg.pseudo_threshold <= 0.5:
        fault = f'found {cfg.pseudo_threshold}, expected more than 0.5 where classes may overlap'
        raise BadInput(f"config key 'pseudo_threshold': {fault}")


def refuse_own_teacher(cfg: Config, fold: int, labelling: Labelling, folder: Path) -> None:
    """Raise BadInput if a teacher lies in the folder that the student writes."""
    for teacher in find_teachers(cfg, fold, labelling):
        path = teacher.cfg.run_dir(teacher.fold) / 'best.pt'
        if lies_in(path, folder) or lies_in(path.parent, folder):
            fault = f'{path} lies in {folder}, which the student would replace'
            advice = f'give --round {labelling.round + 1}, or another name: --set name=NAME'
            raise BadInput(f'--teacher {teacher.cfg.name}: {fault}; {advice}')


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
        'views': {key.removeprefix('tta_'): list(getattr(cfg, key)) for key in VIEW_KEYS},
        'window': cfg.window,
        'photos': cache.coco.fingerprint,
        'contents': held_out_hash(cache, np.arange(len(cache))),
        'side': cfg.cache_size,
        'held_out': held_out.pop() if len(held_out) == 1 else None,
    }


def has_labels(folder: Path, origin: dict) -> bool:
    """Tell whether a run that goes on has its labels. Raises BadInput if it has, or had, others."""
    path, again = folder / ORIGIN_FILE, 'start again with --overwrite'
    has_masks, has_run = (folder / MASKS_FILE).exists(), (folder / 'last.pt').exists()
    if not has_masks and not has_run:
        return False
    if not path.exists():
        raise BadInput(f'{folder}: has no {ORIGIN_FILE}, which says what its labels were made from; {again}')
    known = read_yaml(path)
    if not isinstance(known, dict):
        raise BadInput(f'{path}: is damaged; {again}')
    for key, value in origin.items():
        # an earlier version did not record all of them
        if known.get(key, value if key in ('window', 'contents') else None) != value:
            raise BadInput(f'{path}: its labels were made by other teachers or settings ({key}); {again}')
    return has_masks


def read_labels(cfg: Config, cache: Cache, folder: Path, schedule: str) -> PseudoLabels:
    """Map the labels of a run folder. Raises BadInput."""
    shapes = cache.masks.shapes
    masks = map_ragged(folder / MASKS_FILE, shapes)
    of_confidence = confidence_shapes(cfg, cache)
    confidence = map_ragged(folder / CONFIDENCE_FILE, of_confidence) if cfg.pseudo_soft else None
    held_out = read_yaml(folder / ORIGIN_FILE)['held_out']
    return PseudoLabels(Cache(cache.coco, cache.photos, masks, confidence), schedule, held_out)


def label(cfg: Config, teachers: list[Teacher], cache: Cache, folder: Path, device: torch.device) -> None:
    """Write the labels, IGNORED below the cutoffs; with pseudo_soft also their confidence."""
    start_log(None)
    path = folder / MASKS_FILE
    partial, partial_confidence = (folder / f'.{path.name}{end}.partial' for end in ('', '.sure'))
    shapes, known = confidence_shapes(cfg, cache), 0
    keeps_all, needs_confidence = cfg.pseudo_soft, cfg.pseudo_soft or cfg.pseudo_keep > 0
    cutoffs = np.full(num_codes(cfg), 0 if keeps_all else math.ceil(255 * cfg.pseudo_threshold))
    try:
        masks = allocate_ragged(partial, np.uint8, cache.masks.shapes)
        confidence = allocate_ragged(partial_confidence, np.uint8, shapes) if needs_confidence else None
        for row, band, labels, values in predict_labels(teachers, cache, device):
            if confidence is None:
                known += ignore_doubt(labels, values, cutoffs, cfg)
            else:
                confidence[row][band] = values
            masks[row][band] = labels
        if confidence is not None:
            cutoffs = cutoffs if keeps_all else class_cutoffs(masks, confidence, cfg)
            known = sum(ignore_doubt(masks[row], confidence[row], cutoffs, cfg) for row in range(len(masks)))
        masks.flush()
        if cfg.pseudo_soft:
            confidence.flush()
            partial_confidence.replace(folder / CONFIDENCE_FILE)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        partial_confidence.unlink(missing_ok=True)
    use = 'used, each by its confidence' if cfg.pseudo_soft else 'confident enough'
    share = known / sum(map(math.prod, shapes))
    print(f'pseudo-labels of {len(masks)} photos: {share:.1%} of the pixels are {use}')
    if cfg.pseudo_keep:
        print(f'thresholds: {describe_cutoffs(cutoffs, cfg)}')


def confidence_shapes(cfg: Config, cache: Cache) -> list[tuple[int, ...]]:
    """Return the shape of the confidence of each photo: (h, w), or (h, w, K) if classes may overlap."""
    depth = (len(cfg.classes),) if cfg.competition.is_multilabel else ()
    return [(*shape[:2], *depth) for shape in cache.masks.shapes]


def predict_labels(
    teachers: list[Teacher], cache: Cache, device: torch.device
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """Label photos in bands of rows: yield the number of a photo, the rows, their labels as the cache has
    masks, and the confidence: 255 times the mean probability, rounded down. All teachers are in memory
    together, so that no probabilities have to be stored.
    """
    runs = [load_run(teacher.cfg, teacher.fold, device) for teacher in teachers]
    rows, sizes = np.arange(len(cache)), [shape[:2] for shape in cache.masks.shapes]
    predictors = [Predictor.of(run.model, run.cfg) for run in runs]
    descs = ['pseudo-labels', *[None] * (len(runs) - 1)]
    predicted = [predict_sizes(p, cache, rows, sizes, d) for p, d in zip(predictors, descs, strict=True)]
    for bands in zip(*predicted, strict=True):
        total = 0.0
        for teacher, run, band in zip(teachers, runs, bands, strict=True):
            total = total + calibrate(band.probs, teacher.temperature, run.cfg)
        mean = total / len(runs)
        band = slice(bands[0].top, bands[0].top + mean.shape[1])
        if runs[0].cfg.competition.is_multilabel:
            planes, values = (mean >= 0.5).to(torch.uint8), torch.maximum(mean, 1 - mean).permute(1, 2, 0)
            labels = pack(planes.cpu().numpy())
        else:
            values, classes = mean.max(dim=0)
            labels = classes.to(torch.uint8).cpu().numpy()
        yield bands[0].position, band, labels, (values * 255).to(torch.uint8).cpu().numpy()


def calibrate(probs: torch.Tensor, temperature: float, cfg: Config) -> torch.Tensor:
    """Apply a temperature to (K, H, W) probabilities, of classes that overlap to each by itself."""
    if not cfg.competition.is_multilabel or temperature == 1:
        return apply_temperature(probs, temperature, axis=0)
    return apply_temperature(torch.stack([probs, 1 - probs]), temperature, axis=0)[0]


def num_codes(cfg: Config) -> int:
    """Count the codes of labels: a class each, or two for each class that may overlap (see to_codes)."""
    return len(cfg.classes) * (2 if cfg.competition.is_multilabel else 1)


def to_labels(mask: np.ndarray, cfg: Config) -> np.ndarray:
    """Return the labels of a photo as the cache has masks: (h, w) ids, or (K, h, w) planes."""
    return unpack(mask, len(cfg.classes)) if cfg.competition.is_multilabel else mask


def to_codes(labels: np.ndarray) -> np.ndarray:
    """Return the codes of a photo's labels: (h, w) ids, or from planes (h, w, K): 2k where class k is absent,
    2k + 1 where it is present.
    """
    if labels.ndim == 2:
        return labels
    return labels.transpose(1, 2, 0) + 2 * np.arange(len(labels), dtype=np.int64)


def ignore_doubt(mask: np.ndarray, confidence: np.ndarray, cutoffs: np.ndarray, cfg: Config) -> int:
    """Set the labels of a photo to IGNORED whose confidence is below the cutoffs; count the others."""
    labels = to_labels(mask, cfg)
    known = confidence >= cutoffs[to_codes(labels)]
    if cfg.competition.is_multilabel:
        labels[~known.transpose(2, 0, 1)] = IGNORED
        mask[...] = pack(labels)
    else:
        mask[~known] = IGNORED
    return np.count_nonzero(known)


def class_cutoffs(masks: Ragged, confidence: Ragged, cfg: Config) -> np.ndarray:
    """Return the highest cutoff of the confidence, in 255ths, that leaves each code the share pseudo_keep
    of its pixels (class-balanced self-training, arXiv:1810.07911).
    """
    counts = np.zeros((num_codes(cfg), 256), np.int64)
    for row in range(len(masks)):
        codes = to_codes(to_labels(masks[row], cfg)).astype(np.int64) * 256 + confidence[row]
        counts += np.bincount(codes.ravel(), minlength=counts.size).reshape(counts.shape)
    cumulative = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels with this confidence or more
    return np.maximum((cumulative >= cfg.pseudo_keep * cumulative[:, :1]).sum(axis=1) - 1, 0)


def describe_cutoffs(cutoffs: np.ndarray, cfg: Config) -> str:
    """List the cutoffs by class, as probabilities; of classes that overlap those of both labels."""
    if not cfg.competition.is_multilabel:
        return ', '.join(f'{name} {cutoffs[k] / 255:.2f}' for k, name in enumerate(cfg.classes))
    pairs = [(1 - absent / 255, present / 255) for absent, present in cutoffs.reshape(-1, 2)]
    named = zip(cfg.classes, pairs, strict=True)
    return ', '.join(f'{name} up to {low:.2f} and from {high:.2f}' for name, (low, high) in named)


def command(argv: list[str] | None = None) -> None:
    args, cfg = read_arguments(argv)
    labelling = Labelling(args.teacher, args.schedule, args.round, args.teacher_folds == 'all', args.photos)
    main(cfg, args.fold, labelling, args.resume, args.overwrite)


if __name__ == '__main__':
    run_script(command)
