"""Remove small islands and holes from masks, and give each piece one class, if that helps out of fold.

    python -m tools.postprocess search output/convnext/fold*/oof.csv
    python -m tools.postprocess apply output/submission.csv --islands 32 --holes 16 --out output/cleaned.csv
    python -m tools.postprocess apply output/convnext/test.csv --one-class probs --out output/cleaned.csv

An island is a connected piece (8 neighbours) of an object class, a hole is a connected piece (4 neighbours)
of the background. One that is smaller than the given size, in pixels of the mask that is scored, gets the
class that most pixels along its edge have. If classes may overlap, the mask of each is cleaned by itself.

--one-class comes first: each connected piece (8 neighbours) of all objects together gets one class, the one
that most of its pixels have, or with `probs` the one with the highest sum of the *_probs.npy beside the CSV.
It suits photos in which objects do not touch, and is not for classes that may overlap.

search reads the given CSVs of one model, chooses all of it for each fold (or fifth of a single fold, no scene
on both sides) on the others, and recommends it only if the interval of the gain out of sample is above 0.

Shapes: H W the size of a mask, n photos, P pieces of a mask, C choices, K classes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np

if not __package__:
    print('run this as: python -m tools.postprocess, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Competition
from data.coco import training_photos
from data.photos import MAX_PIXELS
from evaluate import add_data_arguments
from metrics import IGNORED, Interval
from submission import MaskFormat, competition_and_data, metric_of, open_probs, probs_path, read_format
from utils.cli import ArgumentParser, at_least, next_line, run_script
from utils.errors import DONE, BadInput
from utils.progress import progress
from voting.choices import AGAIN, Search, cross_fit, number_scenes, search_gain
from voting.members import member_of, read_samples
from voting.origin import refuse_outdated

SIZES = (0, 8, 16, 32, 64, 128, 256, 512)  # candidates in a mask of 256x256; 0 removes nothing
OWN_SIZES = (0, 8, 32, 128, 512, 2048, 8192, 32768)  # candidates in masks of the photos' own sizes
OneClass = Literal['pixels', 'probs']


@dataclass(frozen=True)
class Choice:
    """How to clean a mask: the sizes below which islands and holes go, and what gives a piece one class."""

    islands: int = 0
    holes: int = 0
    one_class: OneClass | None = None

    def __str__(self) -> str:
        """Format it as the options of apply."""
        one_class = f' --one-class {self.one_class}' if self.one_class else ''
        return f'--islands {self.islands} --holes {self.holes}{one_class}'


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

    def count(self, truth: np.ndarray, choices: Sequence[Choice], num_classes: int) -> np.ndarray:
        """Count pixels that are right, predicted, and true at each choice's sizes → (C, 3, num_classes)."""
        known = truth != IGNORED
        cells = self.labels[known].astype(np.int64) * num_classes + truth[known]
        table = np.bincount(cells, minlength=len(self.sizes) * num_classes).reshape(-1, num_classes)
        pixels, rows = table.sum(1), np.arange(len(table))
        counts = np.empty((len(choices), 3, num_classes), np.int64)
        for count, choice in zip(counts, choices, strict=True):
            assigned = self.assign(choice.islands, choice.holes)
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


def unite_classes(mask: np.ndarray, probs: np.ndarray | None = None) -> np.ndarray:
    """Give each connected piece of the objects of an (H, W) mask, all classes together, one class: the one of
    most of its pixels, or of the highest sum of (K, H, W) probabilities; the first of equal ones.
    """
    count, pieces = cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)
    flat = pieces.ravel()
    if probs is None:
        num_classes = int(mask.max()) + 1
        table = np.bincount(flat * num_classes + mask.ravel(), minlength=count * num_classes)
        table = table.reshape(count, num_classes)
    else:
        table = np.stack([np.bincount(flat, plane.ravel(), count) for plane in probs], 1)
    table[1:, 0] = -1  # a piece of objects becomes no background
    united = table.argmax(1)
    united[0] = 0
    return united.astype(np.uint8)[pieces]


def clean(mask: np.ndarray, choice: Choice, probs: np.ndarray | None = None) -> np.ndarray:
    """Clean an (H, W) mask, or each of (K, H, W) planes; its (K, H, W) probabilities are for one_class."""
    if mask.ndim == 3:
        return np.stack([clean(plane, choice) for plane in mask])
    if choice.one_class is not None:
        mask = unite_classes(mask, probs if choice.one_class == 'probs' else None)
    return find_pieces(mask).cleaned(choice.islands, choice.holes)


def count_cleaned(
    mask: np.ndarray,
    truth: np.ndarray,
    choices: Sequence[Choice],
    num_classes: int,
    probs: np.ndarray | None = None,
) -> np.ndarray:
    """Count the pixels of a mask, or of planes, cleaned by each choice → (C, 3, K) as count_pixels."""
    if mask.ndim == 3:
        planes = zip(mask, truth, strict=True)
        return np.stack([find_pieces(plane).count(true, choices, 2)[..., 1] for plane, true in planes], -1)
    counts = []
    for one_class, group in groupby(choices, lambda choice: choice.one_class):
        united = clean(mask, Choice(one_class=one_class), probs)
        counts.append(find_pieces(united).count(truth, [*group], num_classes))
    return np.concatenate(counts)


