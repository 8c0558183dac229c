"""Write the report of a run as one HTML file that can be mailed: scores out of fold with intervals, curves,
the confusion matrix, the best and the worst photos, a gallery of each class, and what the ensemble changed.

    python viz.py report --name convnext        # output/convnext/report.html

It covers the folds that have an oof.csv. The score of a photo is its mean IoU over the classes in its truth
or its prediction.

Shapes: n photos, K classes.
"""

import html
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Competition, dump_config
from data.coco import CocoSet, Photo, draw_mask, read_coco, read_photo
from engine.runs import FoldRun, read_runs
from evaluate import Confusions, read_fold_confusions
from metrics import LEVEL, by_class, class_iou, interval, iou_of_counts, mean_iou, pixel_accuracy
from submission import SubmissionReader, downsample_mask
from utils.errors import BadInput
from utils.plotting import Row, comparison_row, draw_confusion, draw_curves, sheet
from utils.progress import progress
from viewer.html_page import format_interval, format_score, html_picture, html_table, write_page
from voting.recipe import score_ensemble

RANKED = 8  # photos among the worst, and among the best
GALLERY = 4  # photos of a class: half of them the worst, half the best
MIN_PIXELS = 256  # of a class in the truth of a photo of its gallery


@dataclass(frozen=True)
class ScoredPhoto:
    """A photo out of fold, the oof.csv that has its prediction, its score and its counts."""

    photo: Photo
    csv: Path
    score: float
    counts: np.ndarray  # (3, K), metrics.image_counts


