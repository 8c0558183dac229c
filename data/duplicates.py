"""Find near-duplicates: the same photo cropped, shifted, flipped, turned, recoloured or saved again, and
frames of one scene, without comparing all photos with all.

Two steps. The spectrum of a thumbnail, the magnitudes of its Fourier coefficients, hardly depends on where
things are (Casasent and Psaltis, Applied Optics 1976), and not on flips; photos whose spectra are near are
candidates. Then one thumbnail of each pair is aligned with the other: shifted, coarsely, finely (ECC:
Evangelidis and Psarakis, PAMI 2008), each step for the few that the one before it leaves. At the end their
details have to correlate: plain photos of one kind, such as cardboards, have near spectra and other details.

Shapes: N photos, Z zooms, D values of a spectrum, S = SIDE pixels of a thumbnail's side.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import cv2
import numpy as np

from config import COMPETITION_FILE
from data.cache import resize, resize_image

VERSION = 3  # raise it when other photos become near-duplicates
SIDE = 64  # pixels of a thumbnail
MARGINS = 0, 4, 8  # pixels that a zoom leaves out at each side of WHOLE: a crop is like the middle of a photo
WHOLE = SIDE + 2 * max(MARGINS)
MOST_TRIMMED = 0.12  # share of a photo's side that may be padding
FREQUENCIES, POWER = 16, 0.3  # of the spectrum along each axis; evens out its few large values
RADIUS = 0.105  # between the spectra of candidates
NEAREST = 6  # candidates of a photo at a zoom
PEAK_SIDE, LEAST_PEAK = 24, 0.5  # pixels, and correlation of photos that are shifted only, to align them
COARSE_SIDE, LEAST_COARSE = 32, 0.85  # pixels, and correlation after COARSE_STEPS, to align them finely
COARSE_STEPS, FINE_STEPS = 5, 40
BLURS = 1.5, 3.0  # standard deviations (pixels) that leave details of two kinds
LEAST_DETAILS = 0.83, 0.97  # correlation of the details of aligned near-duplicates; where that joins
MOST_JOINED, FEW_JOINED = 0.2, 8  # more than this share, and this number of the photos, the second
LEAST_OVERLAP, MOST_ZOOM, MOST_STRETCH = 0.4, 1.7, 1.3  # of the two photos of a pair

TREE_DIMS, PRUNING_DIMS = 8, 64  # leading principal components: in the tree, and of the distances
SAMPLE = 256  # photos that the principal components are computed from
LEAF = 64  # points of a leaf of the tree
PRODUCTS_OF_ALL = 4_000_000  # most pairs of a set that needs no tree
PAIRS_AT_ONCE, DISTANCES_AT_ONCE = 500_000, 20_000_000  # in memory
MOST_NEAR = 0.01  # share of all points near a point, above which blocks are faster than the tree
ALIGNED_AT_ONCE = 256  # pairs

PAIR = np.dtype([('row', np.int64), ('other', np.int64), ('zoom', np.int8), ('other_zoom', np.int8)])
NearPairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # (m,) rows of both sides, and squared distances


@dataclass(frozen=True)
class Descriptors:
    """What near-duplicates are found by, 5 KB a photo; photos of any bands are compared as grey."""

    spectra: np.ndarray  # (N, Z, D) float16
    thumbnails: np.ndarray  # (N, S, S) uint8

    @classmethod
    def allocate(cls, count: int) -> 'Descriptors':
        spectra = np.zeros((count, len(MARGINS), len(spectrum_index()[0])), np.float16)
        return cls(spectra, np.zeros((count, SIDE, SIDE), np.uint8))

    def __len__(self) -> int:
        return len(self.thumbnails)

    def __getitem__(self, rows: slice | np.ndarray) -> 'Descriptors':
        return Descriptors(self.spectra[rows], self.thumbnails[rows])

    def __setitem__(self, row: int, descriptor: tuple[np.ndarray, np.ndarray]) -> None:
        self.spectra[row], self.thumbnails[row] = descriptor


def describe_photos(photos: Iterable[np.ndarray], count: int) -> Descriptors:
    """Describe so many (H, W, C) photos."""
    descriptors = Descriptors.allocate(count)
    for row, photo in enumerate(photos):
        descriptors[row] = describe_photo(photo)
    return descriptors


def describe_photo(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (Z, D) spectra and the (S, S) uint8 thumbnail of an (H, W, C) photo.

    Its bands count as much as each other, whatever their gains.
    """
    small = resize_image(trim(photo), (WHOLE, WHOLE)).astype(np.float32).reshape(WHOLE, WHOLE, -1)
    grey = (small / np.maximum(small.mean(axis=(0, 1)), 1e-6)).mean(axis=2)
    grey -= grey.mean()
    zooms = [shrink(grey[m : WHOLE - m, m : WHOLE - m], SIDE) for m in MARGINS]
    levels = zooms[0] * (40 / max(zooms[0].std(), 1e-6)) + 128
    return spectra_of(np.stack(zooms)), np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def trim(photo: np.ndarray) -> np.ndarray:
    """Cut the borders of one colour off, which a shift or a turn is padded with."""
    tolerance = np.iinfo(photo.dtype).max >> 6
    for _ in range(4):  # a side at a time, the first one last
        rows, edge, most = 0, photo[0, 0].astype(int), int(len(photo) * MOST_TRIMMED)
        while rows < most and (np.abs(photo[rows] - edge) <= tolerance).all():
            rows += 1
        photo = np.rot90(photo[rows:])
    return np.ascontiguousarray(photo)


