"""The search for weights of a hard vote, exact: pixels are counted once, candidates are arithmetic.

    counts = count_votes(samples, num_models, num_classes)
    result = search_weights(counts)

A choice is judged on photos that it was not made on: parts of them, folds as a rule, left out in turn.

Shapes: M models, K classes, U distinct votes with their truth, V distinct votes, G groupings of models by who
agrees with whom, n candidates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import gcd, lcm

import numpy as np

from metrics import IGNORED, iou_of_counts, mean_of_iou
from utils.errors import BadInput
from voting.members import OofSample

TOP_WEIGHT = 3  # the whole weights 0 to 3 of each model are tried
GRID_MODELS = 8  # up to here all combinations of them; beyond, one model's weight after another
CLASS_HALVES = (0, 1, 2, 3, 4)  # a model's weight for one class, in halves of its weight
PORTION = 1 << 20  # codes that wait before they are added up


@dataclass(frozen=True)
class VoteCounts:
    """The joint histogram of truth and votes: how many pixels of a part have this truth and these votes."""

    part: np.ndarray  # (U,)
    truth: np.ndarray  # (U,)
    votes: np.ndarray  # (U, M)
    pixels: np.ndarray  # (U,) int64
    num_classes: int


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


def member_table(weights: Sequence[int], num_classes: int) -> np.ndarray:
    """(M, K) weights of (M,) members, the same for every class."""
    return np.tile(np.array(weights)[:, None], num_classes)


def count_votes(samples: Iterable[OofSample], num_models: int, num_classes: int) -> VoteCounts:
    """The histogram of samples; pixels of truth IGNORED are left out. Raises BadInput for too many models."""
    if 2**10 * num_classes ** (num_models + 1) >= 2**63:  # 1024 parts
        raise BadInput(f'--search: found {num_models} models, too many to count with {num_classes} classes')
    codes, counts, pending = np.zeros(0, np.int64), np.zeros(0, np.int64), []
    for sample in samples:
        columns = np.concatenate([sample.truth[None], sample.preds]).reshape(num_models + 1, -1)
        columns = columns[:, columns[0] != IGNORED]
        changes = (columns[:, 1:] != columns[:, :-1]).any(0)
        starts = np.flatnonzero(np.concatenate([[columns.shape[1] > 0], changes]))
        code = np.full(len(starts), sample.part, np.int64)
        for column in columns:
            code = code * num_classes + column[starts]
        pending.append((code, np.diff(starts, append=columns.shape[1])))
        if sum(len(code) for code, _ in pending) > PORTION:
            codes, counts = _add_up([(codes, counts), *pending])
            pending = []
    codes, counts = _add_up([(codes, counts), *pending])
    votes = np.empty((len(codes), num_models), np.uint8)
    for model in reversed(range(num_models)):
        codes, votes[:, model] = np.divmod(codes, num_classes)
    part, truth = np.divmod(codes, num_classes)
    return VoteCounts(part, truth, votes, counts, num_classes)


def _add_up(counted: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    codes, place = np.unique(np.concatenate([codes for codes, _ in counted]), return_inverse=True)
    return codes, np.bincount(place, np.concatenate([n for _, n in counted]), len(codes)).astype(np.int64)


class Scorer:
    """mIoU of any weights of the models, exact, without another look at the pixels.

    Which model's vote wins a pixel depends only on who agrees with whom there; 5 models have 52 such
    groupings. For each grouping and model, `table` counts how often which class is voted, and right; a score
    is the sum of G of its rows.
    """

    def __init__(self, counts: VoteCounts) -> None:
        votes, num_classes = counts.votes, counts.num_classes
        self.num_models = votes.shape[1]
        self.num_parts = int(counts.part.max(initial=-1)) + 1
        models = range(self.num_models)
        first = np.stack([(votes[:, : m + 1] == votes[:, m, None]).argmax(1) for m in models], 1)
        code = np.zeros(len(votes), np.int64)
        for m in models:
            code = code * (m + 1) + first[:, m]
        _, example, grouping = np.unique(code, return_index=True, return_inverse=True)
        first = first[example]  # (G, M): the first model that votes the same
        self.same = (first[:, :, None] == first[:, None, :]).astype(np.float64)
        # a row for each grouping and model; columns: K counts of pixels that are right, K of those voted for
        shape = (self.num_parts, len(first), self.num_models, 2, num_classes)
        table = np.zeros(np.prod(shape))
        for m in models:
            row = (counts.part * len(first) + grouping) * self.num_models + m
            right = votes[:, m] == counts.truth
            table += np.bincount((row * 2) * num_classes + votes[:, m], counts.pixels * right, table.size)
            table += np.bincount((row * 2 + 1) * num_classes + votes[:, m], counts.pixels, table.size)
        self.table = table.reshape(self.num_parts, -1, 2 * num_classes)
        self.true = np.zeros((self.num_parts, num_classes))
        np.add.at(self.true, (counts.part, counts.truth), counts.pixels)

    def winners(self, weights: np.ndarray) -> np.ndarray:
        """(n, M) whole weights → (n, G): the model whose vote wins where models agree so."""
        groups, models = self.same.shape[:2]
        total = (weights @ self.same.reshape(-1, models).T).reshape(-1, groups, models)
        total *= (weights > 0)[:, None]  # as in vote: no vote, no say in a tie
        return total.argmax(2)

    def tallies(self, weights: np.ndarray) -> np.ndarray:
        """(n, M) whole weights → (parts, n, 2K): pixels that are right, then those predicted, by class."""
        return self.sums(self.winners(weights))

    def sums(self, winners: np.ndarray) -> np.ndarray:
        """The tallies of (n, G) winners."""
        groups, models = self.same.shape[:2]
        won = np.zeros((len(winners), groups * models))
        np.put_along_axis(won, winners + np.arange(groups) * models, 1.0, 1)
        return won @ self.table

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """(n, M) whole weights → (n, 1 + parts) mIoU: of all parts together, then of all without each one."""
        size = max(1, (1 << 21) // self.same[..., 0].size)
        known: dict[bytes, np.ndarray] = {}  # scores by winners: most candidates let the same models win
        scores = np.empty((len(weights), 1 + self.num_parts))
        for start in range(0, len(weights), size):
            winners = self.winners(weights[start : start + size]).astype(np.min_scalar_type(self.num_models))
            keys = winners.view(f'S{winners[0].nbytes}').ravel()
            _, first, place = np.unique(keys, return_index=True, return_inverse=True)
            rows = {winners[row].tobytes(): row for row in first}
            if new := [key for key in rows if key not in known]:
                own = self.scores_of(winners[[rows[key] for key in new]].astype(np.int64))
                known |= dict(zip(new, own, strict=True))
            scores[start : start + size] = np.stack([known[key] for key in rows])[place]
        return scores

    def scores_of(self, winners: np.ndarray) -> np.ndarray:
        """(n, G) winners → (n, 1 + parts), as `scores`."""
        tallies, true = self.sums(winners), self.true.sum(0)
        total = tallies.sum(0)
        others = [self.miou(total - part, true - own) for part, own in zip(tallies, self.true, strict=True)]
        return np.stack([self.miou(total, true), *others], 1)

    @staticmethod
    def miou(tallies: np.ndarray, true: np.ndarray) -> np.ndarray:
        """(n, 2K) and (K,) → (n,)."""
        hits, predicted = np.split(tallies, 2, axis=1)
        return mean_of_iou(iou_of_counts(hits, predicted, true))


class Patterns:
    """mIoU of weights by class as well, for which who agrees with whom does not decide: the distinct votes,
    with the pixels of each true class under them.
    """

    def __init__(self, counts: VoteCounts) -> None:
        self.votes, row = np.unique(counts.votes, axis=0, return_inverse=True)  # (V, M)
        self.num_parts = int(counts.part.max(initial=-1)) + 1
        pixels = np.zeros((self.num_parts, len(self.votes), counts.num_classes), np.int64)
        np.add.at(pixels, (counts.part, row.ravel(), counts.truth), counts.pixels)
        self.pixels = pixels
        contested = (self.votes != self.votes[:, :1]).any(1)
        classes = range(counts.num_classes)
        models = range(self.votes.shape[1])
        self.where = [[np.flatnonzero(contested & (self.votes[:, m] == k)) for k in classes] for m in models]

    def tallies(self, pixels: np.ndarray, winner: np.ndarray) -> np.ndarray:
        """(2, K): pixels that are right, and those predicted, where (v, K) pixels go to the (v,) winners."""
        sums = np.zeros((2, pixels.shape[1]), np.int64)
        np.add.at(sums[0], winner, pixels[np.arange(len(winner)), winner])
        np.add.at(sums[1], winner, pixels.sum(1))
        return sums

    def climb(self, weights: np.ndarray, left_out: int | None) -> np.ndarray:
        """(M, K) whole weights: from (M,) member weights on, or from equal ones where that ends higher, one
        model's weight for one class after another is changed, to one of CLASS_HALVES, while that raises the
        mIoU of all parts but the one left out.
        """
        starts = (weights, np.ones_like(weights))
        return max((self._climb(start, left_out) for start in starts), key=lambda found: found[0])[1]

    def _climb(self, weights: np.ndarray, left_out: int | None) -> tuple[float, np.ndarray]:
        """The mIoU reached, and the table."""
        used = [part for part in range(self.num_parts) if part != left_out]
        pixels = self.pixels[used].sum(0)
        true = pixels.sum(0)
        table = member_table(weights * 2, true.size)
        winner = vote(self.votes.T, table)
        sums = self.tallies(pixels, winner)
        best = float(mean_of_iou(iou_of_counts(*sums, true)))
        while True:
            before = best
            for model, category in product(np.flatnonzero(weights), range(true.size)):
                places = self.where[model][category]
                for halves in CLASS_HALVES if len(places) else ():
                    trial = table.copy()
                    trial[model, category] = weights[model] * halves
                    won = vote(self.votes[places].T, trial)
                    changed = won != winner[places]
                    moved = places[changed]
                    other = sums + self.tallies(pixels[moved], won[changed])
                    other -= self.tallies(pixels[moved], winner[moved])
                    score = float(mean_of_iou(iou_of_counts(*other, true)))
                    if score > best:
                        best, table, sums = score, trial, other
                        winner[places] = won
            if best == before:
                return best, table

    def part_tallies(self, table: np.ndarray, part: int) -> np.ndarray:
        return self.tallies(self.pixels[part], vote(self.votes.T, table))


@dataclass(frozen=True)
class SearchResult:
    """What the search found. Scores are mIoU; out of sample is with weights chosen on the other parts."""

    singles: tuple[float, ...]  # each model alone
    equal: float  # all with weight 1: nothing was chosen, so it is out of sample
    best_weights: tuple[int, ...]
    best: float  # in sample: too good
    best_out_of_sample: float
    single_out_of_sample: float  # of the best single model, chosen in the same way
    weights: tuple[int, ...]  # the ones to use, where those by class are not better still
    part_weights: tuple[tuple[int, ...], ...]  # of each part, the best chosen without it
    part_singles: tuple[tuple[int, ...], ...]  # of each part, the best single model chosen without it
    by_class: 'ClassResult | None' = None  # where weights by class were searched

    @property
    def num_parts(self) -> int:
        return len(self.part_weights)

    @property
    def without_classes(self) -> float:
        """Out of sample, of `weights`."""
        return max(self.single_out_of_sample, self.equal, self.best_out_of_sample)

    @property
    def uses_classes(self) -> bool:
        return self.by_class is not None and self.by_class.out_of_sample > self.without_classes

    @property
    def out_of_sample(self) -> float:
        """Of what is to be used."""
        return self.by_class.out_of_sample if self.uses_classes else self.without_classes

    def table(self, num_classes: int) -> np.ndarray:
        """(M, K) weights to use."""
        return self.by_class.table if self.uses_classes else member_table(self.weights, num_classes)

    def part_table(self, part: int, num_classes: int) -> np.ndarray:
        """(M, K) weights of a part's vote, chosen without it: by class where those are to be used."""
        if self.uses_classes:
            return self.by_class.part_tables[part]
        return member_table(self.part_weights[part], num_classes)


