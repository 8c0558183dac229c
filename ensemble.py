"""Stage 4: a hard vote over saved CSVs, into one submission; weights searched out of fold.

    python ensemble.py output/*/fold*/test.csv --out output/submission.csv
    python ensemble.py output/a/test.csv output/b/test.csv --weights 2 1 --out output/submission.csv
    python ensemble.py output/*/fold*/test.csv --search --out output/submission.csv
    python ensemble.py output/*/test.csv --soft --out output/submission.csv     # of infer.py --save-probs
    python ensemble.py compare output/a/oof.csv output/b/oof.csv --data input/data

compare says which of two predictions of the same training photos is better, and how sure that is.
--search chooses each model's weight on the oof.csv beside its test.csv, says where one model is better, and
keeps the weights in ensemble.yaml beside --out, which --recipe applies again, to the same members alone.
Votes meet by image_id; rows are in the order of the first CSV, or of --data's test.json. A tie goes to the
tied class of the earliest CSV on the command line; votes of weight 0 do not count. Weights are the decimals
that are typed, added up exactly: 0.1 + 0.2 ties with 0.3. One row of each CSV is in memory at a time.

--class-weights FILE.yaml weighs votes by the class that they are for too, one weight a class of the data set:

    convnext: [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0.5]   # the name of a model's folder, or the path of one CSV

Shapes: M members or models, K classes.
"""

import argparse
import difflib
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import gcd, lcm
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from coco import Photo, board_truth, draw_mask, read_coco
from config import DONE, ArgumentParser, BadInput, add_config_arguments, one_line, read_yaml, run_script
from files import write_text
from intervals import DRAWS, LEVEL, interval, paired_by_class, paired_interval, verdict
from metrics import confusion_matrix, image_counts
from search import Sample, SearchResult, count_votes, format_search, search_weights
from submission import (
    PIXELS,
    SIDE,
    SubmissionReader,
    SubmissionWriter,
    classes_and_data,
    read_test_ids,
    require_same_images,
)  # fmt: skip

PARTS = 5  # of the photos out of fold, for choosing weights on the others, where they are of one fold


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['compare']:
        return compare_command(argv[1:])
    parser = ArgumentParser(__doc__)
    parser.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='the members of the vote')
    parser.add_argument('--out', type=Path, required=True, metavar='CSV', help='the submission to write')
    how = parser.add_mutually_exclusive_group()
    how.add_argument('--weights', nargs='+', type=parse_weight, metavar='W', help='one a CSV; by default 1')
    parser.add_argument(
        '--soft', action='store_true', help='average the *_probs.npy beside each CSV (infer.py --save-probs)'
    )
    how.add_argument(
        '--search',
        action='store_true',
        help='choose weights on the oof.csv beside each CSV, and keep them in ensemble.yaml beside --out',
    )
    how.add_argument('--recipe', type=Path, metavar='YAML', help='the weights that a search has kept')
    parser.add_argument('--class-weights', type=Path, metavar='YAML', help='weights by the class voted for')
    parser.add_argument('--data', type=Path, help='data root; rows are then in the order of its test.json')
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    if args.search and args.soft:
        parser.error('--search weighs hard votes: leave out --soft')
    if args.search and args.class_weights:
        parser.error('--class-weights are not searched: leave out --search')
    classes, data = classes_and_data(args)
    members = find_members(args.csvs, args.out)
    image_ids = None if args.data is None else read_test_ids(data)
    weights = args.weights or [Fraction(1)] * len(members)
    if len(weights) != len(members):
        raise BadInput(f'--weights: found {len(weights)}, expected {len(members)}, one a CSV')
    if args.search:
        weights = searched_weights(members, data, classes)
        write_recipe(args.out.with_name('ensemble.yaml'), members, weights)
    if args.recipe is not None:
        weights = read_recipe(args.recipe, members)
    by_class = read_class_weights(args.class_weights, members, len(classes))
    table = weight_table(weights, by_class)
    if args.soft:
        print(soft_vote_files(members, table, args.out, image_ids))
    else:
        print(vote_files(members, weights, table, args.out, image_ids))
    print(f'next: python submission.py check {args.out} --data {data}')
    return DONE


