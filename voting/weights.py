"""Search the weights of a vote over masks exactly.

    result = search_weights(count_votes(samples, num_models, num_classes, metric))

The pixels are counted once; after that any number of candidates is scored by arithmetic. A choice is scored
on photos that it was not made on: each part of the photos, usually a fold, is left out in turn.

Shapes: M models, K classes, U distinct votes with their truth, V distinct votes, G groupings (the ways in
which models can agree with each other), n candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from metrics import Metric
from voting.choices import MAX_CANDIDATES, best_of, left_out, require_parts
from voting.hard import VoteCounts, member_table, vote

TOP_WEIGHT = 3  # the whole weights 0 to 3 of each model are tried
MAX_GRID_MODELS = 8  # up to here all combinations are tried; beyond, the weights are changed one by one
MAX_GRID_BY_IMAGE = 5  # the same where each photo has a score of its own, which takes longer
CLASS_HALVES = (0, 1, 2, 3, 4)  # weights of a model for one class that are tried, in halves of its weight


# --- weights by model -------------------------------------------------------------------------------------


class WeightScorer:
    """The score of any weights by model, exact, without looking at the pixels again.

    The winner of a pixel depends only on which models agree there; 5 models have 52 such groupings. `table`
    has the correct and predicted pixels of each grouping and model by id; the counts of a part sum G of its
    rows. Photos are too many for a table: their votes are counted again for each candidate.
    """

    def __init__(self, counts: VoteCounts) -> None:
        self.counts, self.metric = counts, counts.metric
        votes, num_ids = counts.votes, counts.num_ids
        self.num_models = votes.shape[1]
        self.num_parts = int(counts.part.max()) + 1
        models = range(self.num_models)
        first = np.stack([(votes[:, : m + 1] == votes[:, m, None]).argmax(1) for m in models], 1)
        code = np.zeros(len(votes), np.int64)
        for m in models:
            code = code * (m + 1) + first[:, m]
        _, example, self.grouping = np.unique(code, return_index=True, return_inverse=True)
        first = first[example]  # (G, M): the first model with the same vote
        self.agree = (first[:, :, None] == first[:, None, :]).astype(np.float64)  # (G, M, M)
        self.mask = counts.unit * counts.num_planes + counts.plane  # (U,)
        self.num_masks = len(counts.part) * counts.num_planes
        true = np.zeros((self.num_masks, num_ids))
        np.add.at(true, (self.mask, counts.truth), counts.pixels)
        self.true = counts.by_class(true)  # (units, K)
        self.times = left_out(counts.part)  # (1 + parts, units)
        if self.metric.is_by_image:
            return
        # columns of the table: counts of correct pixels by id, then counts of predicted pixels
        shape = (self.num_masks, len(first), self.num_models, 2, num_ids)
        table = np.zeros(np.prod(shape))
        for m in models:
            row = (self.mask * len(first) + self.grouping) * self.num_models + m
            correct = votes[:, m] == counts.truth
            table += np.bincount((row * 2) * num_ids + votes[:, m], counts.pixels * correct, table.size)
            table += np.bincount((row * 2 + 1) * num_ids + votes[:, m], counts.pixels, table.size)
        self.table = table.reshape(self.num_masks, -1, 2 * num_ids)

    @property
    def max_grid_models(self) -> int:
        """Return for how many models all combinations of weights are tried."""
        return MAX_GRID_BY_IMAGE if self.metric.is_by_image else MAX_GRID_MODELS

    def winners(self, weights: np.ndarray) -> np.ndarray:
        """Find the model whose vote wins each grouping, (n, M) whole weights → (n, G)."""
        groups, models = self.agree.shape[:2]
        total = (weights @ self.agree.reshape(-1, models).T).reshape(-1, groups, models)
        total *= (weights > 0)[:, None]  # as in vote: a model of weight 0 decides no tie
        return total.argmax(2)

    def image_counts(self, winners: np.ndarray) -> np.ndarray:
        """Count the pixels of each unit that are right, predicted, and true: (n, G) → (units, n, 3, K)."""
        sums = self._count_votes(winners) if self.metric.is_by_image else self._sum_table(winners)
        sums = self.counts.by_class(sums)
        true = np.broadcast_to(self.true[:, None, None], (*sums.shape[:2], 1, sums.shape[3]))
        return np.concatenate([sums, true], 2)

    def _sum_table(self, winners: np.ndarray) -> np.ndarray:
        """Sum the correct, then the predicted pixels by id, (n, G) → (masks, n, 2, num_ids)."""
        groups, models = self.agree.shape[:2]
        rows = np.zeros((len(winners), groups * models))
        np.put_along_axis(rows, winners + np.arange(groups) * models, 1.0, 1)
        return (rows @ self.table).reshape(self.num_masks, len(winners), 2, -1)

    def _count_votes(self, winners: np.ndarray) -> np.ndarray:
        """Count the correct, then the predicted pixels by id, (n, G) → (masks, n, 2, num_ids)."""
        counts, shape = self.counts, (self.num_masks, self.counts.num_ids)
        sums = np.empty((self.num_masks, len(winners), 2, counts.num_ids))
        for number, winner in enumerate(winners):
            pred = counts.votes[np.arange(len(counts.votes)), winner[self.grouping]]
            cell = self.mask * counts.num_ids + pred
            right = counts.pixels * (pred == counts.truth)
            for row, pixels in enumerate((right, counts.pixels)):
                sums[:, number, row] = np.bincount(cell, pixels, np.prod(shape)).reshape(shape)
        return sums

    def scores(self, weights: np.ndarray, by_class: bool = False) -> np.ndarray:
        """Score (n, M) whole weights → (n, 1 + parts): of all parts, then of all without each one.

        `by_class`: the score of each class → (n, 1 + parts, K).
        """
        chunk = max(1, (1 << 21) // self.agree[..., 0].size)
        score = self.metric.by_class if by_class else self.metric.score
        cached: dict[bytes, np.ndarray] = {}  # scores by winners, which most candidates share with another
        scores = np.empty((len(weights), 1 + self.num_parts, *([self.counts.num_classes] * by_class)))
        for start in range(0, len(weights), chunk):
            winners = self.winners(weights[start : start + chunk])
            winners = winners.astype(np.min_scalar_type(self.num_models))
            keys = winners.view(f'S{winners[0].nbytes}').ravel()
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            rows = {winners[row].tobytes(): row for row in first}
            new = [key for key in rows if key not in cached]
            step = max(1, (1 << 24) // self.true.size)
            for batch in (new[at : at + step] for at in range(0, len(new), step)):
                image_counts = self.image_counts(winners[[rows[key] for key in batch]].astype(np.int64))
                cached |= zip(batch, np.moveaxis(score(image_counts, self.times), 0, 1), strict=True)
            scores[start : start + chunk] = np.stack([cached[key] for key in rows])[inverse]
        return scores

    def out_of_sample(self, part_weights: Sequence[np.ndarray]) -> float:
        """Score (M,) weights of each part on that part; the score of all parts together."""
        image_counts = self.image_counts(self.winners(np.stack(part_weights)))
        in_part = image_counts[np.arange(len(image_counts)), self.counts.part]
        return float(self.metric.score(in_part))


def weight_grid(num_models: int, top: int = TOP_WEIGHT) -> np.ndarray:
    """List (n, M) whole weights that differ in proportion, with fewer models and smaller weights first."""
    grid = np.array(list(product(range(top + 1), repeat=num_models)))
    grid = grid[np.gcd.reduce(grid, axis=1) == 1]
    return grid[np.lexsort((grid.sum(1), np.count_nonzero(grid, axis=1)))]


def choose_weights(scorer: WeightScorer) -> tuple[list[np.ndarray], np.ndarray]:
    """Choose the best (M,) weights for all parts, then for all parts without each one.

    Also returns the (n, M) candidates from which to choose again in draws: all that differ in their scores,
    or, of too many, the best; beyond the grid the ends of the ascents and all a single weight from them.
    """
    singles = np.eye(scorer.num_models, dtype=np.int64)
    simple = np.concatenate([singles, np.ones_like(singles[:1])])
    if scorer.num_models <= scorer.max_grid_models:
        grid = weight_grid(scorer.num_models)
        scores = scorer.scores(grid)
        chosen = [grid[number] for number in best_of(scores.T)]
        distinct = np.sort(np.unique(scores, axis=0, return_index=True)[1])
        best = distinct[np.argsort(-scores[distinct, 0], kind='stable')[:MAX_CANDIDATES]]
        return chosen, np.concatenate([simple, grid[np.sort(best)]])
    starts = choose_candidates(scorer, simple)
    chosen = [coordinate_ascent(scorer, start, column) for column, start in enumerate(starts)]
    near = np.concatenate([one_weight_changed(end, m) for end in chosen for m in range(len(end))])
    return chosen, np.concatenate([simple, np.unique([*chosen, *near], axis=0)])


def choose_candidates(scorer: WeightScorer, candidates: np.ndarray) -> list[np.ndarray]:
    """Choose the best of (n, M) candidates for all parts, then for all parts without each one."""
    return [candidates[number] for number in best_of(scorer.scores(candidates).T)]


def coordinate_ascent(scorer: WeightScorer, weights: np.ndarray, column: int) -> np.ndarray:
    """Change the weight of one model after another as long as that raises a column of `scorer.scores`."""
    best = scorer.scores(weights[None])[0, column]
    while True:
        before = best
        for model in range(len(weights)):
            trials = one_weight_changed(weights, model)
            scores = scorer.scores(trials)[:, column]
            if scores.max() > best:
                best, weights = scores.max(), trials[scores.argmax()]
        if best == before:
            return weights


def one_weight_changed(weights: np.ndarray, model: int) -> np.ndarray:
    """List (n, M) weights that differ from (M,) in the weight of one model, and these."""
    trials = np.tile(weights, (TOP_WEIGHT + 1, 1))
    trials[:, model] = range(TOP_WEIGHT + 1)
    return trials[trials.any(1)]


# --- weights by class -------------------------------------------------------------------------------------


class ClassWeightSearch:
    """The search for weights by model and class, on the distinct votes and the pixels of each true class.

    The votes are those of all photos together, or of each one if the metric is a mean over photos: P photos.
    """

    def __init__(self, counts: VoteCounts) -> None:
        self.metric, self.part = counts.metric, counts.part
        self.by_image = counts.metric.is_by_image
        photo, slab = (counts.unit, 0 * counts.unit) if self.by_image else (0 * counts.unit, counts.unit)
        columns = np.column_stack([photo, counts.votes])
        columns, row = np.unique(columns, axis=0, return_inverse=True)
        self.photo, self.votes = columns[:, 0], columns[:, 1:].astype(np.uint8)  # (V,), (V, M)
        slabs = 1 if self.by_image else len(counts.part)
        self.pixels = np.zeros((slabs, len(self.votes), counts.num_classes), np.int64)
        np.add.at(self.pixels, (slab, row.ravel(), counts.truth), counts.pixels)
        contested = (self.votes != self.votes[:, :1]).any(1)
        self.contested_rows = [  # [model][class]: contested votes in which the model votes for the class
            [np.flatnonzero(contested & (self.votes[:, m] == k)) for k in range(counts.num_classes)]
            for m in range(self.votes.shape[1])
        ]

    def best_table(self, weights: np.ndarray, left_out: int | None) -> np.ndarray:
        """Ascend from (M,) weights and from equal ones, without a part; return the better (M, K) end."""
        starts = (weights, np.ones_like(weights))
        return max((self.ascend(start, left_out) for start in starts), key=lambda end: end[0])[1]

    def ascend(
        self, weights: np.ndarray, left_out: int | Sequence[int] | None, table: np.ndarray | None = None
    ) -> tuple[float, np.ndarray]:
        """Change one weight of the (M, K) table after another while that raises the score; return both.

        Without a table, it starts from (M,) weights.
        """
        inside = ~np.isin(self.part, [] if left_out is None else left_out)
        pixels = self.pixels[0] if self.by_image else self.pixels[inside].sum(0)
        photos = inside if self.by_image else np.s_[:]
        true = self.true_sums(pixels)[photos]
        table = member_table(weights * 2, pixels.shape[1]) if table is None else table
        winner = vote(self.votes.T, table)
        sums = self.vote_sums(pixels, winner)
        best = self.score(sums[photos], true)
        while True:
            before = best
            for model, category in product(np.flatnonzero(weights), range(pixels.shape[1])):
                rows = self.contested_rows[model][category]
                for halves in CLASS_HALVES if len(rows) else ():
                    trial = table.copy()
                    trial[model, category] = weights[model] * halves
                    trial_winner = vote(self.votes[rows].T, trial)
                    changed = trial_winner != winner[rows]
                    moved = rows[changed]
                    votes = (self.photo[moved], trial_winner[changed], winner[moved])
                    trial_sums = move_votes(sums, pixels[moved], *votes)
                    score = self.score(trial_sums[photos], true)
                    if score > best:
                        best, table, sums = score, trial, trial_sums
                        winner[rows] = trial_winner
            if best == before:
                return best, table

    def vote_sums(self, pixels: np.ndarray, winner: np.ndarray) -> np.ndarray:
        """Sum correct and predicted pixels → (P, 2, K), from (V, K) pixels by true class and (V,) winners."""
        sums = np.zeros((self.num_photos, 2, pixels.shape[1]), np.int64)
        np.add.at(sums[:, 0], (self.photo, winner), pixels[np.arange(len(winner)), winner])
        np.add.at(sums[:, 1], (self.photo, winner), pixels.sum(1))
        return sums

    def true_sums(self, pixels: np.ndarray) -> np.ndarray:
        """Sum the (V, K) pixels of each true class by photo → (P, K)."""
        true = np.zeros((self.num_photos, pixels.shape[1]), np.int64)
        np.add.at(true, self.photo, pixels)
        return true

    @property
    def num_photos(self) -> int:
        return len(self.part) if self.by_image else 1

    def score(self, sums: np.ndarray, true: np.ndarray) -> float:
        """Score (P, 2, K) correct and predicted pixels, and (P, K) of each true class."""
        return float(self.metric.score(np.concatenate([sums, true[:, None]], 1)))

    def out_of_sample(self, tables: Sequence[np.ndarray]) -> float:
        """Score the (M, K) table of each part on that part; the score of all parts together."""
        sums, true = [], []
        for part, table in enumerate(tables):
            pixels = self.pixels[0 if self.by_image else part]
            photos = self.part == part if self.by_image else np.s_[:]
            sums.append(self.vote_sums(pixels, vote(self.votes.T, table))[photos])
            true.append(self.true_sums(pixels)[photos])
        return self.score(np.concatenate(sums), np.concatenate(true))


def move_votes(
    sums: np.ndarray, pixels: np.ndarray, photo: np.ndarray, winner: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Return the (P, 2, K) vote_sums after v votes of these photos have other winners than before: (v, K)
    pixels by true class, and (v,) of each other.
    """
    num_classes, rows, total, moved = sums.shape[2], np.arange(len(winner)), pixels.sum(1), sums.copy()
    flat, first = moved.reshape(-1), photo * 2 * num_classes  # one index: np.add.at is fast with that alone
    for change, ids in ((np.add, winner), (np.subtract, before)):
        change.at(flat, first + ids, pixels[rows, ids])
        change.at(flat, first + num_classes + ids, total)
    return moved


