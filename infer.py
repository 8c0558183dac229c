"""Stage 2: predicts with test-time augmentation, the validation photos (out of fold) or the test photos,
with one code path.

    python infer.py --cfg configs/convnext.yaml --fold 0 --split oof     # .../fold0/oof.csv, and its mIoU
    python infer.py --cfg configs/convnext.yaml --fold all --split oof   # convnext/oof.csv, over all folds
    python infer.py --cfg configs/convnext.yaml --fold 0 --split test    # .../fold0/test.csv
    python infer.py --cfg configs/convnext.yaml --fold all --split test  # output/convnext/test.csv, averaged
    python infer.py --cfg configs/convnext.yaml --fold 0 --image photo.jpg

    torchrun --standalone --nproc-per-node=8 infer.py --cfg configs/convnext.yaml --fold 0 --split test

The model is rebuilt from best.pt alone; data, views and batch size are the config's. A pseudo-label retrain
is --set name=convnext-pseudo. --fold -1 is the model that was trained on everything.
"""

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from config import Config, fold_files, load_config
from data.cache import Cache, open_cache
from data.coco import read_rgb
from data.folds import read_folds, split_fold
from engine.checkpoint import Run, load_oof_run, load_run
from engine.distributed import Ranks, start_ranks
from engine.inference import predict_probs, predict_rows, to_stride
from engine.writer import Predictions
from metrics import DRAWS, LEVEL, confusion_matrix, format_table, image_counts, interval
from networks.layers import resize
from submission import SubmissionReader, open_probs, probs_to_ids
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import BadInput
from utils.files import allocate_array
from utils.log import log, start_log
from utils.plotting import overlay, write_png
from utils.progress import progress

NO_PROBS = np.empty(0, np.uint8)


def main(cfg: Config, fold: int | None, split: str, save_probs: bool = False, tta: bool = True) -> float:
    """Predicts one fold, or all of them (None), and writes the CSV. Returns the mIoU of oof, nan for test.
    Raises BadInput.
    """
    ranks = start_ranks(cfg)
    folder = cfg.output_dir / cfg.name if fold is None else cfg.run_dir(fold)
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such run; train it first')
    start_log(folder if fold is not None and ranks.is_main else None, quiet=not ranks.is_main)
    if split == 'test':
        predict_test(cfg, fold, ranks, folder, save_probs, tta)
        return math.nan
    return predict_oof(cfg, fold, ranks, save_probs, tta)


def predict_oof(cfg: Config, fold: int | None, ranks: Ranks, save_probs: bool, tta: bool) -> float:
    """oof.csv of one fold, or of all folds in the order of the data set, each photo by the model that never
    saw it.
    """
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'train'))
    folds = ranks.main_process_first(lambda: read_folds(cfg, cache))
    if fold == -1:
        raise BadInput('--fold -1: a model that was trained on everything has no photos out of fold')
    counted: list[np.ndarray] = []  # of each fold, (n, 3, K) image_counts
    for k in range(cfg.folds) if fold is None else [fold]:
        _, rows = split_fold(folds, k)
        names = cache.names(rows)
        run = load_oof_run(cfg, k, names, ranks.device)
        counts = np.zeros((len(rows), 3, len(cfg.classes)), np.int64)
        with Predictions(cfg.run_dir(k), 'oof', names, cfg, save_probs, ranks) as predictions:
            for place, ids, probs in predicted_ids(run, cache, rows, ranks, tta, f'oof fold {k}'):
                predictions.write(place, ids, probs)
                confusion = confusion_matrix(cache.truth(rows[place]), ids, len(cfg.classes))
                counts[place] = image_counts(confusion)
        counted.append(ranks.sum(torch.from_numpy(counts).to(ranks.device)).cpu().numpy())
        path = cfg.run_dir(k) / 'oof.csv'
        log.info(f'fold {k}: mIoU {interval(counted[-1])} on {len(rows)} photos; wrote {path}')
    if fold is None and ranks.is_main:
        merge_oof(cfg, cache, folds, save_probs)
    counts = np.concatenate(counted)
    score = interval(counts)
    log.info(format_table(counts, cfg.classes))
    log.info(f'mIoU {score}: the bracket has {LEVEL:.0%} of {DRAWS:,} draws of the {len(counts)} photos')
    return score.value