@dataclass(frozen=True)
class ClassResult:
    """What the search for weights by class found."""

    table: np.ndarray  # (M, K)
    out_of_sample: float
    part_tables: tuple[np.ndarray, ...]  # of each part, chosen without it


def search_weights(counts: VoteCounts, by_class: bool = False) -> SearchResult:
    """The weights with the highest mIoU, and whether to use them. Raises BadInput for fewer than 2 parts.

    They are used only if weights chosen on all parts but one are better, on that one, than the best single
    model chosen in that way, and than equal weights; with by_class, weights by class are searched too, and
    used only if they are better still.
    """
    scorer = Scorer(counts)
    if scorer.num_parts < 2:
        raise BadInput('--search: found fewer than 2 photos out of fold')
    singles = np.eye(scorer.num_models, dtype=np.int64)
    equal = np.ones((1, scorer.num_models), np.int64)
    small = scorer.num_models <= GRID_MODELS
    candidates = weight_grid(scorer.num_models) if small else np.concatenate([singles, equal])
    scores, single_scores = scorer.scores(candidates), scorer.scores(singles)

    def choose(column: int) -> np.ndarray:
        chosen = candidates[scores[:, column].argmax()]
        return chosen if small else climb(scorer, chosen, column)

    def out_of_sample(chosen: Sequence[np.ndarray]) -> float:
        tallies = sum(scorer.tallies(weights[None])[part] for part, weights in enumerate(chosen))
        return float(scorer.miou(tallies, scorer.true.sum(0))[0])

    best = choose(0)
    parts = range(1, scorer.num_parts + 1)
    part_weights = [choose(part) for part in parts]
    part_singles = [singles[single_scores[:, part].argmax()] for part in parts]
    best_out, single_out = out_of_sample(part_weights), out_of_sample(part_singles)
    equal_score = float(scorer.scores(equal)[0, 0])
    options = [(single_out, singles[single_scores[:, 0].argmax()]), (equal_score, equal[0]), (best_out, best)]
    _, weights = max(options, key=lambda option: option[0])  # the simplest of equally good ones
    return SearchResult(
        singles=tuple(single_scores[:, 0].tolist()),
        equal=equal_score,
        best_weights=tuple(best.tolist()),
        best=float(scorer.scores(best[None])[0, 0]),
        best_out_of_sample=best_out,
        single_out_of_sample=single_out,
        weights=tuple(weights.tolist()),
        part_weights=tuple(tuple(chosen.tolist()) for chosen in part_weights),
        part_singles=tuple(tuple(chosen.tolist()) for chosen in part_singles),
        by_class=search_classes(counts, best, part_weights) if by_class else None,
    )


