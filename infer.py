"""Stage 2: predict the photos that a fold was validated on, or the test photos, with test-time augmentation.

    python infer.py --cfg configs/convnext.yaml --fold 0 --split oof     # .../fold0/oof.csv, and its score
    python infer.py --cfg configs/convnext.yaml --fold all --split oof   # convnext/oof.csv, over all folds
    python infer.py --cfg configs/convnext.yaml --fold 0 --split test    # .../fold0/test.csv
    python infer.py --cfg configs/convnext.yaml --fold all --split test  # and the mean, convnext/test.csv
    python infer.py --cfg configs/convnext.yaml --fold 0 --image photo.jpg
    python infer.py --cfg configs/convnext.yaml --fold 0 --image photos --out output/photos  # or a video.mp4
    python infer.py --cfg configs/convnext.yaml --fold 0 --split test --update   # only if it would change
    python infer.py --model shared/convnext --image photo.jpg       # a folder that tools.share wrote
    python infer.py --model owner/name@revision --split test --set data_root=DIR   # of the Hugging Face hub

    torchrun --standalone --nproc-per-node=8 infer.py --cfg configs/convnext.yaml --fold 0 --split test

The model is rebuilt from best.pt alone; the data, the views and the batch size are the config's. A
pseudo-label retrain is --set name=convnext-pseudo. --fold -1 is the model that was trained on everything.
--model predicts with all folds that were shared, or one, and writes into output/<name>-shared/; the data has
the classes of the model. Without a network a model of the hub is taken from its cache.
<split>.origin.json beside a CSV says what it was made with; where that has changed, the CSV is refused.

--image DIR|VIDEO|PHOTO --out DIR writes a mask and an overlay of each photo or frame, and pieces.csv: what it
shows, how sure the model is, and where. The same command goes on with what was interrupted.
"""

import argparse
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from config import PREDICTION_KEYS, VIEW_KEYS, Config, fold_files, fold_of, load_config
from utils.cli import (
    ArgumentParser,
    add_config_arguments,
    at_least,
    next_line,
    parse_early,
    parse_fold,
    run_script,
    script_name,
)
from utils.errors import DONE, BadInput, CheckFailed, plural

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')  # endings of an --out that is a file


