"""What the app reads and keeps: photos, CSVs, and what was counted of them. Only what is shown is loaded:
of a CSV the places of its rows, then the rows.

A source is a run's CSVs of one split, by the name that the pages give it.

Shapes: N photos of a split, K classes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from data.coco import CocoSet, annotation_files, read_coco, read_labels
from evaluate import Confusions, read_confusions
from metrics import mean_of_iou
from submission import PIXELS, SubmissionReader
from utils.errors import BadInput
from voting.hard import member_table, vote
from voting.members import member_of

T = TypeVar('T')
KEPT = 64  # results of counting in memory: 4,000 photos of 11 classes are 2 MB


def find_sources(output: Path, split: str) -> dict[str, list[Path]]:
    """The CSVs of a split by what the pages call them: out of fold, a run's folds together."""
    sources: dict[str, list[Path]] = {}
    if split == 'train':
        for path in sorted(output.glob('*/fold*/oof.csv')):
            sources.setdefault(path.parent.parent.name, []).append(path)
        for path in sorted(output.glob('*/oof.csv')):
            sources.setdefault(path.parent.name, [path])
        return dict(sorted(sources.items()))
    for pattern in ('*.csv', '*/test.csv', '*/*/test.csv'):
        for path in sorted(output.glob(pattern)):
            title = path.relative_to(output) if path.parent == output else path.parent.relative_to(output)
            sources[str(title)] = [path]
    return sources


def fold_of(path: Path) -> int | None:
    """The fold of <run>/fold<k>/oof.csv."""
    return member_of(path).fold


def read_prediction(paths: Sequence[Path], image_id: str, num_classes: int) -> np.ndarray | None:
    """(256, 256) ids of an image, from the first CSV that has it; None where none has. Raises BadInput."""
    path = csv_with(paths, image_id, num_classes)
    return None if path is None else open_csv(path, modified(path), num_classes).read(image_id)


def csv_with(paths: Sequence[Path], image_id: str, num_classes: int) -> Path | None:
    """The first CSV that has a row of an image. Raises BadInput."""
    return next((p for p in paths if image_id in open_csv(p, modified(p), num_classes).rows), None)


