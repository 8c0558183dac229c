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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Competition, dump_config
from data.coco import CocoSet, Photo, read_coco, read_photo, scored_truth
from engine.runs import FoldRun, read_runs
from evaluate import Confusions, read_fold_confusions, second_metric
from metrics import IGNORED, LEVEL, Metric
from submission import Reader, metric_of
from utils.errors import BadInput, plural
from utils.plotting import MAX_NUMBERED, PALETTE, Row, comparison_row, draw_confusion, draw_curves, score_note
from utils.progress import progress
from viewer.html_page import (
    Section,
    format_interval,
    format_score,
    html_charts,
    html_confusion,
    html_swatch,
    html_table,
    html_views,
    write_page,
)
from voting.origin import list_faults
from voting.recipe import score_ensemble

RANKED = 8  # photos among the worst, and among the best
GALLERY = 4  # photos of a class: half of them the worst, half the best
GALLERIES = 40  # classes that have one
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
    score = f'{metric.label} {score_text(scored, metric)}'
    intro = [f'<p><b>{html.escape(fault)}</b></p>' for fault in faults]
    intro.append(f'<p>Out of fold: {score}, {plural(len(runs), "fold")}</p>')
    by_fold = {run.fold: fold.counts for run, fold in zip(runs, folds, strict=True)}
    sections = [
        Section(f'{metric.class_label} out of fold', score_table(scored, by_fold, cfg.competition)),
        Section('Curves', html_charts(draw_fold_curves(runs, metric))),
        confusion_section(folds, cfg.classes),
    ]
    with PhotoFigures(coco) as figures:
        sections += ranking_sections(scored, figures)
        sections += ensemble_sections(output / 'ensemble.yaml', data, cfg.competition)
        sections += gallery_sections(scored, figures)
    config = html.escape(dump_config(cfg))
    sections.append(Section('Config', f'<details><summary>every key</summary><pre>{config}</pre></details>'))
    path = output / name / 'report.html'
    write_page(path, name, ''.join(intro), sections)
    print(*(f'warning: {fault}\n' for fault in faults), sep='', end='')
    print(f'{name}: {plural(len(runs), "fold")}: out-of-fold {score}')
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


def confusion_section(folds: list[Confusions], classes: tuple[str, ...]) -> Section:
    """Tabulate the confusion matrix of all folds; if classes may overlap, their hits and misses."""
    if any(fold.matrices is None for fold in folds):
        counts = sum(fold.counts.sum(0) for fold in folds)
        return Section('Hits and misses', html_table(hit_lines(counts, classes)))
    matrix = sum(fold.matrices.sum(0, dtype=np.int64) for fold in folds)
    if len(classes) > MAX_NUMBERED:
        chart = html_charts({'confusion matrix': draw_confusion(matrix, classes)})
        return Section('Confusion matrix', f'<div class="scroll">{chart}</div>')
    note = '<p>Each row has the pixels of a true class: the share that is predicted as each class, in %.</p>'
    return Section('Confusion matrix', note + html_confusion(matrix, classes))


def hit_lines(counts: np.ndarray, classes: tuple[str, ...]) -> list[list[str]]:
    """Tabulate (3, K) counts: the pixels of each class that are right, missed, and predicted in excess."""
    header = 'class|pixels of the truth|found|missed|false|false of the predicted'
    lines = [header.split('|')]
    for name, hits, predicted, true in zip(classes, *counts.tolist(), strict=True):
        found, missed = (f'{part / true:.2%}' if true else '-' for part in (hits, true - hits))
        share = f'{(predicted - hits) / predicted:.2%}' if predicted else '-'
        lines.append([name, f'{true:,}', found, missed, f'{predicted - hits:,}', share])
    return lines


def draw_fold_curves(runs: list[FoldRun], metric: Metric) -> dict[str, np.ndarray]:
    """Draw the loss and the score of each fold by epoch, a chart each."""
    curves = {'loss': curve(runs, 'loss'), metric.label: curve(runs, 'score')}
    return {f'{label} by epoch': draw_curves({label: lines}) for label, lines in curves.items()}


def curve(runs: list[FoldRun], key: str) -> dict[str, list[tuple[float, float]]]:
    """List the (epoch, value) points of each fold; epochs count from 1, as in the log."""
    return {
        f'fold {run.fold}': [(row['epoch'] + 1, row[key]) for row in run.metrics if math.isfinite(row[key])]
        for run in runs
    }


