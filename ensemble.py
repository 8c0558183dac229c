"""Stage 4: vote over saved CSVs and write one submission; search the weights out of fold.

    python ensemble.py output/*/fold*/test.csv --out output/submission.csv
    python ensemble.py output/a/test.csv output/b/test.csv --weights 2 1 --out output/submission.csv
    python ensemble.py output/*/fold*/test.csv --search --out output/submission.csv
    python ensemble.py output/*/test.csv --soft --out output/submission.csv     # after infer.py --save-probs
    python ensemble.py output/*/fold*/test.csv --search --soft --out output/submission.csv
    python ensemble.py output/*/fold*/test.csv --recipe output/ensemble.yaml --out output/submission.csv

--search chooses a weight for each model (with --by-class also for each of its classes) on the oof.csv beside
each test.csv, and says so when a single model is better than any vote. With --soft it tries means of
probabilities too, at calibrated temperatures if they help. It raises the metric of competition.yaml, and
writes its choice to ensemble.yaml beside --out; --recipe applies that file again, to the same members only,
in its own order. A CSV whose best.pt has changed since is refused. Its interval of the gain searches again in
each draw of the photos (voting/choices.py). The CSVs of a single model vote with equal weights.

Votes are matched by image_id, whatever tool wrote the CSVs (submission.py says what is read); the rows are in
the order of the first CSV, or of --data's test.json, so one CSV alone is rewritten. A tie goes to the tied
class of the earliest CSV on the command line; a vote of weight 0 does not count, not even in a tie. Weights
are added up exactly as typed: 0.1 + 0.2 ties with 0.3. A vote in which one CSV decides every pixel, as the
first of two with equal weights does, is written with a warning: it is that CSV.

If classes may overlap (task: multilabel), each has a vote of its own: a pixel is of a class that more than
half of the weight is for; at exactly half, the earliest CSV with a weight decides. A --soft vote compares the
mean probability with a threshold a class, which --search chooses with the weights; without it, the mean of
those in the members' thresholds.yaml, with the weights of the vote, or 0.5 where a member has none.

--class-weights FILE.yaml also weighs each vote by the class that it is for, one weight per class:

    convnext: [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0.5]   # the name of a model's folder, or the path of one CSV

Shapes: M members, K classes.
"""

import argparse
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import combinations
from pathlib import Path

from utils.cli import ArgumentParser, add_config_arguments, next_line, parse_early, run_script
from utils.errors import DONE, BadInput
from utils.files import require_files
from utils.yaml_files import read_yaml


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 if options contradict each other."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='the members of the vote')
    parser.add_argument('--out', type=Path, required=True, metavar='CSV', help='the submission to write')
    parser.add_argument('--soft', action='store_true', help='average the *_probs.npy beside each CSV')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--weights', nargs='+', type=parse_weight, metavar='W', help='by default 1 each')
    group.add_argument('--search', action='store_true', help='choose weights on the oof.csv beside each CSV')
    group.add_argument('--recipe', type=Path, metavar='YAML', help='an ensemble.yaml; by default none')
    parser.add_argument('--by-class', action='store_true', help='let --search choose weights by class too')
    parser.add_argument('--class-weights', type=Path, metavar='YAML', help='weights by class; by default 1')
    parser.add_argument('--data', type=Path, help='its test.json orders the rows; by default the first CSV')
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    if args.class_weights and (args.search or args.recipe):
        parser.error('--class-weights does not go with --search or --recipe, which bring their own weights')
    if args.by_class and not args.search:
        parser.error('--by-class changes what --search looks for: give --search too')
    if args.soft and args.recipe:
        parser.error('--recipe already says whether the vote is soft: leave out --soft')
    require_files(*args.csvs)
    return args


def parse_weight(text: str) -> Fraction:
    """Parse a weight of 0 or more, with at most 9 digits on either side of the point."""
    if not re.fullmatch(r'\d{1,9}(\.\d{1,9})?', text, re.ASCII):
        problem = f'{text!r} is not a weight; expected 0 or a positive number, such as 2 or 0.25'
        raise argparse.ArgumentTypeError(problem)
    return Fraction(text)


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np

