"""Search the recipe of an ensemble out of fold, keep it in ensemble.yaml, apply and score it.

    recipe = search_recipe(members, data, classes, soft=True, by_class=False)
    write_recipe(Path('output/ensemble.yaml'), members, recipe)
    recipe = read_recipe(Path('output/ensemble.yaml'), members, len(classes))

Shapes: M members or models, K classes, n photos.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from config import Competition, fold_files
from data.coco import training_photos
from metrics import DRAWS, IGNORED, LEVEL, Interval, Metric, count_pixels
from submission import metric_of
from utils.errors import BadInput
from utils.files import write_text
from utils.paths import find_path, path_from
from utils.yaml_files import read_yaml
from voting.calibration import RANGE, Calibration, calibrate, write_calibration
from voting.choices import AGAIN, Search, best_of, number_scenes, search_gain
from voting.hard import count_votes, vote, vote_masks, weight_table
from voting.members import Member, OofSample, by_model, check_members, member_of, oof_hash, read_samples
from voting.origin import fitted_on, refuse_outdated
from voting.soft import SoftResult, search_soft, search_soft_planes, soft_vote
from voting.thresholds import parse_thresholds
from voting.weights import (
    ClassWeightSearch,
    SearchResult,
    WeightScorer,
    format_search,
    format_verdict,
    search_weights,
)

Rule = Literal['hard vote', 'soft vote']
WEIGHT = re.compile(r'\d{1,9}(\.\d{1,9}|/[1-9]\d{0,8})?', re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """How to combine members: (M, K) weights by class, and the temperatures of a soft vote, or, where classes
    may overlap, its thresholds.
    """

    rule: Rule
    table: list[list[Fraction]]
    temperatures: list[float]
    thresholds: list[float] | None = None  # (K,)


def search_recipe(
    members: Sequence[Member], data: Path, competition: Competition, soft: bool, by_class: bool
) -> Recipe:
    """Search the hard vote, or with `soft` any, that scores best out of sample; print it. Raises BadInput.

    The members are of two models or more.
    """
    models = by_model(members)
    names, num_classes = [str(folder) for folder in models], len(competition.classes)
    metric = metric_of(competition)
    read = partial(read_samples, list(models.values()), training_photos(data, competition), data, competition)
    hard = best = search_weights(count_votes(read(), len(models), num_classes, metric), by_class)
    print(format_search(hard, names))
    mean = None
    if soft:
        calibrations = []
        if competition.is_multilabel:
            mean = search_soft_planes(read(soft=True), len(models), num_classes, metric)
        else:
            calibrations = calibrate(read(soft=True), len(models))
            mean = search_soft(read(soft=True), len(models), num_classes, metric, calibrations)
        best = mean if mean.out_of_sample > hard.out_of_sample else hard
        print(format_soft(mean, calibrations, names, used=best is mean))
    if best is hard:
        print(format_verdict(hard, names))
    print(format_gain(*measure_gain(read(), hard, mean), hard, names))
    return share_weights(recipe_of(best, num_classes), members)


def recipe_of(result: SearchResult | SoftResult, num_classes: int) -> Recipe:
    """Return the recipe that a search found, by model."""
    if isinstance(result, SoftResult):
        table = [[Fraction(weight)] * num_classes for weight in result.weights]
        thresholds = None if result.thresholds is None else [*result.thresholds]
        return Recipe('soft vote', table, list(result.temperatures), thresholds)
    table = [[Fraction(weight) for weight in row] for row in result.table.tolist()]
    return Recipe('hard vote', table, [1.0] * len(table))


def share_weights(recipe: Recipe, members: Sequence[Member]) -> Recipe:
    """Turn a recipe by model into one by member: the CSVs of a model share its weight."""
    models = by_model(members)
    numbers = [list(models).index(member.folder) for member in members]
    counts = [len(models[member.folder]) for member in members]
    table = [[w / count for w in recipe.table[n]] for n, count in zip(numbers, counts, strict=True)]
    temperatures = [recipe.temperatures[number] for number in numbers]
    return Recipe(recipe.rule, table, temperatures, recipe.thresholds)


def format_soft(
    result: SoftResult, calibrations: Sequence[Calibration], names: Sequence[str], used: bool
) -> str:
    """Format the temperatures or thresholds and the scores of the soft vote, and say whether to use it."""
    width, label = max(map(len, names)), result.metric.label
    weights = ' '.join(map(str, result.weights))
    outcome = f'use the soft vote with weights {weights}: it scores' if used else 'no soft vote scores'
    lines = ['soft vote, the mean of probabilities:']
    if result.thresholds is None:
        temperatures = ' '.join(f'{temperature:g}' for temperature in result.temperatures)
        lines += [f'  {name:<{width}}  {line}' for name, line in zip(names, calibrations, strict=True)]
        chosen = f'temperatures {temperatures}'
        without = f'; without temperatures {result.uncalibrated_out_of_sample:.4f}'
    else:
        chosen, without = f'thresholds {" ".join(f"{threshold:.3f}" for threshold in result.thresholds)}', ''
    lines += [
        f'  weights {weights}, {chosen}: {label} {result.best:.4f}, too high: chosen on the photos that it '
        'is scored on',
        f'  {label} out of sample: {result.out_of_sample:.4f}{without}',
        f'{outcome} higher out of sample',
    ]
    return '\n'.join(lines)


def measure_gain(
    samples: Iterable[OofSample], hard: SearchResult, soft: SoftResult | None
) -> tuple[Interval, int]:
    """Compute what the search gains above the best model, chosen in the same way: see search_gain. Also
    returns the number of photos.

    A draw chooses again among all weights, a class's, whether the vote is soft and has temperatures, and the
    best model. Three choices are made of fewer candidates than the search has: weights by class are of the
    tables that were found without the photo's part, and without one part more; thresholds are every eighth
    byte; and the temperatures are those that were fitted without the part.
    """
    num_models, number = hard.candidates.shape[1], len(hard.candidates)
    families: list[Sequence[int]] = [range(num_models), [num_models], range(number)]
    by_class, allowed, tables = [], None, []
    if hard.by_class is not None and hard.is_multilabel:
        best = np.flatnonzero((hard.candidates == hard.best_weights).all(1))[:1]
        by_class.append([[*best, *range(number)]])
    elif hard.by_class is not None:
        pools = [[table] for table in hard.by_class.part_tables]
        for pool, further in zip(pools, hard.by_class.further_tables, strict=False):
            pool += further
        tables = [table for pool in pools for table in pool]
        families.append(range(number, number + len(tables)))
        allowed = np.ones((len(pools), number + len(tables)), bool)
        allowed[:, number:] = np.repeat(np.eye(len(pools), dtype=bool), [*map(len, pools)], 1)
    parts, scenes, counts = [], [], []
    for sample in samples:
        parts.append(sample.part)
        scenes.append(sample.scene)
        counts.append(count_candidates(sample, hard.candidates, tables, hard.num_classes))
    stacked = np.stack(counts)
    if soft is not None:
        first = stacked.shape[1]
        families += [[first + n for n in family] for family in soft.families]
        by_class += [[[first + n for n in group] for group in soft.groups]] if soft.groups else []
        stacked = np.concatenate([stacked, soft.counts], 1)
        if allowed is not None:
            allowed = np.pad(allowed, ((0, 0), (0, soft.counts.shape[1])), constant_values=True)
    search = Search(families, families[0], by_class, allowed)
    part, scene = np.array(parts), number_scenes(scenes)
    return search_gain(stacked, part, hard.metric, search, scene), len(parts)


def count_candidates(
    sample: OofSample, weights: np.ndarray, tables: Sequence[np.ndarray], num_classes: int
) -> np.ndarray:
    """Count a photo's pixels as count_pixels does, under (n, M) weights, then (M, K) tables → (C, 3, K)."""
    if (sample.truth == IGNORED).all():
        return np.zeros((len(weights) + len(tables), 3, num_classes), np.int32)
    votes = count_votes([replace(sample, part=0)], weights.shape[1], num_classes)
    scorer = WeightScorer(votes)
    counts = [scorer.image_counts(scorer.winners(weights))[0]]
    if len(tables):
        search = ClassWeightSearch(votes)
        pixels = search.pixels[0]
        true = search.true_sums(pixels)
        for table in tables:
            sums = search.vote_sums(pixels, vote(search.votes.T, table))
            counts.append(np.concatenate([sums, true[:, None]], 1))
    return np.concatenate(counts).astype(np.int32)


