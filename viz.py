"""Look at predictions: a sheet of photos, the report of a run, likely label errors, and a browser app.

    python viz.py pictures --csv output/submission.csv --data input/data --out pictures.png
    python viz.py pictures --csv output/convnext/fold0/oof.csv --split train --out pictures.png
    python viz.py report --name convnext            # output/convnext/report.html, one file to mail
    python viz.py suspects --name convnext          # output/convnext/suspects/: labels to look at again
    python viz.py augment --cfg configs/convnext.yaml --out augment.png     # what the model sees in training
    python viz.py app --port 8501                   # in a browser: runs, photos, and sorting
    python viz.py app --data input/demo --labels input/demo/test_labels.json   # test photos with their truth

Give --cfg FILE.yaml for another data set: its classes and its data_root are used.
"""

import argparse
import importlib.util
import re
import socket
from pathlib import Path

import numpy as np

from config import load_config
from data.coco import read_coco, read_photo, scored_truth
from data.layout import annotation_files
from evaluate import read_truth
from submission import competition_and_data, metric_of
from utils.cli import MAX_SEED, ArgumentParser, Commands, add_config_arguments, at_least, run_script
from utils.errors import DONE, BadInput, one_line
from utils.files import refuse_inside
from utils.palette import PALETTES
from utils.plotting import comparison_row, score_note, sheet, write_png
from viewer.uploads import MAX_MEGABYTES

# of runs in the app's charts: told apart by every eye, on white and on black
CHART_COLOURS = ['#1f83c4', '#e07b00', '#009e73', '#cc5fa0', '#56b4e9', '#d0303a', '#8a7fd0', '#8a6d00']


def command(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for add in (add_pictures, add_report_and_suspects, add_augment, add_app):
        add(commands)
    args = parser.parse_args(argv)
    run = {'pictures': pictures, 'report': report, 'suspects': suspects, 'augment': augment, 'app': start_app}
    run[args.command](args)
    return DONE


def add_pictures(commands: Commands) -> None:
    parser = commands.add_parser('pictures', 'Draw photos, their truth if known, and their predictions.')
    parser.add_argument('--csv', type=Path, required=True, help='the predictions')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture to write')
    parser.add_argument('--data', type=Path, help='data root; by default that of --cfg, or input/data')
    parser.add_argument('--split', choices=['test', 'train'], default='test', help='which photos')
    add_labels_argument(parser)
    add_draw_arguments(parser)
    doc = "of the classes: distinct to every eye, or the home contest's own"
    parser.add_argument('--colours', choices=list(PALETTES), default='distinct', help=doc)
    add_config_arguments(parser, required=False)


def add_report_and_suspects(commands: Commands) -> None:
    report = "Write a run's out-of-fold scores, curves, confusion, photos and ensemble into one HTML file."
    suspects = 'List the labels that the models disagree with out of fold, strongest first.'
    for name, doc in (('report', report), ('suspects', suspects)):
        parser = commands.add_parser(name, doc)
        parser.add_argument('--name', required=True, help='the run: a folder of --output')
        add_output_argument(parser)
        parser.add_argument('--data', type=Path, help="data root; by default that of the run's config")


def add_augment(commands: Commands) -> None:
    parser = commands.add_parser('augment', 'Draw a sheet of training photos and their augmented samples.')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, default=0, help='its training photos are drawn')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='the picture to write')
    add_draw_arguments(parser)


def add_app(commands: Commands) -> None:
    parser = commands.add_parser('app', 'Show runs, photos with their predictions, and sorting in a browser.')
    parser.add_argument('--port', type=int, default=8501, help='port on this machine')
    other = 'another name, as the browser shows it, under which a proxy leads to the app'
    parser.add_argument('--allow-host', nargs='+', action='extend', default=[], type=host_name, help=other)
    parser.add_argument('--open', action='store_true', help='open it in the browser')
    parser.add_argument('--data', type=Path, help='data root; by default that of --cfg, or input/data')
    add_labels_argument(parser)
    add_output_argument(parser)
    add_config_arguments(parser, required=False)


def add_output_argument(parser: ArgumentParser) -> None:
    parser.add_argument('--output', type=Path, default=Path('output'), help='the folder of the runs')


