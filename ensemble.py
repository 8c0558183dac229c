"""Stage 4: a vote over saved CSVs, into one submission; weights searched out of fold.

    python ensemble.py output/*/fold*/test.csv --out output/submission.csv
    python ensemble.py output/a/test.csv output/b/test.csv --weights 2 1 --out output/submission.csv
    python ensemble.py output/*/fold*/test.csv --search --out output/submission.csv
    python ensemble.py output/*/test.csv --soft --out output/submission.csv     # of infer.py --save-probs
    python ensemble.py output/*/fold*/test.csv --search --soft --out output/submission.csv
    python ensemble.py output/*/fold*/test.csv --recipe output/ensemble.yaml --out output/submission.csv
    python ensemble.py compare output/a/oof.csv output/b/oof.csv --data input/data
    python ensemble.py calibrate output/convnext

compare says which of two predictions of the same training photos is better, and how sure that is.
--search chooses weights by model, with --by-class by class as well, on the oof.csv beside each test.csv,
and says where one model is better; with --soft means of probabilities too, at temperatures where these
help. What it chose is kept in ensemble.yaml beside --out, which --recipe applies again, to the same members
alone.
Votes meet by image_id; rows are in the order of the first CSV, or of --data's test.json. A tie goes to the
tied class of the earliest CSV on the command line; votes of weight 0 do not count. Weights are the decimals
that are typed, added up exactly: 0.1 + 0.2 ties with 0.3. One row of each CSV is in memory at a time.

--class-weights FILE.yaml weighs votes by the class that they are for too, one weight a class of the data set:

    convnext: [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0.5]   # the name of a model's folder, or the path of one CSV

Shapes: M members or models, K classes.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np

from config import read_yaml
from evaluate import compare_scores
from submission import (
    PIXELS,
    SIDE,
    SubmissionReader,
    SubmissionWriter,
    classes_and_data,
    open_probs,
    read_test_ids,
    require_same_images,
)  # fmt: skip
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import DONE, BadInput
from utils.files import lock, remove_partials
from utils.progress import progress
from voting.hard import vote, weight_table
from voting.members import Member, find_members
from voting.recipe import Recipe, calibrate_model, read_recipe, search_recipe, write_recipe
from voting.soft import mean_probs


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['compare']:
        return compare_command(argv[1:])
    if argv[:1] == ['calibrate']:
        return calibrate_command(argv[1:])
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
    how.add_argument(
        '--recipe', type=Path, metavar='YAML', help='the weights that a search has kept; by default none'
    )
    parser.add_argument('--by-class', action='store_true', help='--search: weights by class as well')
    parser.add_argument(
        '--class-weights', type=Path, metavar='YAML', help='weights by the class voted for; by default 1'
    )
    parser.add_argument(
        '--data',
        type=Path,
        help='data root; rows are then in the order of its test.json, by default in that of the first CSV',
    )
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    if args.class_weights and (args.search or args.recipe):
        parser.error(
            '--class-weights are those of a vote that is not searched: leave out --search and --recipe'
        )
    if args.by_class and not args.search:
        parser.error('--by-class says what --search looks for: give --search too')
    if args.soft and args.recipe:
        parser.error('--recipe says itself whether the vote is a soft one: leave out --soft')
    classes, data = classes_and_data(args)
    members = find_members(args.csvs, args.out)
    image_ids = None if args.data is None else read_test_ids(data)
    weights = args.weights or [Fraction(1)] * len(members)
    if len(weights) != len(members):
        raise BadInput(f'--weights: found {len(weights)}, expected {len(members)}, one a CSV')
    by_class = read_class_weights(args.class_weights, members, len(classes))
    rows = [[weight * by for by in row] for weight, row in zip(weights, by_class, strict=True)]
    recipe = Recipe('soft vote' if args.soft else 'hard vote', rows, [1.0] * len(members))
    with lock(args.out.with_name(f'.{args.out.name}.lock'), f'voting on {args.out.name}'):
        remove_partials(args.out.parent, args.out.name, 'ensemble.yaml')
        if args.search:
            recipe = search_recipe(members, data, classes, args.soft, args.by_class)
            write_recipe(args.out.with_name('ensemble.yaml'), members, recipe)
        if args.recipe is not None:
            recipe = read_recipe(args.recipe, members, len(classes))
        table = weight_table(recipe.table)
        if recipe.rule == 'soft vote':
            print(soft_vote_files(members, table, recipe.temperatures, args.out, image_ids))
        else:
            print(vote_files(members, table, args.out, image_ids))
    words = ('submission.py', 'check', args.out, '--data', data)
    print(next_line(*words, cfg=args.cfg, changes=args.set))
    return DONE


def compare_command(argv: list[str]) -> int:
    parser = labelled_parser(
        'compare', 'Which of two predictions is better, by the truth of the training photos.'
    )
    parser.add_argument('csvs', nargs=2, type=Path, metavar='CSV', help='two oof.csv of the same photos')
    args = parser.parse_args(argv)
    classes, data = classes_and_data(args)
    print(compare_scores(args.csvs, data, classes))
    return DONE


def calibrate_command(argv: list[str]) -> int:
    parser = labelled_parser(
        'calibrate', 'Fits the temperature of a model on its photos out of fold; pseudo.py then uses it.'
    )
    parser.add_argument(
        'folder', type=Path, help='output/<name>, with oof_probs.npy of infer.py --save-probs'
    )
    args = parser.parse_args(argv)
    classes, data = classes_and_data(args)
    print(calibrate_model(args.folder, data, classes))
    return DONE


def labelled_parser(command: str, doc: str) -> ArgumentParser:
    """The parser of a command that reads training photos."""
    parser = ArgumentParser(doc, __doc__, prog=f'{Path(sys.argv[0]).name} {command}')
    parser.add_argument('--data', type=Path, help='data root; by default input/data')
    add_config_arguments(parser, required=False)
    return parser


# --- the vote ---------------------------------------------------------------------------------------------


def vote_files(
    members: Sequence[Member], table: np.ndarray, out: Path, image_ids: Sequence[str] | None = None
) -> str:
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
        for image_id in progress(image_ids, 'vote', 'image'):
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
    return format_vote(members, table, outvoted, differ, contested, len(image_ids), out)


def soft_vote_files(
    members: Sequence[Member], table: np.ndarray, temperatures: Sequence[float], out: Path,
    image_ids: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Writes the class of the highest weighted mean probability: of each CSV's <name>_probs.npy, whose rows
    are those of the CSV; table (M, K) has the weights. One photo of each is in memory at a time.

    A tie goes to the lower class. Raises BadInput.
    """
    voting = np.flatnonzero(table.any(1))
    members, temperatures = [members[m] for m in voting], [temperatures[m] for m in voting]
    weights = table[voting]
    with ExitStack() as stack:
        readers = [stack.enter_context(SubmissionReader(m.path, table.shape[1])) for m in members]
        where = 'test.json' if image_ids is not None else members[0].path
        image_ids = readers[0].image_ids if image_ids is None else image_ids
        probs = [open_probs(reader, table.shape[1]) for reader in readers]
        for reader in readers:
            require_same_images(image_ids, where, reader)
        rows = [{image_id: row for row, image_id in enumerate(reader.image_ids)} for reader in readers]
        writer = stack.enter_context(SubmissionWriter(out))
        for image_id in progress(image_ids, 'soft vote', 'image'):
            own = [p[row[image_id]] for p, row in zip(probs, rows, strict=True)]
            writer.write(image_id, mean_probs(own, weights, temperatures).argmax(0).astype(np.uint8))
    return f'{out}: the mean of the probabilities of {len(members)} models on {len(image_ids)} images'


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
    members: Sequence[Member], table: np.ndarray, outvoted: np.ndarray, differ: np.ndarray,
    contested: int, num_images: int, out: Path,
) -> str:  # fmt: skip
    """What a vote did: the members with their weights, and how much they agree."""
    pixels = num_images * PIXELS
    lines = [f'{out}: the vote of {len(members)} CSVs on {num_images} images', '  #  weight  outvoted  CSV']
    for i, (member, row, lost) in enumerate(zip(members, table, outvoted, strict=True), start=1):
        weight = f'{row[0]:.4g}' if len(set(row.tolist())) == 1 else f'{min(row):.3g}-{max(row):.3g}'
        lines.append(f'{i:>3}  {weight:>6}  {lost / pixels:>8.2%}  {member.path}')
    lines.append(f'all agree on {1 - contested / pixels:.2%} of the pixels')
    pairs = sorted(combinations(range(len(members)), 2), key=lambda pair: differ[pair])
    for which, pair in (('least', pairs[:1]), ('most', pairs[1:][-1:])):
        lines += [f'{which} apart: {i + 1} and {j + 1}, on {differ[i, j] / pixels:.2%}' for i, j in pair]
    return '\n'.join(lines)


if __name__ == '__main__':
    run_script(main)