from config import Competition
from submission import (
    MaskFormat,
    Reader,
    competition_and_data,
    mask_format,
    open_probs,
    read_format,
    require_same_images,
)
from utils.files import lock, refuse_inside, remove_partials
from utils.progress import progress
from voting.hard import Runs, deciding_member, member_table, vote, vote_runs, weight_table
from voting.members import Member, by_model, check_members, find_members, oof_files, refuse_same_oof
from voting.recipe import Recipe, read_recipe, search_recipe, write_recipe
from voting.soft import soft_vote
from voting.thresholds import list_outdated, mean_thresholds


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    competition, data = competition_and_data(args)
    num_classes = len(competition.classes)
    members = find_members(args.csvs, args.out)
    refuse_inside(args.out, [args.recipe, args.class_weights, args.cfg, *oof_files(members)])
    form = read_format(data, competition, required=args.data is not None)
    recipe = typed_recipe(args, members, competition)
    check_members(members, with_oof=args.search or args.recipe is not None)
    if args.search:
        refuse_same_oof(members)
    oofs = oof_files(members) if args.search else []
    if outdated := list_outdated([*args.csvs, *oofs], num_classes):
        print(outdated)
    with lock(args.out.with_name(f'.{args.out.name}.lock'), f'voting on {args.out.name}'):
        remove_partials(args.out.parent, args.out.name, 'ensemble.yaml')
        if args.search:
            if len(by_model(members)) > 1:
                recipe = search_recipe(members, data, competition, args.soft, args.by_class)
            else:
                print('one model: nothing to search; its CSVs vote with equal weights')
            write_recipe(args.out.with_name('ensemble.yaml'), members, recipe)
        elif args.recipe is not None:
            members, recipe = read_recipe(args.recipe, members, num_classes)
        write_vote = write_soft_vote if recipe.rule == 'soft vote' else write_hard_vote
        print(write_vote(members, recipe, args.out, form, args.data is not None))
    if note := describe_decider(members, recipe, competition):
        print(f'{"note" if args.search or args.recipe else "warning"}: {note}')
    check = ('submission.py', 'check', args.out, '--data', data)
    print(next_line(*check, cfg=args.cfg, changes=args.set))
    return DONE


def typed_recipe(args: argparse.Namespace, members: Sequence[Member], competition: Competition) -> Recipe:
    """Build the recipe of --weights (1 by default), --class-weights and --soft. Raises BadInput."""
    weights = args.weights or [Fraction(1)] * len(members)
    if len(weights) != len(members):
        raise BadInput(f'--weights: found {len(weights)}, expected {len(members)}, one per CSV')
    by_class = read_class_weights(args.class_weights, members, len(competition.classes))
    table = [[weight * factor for factor in row] for weight, row in zip(weights, by_class, strict=True)]
    temperatures = [1.0] * len(members)
    if not args.soft:
        return Recipe('hard vote', table, temperatures)
    thresholds = mean_thresholds([m.folder for m in members], table) if competition.is_multilabel else None
    return Recipe('soft vote', table, temperatures, thresholds)


def describe_decider(members: Sequence[Member], recipe: Recipe, competition: Competition) -> str:
    """Say which of several members decides every pixel of a hard vote, and what to do instead; '' if none."""
    if recipe.rule != 'hard vote' or len(members) == 1:
        return ''
    table = weight_table(recipe.table)
    decider = deciding_member(table, competition.is_multilabel)
    if decider is None:
        return ''
    voters = [member for member, weights in zip(members, table, strict=True) if weights.any()]
    fault = f'{members[decider].path}: decides every pixel, as'
    if len(voters) == 1:
        return f'{fault} no other CSV has a weight'
    ways = ['a third CSV', 'other weights'] if len(members) == 2 else ['other weights']
    if len({member.folder.resolve() for member in voters}) == 1:
        ways.append(f'infer.py --fold all, the mean of the folds of {voters[0].folder}')
    else:
        ways.append('--soft, after infer.py --save-probs')
    return f'{fault} it has at least half of all weight, and ties go to the first; give {" or ".join(ways)}'


