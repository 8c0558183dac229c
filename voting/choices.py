"""Choose among candidates by their counts, and judge the choice on photos that it was not made on.

    best, chosen = cross_fit(counts, part, metric)
    gain = search_gain(counts, part, metric, Search([range(C)], baseline=[0]))    # above candidate 0

Shapes: n units (photos, or parts of them), P parts, C candidates, F families of them, K classes, B draws.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from metrics import DRAWS, LEVEL, Interval, Metric, draw_times, smoothed_interval
from utils.errors import BadInput

# said of a printed gain
AGAIN = (
    f'the mean of {DRAWS:,} draws of the photos, each of which chooses again, not the difference of the '
    f'scores above; {LEVEL:.0%} bootstrap interval'
)
MAX_CANDIDATES = 128  # among which a draw chooses; of more, those that score highest are taken
BLOCK = 1 << 21  # numbers that are held at a time


def cross_fit(counts: np.ndarray, part: np.ndarray, metric: Metric) -> tuple[int, np.ndarray]:
    """Choose among C candidates by their (n, C, 3, K) counts, and for each part on the other parts alone.

    Returns the best candidate on all parts, and the (parts,) best ones without each part; the first of equal
    ones. `part` (n,) is the part of each unit, from 0. Raises BadInput for a single part.
    """
    require_parts(part)
    best, *chosen = best_of(metric.score(counts, left_out(part)))
    return int(best), np.array(chosen)


def require_parts(part: np.ndarray, where: str = '') -> None:
    """Raise BadInput unless there are two parts, so that a choice can be made on some for others."""
    if len(part) == 0 or part.max() < 1:
        fault = f'{where}found fewer than 2 photos out of fold'
        raise BadInput(f'{fault}; expected 2 or more, to choose on some for others')


def left_out(part: np.ndarray) -> np.ndarray:
    """Return how often each unit counts: each once, then without each part in turn → (1 + parts, n)."""
    numbers = np.arange(-1, part.max() + 1)  # no unit is in part -1
    return (part != numbers[:, None]).astype(np.float64)


def best_of(scores: np.ndarray) -> np.ndarray:
    """Return the first of the highest scores, (..., C) → (...); nan, the score of nothing, is below all."""
    return np.where(np.isnan(scores), -1, scores).argmax(-1)


def split_evenly(number: int, parts: int) -> np.ndarray:
    """Assign each of so many photos one of at most `parts` parts, in their order → (number,)."""
    return np.unique(np.arange(number) * parts // max(1, number), return_inverse=True)[1]


# --- the gain of a search, and its interval ---------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """How a search chooses, so that it can be done again: for each part on the other parts alone, first the
    best candidate of each family, then the family whose choices score best out of sample.

    The baseline is the best of its candidates, chosen in the same way. Classes that may overlap can choose by
    themselves: a family `by_class` has groups of candidates; each class takes the best of a group, or, if it
    is nowhere, the first; then the group with the highest score is taken.
    """

    families: Sequence[Sequence[int]]  # of candidates; of equal ones the first
    baseline: Sequence[int]
    by_class: Sequence[Sequence[Sequence[int]]] = ()  # further families
    allowed: np.ndarray | None = None  # (P, C) whether a candidate was made without the part; None: all were

    def choose(self, parts: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Choose by the (B, P, C, 3, K) summands of each part; return what is chosen and the baseline,
        (B, P, 3, K) each.
        """
        others = without_each(parts)
        class_scores = metric.class_scores(others)  # (B, P, C, K)
        scores = metric.mean(class_scores)
        if self.allowed is not None:
            scores = np.where(self.allowed, scores, np.nan)
        *options, baseline = (take_best(parts, scores, family) for family in (*self.families, self.baseline))
        present = others[:, :, :1, 2] > 0  # (B, P, 1, K): the true pixels are the same for all candidates
        for groups in self.by_class:
            sums, sum_scores = [], []
            for group in groups:
                group_scores = np.where(present, class_scores[:, :, group], np.nan)
                best = best_of(np.moveaxis(group_scores, 2, -1))[:, :, None]  # (B, P, 1, K)
                sums.append(np.take_along_axis(parts[:, :, group], best[:, :, :, None], 2)[:, :, 0])
                sum_scores.append(metric.mean(np.take_along_axis(group_scores, best, 2)[:, :, 0]))
            options.append(take_best(np.stack(sums, 2), np.stack(sum_scores, 2)))
        if len(options) == 1:
            return options[0], baseline
        stacked = np.stack(options, 2)  # (B, P, F, 3, K)
        return take_best(stacked, metric.mean(metric.class_scores(without_each(stacked)))), baseline