def compare_command(argv: list[str]) -> int:
    parser = ArgumentParser('Which of two predictions is better, by the truth of the training photos.')
    parser.add_argument('csvs', nargs=2, type=Path, metavar='CSV', help='two oof.csv of the same photos')
    parser.add_argument('--data', type=Path, help='data root; by default input/data')
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    classes, data = classes_and_data(args)
    print(compare(args.csvs, data, classes))
    return DONE


def compare(csvs: Sequence[Path], data: Path, classes: tuple[str, ...]) -> str:
    """The scores of two CSVs on the photos that they have, and the difference, by class too, with paired
    bootstrap intervals. Raises BadInput where one lacks a photo of the other.
    """
    photos = {photo.file_name: photo for photo in read_coco(data, 'train', classes).photos}
    with ExitStack() as stack:
        first, second = (stack.enter_context(SubmissionReader(path, len(classes))) for path in csvs)
        require_same_images(first.image_ids, csvs[0], second)
        counts = np.zeros((2, len(first.image_ids), 3, len(classes)), np.int64)
        for n, image_id in enumerate(tqdm(first.image_ids, desc='compare', leave=False, disable=None)):
            if image_id not in photos:
                raise BadInput(f'{csvs[0]}: image {image_id!r} is none of the training photos of {data}')
            truth = board_truth(draw_mask(photos[image_id]))
            for which, reader in enumerate((first, second)):
                confusion = confusion_matrix(truth, reader.read(image_id), len(classes))
                counts[which, n] = image_counts(confusion)
    width = max(map(len, classes))
    lines = [f'{path}: mIoU {interval(own)}' for path, own in zip(csvs, counts, strict=True)]
    lines.append(f'{"first - second":<{width}}  {LEVEL:.0%} of {DRAWS:,} draws of the images')
    for name, one in zip(classes, paired_by_class(*counts), strict=True):
        if not np.isnan(one.value):
            lines.append(f'{name:<{width}}  {one.value:+.4f}  [{one.low:+.4f}, {one.high:+.4f}]')
    total = paired_interval(*counts)
    lines.append(f'{"mIoU":<{width}}  {total.value:+.4f}  [{total.low:+.4f}, {total.high:+.4f}]')
    lines.append(verdict(total, counts.shape[1]))
    return '\n'.join(lines)


@dataclass(frozen=True)
class Member:
    """A CSV that votes, the folder of its model, and its fold where it is <model>/fold<k>/<name>.csv."""

    path: Path
    folder: Path
    fold: int | None


def find_members(paths: Sequence[Path], out: Path) -> list[Member]:
    """The members, in the order given. Raises BadInput where one is given twice or would be written over."""
    seen: set[Path] = set()
    members = []
    for path in paths:
        if path.resolve() == out.resolve():
            raise BadInput(f'{out}: is the --out and among the CSVs that vote')
        if path.resolve() in seen:
            raise BadInput(f'{path}: is given twice; --weights counts a CSV more than once')
        seen.add(path.resolve())
        fold = re.fullmatch(r'fold(\d+)', path.parent.name)
        folder = path.parent.parent if fold else path.parent
        members.append(Member(path, folder, int(fold[1]) if fold else None))
    return members


# --- the vote ---------------------------------------------------------------------------------------------