def read_class_weights(
    path: Path | None, members: Sequence[Member], num_classes: int
) -> list[list[Fraction]]:
    """Read (M, K) weights by class; 1 for members that the YAML file does not name. Raises BadInput."""
    table = [[Fraction(1)] * num_classes for _ in members]
    if path is None:
        return table
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise BadInput(f'{path}: expected lines of "model: [{num_classes} weights]"')
    names = [{str(m.path), str(m.folder), m.folder.resolve().name} for m in members]
    for key, weights in values.items():
        matches = [m for m in range(len(members)) if str(key) in names[m]]
        if not matches:
            known = sorted({m.folder.resolve().name for m in members} | {str(m.path) for m in members})
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else ''
            raise BadInput(f'{path}: {str(key)!r} is no member{hint}')
        if not isinstance(weights, list) or len(weights) != num_classes:
            found = repr(str(weights)[:60])
            raise BadInput(f'{path}: {key}: found {found}, expected {num_classes} weights in []')
        try:
            row = [parse_weight(str(weight)) for weight in weights]
        except argparse.ArgumentTypeError as error:
            raise BadInput(f'{path}: {key}: {error}') from None
        for m in matches:
            table[m] = row
    return table


def open_members(
    stack: ExitStack, members: Sequence[Member], form: MaskFormat, test_order: bool
) -> tuple[list[Reader], Sequence[str]]:
    """Open the members' CSVs; return them and the image ids of the output. Raises BadInput.

    The order is that of test.json if `test_order`, otherwise of the first CSV. Ids are spelled as in
    test.json if it has them, otherwise as in the first CSV.
    """
    first = stack.enter_context(form.reader(members[0].path))
    image_ids, source = ([*form.sizes], 'test.json') if test_order else (first.image_ids, members[0].path)
    form = form if form.sizes else mask_format(form.competition, dict.fromkeys(image_ids, (0, 0)))
    readers = [first, *(stack.enter_context(form.reader(member.path)) for member in members[1:])]
    for reader in readers:
        require_same_images(image_ids, source, reader)
    return readers, image_ids


def write_hard_vote(
    members: Sequence[Member], recipe: Recipe, out: Path, form: MaskFormat, test_order: bool
) -> str:
    """Write the vote of the CSVs, with the ids and order of open_members; return a summary.

    Raises BadInput, and then leaves `out` as it was.
    """
    table = weight_table(recipe.table)
    tables = [member_table(weights, 2) for weights in table.T] if form.competition.is_multilabel else [table]
    agreement = Agreement(len(members))
    with ExitStack() as stack:
        readers, image_ids = open_members(stack, members, form, test_order)
        writer = stack.enter_context(form.writer(out))
        for image_id in progress(image_ids, 'vote', 'photo'):
            if form.competition.rle is None:
                masks = [reader.read(image_id) for reader in readers]
                writer.write(image_id, vote_pixels(np.stack(masks), table, agreement))
            else:
                layers = zip(*(reader.read_runs(image_id) for reader in readers), strict=True)
                pixels = math.prod(form.size(image_id))
                writer.write_runs(image_id, vote_layers(layers, pixels, tables, agreement))
    title = f'{out}: the vote of {len(members)} CSVs on {len(image_ids)} photos'
    pixels = sum(math.prod(form.shape(image_id)) for image_id in image_ids)
    return '\n'.join([title, *format_agreement(agreement, members, table, pixels)])


def vote_pixels(masks: np.ndarray, table: np.ndarray, agreement: 'Agreement') -> np.ndarray:
    """Vote over (M, H, W) ids, and count the agreement; return (H, W) ids."""
    preds = masks.reshape(len(masks), -1)
    winner = preds[0].copy()
    contested = np.flatnonzero((preds[1:] != preds[0]).any(0))
    if contested.size:  # elsewhere all members agree, and there is nothing to count
        winner[contested] = vote(preds[:, contested], table)
        agreement.add(preds[:, contested], winner[contested])
    return winner.reshape(masks.shape[1:])


