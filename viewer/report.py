"""The report of a run as one HTML file that can be mailed: scores out of fold with intervals, curves,
confusion, the best and the worst photos, a gallery of each class, what the ensemble did.

    python viz.py report --name convnext        # output/convnext/report.html

Of the folds that have an oof.csv. A photo's score is its mean IoU over the classes in truth or prediction.
"""

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import dump_config
from data.coco import CocoSet, Photo, draw_mask, read_coco, read_photo
from engine.runs import FoldRun, read_runs
from metrics import (
    DRAWS,
    LEVEL,
    Interval,
    by_class,
    class_iou,
    confusion_matrix,
    image_counts,
    interval,
    iou_of_counts,
    mean_iou,
    pixel_accuracy,
)
from submission import SubmissionReader, downsample_mask
from utils.errors import BadInput
from utils.plotting import comparison_row, draw_confusion, draw_curves, sheet
from utils.progress import progress
from viewer.html_page import html_picture, html_table, write_page
from voting.recipe import score_ensemble

SHOWN = 8  # photos among the worst, and among the best
GALLERY = 4  # photos of a class: half of them the worst, half the best
LEAST = 256  # pixels of a class in the truth of a photo of its gallery


@dataclass(frozen=True)
class Scored:
    """A photo out of fold and the mean IoU over the classes that are in its truth or its prediction."""

    score: float
    photo: Photo
    fold: int
    counts: np.ndarray  # (3, K), metrics.image_counts


def main(name: str, output: Path, data: Path | None = None) -> Path:
    """Writes output/<name>/report.html and returns it. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    data = data or cfg.data_root
    coco = read_coco(data, 'train', cfg.classes)
    scored, confusions = score_photos(runs, coco, len(cfg.classes))
    ranked = sorted(scored, key=lambda one: (one.score, one.photo.file_name))
    number = min(SHOWN, (len(ranked) + 1) // 2)  # no photo is among the worst and among the best
    parts = [f'<h2>IoU out of fold</h2><p>mIoU {score_text(scored)}</p>']
    parts.append(score_table(scored, confusions, cfg.classes))
    curves = draw_curves({'loss': curve(runs, 'loss'), 'mIoU': curve(runs, 'miou')})
    parts.append(html_picture('Curves', curves))
    parts.append(html_picture('Confusion', draw_confusion(sum(confusions.values()), cfg.classes)))
    for title, chosen in (('worst', ranked[:number]), ('best', ranked[::-1][:number])):
        if chosen:
            picture = draw_photos(chosen, runs, coco, cfg.classes)
            parts.append(html_picture(f'The {title} photos', picture, photos=True))
    parts += ensemble_parts(output / 'ensemble.yaml', data, cfg.classes)
    parts += gallery_parts(scored, runs, coco, cfg.classes)
    config = html.escape(dump_config(cfg))
    parts.append(f'<h2>Config</h2><details><summary>every key</summary><pre>{config}</pre></details>')
    path = output / name / 'report.html'
    write_page(path, name, parts)
    print(f'{name}: out of fold, {len(runs)} folds: mIoU {score_text(scored)}')
    print(f'wrote {path}, {path.stat().st_size / 1e6:.1f} MB: one file that can be mailed')
    return path


@dataclass(frozen=True)
class OofPhoto:
    """A photo out of fold: its row in the fold's oof.csv, its truth and its prediction, (256, 256) both."""

    photo: Photo
    row: int
    truth: np.ndarray
    pred: np.ndarray


def oof_photos(run: FoldRun, photos: dict[str, Photo], num_classes: int) -> Iterator[OofPhoto]:
    """The photos of a fold's oof.csv, which are taken out of `photos`. Raises BadInput."""
    path = run.folder / 'oof.csv'
    with SubmissionReader(path, num_classes) as reader:
        for row, image_id in enumerate(progress(reader.image_ids, f'fold {run.number}', 'photo')):
            photo = photos.pop(image_id, None)
            if photo is None:
                raise BadInput(
                    f'{path}: image {image_id!r} is none of the training photos, or is out of fold in '
                    'another fold too'
                )
            yield OofPhoto(photo, row, downsample_mask(draw_mask(photo)), reader.read(image_id))


def score_photos(
    runs: list[FoldRun], coco: CocoSet, num_classes: int
) -> tuple[list[Scored], dict[int, np.ndarray]]:
    """Every photo out of fold with its score, and the (K, K) confusion of each fold. Raises BadInput."""
    photos = {photo.file_name: photo for photo in coco.photos}
    scored: list[Scored] = []
    confusions: dict[int, np.ndarray] = {}
    for run in runs:
        confusions[run.number] = np.zeros((num_classes, num_classes), np.int64)
        for one in oof_photos(run, photos, num_classes):
            confusion = confusion_matrix(one.truth, one.pred, num_classes)
            confusions[run.number] += confusion
            if confusion.any():
                counts = image_counts(confusion)
                scored.append(Scored(mean_iou(confusion), one.photo, run.number, counts))
    if not scored:
        raise BadInput(f'{runs[0].folder.parent}: all pixels of its photos out of fold are ignored')
    return scored, confusions


