"""Stage 2: predict the photos that a fold was validated on, or the test photos, with test-time augmentation.

    python infer.py --cfg configs/convnext.yaml --fold 0 --split oof     # .../fold0/oof.csv, and its score
    python infer.py --cfg configs/convnext.yaml --fold all --split oof   # convnext/oof.csv, over all folds
    python infer.py --cfg configs/convnext.yaml --fold 0 --split test    # .../fold0/test.csv
    python infer.py --cfg configs/convnext.yaml --fold all --split test  # and the mean, convnext/test.csv
    python infer.py --cfg configs/convnext.yaml --fold 0 --image photo.jpg
    python infer.py --cfg configs/convnext.yaml --fold 0 --split test --update   # only if it would change

    torchrun --standalone --nproc-per-node=8 infer.py --cfg configs/convnext.yaml --fold 0 --split test

The model is rebuilt from best.pt alone; the data, the views and the batch size are the config's. A
pseudo-label retrain is --set name=convnext-pseudo. --fold -1 is the model that was trained on everything.
<split>.origin.json beside a CSV says what it was made with; where that has changed, the CSV is refused.
"""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import PREDICTION_KEYS, VIEW_KEYS, Competition, Config, fold_files, load_config
from utils.cli import (
    ArgumentParser,
    add_config_arguments,
    next_line,
    parse_early,
    parse_fold,
    run_script,
    script_name,
)
from utils.errors import DONE, BadInput