def vote_layers(
    layers: Iterable[Sequence[Runs]], pixels: int, tables: Sequence[np.ndarray], agreement: 'Agreement'
) -> list[Runs]:
    """Vote over run lengths as they are, and count the agreement: runs and ids of M members in each layer,
    with its table of weights; a layer is the plane of a class that may overlap others, or all of a mask.
    """
    winners = []
    for members, table in zip(layers, tables, strict=True):
        result = vote_runs(members, pixels, table)
        contested = (result.votes != result.votes[0]).any(0)
        agreement.add(result.votes[:, contested], result.winner[contested], result.pixels[contested])
        winners.append((result.runs, result.ids))
    return winners


def write_soft_vote(
    members: Sequence[Member], recipe: Recipe, out: Path, form: MaskFormat, test_order: bool
) -> str:
    """Write the soft_vote of the members with a weight; return a summary.

    The probabilities are in <name>_probs.npy beside each CSV, with the rows of the CSV. Raises BadInput.
    """
    table = weight_table(recipe.table)
    voting = np.flatnonzero(table.any(1))
    weights, temperatures = table[voting], [recipe.temperatures[m] for m in voting]
    with ExitStack() as stack:
        voters = [members[m] for m in voting]
        readers, image_ids = open_members(stack, voters, form, test_order)
        probs = [open_probs(reader, form) for reader in readers]
        rows = [{image_id: row for row, image_id in enumerate(reader.image_ids)} for reader in readers]
        writer = stack.enter_context(form.writer(out))
        for image_id in progress(image_ids, 'soft vote', 'photo'):
            photo_probs = [array[row[image_id]] for array, row in zip(probs, rows, strict=True)]
            writer.write(image_id, soft_vote(photo_probs, weights, temperatures, recipe.thresholds))
    return f'{out}: the mean of the probabilities of {len(voting)} models on {len(image_ids)} photos'


class Agreement:
    """Counts of the pixels in which the members of a vote disagree."""

    def __init__(self, num_members: int) -> None:
        self.differing = np.zeros((num_members, num_members), np.int64)  # between member i and a later j
        self.outvoted = np.zeros(num_members, np.int64)  # another class than the member's won
        self.contested = 0  # not all members agree

    def add(self, votes: np.ndarray, winner: np.ndarray, pixels: np.ndarray | None = None) -> None:
        """Count (M, P) votes of contested pixels and their (P,) winners, or of stretches of (P,) pixels."""
        self.contested += len(winner) if pixels is None else pixels.sum()
        self.outvoted += count_true(votes != winner, pixels)
        for i, j in combinations(range(len(votes)), 2):
            self.differing[i, j] += count_true(votes[i] != votes[j], pixels)


def count_true(which: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
    """Count the true ones of (..., P) pixels, or of stretches of (P,) pixels → (...)."""
    return np.count_nonzero(which, axis=-1) if pixels is None else which @ pixels


def format_agreement(
    agreement: Agreement, members: Sequence[Member], table: np.ndarray, pixels: int
) -> list[str]:
    """List the members with their weights, and how much they agree."""
    lines = ['  #  weight  outvoted  CSV']
    for i, (member, row, lost) in enumerate(zip(members, table, agreement.outvoted, strict=True), start=1):
        weight = f'{row[0]:.4g}' if len(set(row.tolist())) == 1 else f'{min(row):.3g}-{max(row):.3g}'
        lines.append(f'{i:>3}  {weight:>6}  {lost / pixels:>8.2%}  {member.path}')
    lines.append(f'all agree on {1 - agreement.contested / pixels:.2%} of the pixels')
    differing = agreement.differing
    pairs = sorted(combinations(range(len(members)), 2), key=lambda pair: differing[pair])
    for label, pair in (('most alike', pairs[:1]), ('least alike', pairs[1:][-1:])):
        for i, j in pair:
            lines.append(f'{label}: {i + 1} and {j + 1}, which differ on {differing[i, j] / pixels:.2%}')
    return lines


if __name__ == '__main__':
    run_script(main)