def vote_files(
    members: Sequence[Member], weights: Sequence[Fraction], table: np.ndarray, out: Path,
    image_ids: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Writes the vote of the CSVs, rows in the order of image_ids or of the first CSV; returns what it did.

    Raises BadInput for every fault of a CSV, with `out` as it was.
    """
    differ = np.zeros((len(members), len(members)), np.int64)  # pixels in which two members differ
    outvoted = np.zeros(len(members), np.int64)
    contested = 0
    with ExitStack() as stack:
        readers = [stack.enter_context(SubmissionReader(m.path, table.shape[1])) for m in members]
        where = 'test.json' if image_ids is not None else members[0].path
        image_ids = readers[0].image_ids if image_ids is None else image_ids
        for reader in readers:
            require_same_images(image_ids, where, reader)
        writer = stack.enter_context(SubmissionWriter(out))
        for image_id in tqdm(image_ids, desc='vote', unit='image', leave=False, disable=None):
            preds = np.stack([reader.read(image_id).ravel() for reader in readers])
            winner = preds[0].copy()
            open_pixels = np.flatnonzero((preds[1:] != preds[0]).any(0))
            if open_pixels.size:  # elsewhere all members agree, and there is nothing to count
                votes = preds[:, open_pixels]
                winner[open_pixels] = won = vote(votes, table)
                outvoted += np.count_nonzero(votes != won, axis=1)
                for i, j in combinations(range(len(members)), 2):
                    differ[i, j] += np.count_nonzero(votes[i] != votes[j])
            contested += open_pixels.size
            writer.write(image_id, winner.reshape(SIDE, SIDE))
    return format_vote(members, weights, outvoted, differ, contested, len(image_ids), out)


def soft_vote_files(
    members: Sequence[Member], table: np.ndarray, out: Path, image_ids: Sequence[str] | None = None
) -> str:
    """Writes the class of the highest weighted mean probability: of each CSV's <name>_probs.npy, whose rows
    are those of the CSV; table (M, K) has the weights. One photo of each is in memory at a time.

    A tie goes to the lower class. Raises BadInput.
    """
    weights = (table / table.sum(0).max()).astype(np.float32)[:, :, None, None]
    with ExitStack() as stack:
        readers = [stack.enter_context(SubmissionReader(m.path, table.shape[1])) for m in members]
        where = 'test.json' if image_ids is not None else members[0].path
        image_ids = readers[0].image_ids if image_ids is None else image_ids
        probs = [open_probs(reader, table.shape[1]) for reader in readers]
        for reader in readers:
            require_same_images(image_ids, where, reader)
        rows = [{image_id: row for row, image_id in enumerate(reader.image_ids)} for reader in readers]
        writer = stack.enter_context(SubmissionWriter(out))
        for image_id in tqdm(image_ids, desc='soft vote', unit='image', leave=False, disable=None):
            mean = sum(w * p[row[image_id]] for w, p, row in zip(weights, probs, rows, strict=True))
            writer.write(image_id, mean.argmax(0).astype(np.uint8))
    return f'{out}: the mean of the probabilities of {len(members)} models on {len(image_ids)} images'


def open_probs(reader: SubmissionReader, num_classes: int) -> np.ndarray:
    """(n, K, 256, 256) uint8, memory-mapped, of the rows of a CSV. Raises BadInput."""
    path = reader.path.with_name(f'{reader.path.stem}_probs.npy')
    try:
        probs = np.load(path, mmap_mode='r')
    except FileNotFoundError:
        raise BadInput(f'{path}: no such file; infer.py --save-probs writes it beside the CSV') from None
    except (OSError, ValueError) as error:
        raise BadInput(f'{path}: not probabilities, or cut off: {one_line(error)}') from None
    expected = (len(reader.image_ids), num_classes, SIDE, SIDE)
    if probs.shape != expected or probs.dtype != np.uint8:
        raise BadInput(f'{path}: found {probs.shape} {probs.dtype}, expected {expected} uint8')
    return probs


def vote(preds: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(M, ...) uint8 ids → (...) ids of the highest sum of weights; table[m, k] is that of m's vote for k.

    A tie goes to the tied class of the earliest member. Votes of weight 0 count for nothing, in ties neither;
    where all votes are such, the first member's class is taken.
    """
    said = [weights[pred] for weights, pred in zip(table, preds, strict=True)]
    winner = preds[0].copy()
    best = np.zeros(winner.shape, table.dtype)
    for pred, own in zip(preds, said, strict=True):
        total = np.zeros(winner.shape, table.dtype)
        for other, weight in zip(preds, said, strict=True):
            total += weight * (other == pred)
        total *= own > 0
        np.copyto(winner, pred, where=total > best)
        np.maximum(best, total, out=best)
    return winner


def weight_table(weights: Sequence[Fraction], by_class: Sequence[Sequence[Fraction]]) -> np.ndarray:
    """(M, K) whole numbers in proportion to member weight x class weight, so that sums of them are exact.

    Raises BadInput where all are 0, or where sums would not fit 63 bits.
    """
    exact = [[weight * by for by in row] for weight, row in zip(weights, by_class, strict=True)]
    scale = lcm(*(value.denominator for row in exact for value in row))
    whole = [[int(value * scale) for value in row] for row in exact]
    common = gcd(*(value for row in whole for value in row))
    if common == 0:
        raise BadInput('--weights: all of them are 0; expected one above 0')
    highest = sum(max(row) for row in whole) // common
    if highest >= 2**63:
        raise BadInput('--weights: too many digits to be added up exactly; give them fewer')
    return np.array([[value // common for value in row] for row in whole], np.min_scalar_type(highest))


def parse_weight(text: str) -> Fraction:
    """A weight from 0, of at most 9 digits on either side of the point."""
    if not re.fullmatch(r'\d{1,9}(\.\d{1,9})?', text, re.ASCII):
        raise argparse.ArgumentTypeError(f'{text!r} is not a weight; expected a number from 0, as 2 or 0.25')
    return Fraction(text)


def read_class_weights(
    path: Path | None, members: Sequence[Member], num_classes: int
) -> list[list[Fraction]]:
    """(M, K) weights by class; 1 for members that the YAML file does not name. Raises BadInput."""
    rows = [[Fraction(1)] * num_classes for _ in members]
    if path is None:
        return rows
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise BadInput(f'{path}: expected lines of "model: [{num_classes} weights]"')
    for key, listed in values.items():
        named = [
            i
            for i, m in enumerate(members)
            if str(key) in (str(m.path), str(m.folder), m.folder.resolve().name)
        ]
        if not named:
            known = sorted({m.folder.resolve().name for m in members} | {str(m.path) for m in members})
            near = difflib.get_close_matches(str(key), known, n=1)
            raise BadInput(
                f'{path}: {str(key)!r} is no member' + (f'; did you mean {near[0]!r}?' if near else '')
            )
        if not isinstance(listed, list) or len(listed) != num_classes:
            raise BadInput(f'{path}: {key}: found {str(listed)[:60]!r}, expected {num_classes} weights in []')
        try:
            row = [parse_weight(str(value)) for value in listed]
        except argparse.ArgumentTypeError as error:
            raise BadInput(f'{path}: {key}: {error}') from None
        for i in named:
            rows[i] = row
    return rows


def format_vote(
    members: Sequence[Member], weights: Sequence[Fraction], outvoted: np.ndarray, differ: np.ndarray,
    contested: int, num_images: int, out: Path,
) -> str:  # fmt: skip
    """What a vote did: the members with their weights, and how much they agree."""
    pixels = num_images * PIXELS
    lines = [f'{out}: the vote of {len(members)} CSVs on {num_images} images', '  #  weight  outvoted  CSV']
    for i, (member, weight, lost) in enumerate(zip(members, weights, outvoted, strict=True), start=1):
        lines.append(f'{i:>3}  {float(weight):>6.4g}  {lost / pixels:>8.2%}  {member.path}')
    lines.append(f'all agree on {1 - contested / pixels:.2%} of the pixels')
    pairs = sorted(combinations(range(len(members)), 2), key=lambda pair: differ[pair])
    for which, pair in (('least', pairs[:1]), ('most', pairs[1:][-1:])):
        lines += [f'{which} apart: {i + 1} and {j + 1}, on {differ[i, j] / pixels:.2%}' for i, j in pair]
    return '\n'.join(lines)


# --- the search for weights -------------------------------------------------------------------------------


def searched_weights(members: Sequence[Member], data: Path, classes: tuple[str, ...]) -> list[Fraction]:
    """Weights of the members, searched on their out-of-fold predictions; prints what was found.

    A model's weight is shared by its CSVs, so that one with more folds at hand has no more to say.
    Raises BadInput.
    """
    oof: dict[Path, list[Member]] = {}
    for member in members:
        oof.setdefault(member.folder, []).append(member)
    photos = {photo.file_name: photo for photo in read_coco(data, 'train', classes).photos}

    def samples() -> Iterator[Sample]:
        return read_samples(list(oof.values()), photos, data, len(classes))

    result = search_weights(count_votes(samples(), len(oof), len(classes)))
    print(format_search(result, [str(folder) for folder in oof]))
    print(format_gain(samples(), result, len(classes)))
    shares = {folder: Fraction(w, len(oof[folder])) for folder, w in zip(oof, result.weights, strict=True)}
    return [shares[member.folder] for member in members]


def format_gain(samples: Iterable[Sample], result: SearchResult, num_classes: int) -> str:
    """By how much the vote is better than the best model, both chosen without the photos that they are
    scored on, with a paired interval over these.
    """
    counts: list[list[np.ndarray]] = [[], []]
    for part, truth, preds in samples:
        for chosen, own in zip((result.part_weights, result.part_singles), counts, strict=True):
            table = np.tile(np.array(chosen[part])[:, None], num_classes)
            own.append(image_counts(confusion_matrix(truth, vote(preds, table), num_classes)))
    gain = paired_interval(*map(np.stack, counts))
    return (
        f'the vote - the best model, out of sample: {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]; '
        f'{verdict(gain, len(counts[0]))}'
    )


def write_recipe(path: Path, members: Sequence[Member], weights: Sequence[Fraction]) -> None:
    """The members, each known by its oof.csv, and their weights."""
    listed = [
        {'csv': str(member.path), 'oof': oof_hash(member), 'weight': str(weight)}
        for member, weight in zip(members, weights, strict=True)
    ]
    write_text(path, yaml.safe_dump({'rule': 'hard vote', 'members': listed}, sort_keys=False))
    print(f'wrote {path}; ensemble.py --recipe {path} applies it again')


def read_recipe(path: Path, members: Sequence[Member]) -> list[Fraction]:
    """The weights of the members in a recipe. Raises BadInput where these are not its members."""
    recipe = read_yaml(path)
    try:
        found = {
            str(one['oof']): (str(one['csv']), parse_weight_of(one['weight'])) for one in recipe['members']
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise BadInput(f'{path}: not a recipe of ensemble.py --search') from None
    given = {oof_hash(member): member for member in members}
    for key, member in given.items():
        if key not in found:
            raise BadInput(f'{member.path}: is no member of {path}: its oof.csv is another one')
    for key, (csv, weight) in found.items():
        if weight and key not in given:
            raise BadInput(f'{path}: its member {csv} is not among the CSVs')
    return [found[key][1] for key in given]


def parse_weight_of(text: object) -> Fraction:
    """A weight of a recipe, as 2 or 1/5."""
    weight = Fraction(str(text))
    if weight < 0:
        raise ValueError('a weight below 0')
    return weight


def oof_hash(member: Member) -> str:
    """Which model and fold a CSV is of: the SHA-256 of the oof.csv beside it. Raises BadInput."""
    path = member.path.with_name('oof.csv')
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def read_samples(
    models: Sequence[Sequence[Member]], photos: dict[str, Photo], data: Path, num_classes: int
) -> Iterator[Sample]:
    """Truth and every model's prediction of each photo out of fold; `photos` by file name. Raises BadInput.

    The part of a photo is its fold, where the CSVs are of several; else its place, in PARTS stretches.
    """
    with ExitStack() as stack:
        found: list[dict[str, tuple[SubmissionReader, int | None]]] = []
        for model in models:
            found.append({})
            for member in model:
                path = member.path.with_name('oof.csv')
                if not path.is_file():
                    raise BadInput(f'{path}: no such file; --search needs what infer.py --split oof writes')
                reader = stack.enter_context(SubmissionReader(path, num_classes))
                for image_id in reader.image_ids:
                    if image_id in found[-1]:
                        other = found[-1][image_id][0].path
                        raise BadInput(f'{path}: image {image_id!r} is out of fold in {other} too')
                    if image_id not in photos:
                        raise BadInput(f'{path}: image {image_id!r} is none of the training photos of {data}')
                    found[-1][image_id] = (reader, member.fold)
        for model, images in zip(models, found, strict=True):
            for image_id in images.keys() ^ found[0].keys():
                names = f'{models[0][0].folder} and {model[0].folder}'
                raise BadInput(f'{names}: only one has {image_id!r} out of fold; give the same folds of each')
        parts = {image_id: -1 if fold is None else fold for image_id, (_, fold) in found[0].items()}
        if len(set(parts.values())) < 2:
            parts = {image_id: place * PARTS // len(parts) for place, image_id in enumerate(parts)}
        numbers = {part: number for number, part in enumerate(sorted(set(parts.values())))}
        for image_id, part in tqdm(parts.items(), desc='count', unit='photo', leave=False, disable=None):
            preds = np.stack([images[image_id][0].read(image_id) for images in found])
            yield numbers[part], board_truth(draw_mask(photos[image_id])), preds


if __name__ == '__main__':
    run_script(main)
