"""Which views of test-time augmentation pay: searched on photos out of fold, each set of views with its cost.

    python -m tools.search_tta --cfg configs/convnext.yaml --fold all
    python -m tools.search_tta --cfg configs/convnext.yaml --fold 0 --flips h --rotations --scales 0.75 1 1.25

Each photo is seen once in every view, by the model that never saw it. A set of views is some of the flips,
some of the rotations and some of the scales; its prediction is the mean of its views. Cross-fitted: the set
for a fold (with one fold, for each fifth of its photos) is chosen on the others. Beside it stands the photo
alone, and by how much the choice is above that, out of sample.

Shapes: n photos, V views, C sets of views, K classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, product

import numpy as np
import torch

from config import Config, load_config
from data.cache import open_cache
from data.folds import read_folds, split_fold
from dataset import normalize
from engine.checkpoint import Run, load_oof_run
from engine.distributed import start_ranks
from engine.inference import make_eval_loader, make_views, view_probs
from evaluate import cross_fit
from infer import parse_fold
from metrics import confusion_matrix, image_counts, interval, miou_of_counts, paired_interval
from submission import downsample_ids
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import BadInput
from utils.log import start_log
from utils.progress import progress
from voting.members import PARTS

SHOWN = 8  # sets in the table
MOST_SETS = 4096
CHUNK = 64  # sets at a time


@dataclass(frozen=True)
class ViewSet:
    """The views that a config would ask for; `views` are their places among all that were predicted."""

    flips: tuple[str, ...]
    rotations: tuple[int, ...]
    scales: tuple[float, ...]
    views: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """The photo alone."""
        return (self.flips, self.rotations, self.scales) == ((), (), (1.0,))

    def __str__(self) -> str:
        """As --set takes it."""
        keys = (('tta_flips', self.flips), ('tta_rotations', self.rotations), ('tta_scales', self.scales))
        return ' '.join(f'{key}=[{",".join(f"{v:g}" if key == "tta_scales" else str(v) for v in values)}]'
                        for key, values in keys)  # fmt: skip


@dataclass(frozen=True)
class Tally:
    """What was counted: (n, C, 3, K) image_counts, the part of each photo from 0, of which few photos leave
    some empty, and the seconds that each view takes of a photo.
    """

    counts: np.ndarray
    parts: np.ndarray
    seconds: np.ndarray = field(repr=False)


def main(
    cfg: Config,
    fold: int | None,
    flips: Sequence[str],
    rotations: Sequence[int],
    scales: Sequence[float],
) -> ViewSet:
    """Prints the table and returns the set to use: the best in sample, or the photo alone where the two are
    not to be told apart. Raises BadInput.
    """
    start_log(None)
    device = start_ranks(cfg).device
    sets = view_sets(flips, rotations, scales)
    tally = count(cfg, fold, flips, rotations, scales, sets, device)
    totals = np.stack([tally.counts[tally.parts == part].sum(0) for part in range(max(tally.parts) + 1)])
    best, chosen = cross_fit(totals)
    order = np.argsort(-miou_of_counts(totals.sum(0)), kind='stable')[:SHOWN]
    plain = next(n for n, one in enumerate(sets) if one.is_plain)
    print(format_table(sets, tally, plain, [*order.tolist(), plain]))
    out = tally.counts[np.arange(len(tally.parts)), chosen[tally.parts]]
    gain = paired_interval(out, tally.counts[:, plain])
    print(f'chosen on the other parts, out of sample: {interval(out)}')
    print(f'above the photo alone by {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]')
    if gain.low > 0:
        print(f'use --set {sets[best]}')
        return sets[best]
    print(f'not to be told apart on {len(out)} photos; the photo alone costs least: --set {sets[plain]}')
    return sets[plain]


def count(
    cfg: Config,
    fold: int | None,
    flips: Sequence[str],
    rotations: Sequence[int],
    scales: Sequence[float],
    sets: Sequence[ViewSet],
    device: torch.device,
) -> Tally:
    """Predicts every view of every photo out of fold, and counts every set of them. Raises BadInput."""
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    size = cache.photos.shape[1:3]
    views = list(make_views(flips, rotations, scales))
    seconds = np.zeros(len(views))
    counts, parts = [], []
    for part, k in enumerate(range(cfg.folds) if fold is None else [fold]):
        _, rows = split_fold(folds, k)
        run = load_oof_run(cfg, k, cache.names(rows), device)
        batch_size = max(1, 4 * run.cfg.infer_batch_size // len(views))  # what is kept is a quarter of a view
        loader = make_eval_loader(cache, rows, run.cfg.model_copy(update={'infer_batch_size': batch_size}))
        for images, batch in progress(loader, f'views, fold {k}', 'batch'):
            probs = predict_views(run, images, views, size, device, seconds)
            for place, row in enumerate(batch.tolist()):
                truth = cache.truth(row)
                counts.append(count_sets([own[place] for own in probs], sets, truth, cfg))
        parts += [part] * len(rows) if fold is None else (np.arange(len(rows)) * PARTS // len(rows)).tolist()
    return Tally(np.stack(counts), np.array(parts), seconds / len(parts))


def predict_views(
    run: Run,
    images: torch.Tensor,
    views: Sequence,
    size: tuple[int, int],
    device: torch.device,
    seconds: np.ndarray,
) -> list[torch.Tensor]:
    """(N, K, B, B) of each view, as the board's rule keeps it; adds up the time that each took."""
    kept = []
    with torch.inference_mode():
        photos = normalize(images.to(device, non_blocking=True), run.model.mean, run.model.std)
        for number, view in enumerate(views):
            started = time.perf_counter()
            kept.append(view_probs(run.model, photos, run.cfg, view, size, run.cfg.downsample))
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds[number] += time.perf_counter() - started
    return kept


