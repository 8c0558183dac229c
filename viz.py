"""Looks at predictions: a sheet of photos, scores against labels, the report of a run, and a browser app.

    python viz.py pictures --csv output/submission.csv --data input/data --out pictures.png
    python viz.py pictures --csv output/convnext/fold0/oof.csv --split train --out pictures.png
    python viz.py score output/a/test.csv output/submission.csv --labels input/demo/test_labels.json
    python viz.py report --name convnext            # output/convnext/report.html, one file to mail
    python viz.py suspects --name convnext          # output/convnext/suspects/: labels to look at again
    python viz.py augment --cfg configs/convnext.yaml --out augment.png     # what the model sees in training
    python viz.py app --port 8501                   # http://127.0.0.1:8501: runs, photos, and sorting
    python viz.py app --data input/demo --labels input/demo/test_labels.json   # test photos with their truth

--cfg FILE.yaml, where it is taken, is that of another data set: its classes, and its data_root.
"""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from config import load_config
from data.coco import Photo, annotation_files, draw_mask, read_coco, read_labels, read_photo
from metrics import LEVEL, confusion_matrix, image_counts, interval, iou_of_counts
from submission import SubmissionReader, classes_and_data, downsample_mask, require_same_images
from utils.cli import MAX_SEED, ArgumentParser, add_config_arguments, at_least, run_script
from utils.errors import DONE, BadInput, one_line
from utils.plotting import comparison_row, sheet, write_png
from viewer import label_errors, report
from viewer.uploads import MAX_MEGABYTES

APP = Path(__file__).parent / 'viewer/app.py'


def command(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    add_pictures(commands)
    add_score(commands)
    add_report(commands)
    add_suspects(commands)
    add_augment(commands)
    add_app(commands)
    args = parser.parse_args(argv)
    if args.command == 'report':
        report.main(args.name, args.output, args.data)
        return DONE
    if args.command == 'suspects':
        label_errors.main(args.name, args.output, args.data)
        return DONE
    if args.command == 'augment':
        from viewer import samples  # with torch, which the others do without

        samples.main(load_config(args.cfg, args.set), args.fold, args.out, args.count, args.seed)
        return DONE
    classes, data = classes_and_data(args)
    if args.command == 'pictures':
        pictures(args.csv, data, args.split, args.out, classes, args.labels, args.count, args.seed)
    elif args.command == 'score':
        print(format_scores(args.csvs, score(args.csvs, args.labels, classes), classes))
    else:
        if args.labels is not None:
            labelled_photos(args.labels, classes)  # a fault is told now, not on the page
        start_app(args.port, data, args.output, args.labels, args.cfg, args.set)
    return DONE


def add_pictures(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'pictures', doc='A sheet of photos, their truth where it is known, and their predictions.'
    )
    parser.add_argument('--csv', type=Path, required=True, help='what was predicted')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture to write')
    parser.add_argument('--data', type=Path, help='data root; by default input/data')
    parser.add_argument('--split', choices=['test', 'train'], default='test', help='by default test')
    parser.add_argument(
        '--labels',
        type=Path,
        metavar='JSON',
        help='a COCO file with the truth of the test photos; by default none',
    )
    parser.add_argument('--count', type=at_least(1), default=6, help='photos, drawn at random; by default 6')
    parser.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='of the draw; by default 0')
    add_config_arguments(parser, required=False)


def add_score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'score', doc='IoU per class and mIoU of predictions, against a COCO file of labels.'
    )
    parser.add_argument(
        'csvs', nargs='+', type=Path, metavar='CSV', help='what was predicted, each for the same photos'
    )
    parser.add_argument(
        '--labels', type=Path, required=True, metavar='JSON', help='a COCO file with their truth'
    )
    add_config_arguments(parser, required=False)


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'report', doc="A run's scores out of fold, curves, confusion, photos, and ensemble, in one HTML file."
    )
    add_run_arguments(parser)


def add_suspects(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'suspects', doc='Labels that the models out of fold disagree with, the strongest first.'
    )
    add_run_arguments(parser)


def add_run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--name', required=True, help='the run: a folder of --output')
    parser.add_argument(
        '--output', type=Path, default=Path('output'), help='where runs are; by default output'
    )
    parser.add_argument('--data', type=Path, help="data root; by default the data_root of the run's config")


def add_augment(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('augment', doc='A sheet of training photos and their augmented samples.')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, default=0, help='whose training photos; by default 0')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture to write')
    parser.add_argument('--count', type=at_least(1), default=6, help='photos, drawn at random; by default 6')
    parser.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='of the draw; by default 0')


def add_app(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'app', doc='Runs, photos with truth and predictions, and sorting; in a browser on this machine.'
    )
    parser.add_argument('--port', type=int, default=8501, help='by default 8501')
    parser.add_argument('--data', type=Path, help='data root; by default input/data')
    parser.add_argument(
        '--labels',
        type=Path,
        metavar='JSON',
        help='a COCO file with the truth of the test photos; by default none',
    )
    parser.add_argument(
        '--output', type=Path, default=Path('output'), help='where runs are; by default output'
    )
    add_config_arguments(parser, required=False)


