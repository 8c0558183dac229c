"""Vote over masks, and count votes.

    winner = vote_masks(preds, table)

If classes may overlap, each has a vote of its own, over 0 and 1: more than half of the weight wins, and at
exactly half the earliest member.

Shapes: M models, K classes, U distinct votes with their truth, r runs, s stretches of equal votes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, product
from math import gcd, lcm

import numpy as np

from metrics import IGNORED, Metric
from utils.errors import BadInput
from voting.members import OofSample

Runs = tuple[np.ndarray, np.ndarray]  # (r, 2) int64 start and length, and (r,) uint8 id above 0
MAX_PENDING = 1 << 20  # codes that are collected before they are merged into the histogram
MAX_PARTS, MAX_PHOTOS = 1 << 10, 1 << 20
BLOCK = 1 << 22  # pixels that are counted at a time


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


def vote_masks(preds: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Vote over (M, H, W) ids → (H, W), or in each plane by itself, (M, K, H, W) of 0 and 1 → (K, H, W).

    table[m, k] is the weight of a vote of member m for class k, or in its plane.
    """
    if preds.ndim == 3:
        return vote(preds, table)
    return np.stack([vote(preds[:, k], member_table(table[:, k], 2)) for k in range(preds.shape[1])])


def deciding_member(table: np.ndarray, is_multilabel: bool) -> int | None:
    """Return the member whose class always wins, whatever the others vote for; None if there is none.

    By (M, K) weights; with one weight a member it is a member of more than half of all, or of half if it is
    the first that votes.
    """
    num_classes = table.shape[1]
    pairs = np.eye(num_classes, dtype=bool) == is_multilabel  # the member's class, and that of all others
    for m, own in enumerate(table):
        against = np.delete(table, m, 0).sum(0)
        is_first = ~table[:m].any(0) & ((own > 0)[:, None] | (m == 0))
        if ((own[:, None] > against) | ((own[:, None] == against) & is_first))[pairs].all():
            return m
    return None


@dataclass(frozen=True)
class RunVote:
    """The vote over the runs of a mask: its stretches of equal votes, and the runs that win."""

    votes: np.ndarray  # (M, s) uint8 id of each stretch
    winner: np.ndarray  # (s,)
    pixels: np.ndarray  # (s,)
    runs: np.ndarray  # (r, 2) int64 start and length of each id above 0, ascending and maximal
    ids: np.ndarray  # (r,) uint8


def vote_runs(members: Sequence[Runs], pixels: int, table: np.ndarray) -> RunVote:
    """Vote over a mask of so many pixels, given as the runs and ids of each member."""
    edges = np.concatenate([np.stack([runs[:, 0], runs.sum(1)]) for runs, _ in members], 1)
    bounds, place = np.unique(np.concatenate([edges.ravel(), [0, pixels]]), return_inverse=True)
    member = np.repeat(np.arange(len(members)), [len(runs) for runs, _ in members])
    ids = np.concatenate([ids for _, ids in members]).astype(np.int16)
    steps = np.zeros((len(members), len(bounds)), np.int16)
    starts, ends = place.ravel()[: edges.size].reshape(2, -1)
    np.add.at(steps, (member, starts), ids)
    np.subtract.at(steps, (member, ends), ids)
    votes = steps[:, :-1].cumsum(1).astype(np.uint8)
    winner = vote(votes, table)
    lengths = np.diff(bounds)
    first = np.flatnonzero(np.concatenate([[True], winner[1:] != winner[:-1]]))
    runs = np.stack([bounds[first], np.add.reduceat(lengths, first)], 1)
    won = winner[first] > 0
    return RunVote(votes, winner, lengths, runs[won], winner[first][won])


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
    """The joint histogram of truth and votes: how many pixels of a unit have this truth and these votes.

    A unit is a part, or a photo if the metric is a mean over photos. If classes may overlap, the pixels of
    each plane are counted by themselves, and truth and votes are 0 or 1.
    """

    unit: np.ndarray  # (U,)
    plane: np.ndarray  # (U,) class whose mask it is; 0 if there is but one mask
    truth: np.ndarray  # (U,)
    votes: np.ndarray  # (U, M)
    pixels: np.ndarray  # (U,) int64
    part: np.ndarray  # (units,) the part of each unit
    num_classes: int
    is_multilabel: bool
    metric: Metric

    @property
    def num_planes(self) -> int:
        return self.num_classes if self.is_multilabel else 1

    @property
    def num_ids(self) -> int:
        """Return how many values a vote may have."""
        return 2 if self.is_multilabel else self.num_classes

    def by_class(self, counts: np.ndarray) -> np.ndarray:
        """Turn the counts of each id in a unit's planes into those of its classes:
        (units * num_planes, ..., num_ids) → (units, ..., K).
        """
        if not self.is_multilabel:
            return counts
        return np.moveaxis(counts[..., 1].reshape(-1, self.num_planes, *counts.shape[1:-1]), 1, -1)


