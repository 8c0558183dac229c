"""Stage 3: trains again with a teacher's predictions on the test photos as labels.

    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext --schedule half
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext swin_knet --schedule full
    python pseudo.py --cfg configs/convnext.yaml --fold 0 --teacher convnext-pseudo --round 2 --schedule full

The teacher of fold k is the teachers' own fold k, so that the student is validated on photos whose labels
never reached it. --teacher-folds all averages every fold of the teachers: better labels, and no validation
score. Pixels under pseudo_threshold are ignored, or with pseudo_keep all but that share of each class, the
surest; with pseudo_soft each counts as much as the teacher is sure of it. Writes
output/<name>-pseudo/fold<k>/ as train.py does, and pseudo_masks.npy, the labels at cache_size.
"""

import math
from pathlib import Path

import numpy as np
import torch
import yaml

import train
from config import Config, load_config, read_yaml
from data.cache import Cache, open_cache
from engine.checkpoint import load_checkpoint, load_run
from engine.distributed import start_ranks
from engine.inference import make_eval_loader, predict_probs
from engine.runs import check_run, lock_run
from engine.trainer import PseudoLabels
from metrics import IGNORED
from utils.cli import ArgumentParser, add_config_arguments, at_least, run_script
from utils.errors import BadInput
from utils.files import allocate_array, file_hash, map_array, write_text
from utils.log import start_log
from utils.progress import progress
from voting.calibration import apply_temperature, read_temperature

SURE = 'pseudo_sure.npy'


