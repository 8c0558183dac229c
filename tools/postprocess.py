"""Remove small islands and holes from masks, if that is shown to help out of fold.

    python -m tools.postprocess search output/convnext/fold*/oof.csv
    python -m tools.postprocess apply output/submission.csv --islands 32 --holes 16 --out output/cleaned.csv

An island is a connected piece (8 neighbours) of an object class, a hole is a connected piece (4 neighbours)
of the background. One that is smaller than the given size, in pixels of the mask that is scored, gets the
class that most pixels along its edge have. If classes may overlap, the mask of each is cleaned by itself.
search chooses both sizes for each fold (or fifth of a single fold) on the others, and recommends them only if
the interval of the gain out of sample is above 0.

Shapes: H W the size of a mask, n photos, P pieces of a mask, C pairs of sizes, K classes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np

if not __package__:
    print('run this as: python -m tools.postprocess, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Competition
from data.coco import training_photos
from data.photos import MAX_PIXELS
from evaluate import add_data_arguments
from metrics import IGNORED, LEVEL, Interval
from submission import MaskFormat, competition_and_data, metric_of, read_format
from utils.cli import ArgumentParser, at_least, next_line, run_script
from utils.errors import DONE, BadInput
from utils.progress import progress
from voting.choices import cross_fit
from voting.members import member_of, read_samples

SIZES = (0, 8, 16, 32, 64, 128, 256, 512)  # candidates in a mask of 256x256; 0 removes nothing
OWN_SIZES = (0, 8, 32, 128, 512, 2048, 8192, 32768)  # candidates in masks of the photos' own sizes


@dataclass(frozen=True)
class Pieces:
    """The connected pieces of a mask."""

    labels: np.ndarray  # (H, W) piece of each pixel
    class_ids: np.ndarray  # (P,)
    sizes: np.ndarray  # (P,) pixels
    neighbours: np.ndarray  # (P,) the most frequent class along the edge

    def cleaned(self, islands: int, holes: int) -> np.ndarray:
        """Return the (H, W) mask without islands and holes below those sizes."""
        return self.assign(islands, holes)[self.labels]

    def assign(self, islands: int, holes: int) -> np.ndarray:
        """Return the (P,) uint8 class of each piece if those below the sizes get their neighbour's."""
        small = self.sizes < np.where(self.class_ids > 0, islands, holes)
        return np.where(small, self.neighbours, self.class_ids).astype(np.uint8)

    def count(self, truth: np.ndarray, pairs: Sequence[tuple[int, int]], num_classes: int) -> np.ndarray:
        """Count pixels that are right, predicted, and true at each pair of sizes → (C, 3, num_classes)."""
        known = truth != IGNORED
        cells = self.labels[known].astype(np.int64) * num_classes + truth[known]
        table = np.bincount(cells, minlength=len(self.sizes) * num_classes).reshape(-1, num_classes)
        pixels, rows = table.sum(1), np.arange(len(table))
        counts = np.empty((len(pairs), 3, num_classes), np.int64)
        for count, pair in zip(counts, pairs, strict=True):
            assigned = self.assign(*pair)
            right = np.bincount(assigned, table[rows, assigned], num_classes)
            count[:] = right, np.bincount(assigned, pixels, num_classes), table.sum(0)
        return counts


def find_pieces(mask: np.ndarray) -> Pieces:
    """Find the pieces of an (H, W) uint8 mask; a piece that fills the mask is its own neighbour."""
    labels = np.zeros(mask.shape, np.int32)
    class_ids: list[int] = []
    for k in np.unique(mask):
        region = mask == k
        count, components = cv2.connectedComponents(region.astype(np.uint8), connectivity=8 if k else 4)
        labels[region] = components[region] + len(class_ids) - 1
        class_ids += [int(k)] * (count - 1)
    edges = np.zeros((len(class_ids), int(mask.max()) + 1), np.int64)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):  # left and right, above and below
        differ = mask[a] != mask[b]
        np.add.at(edges, (labels[a][differ], mask[b][differ]), 1)
        np.add.at(edges, (labels[b][differ], mask[a][differ]), 1)
    neighbours = np.where(edges.any(1), edges.argmax(1), class_ids)
    return Pieces(labels, np.array(class_ids), np.bincount(labels.ravel()), neighbours)


def clean(mask: np.ndarray, islands: int, holes: int) -> np.ndarray:
    """Remove islands and holes below those sizes from an (H, W) mask, or from each of (K, H, W) planes."""
    if mask.ndim == 3:
        return np.stack([clean(plane, islands, holes) for plane in mask])
    return find_pieces(mask).cleaned(islands, holes)