def count_votes(
    samples: Iterable[OofSample], num_models: int, num_classes: int, metric: Metric | None = None
) -> VoteCounts:
    """Count the votes where the truth is not IGNORED, to raise a metric, mIoU by default.

    Raises BadInput for too many models, or no pixels.
    """
    metric = metric or Metric()
    samples = iter(samples)
    first = [*islice(samples, 1)]
    is_multilabel = bool(first) and first[0].truth.ndim == 3
    planes, ids = (num_classes, 2) if is_multilabel else (1, num_classes)
    if (MAX_PHOTOS if metric.is_by_image else MAX_PARTS) * planes * ids ** (num_models + 1) >= 2**63:
        raise BadInput(
            f'--search: found {num_models} models, too many to count with {num_classes} classes; '
            'give the CSVs of fewer models'
        )
    codes, pixels, pending, parts = np.zeros(0, np.int64), np.zeros(0, np.int64), [], []
    for photo, sample in enumerate(chain(first, samples)):
        parts.append(sample.part)
        unit = photo if metric.is_by_image else sample.part
        truth, preds = sample.truth.reshape(planes, -1), sample.preds.reshape(num_models, planes, -1)
        for plane, start in product(range(planes), range(0, truth.shape[1], BLOCK)):
            block = np.s_[plane, start : start + BLOCK]
            columns = np.concatenate([truth[block][None], preds[:, *block]])
            pending.append(count_stretches(columns, unit * planes + plane, ids))
        if sum(len(code) for code, _ in pending) > MAX_PENDING:
            codes, pixels = merge_counts([(codes, pixels), *pending])
            pending = []
    codes, pixels = merge_counts([(codes, pixels), *pending])
    if not len(codes):
        raise BadInput('--search: all pixels of the photos out of fold are ignored: nothing can be scored')
    votes = np.empty((len(codes), num_models), np.uint8)
    for model in reversed(range(num_models)):
        codes, votes[:, model] = np.divmod(codes, ids)
    codes, truth = np.divmod(codes, ids)
    unit, plane = np.divmod(codes, planes)
    part = np.array(parts) if metric.is_by_image else np.arange(max(parts) + 1)
    return VoteCounts(unit, plane, truth, votes, pixels, part, num_classes, is_multilabel, metric)


def count_stretches(columns: np.ndarray, prefix: int, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of stretches of the same truth and votes, (1 + M, P) with the truth first.

    Returns the (s,) code of each, which is prefix, truth and votes in base num_ids, and its (s,) pixels.
    """
    known = columns[0] != IGNORED
    if not known.all():
        columns = columns[:, known]
    changes = (columns[:, 1:] != columns[:, :-1]).any(0)
    starts = np.flatnonzero(np.concatenate([[columns.shape[1] > 0], changes]))
    code = np.full(len(starts), prefix, np.int64)
    for column in columns:
        code = code * num_ids + column[starts]
    return code, np.diff(starts, append=columns.shape[1])


def merge_counts(counts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge pairs of codes and their pixels; return each code once, in ascending order, with its total."""
    codes, inverse = np.unique(np.concatenate([codes for codes, _ in counts]), return_inverse=True)
    pixels = np.concatenate([pixels for _, pixels in counts])
    return codes, np.bincount(inverse, pixels, len(codes)).astype(np.int64)
