"""Post-processing: small islands and holes of a mask get the class around them, where that is seen to help.

    python -m tools.postprocess search output/convnext/fold*/oof.csv
    python -m tools.postprocess apply output/submission.csv --islands 32 --holes 16 --out output/cleaned.csv

An island is a connected piece (8 neighbours) of a class that is not the background, a hole one (4) of the
background; sizes are pixels of the 256x256 mask. A smaller one gets the class that most pixels along its edge
have. search chooses both sizes out of fold, cross-fitted: those for a fold (with one fold, for each fifth of
its photos) on the others. It says to apply them only where the gain out of sample has an interval above 0.

Shapes: H W a mask, n photos, P pieces of a mask, C pairs of sizes, K classes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from data.coco import training_photos
from evaluate import cross_fit
from metrics import Interval, confusion_matrix, image_counts, interval, paired_interval
from submission import PIXELS, SubmissionReader, SubmissionWriter, classes_and_data, read_test_ids
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import DONE, BadInput
from utils.progress import progress
from voting.members import member_of, read_samples

SIZES = (0, 8, 16, 32, 64, 128, 256, 512)  # that are tried; 0 leaves everything


@dataclass(frozen=True)
class Pieces:
    """The connected pieces of a mask: labels (H, W), and of each piece its class, its size and the commonest
    class along its edge, (P,) each.
    """

    labels: np.ndarray
    own: np.ndarray
    size: np.ndarray
    around: np.ndarray

    def cleaned(self, islands: int, holes: int) -> np.ndarray:
        """The (H, W) mask without islands and holes below those sizes."""
        small = self.size < np.where(self.own > 0, islands, holes)
        return np.where(small, self.around, self.own).astype(np.uint8)[self.labels]


def find_pieces(mask: np.ndarray) -> Pieces:
    """The pieces of an (H, W) uint8 mask. One without an edge, the whole mask, is around itself."""
    labels = np.zeros(mask.shape, np.int32)
    own: list[int] = []
    for k in np.unique(mask):
        number, found = cv2.connectedComponents((mask == k).astype(np.uint8), connectivity=8 if k else 4)
        labels[mask == k] = found[mask == k] + len(own) - 1
        own += [int(k)] * (number - 1)
    edges = np.zeros((len(own), int(mask.max()) + 1), np.int64)
    for one, other in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        differ = mask[one] != mask[other]
        np.add.at(edges, (labels[one][differ], mask[other][differ]), 1)
        np.add.at(edges, (labels[other][differ], mask[one][differ]), 1)
    around = np.where(edges.any(1), edges.argmax(1), own)
    return Pieces(labels, np.array(own), np.bincount(labels.ravel()), around)


def search(csvs: Sequence[Path], data: Path, classes: tuple[str, ...]) -> tuple[tuple[int, int], Interval]:
    """The (islands, holes) that are best in sample, and the gain out of sample. Raises BadInput."""
    pairs = list(product(SIZES, SIZES))
    counts, parts = [], []
    members = [member_of(path) for path in csvs]
    for sample in read_samples([members], training_photos(data, classes), data, len(classes)):
        pieces = find_pieces(sample.preds[0])
        masks = (pieces.cleaned(*pair) for pair in pairs)
        counts.append(
            np.stack([image_counts(confusion_matrix(sample.truth, mask, len(classes))) for mask in masks])
        )
        parts.append(sample.part)
    tallied, part = np.stack(counts), np.array(parts)
    totals = np.stack([tallied[part == number].sum(0) for number in range(max(parts) + 1)])
    best, chosen = cross_fit(totals)
    out = tallied[np.arange(len(part)), chosen[part]]
    gain = paired_interval(out, tallied[:, 0])
    print(f'as predicted: mIoU {interval(tallied[:, 0])} on {len(part)} photos')
    print(f'best in sample: islands {pairs[best][0]}, holes {pairs[best][1]}: {interval(tallied[:, best])}')
    print(f'chosen on the other parts, out of sample: {interval(out)}')
    print(f'gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]')
    if gain.low > 0:
        islands, holes = pairs[best]
        print(
            f'it helps: python -m tools.postprocess apply CSV --islands {islands} --holes {holes} --out CSV'
        )
    else:
        print('not shown to help: leave the masks as they are')
    return pairs[best], gain


def apply(csv: Path, out: Path, islands: int, holes: int, num_classes: int) -> list[str]:
    """Writes the CSV again without small islands and holes, row by row, and returns the ids of its images.
    Raises BadInput.
    """
    if csv.resolve() == out.resolve():
        raise BadInput(f'{out}: is the CSV that is read; give --out another name')
    changed = 0
    with SubmissionReader(csv, num_classes) as reader, SubmissionWriter(out) as writer:
        for image_id in progress(reader.image_ids, 'clean', 'image'):
            mask = reader.read(image_id)
            cleaned = find_pieces(mask).cleaned(islands, holes)
            changed += np.count_nonzero(cleaned != mask)
            writer.write(image_id, cleaned)
    print(f'{out}: {changed / (PIXELS * len(reader.image_ids)):.2%} of the pixels have another class')
    return reader.image_ids


def pixels(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > PIXELS:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected pixels from 0 to {PIXELS}')
    return int(text)


def command(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(__doc__, prog='python -m tools.postprocess')
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('search', doc='The sizes of islands and holes that pay, out of fold.')
    one.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='oof.csv of one model, of any folds')
    one.add_argument('--data', type=Path, help='data root; by default input/data')
    add_config_arguments(one, required=False)
    one = commands.add_parser('apply', doc='A CSV without islands and holes below those sizes.')
    one.add_argument('csv', type=Path, metavar='CSV', help='what was predicted')
    one.add_argument('--islands', type=pixels, default=0, help='pixels; 0 leaves all of them')
    one.add_argument('--holes', type=pixels, default=0, help='pixels; 0 leaves all of them')
    one.add_argument('--out', type=Path, required=True, metavar='CSV', help='the CSV to write')
    one.add_argument('--data', type=Path, help='data root; by default input/data')
    add_config_arguments(one, required=False)
    args = parser.parse_args(argv)
    classes, data = classes_and_data(args)
    if args.command == 'search':
        (islands, holes), gain = search(args.csvs, data, classes)
        predicted = args.csvs[0].with_name('test.csv')
        if gain.low > 0 and predicted.exists():
            words = ('apply', predicted, '--islands', islands, '--holes', holes)
            out = predicted.with_name('test_cleaned.csv')
            words += ('--out', out, '--data', data)
            print(next_line('-m', 'tools.postprocess', *words, cfg=args.cfg, changes=args.set))
        return DONE
    image_ids = apply(args.csv, args.out, args.islands, args.holes, len(classes))
    if (data / 'test.json').is_file() and image_ids == read_test_ids(data):
        words = ('submission.py', 'check', args.out, '--data', data)
        print(next_line(*words, cfg=args.cfg, changes=args.set))
    return DONE


if __name__ == '__main__':
    run_script(command)