def main(name: str, output: Path, data: Path | None = None) -> Path:
    """Write output/<name>/report.html and return its path. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    data = data or cfg.data_root
    coco = read_coco(data, 'train', cfg.competition)
    folds = read_confusions_of(runs, coco, len(cfg.classes))
    scored = score_photos(runs, folds, coco)
    matrices = {run.fold: fold.matrices.sum(0, dtype=np.int64) for run, fold in zip(runs, folds, strict=True)}
    parts = [f'<h2>IoU out of fold</h2><p>mIoU {score_text(scored)}</p>']
    parts.append(score_table(scored, matrices, cfg.classes))
    curves = draw_curves({'loss': curve(runs, 'loss'), 'mIoU': curve(runs, 'miou')})
    parts.append(html_picture('Curves', curves))
    parts.append(html_picture('Confusion matrix', draw_confusion(sum(matrices.values()), cfg.classes)))
    parts += ranking_parts(scored, coco, cfg.classes)
    parts += ensemble_parts(output / 'ensemble.yaml', data, cfg.competition)
    parts += gallery_parts(scored, coco, cfg.classes)
    config = html.escape(dump_config(cfg))
    parts.append(f'<h2>Config</h2><details><summary>every key</summary><pre>{config}</pre></details>')
    path = output / name / 'report.html'
    write_page(path, name, parts)
    folds = '1 fold' if len(runs) == 1 else f'{len(runs)} folds'
    print(f'{name}: {folds}: out-of-fold mIoU {score_text(scored)}')
    print(f'wrote {path}, {path.stat().st_size / 1e6:.1f} MB: one file that can be mailed')
    return path


def read_confusions_of(runs: list[FoldRun], coco: CocoSet, num_classes: int) -> list[Confusions]:
    """Read or count the confusions of each fold, under a progress bar. Raises BadInput."""
    return read_fold_confusions(
        [run.oof_csv for run in runs],
        coco,
        num_classes,
        lambda image_ids, path: progress(image_ids, path.parent.name, 'photo'),
    )


def score_photos(runs: list[FoldRun], folds: list[Confusions], coco: CocoSet) -> list[ScoredPhoto]:
    """Score every photo out of fold that has pixels with a known class. Raises BadInput if none has."""
    photos = {photo.file_name: photo for photo in coco.photos}
    scored = [
        ScoredPhoto(photos[image_id], run.oof_csv, float(score), counts)
        for run, fold in zip(runs, folds, strict=True)
        for image_id, score, counts in zip(fold.image_ids, fold.scores(), fold.counts(), strict=True)
        if counts.any()
    ]
    if not scored:
        raise BadInput(f'{runs[0].folder.parent}: all pixels of its photos out of fold are ignored')
    return scored


def score_text(scored: list[ScoredPhoto]) -> str:
    """Format the mIoU of all photos with its interval."""
    score = interval(np.stack([one.counts for one in scored]))
    return f'{score} ({LEVEL:.0%} bootstrap interval) on {len(scored)} photos'


def score_table(scored: list[ScoredPhoto], matrices: dict[int, np.ndarray], classes: tuple[str, ...]) -> str:
    """Make a table of the IoU of each class over all folds, with its interval, and in each fold."""
    total = sum(matrices.values())
    ious = [class_iou(matrix) for matrix in matrices.values()]
    counts = np.stack([one.counts for one in scored])  # (n, 3, K)
    photos = np.count_nonzero(counts[:, 2], axis=0)
    folds = [f'fold {fold}' for fold in matrices]
    lines = [['class', 'all folds', f'{LEVEL:.0%} interval', *folds, 'share of pixels', 'photos']]
    for k, (name, iou) in enumerate(zip(classes, by_class(counts), strict=True)):
        fold_ious = [format_score(fold_iou[k]) for fold_iou in ious]
        share = f'{total[k].sum() / max(1, total.sum()):.2%}'
        lines.append([name, format_score(iou.value), format_interval(iou), *fold_ious, share, str(photos[k])])
    score = interval(counts)
    means = [format_score(mean_iou(matrix)) for matrix in matrices.values()]
    lines.append(['mIoU', format_score(score.value), format_interval(score), *means, '', str(len(counts))])
    accuracies = [format_score(pixel_accuracy(matrix)) for matrix in (total, *matrices.values())]
    lines.append(['pixel accuracy', accuracies[0], '', *accuracies[1:], '', ''])
    return html_table(lines, total='mIoU')


def curve(runs: list[FoldRun], key: str) -> dict[str, list[tuple[float, float]]]:
    """List the (epoch, value) points of each fold; epochs count from 1, as in the log."""
    return {
        f'fold {run.fold}': [(row['epoch'] + 1, row[key]) for row in run.metrics if math.isfinite(row[key])]
        for run in runs
    }


def photo_row(coco: CocoSet, photo: Photo, csv: Path, num_classes: int) -> Row:
    """Make the row of a sheet with a photo, its truth, and its prediction in a CSV. Raises BadInput."""
    with SubmissionReader(csv, num_classes) as reader:
        pred = reader.read(photo.file_name)
    truth = downsample_mask(draw_mask(photo))
    return comparison_row(photo.file_name, read_photo(coco, photo), truth, pred)


def draw_photos(
    scored: list[ScoredPhoto], coco: CocoSet, classes: tuple[str, ...], k: int | None = None
) -> np.ndarray:
    """Draw a sheet of photo, truth and prediction, with the IoU of class k above each, or its mIoU."""
    rows = []
    for one in scored:
        row = photo_row(coco, one.photo, one.csv, len(classes))
        rows.append(row if k is None else replace(row, note=f'IoU {iou_of_counts(*one.counts)[k]:.2f}'))
    return sheet(rows, ['photo', 'truth', 'prediction'], classes)


def ranking_parts(scored: list[ScoredPhoto], coco: CocoSet, classes: tuple[str, ...]) -> list[str]:
    """Make a sheet of the worst photos and one of the best; no photo is in both."""
    ranked = sorted(scored, key=lambda one: (one.score, one.photo.file_name))
    count = min(RANKED, (len(ranked) + 1) // 2)
    return [
        html_picture(f'The {title} photos', draw_photos(photos, coco, classes), photos=True)
        for title, photos in (('worst', ranked[:count]), ('best', ranked[: count - 1 : -1][:count]))
        if photos
    ]


def gallery_parts(scored: list[ScoredPhoto], coco: CocoSet, classes: tuple[str, ...]) -> list[str]:
    """Make a sheet for each class but the background: photos that have it, of the lowest and highest IoU."""
    parts = []
    for k, name in enumerate(classes[1:], start=1):
        photos = [one for one in scored if one.counts[2, k] >= MIN_PIXELS]
        photos.sort(key=lambda one: (iou_of_counts(*one.counts)[k], one.photo.file_name))
        chosen = photos if len(photos) <= GALLERY else photos[: GALLERY // 2] + photos[-(GALLERY // 2) :]
        if chosen:
            title = f'{name}: {len(chosen)} of {len(photos)} photos, from the lowest IoU to the highest'
            parts.append(html_picture(title, draw_photos(chosen, coco, classes, k), photos=True))
    return parts


def ensemble_parts(path: Path, data: Path, competition: Competition) -> list[str]:
    """Describe what the ensemble in ensemble.yaml changes, or why it cannot be scored; [] without one."""
    if not path.exists():
        return []
    title = '<h2>What the ensemble changes</h2>'
    try:
        ensemble = score_ensemble(path, data, competition)
    except BadInput as error:
        print(f'without the ensemble: {error}')
        return [title, f'<p>{html.escape(str(error))}</p>']
    gain = ensemble.gain()
    text = (
        f'{ensemble.rule.capitalize()} of {len(ensemble.names)} models on {ensemble.counts.shape[1]} photos '
        f'out of fold: {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) above its best model, '
        f'{ensemble.names[ensemble.best]}. Its weights were chosen on these photos, so this is optimistic.'
    )
    tables = html_table(ensemble.lines()) + html_table(ensemble.class_lines(competition.classes))
    return [title, f'<p>{html.escape(text)}</p>', tables]