def format_gain(gain: Interval, photos: int, hard: SearchResult, names: Sequence[str]) -> str:
    """Format what the search gains above the best model; what to use is said by format_verdict alone."""
    is_sure = gain.low > 0 or gain.high < 0
    sure = 'a significant difference' if is_sure else 'no significant difference'
    interval = f'{gain.value:+.4f} {hard.metric.label} out of sample [{gain.low:+.4f}, {gain.high:+.4f}]'
    best = names[np.argmax(hard.singles)]
    return f'gain above the best model, {best}: {interval}, {sure} on {photos} photos ({AGAIN})'


def calibrate_model(folder: Path, data: Path, competition: Competition) -> str:
    """Fit a model's temperature on its oof_probs.npy and write it into its folder. Raises BadInput."""
    if competition.is_multilabel:
        advice = 'choose thresholds instead: evaluate.py thresholds'
        raise BadInput(f'{folder}: classes that may overlap have no temperature; {advice} {folder}')
    csvs = fold_files(folder, 'oof.csv') or [folder / 'oof.csv']
    refuse_outdated(csvs)
    members = [member_of(path) for path in csvs]
    samples = read_samples([members], training_photos(data, competition), data, competition, soft=True)
    (calibration,) = calibrate(samples, 1)
    path = write_calibration(folder, calibration, fitted_on(folder, csvs, csvs))
    return f'{folder}: {calibration}; wrote {path}'