def count_cleaned(
    mask: np.ndarray, truth: np.ndarray, pairs: Sequence[tuple[int, int]], num_classes: int
) -> np.ndarray:
    """Count the pixels of a mask, or of planes, cleaned by each pair of sizes → (C, 3, K) as count_pixels."""
    if mask.ndim == 2:
        return find_pieces(mask).count(truth, pairs, num_classes)
    planes = zip(mask, truth, strict=True)
    return np.stack([find_pieces(plane).count(true, pairs, 2)[..., 1] for plane, true in planes], -1)


def search(csvs: Sequence[Path], data: Path, competition: Competition) -> tuple[tuple[int, int], Interval]:
    """Print and return the best (islands, holes) in sample and the gain out of sample. Raises BadInput."""
    pairs = list(product(OWN_SIZES if competition.score_size == 'own' else SIZES, repeat=2))
    counts, parts = [], []
    members = [member_of(path) for path in csvs]
    photos, num_classes = training_photos(data, competition), len(competition.classes)
    for sample in read_samples([members], photos, data, competition):
        counts.append(count_cleaned(sample.preds[0], sample.truth, pairs, num_classes))
        parts.append(sample.part)
    pair_counts, part = np.stack(counts), np.array(parts)  # (n, C, 3, K), (n,)
    metric = metric_of(competition)
    best, chosen = cross_fit(pair_counts, part, metric)
    predicted, out_of_sample = pair_counts[:, 0], pair_counts[np.arange(len(part)), chosen[part]]
    gain = metric.paired_interval(out_of_sample, predicted)
    islands, holes = pairs[best]
    print(f'as predicted: {metric.label} {metric.interval(predicted)} on {len(part)} photos')
    print(f'best in sample: islands {islands}, holes {holes}: {metric.interval(pair_counts[:, best])}')
    print(f'chosen on the other parts, out of sample: {metric.interval(out_of_sample)}')
    print(f'gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}], {LEVEL:.0%} bootstrap interval')
    if gain.low > 0:
        sizes = f'--islands {islands} --holes {holes}'
        print(f'it helps: python -m tools.postprocess apply CSV {sizes} --out CSV')
    else:
        print('no significant gain: leave the masks as they are')
    return (islands, holes), gain


def apply(csv: Path, out: Path, islands: int, holes: int, form: MaskFormat) -> list[str]:
    """Write a CSV without small islands and holes, and return its image ids. Raises BadInput."""
    if csv.resolve() == out.resolve():
        raise BadInput(f'{out}: is the CSV that is read; give --out another name')
    changed = pixels = 0
    with form.reader(csv) as reader, form.writer(out) as writer:
        for image_id in progress(reader.image_ids, 'clean', 'image'):
            mask = reader.read(image_id)
            cleaned = clean(mask, islands, holes)
            changed += np.count_nonzero(cleaned != mask)
            pixels += mask.size
            writer.write(image_id, cleaned)
    print(f'{out}: {changed / pixels:.2%} of the pixels changed their class')
    return reader.image_ids


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    search = commands.add_parser('search', 'Choose the sizes of islands and holes out of fold.')
    search.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='oof.csv files of a model')
    add_data_arguments(search)
    apply = commands.add_parser('apply', 'Write a CSV without islands and holes below the given sizes.')
    apply.add_argument('csv', type=Path, metavar='CSV', help='the predictions')
    apply.add_argument('--islands', type=at_least(0, MAX_PIXELS), default=0, help='pixels; 0 removes none')
    apply.add_argument('--holes', type=at_least(0, MAX_PIXELS), default=0, help='pixels; 0 removes none')
    apply.add_argument('--out', type=Path, required=True, metavar='CSV', help='the CSV to write')
    add_data_arguments(apply)
    return parser.parse_args(argv)


def command(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    competition, data = competition_and_data(args)
    if args.command == 'search':
        (islands, holes), gain = search(args.csvs, data, competition)
        predicted = args.csvs[0].with_name('test.csv')
        if gain.low > 0 and predicted.exists():
            out = predicted.with_name('test_cleaned.csv')
            words = ('apply', predicted, '--islands', islands, '--holes', holes, '--out', out, '--data', data)
            print(next_line('-m', 'tools.postprocess', *words, cfg=args.cfg, changes=args.set))
        return DONE
    form = read_format(data, competition, required=False)
    image_ids = apply(args.csv, args.out, args.islands, args.holes, form)
    if image_ids == [*form.sizes]:
        words = ('submission.py', 'check', args.out, '--data', data)
        print(next_line(*words, cfg=args.cfg, changes=args.set))
    return DONE


if __name__ == '__main__':
    run_script(command)