# --- the search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassResult:
    """The result of a search for weights by class."""

    table: np.ndarray  # (M, K)
    out_of_sample: float
    part_tables: tuple[np.ndarray, ...]  # chosen without each part
    further_tables: tuple[tuple[np.ndarray, ...], ...] = ()  # of each part, chosen without it and another


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. Out of sample: a part's choice was made on the other parts."""

    metric: Metric  # of all scores
    num_classes: int
    is_multilabel: bool
    singles: tuple[float, ...]  # each model alone
    equal: float  # all weights 1: nothing was chosen, so it is out of sample
    best_weights: tuple[int, ...]
    best: float  # in sample, so it is too high
    best_out_of_sample: float
    single_out_of_sample: float  # the best single model, chosen in the same way
    weights: tuple[int, ...]  # the ones to use, unless weights by class are better still
    part_weights: tuple[tuple[int, ...], ...]  # the best, chosen without each part
    candidates: np.ndarray  # (n, M) from which to choose again: each model, equal weights, any weights
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


def search_weights(counts: VoteCounts, by_class: bool = False) -> SearchResult:
    """Search the weights with the highest score; use those that score best out of sample, in a tie the
    simplest: one model, equal weights, others, those by class. Raises BadInput for fewer than 2 parts.
    """
    scorer = WeightScorer(counts)
    require_parts(counts.part, '--search: ')
    singles = np.eye(scorer.num_models, dtype=np.int64)
    equal = np.ones(scorer.num_models, np.int64)
    (best, *part_weights), candidates = choose_weights(scorer)
    single, *part_singles = choose_candidates(scorer, singles)
    best_out, single_out = scorer.out_of_sample(part_weights), scorer.out_of_sample(part_singles)
    equal_score = float(scorer.scores(equal[None])[0, 0])
    options = [(single_out, single), (equal_score, equal), (best_out, best)]
    _, weights = max(options, key=lambda option: option[0])  # in a tie the simplest
    return SearchResult(
        metric=counts.metric,
        num_classes=counts.num_classes,
        is_multilabel=counts.is_multilabel,
        singles=tuple(scorer.scores(singles)[:, 0].tolist()),
        equal=equal_score,
        best_weights=tuple(best.tolist()),
        best=float(scorer.scores(best[None])[0, 0]),
        best_out_of_sample=best_out,
        single_out_of_sample=single_out,
        weights=tuple(weights.tolist()),
        part_weights=tuple(tuple(weights.tolist()) for weights in part_weights),
        candidates=candidates,
        by_class=search_classes(scorer, best, part_weights) if by_class else None,
    )


