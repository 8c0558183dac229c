"""Read and cache what the app shows: photos, CSVs, and the scores counted from them.

A source is the CSVs of a run for one split, under the name that the pages give it.

Shapes: N photos of a split, K classes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from config import Competition, fold_files
from data.coco import CocoSet, read_coco, read_labels
from data.layout import annotation_files
from evaluate import read_fold_confusions
from submission import Reader, metric_of
from utils.errors import BadInput
from utils.plotting import differing
from voting.hard import member_table, vote
from voting.origin import list_faults

T = TypeVar('T')
CACHE_SIZE = 64  # results in memory; for 4,000 photos and 11 classes one is 2 MB


def find_sources(output: Path, split: str) -> dict[str, list[Path]]:
    """Find the CSVs of a split by source: out of fold, the folds of a run are one source."""
    if split == 'train':
        runs = sorted(output.glob('*'))
        sources = {run.name: fold_files(run, 'oof.csv') or list(run.glob('oof.csv')) for run in runs}
        return {name: paths for name, paths in sources.items() if paths}
    sources = {}
    for pattern in ('*.csv', '*/test.csv', '*/*/test.csv'):
        for path in sorted(output.glob(pattern)):
            title = path.relative_to(output) if path.parent == output else path.parent.relative_to(output)
            sources[str(title)] = [path]
    return sources


def read_prediction(paths: Sequence[Path], image_id: str, coco: CocoSet) -> np.ndarray | None:
    """Read a photo's mask from the first CSV that has it; None if none has. Raises BadInput."""
    path = csv_with(paths, image_id, coco)
    return None if path is None else open_csv(path, coco).read(image_id)


def csv_with(paths: Sequence[Path], image_id: str, coco: CocoSet) -> Path | None:
    """Return the first CSV that has a row for a photo. Raises BadInput."""
    return next((path for path in paths if image_id in open_csv(path, coco)), None)


