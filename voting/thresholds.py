"""Choose a threshold for each class whose masks may overlap, on photos out of fold; keep it with the model.

    python evaluate.py thresholds output/hands       # chooses them on fold*/oof_histograms.npy

A pixel is of a class if its probability, stored as a byte, is at least the class's byte: 128 is the threshold
0.5. Histograms of the stored bytes of the pixels of a class and of all others are enough for every
threshold, so a model predicts once. Each part of the photos is judged at the thresholds that were chosen on
the others.

thresholds.yaml in output/<name>/ has the `metric` that was raised; `thresholds`, one a class, for photos of
no fold; `by_fold`, those chosen without each fold, for its own photos; whether they are `used`: only if they
score higher out of sample; both scores; and the histograms and checkpoints that they were `fitted_on`.

Shapes: n photos, K classes, H W the scored size of a photo.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from config import Competition, fold_files, fold_of
from metrics import IGNORED, Interval, Metric
from submission import metric_of
from utils.errors import BadInput, join_first
from utils.files import map_array, write_text
from utils.yaml_files import read_mapping
from voting.choices import (
    AGAIN,
    Search,
    cross_fit,
    draws_gain,
    number_scenes,
    require_parts,
    search_draws,
    split_evenly,
)
from voting.members import PARTS, split_parts
from voting.origin import fitted_on, read_origin, read_photos, refuse_outdated, refuse_outdated_fit

FILE = 'thresholds.yaml'
HISTOGRAMS = 'oof_histograms.npy'  # beside oof.csv, with its rows: (n, K, 2, 256) HISTOGRAM_TYPE
HISTOGRAM_TYPE = np.uint32
DEFAULT = 0.5
BLOCK = 1 << 24  # pixels that cv2 counts exactly, as it returns float32
# candidates: the least byte that is of the class, in the order of their distance from 0.5; the nearest wins
BYTES = np.array(sorted(range(1, 256), key=lambda byte: abs(byte - 128)))


def threshold_counts(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Count the pixels of each stored probability: (K, H, W) uint8, (K, H, W) planes → (K, 2, 256) uint32.

    The first 256 are pixels of the class, the others those that are not; IGNORED ones do not count.
    """
    counts = np.empty((len(probs), 2, 256), HISTOGRAM_TYPE)
    for k, (plane, true) in enumerate(zip(probs, truth, strict=True)):
        inside = _histogram(plane[true == 1])
        ignored = true == IGNORED
        known = plane[~ignored] if ignored.any() else plane
        counts[k] = inside, _histogram(known) - inside
    return counts


def _histogram(values: np.ndarray) -> np.ndarray:
    """Count each value of a uint8 array → (256,) int64; ten times as fast as np.bincount."""
    flat, total = np.ascontiguousarray(values).reshape(-1, 1), np.zeros(256, np.int64)
    for start in range(0, len(flat), BLOCK):
        total += cv2.calcHist([flat[start : start + BLOCK]], [0], None, [256], [0, 256]).ravel().astype(int)
    return total


