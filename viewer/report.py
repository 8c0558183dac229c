"""Write the report of a run as one HTML file that can be mailed: scores out of fold with intervals, curves,
the confusion matrix, the best and the worst photos, a gallery of each class, and what the ensemble changed.

    python viz.py report --name convnext        # output/convnext/report.html

It covers the folds that have an oof.csv. Scores are those of the competition's metric; that of a photo is the
metric of this photo alone. Classes that may overlap are not confused: they have a table of hits and misses in
place of the matrix.

Shapes: n photos, K classes.
"""

import html
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Competition, dump_config
from data.coco import CocoSet, Photo, read_coco, read_photo, scored_truth
from engine.runs import FoldRun, read_runs
from evaluate import Confusions, read_fold_confusions, second_metric
from metrics import LEVEL, Metric
from submission import Reader, metric_of
from utils.errors import BadInput
from utils.plotting import Row, comparison_row, draw_confusion, draw_curves, score_note, sheet
from utils.progress import progress
from viewer.html_page import format_interval, format_score, html_picture, html_table, write_page
from voting.origin import list_faults
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

    def class_score(self, metric: Metric, k: int) -> float:
        """Return the score of a class in this photo alone."""
        return float(metric.by_class(self.counts[None])[k])


def main(name: str, output: Path, data: Path | None = None) -> Path:
    """Write output/<name>/report.html and return its path. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    data = data or cfg.data_root
    coco, metric = read_coco(data, 'train', cfg.competition), metric_of(cfg.competition)
    folds = read_confusions_of(runs, coco)
    scored = score_photos(runs, folds, coco)
    faults = [*list_faults(run.oof_csv for run in runs)]
    parts = [f'<p><b>{html.escape(fault)}</b></p>' for fault in faults]
    parts += [f'<h2>{metric.class_label} out of fold</h2><p>{metric.label} {score_text(scored, metric)}</p>']
    by_fold = {run.fold: fold.counts for run, fold in zip(runs, folds, strict=True)}
    parts.append(score_table(scored, by_fold, cfg.competition))
    curves = draw_curves({'loss': curve(runs, 'loss'), metric.label: curve(runs, 'score')})
    parts.append(html_picture('Curves', curves))
    parts += confusion_parts(folds, cfg.classes)
    with PhotoRows(coco) as photo_rows:
        parts += ranking_parts(scored, photo_rows)
        parts += ensemble_parts(output / 'ensemble.yaml', data, cfg.competition)
        parts += gallery_parts(scored, photo_rows)
    config = html.escape(dump_config(cfg))
    parts.append(f'<h2>Config</h2><details><summary>every key</summary><pre>{config}</pre></details>')
    path = output / name / 'report.html'
    write_page(path, name, parts)
    folds = '1 fold' if len(runs) == 1 else f'{len(runs)} folds'
    print(*(f'warning: {fault}\n' for fault in faults), sep='', end='')
    print(f'{name}: {folds}: out-of-fold {metric.label} {score_text(scored, metric)}')
    print(f'wrote {path}, {path.stat().st_size / 1e6:.1f} MB: one file that can be mailed')
    return path


def read_confusions_of(runs: list[FoldRun], coco: CocoSet) -> list[Confusions]:
    """Read or count the confusions of each fold, under a progress bar. Raises BadInput."""
    return read_fold_confusions(
        [run.oof_csv for run in runs],
        coco,
        lambda image_ids, path: progress(image_ids, path.parent.name, 'photo'),
    )


def score_photos(runs: list[FoldRun], folds: list[Confusions], coco: CocoSet) -> list[ScoredPhoto]:
    """Score every photo out of fold that has pixels with a known class. Raises BadInput if none has."""
    photos, metric = {photo.file_name: photo for photo in coco.photos}, metric_of(coco.competition)
    scored = [
        ScoredPhoto(photos[image_id], run.oof_csv, float(score), counts)
        for run, fold in zip(runs, folds, strict=True)
        for image_id, score, counts in zip(fold.image_ids, fold.scores(metric), fold.counts, strict=True)
        if metric.known(counts)
    ]
    if not scored:
        raise BadInput(f'{runs[0].folder.parent}: all pixels of its photos out of fold are ignored')
    return scored


def score_text(scored: list[ScoredPhoto], metric: Metric) -> str:
    """Format the score of all photos with its interval."""
    score = metric.interval(np.stack([one.counts for one in scored]))
    return f'{score} ({LEVEL:.0%} bootstrap interval) on {len(scored)} photos'


def score_table(scored: list[ScoredPhoto], by_fold: dict[int, np.ndarray], competition: Competition) -> str:
    """Make a table of the score of each class over all folds, with its interval, and in each fold, whose
    (n, 3, K) counts are given.
    """
    metric, classes = metric_of(competition), competition.classes
    counts = np.stack([one.counts for one in scored])  # (n, 3, K)
    pixels, photos = counts[:, 2].sum(0), np.count_nonzero(counts[:, 2], axis=0)
    fold_scores = [metric.by_class(fold) for fold in by_fold.values()]
    folds = [f'fold {fold}' for fold in by_fold]
    lines = [['class', 'all folds', f'{LEVEL:.0%} interval', *folds, 'share of pixels', 'photos']]
    intervals = metric.class_intervals(counts)
    for k in metric.scored_ids(len(classes)):
        in_folds = [format_score(scores[k]) for scores in fold_scores]
        share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
        cells = [format_score(intervals[k].value), format_interval(intervals[k]), *in_folds]
        lines.append([classes[k], *cells, share, str(photos[k])])
    score = metric.interval(counts)
    means = [format_score(float(metric.score(fold))) for fold in by_fold.values()]
    total = [format_score(score.value), format_interval(score), *means, '', str(len(counts))]
    lines.append([metric.label, *total])
    if iou := second_metric(competition):
        beside = [format_score(float(iou.score(some))) for some in (counts, *by_fold.values())]
        lines.append([iou.label, beside[0], '', *beside[1:], '', ''])
    if not competition.is_multilabel:
        accuracies = [format_score(pixel_accuracy(some)) for some in (counts, *by_fold.values())]
        lines.append(['pixel accuracy', accuracies[0], '', *accuracies[1:], '', ''])
    note = f'<p>{html.escape(metric.note)}</p>' if metric.note else ''
    return html_table(lines, total=metric.label) + note


def pixel_accuracy(counts: np.ndarray) -> float:
    """Compute the share of the pixels that are right, by the (n, 3, K) counts of photos; nan without any."""
    hits, _, true = counts.sum((0, 2))
    return float(hits / true) if true else math.nan


def confusion_parts(folds: list[Confusions], classes: tuple[str, ...]) -> list[str]:
    """Draw the confusion matrix of all folds; if classes may overlap, make a table of hits and misses."""
    if any(fold.matrices is None for fold in folds):
        counts = sum(fold.counts.sum(0) for fold in folds)
        return ['<h2>Hits and misses</h2>', html_table(hit_lines(counts, classes))]
    matrix = sum(fold.matrices.sum(0, dtype=np.int64) for fold in folds)
    return [html_picture('Confusion matrix', draw_confusion(matrix, classes))]


def hit_lines(counts: np.ndarray, classes: tuple[str, ...]) -> list[list[str]]:
    """Tabulate (3, K) counts: the pixels of each class that are right, missed, and predicted in excess."""
    header = 'class|pixels of the truth|found|missed|false|false of the predicted'
    lines = [header.split('|')]
    for name, hits, predicted, true in zip(classes, *counts.tolist(), strict=True):
        found, missed = (f'{part / true:.2%}' if true else '-' for part in (hits, true - hits))
        share = f'{(predicted - hits) / predicted:.2%}' if predicted else '-'
        lines.append([name, f'{true:,}', found, missed, f'{predicted - hits:,}', share])
    return lines


def curve(runs: list[FoldRun], key: str) -> dict[str, list[tuple[float, float]]]:
    """List the (epoch, value) points of each fold; epochs count from 1, as in the log."""
    return {
        f'fold {run.fold}': [(row['epoch'] + 1, row[key]) for row in run.metrics if math.isfinite(row[key])]
        for run in runs
    }


class PhotoRows(ExitStack):
    """Make the rows of sheets, each with a photo, its truth and its prediction, which are drawn once.

    with PhotoRows(coco) as rows:
        rows.make(photo, csv, note)
    """

    def __init__(self, coco: CocoSet) -> None:
        super().__init__()
        self.coco, self.form = coco, coco.form
        self.readers: dict[Path, Reader] = {}
        self.drawn: dict[tuple[str, Path], Row] = {}

    def make(self, photo: Photo, csv: Path, note: str) -> Row:
        """Return the row of a photo that a CSV has, under a note. Raises BadInput."""
        key = photo.file_name, csv
        if key not in self.drawn:
            self.drawn[key] = self._draw(photo, csv)
        return replace(self.drawn[key], note=note)

    def _draw(self, photo: Photo, csv: Path) -> Row:
        if csv not in self.readers:
            self.readers[csv] = self.enter_context(self.form.reader(csv))
        pred, truth = self.readers[csv].read(photo.file_name), scored_truth(photo, self.coco.competition)
        return comparison_row(photo.file_name, read_photo(self.coco, photo), truth, pred)


def draw_photos(scored: list[ScoredPhoto], photo_rows: PhotoRows, k: int | None = None) -> np.ndarray:
    """Draw a sheet of photo, truth and prediction, with the score of class k above each, or its own."""
    competition = photo_rows.coco.competition
    rows, metric = [], metric_of(competition)
    for one in scored:
        note = score_note(metric.label, one.score)
        if k is not None:
            note = score_note(metric.class_label, one.class_score(metric, k))
        rows.append(photo_rows.make(one.photo, one.csv, note))
    return sheet(rows, ['photo', 'truth', 'prediction'], competition.classes)


def ranking_parts(scored: list[ScoredPhoto], photo_rows: PhotoRows) -> list[str]:
    """Make a sheet of the worst photos and one of the best; no photo is in both."""
    ranked = sorted(scored, key=lambda one: (one.score, one.photo.file_name))
    count = min(RANKED, (len(ranked) + 1) // 2)
    return [
        html_picture(f'The {title} photos', draw_photos(photos, photo_rows), photos=True)
        for title, photos in (('worst', ranked[:count]), ('best', ranked[: count - 1 : -1][:count]))
        if photos
    ]


def gallery_parts(scored: list[ScoredPhoto], photo_rows: PhotoRows) -> list[str]:
    """Make a sheet for each class of objects: photos that have it, of the lowest and highest score."""
    competition = photo_rows.coco.competition
    parts, metric = [], metric_of(competition)
    label = metric.class_label
    for k in competition.object_ids:
        photos = [one for one in scored if one.counts[2, k] >= MIN_PIXELS]
        photos.sort(key=lambda one: (one.class_score(metric, k), one.photo.file_name))
        chosen = photos if len(photos) <= GALLERY else photos[: GALLERY // 2] + photos[-(GALLERY // 2) :]
        if chosen:
            name = competition.classes[k]
            title = f'{name}: {len(chosen)} of {len(photos)} photos, from the lowest {label} to the highest'
            parts.append(html_picture(title, draw_photos(chosen, photo_rows, k), photos=True))
    return parts


def ensemble_parts(path: Path, data: Path, competition: Competition) -> list[str]:
    """Describe what the ensemble in ensemble.yaml changes, or why it cannot be scored; [] without one."""
    if not path.exists():
        return []
    title = '<h2>What the ensemble changes</h2>'
    try:
        ensemble = score_ensemble(path, data, competition)
    except BadInput as error:
        print(f'without the ensemble in {path}, which may be of another data set: {error}')
        return [title, f'<p>{html.escape(str(error))}</p>']
    gain = ensemble.gain()
    text = (
        f'{ensemble.rule.capitalize()} of {len(ensemble.names)} models on {ensemble.counts.shape[1]} photos '
        f'out of fold: {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) above its best model, '
        f'{ensemble.names[ensemble.best]}. Its weights were chosen on these photos, so this is optimistic.'
    )
    tables = html_table(ensemble.lines()) + html_table(ensemble.class_lines(competition.classes))
    return [title, f'<p>{html.escape(text)}</p>', tables]