def vote_of(preds: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """The class that most predictions say; a tie goes to the first of them."""
    said = np.stack(preds)
    winner = said[0].copy()
    open_pixels = (said[1:] != said[0]).any(0)  # elsewhere all agree
    winner[open_pixels] = vote(said[:, open_pixels], member_table([1] * len(said), num_classes))
    return winner


def load_coco(data: Path, split: str, classes: tuple[str, ...], labels: Path | None = None) -> CocoSet:
    """A split's photos, kept while its files are the same; test photos with the annotations of
    `labels`, where that is given. Raises BadInput.
    """
    labels = labels if split == 'test' else None
    files = [*annotation_files(data, split), *([labels] if labels else [])]
    return _load_coco(data, split, classes, labels, tuple(modified(path) for path in files))


@st.cache_resource(max_entries=4, show_spinner='Reading annotations')
def _load_coco(
    data: Path, split: str, classes: tuple[str, ...], labels: Path | None, times: tuple[int, ...]
) -> CocoSet:
    coco = read_coco(data, split, classes)
    return coco if labels is None else with_truth(coco, labels, classes)


def with_truth(coco: CocoSet, labels: Path, classes: tuple[str, ...]) -> CocoSet:
    """The photos with the annotations that a file has for them. Raises BadInput where it lacks a photo."""
    found = read_labels(labels, classes)
    truths = {(photo.file_name, photo.height, photo.width): photo.annotations for photo in found.photos}
    photos = []
    for photo in coco.photos:
        key = (photo.file_name, photo.height, photo.width)
        if key not in truths:
            shown = f'{photo.file_name!r} of {photo.width}x{photo.height}'
            raise BadInput(f'{labels}: has no image {shown}, which {coco.files[0]} has')
        photos.append(replace(photo, annotations=truths[key]))
    return replace(coco, photos=tuple(photos), fingerprint=coco.fingerprint + found.fingerprint)


@st.cache_resource(max_entries=128, show_spinner='Looking for the rows of a CSV')
def open_csv(path: Path, time: int, num_classes: int) -> SubmissionReader:
    """A reader, kept while the file is the same: it holds places of rows, not rows. Raises BadInput."""
    return SubmissionReader(path, num_classes).__enter__()


def modified(path: Path) -> int:
    """When a file was last written, as part of the key of what is kept of it. Raises BadInput."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


# --- counted over all photos: once, with a bar -------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A source on photos whose truth is known, in their order; those that it lacks are nan."""

    scores: np.ndarray  # (N,) mean IoU over the classes in truth or prediction
    ious: np.ndarray  # (N, K)
    counts: np.ndarray  # (n, 3, K) metrics.image_counts of the n photos that it has
    confusion: np.ndarray  # (K, K)


@dataclass(frozen=True)
class Together:
    """What sources say of the split's photos, in their order; nan and 0 where none has a photo."""

    differ: np.ndarray  # (N,) share of the pixels on which not all sources agree
    pixels: np.ndarray  # (N, K) of the vote


def count_source(title: str, paths: Sequence[Path], coco: CocoSet, num_classes: int) -> Counted:
    """A source's scores. Raises BadInput, also where two CSVs have the same photo."""

    def make(bar: Callable[[Sequence[T], str], Iterator[T]]) -> Counted:
        places = {photo.file_name: place for place, photo in enumerate(coco.photos)}
        ious = np.full((len(places), num_classes), np.nan)
        found: dict[str, Path] = {}
        every: list[Confusions] = []
        for number, path in enumerate(paths, start=1):
            text = f'Counting {title}, {number} of {len(paths)}'
            one = read_confusions(path, coco, num_classes, lambda ids, text=text: bar(ids, text))
            for image_id in one.image_ids:
                if image_id in found:
                    raise BadInput(f'{path}: image {image_id!r} is out of fold in {found[image_id]} too')
                found[image_id] = path
            ious[[places[image_id] for image_id in one.image_ids]] = one.ious()
            every.append(one)
        counts = np.concatenate([one.counts() for one in every])
        confusion = sum(one.matrices.sum(0, dtype=np.int64) for one in every)
        return Counted(mean_of_iou(ious), ious, counts[counts.any((1, 2))], confusion)

    return remember(('source', *key_of(paths), coco.fingerprint), make)


def count_together(sources: dict[str, list[Path]], coco: CocoSet, num_classes: int) -> Together:
    """Where the sources differ, and what their vote has. Raises BadInput."""

    def make(bar: Callable[[Sequence[T], str], Iterator[T]]) -> Together:
        differ = np.full(len(coco.photos), np.nan)
        pixels = np.zeros((len(coco.photos), num_classes), np.int64)
        for place, photo in enumerate(bar(coco.photos, f'Comparing {", ".join(sources)}')):
            found = (read_prediction(paths, photo.file_name, num_classes) for paths in sources.values())
            preds = [pred for pred in found if pred is not None]
            if preds:
                differ[place] = np.count_nonzero((np.stack(preds) != preds[0]).any(0)) / PIXELS
                pixels[place] = np.bincount(vote_of(preds, num_classes).ravel(), minlength=num_classes)
        return Together(differ, pixels)

    paths = [path for own in sources.values() for path in own]
    return remember(('together', *key_of(paths), coco.fingerprint), make)


def key_of(paths: Sequence[Path]) -> tuple[tuple[Path, int], ...]:
    return tuple((path, modified(path)) for path in paths)


def remember(key: tuple, make: Callable[..., T]) -> T:
    """What `make(bar)` makes, or has made before for this key; bar(items, text) is as tqdm, on the page."""
    kept = _kept()
    if key not in kept:
        kept[key] = make(progress_bar)
        while len(kept) > KEPT:
            kept.pop(next(iter(kept)))
    return kept[key]


@st.cache_resource
def _kept() -> dict[tuple, Any]:
    return {}


def progress_bar(items: Sequence[T], text: str) -> Iterator[T]:
    """The items, with a bar on the page that goes when they are done."""
    place = st.empty()
    try:
        for number, item in enumerate(items):
            if number % 50 == 0:
                place.progress(number / len(items), plain(f'{text}: {number:,} of {len(items):,} photos'))
            yield item
    finally:
        place.empty()


# --- text --------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text for a place that takes Markdown, so that it is shown as it is: a file name may hold anything."""
    return re.sub(r'([\\`*_{}\[\]()<>#+\-.!|~$:&])', r'\\\1', text)


def show_error(error: BadInput) -> None:
    st.error(plain(str(error)))