def pictures(
    csv: Path,
    data: Path,
    split: str,
    out: Path,
    classes: Sequence[str],
    labels: Path | None = None,
    count: int = 6,
    seed: int = 0,
) -> None:
    """Writes a sheet of `count` photos that the CSV has a row of, chosen by the seed. Raises BadInput."""
    coco = read_coco(data, split, tuple(classes))
    truths = {photo.file_name: photo for photo in coco.photos} if split == 'train' else {}
    if labels is not None:
        truths = labelled_photos(labels, classes)
    with SubmissionReader(csv, len(classes)) as reader:
        rows_of = set(reader.image_ids)
        known = [photo for photo in coco.photos if photo.file_name in rows_of]
        if not known:
            raise BadInput(f'{csv}: has no row of a {split} photo of {data}, but of {reader.image_ids[0]!r}')
        places = np.random.default_rng(seed).permutation(len(known))[:count]
        rows = []
        for photo in (known[place] for place in sorted(places)):
            if truths and photo.file_name not in truths:
                raise BadInput(f'{labels}: has no image {photo.file_name!r}, which {csv} has')
            truth = downsample_mask(draw_mask(truths[photo.file_name])) if truths else None
            pred = reader.read(photo.file_name)
            rows.append(comparison_row(photo.file_name, read_photo(coco, photo), truth, pred))
    headings = ['photo', 'truth', 'prediction'] if truths else ['photo', 'prediction']
    write_png(out, sheet(rows, headings, classes, groups=2 if truths else 3), step=8)
    print(f'wrote {out}: {len(rows)} photos of {csv}')


def score(csvs: Sequence[Path], labels: Path, classes: Sequence[str]) -> list[np.ndarray]:
    """The (n, 3, K) image_counts of each CSV with the labels. Raises BadInput: of other images, say."""
    photos = labelled_photos(labels, classes)
    counts = []
    truths = {name: downsample_mask(draw_mask(photo)) for name, photo in photos.items()}
    for csv in csvs:
        with SubmissionReader(csv, len(classes)) as reader:
            require_same_images(list(truths), labels, reader)
            confusions = (
                confusion_matrix(truth, reader.read(n), len(classes)) for n, truth in truths.items()
            )
            counts.append(np.stack([image_counts(confusion) for confusion in confusions]))
    return counts


def labelled_photos(labels: Path, classes: Sequence[str]) -> dict[str, Photo]:
    """The photos of a file of labels, by file name. Raises BadInput, for a file without labels too."""
    photos = read_labels(labels, tuple(classes)).photos
    if not any(photo.annotations for photo in photos):
        raise BadInput(f'{labels}: has no annotations, so that there is no truth in it')
    return {photo.file_name: photo for photo in photos}


def format_scores(csvs: Sequence[Path], counts: Sequence[np.ndarray], classes: Sequence[str]) -> str:
    """A line a CSV, of its (n, 3, K) counts: its mIoU, the bootstrap interval of that, and the IoU of each
    class, in per cent; the best mIoU has a star.
    """
    scores = [interval(own) for own in counts]
    best = max(score.value for score in scores)
    names = ('mIoU', f'{LEVEL:.0%} interval', *classes)
    table = [['', *(name.partition(' ')[0] for name in names)]]
    table.append(['', *(name.partition(' ')[2] for name in names)])
    for csv, score, own in zip(csvs, scores, counts, strict=True):
        star = '*' if len(csvs) > 1 and score.value == best else ' '
        ious = iou_of_counts(*own.sum(0))
        cells = ('-' if np.isnan(iou) else f'{100 * iou:.1f}' for iou in ious)
        within = f'{100 * score.low:.1f}-{100 * score.high:.1f}'
        table.append([str(csv), f'{100 * score.value:.2f}{star}', within, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        [
            f'{line[0]:<{widths[0]}}',
            *(f'{cell:>{width}}' for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in table
    )
    return '\n'.join('  '.join(line).rstrip() for line in lines)


def start_app(
    port: int, data: Path, output: Path, labels: Path | None, cfg: Path | None, changes: list[str]
) -> NoReturn:
    """Becomes the server of viewer/app.py, which answers to this machine alone. Raises BadInput."""
    if importlib.util.find_spec('streamlit') is None:
        raise BadInput('the app needs streamlit, which is not installed: pip install streamlit')
    annotation_files(data, 'train')
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(('127.0.0.1', port))
    except (OSError, OverflowError) as error:
        raise BadInput(f'--port {port}: cannot be listened on: {one_line(error)}') from None
    settings = {
        'server.address': '127.0.0.1', 'server.port': port, 'server.headless': 'true',
        'server.fileWatcherType': 'none', 'browser.gatherUsageStats': 'false',
        'client.toolbarMode': 'minimal', 'server.maxUploadSize': MAX_MEGABYTES,
    }  # fmt: skip
    options = [word for key, value in settings.items() for word in (f'--{key}', str(value))]
    values = ['--data', str(data), '--output', str(output), *(['--cfg', str(cfg)] if cfg else [])]
    values += ['--labels', str(labels)] if labels else []
    values += ['--set', *changes] if changes else []
    print(f'http://127.0.0.1:{port}  (Ctrl-C ends it)', flush=True)
    root = str(APP.parents[1])  # Streamlit puts the page's own folder first on the path
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
    os.execv(sys.executable, [sys.executable, '-m', 'streamlit', 'run', str(APP), *options, '--', *values])


if __name__ == '__main__':
    run_script(command)