class PhotoFigures(ExitStack):
    """Make the figures of a page: photos, each with its truth and its prediction beside it. The page holds a
    picture once, however often it is shown.

    with PhotoFigures(coco) as figures:
        figures.make(photo, csv, note)
    """

    def __init__(self, coco: CocoSet, headings: Sequence[str] = ('photo', 'truth', 'prediction')) -> None:
        super().__init__()
        self.coco, self.form = coco, coco.form
        self.headings = ''.join(f'<span>{heading}</span>' for heading in headings)
        self.readers: dict[Path, Reader] = {}
        self.shown: dict[tuple[str, Path], tuple[str, str]] = {}  # the views once more, and their classes

    def make(self, photo: Photo, csv: Path, note: str) -> str:
        """Return the figure of a photo that a CSV has, under a note. Raises BadInput."""
        key, anchor = (photo.file_name, csv), ''
        if key in self.shown:
            views, swatches = self.shown[key]
        else:
            number = len(self.shown) + 1
            anchor = f' id="photo{number}"'
            row = self._draw(photo, csv)
            views, again = html_views(row.views, f'views{number}', photo.file_name)
            swatches = ''.join(self._swatch(k) for k in sorted(row.ids))
            self.shown[key] = again, swatches
        caption = f'<b>{html.escape(photo.file_name)}</b><span>{html.escape(note)}</span>{swatches}'
        strip = f'<div class="views"><div>{self.headings}</div>{views}</div>'
        return f'<figure{anchor}>{strip}<figcaption>{caption}</figcaption></figure>'

    def _draw(self, photo: Photo, csv: Path) -> Row:
        if csv not in self.readers:
            self.readers[csv] = self.enter_context(self.form.reader(csv))
        pred, truth = self.readers[csv].read(photo.file_name), scored_truth(photo, self.coco.competition)
        return comparison_row(photo.file_name, read_photo(self.coco, photo), truth, pred)

    def _swatch(self, k: int) -> str:
        name = 'ignored' if k == IGNORED else self.coco.competition.classes[k]
        return html_swatch(PALETTE[k].tolist(), name)

    def links(self) -> dict[str, str]:
        """Return the address of the first figure of each photo, by its file_name."""
        return {file_name: f'#photo{n}' for n, (file_name, _) in enumerate(self.shown, start=1)}


def photo_section(
    title: str, scored: list[ScoredPhoto], figures: PhotoFigures, k: int | None = None, note: str = ''
) -> Section:
    """Show photos, each with its score, or with that of class k."""
    metric = metric_of(figures.coco.competition)
    made = []
    for one in scored:
        label, score = metric.label, one.score
        if k is not None:
            label, score = metric.class_label, one.class_score(metric, k)
        made.append(figures.make(one.photo, one.csv, score_note(label, score)))
    return Section(title, f'{note}<div class="photos">{"".join(made)}</div>')


def ranking_sections(scored: list[ScoredPhoto], figures: PhotoFigures) -> list[Section]:
    """Show the worst photos and the best ones; no photo is among both."""
    ranked = sorted(scored, key=lambda one: (one.score, one.photo.file_name))
    count = min(RANKED, (len(ranked) + 1) // 2)
    groups = {'Worst photos': ranked[:count], 'Best photos': ranked[: count - 1 : -1][:count]}
    return [photo_section(title, photos, figures) for title, photos in groups.items() if photos]


def gallery_sections(scored: list[ScoredPhoto], figures: PhotoFigures) -> list[Section]:
    """Show photos of each class of objects, of its lowest and its highest scores; of many classes only the
    GALLERIES that score lowest.
    """
    competition = figures.coco.competition
    sections, metric = [], metric_of(competition)
    scores = metric.by_class(np.stack([one.counts for one in scored]))
    ids = sorted(competition.object_ids, key=lambda k: (np.nan_to_num(scores[k], nan=2), k))[:GALLERIES]
    for k in sorted(ids):
        photos = [one for one in scored if one.counts[2, k] >= MIN_PIXELS]
        photos.sort(key=lambda one: (one.class_score(metric, k), one.photo.file_name))
        chosen = photos if len(photos) <= GALLERY else photos[: GALLERY // 2] + photos[-(GALLERY // 2) :]
        if chosen:
            spread = f', from the lowest {metric.class_label} to the highest' if len(chosen) > 1 else ''
            note = f'<p>{len(chosen)} of {plural(len(photos), "photo")}{spread}</p>'
            sections.append(photo_section(competition.classes[k], chosen, figures, k, note))
    return sections


def ensemble_sections(path: Path, data: Path, competition: Competition) -> list[Section]:
    """Describe what the ensemble in ensemble.yaml changes, or why it cannot be scored; [] without one."""
    if not path.exists():
        return []
    title = 'What the ensemble changes'
    try:
        ensemble = score_ensemble(path, data, competition)
    except BadInput as error:
        print(f'without the ensemble in {path}, which may be of another data set: {error}')
        return [Section(title, f'<p>{html.escape(str(error))}</p>')]
    gain = ensemble.gain()
    text = (
        f'{ensemble.rule.capitalize()} of {len(ensemble.names)} models on {ensemble.counts.shape[1]} photos '
        f'out of fold: {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) above its best model, '
        f'{ensemble.names[ensemble.best]}. Its weights were chosen on these photos, so this is optimistic.'
    )
    tables = html_table(ensemble.lines()) + html_table(ensemble.class_lines(competition.classes))
    return [Section(title, f'<p>{html.escape(text)}</p>{tables}')]