def counts_at_thresholds(histograms: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """Count pixels that are right, predicted, and true: (n, 2, 256) of a class → (n, C, 3, 1) int64.

    `lowest` (C,) are the least bytes that are of the class.
    """
    above = histograms[..., ::-1].astype(np.int64).cumsum(-1)[..., ::-1]  # of at least each byte
    hits, others = above[:, 0][:, lowest], above[:, 1][:, lowest]
    true = np.broadcast_to(above[:, 0, :1], hits.shape)
    return np.stack([hits, hits + others, true], 2)[..., None]


def byte_of(threshold: float) -> int:
    """Return the least byte of a stored probability that reaches a threshold: 0.5 → 128."""
    return math.ceil(threshold * 255 - 0.01)  # thresholds are rounded to 6 digits


def threshold_of(byte: int) -> float:
    """Return the threshold of a probability before it was rounded to a byte: 128 → 0.5."""
    return round((int(byte) - 0.5) / 255, 6)


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of a model's classes, and what they score out of sample."""

    metric: Metric
    values: tuple[float, ...]  # (K,) chosen on all photos
    by_part: tuple[tuple[float, ...], ...]  # (parts, K) chosen without each part
    counts: np.ndarray  # (2, n, 3, K): at 0.5, and at the thresholds chosen without the photo's part
    gain: Interval  # what choosing them adds to the score out of sample (see voting.choices.search_gain)

    @property
    def helps(self) -> bool:
        """Return whether they score higher out of sample; only then they are used."""
        return bool(self.metric.score(self.counts[1]) > self.metric.score(self.counts[0]))


def choose_thresholds(
    histograms: np.ndarray, part: np.ndarray, metric: Metric, scene: np.ndarray | None = None
) -> Thresholds:
    """Choose the threshold of each class with the highest score, for all photos and without each part.

    `histograms` (n, K, 2, 256) are the threshold_counts of each photo, `part` (n,) its part, from 0, and
    `scene` (n,) its scene, if known. The nearest to 0.5 is taken of equal ones; a class that is in no photo
    keeps 0.5. Raises BadInput for a single part.
    """
    require_parts(part, 'thresholds: ')
    one_class = replace(metric, scored=None)
    search = Search([], [0], by_class=[[range(len(BYTES))]])
    values, by_part, counts, draws = [], [], [], []
    for k in range(histograms.shape[1]):
        tried = counts_at_thresholds(histograms[:, k], BYTES)  # (n, C, 3, 1)
        best, chosen = cross_fit(tried, part, one_class)
        in_part = np.array([tried[part == number, 0, 2].any() for number in range(len(chosen))])
        elsewhere = np.array([np.delete(in_part, number).any() for number in range(len(chosen))])
        chosen = np.where(elsewhere, chosen, 0)
        values.append(threshold_of(BYTES[best if in_part.any() else 0]))
        by_part.append([threshold_of(byte) for byte in BYTES[chosen]])
        counts.append([tried[:, 0], tried[np.arange(len(part)), chosen[part]]])
        draws.append(search_draws(tried, part, one_class, search, scene))
    stacked = np.concatenate([np.stack(pair) for pair in counts], -1)
    gain = draws_gain(np.concatenate(draws, -1), part, metric, scene)
    return Thresholds(metric, tuple(values), tuple(zip(*by_part, strict=True)), stacked, gain)


def fit_thresholds(folder: Path, competition: Competition) -> str:
    """Choose the thresholds of a model on its oof_histograms.npy, write them; return a report.

    `folder` is output/<name>. Raises BadInput.
    """
    if not competition.is_multilabel:
        raise BadInput(f'{folder}: only the classes of a multilabel task have thresholds, this is multiclass')
    folders = {path.parent for name in (HISTOGRAMS, 'oof.csv') for path in fold_files(folder, name)}
    paths = [path / HISTOGRAMS for path in sorted(folders, key=fold_of)] or [folder / HISTOGRAMS]
    csvs = [path.with_name('oof.csv') for path in paths]
    refuse_outdated(csvs)
    histograms = [read_histograms(path, len(competition.classes)) for path in paths]
    part, scene = split_rows(paths, [*map(len, histograms)])
    folds = [fold_of(path.parent) for path in paths] if len(paths) > 1 else []
    chosen = choose_thresholds(np.concatenate(histograms), part, metric_of(competition), scene)
    path = write_thresholds(folder, chosen, folds, fitted_on(folder, csvs, paths))
    return f'{format_thresholds(chosen, competition.classes)}\nwrote {path}'


def split_rows(paths: Sequence[Path], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the part and the scene of each row of oof_histograms.npy files: those of its photo, or where
    nothing is known of the photos, its file, or a stretch of the only one, and no scenes. Raises BadInput.
    """
    places = [read_photos([path.with_name('oof.csv')]) for path in paths]
    if [*map(len, places)] == [*rows]:
        merged = {key: place for one in places for key, place in one.items()}
        scene = number_scenes([scene for _, scene in merged.values()])
        return np.array([*split_parts(merged).values()]), scene
    return np.repeat(range(len(paths)), rows) if len(paths) > 1 else split_evenly(rows[0], PARTS), None


def read_histograms(path: Path, num_classes: int) -> np.ndarray:
    """Map the (n, K, 2, 256) histograms of the photos out of fold. Raises BadInput."""
    if not path.exists():
        raise BadInput(f'{path}: no such file; infer.py --split oof writes it')
    try:
        rows = len(np.load(path, mmap_mode='r', allow_pickle=False))
    except (OSError, ValueError, EOFError, OverflowError, TypeError):
        rows = 0  # map_array says what is wrong
    return map_array(path, (rows, num_classes, 2, 256), HISTOGRAM_TYPE)


def format_thresholds(chosen: Thresholds, classes: Sequence[str]) -> str:
    """Format the scores at 0.5 and at the chosen thresholds, the gain, and a line a class."""
    metric, (before, after), gain = chosen.metric, chosen.counts, chosen.gain
    width = max(map(len, ['class', *classes]))
    lines = [
        f'at 0.5: {metric.label} {metric.interval(before)} on {before.shape[0]} photos',
        f'at thresholds chosen on the other parts, out of sample: {metric.interval(after)}',
        f'gain {gain.signed}, {AGAIN}; {"used" if chosen.helps else "not used"}',
        f'{"class":<{width}}  threshold  {metric.class_label} at 0.5  out of sample',
    ]
    columns = len(metric.class_label) + len(' at 0.5')
    scores = metric.by_class(before), metric.by_class(after)
    for name, value, *pair in zip(classes, chosen.values, *scores, strict=True):
        first, second = ('-' if np.isnan(score) else f'{score:.4f}' for score in pair)
        lines.append(f'{name:<{width}}  {value:>9.3f}  {first:>{columns}}  {second:>13}')
    return '\n'.join(lines)


def write_thresholds(folder: Path, chosen: Thresholds, folds: Sequence[int], fitted: dict[str, Any]) -> Path:
    """Write thresholds.yaml into a model's folder; `folds` are those of the parts, [] if they are none;
    `fitted` is what they were fitted_on.
    """
    before, after = (round(float(chosen.metric.score(counts)), 5) for counts in chosen.counts)
    values = {
        'metric': chosen.metric.name,
        'used': chosen.helps,
        'thresholds': [*chosen.values],
        'by_fold': {fold: [*row] for fold, row in zip(folds, chosen.by_part, strict=True)} if folds else {},
        'score_before': before,
        'score_after': after,
        'fitted_on': fitted,
    }
    write_text(folder / FILE, yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
    return folder / FILE


def read_thresholds(folder: Path, num_classes: int, fold: int | None = None) -> list[float]:
    """Read the thresholds to use for a model: 0.5 each if none were chosen, or if they do not help.

    With a `fold`, those that were chosen without it, for its own photos: 0.5 if there are none. Raises
    BadInput, without a fold also if a best.pt or a histogram that they were chosen on has changed.
    """
    path, plain = folder / FILE, [DEFAULT] * num_classes
    if not path.exists():
        return plain
    content = read_mapping(path)
    try:
        used, values = content['used'], parse_thresholds(content['thresholds'], num_classes)
        by_fold = {int(key): parse_thresholds(row, num_classes) for key, row in content['by_fold'].items()}
        if fold is None:  # whereas new histograms are made at the old thresholds
            refuse_outdated_fit(path, content.get('fitted_on'), 'thresholds')
    except (KeyError, TypeError, ValueError, AttributeError):
        expected = f'expected the thresholds of {num_classes} classes, as evaluate.py thresholds writes them'
        raise BadInput(f'{path}: {expected}; run it again') from None
    if not used:
        return plain
    return values if fold is None else by_fold.get(fold, plain)


def mean_thresholds(folders: Sequence[Path], table: Sequence[Sequence[Fraction]]) -> list[float]:
    """Average the thresholds of models in these folders, with their (M, K) weights. Raises BadInput."""
    means = []
    rows = [read_thresholds(folder, len(weights)) for folder, weights in zip(folders, table, strict=True)]
    for values, weights in zip(zip(*rows, strict=True), zip(*table, strict=True), strict=True):
        total = float(sum(weights))
        weighted = sum(value * float(weight) for value, weight in zip(values, weights, strict=True))
        means.append(round(weighted / total, 6) if total else DEFAULT)
    return means


def list_outdated(csvs: Iterable[Path], num_classes: int) -> str:
    """Name in a line the CSVs that infer.py would make with other thresholds now; '' if there are none."""
    paths = sorted(str(csv) for csv in csvs if has_other_thresholds(csv, num_classes))
    words = 'made with other thresholds than thresholds.yaml has, until they are predicted again'
    return f'{words}: {join_first(paths, 8)}' if paths else ''


def has_other_thresholds(csv: Path, num_classes: int) -> bool:
    """Tell whether infer.py would make a CSV with other thresholds now; not of a CSV that it did not make."""
    origin = read_origin(csv)
    if origin is None or 'thresholds' not in origin.settings:
        return False
    made_with = origin.settings['thresholds']
    return made_with != thresholds_of(csv, len(made_with), num_classes)


def thresholds_of(csv: Path, folds: int, num_classes: int) -> list[list[float]]:
    """Read the thresholds that a CSV in a run folder is made with: those chosen on all photos; of an oof.csv
    those chosen without its fold, or, if it is of so many folds, without each. Raises BadInput.
    """
    fold = fold_of(csv.parent)
    folder = csv.parent if fold is None else csv.parent.parent
    without = [None] if csv.stem != 'oof' else range(folds) if fold is None else [fold]
    return [read_thresholds(folder, num_classes, k) for k in without]


def parse_thresholds(row: Any, num_classes: int) -> list[float]:
    """Parse a threshold a class. Raises TypeError or ValueError."""
    values = [float(value) for value in row]
    if len(values) != num_classes or not all(0 < value < 1 for value in values):
        raise ValueError('not a threshold a class')
    return values