def add_labels_argument(parser: ArgumentParser) -> None:
    doc = 'a COCO file with the truth of the test photos; by default none'
    parser.add_argument('--labels', type=Path, metavar='JSON', help=doc)


def add_draw_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--count', type=at_least(1), default=6, help='photos drawn at random')
    parser.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='seed of the choice of photos')


# --- commands: slow libraries are imported by the command that needs them ---------------------------------


def report(args: argparse.Namespace) -> None:
    from viewer.report import main

    main(args.name, args.output, args.data)


def suspects(args: argparse.Namespace) -> None:
    from viewer.label_errors import main

    main(args.name, args.output, args.data)


def augment(args: argparse.Namespace) -> None:
    cfg = load_config(args.cfg, args.set)
    from viewer.samples import main

    main(cfg, args.fold, args.out, args.count, args.seed)


def pictures(args: argparse.Namespace) -> None:
    """Write a sheet of args.count photos that the CSV has, chosen by the seed. Raises BadInput."""
    refuse_inside(args.out, [args.csv, args.labels])
    competition, data = competition_and_data(args)
    coco, classes = read_coco(data, args.split, competition), competition.classes
    palette = PALETTES[args.colours]
    truth_photos = coco.photos if args.split == 'train' else ()
    if args.labels is not None:
        truth_photos = read_truth(args.labels, competition).photos
    truths = {photo.file_name: photo for photo in truth_photos}
    metric = metric_of(competition)
    with coco.form.reader(args.csv) as reader:
        photos = [photo for photo in coco.photos if photo.file_name in reader]
        if not photos:
            other = repr(reader.image_ids[0])
            raise BadInput(f'{args.csv}: has no row of a {args.split} photo of {data}, but of {other}')
        rows = []
        for index in sorted(np.random.default_rng(args.seed).permutation(len(photos))[: args.count]):
            photo = photos[index]
            if truths and photo.file_name not in truths:
                raise BadInput(f'{args.labels}: has no image {photo.file_name!r}, which {args.csv} has')
            pred, truth, note = reader.read(photo.file_name), None, ''
            if truths:
                truth = scored_truth(truths[photo.file_name], competition)
                note = score_note(metric.label, metric.of_image(truth, pred, len(classes)))
            rows.append(comparison_row(photo.file_name, read_photo(coco, photo), truth, pred, note, palette))
    headings = ['photo', 'truth', 'prediction'] if truths else ['photo', 'prediction']
    write_png(args.out, sheet(rows, headings, classes, groups=2 if truths else 3, palette=palette), step=8)
    print(f'wrote {args.out}: {len(rows)} photos of {args.csv}')


def start_app(args: argparse.Namespace) -> None:
    """Serve viewer/app.py, which answers this machine alone, until a signal ends it. Raises BadInput."""
    competition, data = competition_and_data(args)
    if args.labels is not None:
        read_truth(args.labels, competition)  # so that an error is told here, not on the page
    if importlib.util.find_spec('streamlit') is None:
        raise BadInput('the app needs streamlit, which is not installed: pip install streamlit')
    annotation_files(data, 'train')
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(('127.0.0.1', args.port))
    except (OSError, OverflowError) as error:
        raise BadInput(f'--port {args.port}: cannot be used: {one_line(error)}; try another port') from None
    from viewer.guard import serve

    options = {
        'server.headless': True,
        'server.fileWatcherType': 'none',
        'server.maxUploadSize': MAX_MEGABYTES,
        'browser.gatherUsageStats': False,
        'theme.light.chartCategoricalColors': CHART_COLOURS,
        'theme.dark.chartCategoricalColors': CHART_COLOURS,
        'client.toolbarMode': 'minimal',
    }
    words = ['--data', str(data), '--output', str(args.output)]
    words += ['--cfg', str(args.cfg)] if args.cfg else []
    words += ['--labels', str(args.labels)] if args.labels else []
    words += ['--set', *args.set] if args.set else []
    serve(words, args.port, args.allow_host, options, args.open)


def host_name(text: str) -> str:
    """Convert the text of --allow-host: the name, and the port if any, as a browser's address has them."""
    if not re.fullmatch(r'([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?', text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected NAME or NAME:PORT')
    return text


if __name__ == '__main__':
    run_script(command)