def spectra_of(greys: np.ndarray) -> np.ndarray:
    """Return the (n, D) spectra, of length 1, of (n, S, S) photos; flips and quarter turns have the same."""
    rows, columns = spectrum_index()
    taper = np.hanning(SIDE + 2)[1:-1].astype(np.float32)  # the edges of a photo are no edges in it
    greys = (greys - greys.mean(axis=(1, 2), keepdims=True)) * (taper[:, None] * taper)
    found = np.abs(np.fft.fft2(greys))
    flips = found[:, rows, columns] + found[:, rows, -columns]
    turns = found[:, columns, rows] + found[:, columns, -rows]
    spectra = (flips + turns) ** POWER
    return spectra / np.maximum(np.linalg.norm(spectra, axis=1, keepdims=True), 1e-6)


def spectrum_index() -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies (D,) of a spectrum's values along both axes, without the mean."""
    rows, columns = np.triu_indices(FREQUENCIES)
    return rows[1:], columns[1:]


def shrink(grey: np.ndarray, side: int) -> np.ndarray:
    return resize(grey, (side, side), cv2.INTER_AREA)


def find_pairs(descriptors: Descriptors, first: int = 0) -> tuple[np.ndarray, float, int]:
    """Return (m, 2) rows of photos that are near-duplicates, no more pairs than join each set of photos that
    are so directly or in a chain; which of LEAST_DETAILS their correlations are above; and the number of
    photos of a set that was too large for a fold, 0 if none was. The pairs of the first photos, of which
    there are so many, join all sets of these alone.

    X-rays of hands, say, are alike although no two are the same: where a set is too large, only pairs that
    are more alike join. That also parts frames of a fixed camera: see describe_alike.
    """
    num_alike = 0
    found = candidates(descriptors, descriptors)
    found = found[np.argsort(np.maximum(found.row, found.other) >= first, kind='stable')]
    correlations = np.full(len(found), np.nan)  # not aligned yet
    for least in LEAST_DETAILS:
        sets, pairs = DisjointSets(len(descriptors)), []
        for start in range(0, len(found), ALIGNED_AT_ONCE):
            part = range(start, min(start + ALIGNED_AT_ONCE, len(found)))
            apart = [m for m in part if sets.find(found.row[m]) != sets.find(found.other[m])]
            new = [m for m in apart if np.isnan(correlations[m])]
            correlations[new] = correlate_details(descriptors, descriptors, found[new])
            rows = [(found.row[m], found.other[m]) for m in apart if correlations[m] > least]
            pairs += [pair for pair in rows if sets.join(*pair)]
        pairs = np.array(pairs, np.int64).reshape(-1, 2)
        largest = np.bincount(join_groups(np.arange(len(descriptors)), pairs), minlength=1).max()
        if largest <= max(FEW_JOINED, MOST_JOINED * len(descriptors)):
            break
        num_alike = num_alike or int(largest)
    return pairs, least, num_alike


def describe_alike(num_alike: int, count: int) -> str:
    """Say that so many of the photos are alike, by find_pairs, and what to do if they are few scenes."""
    fault = f'{num_alike} of {count} photos are alike, as frames of one camera or as things of one kind'
    kept = 'folds keep together only those that are nearly equal'
    ways = f'group in {COMPETITION_FILE}, or folds of your own with folds_csv'
    return f'{fault}: {kept}; if they are of few scenes, give {ways}'