def search_classes(scorer: WeightScorer, best: np.ndarray, part_weights: Sequence[np.ndarray]) -> ClassResult:
    """Search weights by class, starting from the best member weights, for all parts and without each one."""
    if scorer.counts.is_multilabel:
        return search_planes(scorer, np.stack([best, *part_weights]))
    search = ClassWeightSearch(scorer.counts)
    tables = tuple(search.best_table(weights, part) for part, weights in enumerate(part_weights))
    numbers = range(len(tables) if len(tables) > 2 else 0)
    further = []
    for p in numbers:  # from the table that was found without the part
        ends = (search.ascend(part_weights[p], [p, q], tables[p])[1] for q in numbers if q != p)
        further.append(tuple(ends))
    return ClassResult(search.best_table(best, None), search.out_of_sample(tables), tables, tuple(further))


def search_planes(scorer: WeightScorer, weights: np.ndarray) -> ClassResult:
    """Choose the weights of each class that may overlap others by itself, on all parts and without each one.

    A class that is in no photo keeps the (1 + parts, M) weights by model.
    """
    counts, num_models = scorer.counts, scorer.num_models
    if num_models <= scorer.max_grid_models:
        grid = weight_grid(num_models)
    else:
        singles = np.eye(num_models, dtype=np.int64)
        grid = np.concatenate([singles, np.ones_like(singles[:1]), 1 - singles])
    candidates = np.concatenate([grid, weights])
    scores = scorer.scores(candidates, by_class=True)  # (n, 1 + parts, K)
    present = scorer.times @ scorer.true > 0  # (1 + parts, K)
    by_model = len(grid) + np.arange(len(weights))[:, None]
    chosen = np.where(present, best_of(np.moveaxis(scores, 0, -1)), by_model)  # (1 + parts, K)
    tried, place = np.unique(chosen[1:], return_inverse=True)
    image_counts = scorer.image_counts(scorer.winners(candidates[tried]))  # (units, tried, 3, K)
    units, classes = np.ix_(np.arange(len(counts.part)), np.arange(counts.num_classes))
    in_part = image_counts[
        units, place.reshape(-1, counts.num_classes)[counts.part], :, classes
    ]  # (units, K, 3)
    out_of_sample = float(scorer.metric.score(in_part.swapaxes(1, 2)))
    table, *part_tables = candidates[chosen].swapaxes(1, 2)  # each (M, K)
    return ClassResult(table, out_of_sample, tuple(part_tables))


