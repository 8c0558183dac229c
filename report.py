"""The report of a run: scores out of fold, worst and best photos, confusion, curves; HTML and PNG.

    python viz.py report --name convnext

Of the folds that have an oof.csv. A photo's score is its mean IoU over the classes in truth or prediction.
"""

import base64
import csv
import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coco import CocoSet, Photo, board_truth, draw_mask, read_coco, read_photo
from config import BadInput, Config, dump_config, make_config, one_line, read_yaml
from drawing import compare, draw_confusion, draw_curves, sheet, write_png
from files import write_text
from intervals import DRAWS, LEVEL, interval
from metrics import class_iou, confusion_matrix, image_counts, mean_iou, pixel_accuracy
from submission import SubmissionReader
from terminal import progress

SHOWN = 8  # photos in worst.png and in best.png
PICTURES = {
    'curves.png': 'Curves',
    'confusion.png': 'Confusion',
    'worst.png': 'The worst photos',
    'best.png': 'The best photos',
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1640px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
h1, h2 { font-weight: 600; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
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
    """Writes output/<name>/report/ and returns its index.html. Raises BadInput."""
    runs = read_runs(output / name)
    cfg = runs[0].cfg
    coco = read_coco(data or cfg.data_root, 'train', cfg.classes)
    scored, confusions = score_photos(runs, coco, len(cfg.classes))
    total = sum(confusions.values())
    ranked = sorted(scored, key=lambda one: (one.score, one.photo.file_name))
    number = min(SHOWN, (len(ranked) + 1) // 2)  # no photo is among the worst and among the best
    pictures = {
        'curves.png': draw_curves({'loss': curve(runs, 'loss'), 'mIoU': curve(runs, 'miou')}),
        'confusion.png': draw_confusion(total, cfg.classes),
        'worst.png': draw_photos(ranked[:number], runs, coco, cfg.classes),
        'best.png': draw_photos(ranked[::-1][:number], runs, coco, cfg.classes),
    }
    folder = output / name / 'report'
    for file_name, picture in pictures.items():
        write_png(folder / file_name, picture, step=8)
    write_html(folder, name, runs, scored, confusions, coco)
    print(f'{name}: out of fold, {len(runs)} folds: mIoU {score_text(scored)}')
    print(f'wrote {folder / "index.html"}, {", ".join(pictures)}')
    return folder / 'index.html'


def read_runs(folder: Path) -> list[FoldRun]:
    """The folds of a run that have an oof.csv. Raises BadInput where there is none."""
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such run; train it first')
    runs = []
    for path in folder.glob('fold*/oof.csv'):
        number = path.parent.name.removeprefix('fold')
        if number.isdecimal():
            config_file = path.with_name('config.yaml')
            cfg = make_config(read_yaml(config_file), where=str(config_file))
            runs.append(FoldRun(int(number), path.parent, cfg, read_metrics(path.with_name('metrics.csv'))))
    if not runs:
        raise BadInput(f'{folder}: no fold*/oof.csv in it; python infer.py --split oof writes them')
    runs.sort(key=lambda run: run.number)
    for run in runs[1:]:
        for key in ('classes', 'data_root'):
            if getattr(run.cfg, key) != getattr(runs[0].cfg, key):
                raise BadInput(f'{run.folder / "config.yaml"}: {key} is not that of {runs[0].folder}')
    return runs


def read_metrics(path: Path) -> list[dict[str, float]]:
    """epoch, loss, miou of each row of a metrics.csv, nan where empty; [] without a file. Raises BadInput."""
    if not path.is_file():
        return []
    try:
        with path.open(newline='', encoding='utf-8') as file:
            return [
                {key: float(row[key]) if row[key] else math.nan for key in ('epoch', 'loss', 'miou')}
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected a row an epoch with epoch, loss, miou: {one_line(error)}') from None


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
    return scored, confusions


def draw_photos(
    chosen: list[Scored], runs: list[FoldRun], coco: CocoSet, classes: tuple[str, ...]
) -> np.ndarray:
    """A sheet of photo, truth and prediction."""
    folders = {run.number: run.folder for run in runs}
    rows = []
    for one in chosen:
        with SubmissionReader(folders[one.fold] / 'oof.csv', len(classes)) as reader:
            pred = reader.read(one.photo.file_name)
        truth = board_truth(draw_mask(one.photo))
        rows.append(compare(one.photo.file_name, read_photo(coco, one.photo), truth, pred))
    return sheet(rows, ['photo', 'truth', 'prediction'], classes)


def curve(runs: list[FoldRun], key: str) -> dict[str, list[tuple[float, float]]]:
    """The (epoch, value) points of each fold; epochs count from 1, as in the log."""
    return {
        f'fold {run.number}': [(row['epoch'] + 1, row[key]) for row in run.metrics if math.isfinite(row[key])]
        for run in runs
    }


def write_html(
    folder: Path,
    name: str,
    runs: list[FoldRun],
    scored: list[Scored],
    confusions: dict[int, np.ndarray],
    coco: CocoSet,
) -> None:
    """index.html, with the pictures in it, so that it can be mailed. Raises BadInput."""
    parts = [f'<h2>IoU out of fold</h2><p>mIoU {score_text(scored)}</p>']
    parts.append(score_table(confusions, runs[0].cfg.classes, coco))
    parts += [html_picture(title, folder / file_name) for file_name, title in PICTURES.items()]
    config = html.escape(dump_config(runs[0].cfg))
    parts.append(f'<details><summary>Config</summary><pre>{config}</pre></details>')
    write_page(folder / 'index.html', name, parts)


def score_text(scored: list[Scored]) -> str:
    """The mIoU of all photos with its interval."""
    score = interval(np.stack([one.counts for one in scored]))
    return f'{score} on {len(scored)} photos: the bracket has {LEVEL:.0%} of {DRAWS:,} draws of them'


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """An HTML page of a title and of parts that are HTML already. Raises BadInput."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{html.escape(title)}</h1>{"".join(parts)}'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def html_picture(title: str, path: Path) -> str:
    """A PNG under its title, with its bytes in the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    shown = html.escape(title)
    return f'<h2>{shown}</h2><img alt="{shown}" src="data:image/png;base64,{content}">'


def html_table(lines: list[list[str]], total: str | None = None) -> str:
    """An HTML table, the first line its headings; that which begins with `total` stands out."""
    rows = []
    for number, line in enumerate(lines):
        tag = 'td' if number else 'th'
        cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)
        rows.append(f'<tr class="total">{cells}</tr>' if line[0] == total else f'<tr>{cells}</tr>')
    return f'<table>{"".join(rows)}</table>'


def score_table(confusions: dict[int, np.ndarray], classes: tuple[str, ...], coco: CocoSet) -> str:
    """The IoU of each class over all folds and in each, as an HTML table."""
    columns = {'all folds': sum(confusions.values())} | {
        f'fold {k}': counts for k, counts in confusions.items()
    }
    pixels = columns['all folds'].sum(1)
    ious = {title: class_iou(counts) for title, counts in columns.items()}
    lines = [['class', *columns, 'share of pixels', 'photos']]
    for k, name in enumerate(classes):
        photos = sum(any(a.category_id == k for a in photo.annotations) for photo in coco.photos)
        lines.append([name, *(shown(iou[k]) for iou in ious.values())])
        lines[-1] += [f'{pixels[k] / max(1, pixels.sum()):.2%}', str(photos) if k else '']
    lines.append(['mIoU', *(shown(mean_iou(counts)) for counts in columns.values()), '', ''])
    lines.append(['pixel accuracy', *(shown(pixel_accuracy(counts)) for counts in columns.values()), '', ''])
    return html_table(lines, total='mIoU')


def shown(value: float) -> str:
    """A score for a table; a dash where there is none."""
    return '-' if math.isnan(value) else f'{value:.4f}'
