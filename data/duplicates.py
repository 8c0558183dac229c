"""Find near-duplicates: photos whose thumbnails correlate, without comparing all of them with all.

Shapes: N photos, D values of a feature vector, a thumbnail, whose length is at most about 1.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import cv2
import numpy as np

from data.cache import resize

DUPLICATE_CORRELATION = 0.985  # photos whose thumbnails correlate more than this show the same scene
THUMBNAIL = 24  # pixels a side
TREE_DIMS, PRUNING_DIMS = 8, 64  # leading principal components: in the tree, and of the distances
SAMPLE = 256  # photos that the principal components are computed from
LEAF = 64  # points of a leaf of the tree
PRODUCTS_OF_ALL = 4_000_000  # most pairs of a set that needs no tree
PAIRS_AT_ONCE, DISTANCES_AT_ONCE = 500_000, 20_000_000  # in memory
MOST_NEAR = 0.01  # share of all points near a point, above which blocks are faster than the tree
PRODUCTS_AT_ONCE = 4096  # pairs whose features are copied at once
ROUNDING = 1e-3  # allowed in a distance

Pairs = tuple[np.ndarray, np.ndarray]  # (m,) rows of both sides


def thumbnail(photo: np.ndarray) -> np.ndarray:
    """Shrink an (H, W, 3) photo to 24x24 and return it as a vector of mean 0 and length 1."""
    small = resize(photo, (THUMBNAIL, THUMBNAIL), cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def thumbnails(photos: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Return the (N, D) thumbnails of so many photos."""
    features = np.zeros((0, 0), np.float32)
    for row, photo in enumerate(photos):
        feature = thumbnail(photo)
        if not row:
            features = np.empty((count, len(feature)), np.float32)
        features[row] = feature
    return features


def near_duplicates(features: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Return the (N,) set of each photo: photos that correlate, directly or in a chain, or whose groups are
    the same. Sets are numbered by their first photos.
    """
    sets = np.arange(len(features)) if groups is None else groups
    for left, right in candidates(features, features):
        apart = sets[left] != sets[right]
        left, right = left[apart], right[apart]
        alike = correlate(features, left, features, right)
        sets = join_sets(sets, left[alike], right[alike])
    _, first, inverse = np.unique(sets, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def have_duplicates(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which of the photos, (N,) bool, are near-duplicates of any of the others."""
    found = np.zeros(len(features), bool)
    for left, right in candidates(features, others):
        found[left[correlate(features, left, others, right)]] = True
    return found


def correlate(left: np.ndarray, rows: np.ndarray, right: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Tell which pairs of rows, one of each set of features, correlate enough → (m,) bool."""
    products = np.empty(len(rows))
    for start in range(0, len(rows), PRODUCTS_AT_ONCE):
        part = slice(start, start + PRODUCTS_AT_ONCE)
        np.einsum('ij,ij->i', left[rows[part]], right[others[part]], out=products[part], dtype=np.float64)
    return products > DUPLICATE_CORRELATION


def join_sets(sets: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join the (N,) sets of each pair of rows."""
    if not len(left):
        return sets
    from scipy.sparse import coo_array  # slow to import; needed only when folds are made
    from scipy.sparse.csgraph import connected_components

    size = sets.max() + 1
    graph = coo_array((np.ones(len(left), bool), (sets[left], sets[right])), (size, size))
    return connected_components(graph, directed=False)[1][sets]


def candidates(features: np.ndarray, others: np.ndarray) -> Iterator[Pairs]:
    """Find all pairs that may correlate enough, and few that do not; yield (m,) rows of both, some at a time.
    If `others` is `features`, each pair comes once.

    If u·v > t, then |u - v|² = |u|² + |v|² - 2u·v < |u|² + |v|² - 2t; the distance after an orthogonal
    projection is no larger. So a k-d tree (Bentley, CACM 1975) of the leading principal components, computed
    from some of the photos, finds all of them, in nearly linear time if these hold most of the variance.
    """
    norms, other_norms = (np.sqrt(np.einsum('ij,ij->i', one, one)) for one in (features, others))
    limit = DUPLICATE_CORRELATION - ROUNDING
    rows = np.flatnonzero(norms * other_norms.max(initial=0) > limit)  # not photos of one colour, of length 0
    other_rows = np.flatnonzero(other_norms * norms.max(initial=0) > limit)
    if not len(rows) or not len(other_rows):
        return
    radius = np.sqrt(max(0, norms.max() ** 2 + other_norms.max() ** 2 - 2 * DUPLICATE_CORRELATION)) + ROUNDING
    if len(rows) * len(other_rows) <= PRODUCTS_OF_ALL:
        pairs = near_in_blocks(features[rows], others[other_rows], radius)
    else:
        sample = others[other_rows[:: -(-len(other_rows) // SAMPLE)]]
        basis = np.linalg.svd(sample, full_matrices=False)[2][:PRUNING_DIMS].T
        pairs = near_in_tree((features @ basis)[rows], (others @ basis)[other_rows], radius)
    for left, right in pairs:
        once = rows[left] < other_rows[right] if features is others else slice(None)
        yield rows[left[once]], other_rows[right[once]]


def near_in_blocks(points: np.ndarray, others: np.ndarray, radius: float) -> Iterator[Pairs]:
    """Find the pairs of points that are nearer than a radius, by all distances; yield some at a time."""
    squares, other_squares = (np.square(one).sum(axis=1) for one in (points, others))
    block = max(1, DISTANCES_AT_ONCE // len(others))
    for start in range(0, len(points), block):
        part = slice(start, start + block)
        distances = points[part] @ others.T
        distances *= -2
        distances += other_squares
        left, right = np.nonzero(distances < radius**2 - squares[part, None])
        yield left + start, right


def near_in_tree(points: np.ndarray, others: np.ndarray, radius: float) -> Iterator[Pairs]:
    """Find the pairs of points that are nearer than a radius, by a k-d tree of their first dimensions, unless
    too many are near in these; yield some at a time.
    """
    from scipy.spatial import cKDTree  # slow to import

    first = points[:, :TREE_DIMS]
    tree = cKDTree(others[:, :TREE_DIMS], LEAF)
    sample = first[:: -(-len(points) // SAMPLE)]
    if tree.query_ball_point(sample, radius, return_length=True).mean() > MOST_NEAR * len(others):
        yield from near_in_blocks(points, others, radius)
        return
    counts = tree.query_ball_point(first, radius, return_length=True)
    ends = np.cumsum(counts)
    start = 0
    while start < len(points):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS_AT_ONCE, 'right')))
        near_rows = tree.query_ball_point(first[start:stop], radius, return_sorted=False)
        left = np.repeat(np.arange(start, stop), counts[start:stop])
        right = np.fromiter(chain.from_iterable(near_rows), np.int64, len(left))
        near = np.square(points[left] - others[right]).sum(axis=1) < radius**2
        yield left[near], right[near]
        start = stop