def count_sets(
    probs: Sequence[torch.Tensor], sets: Sequence[ViewSet], truth: np.ndarray, cfg: Config
) -> np.ndarray:
    """(C, 3, K) image_counts of the mean over each set's views, of (K, B, B) probabilities of each view.

    Where all views have one class likeliest, so has every mean of them: only the other pixels are looked at.
    """
    stack = torch.stack(list(probs))
    likeliest = stack.argmax(1)
    contested = (likeliest != likeliest[0]).any(0)
    own = stack[:, :, contested]  # (V, K, P)
    counts = []
    for start in range(0, len(sets), CHUNK):
        chunk = sets[start : start + CHUNK]
        asked = own.new_tensor([[view in one.views for view in range(len(probs))] for one in chunk])
        won = (asked @ own.flatten(1)).view(len(chunk), *own.shape[1:]).argmax(1)
        for winners in won:
            ids = likeliest[0].clone()
            ids[contested] = winners
            mask = downsample_ids(ids[None], cfg.downsample)[0].to(torch.uint8).cpu().numpy()
            counts.append(image_counts(confusion_matrix(truth, mask, len(cfg.classes))))
    return np.stack(counts)


def view_sets(flips: Sequence[str], rotations: Sequence[int], scales: Sequence[float]) -> list[ViewSet]:
    """Every choice of flips, of rotations, and of one scale or more. Raises BadInput for too many."""
    total = 2 ** (len(flips) + len(rotations)) * (2 ** len(scales) - 1)
    if total > MOST_SETS:
        raise BadInput(f'{total:,} sets of views are too many to look at; at most {MOST_SETS:,}')
    every = list(product(('', *flips), scales, (0, *rotations)))  # the order of predict.make_views
    sets = []
    for some in product(subsets(flips), subsets(rotations), subsets(scales)):
        own_flips, own_rotations, own_scales = some
        if own_scales:
            own = set(product(('', *own_flips), own_scales, (0, *own_rotations)))
            sets.append(ViewSet(*some, tuple(n for n, view in enumerate(every) if view in own)))
    return sets


def subsets(values: Sequence) -> list[tuple]:
    return list(chain.from_iterable(combinations(values, size) for size in range(len(values) + 1)))


def format_table(sets: Sequence[ViewSet], tally: Tally, plain: int, shown: Sequence[int]) -> str:
    """The sets `shown`: cost a photo, mIoU in sample, and by how much that is above the photo alone."""
    lines = ['  cost  mIoU    above the photo alone       views']
    cost = np.array([tally.seconds[list(one.views)].sum() for one in sets])
    for n in dict.fromkeys(shown):
        above = paired_interval(tally.counts[:, n], tally.counts[:, plain])
        score = miou_of_counts(tally.counts[:, n].sum(0))
        times = f'{cost[n] / cost[plain]:.1f}x'
        lines.append(
            f'{times:>6}  {score:.4f}  {above.value:+.4f} [{above.low:+.4f}, {above.high:+.4f}]  {sets[n]}'
        )
    lines.append(f'{len(sets)} sets of views, {1000 * cost[plain]:.0f} ms a photo alone; scores in sample')
    return '\n'.join(lines)


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog='python -m tools.search_tta')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=parse_fold, required=True, metavar='K|all', help='a fold, or all')
    parser.add_argument('--flips', nargs='*', choices=['h', 'v', 'hv'], default=['h', 'v'], help='to try')
    parser.add_argument(
        '--rotations', nargs='*', type=int, choices=[90, 180, 270], default=[90], help='to try'
    )
    parser.add_argument(
        '--scales',
        nargs='*',
        type=float,
        default=[0.75, 1.0, 1.25, 1.5],
        help='to try beside 1',
    )
    args = parser.parse_args(argv)
    views = {'tta_flips': args.flips, 'tta_rotations': args.rotations, 'tta_scales': args.scales or [1.0]}
    views = {key: list(dict.fromkeys(values)) for key, values in views.items()}
    cfg = load_config(args.cfg, args.set + [f'{key}={values}' for key, values in views.items()])
    if args.fold is not None and not 0 <= args.fold < cfg.folds:
        raise BadInput(f'--fold {args.fold}: found no such fold; expected 0 to {cfg.folds - 1}, or all')
    scales = sorted({1.0, *cfg.tta_scales})
    found = main(cfg, args.fold, cfg.tta_flips, cfg.tta_rotations, scales)
    words = ('infer.py', '--fold', 'all' if args.fold is None else args.fold, '--split', 'oof')
    print(next_line(*words, cfg=args.cfg, changes=[*args.set, *str(found).split()]))


if __name__ == '__main__':
    run_script(command)