def search_classes(counts: VoteCounts, best: np.ndarray, part_weights: Sequence[np.ndarray]) -> ClassResult:
    """Weights by class, from the best member weights on, and from those of each part for it."""
    patterns = Patterns(counts)
    tables = tuple(patterns.climb(weights, part) for part, weights in enumerate(part_weights))
    sums = sum(patterns.part_tallies(table, part) for part, table in enumerate(tables))
    out_of_sample = float(mean_of_iou(iou_of_counts(*sums, patterns.pixels.sum((0, 1)))))
    return ClassResult(patterns.climb(best, None), out_of_sample, tables)


def weight_grid(num_models: int, top: int = TOP_WEIGHT) -> np.ndarray:
    """(n, M) all whole weights that differ in proportion; those of fewer models, and smaller, come first."""
    grid = np.array(list(product(range(top + 1), repeat=num_models)))
    grid = grid[np.gcd.reduce(grid, axis=1) == 1]
    return grid[np.lexsort((grid.sum(1), np.count_nonzero(grid, axis=1)))]


def climb(scorer: Scorer, weights: np.ndarray, column: int) -> np.ndarray:
    """Changes one model's weight after another while that raises the score, a column of `Scorer.scores`."""
    best = scorer.scores(weights[None])[0, column]
    while True:
        before = best
        for model in range(len(weights)):
            trials = np.tile(weights, (TOP_WEIGHT + 1, 1))
            trials[:, model] = range(TOP_WEIGHT + 1)
            trials = trials[trials.any(1)]
            scores = scorer.scores(trials)[:, column]
            if scores.max() > best:
                best, weights = scores.max(), trials[scores.argmax()]
        if best == before:
            return weights