def format_search(result: SearchResult, names: Sequence[str]) -> str:
    """Format the scores."""
    width = max(len('equal weights'), *map(len, names))
    weights = ' '.join(map(str, result.best_weights))
    scores = [*zip(names, result.singles, strict=True), ('equal weights', result.equal)]
    chosen = [('best weights', result.best_out_of_sample), ('best model', result.single_out_of_sample)]
    if result.by_class is not None:
        chosen.append(('weights by class', result.by_class.out_of_sample))
    parts, label = len(result.part_weights), result.metric.label
    lines = [
        f'{label} on the photos out of fold:',
        *(f'  {name:<{width}}  {score:.4f}' for name, score in scores),
        f'  weights {weights}: {result.best:.4f}, too high: chosen on the photos that it is scored on',
        f'{label} out of sample: chosen without each of {parts} parts of the photos, scored on it:',
        *(f'  {name:<16}  {score:.4f}' for name, score in chosen),
    ]
    return '\n'.join(lines)


def format_verdict(result: SearchResult, names: Sequence[str]) -> str:
    """Say which hard vote to use, or which model."""
    if result.uses_classes:
        return 'use the vote with weights by class'
    if np.count_nonzero(result.weights) == 1:
        model = names[np.argmax(result.weights)]
        return f'do not ensemble: use model {model}; no hard vote scores higher out of sample'
    return f'use the vote with weights {" ".join(map(str, result.weights))}'
