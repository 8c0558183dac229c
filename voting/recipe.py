"""The recipe of an ensemble: searched out of fold, kept in ensemble.yaml, applied to the same members.

Also the comparison of two predictions of the same photos. Shapes: M members or models, K classes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from config import fold_files, read_yaml
from data.coco import training_photos
from metrics import (
    DRAWS,
    IGNORED,
    LEVEL,
    Interval,
    confusion_matrix,
    image_counts,
    interval,
    iou_of_counts,
    miou_of_counts,
    paired_interval,
    verdict,
)
from utils.errors import BadInput
from utils.files import write_text
from voting.calibration import RANGE, Calibration, calibrate, write_calibration
from voting.hard import (
    SearchResult,
    count_votes,
    format_search,
    member_table,
    search_weights,
    vote,
    weight_table,
)
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


def calibrate_model(folder: Path, data: Path, classes: tuple[str, ...]) -> str:
    """Fits a model's temperature on its oof_probs.npy, and keeps it in its folder. Raises BadInput."""
    members = [member_of(path) for path in fold_files(folder, 'oof.csv') or [folder / 'oof.csv']]
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


@dataclass(frozen=True)
class Ensembled:
    """Models with their weights by class, the counts of each and of the ensemble, and what it changed."""

    rule: str
    names: list[str]
    weights: list[list[Fraction]]  # (M, K)
    counts: np.ndarray  # (M + 1, n, 3, K), metrics.image_counts, those of the ensemble last
    changed: np.ndarray  # (M, 2, K) pixels of each true class that the ensemble alone has right, or the model

    @property
    def best(self) -> int:
        """The model of the highest mIoU."""
        return int(miou_of_counts(self.counts[:-1].sum(1)).argmax())

    def gain(self) -> Interval:
        """The ensemble's mIoU above the best model's."""
        return paired_interval(self.counts[-1], self.counts[self.best])

    def lines(self) -> list[list[str]]:
        """A table: each model with its weight, mIoU and interval, and the ensemble."""
        weights = [*(format_weights(row) for row in self.weights), '']
        rows = [['', 'weight', 'mIoU', f'{LEVEL:.0%} of {DRAWS:,} draws']]
        for name, weight, counts in zip([*self.names, self.rule], weights, self.counts, strict=True):
            score = interval(counts)
            rows.append([name, weight, f'{score.value:.4f}', f'{score.low:.4f} to {score.high:.4f}'])
        return rows

    def class_lines(self, classes: tuple[str, ...]) -> list[list[str]]:
        """A table: of each class the IoU of the best model and of the ensemble, and the pixels it changed."""
        best, own = (iou_of_counts(*self.counts[which].sum(0)) for which in (self.best, -1))
        mended, broken = self.changed[self.best]
        rows = [['class', self.names[self.best], self.rule, 'gain', 'pixels mended', 'pixels broken']]
        for k, name in enumerate(classes):
            if not np.isnan(best[k] + own[k]):
                ious = [f'{best[k]:.4f}', f'{own[k]:.4f}', f'{own[k] - best[k]:+.4f}']
                rows.append([name, *ious, f'{mended[k]:,}', f'{broken[k]:,}'])
        return rows


def read_ensemble(path: Path, num_classes: int) -> tuple[list[Member], Recipe]:
    """The members that ensemble.yaml lists, and the recipe. Raises BadInput, also where one has changed."""
    content = read_yaml(path)
    try:
        members = [member_of(Path(str(one['csv']))) for one in content['members']]
    except (KeyError, TypeError):
        raise BadInput(f'{path}: not a recipe of ensemble.py --search') from None
    return members, read_recipe(path, members, num_classes)


def score_ensemble(path: Path, data: Path, classes: tuple[str, ...]) -> Ensembled:
    """Applies the recipe to every photo out of fold. Raises BadInput."""
    members, recipe = read_ensemble(path, len(classes))
    models = by_model(members)
    place = {folder: number for number, folder in enumerate(models)}
    weights = [[Fraction(0)] * len(classes) for _ in models]
    temperatures = [1.0] * len(models)
    for member, row, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        m = place[member.folder]  # a model's CSVs share its weight
        weights[m] = [total + weight for total, weight in zip(weights[m], row, strict=True)]
        temperatures[m] = temperature
    soft, table = recipe.rule == 'soft vote', weight_table(weights)
    counts: list[list[np.ndarray]] = []
    changed = []
    for sample in read_samples(
        list(models.values()), training_photos(data, classes), data, len(classes), soft
    ):
        won = (
            mean_probs(sample.probs, table, temperatures).argmax(0).astype(np.uint8)
            if soft
            else vote(sample.preds, table)
        )
        confusions = [confusion_matrix(sample.truth, pred, len(classes)) for pred in (*sample.preds, won)]
        counts.append([image_counts(confusion) for confusion in confusions])
        changed.append([_changed(sample.truth, pred, won, len(classes)) for pred in sample.preds])
    names = [folder.name for folder in models]
    return Ensembled(recipe.rule, names, weights, np.stack(counts, axis=1), np.sum(changed, axis=0))


def _changed(truth: np.ndarray, pred: np.ndarray, won: np.ndarray, num_classes: int) -> np.ndarray:
    """(2, K) pixels of each true class that only `won` has right, and that only `pred` has."""
    known = truth != IGNORED
    right, now = pred == truth, won == truth
    return np.stack(
        [np.bincount(truth[known & where], minlength=num_classes) for where in (now & ~right, right & ~now)]
    )


def format_weights(row: list[Fraction]) -> str:
    """One weight, or its range over the classes."""
    low, high = min(row), max(row)
    return f'{float(low):.3g}' if low == high else f'{float(low):.3g} to {float(high):.3g}'