def read_arguments(argv: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read the command line and the config; end the process if --update finds nothing to do, without torch.
    Raises BadInput.
    """
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--fold', type=parse_fold, required=True, metavar='K|all', help='a fold, -1, or all')
    target = parser.add_mutually_exclusive_group(required=True)
    split_help = 'predict the validation photos of the fold, or the test photos; required, or --image'
    target.add_argument('--split', choices=['oof', 'test'], help=split_help)
    target.add_argument('--image', type=Path, help='predict one photo of any size; required, or --split')
    out_help = 'file for the overlay of --image; output/<name>/<photo>_overlay.png by default'
    parser.add_argument('--out', type=Path, help=out_help)
    parser.add_argument('--save-probs', action='store_true', help='write <split>_probs.npy beside the CSV')
    parser.add_argument('--no-tta', action='store_true', help='predict one plain view, as validation does')
    update_help = 'do nothing if the CSV is there, made by the same best.pt with the same settings'
    parser.add_argument('--update', action='store_true', help=update_help)
    args = parser.parse_args(argv)
    if args.out is not None and args.image is None:
        parser.error('--out goes with --image; a CSV of --split is written into the run folder')
    if args.save_probs and args.split is None:
        parser.error('--save-probs goes with --split, not with --image')
    if args.update and args.split is None:
        parser.error('--update goes with --split, not with --image')
    cfg = load_config(args.cfg, args.set)
    if args.fold is not None and args.fold >= cfg.folds:
        raise BadInput(f'--fold {args.fold}: found no such fold, expected 0 to {cfg.folds - 1}, -1 or all')
    if args.update and is_made(cfg, args):
        print(f'{next(iter(plan_csvs(cfg, args.fold, args.split)))}: is up to date')
        sys.exit(DONE)
    return cfg, args


def is_made(cfg: Config, args: Namespace) -> bool:
    """Tell whether the CSVs and probabilities are there that these arguments ask for. Raises BadInput."""
    from data.folds import folds_path
    from submission import probs_path
    from voting.origin import is_current
    from voting.thresholds import HISTOGRAMS

    has_histograms = cfg.competition.is_multilabel and args.split == 'oof'
    if args.split == 'oof' and not folds_path(cfg).exists():
        return False
    for csv, checkpoints in plan_csvs(cfg, args.fold, args.split).items():
        beside = [probs_path(csv)] * args.save_probs + [csv.with_name(HISTOGRAMS)] * has_histograms
        if not all(path.exists() for path in beside):
            return False
        if not is_current(csv, checkpoints, prediction_settings(cfg, csv, not args.no_tta)):
            return False
    return True


def plan_csvs(cfg: Config, fold: int | None, split: str) -> dict[Path, list[Path]]:
    """Return the CSVs that a prediction writes, that of all folds together first, each with its best.pt."""
    checkpoints = [cfg.run_dir(k) / 'best.pt' for k in (range(cfg.folds) if fold is None else [fold])]
    together = {cfg.output_dir / cfg.name / f'{split}.csv': checkpoints} if fold is None else {}
    return together | {path.with_name(f'{split}.csv'): [path] for path in checkpoints}


def prediction_settings(cfg: Config, csv: Path, tta: bool) -> dict[str, Any]:
    """Return all that a CSV in a run folder depends on, but its checkpoints. Raises BadInput."""
    from data.folds import folds_path
    from data.layout import annotation_files
    from voting.origin import content_hash
    from voting.thresholds import thresholds_of

    is_oof = csv.stem == 'oof'
    files = annotation_files(cfg.data_root, 'train' if is_oof else 'test')
    views = cfg if tta else Config()
    settings = {key: getattr(views if key in VIEW_KEYS else cfg, key) for key in PREDICTION_KEYS}
    changed = {'mode': 'json', 'exclude_defaults': True, 'exclude': {'group'}}
    settings['competition'] = cfg.competition.model_dump(**changed)
    settings['data'] = [*map(content_hash, files)]
    if is_oof:
        settings['folds'] = content_hash(folds_path(cfg))
    if cfg.competition.is_multilabel:
        settings['thresholds'] = thresholds_of(csv, cfg.folds, len(cfg.classes))
    return settings


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch

from data.bands import is_array, read_bands
from data.cache import Cache, open_cache
from data.folds import read_folds, read_scenes, split_fold
from data.photos import likely_range, show_range
from engine.checkpoint import load_oof_run, load_run
from engine.distributed import Ranks, start_ranks
from engine.inference import (
    Band,
    Truths,
    mean_band,
    photo_bands,
    predict_shard,
    predict_shard_by_folds,
    to_mask,
)
from engine.writer import Predictions
from metrics import LEVEL, format_table
from submission import metric_of, open_probs, probs_to_bytes
from utils.log import log, start_log
from utils.plotting import outline_side, overlay, to_display, write_png
from utils.progress import progress
from voting.origin import Origin, identify_checkpoints, read_origin
from voting.thresholds import FILE as THRESHOLDS
from voting.thresholds import HISTOGRAMS, read_histograms, read_thresholds, threshold_counts

BAND_ROWS = 1024  # of a photo, drawn at a time


@dataclass(frozen=True)
class Settings:
    """The settings of one prediction, and the process that makes it."""

    cfg: Config
    save_probs: bool
    tta: bool
    ranks: Ranks
    command: str  # as it was typed

    def origin(self, csv: Path, checkpoints: Sequence[Path], photos: dict[str, list] | None = None) -> Origin:
        """Say what a CSV is made with; before the checkpoints are loaded, lest they change in between."""
        identities = identify_checkpoints(csv.parent, checkpoints)
        return Origin(identities, prediction_settings(self.cfg, csv, self.tta), self.command, photos)


def main(
    cfg: Config, fold: int | None, split: str, save_probs: bool = False, tta: bool = True, command: str = ''
) -> float:
    """Predict one fold, or all (None), and write the CSV, which keeps the command; return oof's score, or
    nan. Raises BadInput.
    """
    ranks = start_ranks(cfg)
    folder = cfg.output_dir / cfg.name if fold is None else cfg.run_dir(fold)
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such run; train it first')
    start_log(folder if fold is not None and ranks.is_main else None, quiet=not ranks.is_main)
    settings = Settings(cfg, save_probs, tta, ranks, command)
    if split == 'oof':
        return predict_oof(settings, fold)
    predict_test(settings, fold)
    return math.nan


def predict_oof(settings: Settings, fold: int | None) -> float:
    """Write the oof.csv of one fold, or of each fold and of all together; return its score."""
    cfg, ranks, metric = settings.cfg, settings.ranks, metric_of(settings.cfg.competition)
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'train'))
    folds = ranks.main_process_first(lambda: read_folds(cfg, cache))
    if fold == -1:
        raise BadInput('--fold -1: a model that was trained on everything has no photos out of fold')
    scenes = ranks.main_process_first(lambda: read_scenes(cfg, cache))
    predicted = []
    for k in range(cfg.folds) if fold is None else [fold]:
        rows = split_fold(folds, k)[1]
        predicted.append(predict_oof_fold(settings, k, cache, rows, scenes[rows]))
    counts = np.concatenate([fold_counts for fold_counts, _ in predicted])
    if fold is None and ranks.is_main:
        merge_oof(settings, cache, folds)
    log.info(format_table(counts, cfg.classes, metric))
    score = metric.interval(counts)
    remark = ', on which the epoch was chosen (keep: best)' if any(chosen for _, chosen in predicted) else ''
    log.info(f'{metric.label} {score}: {LEVEL:.0%} bootstrap interval on {len(counts)} photos{remark}')
    return score.value


def predict_oof_fold(
    settings: Settings, k: int, cache: Cache, rows: np.ndarray, scenes: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Write the oof.csv of fold k from its n rows of the cache, of (n,) scenes; return their (n, 3, K)
    image_counts, and whether the epoch of its model was chosen on them.
    """
    cfg, ranks, form = settings.cfg, settings.ranks, cache.coco.form
    names, csv = cache.names(rows), cfg.run_dir(k) / 'oof.csv'
    photos = {name: [k, scene] for name, scene in zip(names, scenes.tolist(), strict=True)}
    origin = settings.origin(csv, [csv.with_name('best.pt')], photos)
    run = load_oof_run(cfg, k, names, ranks.device)
    counts, truths = np.zeros((len(rows), 3, len(cfg.classes)), np.int64), Truths(cache, rows)
    with Predictions(csv, names, form, settings.save_probs, ranks, origin) as files:
        for band in predict_shard(run, cache, rows, ranks, settings.tta, f'oof fold {k}'):
            mask, probs = write_band(files, band, run.cfg, run.thresholds)
            counts[band.position] += truths.count(band.position, band.top, mask)
            if cfg.competition.is_multilabel:
                truth = truths.rows_of(band.position, band.top, mask.shape[-2])
                files.add_histogram(band.position, threshold_counts(probs, truth))
    counts = ranks.sum(torch.from_numpy(counts).to(ranks.device)).cpu().numpy()
    metric = metric_of(cfg.competition)
    score = f'{metric.label} {metric.interval(counts)} on {len(rows)} photos'
    log.info(f'fold {k}: {score}; wrote {csv}')
    return counts, run.cfg.keep == 'best'


def write_band(
    files: Predictions, band: Band, cfg: Config, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Write the mask and, if they are asked for, the probabilities of a band; return both."""
    mask = to_mask(band.probs, cfg, thresholds)
    needs_probs = files.files.keys() != {'masks'}
    probs = probs_to_bytes(band.probs, mask.shape[-1]) if needs_probs else None
    files.write(band.position, mask, probs, band.top)
    return mask, probs


def merge_oof(settings: Settings, cache: Cache, folds: np.ndarray) -> None:
    """Write <name>/oof.csv from the CSVs of all folds, in the order of the data set."""
    cfg, save_probs, form = settings.cfg, settings.save_probs, cache.coco.form
    csv, names = cfg.output_dir / cfg.name / 'oof.csv', cache.names(np.arange(len(cache)))
    paths = [cfg.run_dir(k) / 'oof.csv' for k in range(cfg.folds)]
    origin = merge_origins(paths, names, settings.origin(csv, []))
    with ExitStack() as stack:
        readers = [stack.enter_context(form.reader(path)) for path in paths]
        arrays = [open_probs(reader, form) for reader in readers] if save_probs else []
        histograms = []
        if cfg.competition.is_multilabel:
            histograms = [read_histograms(path.with_name(HISTOGRAMS), len(cfg.classes)) for path in paths]
        positions = [{name: n for n, name in enumerate(reader.image_ids)} for reader in readers]
        files = stack.enter_context(Predictions(csv, names, form, save_probs, Ranks.alone(), origin))
        for row, (name, k) in enumerate(zip(names, folds, strict=True)):
            probs = arrays[k][positions[k][name]] if save_probs else None
            files.write(row, readers[k].read(name), probs)
            if histograms:
                files.add_histogram(row, histograms[k][positions[k][name]])
    log.info(f'wrote {csv}')


def merge_origins(csvs: Sequence[Path], names: Sequence[str], empty: Origin) -> Origin:
    """Fill the origin of <name>/oof.csv with the checkpoints and the photos of the CSVs of all folds."""
    origins = {csv.parent.name: read_origin(csv) for csv in csvs}
    checkpoints = {f'{fold}/best.pt': one.checkpoints['best.pt'] for fold, one in origins.items()}
    photos = {name: place for one in origins.values() for name, place in one.photos.items()}
    return replace(empty, checkpoints=checkpoints, photos={name: photos[name] for name in names})


def predict_test(settings: Settings, fold: int | None) -> None:
    """Write the test.csv of one fold, or of each fold and of their averaged probabilities."""
    cfg, ranks = settings.cfg, settings.ranks
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'test'))
    rows, form = np.arange(len(cache)), cache.coco.form
    thresholds = read_thresholds(cfg.output_dir / cfg.name, len(cfg.classes))
    folds = range(cfg.folds) if fold is None else [fold]
    # the files of the mean come first, so that the ExitStack ends them last
    origins = {csv: settings.origin(csv, paths) for csv, paths in plan_csvs(cfg, fold, 'test').items()}
    runs = [load_run(cfg, k, ranks.device) for k in folds]
    desc = 'test all folds' if fold is None else f'test fold {fold}'
    with ExitStack() as stack:
        names = cache.names(rows)
        files = [
            stack.enter_context(Predictions(csv, names, form, settings.save_probs, ranks, origin))
            for csv, origin in origins.items()
        ]
        for bands in predict_shard_by_folds(runs, cache, rows, ranks, settings.tta, desc):
            bands = [mean_band(bands), *bands] if fold is None else bands
            for file, band in zip(files, bands, strict=True):
                write_band(file, band, cfg, thresholds)
    for csv in origins:
        log.info(f'wrote {csv}, {len(rows)} photos')


def predict_photo(
    cfg: Config, fold: int | None, photo_path: Path, out: Path | None, tta: bool = True
) -> Path:
    """Write an overlay of a photo, predicted by one fold or by all; return its path. Raises BadInput."""
    start_log(None)
    device = start_ranks(cfg).device
    photo = read_single(photo_path, cfg.competition)
    folds = progress(range(cfg.folds) if fold is None else [fold], 'folds', 'fold', quiet=fold is not None)
    runs = [load_run(cfg, k, device) for k in folds]
    bands = zip(*(photo_bands(run, photo, tta) for run in runs), strict=True)
    mask = LargeMask(photo.shape[:2], len(cfg.classes))
    own = cfg.model_copy(update={'competition': cfg.competition.model_copy(update={'score_size': 'own'})})
    for parts in bands:
        probs = sum(part for _, part in parts) / len(runs)
        mask.add(parts[0][0], to_mask(probs, own, runs[0].thresholds))
    out = out or cfg.output_dir / cfg.name / f'{photo_path.stem}_overlay.png'
    write_png(out, draw_overlay(photo, mask))
    shares = mask.pixels / (photo.shape[0] * photo.shape[1])
    summary = [f'{cfg.classes[k]} {shares[k]:.1%}' for k in np.argsort(-shares) if shares[k] >= 0.0005]
    print(f'{photo_path}: {", ".join(summary) or "no class"}; wrote {out}')
    return out


class LargeMask:
    """The mask of a large photo, which comes in rows: ids, or a bit for each class that may overlap."""

    def __init__(self, size: tuple[int, int], num_classes: int) -> None:
        self.pixels = np.zeros(num_classes, np.int64)
        self.painted = np.zeros(size, np.uint8)
        self.bits: np.ndarray | None = None  # (P, H, W), a bit a class

    def add(self, top: int, mask: np.ndarray) -> None:
        """Add rows from `top` on: (h, W) ids, or (K, h, W) planes."""
        band = slice(top, top + mask.shape[-2])
        if mask.ndim == 2:
            self.pixels += np.bincount(mask.ravel(), minlength=len(self.pixels))
            self.painted[band] = mask
            return
        self.pixels += np.count_nonzero(mask, axis=(1, 2))
        bits = np.packbits(mask, axis=0)
        if self.bits is None:
            self.bits = np.zeros((len(bits), *self.painted.shape), np.uint8)
        self.bits[:, band] = bits

    def rows(self, top: int, stop: int) -> np.ndarray:
        """Return rows of the mask: (h, W) ids, or (K, h, W) planes."""
        if self.bits is None:
            return self.painted[top:stop]
        return np.unpackbits(self.bits[:, top:stop], axis=0, count=len(self.pixels))


def draw_overlay(photo: np.ndarray, mask: LargeMask) -> np.ndarray:
    """Draw a mask over its photo, a band of rows at a time."""
    side, height = outline_side(photo.shape), len(photo)
    picture = np.empty((*photo.shape[:2], 3), np.uint8)
    for top in range(0, height, BAND_ROWS):
        stop = min(top + BAND_ROWS, height)
        first, last = max(0, top - side), min(height, stop + side)  # an outline looks beyond the band
        drawn = overlay(to_display(photo[first:last]), mask.rows(first, last), side=side)
        picture[top:stop] = drawn[top - first : stop - first]
    return picture


def read_single(path: Path, competition: Competition) -> np.ndarray:
    """Read a photo of any kind as (H, W, channels), as far as it decodes. Raises BadInput.

    One of more than 8 bits is scaled from `intensity`, as the training photos were, or grey and RGB ones from
    likely_range.
    """
    if competition.intensity is None and competition.channels in (1, 3) and not is_array(path):
        likely = likely_range(path)
        if likely is not None:
            log.info(f'{path}: more than 8 bits a channel: {show_range(likely)} become 0 to 255')
            competition = competition.model_copy(update={'intensity': likely})
    return read_bands(path, competition, lenient=True)


def next_command(cfg: Config, args: Namespace) -> str:
    """Name the command that follows: the choice of thresholds, prediction of the test photos or a report,
    then a vote or a check.
    """
    folder = cfg.output_dir / cfg.name
    if args.split == 'oof' and cfg.competition.is_multilabel and not (folder / THRESHOLDS).exists():
        return next_line('evaluate.py', 'thresholds', folder, '--data', cfg.data_root)
    if args.split == 'oof' and not (cfg.data_root / 'test.json').is_file():
        report = ('viz.py', 'report', '--name', cfg.name, '--output', cfg.output_dir)
        return next_line(*report, '--data', cfg.data_root)
    csvs = fold_files(folder, 'test.csv')
    options = ['--split', 'test'] + ['--save-probs'] * args.save_probs + ['--no-tta'] * args.no_tta
    if args.split == 'oof':
        words = ['infer.py', '--fold', 'all' if args.fold is None else args.fold, *options]
    elif args.fold not in (None, -1) and len(csvs) > 2:  # of two with equal weights the first would decide
        words = ['ensemble.py', *csvs, '--out', cfg.output_dir / 'submission.csv']
    elif args.fold not in (None, -1) and len(csvs) == 2 == cfg.folds:
        words = ['infer.py', '--fold', 'all', *options]
    else:
        csv = (folder if args.fold is None else cfg.run_dir(args.fold)) / 'test.csv'
        words = ['submission.py', 'check', csv]
    return next_line(*words, cfg=args.cfg, changes=args.set)


def command(argv: list[str] | None = None) -> None:
    cfg, args = read_arguments(argv)
    if args.image is not None:
        predict_photo(cfg, args.fold, args.image, args.out, not args.no_tta)
    else:
        typed = shlex.join([*script_name().split(), *(sys.argv[1:] if argv is None else argv)])
        main(cfg, args.fold, args.split, args.save_probs, not args.no_tta, f'python {typed}')
        log.info(next_command(cfg, args))


if __name__ == '__main__':
    run_script(command)