def draw_photos(
    chosen: list[Scored], runs: list[FoldRun], coco: CocoSet, classes: tuple[str, ...], k: int | None = None
) -> np.ndarray:
    """A sheet of photo, truth and prediction; with the IoU of class k, or mIoU where it is None."""
    folders = {run.number: run.folder for run in runs}
    rows = []
    for one in chosen:
        with SubmissionReader(folders[one.fold] / 'oof.csv', len(classes)) as reader:
            pred = reader.read(one.photo.file_name)
        truth = downsample_mask(draw_mask(one.photo))
        row = comparison_row(one.photo.file_name, read_photo(coco, one.photo), truth, pred)
        if k is not None:
            row = replace(row, note=f'IoU {iou_of_counts(*one.counts)[k]:.2f}')
        rows.append(row)
    return sheet(rows, ['photo', 'truth', 'prediction'], classes)


def curve(runs: list[FoldRun], key: str) -> dict[str, list[tuple[float, float]]]:
    """The (epoch, value) points of each fold; epochs count from 1, as in the log."""
    return {
        f'fold {run.number}': [(row['epoch'] + 1, row[key]) for row in run.metrics if math.isfinite(row[key])]
        for run in runs
    }


def gallery_parts(
    scored: list[Scored], runs: list[FoldRun], coco: CocoSet, classes: tuple[str, ...]
) -> list[str]:
    """Of each class but the background a sheet of photos that have it, of the lowest and the highest IoU."""
    parts = []
    for k, name in enumerate(classes[1:], start=1):
        own = [one for one in scored if one.counts[2, k] >= LEAST]
        own.sort(key=lambda one: (iou_of_counts(*one.counts)[k], one.photo.file_name))
        chosen = own if len(own) <= GALLERY else own[: GALLERY // 2] + own[-(GALLERY // 2) :]
        if chosen:
            picture = draw_photos(chosen, runs, coco, classes, k)
            shown_of = f'{name}: {len(chosen)} of {len(own)} photos, from the lowest IoU to the highest'
            parts.append(html_picture(shown_of, picture, photos=True))
    return parts


def ensemble_parts(path: Path, data: Path, classes: tuple[str, ...]) -> list[str]:
    """What the ensemble of ensemble.yaml did, or why that cannot be said; nothing where there is none."""
    if not path.exists():
        return []
    title = '<h2>What the ensemble did</h2>'
    try:
        found = score_ensemble(path, data, classes)
    except BadInput as error:
        print(f'without the ensemble: {error}')
        return [title, f'<p>{html.escape(str(error))}</p>']
    gain = found.gain()
    said = (
        f'{found.rule.capitalize()} of {len(found.names)} models on {found.counts.shape[1]} photos out of '
        f'fold: {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) above its best model, '
        f'{found.names[found.best]}. Its weights were chosen on these photos, so that this is a little '
        'hopeful.'
    )
    tables = html_table(found.lines()) + html_table(found.class_lines(classes))
    return [title, f'<p>{html.escape(said)}</p>', tables]


def score_text(scored: list[Scored]) -> str:
    """The mIoU of all photos with its interval."""
    score = interval(np.stack([one.counts for one in scored]))
    return f'{score} on {len(scored)} photos: the bracket has {LEVEL:.0%} of {DRAWS:,} draws of them'


def bracket(one: Interval) -> str:
    """The ends of an interval; - where there is none."""
    return '-' if math.isnan(one.low) else f'{shown(one.low)} to {shown(one.high)}'


def score_table(scored: list[Scored], confusions: dict[int, np.ndarray], classes: tuple[str, ...]) -> str:
    """The IoU of each class over all folds, with its interval, and in each fold, as an HTML table."""
    total = sum(confusions.values())
    folds = {f'fold {k}': counts for k, counts in confusions.items()}
    ious = {title: class_iou(counts) for title, counts in folds.items()}
    counts = np.stack([one.counts for one in scored])  # (n, 3, K)
    intervals, whole = by_class(counts), interval(counts)
    photos = np.count_nonzero(counts[:, 2], axis=0)
    lines = [['class', 'all folds', f'{LEVEL:.0%} interval', *folds, 'share of pixels', 'photos']]
    for k, (name, one) in enumerate(zip(classes, intervals, strict=True)):
        lines.append([name, shown(one.value), bracket(one), *[shown(iou[k]) for iou in ious.values()]])
        lines[-1] += [f'{total[k].sum() / max(1, total.sum()):.2%}', str(photos[k])]
    means = [shown(mean_iou(counts)) for counts in folds.values()]
    lines.append(['mIoU', shown(whole.value), bracket(whole), *means, '', str(len(counts))])
    right = [shown(pixel_accuracy(counts)) for counts in (total, *folds.values())]
    lines.append(['pixel accuracy', right[0], '', *right[1:], '', ''])
    return html_table(lines, total='mIoU')


def shown(value: float) -> str:
    """A score for a table; a dash where there is none."""
    return '-' if math.isnan(value) else f'{value:.4f}'