@dataclass(frozen=True)
class RecipeEntry:
    """A member as ensemble.yaml lists it, by the path from there; the hash of its oof.csv identifies it."""

    csv: Path
    oof: str
    weights: list[Fraction]  # (K,)
    temperature: float


def write_recipe(path: Path, members: Sequence[Member], recipe: Recipe) -> None:
    """Write ensemble.yaml: thresholds if there are any, and the members, each with the hash of its oof.csv,
    its weight and its temperature.
    """
    entries = []
    for member, weights, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        entry = {'csv': path_from(path.parent, member.path), 'oof': oof_hash(member)}
        same = len(set(weights)) == 1
        entry['weight'] = str(weights[0]) if same else [str(weight) for weight in weights]
        if temperature != 1:
            entry['temperature'] = temperature
        entries.append(entry)
    thresholds = {} if recipe.thresholds is None else {'thresholds': recipe.thresholds}
    content = {'rule': recipe.rule, **thresholds, 'members': entries}
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    print(f'wrote {path}; ensemble.py --recipe {path} applies it again')


def read_recipe(path: Path, members: Sequence[Member], num_classes: int) -> tuple[list[Member], Recipe]:
    """Read a recipe, and put the members into its order, by which ties are broken. Raises BadInput if they
    are not the members of the recipe.
    """
    rule, thresholds, entries = read_entries(path, num_classes)
    chosen = match_entries(path, entries, members)
    for number, entry in enumerate(entries):
        if any(entry.weights) and number not in chosen:
            raise BadInput(f'{path}: its member {entry.csv} is not among the CSVs; give it too')
    numbers = sorted(chosen)
    table, temperatures = [entries[n].weights for n in numbers], [entries[n].temperature for n in numbers]
    return [chosen[n] for n in numbers], Recipe(rule, table, temperatures, thresholds)


def match_entries(path: Path, entries: Sequence[RecipeEntry], members: Sequence[Member]) -> dict[int, Member]:
    """Return the members by the number of their entry: that of their path, or, if their folder was moved,
    the first that is free with the hash of their oof.csv. Raises BadInput.
    """
    numbers = {entry.csv.resolve(): number for number, entry in enumerate(entries)}
    chosen = {numbers[m.path.resolve()]: m for m in members if m.path.resolve() in numbers}
    for member in members:
        if member in chosen.values():
            continue
        oof = oof_hash(member)
        number = next((n for n, e in enumerate(entries) if n not in chosen and e.oof == oof), None)
        if number is None:
            raise BadInput(f'{member.path}: is no member of {path}, which was made with another oof.csv')
        chosen[number] = member
    for number, member in chosen.items():
        if oof_hash(member) != entries[number].oof:
            raise BadInput(f'{member.oof}: has changed since {path} was made; search it again')
    return chosen


def read_entries(path: Path, num_classes: int) -> tuple[Rule, list[float] | None, list[RecipeEntry]]:
    """Read the rule, the thresholds and the members that ensemble.yaml lists. Raises BadInput."""
    content = read_yaml(path)
    try:
        entries = [parse_entry(entry, path.parent, num_classes) for entry in content['members']]
        thresholds = content.get('thresholds')
        thresholds = None if thresholds is None else parse_thresholds(thresholds, num_classes)
        if content['rule'] not in get_args(Rule):
            raise ValueError('unknown rule')
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f'{path}: not a recipe of ensemble.py --search; search it again') from None
    return content['rule'], thresholds, entries


def parse_entry(entry: Any, folder: Path, num_classes: int) -> RecipeEntry:
    """Parse one member of the ensemble.yaml in a folder. Raises KeyError, TypeError or ValueError."""
    weights = entry['weight']
    texts = [str(text) for text in (weights if isinstance(weights, list) else [weights] * num_classes)]
    temperature = float(entry.get('temperature', 1))
    if len(texts) != num_classes or not all(WEIGHT.fullmatch(text) for text in texts):
        raise ValueError('not the weights of all classes')
    if not RANGE[0] <= temperature <= RANGE[1]:
        raise ValueError('not a temperature')
    csv = find_path(folder, str(entry['csv']))
    return RecipeEntry(csv, str(entry['oof']), list(map(Fraction, texts)), temperature)


