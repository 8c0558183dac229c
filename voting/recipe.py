"""The recipe of an ensemble: searched out of fold, kept in ensemble.yaml, applied to the same members.

Also the comparison of two predictions of the same photos. Shapes: M members or models, K classes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from config import BadInput, read_yaml
from data.coco import Photo, board_truth, draw_mask, read_coco
from intervals import DRAWS, LEVEL, interval, paired_by_class, paired_interval, verdict
from metrics import confusion_matrix, image_counts
from submission import SubmissionReader, require_same_images
from utils.files import write_text
from utils.progress import progress
from voting.calibration import RANGE, Calibration, calibrate, write_calibration
from voting.hard import SearchResult, count_votes, format_search, member_table, search_weights, vote
from voting.members import Member, OofSample, by_model, member_of, oof_hash, read_samples
from voting.soft import SoftResult, mean_probs, search_soft

Rule = Literal['hard vote', 'soft vote']


@dataclass(frozen=True)
class Recipe:
    """How members are put together: their weights by class (M, K), and in a soft vote their temperatures."""

    rule: Rule
    table: list[list[Fraction]]
    temperatures: list[float]


def search_recipe(
    members: Sequence[Member], data: Path, classes: tuple[str, ...], soft: bool, by_class: bool
) -> Recipe:
    """The best recipe out of sample, of hard votes, and with soft of means of probabilities too; prints
    what was found. A model's weight is shared by its CSVs, so that one with more folds has no more to say.

    Raises BadInput.
    """
    models = by_model(members)
    photos = training_photos(data, classes)

    def samples(soft: bool = soft) -> Iterator[OofSample]:
        return read_samples(list(models.values()), photos, data, len(classes), soft)

    result = search_weights(count_votes(samples(False), len(models), len(classes)), by_class)
    table = result.table(len(classes)).tolist()
    found = Recipe('hard vote', [[Fraction(w) for w in row] for row in table], [1.0] * len(table))

    def choose(sample: OofSample) -> np.ndarray:
        return vote(sample.preds, result.part_table(sample.part, len(classes)))

    names = [str(folder) for folder in models]
    print(format_search(result, names))
    if soft and len(models) > 1:
        calibrations = calibrate(samples(), len(models))
        mean = search_soft(samples(), len(models), len(classes), calibrations)
        better = mean.out_of_sample > result.out_of_sample
        print(format_soft(mean, calibrations, names, better))
        if better:
            rows = [[Fraction(weight)] * len(classes) for weight in mean.weights]
            found = Recipe('soft vote', rows, list(mean.temperatures))

            def choose(sample: OofSample) -> np.ndarray:
                table = member_table(mean.part_weights[sample.part], len(classes))
                return mean_probs(sample.probs, table, mean.part_temperatures[sample.part]).argmax(0)

    print(format_gain(samples(), choose, result, len(classes)))
    place = {folder: number for number, folder in enumerate(models)}
    rows = []
    for member in members:
        share = Fraction(1, len(models[member.folder]))
        rows.append([weight * share for weight in found.table[place[member.folder]]])
    return replace(
        found, table=rows, temperatures=[found.temperatures[place[member.folder]] for member in members]
    )


def format_soft(
    result: SoftResult, calibrations: Sequence[Calibration], names: Sequence[str], used: bool
) -> str:
    width = max(map(len, names))
    lines = ['soft vote, the mean of probabilities:']
    lines += [f'  {name:<{width}}  {one}' for name, one in zip(names, calibrations, strict=True)]
    weights = ' '.join(map(str, result.weights))
    levels = ' '.join(f'{t:g}' for t in result.temperatures)
    lines.append(f'  weights {weights}, temperatures {levels}: {result.best:.4f} in sample')
    lines.append(
        f'  out of sample {result.out_of_sample:.4f}, without temperatures {result.plain_out_of_sample:.4f}'
    )
    lines.append(
        f'use the soft vote with weights {weights}' if used else 'no soft vote is better out of sample'
    )
    return '\n'.join(lines)


def format_gain(
    samples: Iterator[OofSample],
    choose: Callable[[OofSample], np.ndarray],
    result: SearchResult,
    num_classes: int,
) -> str:
    """By how much what `choose` makes of a sample is better than the best model, both chosen without the
    photos that they are scored on, with a paired interval over these.
    """
    counts: list[list[np.ndarray]] = [[], []]
    for sample in samples:
        single = sample.preds[np.argmax(result.part_singles[sample.part])]
        for pred, own in zip((choose(sample), single), counts, strict=True):
            own.append(image_counts(confusion_matrix(sample.truth, pred, num_classes)))
    gain = paired_interval(*map(np.stack, counts))
    return (
        f'the vote - the best model, out of sample: {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]; '
        f'{verdict(gain, len(counts[0]))}'
    )


def training_photos(data: Path, classes: tuple[str, ...]) -> dict[str, Photo]:
    """The training photos of a data root by file name. Raises BadInput."""
    return {photo.file_name: photo for photo in read_coco(data, 'train', classes).photos}


def calibrate_model(folder: Path, data: Path, classes: tuple[str, ...]) -> str:
    """Fits a model's temperature on its oof_probs.npy, and keeps it in its folder. Raises BadInput."""
    members = [member_of(path) for path in sorted(folder.glob('fold*/oof.csv')) or [folder / 'oof.csv']]
    samples = read_samples([members], training_photos(data, classes), data, len(classes), soft=True)
    found = calibrate(samples, 1)[0]
    path = write_calibration(folder, found, [oof_hash(member) for member in members])
    return f'{folder}: {found}; wrote {path}'