def format_search(result: SearchResult, names: Sequence[str]) -> str:
    """The scores, and in a plain sentence what to do."""
    width = max(map(len, names))
    lines = ['mIoU out of fold:']
    lines += [f'  {name:<{width}}  {score:.4f}' for name, score in zip(names, result.singles, strict=True)]
    lines.append(f'  equal weights  {result.equal:.4f}')
    shown = ' '.join(map(str, result.best_weights))
    lines.append(f'  weights {shown}  {result.best:.4f} in sample: chosen on the photos that it is scored on')
    lines.append(f'out of sample, chosen without each of {result.num_parts} parts of the photos in turn:')
    lines.append(f'  the best weights  {result.best_out_of_sample:.4f}')
    lines.append(f'  the best model    {result.single_out_of_sample:.4f}')
    if result.by_class is not None:
        lines.append(f'  weights by class  {result.by_class.out_of_sample:.4f}')
    if result.uses_classes:
        lines.append('use the vote with weights by class')
    elif np.count_nonzero(result.weights) == 1:
        model = names[np.argmax(result.weights)]
        lines.append(f'do not ensemble: use model {model}; no vote is better out of sample')
    else:
        lines.append(f'use the vote with weights {" ".join(map(str, result.weights))}')
    return '\n'.join(lines)


def weight_table(exact: Sequence[Sequence[Fraction]]) -> np.ndarray:
    """(M, K) whole numbers in proportion to weights by member and class, so that sums of them are exact.

    Raises BadInput where all are 0, or where sums would not fit 63 bits.
    """
    scale = lcm(*(value.denominator for row in exact for value in row))
    whole = [[int(value * scale) for value in row] for row in exact]
    common = gcd(*(value for row in whole for value in row))
    if common == 0:
        raise BadInput('--weights: all of them are 0; expected one above 0')
    highest = sum(max(row) for row in whole) // common
    if highest >= 2**63:
        raise BadInput('--weights: too many digits to be added up exactly; give them fewer')
    return np.array([[value // common for value in row] for row in whole], np.min_scalar_type(highest))
