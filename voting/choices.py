"""Choose among candidates by their counts, and judge the choice on photos that it was not made on.

Shapes: n units (photos, or parts of them), C candidates, K classes.
"""

import numpy as np

from metrics import Metric
from utils.errors import BadInput


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