def main(
    cfg: Config,
    fold: int,
    teachers: list[str],
    schedule: str,
    round_number: int = 1,
    all_folds: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> float:
    """Labels the test photos, trains the student, and returns its best validation mIoU (nan without one).
    Raises BadInput.
    """
    name = f'{cfg.name}-pseudo' + (str(round_number) if round_number > 1 else '')
    student = cfg.model_copy(update={'name': name})
    ranks = start_ranks(cfg)
    if ranks.is_main:
        check_run(student, fold, resume, overwrite)
    runs = teacher_runs(cfg, fold, teachers, all_folds)
    cache = open_cache(cfg, 'test')
    path = student.run_dir(fold) / 'pseudo_masks.npy'
    if ranks.is_main:
        origin = label_origin(cfg, runs, cache)
        with lock_run(path.parent, 'labelling'):
            if resume and path.exists():
                if read_yaml(path.with_suffix('.yaml')) != origin:
                    raise BadInput(
                        f'{path}: was made by other teachers or settings; start again with --overwrite'
                    )
            elif path.exists() and not overwrite:
                raise BadInput(
                    f'{path.parent}: holds this run already; go on with --resume, or start again with '
                    '--overwrite'
                )
            else:
                path.unlink(missing_ok=True)  # labels and their origin never disagree
                if overwrite:  # nor labels and a run that goes on
                    path.with_name('last.pt').unlink(missing_ok=True)
                write_text(path.with_suffix('.yaml'), yaml.safe_dump(origin, sort_keys=False))
                label(cfg, runs, cache, path, ranks.device, origin['temperatures'])
    ranks.wait()
    held_out = read_yaml(path.with_suffix('.yaml'))['held_out']
    shape = cache.photos.shape[:3]
    masks = map_array(path, shape)
    sure = map_array(path.with_name(SURE), shape) if cfg.pseudo_soft else None
    rows = PseudoLabels(Cache(cache.coco, cache.photos, masks, sure), schedule, held_out)
    return train.main(student, fold, resume, overwrite, rows)


def teacher_runs(cfg: Config, fold: int, teachers: list[str], all_folds: bool) -> list[tuple[Config, int]]:
    """Config (under the teacher's name) and fold of each model that labels."""
    folds = list(range(cfg.folds)) if all_folds else [fold]
    return [(cfg.model_copy(update={'name': teacher}), k) for teacher in teachers for k in folds]


def label_origin(cfg: Config, runs: list[tuple[Config, int]], cache: Cache) -> dict:
    """All that the labels depend on, and `held_out`: the photos whose labels no teacher ever saw."""
    paths = [teacher.run_dir(k) / 'best.pt' for teacher, k in runs]
    held_out = {load_checkpoint(path)['held_out'] for path in paths}
    return {
        'teachers': {str(path.relative_to(cfg.output_dir)): file_hash(path) for path in paths},
        'threshold': cfg.pseudo_threshold,
        'keep': cfg.pseudo_keep,
        'soft': cfg.pseudo_soft,
        'temperatures': [read_temperature(teacher.output_dir / teacher.name) for teacher, _ in runs],
        'views': {
            'flips': list(cfg.tta_flips),
            'rotations': list(cfg.tta_rotations),
            'scales': list(cfg.tta_scales),
        },
        'photos': cache.coco.fingerprint,
        'side': cfg.cache_size,
        'held_out': held_out.pop() if len(held_out) == 1 else None,
    }


def label(
    cfg: Config,
    runs: list[tuple[Config, int]],
    cache: Cache,
    path: Path,
    device: torch.device,
    temperatures: list[float],
) -> None:
    """Writes (n, S, S) uint8 labels of the test photos: the likeliest class of the teachers' mean
    probability, or IGNORED below the threshold; with pseudo_soft all of them, and their confidence beside
    them. All teachers are in memory together, since a batch is labelled at full size and never stored as
    probabilities.
    """
    start_log(None)
    partial, sure_path = (path.with_name(f'.{path.name}{end}.partial') for end in ('', '.sure'))
    shape = cache.photos.shape[:3]
    try:
        masks = allocate_array(partial, np.uint8, shape)
        sure = allocate_array(sure_path, np.uint8, shape)  # 255 times the confidence
        predict_labels(runs, cache, masks, sure, device, temperatures)
        cutoffs = np.zeros(len(cfg.classes), int) if cfg.pseudo_soft else class_cutoffs(masks, sure, cfg)
        known = 0
        for row in range(len(masks)):
            masks[row][sure[row] < cutoffs[masks[row]]] = IGNORED
            known += np.count_nonzero(masks[row] != IGNORED)
        masks.flush()
        if cfg.pseudo_soft:
            sure.flush()
            sure_path.replace(path.with_name(SURE))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        sure_path.unlink(missing_ok=True)
    kept = 'kept, each by its confidence' if cfg.pseudo_soft else 'sure enough'
    print(f'pseudo-labels of {len(masks)} photos: {known / masks.size:.1%} of the pixels are {kept}')
    if cfg.pseudo_keep:
        shown = ', '.join(f'{name} {cutoffs[k] / 255:.2f}' for k, name in enumerate(cfg.classes))
        print(f'thresholds: {shown}')


def predict_labels(
    runs: list[tuple[Config, int]],
    cache: Cache,
    masks: np.ndarray,
    sure: np.ndarray,
    device: torch.device,
    temperatures: list[float],
) -> None:
    """Fills masks (n, S, S) with the likeliest class, sure with 255 times its probability, rounded down."""
    models = [load_run(teacher, k, device) for teacher, k in runs]
    loaders = [make_eval_loader(cache, np.arange(len(cache)), run.cfg) for run in models]
    for batches in progress(zip(*loaders, strict=True), 'pseudo-labels', 'batch', len(loaders[0])):
        side = masks.shape[1:]
        with torch.inference_mode():
            probs = sum(
                apply_temperature(predict_probs(run.model, images, run.cfg, device, side), temperature, 1)
                for run, temperature, (images, _) in zip(models, temperatures, batches, strict=True)
            ) / len(models)
        confidence, ids = probs.max(dim=1)
        rows = batches[0][1].numpy()
        masks[rows] = ids.to(torch.uint8).cpu().numpy()
        sure[rows] = (confidence * 255).to(torch.uint8).cpu().numpy()


def class_cutoffs(masks: np.ndarray, sure: np.ndarray, cfg: Config) -> np.ndarray:
    """(K,) the `sure` from which on a pixel of each class is kept: pseudo_threshold, or what leaves the share
    pseudo_keep of the class's pixels, the surest (class-balanced self-training, arXiv:1810.07911).
    """
    num_classes = len(cfg.classes)
    if not cfg.pseudo_keep:
        return np.full(num_classes, math.ceil(255 * cfg.pseudo_threshold))
    counts = np.zeros((num_classes, 256), np.int64)
    for ids, values in zip(masks, sure, strict=True):
        codes = ids.astype(np.int64) * 256 + values
        counts += np.bincount(codes.ravel(), minlength=counts.size).reshape(counts.shape)
    from_above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels at least as sure as each value
    wanted = cfg.pseudo_keep * from_above[:, :1]
    return np.maximum((from_above >= wanted).sum(axis=1) - 1, 0)


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--fold', type=int, required=True, help='the fold to validate on; -1 trains on everything'
    )
    parser.add_argument(
        '--teacher', nargs='+', required=True, metavar='NAME', help='runs that label, as in output/NAME/'
    )
    parser.add_argument(
        '--schedule',
        choices=['full', 'half', 'pretrain'],
        default='full',
        help='in all epochs, in the first half of them, or (pretrain) alone in the first half',
    )
    parser.add_argument('--round', type=at_least(1), default=1, help='2 writes output/<name>-pseudo2/')
    parser.add_argument(
        '--teacher-folds',
        choices=['own', 'all'],
        default='own',
        help='all: every fold of the teachers',
    )
    parser.add_argument('--resume', action='store_true', help='go on from last.pt, where there is one')
    parser.add_argument(
        '--overwrite', action='store_true', help='start again where the run folder holds a run'
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.cfg, args.set)
    main(
        cfg,
        args.fold,
        args.teacher,
        args.schedule,
        args.round,
        args.teacher_folds == 'all',
        args.resume,
        args.overwrite,
    )


if __name__ == '__main__':
    run_script(command)
