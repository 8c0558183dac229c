"""Vote over class ids, and search the weights of the vote exactly.

    result = search_weights(count_votes(samples, num_models, num_classes))

The pixels are counted once; after that any number of candidates is scored by arithmetic. A choice is scored
on photos that it was not made on: each part of the photos, usually a fold, is left out in turn.

Shapes: M models, K classes, U distinct votes with their truth, V distinct votes, G groupings (the ways in
which models can agree with each other), n candidates.
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
MAX_GRID_MODELS = 8  # up to here all combinations are tried; beyond, the weights are changed one by one
CLASS_HALVES = (0, 1, 2, 3, 4)  # weights of a model for one class that are tried, in halves of its weight
MAX_PENDING = 1 << 20  # codes that are collected before they are merged into the histogram


# --- the vote ---------------------------------------------------------------------------------------------


def vote(preds: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Find the ids with the highest sum of weights, (M, ...) uint8 → (...); table[m, k] is the weight of a
    vote of member m for class k. A tie goes to the tied class of the earliest member. A vote of weight 0 does
    not count, not even in a tie; if all votes have weight 0, the first member's class wins.
    """
    weights = [row[pred] for row, pred in zip(table, preds, strict=True)]
    winner = preds[0].copy()
    best = np.zeros(winner.shape, table.dtype)
    for pred, weight in zip(preds, weights, strict=True):
        total = np.zeros(winner.shape, table.dtype)
        for other_pred, other_weight in zip(preds, weights, strict=True):
            total += other_weight * (other_pred == pred)
        total *= weight > 0
        np.copyto(winner, pred, where=total > best)
        np.maximum(best, total, out=best)
    return winner


def member_table(weights: Sequence[int], num_classes: int) -> np.ndarray:
    """Repeat (M,) weights for every class → (M, K)."""
    return np.tile(np.array(weights)[:, None], num_classes)