def merge_oof(cfg: Config, cache: Cache, folds: np.ndarray, save_probs: bool) -> None:
    """<name>/oof.csv of the folds' own, in the order of the data set."""
    folder, names, alone = cfg.output_dir / cfg.name, cache.names(np.arange(len(cache))), Ranks.alone()
    with ExitStack() as stack:
        paths = [cfg.run_dir(k) / 'oof.csv' for k in range(cfg.folds)]
        readers = [stack.enter_context(SubmissionReader(path, len(cfg.classes))) for path in paths]
        probs = [open_probs(reader, len(cfg.classes)) for reader in readers] if save_probs else []
        places = [{name: place for place, name in enumerate(reader.image_ids)} for reader in readers]
        merged = stack.enter_context(Predictions(folder, 'oof', names, cfg, save_probs, alone))
        for place, (name, k) in enumerate(zip(names, folds, strict=True)):
            own = probs[k][places[k][name]] if save_probs else NO_PROBS
            merged.write(place, readers[k].read(name), own)
    log.info(f'wrote {folder / "oof.csv"}')


def predict_test(
    cfg: Config, fold: int | None, ranks: Ranks, folder: Path, save_probs: bool, tta: bool
) -> None:
    """test.csv of one fold, or of the probabilities averaged over all folds, of which one is in memory at a
    time.
    """
    cache = ranks.main_process_first(lambda: open_cache(cfg, 'test'))
    rows = np.arange(len(cache))
    with Predictions(folder, 'test', cache.names(rows), cfg, save_probs, ranks) as predictions:
        if fold is None:
            predicted = averaged_probs(cfg, cache, rows, ranks, tta, folder)
        else:
            run = load_run(cfg, fold, ranks.device)
            predicted = predicted_ids(run, cache, rows, ranks, tta, f'test fold {fold}')
        for place, ids, probs in predicted:
            predictions.write(place, ids, probs)
    log.info(f'wrote {folder / "test.csv"}, {len(rows)} photos')


def averaged_probs(
    cfg: Config, cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, folder: Path
) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """(place, ids, probabilities averaged over the folds) of this rank's share of the rows, as predicted_ids;
    kept in a file meanwhile, not in memory.
    """
    share = ranks.shard(len(rows))
    path = folder / f'.averaged{ranks.rank}.partial'
    total = None
    try:
        for k in range(cfg.folds):
            run = load_run(cfg, k, ranks.device)
            desc, done = f'test fold {k}' if ranks.is_main else None, 0
            for batch, probs in predict_rows(run.model, cache, rows[share], run.cfg, ranks.device, tta, desc):
                kept = probs.cpu().numpy()
                if total is None:
                    total = allocate_array(path, np.float32, (len(share), *kept.shape[1:]))
                total[done : done + len(batch)] += kept
                done += len(batch)
        for number, place in enumerate(share):
            mean = torch.from_numpy(total[number] / cfg.folds)
            yield place, to_ids(mean[None], cfg)[0], mean
    finally:
        del total
        path.unlink(missing_ok=True)


def predicted_ids(
    run: 'Run', cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, desc: str
) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """(place among the rows, (256, 256) uint8 ids, (K, B, B) probabilities) of this rank's share of them."""
    share = ranks.shard(len(rows))
    places = iter(share)
    shown = desc if ranks.is_main else None
    for _, probs in predict_rows(run.model, cache, rows[share], run.cfg, ranks.device, tta, shown):
        for ids, own in zip(to_ids(probs, run.cfg), probs, strict=True):
            yield next(places), ids, own


def to_ids(kept: torch.Tensor, cfg: Config) -> np.ndarray:
    """(N, K, B, B) probabilities → (N, 256, 256) uint8 ids, by the config's rule."""
    return probs_to_ids(kept, cfg.downsample).to(torch.uint8).cpu().numpy()


