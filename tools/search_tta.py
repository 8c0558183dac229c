"""Search the views of test-time augmentation that pay, on photos out of fold, and show what each set costs.

    python -m tools.search_tta --cfg configs/convnext.yaml --fold all
    python -m tools.search_tta --cfg configs/convnext.yaml --fold 0 --flips h --rotations --scales 0.75 1 1.25

Each photo is predicted once in every view, by the model that never saw it. A set of views is a choice of
flips, rotations and scales; its prediction is the mean of its views. The set for a fold (or for a fifth of a
single fold, whose near-duplicates stay together) is chosen on the others, and compared with the plain view,
the photo alone.

Shapes: n photos, V views, C sets of views, K classes, P pixels, h W rows of a photo as engine.inference.Band
has them.
"""

import sys
from argparse import Namespace

if not __package__:
    print('run this as: python -m tools.search_tta, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Config, load_config
from utils.cli import ArgumentParser, add_config_arguments, next_line, parse_early, parse_fold, run_script
from utils.errors import BadInput


def read_arguments(argv: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read the command line and the config, whose views are all that are to be tried. Raises BadInput."""
    parser = ArgumentParser(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--fold', type=parse_fold, required=True, metavar='K|all', help='a fold, or all')
    flips, degrees, scales = ['h', 'v', 'hv'], [90, 180, 270], [0.75, 1.0, 1.25, 1.5]
    parser.add_argument('--flips', nargs='*', choices=flips, default=['h', 'v'], help='flips to try')
    parser.add_argument('--rotations', nargs='*', type=int, choices=degrees, default=[90], help='to try')
    parser.add_argument('--scales', nargs='*', type=float, default=scales, help='scales to try beside 1')
    args = parser.parse_args(argv)
    scales = sorted({1.0, *args.scales})
    views = {'tta_flips': args.flips, 'tta_rotations': args.rotations, 'tta_scales': scales}
    changes = [f'{key}={list(dict.fromkeys(values))}' for key, values in views.items()]
    cfg = load_config(args.cfg, args.set + changes)
    if args.fold is not None and not 0 <= args.fold < cfg.folds:
        raise BadInput(f'--fold {args.fold}: no such fold; expected 0 to {cfg.folds - 1}, or all')
    return cfg, args


if __name__ == '__main__':
    parse_early(read_arguments)

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product

import numpy as np
import torch
from ttach.base import Transformer

from data.cache import Cache, open_cache
from data.folds import read_folds, read_scenes, split_fold
from engine.checkpoint import Run, load_oof_run
from engine.distributed import start_ranks
from engine.inference import (
    Predictor,
    Truths,
    decide,
    finish_mask,
    list_views,
    make_views,
    predict_sizes,
    same_view,
    scored_sizes,
)
from metrics import Metric
from submission import metric_of
from utils.log import start_log
from voting.choices import AGAIN, Search, cross_fit, number_scenes, search_gain
from voting.members import split_parts

TABLE_SETS = 8  # the best ones, in the table
MAX_SETS = 4096
CHUNK = 64  # sets in one matrix product


@dataclass(frozen=True)
class ViewSet:
    """A choice of flips, rotations and scales; `views` are its numbers in the list of all views."""

    flips: tuple[str, ...]
    rotations: tuple[int, ...]
    scales: tuple[float, ...]
    views: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is the photo alone."""
        return (self.flips, self.rotations, self.scales) == ((), (), (1.0,))

    def __str__(self) -> str:
        """Format it for --set."""
        scales = [f'{scale:g}' for scale in self.scales]
        keys = {'tta_flips': self.flips, 'tta_rotations': map(str, self.rotations), 'tta_scales': scales}
        return ' '.join(f'{key}=[{",".join(values)}]' for key, values in keys.items())


@dataclass(frozen=True)
class Tally:
    """The results of predicting every photo in every view."""

    counts: np.ndarray  # (n, C, 3, K) image_counts of each photo under each set
    parts: np.ndarray  # (n,) the part of each photo, from 0
    scenes: np.ndarray  # (n,) its scene
    seconds: np.ndarray  # (V,) that each view takes for a photo


def main(cfg: Config, fold: int | None) -> ViewSet:
    """Try all views of the config on one fold, or on all (None), and print the table. Return the best set, or
    the plain view if the choice is not significantly better out of sample. Raises BadInput.
    """
    start_log(None)
    sets = list_sets(cfg)
    tally = count(cfg, fold, sets)
    metric = metric_of(cfg.competition)
    best, best_of_others = cross_fit(tally.counts, tally.parts, metric)
    order = np.argsort(-metric.score(tally.counts), kind='stable')[:TABLE_SETS]
    plain = next(number for number, view_set in enumerate(sets) if view_set.is_plain)
    print(format_table(sets, tally, plain, [*order.tolist(), plain], metric))
    out_of_sample = tally.counts[np.arange(len(tally.parts)), best_of_others[tally.parts]]
    search = Search([range(len(sets))], [plain])
    gain = search_gain(tally.counts, tally.parts, metric, search, tally.scenes)
    print(f'chosen on the other parts, out of sample: {metric.label} {metric.interval(out_of_sample)}')
    print(f'above the photo alone by {gain.signed}, {AGAIN}')
    if gain.low > 0:
        print(f'use --set {sets[best]}')
        return sets[best]
    photos = len(out_of_sample)
    print(f'no significant difference on {photos} photos; the photo alone costs least: --set {sets[plain]}')
    return sets[plain]


def count(cfg: Config, fold: int | None, sets: Sequence[ViewSet]) -> Tally:
    """Predict every view of every photo out of fold, and count the pixels of every set. Raises BadInput."""
    device = start_ranks(cfg).device
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    views = [TimedView(view) for view in make_views(cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales)]
    scenes = read_scenes(cfg, cache)
    counts, places = [], {}
    for k in range(cfg.folds) if fold is None else [fold]:
        _, rows = split_fold(folds, k)
        names = cache.names(rows)
        run = load_oof_run(cfg, k, cache, rows, device)
        counts.append(count_fold(run, cache, rows, views, sets))
        places |= {name: (k, int(scene)) for name, scene in zip(names, scenes[rows], strict=True)}
    seconds = np.array([view.seconds for view in views])
    parts = np.array([*split_parts(places).values()])
    scene = number_scenes([scene for _, scene in places.values()])
    return Tally(np.concatenate(counts), parts, scene, seconds / len(parts))


class TimedView:
    """A view that adds up the seconds from an image to its logits."""

    def __init__(self, view: Transformer) -> None:
        self.view, self.seconds = view, 0.0

    def augment_image(self, image: torch.Tensor) -> torch.Tensor:
        self.start = time.perf_counter()
        return self.view.augment_image(image)

    def deaugment_mask(self, logits: torch.Tensor) -> torch.Tensor:
        logits = self.view.deaugment_mask(logits)
        if logits.device.type == 'cuda':
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - self.start
        return logits


def count_fold(
    run: Run, cache: Cache, rows: np.ndarray, views: Sequence[TimedView], sets: Sequence[ViewSet]
) -> np.ndarray:
    """Predict rows of the cache in every view, and count the pixels of every set: (n, C, 3, K)."""
    cfg, truths = run.cfg, Truths(cache, rows)
    batch_size = max(1, 4 * cfg.infer_batch_size // len(views))  # all views of a batch are in memory
    small = cfg.model_copy(update={'infer_batch_size': batch_size})
    predictor = Predictor(run.model, small, views, stack=True)
    counts = np.zeros((len(rows), len(sets), 3, len(cfg.classes)), np.int64)
    sizes, desc = scored_sizes(cache, rows, cfg), f'views, fold {run.fold}'
    for band in predict_sizes(predictor, cache, rows, sizes, desc):
        masks = predict_sets(band.probs, sets, run)
        for number, mask in enumerate(masks):
            counts[band.position, number] += truths.count(band.position, band.top, mask)
    return counts


def predict_sets(probs: torch.Tensor, sets: Sequence[ViewSet], run: Run) -> Iterator[np.ndarray]:
    """Yield the mask of a photo, or of rows of it, under each set: (V, K, h, W) probabilities → masks. Only
    the pixels on which the views disagree are averaged: elsewhere every mean decides as each view does.
    """
    view_preds = decide(probs, run.cfg, run.thresholds)  # (V, h, W), or (V, K, h, W)
    contested = (view_preds != view_preds[0]).flatten(0, -3).any(0)  # (h, W)
    contested_probs = probs[:, :, contested]  # (V, K, P)
    for start in range(0, len(sets), CHUNK):
        chunk = sets[start : start + CHUNK]
        rows = [[view in view_set.views for view in range(len(probs))] for view_set in chunk]
        sums = probs.new_tensor(rows) @ contested_probs.flatten(1)
        if run.cfg.competition.is_multilabel:
            sums = sums / sums.new_tensor([[len(view_set.views)] for view_set in chunk])
        decided = decide(
            sums.view(len(chunk), *contested_probs.shape[1:]).unsqueeze(-2), run.cfg, run.thresholds
        )
        for values in decided.squeeze(-2):  # (P,), or (K, P)
            pred = view_preds[0].clone()
            pred[..., contested] = values
            yield finish_mask(pred, run.cfg).cpu().numpy()


def list_sets(cfg: Config) -> list[ViewSet]:
    """List all choices of the config's flips, rotations and scales, of those with the same views the first.

    Raises BadInput if they are too many.
    """
    flips, rotations, scales = cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales
    total = 2 ** (len(flips) + len(rotations)) * (2 ** len(scales) - 1)
    if total > MAX_SETS:
        raise BadInput(
            f'--flips, --rotations, --scales: found {total:,} sets of views, expected {MAX_SETS:,} at most; '
            'leave some out'
        )
    numbers = {same_view(*view): n for n, view in enumerate(list_views(flips, rotations, scales))}
    sets = {}
    for choice in product(subsets(flips), subsets(rotations), subsets(scales)):
        if choice[-1]:
            views = tuple(sorted(numbers[same_view(*view)] for view in list_views(*choice)))
            sets.setdefault(views, ViewSet(*choice, views))
    return [*sets.values()]


def subsets(values: Sequence) -> list[tuple]:
    """List all subsets, the empty one first."""
    return list(chain.from_iterable(combinations(values, size) for size in range(len(values) + 1)))


def format_table(
    sets: Sequence[ViewSet], tally: Tally, plain: int, numbers: Sequence[int], metric: Metric
) -> str:
    """Format the sets of these numbers: cost, score in sample, and how much that is above the photo alone."""
    width = max(6, len(metric.label))
    lines = [f'  cost  {metric.label:<{width}}  above the photo alone       views']
    cost = np.array([tally.seconds[list(view_set.views)].sum() for view_set in sets])
    for number in dict.fromkeys(numbers):
        gain = metric.paired_interval(tally.counts[:, number], tally.counts[:, plain])
        score = metric.score(tally.counts[:, number])
        times = f'{cost[number] / cost[plain]:.1f}x'
        lines.append(f'{times:>6}  {score:<{width}.4f}  {gain.signed}  {sets[number]}')
    lines.append(f'{len(sets)} sets of views, {1000 * cost[plain]:.0f} ms a photo alone; scores in sample')
    return '\n'.join(lines)


def command(argv: list[str] | None = None) -> None:
    cfg, args = read_arguments(argv)
    best = main(cfg, args.fold)
    words = ('infer.py', '--fold', 'all' if args.fold is None else args.fold, '--split', 'oof')
    print(next_line(*words, cfg=args.cfg, changes=[*args.set, *str(best).split()]))


if __name__ == '__main__':
    run_script(command)