def weight_table(exact: Sequence[Sequence[Fraction]]) -> np.ndarray:
    """Scale (M, K) weights to whole numbers, which add exactly. Raises BadInput if all are 0 or too long."""
    scale = lcm(*(weight.denominator for row in exact for weight in row))
    whole = [[int(weight * scale) for weight in row] for row in exact]
    common = gcd(*(weight for row in whole for weight in row))
    if common == 0:
        raise BadInput('--weights: all of them are 0; expected one above 0')
    highest = sum(max(row) for row in whole) // common
    if highest >= 2**63:
        raise BadInput('--weights: too many digits to be added up exactly; give them fewer')
    return np.array([[weight // common for weight in row] for row in whole], np.min_scalar_type(highest))


# --- counting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VoteCounts:
    """The joint histogram of truth and votes: how many pixels of a part have this truth and these votes."""

    part: np.ndarray  # (U,)
    truth: np.ndarray  # (U,)
    votes: np.ndarray  # (U, M)
    pixels: np.ndarray  # (U,) int64
    num_classes: int


def count_votes(samples: Iterable[OofSample], num_models: int, num_classes: int) -> VoteCounts:
    """Count the votes where the truth is not IGNORED. Raises BadInput for too many models, or no pixels."""
    if 2**10 * num_classes ** (num_models + 1) >= 2**63:  # 1024 parts
        raise BadInput(
            f'--search: found {num_models} models, too many to count with {num_classes} classes; '
            'give the CSVs of fewer models'
        )
    codes, pixels, pending = np.zeros(0, np.int64), np.zeros(0, np.int64), []
    for sample in samples:
        columns = np.concatenate([sample.truth[None], sample.preds]).reshape(num_models + 1, -1)
        columns = columns[:, columns[0] != IGNORED]
        changes = (columns[:, 1:] != columns[:, :-1]).any(0)
        starts = np.flatnonzero(np.concatenate([[columns.shape[1] > 0], changes]))  # of runs of equal pixels
        code = np.full(len(starts), sample.part, np.int64)
        for column in columns:
            code = code * num_classes + column[starts]
        pending.append((code, np.diff(starts, append=columns.shape[1])))
        if sum(len(code) for code, _ in pending) > MAX_PENDING:
            codes, pixels = merge_counts([(codes, pixels), *pending])
            pending = []
    codes, pixels = merge_counts([(codes, pixels), *pending])
    if not len(codes):
        raise BadInput('--search: all pixels of the photos out of fold are ignored: nothing can be scored')
    votes = np.empty((len(codes), num_models), np.uint8)
    for model in reversed(range(num_models)):
        codes, votes[:, model] = np.divmod(codes, num_classes)
    part, truth = np.divmod(codes, num_classes)
    return VoteCounts(part, truth, votes, pixels, num_classes)


def merge_counts(counts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge pairs of codes and their pixels; return each code once, in ascending order, with its total."""
    codes, inverse = np.unique(np.concatenate([codes for codes, _ in counts]), return_inverse=True)
    pixels = np.concatenate([pixels for _, pixels in counts])
    return codes, np.bincount(inverse, pixels, len(codes)).astype(np.int64)


# --- weights by model -------------------------------------------------------------------------------------


class WeightScorer:
    """The mIoU of any weights by model, exact, without looking at the pixels again.

    The winner of a pixel depends only on which models agree there; 5 models have 52 such groupings. `table`
    has the correct and predicted pixels of each grouping and model by class; a score sums G of its rows.
    """

    def __init__(self, counts: VoteCounts) -> None:
        votes, num_classes = counts.votes, counts.num_classes
        self.num_classes = num_classes
        self.num_models = votes.shape[1]
        self.num_parts = int(counts.part.max(initial=-1)) + 1
        models = range(self.num_models)
        first = np.stack([(votes[:, : m + 1] == votes[:, m, None]).argmax(1) for m in models], 1)
        code = np.zeros(len(votes), np.int64)
        for m in models:
            code = code * (m + 1) + first[:, m]
        _, example, grouping = np.unique(code, return_index=True, return_inverse=True)
        first = first[example]  # (G, M): the first model with the same vote
        self.agree = (first[:, :, None] == first[:, None, :]).astype(np.float64)  # (G, M, M)
        # columns of the table: K counts of correct pixels, then K counts of predicted pixels
        shape = (self.num_parts, len(first), self.num_models, 2, num_classes)
        table = np.zeros(np.prod(shape))
        for m in models:
            row = (counts.part * len(first) + grouping) * self.num_models + m
            correct = votes[:, m] == counts.truth
            table += np.bincount((row * 2) * num_classes + votes[:, m], counts.pixels * correct, table.size)
            table += np.bincount((row * 2 + 1) * num_classes + votes[:, m], counts.pixels, table.size)
        self.table = table.reshape(self.num_parts, -1, 2 * num_classes)
        self.true = np.zeros((self.num_parts, num_classes))
        np.add.at(self.true, (counts.part, counts.truth), counts.pixels)

    def winners(self, weights: np.ndarray) -> np.ndarray:
        """Find the model whose vote wins each grouping, (n, M) whole weights → (n, G)."""
        groups, models = self.agree.shape[:2]
        total = (weights @ self.agree.reshape(-1, models).T).reshape(-1, groups, models)
        total *= (weights > 0)[:, None]  # as in vote: a model of weight 0 decides no tie
        return total.argmax(2)

    def sums(self, winners: np.ndarray) -> np.ndarray:
        """Sum the correct, then the predicted pixels by class, (n, G) → (parts, n, 2, K)."""
        groups, models = self.agree.shape[:2]
        rows = np.zeros((len(winners), groups * models))
        np.put_along_axis(rows, winners + np.arange(groups) * models, 1.0, 1)
        return (rows @ self.table).reshape(self.num_parts, len(winners), 2, -1)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Score (n, M) whole weights → (n, 1 + parts) mIoU: of all parts, then of all without each one."""
        chunk = max(1, (1 << 21) // self.agree[..., 0].size)
        cached: dict[bytes, np.ndarray] = {}  # scores by winners, which most candidates share with another
        scores = np.empty((len(weights), 1 + self.num_parts))
        for start in range(0, len(weights), chunk):
            winners = self.winners(weights[start : start + chunk])
            winners = winners.astype(np.min_scalar_type(self.num_models))
            keys = winners.view(f'S{winners[0].nbytes}').ravel()
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            rows = {winners[row].tobytes(): row for row in first}
            if new := [key for key in rows if key not in cached]:
                new_scores = self.winner_scores(winners[[rows[key] for key in new]].astype(np.int64))
                cached |= dict(zip(new, new_scores, strict=True))
            scores[start : start + chunk] = np.stack([cached[key] for key in rows])[inverse]
        return scores

    def winner_scores(self, winners: np.ndarray) -> np.ndarray:
        """Score (n, G) winners → (n, 1 + parts), as in `scores`."""
        part_sums, true = self.sums(winners), self.true.sum(0)
        total = part_sums.sum(0)
        parts = zip(part_sums, self.true, strict=True)
        without = [miou_of_sums(total - sums, true - part_true) for sums, part_true in parts]
        return np.stack([miou_of_sums(total, true), *without], 1)

    def out_of_sample(self, part_weights: Sequence[np.ndarray]) -> float:
        """Score (M,) weights of each part on that part; the mIoU of all parts together."""
        sums = sum(self.sums(self.winners(weights[None]))[part] for part, weights in enumerate(part_weights))
        return float(miou_of_sums(sums, self.true.sum(0))[0])


def miou_of_sums(sums: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute the mIoU of (..., 2, K) correct and predicted pixels and (K,) pixels of each true class."""
    return mean_of_iou(iou_of_counts(sums[..., 0, :], sums[..., 1, :], true))


def weight_grid(num_models: int, top: int = TOP_WEIGHT) -> np.ndarray:
    """List (n, M) whole weights that differ in proportion, with fewer models and smaller weights first."""
    grid = np.array(list(product(range(top + 1), repeat=num_models)))
    grid = grid[np.gcd.reduce(grid, axis=1) == 1]
    return grid[np.lexsort((grid.sum(1), np.count_nonzero(grid, axis=1)))]


def choose_weights(scorer: WeightScorer) -> list[np.ndarray]:
    """Choose the best (M,) weights for all parts, then for all parts without each one."""
    if scorer.num_models <= MAX_GRID_MODELS:
        return choose_candidates(scorer, weight_grid(scorer.num_models))
    singles = np.eye(scorer.num_models, dtype=np.int64)
    starts = choose_candidates(scorer, np.concatenate([singles, np.ones_like(singles[:1])]))
    return [coordinate_ascent(scorer, start, column) for column, start in enumerate(starts)]


def choose_candidates(scorer: WeightScorer, candidates: np.ndarray) -> list[np.ndarray]:
    """Choose the best of (n, M) candidates for all parts, then for all parts without each one."""
    return [candidates[number] for number in scorer.scores(candidates).argmax(0)]


def coordinate_ascent(scorer: WeightScorer, weights: np.ndarray, column: int) -> np.ndarray:
    """Change the weight of one model after another as long as that raises a column of `scorer.scores`."""
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


# --- weights by class -------------------------------------------------------------------------------------


class ClassWeightSearch:
    """The search for weights by model and class, on the distinct votes and the pixels of each true class."""

    def __init__(self, counts: VoteCounts) -> None:
        self.votes, row = np.unique(counts.votes, axis=0, return_inverse=True)  # (V, M)
        self.num_parts = int(counts.part.max(initial=-1)) + 1
        self.pixels = np.zeros((self.num_parts, len(self.votes), counts.num_classes), np.int64)
        np.add.at(self.pixels, (counts.part, row.ravel(), counts.truth), counts.pixels)
        contested = (self.votes != self.votes[:, :1]).any(1)
        self.contested_rows = [  # [model][class]: contested votes in which the model votes for the class
            [np.flatnonzero(contested & (self.votes[:, m] == k)) for k in range(counts.num_classes)]
            for m in range(self.votes.shape[1])
        ]

    def best_table(self, weights: np.ndarray, left_out: int | None) -> np.ndarray:
        """Ascend from (M,) weights and from equal ones, without a part; return the better (M, K) end."""
        starts = (weights, np.ones_like(weights))
        return max((self.ascend(start, left_out) for start in starts), key=lambda end: end[0])[1]

    def ascend(self, weights: np.ndarray, left_out: int | None) -> tuple[float, np.ndarray]:
        """Change one weight of the (M, K) table after another while that raises the mIoU; return both."""
        pixels = self.pixels[[part for part in range(self.num_parts) if part != left_out]].sum(0)
        true = pixels.sum(0)
        table = member_table(weights * 2, true.size)
        winner = vote(self.votes.T, table)
        sums = class_sums(pixels, winner)
        best = float(miou_of_sums(sums, true))
        while True:
            before = best
            for model, category in product(np.flatnonzero(weights), range(true.size)):
                rows = self.contested_rows[model][category]
                for halves in CLASS_HALVES if len(rows) else ():
                    trial = table.copy()
                    trial[model, category] = weights[model] * halves
                    trial_winner = vote(self.votes[rows].T, trial)
                    changed = trial_winner != winner[rows]
                    moved = rows[changed]
                    trial_sums = sums + class_sums(pixels[moved], trial_winner[changed])
                    trial_sums -= class_sums(pixels[moved], winner[moved])
                    score = float(miou_of_sums(trial_sums, true))
                    if score > best:
                        best, table, sums = score, trial, trial_sums
                        winner[rows] = trial_winner
            if best == before:
                return best, table


def class_sums(pixels: np.ndarray, winner: np.ndarray) -> np.ndarray:
    """Sum correct and predicted pixels → (2, K), from (v, K) pixels by true class and (v,) winners."""
    sums = np.zeros((2, pixels.shape[1]), np.int64)
    np.add.at(sums[0], winner, pixels[np.arange(len(winner)), winner])
    np.add.at(sums[1], winner, pixels.sum(1))
    return sums


# --- the search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassResult:
    """The result of a search for weights by class."""

    table: np.ndarray  # (M, K)
    out_of_sample: float
    part_tables: tuple[np.ndarray, ...]  # chosen without each part


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. Scores are mIoU; out of sample: a part's choice was made on the other parts."""

    num_classes: int
    singles: tuple[float, ...]  # each model alone
    equal: float  # all weights 1: nothing was chosen, so it is out of sample
    best_weights: tuple[int, ...]
    best: float  # in sample, so it is too high
    best_out_of_sample: float
    single_out_of_sample: float  # the best single model, chosen in the same way
    weights: tuple[int, ...]  # the ones to use, unless weights by class are better still
    part_weights: tuple[tuple[int, ...], ...]  # the best, chosen without each part
    part_singles: tuple[tuple[int, ...], ...]  # the best single model, chosen without each part
    by_class: ClassResult | None = None  # if weights by class were searched

    @property
    def model_weights_out_of_sample(self) -> float:
        """Return the score out of sample of `weights`."""
        return max(self.single_out_of_sample, self.equal, self.best_out_of_sample)

    @property
    def uses_classes(self) -> bool:
        return self.by_class is not None and self.by_class.out_of_sample > self.model_weights_out_of_sample

    @property
    def out_of_sample(self) -> float:
        """Return the score out of sample of the weights to use."""
        return self.by_class.out_of_sample if self.uses_classes else self.model_weights_out_of_sample

    @property
    def table(self) -> np.ndarray:
        """Return the (M, K) weights to use."""
        return self.by_class.table if self.uses_classes else member_table(self.weights, self.num_classes)

    def predict(self, sample: OofSample) -> np.ndarray:
        """Vote with the weights chosen without the part of the sample; return ids."""
        if self.uses_classes:
            return vote(sample.preds, self.by_class.part_tables[sample.part])
        return vote(sample.preds, member_table(self.part_weights[sample.part], self.num_classes))


def search_weights(counts: VoteCounts, by_class: bool = False) -> SearchResult:
    """Search the weights with the highest mIoU; use those that score best out of sample, in a tie the
    simplest: one model, equal weights, others, those by class. Raises BadInput for fewer than 2 parts.
    """
    scorer = WeightScorer(counts)
    if scorer.num_parts < 2:
        raise BadInput('--search: found fewer than 2 photos out of fold')
    singles = np.eye(scorer.num_models, dtype=np.int64)
    equal = np.ones(scorer.num_models, np.int64)
    best, *part_weights = choose_weights(scorer)
    single, *part_singles = choose_candidates(scorer, singles)
    best_out, single_out = scorer.out_of_sample(part_weights), scorer.out_of_sample(part_singles)
    equal_score = float(scorer.scores(equal[None])[0, 0])
    options = [(single_out, single), (equal_score, equal), (best_out, best)]
    _, weights = max(options, key=lambda option: option[0])  # in a tie the simplest
    return SearchResult(
        num_classes=counts.num_classes,
        singles=tuple(scorer.scores(singles)[:, 0].tolist()),
        equal=equal_score,
        best_weights=tuple(best.tolist()),
        best=float(scorer.scores(best[None])[0, 0]),
        best_out_of_sample=best_out,
        single_out_of_sample=single_out,
        weights=tuple(weights.tolist()),
        part_weights=tuple(tuple(weights.tolist()) for weights in part_weights),
        part_singles=tuple(tuple(weights.tolist()) for weights in part_singles),
        by_class=search_classes(counts, best, part_weights) if by_class else None,
    )


def search_classes(counts: VoteCounts, best: np.ndarray, part_weights: Sequence[np.ndarray]) -> ClassResult:
    """Search weights by class, starting from the best member weights, for all parts and without each one."""
    search = ClassWeightSearch(counts)
    tables = tuple(search.best_table(weights, part) for part, weights in enumerate(part_weights))
    winners = (vote(search.votes.T, table) for table in tables)
    sums = sum(class_sums(pixels, winner) for pixels, winner in zip(search.pixels, winners, strict=True))
    out_of_sample = float(miou_of_sums(sums, search.pixels.sum((0, 1))))
    return ClassResult(search.best_table(best, None), out_of_sample, tables)


def format_search(result: SearchResult, names: Sequence[str]) -> str:
    """Format the scores, and say in a plain sentence what to do."""
    width = max(len('equal weights'), *map(len, names))
    weights = ' '.join(map(str, result.best_weights))
    scores = [*zip(names, result.singles, strict=True), ('equal weights', result.equal)]
    chosen = [('best weights', result.best_out_of_sample), ('best model', result.single_out_of_sample)]
    if result.by_class is not None:
        chosen.append(('weights by class', result.by_class.out_of_sample))
    parts = len(result.part_weights)
    lines = [
        'mIoU on the photos out of fold:',
        *(f'  {name:<{width}}  {score:.4f}' for name, score in scores),
        f'  weights {weights}: {result.best:.4f}, too high: chosen on the photos that it is scored on',
        f'mIoU out of sample: chosen without each of {parts} parts of the photos, scored on it:',
        *(f'  {name:<16}  {score:.4f}' for name, score in chosen),
    ]
    if result.uses_classes:
        lines.append('use the vote with weights by class')
    elif np.count_nonzero(result.weights) == 1:
        model = names[np.argmax(result.weights)]
        lines.append(f'do not ensemble: use model {model}; no hard vote scores higher out of sample')
    else:
        lines.append(f'use the vote with weights {" ".join(map(str, result.weights))}')
    return '\n'.join(lines)