# --- ensemble.yaml ----------------------------------------------------------------------------------------


def write_recipe(path: Path, members: Sequence[Member], recipe: Recipe) -> None:
    """The members, each known by its oof.csv, and how they are put together."""
    listed = []
    for member, row, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        one = {'csv': str(member.path), 'oof': oof_hash(member)}
        plain = len(set(row)) == 1
        one['weight'] = str(row[0]) if plain else [str(weight) for weight in row]
        if temperature != 1:
            one['temperature'] = temperature
        listed.append(one)
    write_text(path, yaml.safe_dump({'rule': recipe.rule, 'members': listed}, sort_keys=False))
    print(f'wrote {path}; ensemble.py --recipe {path} applies it again')


def read_recipe(path: Path, members: Sequence[Member], num_classes: int) -> Recipe:
    """A recipe for these members. Raises BadInput where they are not the recipe's."""
    content = read_yaml(path)
    found: dict[str, tuple[str, list[Fraction], float]] = {}
    try:
        rule = content['rule']
        for one in content['members']:
            weight = one['weight']
            row = weight if isinstance(weight, list) else [weight] * num_classes
            row = [str(value) for value in row]
            if not all(re.fullmatch(r'\d{1,9}(\.\d{1,9}|/\d{1,9})?', text, re.ASCII) for text in row):
                raise ValueError('a weight that is none')
            row = [Fraction(text) for text in row]
            temperature = float(one.get('temperature', 1))
            if len(row) != num_classes or not RANGE[0] <= temperature <= RANGE[1]:
                raise ValueError('a weight or a temperature that is none')
            found[str(one['oof'])] = str(one['csv']), row, temperature
        if rule not in ('hard vote', 'soft vote'):
            raise ValueError('a rule that is none')
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        raise BadInput(f'{path}: not a recipe of ensemble.py --search') from None
    given = [oof_hash(member) for member in members]
    for key, member in zip(given, members, strict=True):
        if key not in found:
            raise BadInput(f'{member.path}: is no member of {path}: its oof.csv is another one')
    for key, (csv, row, _) in found.items():
        if any(row) and key not in given:
            raise BadInput(f'{path}: its member {csv} is not among the CSVs')
    own = [found[key] for key in given]
    return Recipe(rule, [row for _, row, _ in own], [temperature for *_, temperature in own])


# --- two predictions --------------------------------------------------------------------------------------


def compare(csvs: Sequence[Path], data: Path, classes: tuple[str, ...]) -> str:
    """The scores of two CSVs on the photos that they have, and the difference, by class too, with paired
    bootstrap intervals. Raises BadInput where one lacks a photo of the other.
    """
    photos = training_photos(data, classes)
    with ExitStack() as stack:
        first, second = (stack.enter_context(SubmissionReader(path, len(classes))) for path in csvs)
        require_same_images(first.image_ids, csvs[0], second)
        counts = np.zeros((2, len(first.image_ids), 3, len(classes)), np.int64)
        for n, image_id in enumerate(progress(first.image_ids, 'compare', 'image')):
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
