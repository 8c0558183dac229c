"""Labels to look at again: where a model that never saw them disagrees most, as a page of pictures.

    python viz.py suspects --name convnext      # output/convnext/suspects/index.html, and suspects.csv

Of the folds that have an oof.csv. A suspect is a class in a photo: 'missing' where the model sees it on what
is labelled background (a hole in the annotation), 'doubtful' where it is labelled and the model sees
something else. Its strength is the number of such pixels of the 256x256 mask, each counted by how much surer
the model is of its own class than of the label, where there is an oof_probs.npy (infer.py --save-probs), and
by 1 where there is none.

Shapes: K classes.
"""

import csv
import io
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np

from data.coco import CocoSet, Photo, draw_mask, read_coco, read_photo
from engine.runs import FoldRun, read_runs
from metrics import IGNORED
from submission import SubmissionReader, downsample_mask, open_probs
from utils.files import write_text
from utils.plotting import comparison_row, sheet
from viewer.html_page import html_picture, html_table, write_page
from viewer.report import oof_photos

LISTED = 60  # suspects in the table
SHOWN = 6  # photos in a class's sheet
LEAST = 64  # pixels of a suspect
EXPLAINED = (
    'A model that never saw these labels disagrees with them. <b>Missing</b>: it sees the class on what is '
    'labelled background, perhaps a hole in the annotation. <b>Doubtful</b>: the class is labelled, and the '
    'model sees something else. <b>Strength</b>: such pixels, each counted by how much surer the model is '
    'of its own class, where its probabilities were saved. The model may be wrong: look before you change a '
    'label. suspects.csv has all.'
)


@dataclass(frozen=True)
class Suspect:
    """A class in a photo, whose label the model disagrees with on so many pixels."""

    photo: Photo
    fold: int
    kind: Literal['missing', 'doubtful']
    category: int
    pixels: int
    strength: float


def main(name: str, output: Path, data: Path | None = None) -> Path:
    """Writes output/<name>/suspects/ and returns its index.html. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    coco = read_coco(data or cfg.data_root, 'train', cfg.classes)
    found = sorted(find_suspects(runs, coco, len(cfg.classes)), key=lambda one: -one.strength)
    folder = output / name / 'suspects'
    write_csv(folder / 'suspects.csv', found, cfg.classes)
    write_html(folder, name, found, runs, coco, cfg.classes)
    photos = len({one.photo.file_name for one in found})
    print(f'{name}: {len(found)} suspects in {photos} photos; wrote {folder / "index.html"}, suspects.csv')
    return folder / 'index.html'


def find_suspects(runs: list[FoldRun], coco: CocoSet, num_classes: int) -> list[Suspect]:
    """Those of LEAST pixels and more, of every photo out of fold. Raises BadInput."""
    photos = {photo.file_name: photo for photo in coco.photos}
    found = []
    for run in runs:
        probs = read_probs(run, num_classes)
        for one in oof_photos(run, photos, num_classes):
            truth, pred = one.truth, one.pred
            surer = np.ones(truth.shape) if probs is None else margin(probs[one.row], pred, truth)
            found += [
                Suspect(one.photo, run.number, kind, category, pixels, strength)
                for kind, category, pixels, strength in disagreements(truth, pred, surer)
                if pixels >= LEAST
            ]
    return found


def read_probs(run: FoldRun, num_classes: int) -> np.ndarray | None:
    """The (n, K, 256, 256) probabilities of a fold's oof.csv, memory-mapped; None where none were saved."""
    if not (run.folder / 'oof_probs.npy').exists():
        return None
    with SubmissionReader(run.folder / 'oof.csv', num_classes) as reader:
        return open_probs(reader, num_classes)


def margin(probs: np.ndarray, pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(256, 256) by how much the probability of the prediction is above that of the label, from 0 to 1, of
    (K, 256, 256) uint8.
    """
    label = np.where(truth == IGNORED, 0, truth)
    own, other = (np.take_along_axis(probs, ids[None].astype(np.intp), 0)[0] for ids in (pred, label))
    return np.clip(own.astype(float) - other, 0, None) / 255


def disagreements(truth: np.ndarray, pred: np.ndarray, surer: np.ndarray) -> list[tuple]:
    """(kind, category, pixels, strength) of each class that is missing in the labels, or doubtful."""
    wrong = (pred != truth) & (truth != IGNORED)
    kinds = (('missing', pred, wrong & (truth == 0)), ('doubtful', truth, wrong & (truth != 0)))
    return [
        (kind, int(category), int(np.count_nonzero(where)), float(surer[where].sum()))
        for kind, ids, some in kinds
        for category in np.unique(ids[some])
        for where in [some & (ids == category)]
    ]


def write_csv(path: Path, found: list[Suspect], classes: tuple[str, ...]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['file_name', 'fold', 'kind', 'class', 'pixels', 'strength'])
    for one in found:
        row = (one.photo.file_name, one.fold, one.kind, classes[one.category], one.pixels)
        writer.writerow((*row, f'{one.strength:.1f}'))
    write_text(path, text.getvalue())


def write_html(
    folder: Path,
    name: str,
    found: list[Suspect],
    runs: list[FoldRun],
    coco: CocoSet,
    classes: tuple[str, ...],
) -> None:
    """index.html: for each kind and class a sheet of pictures, then the strongest suspects in a table."""
    parts = [f'<p>{EXPLAINED}</p>']
    for kind, k in product(('missing', 'doubtful'), range(len(classes))):
        own = [one for one in found if (one.kind, one.category) == (kind, k)][:SHOWN]
        if own:
            picture = draw_suspects(own, runs, coco, classes)
            parts.append(html_picture(f'{classes[k]}: {kind}', picture, photos=True))
    lines = [['photo', 'fold', 'kind', 'class', 'pixels', 'strength']]
    for one in found[:LISTED]:
        row = [one.photo.file_name, str(one.fold), one.kind, classes[one.category]]
        lines.append([*row, f'{one.pixels:,}', f'{one.strength:,.0f}'])
    parts += [f'<h2>The strongest {len(lines) - 1} of {len(found)}</h2>', html_table(lines)]
    write_page(folder / 'index.html', f'{name}: labels to look at again', parts)


def draw_suspects(
    own: list[Suspect], runs: list[FoldRun], coco: CocoSet, classes: tuple[str, ...]
) -> np.ndarray:
    """A sheet of photo, label and prediction."""
    folders = {run.number: run.folder for run in runs}
    rows = []
    for one in own:
        with SubmissionReader(folders[one.fold] / 'oof.csv', len(classes)) as reader:
            pred = reader.read(one.photo.file_name)
        truth = downsample_mask(draw_mask(one.photo))
        row = comparison_row(one.photo.file_name, read_photo(coco, one.photo), truth, pred)
        rows.append(replace(row, note=f'{one.pixels:,} px, strength {one.strength:,.0f}'))
    return sheet(rows, ['photo', 'label', 'prediction'], classes)
