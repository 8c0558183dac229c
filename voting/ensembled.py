"""What an ensemble did: the recipe in ensemble.yaml on the photos out of fold, beside the models it is of.

    found = score_ensemble(Path('output/ensemble.yaml'), data, classes)

Its weights were chosen on these photos, so that its score is a little hopeful; ensemble.py --search prints
what it is out of sample.

Shapes: M models, n photos, K classes.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from config import BadInput, read_yaml
from ensemble import weight_table
from intervals import DRAWS, LEVEL, Interval, interval, paired_interval
from metrics import IGNORED, confusion_matrix, image_counts, iou_of_counts, miou_of_counts
from voting.hard import vote
from voting.members import Member, by_model, member_of, read_samples
from voting.recipe import Recipe, read_recipe, training_photos
from voting.soft import mean_probs


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