@dataclass(frozen=True)
class EnsembleScore:
    """An ensemble and its models on the photos out of fold: pixel counts, and what the ensemble changed."""

    metric: Metric
    rule: Rule
    names: list[str]
    weights: list[list[Fraction]]  # (M, K)
    counts: np.ndarray  # (M + 1, n, 3, K) metrics.image_counts of the models, then of the ensemble
    changed: np.ndarray  # (M, 2, K) pixels by true class that only the ensemble, or only the model, has right

    @property
    def best(self) -> int:
        """Return the number of the model with the highest score."""
        return int(best_of(np.array([self.metric.score(counts) for counts in self.counts[:-1]])))

    def gain(self) -> Interval:
        """Compare the ensemble's score with the best model's."""
        return self.metric.paired_interval(self.counts[-1], self.counts[self.best])

    def lines(self) -> list[list[str]]:
        """Tabulate the weight, score and interval of each model and of the ensemble."""
        weights = [*(format_weights(row) for row in self.weights), '']
        rows = [['', 'weight', self.metric.label, f'{LEVEL:.0%} of {DRAWS:,} draws']]
        for name, weight, counts in zip([*self.names, self.rule], weights, self.counts, strict=True):
            score = self.metric.interval(counts)
            rows.append([name, weight, f'{score.value:.4f}', f'{score.low:.4f} to {score.high:.4f}'])
        return rows

    def class_lines(self, classes: tuple[str, ...]) -> list[list[str]]:
        """Tabulate by class the scores of the best model and of the ensemble, and the pixels that changed."""
        model, ensemble = (self.metric.by_class(self.counts[m]) for m in (self.best, -1))
        mended, broken = self.changed[self.best]
        rows = [['class', self.names[self.best], self.rule, 'gain', 'pixels mended', 'pixels broken']]
        for k, name in enumerate(classes):
            gain = ensemble[k] - model[k]
            if not np.isnan(gain):
                scores = [f'{model[k]:.4f}', f'{ensemble[k]:.4f}', f'{gain:+.4f}']
                rows.append([name, *scores, f'{mended[k]:,}', f'{broken[k]:,}'])
        return rows


def read_ensemble(path: Path, num_classes: int) -> tuple[list[Member], Recipe]:
    """Read the members that ensemble.yaml lists, and the recipe. Raises BadInput if a member has changed."""
    members = [member_of(entry.csv) for entry in read_entries(path, num_classes)[2]]
    check_members(members, with_oof=True)
    return read_recipe(path, members, num_classes)


def score_ensemble(path: Path, data: Path, competition: Competition) -> EnsembleScore:
    """Apply a recipe to every photo out of fold and score it. Raises BadInput."""
    num_classes = len(competition.classes)
    members, recipe = read_ensemble(path, num_classes)
    models = by_model(members)
    weights, temperatures = merge_members(recipe, members, num_classes)
    table = weight_table(weights)
    soft = recipe.rule == 'soft vote'
    counts, changed = [], []
    photos = training_photos(data, competition)
    for sample in read_samples(list(models.values()), photos, data, competition, soft):
        if soft:
            winner = soft_vote(sample.probs, table, temperatures, recipe.thresholds)
        else:
            winner = vote_masks(sample.preds, table)
        counts.append([count_pixels(sample.truth, pred, num_classes) for pred in (*sample.preds, winner)])
        changed.append([count_changes(sample.truth, pred, winner, num_classes) for pred in sample.preds])
    names = [folder.name for folder in models]
    by_model_counts = np.stack(counts, axis=1)
    metric, total = metric_of(competition), np.sum(changed, axis=0)
    return EnsembleScore(metric, recipe.rule, names, weights, by_model_counts, total)


def merge_members(
    recipe: Recipe, members: Sequence[Member], num_classes: int
) -> tuple[list[list[Fraction]], list[float]]:
    """Turn a recipe by member back into (M, K) weights and temperatures by model; undo share_weights."""
    weights = {member.folder: [Fraction(0)] * num_classes for member in members}
    temperatures = {}
    for member, row, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        weights[member.folder] = [a + b for a, b in zip(weights[member.folder], row, strict=True)]
        temperatures[member.folder] = temperature
    return list(weights.values()), list(temperatures.values())


def count_changes(truth: np.ndarray, pred: np.ndarray, winner: np.ndarray, num_classes: int) -> np.ndarray:
    """Count by true class, or by plane, the pixels that only `winner`, then `pred` has right → (2, K)."""
    labelled = truth != IGNORED
    model_right, ensemble_right = pred == truth, winner == truth
    changes = (ensemble_right & ~model_right, model_right & ~ensemble_right)
    if truth.ndim == 3:
        return np.stack([np.count_nonzero(labelled & change, axis=(1, 2)) for change in changes])
    return np.stack([np.bincount(truth[labelled & change], minlength=num_classes) for change in changes])


def format_weights(weights: list[Fraction]) -> str:
    """Format the weights of a member: one number, or their range over the classes."""
    low, high = float(min(weights)), float(max(weights))
    return f'{low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'