def list_choices(competition: Competition, has_probs: bool) -> list[Choice]:
    """List the candidates of a search; the first leaves the masks as they are."""
    sizes = OWN_SIZES if competition.score_size == 'own' else SIZES
    ways = [None, *get_args(OneClass)[: 2 if has_probs else 1]]
    ways = [None] if competition.is_multilabel else ways
    return [Choice(islands, holes, way) for way, islands, holes in product(ways, sizes, sizes)]


def search(csvs: Sequence[Path], data: Path, competition: Competition) -> tuple[Choice, Interval]:
    """Print and return the best choice in sample and the gain out of sample. Raises BadInput."""
    has_probs = not competition.is_multilabel and all(probs_path(path).is_file() for path in csvs)
    choices = list_choices(competition, has_probs)
    counts, parts, scenes = [], [], []
    members = [member_of(path, oof=path) for path in csvs]
    if len(folders := {member.folder.resolve(): member.folder for member in members}) > 1:
        names = ', '.join(map(str, folders.values()))
        raise BadInput(f'{csvs[0]}: found CSVs of {len(folders)} models ({names}); search each by itself')
    photos, num_classes = training_photos(data, competition), len(competition.classes)
    for sample in read_samples([members], photos, data, competition, soft=has_probs):
        probs = sample.probs[0] if has_probs else None
        counts.append(count_cleaned(sample.preds[0], sample.truth, choices, num_classes, probs))
        parts.append(sample.part)
        scenes.append(sample.scene)
    choice_counts, part = np.stack(counts), np.array(parts)  # (n, C, 3, K), (n,)
    metric = metric_of(competition)
    best, chosen = cross_fit(choice_counts, part, metric)
    predicted, out_of_sample = choice_counts[:, 0], choice_counts[np.arange(len(part)), chosen[part]]
    search = Search([range(len(choices))], [0])
    gain = search_gain(choice_counts, part, metric, search, number_scenes(scenes))
    print(f'as predicted: {metric.label} {metric.interval(predicted)} on {len(part)} photos')
    if not (has_probs or competition.is_multilabel):
        print('--one-class probs was not tried: there is not a *_probs.npy beside each CSV')
    print(f'best in sample: {choices[best]}: {metric.interval(choice_counts[:, best])}')
    print(f'chosen on the other parts, out of sample: {metric.interval(out_of_sample)}')
    print(f'gain {gain.signed}, {AGAIN}')
    if gain.low > 0:
        print(f'it helps: python -m tools.postprocess apply CSV {choices[best]} --out CSV')
    else:
        print('no significant gain: leave the masks as they are')
    return choices[best], gain


def apply(csv: Path, out: Path, choice: Choice, form: MaskFormat) -> list[str]:
    """Write a CSV whose masks are cleaned, and return its image ids. Raises BadInput."""
    if csv.resolve() == out.resolve():
        raise BadInput(f'{out}: is the CSV that is read; give --out another name')
    if choice.one_class is not None and form.competition.is_multilabel:
        raise BadInput('--one-class: is for one class a pixel; here classes may overlap (task: multilabel)')
    changed = pixels = 0
    with form.reader(csv) as reader, form.writer(out) as writer:
        every = open_probs(reader, form) if choice.one_class == 'probs' else None
        for row, image_id in enumerate(progress(reader.image_ids, 'clean', 'image')):
            mask = reader.read(image_id)
            cleaned = clean(mask, choice, None if every is None else every[row])
            changed += np.count_nonzero(cleaned != mask)
            pixels += mask.size
            writer.write(image_id, cleaned)
    print(f'{out}: {changed / pixels:.2%} of the pixels changed their class')
    return reader.image_ids


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    search = commands.add_parser('search', 'Choose how to clean masks out of fold.')
    search.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='photos out of fold, of one model')
    add_data_arguments(search)
    apply = commands.add_parser('apply', 'Write a CSV with cleaned masks.')
    apply.add_argument('csv', type=Path, metavar='CSV', help='the predictions')
    apply.add_argument('--islands', type=at_least(0, MAX_PIXELS), default=0, help='pixels; 0 removes none')
    apply.add_argument('--holes', type=at_least(0, MAX_PIXELS), default=0, help='pixels; 0 removes none')
    one_class = 'what gives each piece of objects one class; by default each pixel keeps its own'
    apply.add_argument('--one-class', choices=get_args(OneClass), help=one_class)
    apply.add_argument('--out', type=Path, required=True, metavar='CSV', help='the CSV to write')
    add_data_arguments(apply)
    return parser.parse_args(argv)


def command(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    competition, data = competition_and_data(args)
    refuse_outdated(args.csvs if args.command == 'search' else [args.csv])
    if args.command == 'search':
        choice, gain = search(args.csvs, data, competition)
        predicted = args.csvs[0].with_name('test.csv')
        is_ready = predicted.is_file() and (choice.one_class != 'probs' or probs_path(predicted).is_file())
        if gain.low > 0 and is_ready:
            out = predicted.with_name('test_cleaned.csv')
            words = ('apply', predicted, *str(choice).split(), '--out', out, '--data', data)
            print(next_line('-m', 'tools.postprocess', *words, cfg=args.cfg, changes=args.set))
        return DONE
    form = read_format(data, competition, required=False)
    image_ids = apply(args.csv, args.out, Choice(args.islands, args.holes, args.one_class), form)
    if image_ids == [*form.sizes]:
        words = ('submission.py', 'check', args.out, '--data', data)
        print(next_line(*words, cfg=args.cfg, changes=args.set))
    return DONE


if __name__ == '__main__':
    run_script(command)