class DisjointSets:
    """Sets of rows, each alone at first (union-find: Galler and Fischer, CACM 1964)."""

    def __init__(self, count: int) -> None:
        self.parents = [*range(count)]

    def find(self, row: int) -> int:
        """Return the row that stands for the set of a row."""
        while self.parents[row] != row:
            self.parents[row] = row = self.parents[self.parents[row]]
        return row

    def join(self, row: int, other: int) -> bool:
        """Join the sets of two rows; return whether they were two sets."""
        row, other = self.find(row), self.find(other)
        self.parents[max(row, other)] = min(row, other)
        return row != other


def join_groups(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Join the (N,) groups of each of the (m, 2) pairs of rows; number them by their first rows."""
    sets = DisjointSets(groups.max(initial=-1) + 1)
    for left, right in groups[pairs].tolist():
        sets.join(left, right)
    joined = np.array([sets.find(group) for group in groups.tolist()], np.int64)
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def have_duplicates(descriptors: Descriptors, others: Descriptors) -> np.ndarray:
    """Return which of the photos, (N,) bool, are near-duplicates of any of the others; they have to be as
    alike as the near-duplicates among these.
    """
    pairs, found = candidates(descriptors, others), np.zeros(len(descriptors), bool)
    least = find_pairs(others)[1]
    for start in range(0, len(pairs), ALIGNED_AT_ONCE):
        part = pairs[start : start + ALIGNED_AT_ONCE]
        part = part[~found[part.row]]
        found[part.row[correlate_details(descriptors, others, part) > least]] = True
    return found


# --- aligning two thumbnails --------------------------------------------------------------------------------


def correlate_details(descriptors: Descriptors, others: Descriptors, pairs: np.recarray) -> np.ndarray:
    """Align candidates, (m,) rows of both; return the correlations of their details, -1 if they are too
    different to be aligned → (m,).
    """
    one, other = descriptors.thumbnails[pairs.row], others.thumbnails[pairs.other]
    zooms, other_zooms = (np.take(MARGINS, zoom) / WHOLE for zoom in (pairs.zoom, pairs.other_zoom))
    peaks, shifts = find_shifts(outlines(one, zooms), outlines(other, other_zooms))
    correlations = np.full(len(pairs), -1.0)

    def correlate(m: int) -> float:
        best = -1.0
        for k in np.argsort(-peaks[m])[:2]:
            if peaks[m, k] > LEAST_PEAK and best <= LEAST_DETAILS[-1]:
                transform = start_of(zooms[m], shifts[m, k], other_zooms[m])
                best = max(best, align(one[m], orient(other[m], k), transform))
        return best

    near = np.flatnonzero(peaks.max(axis=1, initial=0) > LEAST_PEAK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # cv2 lets other threads run
        correlations[near] = [*pool.map(correlate, near)]
    return correlations


def start_of(margin: float, shift: np.ndarray, other_margin: float) -> np.ndarray:
    """Return the (2, 3) transform from one thumbnail to the other, if their middles without these margins
    (shares of a side) are shifted by (x, y) pixels.
    """
    scale = (1 - 2 * other_margin) / (1 - 2 * margin)
    offset = SIDE * other_margin - scale * SIDE * margin - (1 - 2 * other_margin) * shift
    return np.float32([[scale, 0, offset[0]], [0, scale, offset[1]]])


def orient(thumbnails: np.ndarray, number: int) -> np.ndarray:
    """Flip and turn (..., S, S) thumbnails in one of the eight ways of a square."""
    thumbnails = thumbnails.swapaxes(-1, -2) if number & 4 else thumbnails
    thumbnails = thumbnails[..., ::-1, :] if number & 1 else thumbnails
    return np.ascontiguousarray(thumbnails[..., ::-1] if number & 2 else thumbnails)


def find_shifts(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlate (m, s, s) outlines with others in each of their eight orientations; return the peaks, (m, 8)
    from 0 to 1, and where they are, (m, 8, 2) pixels (x, y) of thumbnails.
    """
    spectrum, turns = np.fft.rfft2(one), [np.fft.rfft2(orient(other, k)) for k in (0, 4)]
    backwards = -np.arange(PEAK_SIDE)  # the spectrum of a flip about the first row, which is one row off
    turns = [(turn, turn[:, backwards]) for turn in turns]
    peaks, shifts = np.empty((len(one), 8)), np.empty((len(one), 8, 2), np.float32)
    for k in range(8):
        rows, columns = k & 1, k >> 1 & 1  # flipped
        found = turns[k >> 2][rows ^ columns]  # of a flip of both: the conjugate
        products = spectrum * (found if columns else found.conj())
        plane = np.fft.irfft2(products, one.shape[1:]).reshape(len(one), PEAK_SIDE**2)
        places = plane.argmax(axis=1)
        peaks[:, k] = plane[np.arange(len(one)), places]
        shifts[:, k] = np.stack([places % PEAK_SIDE + columns, places // PEAK_SIDE + rows], axis=1)
    half = PEAK_SIDE // 2
    return peaks, ((shifts + half) % PEAK_SIDE - half) * (SIDE / PEAK_SIDE)


def outlines(thumbnails: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Shrink the middles of (m, S, S) thumbnails, without these shares of a side at each margin, to
    (m, s, s); take their slow changes out, make them fade at their edges and of length 1.
    """
    taper = np.sqrt(np.hanning(PEAK_SIDE + 2)[1:-1]).astype(np.float32)
    found = np.empty((len(thumbnails), PEAK_SIDE, PEAK_SIDE), np.float32)
    for thumbnail, margin, out in zip(thumbnails, np.rint(SIDE * margins).astype(int), found, strict=True):
        middle = thumbnail[margin : SIDE - margin, margin : SIDE - margin].astype(np.float32)
        out[:] = detail(shrink(middle, PEAK_SIDE), PEAK_SIDE / 10)
    found *= taper[:, None] * taper
    found /= np.maximum(np.linalg.norm(found, axis=(1, 2), keepdims=True), 1e-6)
    return found


def detail(grey: np.ndarray, blur: float) -> np.ndarray:
    """Take from a photo what remains of it after a blur."""
    return grey - cv2.GaussianBlur(grey, (0, 0), blur, borderType=cv2.BORDER_REFLECT)


def align(one: np.ndarray, other: np.ndarray, transform: np.ndarray) -> float:
    """Align a thumbnail with another by an affine transform, from a (2, 3) one on; return the correlation of
    their details where they overlap; -1 if that is no crop, shift or stretch.
    """
    one, other = one.astype(np.float32), other.astype(np.float32)
    step, little_ones = SIDE // COARSE_SIDE, (shrink(side, COARSE_SIDE) for side in (one, other))
    found, transform = find_transform(*little_ones, rescale(transform, 1 / step), COARSE_STEPS)
    if found < LEAST_COARSE:
        return -1
    found, transform = find_transform(one, other, rescale(transform, step), FINE_STEPS)
    large, little = np.linalg.svd(transform[:, :2])[1]
    if found < 0 or not 1 / MOST_ZOOM < little <= large < min(MOST_ZOOM, MOST_STRETCH * little):
        return -1
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    inside = cv2.warpAffine(np.ones_like(other), transform, (SIDE, SIDE), flags=flags) > 0.999
    if inside.mean() < LEAST_OVERLAP:
        return -1
    moved = cv2.warpAffine(other, transform, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REFLECT)
    pairs = ([detail(side, blur)[inside] for side in (one, moved)] for blur in BLURS)
    return float(np.mean([correlation(*pair) for pair in pairs]))


def find_transform(
    one: np.ndarray, other: np.ndarray, transform: np.ndarray, steps: int
) -> tuple[float, np.ndarray]:
    """Return the correlation of (s, s) photos after so many steps of ECC, or -1, and its transform."""
    limits = cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4
    slow, smooth = len(one) * 3 / 16, len(one) // 32 * 2 + 1  # a blur's deviation, and its size: pixels
    sides = detail(one, slow), detail(other, slow)
    try:
        return cv2.findTransformECC(*sides, transform, cv2.MOTION_AFFINE, limits, None, smooth)
    except cv2.error:  # no transform is found
        return -1, transform


def rescale(transform: np.ndarray, factor: float) -> np.ndarray:
    """Return the (2, 3) transform of photos resized by a factor: their first pixel's middle moves, too."""
    moved = transform.copy()
    moved[:, 2] += (1 - transform[:, :2].sum(axis=1)) * (1 - 1 / factor) / 2
    moved[:, 2] *= factor
    return moved


def correlation(values: np.ndarray, others: np.ndarray) -> float:
    values, others = values - values.mean(), others - others.mean()
    return float(values @ others / max(np.linalg.norm(values) * np.linalg.norm(others), 1e-6))


# --- candidates ---------------------------------------------------------------------------------------------


def candidates(descriptors: Descriptors, others: Descriptors) -> np.recarray:
    """Return (m,) PAIRs of photos whose spectra are near, each at the zooms where they are nearest; the
    nearest pairs come first.
    """
    same = others is descriptors
    zooms = [(0, zoom) for zoom in range(len(MARGINS))]
    zooms += [] if same else [(zoom, 0) for zoom in range(1, len(MARGINS))]
    found, distances = [], []
    for zoom, other_zoom in zooms:
        points, other_points = descriptors.spectra[:, zoom], others.spectra[:, other_zoom]
        for row, other, distance in near_pairs(points.astype(np.float32), other_points.astype(np.float32)):
            pairs = np.empty(len(row), PAIR).view(np.recarray)
            pairs.row, pairs.other, pairs.zoom, pairs.other_zoom = row, other, zoom, other_zoom
            apart = row != other if same else slice(None)
            found.append(pairs[apart])
            distances.append(distance[apart])
    if not found:
        return np.empty(0, PAIR).view(np.recarray)
    pairs, distances = np.concatenate(found).view(np.recarray), np.concatenate(distances)
    order = np.argsort(distances, kind='stable')
    low, high = pairs.row, pairs.other
    if same:
        low, high = np.minimum(low, high), np.maximum(low, high)
    first = np.unique((low * len(others) + high)[order], return_index=True)[1]
    return pairs[order[np.sort(first)]]


def near_pairs(points: np.ndarray, others: np.ndarray) -> Iterator[NearPairs]:
    """Find the pairs of points nearer than RADIUS, at most NEAREST of each and itself; yield some at a time.

    The distance after an orthogonal projection is no larger. So a k-d tree (Bentley, CACM 1975) of the
    leading principal components, computed from some of the photos, finds them, in nearly linear time if these
    hold most of the variance.
    """
    if len(points) * len(others) <= PRODUCTS_OF_ALL:
        yield from near_in_blocks(points, others)
        return
    sample = others[:: -(-len(others) // SAMPLE)]
    basis = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][:PRUNING_DIMS].T
    yield from near_in_tree(points @ basis, others @ basis)


def near_in_blocks(points: np.ndarray, others: np.ndarray) -> Iterator[NearPairs]:
    """Find near pairs by all distances."""
    squares, other_squares = (np.square(one).sum(axis=1) for one in (points, others))
    block = max(1, DISTANCES_AT_ONCE // max(1, len(others)))
    for start in range(0, len(points), block):
        part = slice(start, start + block)
        distances = points[part] @ others.T
        distances *= -2
        distances += other_squares
        distances += squares[part, None]
        columns = np.broadcast_to(np.arange(len(others)), distances.shape)
        if len(others) > NEAREST + 1:
            columns = np.argpartition(distances, NEAREST, axis=1)[:, : NEAREST + 1]
            distances = np.take_along_axis(distances, columns, axis=1)
        near = distances < RADIUS**2
        yield np.nonzero(near)[0] + start, columns[near], distances[near]


def near_in_tree(points: np.ndarray, others: np.ndarray) -> Iterator[NearPairs]:
    """Find near pairs by a k-d tree of the points' first dimensions, unless too many are near in these."""
    from scipy.spatial import KDTree  # slow to import

    first = points[:, :TREE_DIMS]
    tree = KDTree(others[:, :TREE_DIMS], LEAF)
    sample = first[:: -(-len(points) // SAMPLE)]
    if tree.query_ball_point(sample, RADIUS, return_length=True).mean() > MOST_NEAR * len(others):
        yield from near_in_blocks(points, others)
        return
    counts = tree.query_ball_point(first, RADIUS, return_length=True)
    ends = np.cumsum(counts)
    start = 0
    while start < len(points):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS_AT_ONCE, 'right')))
        near_rows = tree.query_ball_point(first[start:stop], RADIUS, return_sorted=False)
        left = np.repeat(np.arange(start, stop), counts[start:stop])
        right = np.fromiter(chain.from_iterable(near_rows), np.int64, len(left))
        distances = np.square(points[left] - others[right]).sum(axis=1)
        order = np.lexsort((distances, left))  # left is sorted already: the nearest come first
        starts = np.repeat(np.cumsum(counts[start:stop]) - counts[start:stop], counts[start:stop])
        order = order[np.arange(len(left)) - starts <= NEAREST]
        order = order[distances[order] < RADIUS**2]
        yield left[order], right[order], distances[order]
        start = stop
