"""List likely label errors: labels that a model which never saw them disagrees with, as a page of pictures.

    python viz.py suspects --name convnext      # output/convnext/suspects/index.html, and suspects.csv

It covers the folds that have an oof.csv. A suspect is a class in a photo; EXPLANATION, below, says which.

Shapes: K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.coco import CocoSet, Photo, read_coco, scored_truth
from engine.runs import FoldRun, read_runs
from metrics import IGNORED
from submission import open_probs
from utils.errors import plural
from utils.files import write_sheet
from viewer.html_page import Section, html_table, write_page
from viewer.report import PhotoFigures, read_confusions_of
from voting.origin import list_faults

LISTED = 60  # suspects in the table
DRAWN = 6  # photos of a class and kind, or more if more are in the table
GROUPS = 40  # classes and kinds that have photos
MIN_PIXELS = 64  # of a suspect
EXPLANATION = (
    'A model that never saw these labels disagrees with them. <b>Missing</b>: it sees the class {where}, '
    'perhaps a hole in the annotation. <b>Doubtful</b>: the class is labelled and the model sees '
    'something else. <b>Strength</b>: the number of such pixels; if probabilities were saved, each counts by '
    'the probability of the prediction minus that of the label. The model may be wrong: look before you '
    'change a label. suspects.csv lists all of them.'
)

Kind = Literal['missing', 'doubtful']


@dataclass(frozen=True)
class Suspect:
    """A class in a photo whose label the model disagrees with, and the oof.csv that has the prediction."""

    photo: Photo
    csv: Path
    fold: int
    kind: Kind
    class_id: int
    pixels: int
    strength: float


def main(name: str, output: Path, data: Path | None = None) -> Path:
    """Write output/<name>/suspects/ and return its index.html. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    coco = read_coco(data or cfg.data_root, 'train', cfg.competition)
    suspects = sorted(find_suspects(runs, coco), key=lambda suspect: -suspect.strength)
    folder = output / name / 'suspects'
    write_suspects(folder / 'suspects.csv', suspects, cfg.classes)
    write_html(folder / 'index.html', name, suspects, coco)
    photos = len({suspect.photo.file_name for suspect in suspects})
    print(*(f'warning: {fault}\n' for fault in list_faults(run.oof_csv for run in runs)), sep='', end='')
    print(f'{name}: {len(suspects)} suspects in {photos} photos; wrote {folder / "index.html"}, suspects.csv')
    return folder / 'index.html'


def find_suspects(runs: list[FoldRun], coco: CocoSet) -> Iterator[Suspect]:
    """Find the suspects of MIN_PIXELS or more in every photo out of fold. Raises BadInput."""
    photos, form = {photo.file_name: photo for photo in coco.photos}, coco.form
    for run, fold in zip(runs, read_confusions_of(runs, coco), strict=True):
        with form.reader(run.oof_csv) as reader:
            probs = open_probs(reader, form) if (run.folder / 'oof_probs.npy').exists() else None
            for row, image_id in enumerate(fold.image_ids):
                matrix = None if fold.matrices is None else fold.matrices[row]
                found = [one for one in disagreements(fold.counts[row], matrix) if one[2] >= MIN_PIXELS]
                strengths = [float(pixels) for *_, pixels in found]
                photo = photos[image_id]
                if probs is not None and found:
                    truth = scored_truth(photo, coco.competition)
                    strengths = weigh(found, truth, reader.read(image_id), probs[row])
                for (kind, k, pixels), strength in zip(found, strengths, strict=True):
                    yield Suspect(photo, run.oof_csv, run.fold, kind, k, pixels, strength)


def disagreements(counts: np.ndarray, matrix: np.ndarray | None) -> list[tuple[Kind, int, int]]:
    """List (kind, class, pixels) of each class that is missing or doubtful, from (3, K) image_counts and the
    (K, K) confusion matrix; without one classes may overlap.
    """
    hits, predicted, true = counts
    missing, doubtful = predicted - hits if matrix is None else matrix[0].copy(), true - hits
    if matrix is not None:
        missing[0] = doubtful[0] = 0  # the background
    return [
        (kind, int(k), int(pixels[k]))
        for kind, pixels in (('missing', missing), ('doubtful', doubtful))
        for k in np.flatnonzero(pixels)
    ]