def without_each(parts: np.ndarray) -> np.ndarray:
    """Add up all parts but each one, (B, P, ...) → (B, P, ...)."""
    return parts.sum(1, keepdims=True) - parts  # exact, so that equal choices stay equal


def take_best(parts: np.ndarray, scores: np.ndarray, numbers: Sequence[int] | None = None) -> np.ndarray:
    """Take the candidate of each part with the best of (B, P, C) scores: (B, P, C, 3, K) → (B, P, 3, K);
    with `numbers`, one of these.
    """
    numbers = np.arange(scores.shape[2]) if numbers is None else np.asarray(numbers)
    best = numbers[best_of(scores[:, :, numbers])]
    return np.take_along_axis(parts, best[:, :, None, None, None], 2)[:, :, 0]


def search_gain(
    counts: np.ndarray, part: np.ndarray, metric: Metric, search: Search, scene: np.ndarray | None = None
) -> Interval:
    """Compute how much a search gains above its baseline on photos that it did not choose on.

    The truth that the interval holds in 95 % of all sets is the gain, over all photos there are, of the
    choice made on these above the baseline chosen on these. Each draw of the photos makes all choices again,
    and scores each part with those made without it; value and interval are the smoothed_interval's. Draws
    that kept the choices would leave out how much these vary, and give intervals that are too short.

    counts: (n, C, 3, K) of each photo and candidate; part: (n,) from 0; scene: (n,) of number_scenes, which
    are drawn whole; None: each photo is a scene. Raises BadInput for a single part.
    """
    return draws_gain(search_draws(counts, part, metric, search, scene), part, metric, scene)


def draws_gain(draws: np.ndarray, part: np.ndarray, metric: Metric, scene: np.ndarray | None) -> Interval:
    """Compute the gain and its interval from the (B, 2, K) scores of search_draws."""
    scores = metric.mean(draws)
    return smoothed_interval(scores[:, 0] - scores[:, 1], scene_times(part, scene))


def number_scenes(labels: Sequence[Hashable]) -> np.ndarray:
    """Number the scenes of photos by their labels → (n,) from 0; a photo with the label None is a scene."""
    numbers: dict[Hashable, int] = {}
    keys = [(photo, None) if label is None else (label,) for photo, label in enumerate(labels)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def scene_times(part: np.ndarray, scene: np.ndarray | None) -> np.ndarray:
    """Draw how often each scene counts in each draw → (B, scenes)."""
    return draw_times(len(part) if scene is None else int(scene.max()) + 1)


def search_draws(
    counts: np.ndarray, part: np.ndarray, metric: Metric, search: Search, scene: np.ndarray | None = None
) -> np.ndarray:
    """Search in each draw, and score each class of the choice and of the baseline → (B, 2, K).

    Arguments as in search_gain.
    """
    require_parts(part)
    counts, search = leave_hopeless(counts, part, metric, search)
    times = scene_times(part, scene)  # (B, scenes)
    times = times if scene is None else times[:, scene]  # (B, n)
    summands = [metric.summands(counts[part == number]) for number in range(part.max() + 1)]
    # scores of images in multiples of 2^-30, whose sums are exact as those of pixels are
    flat = [np.rint(sums.reshape(len(sums), -1) * 2.0**30) / 2.0**30 for sums in summands]
    step = max(1, BLOCK // (len(flat) * flat[0].shape[1]))
    scores = []
    for start in range(0, len(times), step):
        drawn = times[start : start + step]
        parts = np.stack([drawn[:, part == number] @ sums for number, sums in enumerate(flat)], 1)
        chosen = search.choose(parts.reshape(*parts.shape[:2], *counts.shape[1:]), metric)
        scores.append(metric.class_scores(np.stack(chosen, 1).sum(2)))
    return np.concatenate(scores)


def leave_hopeless(
    counts: np.ndarray, part: np.ndarray, metric: Metric, search: Search
) -> tuple[np.ndarray, Search]:
    """Leave out all but the MAX_CANDIDATES of each family that score highest on all photos."""
    if counts.shape[1] <= MAX_CANDIDATES or search.by_class or search.allowed is not None:
        return counts, search
    scores = np.nan_to_num(metric.score(counts), nan=-1)
    groups = [np.asarray(group) for group in (*search.families, search.baseline)]
    groups = [group[np.sort(np.argsort(-scores[group], kind='stable')[:MAX_CANDIDATES])] for group in groups]
    kept = np.unique(np.concatenate(groups))
    *families, baseline = (np.searchsorted(kept, group) for group in groups)
    return counts[:, kept], Search(families, baseline)