def read_arguments(argv: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read the command line and the config; end the process if --update finds nothing to do, without torch.
    Raises BadInput.
    """
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser, required=False)
    model_help = 'shared folder, or owner/name[@revision] of the Hugging Face hub; required, or --cfg'
    parser.add_argument('--model', metavar='DIR', help=model_help)
    fold_help = 'a fold, -1, or all; required with --cfg, else all that --model has'
    parser.add_argument('--fold', type=parse_fold, default=argparse.SUPPRESS, metavar='K|all', help=fold_help)
    target = parser.add_mutually_exclusive_group(required=True)
    split_help = 'predict the validation photos of the fold, or the test photos; required, or --image'
    target.add_argument('--split', choices=['oof', 'test'], help=split_help)
    image_help = 'predict a photo, the photos of a folder, or a video, of any size; required, or --split'
    target.add_argument('--image', type=Path, help=image_help)
    out_help = (
        'folder for the masks, overlays and pieces.csv of --image; of one photo also a file for its overlay '
        'alone, output/<name>/<photo>_overlay.png by default'
    )
    parser.add_argument('--out', type=Path, help=out_help)
    add_piece_arguments(parser)
    parser.add_argument('--save-probs', action='store_true', help='write <split>_probs.npy beside the CSV')
    parser.add_argument('--no-tta', action='store_true', help='predict one plain view, as validation does')
    update_help = 'do nothing if the CSV is there, made by the same best.pt with the same settings'
    parser.add_argument('--update', action='store_true', help=update_help)
    args = parser.parse_args(argv)
    if args.out is not None and args.image is None:
        parser.error('--out goes with --image; a CSV of --split is written into the run folder')
    refuse_piece_arguments(parser, args)
    if args.save_probs and args.split is None:
        parser.error('--save-probs goes with --split, not with --image')
    if args.update and args.split is None:
        parser.error('--update goes with --split, not with --image')
    if (args.cfg is None) == (args.model is None):
        parser.error('expected --cfg, or --model')
    if args.model is not None:
        if args.split == 'oof':
            parser.error(
                '--split oof goes with --cfg: which photos are out of fold is known in the run folder'
            )
        cfg = open_model(args)
    elif 'fold' not in args:
        parser.error('the following arguments are required: --fold')
    else:
        cfg = load_config(args.cfg, args.set)
    if args.fold is not None and args.fold >= cfg.folds:
        raise BadInput(f'--fold {args.fold}: found no such fold, expected 0 to {cfg.folds - 1}, -1 or all')
    if args.update and is_made(cfg, args):
        print(f'{next(iter(plan_csvs(cfg, args.fold, args.split, args.model)))}: is up to date')
        sys.exit(DONE)
    return cfg, args


def open_model(args: Namespace) -> Config:
    """Return the config of --model, and replace that by its folder, and --fold by what it has. Raises
    BadInput.
    """
    from engine.hub import config_of, open_shared

    path = Path(args.model)
    if (path / 'best.pt').is_file() and (path / 'config.yaml').is_file():
        instead = f'--cfg {path / "config.yaml"} --fold {fold_of(path)}'
        raise BadInput(f'--model {path}: is the folder of a run; expected {instead}')
    shared = open_shared(args.model)
    folds, fold = [*shared.paths], vars(args).get('fold')
    if fold is not None and fold not in folds:
        raise BadInput(f'--fold {fold}: {shared.folder} has {", ".join(map(str, folds))}')
    args.model, args.fold = shared.folder, folds[0] if len(folds) == 1 else fold
    cfg = config_of(shared, args.set, with_data=args.split is not None)
    run = cfg.output_dir / cfg.name
    if args.split and fold_files(run, 'best.pt', with_all=True):
        raise BadInput(f'{run}: holds a run of its own; give another name: --set name=NAME')
    return cfg


def checkpoints_of(cfg: Config, fold: int | None, model: Path | None = None) -> dict[int, Path]:
    """Return the checkpoint of a fold, or of all (None): best.pt, or those of the shared folder `model`."""
    if model is None:
        return {k: cfg.run_dir(k) / 'best.pt' for k in (range(cfg.folds) if fold is None else [fold])}
    from engine.hub import read_shared

    paths = read_shared(model).paths
    return paths if fold is None else {fold: paths[fold]}


def add_piece_arguments(parser: ArgumentParser) -> None:
    """Add the options of --image with a folder as --out."""
    every_help = 'of a video, take each N-th frame; by default about two a second'
    parser.add_argument('--every', type=at_least(1, 10**6), metavar='N', help=every_help)
    confidence = 'mean probability below which a piece is not sure; 0.5 by default'
    parser.add_argument('--min-confidence', type=parse_share, metavar='P', help=confidence)
    share = "share of a photo's pixels below which a piece is left out of pieces.csv; 0.004 by default"
    parser.add_argument('--min-share', type=parse_share, metavar='P', help=share)
    parser.add_argument(
        '--overwrite', action='store_true', help='replace what an earlier run wrote into --out'
    )


def refuse_piece_arguments(parser: ArgumentParser, args: Namespace) -> None:
    """End the process if an option of a folder as --out is given without one."""
    for key in ('every', 'min_confidence', 'min_share', 'overwrite'):
        value = getattr(args, key)
        if value is not None and value is not False and not has_folder(args):
            parser.error(f'--{key.replace("_", "-")} goes with --image and a folder as --out')


def has_folder(args: Namespace) -> bool:
    """Return whether --out is a folder to write into, which need not exist; a picture's name is a file."""
    return args.out is not None and (args.out.suffix.lower() not in PICTURES or args.out.is_dir())


def parse_share(text: str) -> float:
    """Convert the text of an option that takes a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected a number from 0 to 1')
    return value


def is_made(cfg: Config, args: Namespace) -> bool:
    """Tell whether the CSVs and probabilities are there that these arguments ask for. Raises BadInput."""
    from data.folds import folds_path
    from submission import probs_path
    from voting.origin import is_current
    from voting.thresholds import HISTOGRAMS

    has_histograms = cfg.competition.is_multilabel and args.split == 'oof'
    if args.split == 'oof' and not folds_path(cfg).exists():
        return False
    for csv, checkpoints in plan_csvs(cfg, args.fold, args.split, args.model).items():
        beside = [probs_path(csv)] * args.save_probs + [csv.with_name(HISTOGRAMS)] * has_histograms
        if not all(path.exists() for path in beside):
            return False
        if not is_current(csv, checkpoints, prediction_settings(cfg, csv, not args.no_tta, args.model)):
            return False
    return True


def plan_csvs(cfg: Config, fold: int | None, split: str, model: Path | None = None) -> dict[Path, list[Path]]:
    """Return the CSVs that a prediction writes, that of all folds together first, each with its
    checkpoints.
    """
    checkpoints = checkpoints_of(cfg, fold, model)
    together = {cfg.output_dir / cfg.name / f'{split}.csv': [*checkpoints.values()]} if fold is None else {}
    return together | {cfg.run_dir(k) / f'{split}.csv': [path] for k, path in checkpoints.items()}


def prediction_settings(cfg: Config, csv: Path, tta: bool, model: Path | None = None) -> dict[str, Any]:
    """Return all that a CSV in a run folder depends on, but its checkpoints. Raises BadInput."""
    from data.folds import folds_path
    from data.layout import annotation_files
    from engine.hub import MODELS_FILE
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
    if model is not None:
        settings['shared'] = content_hash(model / MODELS_FILE)
    elif cfg.competition.is_multilabel:
        settings['thresholds'] = thresholds_of(csv, cfg.folds, len(cfg.classes))
    return settings


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch

from data.cache import Cache, open_cache
from data.folds import read_folds, read_scenes, split_fold
from data.video import is_video
from engine.checkpoint import Run, load_oof_run, load_run
from engine.distributed import Ranks, start_ranks
from engine.inference import (
    Band,
    Truths,
    mean_band,
    predict_shard,
    predict_shard_by_folds,
    to_mask,
)
from engine.own_photos import draw_overlay, predict_photos, read_single
from engine.piece_files import (
    CSV,
    MASKS,
    OVERLAYS,
    PieceFiles,
    batches,
    model_hash,
    open_source,
)
from engine.pieces import Limits
from engine.writer import Predictions
from metrics import LEVEL, format_table
from submission import metric_of, open_probs, probs_to_bytes
from utils.files import make_folder, refuse_inside
from utils.log import log, start_log
from utils.plotting import write_png
from utils.progress import Bar, progress
from voting.origin import Origin, identify_checkpoints, read_origin
from voting.thresholds import FILE as THRESHOLDS
from voting.thresholds import HISTOGRAMS, read_histograms, threshold_counts


@dataclass(frozen=True)
class Settings:
    """The settings of one prediction, and the process that makes it."""

    cfg: Config
    save_probs: bool
    tta: bool
    ranks: Ranks
    command: str  # as it was typed
    model: Path | None = None  # a shared folder, in place of the run's best.pt

    def origin(self, csv: Path, checkpoints: Sequence[Path], photos: dict[str, list] | None = None) -> Origin:
        """Say what a CSV is made with; before the checkpoints are loaded, lest they change in between."""
        identities = identify_checkpoints(csv.parent, checkpoints)
        return Origin(
            identities, prediction_settings(self.cfg, csv, self.tta, self.model), self.command, photos
        )


def main(
    cfg: Config,
    fold: int | None,
    split: str,
    save_probs: bool = False,
    tta: bool = True,
    command: str = '',
    model: Path | None = None,
) -> float:
    """Predict one fold, or all (None), of a run, or of the shared folder `model`, and write the CSV, which
    keeps the command; return oof's score, or nan. Raises BadInput.
    """
    ranks = start_ranks(cfg)
    folder = cfg.output_dir / cfg.name if fold is None else cfg.run_dir(fold)
    if model is not None:
        make_folder(folder)
    elif not folder.is_dir():
        raise BadInput(f'{folder}: no such run; train it first')
    start_log(folder if fold is not None and ranks.is_main else None, quiet=not ranks.is_main)
    settings = Settings(cfg, save_probs, tta, ranks, command, model)
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
    run = load_oof_run(cfg, k, cache, rows, ranks.device)
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
    needs_probs = files.shapes.keys() != {'masks'}
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
    # the files of the mean come first, so that the ExitStack ends them last
    origins = {
        csv: settings.origin(csv, paths)
        for csv, paths in plan_csvs(cfg, fold, 'test', settings.model).items()
    }
    checkpoints = checkpoints_of(cfg, fold, settings.model)
    runs = [load_run(cfg, k, ranks.device, path=path) for k, path in checkpoints.items()]
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
                write_band(file, band, cfg, runs[0].thresholds)
    for csv in origins:
        log.info(f'wrote {csv}, {len(rows)} photos')


def predict_photo(
    cfg: Config,
    fold: int | None,
    photo_path: Path,
    out: Path | None,
    tta: bool = True,
    model: Path | None = None,
) -> Path:
    """Write an overlay of a photo, predicted by one fold or by all; return its path. Raises BadInput."""
    start_log(None)
    out = out or cfg.output_dir / cfg.name / f'{photo_path.stem}_overlay.png'
    refuse_inside(out, [photo_path])
    photo = read_single(photo_path, cfg.competition)
    mask = predict_photos(load_folds(cfg, fold, model), [photo], tta)[0]
    write_png(out, draw_overlay(photo, mask.rows))
    shares = mask.pixels / (photo.shape[0] * photo.shape[1])
    summary = [f'{cfg.classes[k]} {shares[k]:.1%}' for k in np.argsort(-shares) if shares[k] >= 0.0005]
    print(f'{photo_path}: {", ".join(summary) or "no class"}; wrote {out}')
    return out


def load_folds(cfg: Config, fold: int | None, model: Path | None = None) -> list[Run]:
    """Load the model of one fold, or of all (None), of a run or of a shared folder. Raises BadInput."""
    device = start_ranks(cfg).device
    paths = checkpoints_of(cfg, fold, model)
    folds = progress(paths, 'folds', 'fold', quiet=fold is not None)
    return [load_run(cfg, k, device, path=paths[k]) for k in folds]


def predict_files(cfg: Config, args: Namespace) -> None:
    """Write what a photo, the photos of a folder or a video show into the folder args.out; go on where it was
    interrupted. Raises BadInput, Interrupted, and CheckFailed if some of it cannot be predicted.
    """
    start_log(None)
    limits, tta = Limits(**given(confidence=args.min_confidence, share=args.min_share)), not args.no_tta
    source = open_source(args.image, args.out, cfg.competition, args.every)
    runs = load_folds(cfg, args.fold, args.model)
    settings = {'image': args.image.name, 'every': source.every, **asdict(limits)}
    settings |= {key: getattr(cfg if tta else Config(), key) for key in VIEW_KEYS}
    settings |= {'window': cfg.window, 'thresholds': runs[0].thresholds}
    settings['model'] = model_hash(run.model for run in runs)
    with PieceFiles(args.out, cfg.competition, limits, settings, args.overwrite) as files:
        before, start = files.done.count, perf_counter()
        if before:
            log.info(f'{args.out}: {plural(before, source.noun)} done before; going on')
        with Bar(desc=args.image.name, unit=source.noun, total=source.total, initial=before) as bar:
            for batch in batches(source.items(files.done), runs[0].cfg):
                masks = predict_photos(runs, [item.photo for item in batch], tta, keep=True)
                for item, mask in zip(batch, masks, strict=True):
                    files.write(item, mask)
                    bar.update()
        files.finish(source)
    done, rate = files.done, (files.done.count - before) / (perf_counter() - start)
    pieces = f'{plural(done.pieces, "piece")}, {done.not_sure:,} of them not sure (below {limits.confidence})'
    log.info(f'{args.image}: {plural(done.count, source.noun)}{source.pace}, {pieces}')
    pace = f'; {rate:.1f} {source.noun}s a second, reading and writing included' if rate else ''
    log.info(f'wrote {args.out}: {CSV}, {MASKS} and {OVERLAYS}{pace}')
    if source.faults:
        raise CheckFailed(source.say_faults())


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {key: value for key, value in options.items() if value is not None}


def next_command(cfg: Config, args: Namespace) -> str:
    """Name the command that follows: the choice of thresholds, prediction of the test photos or a report,
    then a vote or a check.
    """
    folder = cfg.output_dir / cfg.name
    if args.model is not None:
        csv = next(iter(plan_csvs(cfg, args.fold, args.split, args.model)))
        return next_line('submission.py', 'check', csv, '--data', cfg.data_root)
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
    if args.image is not None and has_folder(args):
        predict_files(cfg, args)
    elif args.image is not None:
        if args.image.is_dir() or (args.image.is_file() and is_video(args.image)):
            raise BadInput(f'{args.image}: give a folder as --out, for the masks, overlays and {CSV} of all')
        predict_photo(cfg, args.fold, args.image, args.out, not args.no_tta, args.model)
    else:
        typed = shlex.join([*script_name().split(), *(sys.argv[1:] if argv is None else argv)])
        options = [args.save_probs, not args.no_tta, f'python {typed}', args.model]
        main(cfg, args.fold, args.split, *options)
        log.info(next_command(cfg, args))


if __name__ == '__main__':
    run_script(command)