def predict_image(
    cfg: Config, fold: int | None, image_path: Path, out: Path | None, tta: bool = True
) -> Path:
    """Writes an overlay of one photo of any size, averaged over the folds asked for; its longer side is seen
    at image_size.
    """
    start_log(None)
    device = start_ranks(cfg).device
    image = read_rgb(image_path)
    folds = list(range(cfg.folds)) if fold is None else [fold]
    total = 0.0
    for k in progress(folds, 'folds', 'fold', quiet=len(folds) == 1):
        total = total + photo_probs(load_run(cfg, k, device), image, device, tta)
    ids = total.argmax(0).to(torch.uint8).cpu().numpy()
    out = out or cfg.output_dir / cfg.name / f'{image_path.stem}_overlay.png'
    write_png(out, overlay(image, ids))
    shares = np.bincount(ids.ravel(), minlength=len(cfg.classes)) / ids.size
    found = ', '.join(f'{cfg.classes[k]} {shares[k]:.1%}' for k in np.argsort(-shares) if shares[k] > 0)
    print(f'{image_path}: {found}; wrote {out}')
    return out


def photo_probs(run: Run, image: np.ndarray, device: torch.device, tta: bool = True) -> torch.Tensor:
    """(K, H, W) probabilities of an (H, W, 3) uint8 RGB photo of any size, its longer side seen at
    image_size.
    """
    height, width = image.shape[:2]
    photo = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    scale = run.cfg.image_size / max(height, width)
    size = (to_stride(height * scale), to_stride(width * scale))
    inputs = resize(photo, size, antialias=True).round().to(torch.uint8)
    with torch.inference_mode():
        probs = predict_probs(run.model, inputs, run.cfg, device, size, tta)
        return resize(probs, (height, width), antialias=True)[0]


def next_command(cfg: Config, args: argparse.Namespace) -> str:
    """What follows a prediction: that of the test photos, and of those a vote, or a check of the only CSV."""
    folder = cfg.output_dir / cfg.name
    if args.split == 'oof' and not (cfg.data_root / 'test.json').is_file():
        report = ('viz.py', 'report', '--name', cfg.name, '--output', cfg.output_dir)
        return next_line(*report, '--data', cfg.data_root)
    folds = fold_files(folder, 'test.csv')
    if args.split == 'oof':
        flags = [f'--{name}' for name in ('save-probs', 'no-tta') if getattr(args, name.replace('-', '_'))]
        words = ['infer.py', '--fold', 'all' if args.fold is None else args.fold, '--split', 'test', *flags]
    elif args.fold not in (None, -1) and len(folds) > 1:
        words = ['ensemble.py', *folds, '--out', cfg.output_dir / 'submission.csv']
    else:
        csv = (folder if args.fold is None else cfg.run_dir(args.fold)) / 'test.csv'
        words = ['submission.py', 'check', csv]
    return next_line(*words, cfg=args.cfg, changes=args.set)


def parse_fold(text: str) -> int | None:
    if text != 'all' and not re.fullmatch(r'-1|\d{1,3}', text, re.ASCII):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a fold from 0, -1, or all')
    return None if text == 'all' else int(text)


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--fold', type=parse_fold, required=True, metavar='K|all', help='a fold, -1, or all')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        '--split',
        choices=['oof', 'test'],
        help='oof: the photos that the fold was validated on; required, or --image',
    )
    what.add_argument('--image', type=Path, help='a photo of your own, of any size; required, or --split')
    parser.add_argument(
        '--out',
        type=Path,
        help='where --image writes its overlay; output/<name>/<photo>_overlay.png by default',
    )
    parser.add_argument('--save-probs', action='store_true', help='write <split>_probs.npy beside the CSV')
    parser.add_argument(
        '--no-tta', action='store_true', help='one plain view, as in validation during training'
    )
    args = parser.parse_args(argv)
    if args.out is not None and args.image is None:
        parser.error('--out is of --image alone: a CSV is written into the run')
    if args.save_probs and args.split is None:
        parser.error('--save-probs is of --split alone')
    cfg = load_config(args.cfg, args.set)
    if args.fold is not None and args.fold >= cfg.folds:
        raise BadInput(f'--fold {args.fold}: found no such fold; expected -1 to {cfg.folds - 1}, or all')
    if args.image is not None:
        predict_image(cfg, args.fold, args.image, args.out, not args.no_tta)
    else:
        main(cfg, args.fold, args.split, args.save_probs, not args.no_tta)
        log.info(next_command(cfg, args))


if __name__ == '__main__':
    run_script(command)