def vote_of(preds: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Vote with equal weights, in each plane by itself if classes may overlap; a tie goes to the first."""
    if preds[0].ndim == 3:
        return np.stack([vote_of(planes, 2) for planes in zip(*preds, strict=True)])
    stack = np.stack(preds)
    winner = stack[0].copy()
    contested = (stack[1:] != stack[0]).any(0)
    winner[contested] = vote(stack[:, contested], member_table([1] * len(stack), num_classes))
    return winner


def load_coco(data: Path, split: str, competition: Competition, labels: Path | None = None) -> CocoSet:
    """Read the photos of a split, once while its files stay the same; labels: the truth of test photos."""
    labels = labels if split == 'test' else None
    files = [*annotation_files(data, split), *([labels] if labels else [])]
    return _load_coco(data, split, competition, labels, tuple(modified(path) for path in files))


@st.cache_resource(max_entries=4, show_spinner='Reading annotations')
def _load_coco(
    data: Path, split: str, competition: Competition, labels: Path | None, times: tuple[int, ...]
) -> CocoSet:
    coco = read_coco(data, split, competition)
    return coco if labels is None else with_truth(coco, labels)


def with_truth(coco: CocoSet, labels: Path) -> CocoSet:
    """Give photos the annotations of a COCO file. Raises BadInput if the file lacks a photo."""
    truth = read_labels(labels, coco.competition)
    labelled = {(photo.file_name, photo.height, photo.width): photo for photo in truth.photos}
    photos = []
    for photo in coco.photos:
        key = (photo.file_name, photo.height, photo.width)
        if key not in labelled:
            size = f'{photo.width}x{photo.height}'
            raise BadInput(f'{labels}: has no image {photo.file_name!r} of {size}, which {coco.files[0]} has')
        theirs = labelled[key]
        photos.append(replace(photo, annotations=theirs.annotations, annotators=theirs.annotators))
    return replace(coco, photos=tuple(photos), fingerprint=coco.fingerprint + truth.fingerprint)


def open_csv(path: Path, coco: CocoSet) -> Reader:
    """Open a CSV and find its rows, once while the file and the photos stay the same. Raises BadInput."""
    return _open_csv(path, modified(path), state_of(coco), coco)


@st.cache_resource(max_entries=128, show_spinner='Indexing the rows of a CSV')
def _open_csv(path: Path, time: int, state: str, _coco: CocoSet) -> Reader:
    return _coco.form.reader(path).__enter__()


def state_of(coco: CocoSet) -> str:
    """Return what results depend on: the annotations, and how the competition writes and scores masks."""
    return f'{coco.fingerprint} {coco.competition.model_dump_json()}'


def modified(path: Path) -> int:
    """Return when a file was last written, for the keys of caches. Raises BadInput."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


@dataclass(frozen=True)
class SourceScores:
    """The scores of a source on photos with a known truth, in their order; nan for photos it lacks."""

    scores: np.ndarray  # (N,) of each photo alone
    class_scores: np.ndarray  # (N, K)
    counts: np.ndarray  # (n, 3, K) metrics.image_counts of the n photos that it has
    confusion: np.ndarray | None  # (K, K); None if classes may overlap
    confused: np.ndarray  # (M, 4) of row, true class, predicted class, pixels, where there are any


def score_source(title: str, paths: Sequence[Path], coco: CocoSet) -> SourceScores:
    """Score a source. Raises BadInput, also if two of its CSVs have the same photo."""

    def compute() -> SourceScores:
        def bar(image_ids: Sequence[str], path: Path) -> Iterator[str]:
            return progress_bar(image_ids, f'Counting {title}, {paths.index(path) + 1} of {len(paths)}')

        folds, metric = read_fold_confusions(paths, coco, bar), metric_of(coco.competition)
        rows = {photo.file_name: row for row, photo in enumerate(coco.photos)}
        scores = np.full(len(rows), np.nan)
        class_scores = np.full((len(rows), len(coco.competition.classes)), np.nan)
        confused = [np.zeros((0, 4), np.int64)]
        for fold in folds:
            places = [rows[image_id] for image_id in fold.image_ids]
            scores[places], class_scores[places] = fold.scores(metric), fold.class_scores(metric)
            if fold.matrices is not None:
                photos, true, predicted = np.nonzero(fold.matrices)
                pixels = fold.matrices[photos, true, predicted]
                confused.append(np.stack([np.array(places)[photos], true, predicted, pixels], axis=1))
        counts = np.concatenate([fold.counts for fold in folds])
        matrices = [fold.matrices for fold in folds if fold.matrices is not None]
        confusion = sum(matrix.sum(0, dtype=np.int64) for matrix in matrices) if matrices else None
        known = metric.known(counts)
        return SourceScores(scores, class_scores, counts[known], confusion, np.concatenate(confused))

    return cached(('source', *key_of(paths), state_of(coco)), compute)


def compare_sources(sources: dict[str, list[Path]], coco: CocoSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the (N,) share of each photo's pixels on which the sources differ, nan for a photo that none
    has, and the (N, K) pixels of each class in their vote, or of two sources, which cannot vote, in the one
    with more of it. Raises BadInput.
    """

    num_classes = len(coco.competition.classes)

    def compute() -> tuple[np.ndarray, np.ndarray]:
        disagreement = np.full(len(coco.photos), np.nan)
        pixels = np.zeros((len(coco.photos), num_classes), np.int64)
        for row, photo in enumerate(progress_bar(coco.photos, f'Comparing {", ".join(sources)}')):
            found = (read_prediction(paths, photo.file_name, coco) for paths in sources.values())
            preds = [pred for pred in found if pred is not None]
            if preds:
                disagreement[row] = differing(preds).mean()
                winners = [vote_of(preds, num_classes)] if len(preds) > 2 else preds
                pixels[row] = np.max([count_classes(mask, num_classes) for mask in winners], axis=0)
        return disagreement, pixels

    paths = [path for csvs in sources.values() for path in csvs]
    return cached(('agreement', *key_of(paths), state_of(coco)), compute)


def count_classes(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each class in (H, W) ids or (K, H, W) planes: (K,)."""
    planes = mask if mask.ndim == 3 else mask == np.arange(num_classes)[:, None, None]
    return np.count_nonzero(planes, axis=(1, 2))


def key_of(paths: Sequence[Path]) -> tuple[tuple[Path, int], ...]:
    return tuple((path, modified(path)) for path in paths)


def cached(key: tuple, compute: Callable[[], T]) -> T:
    """Return the result for a key, computed once; unlike st.cache_data, `compute` may draw a progress bar."""
    results = _results()
    if key not in results:
        results[key] = compute()
        while len(results) > CACHE_SIZE:
            results.pop(next(iter(results)))
    return results[key]


@st.cache_resource
def _results() -> dict[tuple, Any]:
    return {}


def progress_bar(items: Sequence[T], text: str) -> Iterator[T]:
    """Yield the items under a progress bar on the page, which disappears at the end."""
    element = st.empty()
    try:
        for number, item in enumerate(items):
            if number % 50 == 0:
                label = f'{text}: {number:,} of {len(items):,} photos'
                element.progress(number / len(items), escape_markdown(label))
            yield item
    finally:
        element.empty()


def escape_markdown(text: str) -> str:
    """Escape a text, such as a file name, so that Markdown shows it as it is."""
    return re.sub(r'([\\`*_{}\[\]()<>#+\-.!|~$:&])', r'\\\1', text)


def show_faults(paths: Iterable[Path]) -> None:
    """Warn of CSVs whose best.pt has changed since they were made, or whose origin cannot be read."""
    try:
        for fault in list_faults(paths):
            st.warning(escape_markdown(fault))
    except BadInput as error:
        show_error(error)


def show_error(error: BadInput) -> None:
    st.error(escape_markdown(str(error)))
