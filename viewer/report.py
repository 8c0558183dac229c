"""The report of a run as one HTML file that can be mailed: scores out of fold with intervals, curves,
confusion, the best and the worst photos, a gallery of each class, what the ensemble did.

    python viz.py report --name convnext        # output/convnext/report.html

Of the folds that have an oof.csv. A photo's score is its mean IoU over the classes in truth or prediction.
"""

import base64
import csv
import html
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from config import BadInput, Config, dump_config, load_config, one_line
from data.coco import CocoSet, Photo, board_truth, draw_mask, read_coco, read_photo
from intervals import DRAWS, LEVEL, Interval, by_class, interval
from metrics import class_iou, confusion_matrix, image_counts, iou_of_counts, mean_iou, pixel_accuracy
from submission import SubmissionReader
from utils.files import write_text
from utils.plotting import compare, draw_confusion, draw_curves, sheet
from utils.progress import progress
from voting.ensembled import score_ensemble

SHOWN = 8  # photos among the worst, and among the best
GALLERY = 4  # photos of a class: half of them the worst, half the best
LEAST = 256  # pixels of a class in the truth of a photo of its gallery
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1640px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
h1, h2 { font-weight: 600; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 1em; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #e4e4e4; }
td:first-child, th:first-child { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid #1c1c1c; }
"""


@dataclass(frozen=True)
class FoldRun:
    """A fold of a run: its folder, the config it was trained with, and its rows of metrics.csv."""

    number: int
    folder: Path
    cfg: Config
    metrics: list[dict[str, float]]


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


def read_runs(folder: Path) -> list[FoldRun]:
    """The folds of a run that have an oof.csv. Raises BadInput where there is none."""
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such run; train it first')
    runs = []
    for path in folder.glob('fold*/oof.csv'):
        number = fold_number(path.parent)
        if number is not None:
            cfg = load_config(path.with_name('config.yaml'))
            runs.append(FoldRun(number, path.parent, cfg, read_metrics(path.with_name('metrics.csv'))))
    if not runs:
        raise BadInput(f'{folder}: no fold*/oof.csv in it; python infer.py --split oof writes them')
    runs.sort(key=lambda run: run.number)
    for run in runs[1:]:
        for key in ('classes', 'data_root'):
            if getattr(run.cfg, key) != getattr(runs[0].cfg, key):
                raise BadInput(f'{run.folder / "config.yaml"}: {key} is not that of {runs[0].folder}')
    return runs


def fold_number(folder: Path) -> int | None:
    """Of a run's folder: k of fold<k>, -1 of `all`, which Config.run_dir names; None of any other."""
    number = folder.name.removeprefix('fold')
    return -1 if folder.name == 'all' else int(number) if number.isdecimal() else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """epoch, loss, miou of each row of a metrics.csv, nan where empty; [] without a file. Raises BadInput."""
    if not path.is_file():
        return []
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            return [
                {key: float(row[key]) if row[key] else math.nan for key in ('epoch', 'loss', 'miou')}
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected a row an epoch with epoch, loss, miou: {one_line(error)}') from None


def best_miou(metrics: list[dict[str, float]]) -> float:
    """The highest mIoU of an epoch in rows of a metrics.csv; nan where there is none yet."""
    return max((row['miou'] for row in metrics if not math.isnan(row['miou'])), default=math.nan)


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
            yield OofPhoto(photo, row, board_truth(draw_mask(photo)), reader.read(image_id))


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
        truth = board_truth(draw_mask(one.photo))
        row = compare(one.photo.file_name, read_photo(coco, one.photo), truth, pred)
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


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """An HTML page of a title and of parts that are HTML already. Raises BadInput."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{html.escape(title)}</h1>{"".join(parts)}'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def html_picture(title: str, picture: np.ndarray, photos: bool = False) -> str:
    """An (H, W, 3) picture under its title, with its bytes in the page: WebP where there are photos in it."""
    file = io.BytesIO()
    kind = 'webp' if photos else 'png'
    Image.fromarray(picture).save(file, kind, **({'quality': 82} if photos else {'optimize': True}))
    content = base64.b64encode(file.getvalue()).decode()
    shown = html.escape(title)
    return f'<h2>{shown}</h2><img alt="{shown}" src="data:image/{kind};base64,{content}">'


def html_table(lines: list[list[str]], total: str | None = None) -> str:
    """An HTML table, the first line its headings; that which begins with `total` stands out."""
    rows = []
    for number, line in enumerate(lines):
        tag = 'td' if number else 'th'
        cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)
        rows.append(f'<tr class="total">{cells}</tr>' if line[0] == total else f'<tr>{cells}</tr>')
    return f'<table>{"".join(rows)}</table>'


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