def weigh(
    found: list[tuple[Kind, int, int]], truth: np.ndarray, pred: np.ndarray, probs: np.ndarray
) -> list[float]:
    """Sum, for each disagreement, how much likelier than the label the prediction is; probs (K, h, w)."""
    if truth.ndim == 3:
        return [_weigh_plane(kind, truth[k], pred[k], probs[k]) for kind, k, _ in found]
    label = np.where(truth == IGNORED, 0, truth)
    of_pred, of_label = (np.take_along_axis(probs, ids[None].astype(np.intp), 0)[0] for ids in (pred, label))
    excess = np.clip(of_pred.astype(float) - of_label, 0, None) / 255
    wrong = (pred != truth) & (truth != IGNORED)
    strengths = []
    for kind, k, _ in found:
        pixels = (truth == 0) & (pred == k) if kind == 'missing' else truth == k
        strengths.append(float(excess[wrong & pixels].sum()))
    return strengths


def _weigh_plane(kind: Kind, truth: np.ndarray, pred: np.ndarray, prob: np.ndarray) -> float:
    """Sum how much likelier than the label the prediction of a class that may overlap is; prob (h, w)."""
    label = int(kind == 'doubtful')
    excess = prob[(truth == label) & (pred == 1 - label)].astype(float) * (2 / 255) - 1
    return float(np.clip(-excess if label else excess, 0, None).sum())


def write_suspects(path: Path, suspects: list[Suspect], classes: tuple[str, ...]) -> None:
    """Write a table of suspects."""
    rows = [('file_name', 'fold', 'kind', 'class', 'pixels', 'strength')]
    for suspect in suspects:
        row = (suspect.photo.file_name, suspect.fold, suspect.kind, classes[suspect.class_id], suspect.pixels)
        rows.append((*row, f'{suspect.strength:.1f}'))
    write_sheet(path, rows)


def write_html(path: Path, name: str, suspects: list[Suspect], coco: CocoSet) -> None:
    """Write a page: a table of the strongest suspects, then photos of each class and kind."""
    competition = coco.competition
    classes = competition.classes
    where = 'where it is not labelled' if competition.is_multilabel else 'on labelled background'
    listed = suspects[:LISTED]
    groups: dict[str, list[Suspect]] = {}
    for suspect in suspects:
        groups.setdefault(f'{classes[suspect.class_id]}: {suspect.kind}', []).append(suspect)
    with PhotoFigures(coco, ('photo', 'label', 'prediction')) as figures:
        sections = [
            photo_section(title, group, listed, figures) for title, group in [*groups.items()][:GROUPS]
        ]
        links = {(file_name, 'photo'): address for file_name, address in figures.links().items()}
    lines = [['photo', 'class', 'kind', 'pixels', 'strength', 'fold']]
    for suspect in listed:
        row = [suspect.photo.file_name, classes[suspect.class_id], suspect.kind, f'{suspect.pixels:,}']
        lines.append([*row, f'{suspect.strength:,.0f}', str(suspect.fold)])
    title = f'The strongest {len(listed)} of {len(suspects)}'
    sections.insert(0, Section(title, html_table(lines, links=links)))
    intro = f'<p>{EXPLANATION.format(where=where)}</p>'
    write_page(path, f'{name}: likely label errors', intro, sections)


def photo_section(
    title: str, suspects: list[Suspect], listed: list[Suspect], figures: PhotoFigures
) -> Section:
    """Show the photos of the strongest suspects of one class and kind, and of all that the table lists."""
    made = [
        figures.make(one.photo, one.csv, f'{one.pixels:,} px, strength {one.strength:,.0f}')
        for number, one in enumerate(suspects)
        if number < DRAWN or one in listed
    ]
    note = f'<p>{len(made)} of {plural(len(suspects), "photo")}</p>'
    return Section(title, f'{note}<div class="photos">{"".join(made)}</div>')
