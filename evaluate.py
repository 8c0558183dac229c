"""Score predictions against labels, compare two, calibrate probabilities, and choose thresholds.

    python evaluate.py score output/a/test.csv output/submission.csv --labels input/demo/test_labels.json
    python evaluate.py compare output/a/oof.csv output/b/oof.csv
    python evaluate.py compare output/a/fold0/oof.csv output/b/fold0/oof.csv --data input/data
    python evaluate.py calibrate output/convnext
    python evaluate.py thresholds output/hands

score prints the competition's metric of each CSV, and of each class in it. compare says whether one of two
predictions of the same training photos is significantly better. calibrate fits the temperature of a model's
probabilities out of fold and writes calibration.yaml, which pseudo.py reads. thresholds chooses those of
classes that may overlap, from the histograms that infer.py keeps, and writes thresholds.yaml, which infer.py
reads. What is counted in a CSV is kept beside it, in .<name>.confusions.npz, as long as the CSV and the
annotations stay the same.

Shapes: n photos, K classes.
"""

import argparse
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import metrics
from config import Competition, fold_files, fold_of
from data.coco import CocoSet, read_coco, read_labels, scored_truth
from metrics import Metric
from submission import competition_and_data, metric_of, require_same_images
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import DONE, BadInput
from utils.files import write_whole
from utils.progress import progress

Bar = Callable[..., Iterable[str]]  # takes image ids and yields them; with the path of their CSV for folds


def command(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    if args.command == 'score' and args.cfg is None:
        args.data = args.data or args.labels.parent
    competition, data = competition_and_data(args)
    if args.command == 'score':
        print(format_scores(args.csvs, score_csvs(args.csvs, args.labels, competition), competition))
    elif args.command == 'compare':
        print(compare_scores(args.csvs, data, competition))
    elif args.command == 'thresholds':
        from voting.thresholds import fit_thresholds, list_outdated

        print(fit_thresholds(args.folder, competition))
        csvs = [path for split in ('oof', 'test') for path in args.folder.glob(f'**/{split}.csv')]
        if outdated := list_outdated(csvs, len(competition.classes)):
            print(outdated)
        if configs := fold_files(args.folder, 'config.yaml'):
            folds = 'all' if len(configs) > 1 else fold_of(configs[0].parent)
            print(next_line('infer.py', '--cfg', configs[0], '--fold', folds, '--split', 'test'))
    else:
        from voting.recipe import calibrate_model  # imports scipy, which the other commands do without

        print(calibrate_model(args.folder, data, competition))
    return DONE


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    score = commands.add_parser('score', 'Print the score of CSVs against labels, by class too.')
    score.add_argument('csvs', nargs='+', type=Path, metavar='CSV', help='predictions of the same photos')
    truth = 'a COCO file with the truth of these photos'
    score.add_argument('--labels', type=Path, required=True, metavar='JSON', help=truth)
    add_data_arguments(score, 'the folder of --labels')
    doc = 'Say which of two out-of-fold predictions is better, by class too.'
    compare = commands.add_parser('compare', doc)
    compare.add_argument('csvs', nargs=2, type=Path, metavar='CSV', help='two oof.csv of the same photos')
    add_data_arguments(compare)
    doc = "Fit the temperature of a model's probabilities on its photos out of fold."
    calibrate = commands.add_parser('calibrate', doc)
    folder = 'output/<name>, with the oof_probs.npy of infer.py --save-probs'
    calibrate.add_argument('folder', type=Path, help=folder)
    add_data_arguments(calibrate)
    doc = 'Choose a threshold for each class that may overlap others, on photos out of fold.'
    thresholds = commands.add_parser('thresholds', doc)
    folder = 'output/<name>, with the oof_histograms.npy that infer.py --split oof writes'
    thresholds.add_argument('folder', type=Path, help=folder)
    add_data_arguments(thresholds)
    return parser.parse_args(argv)


def add_data_arguments(parser: ArgumentParser, place: str = 'input/data') -> None:
    parser.add_argument('--data', type=Path, help=f'data root; by default that of --cfg, or {place}')
    add_config_arguments(parser, required=False)


@dataclass(frozen=True)
class Confusions:
    """The photos of a CSV, and the pixels counted in each."""

    image_ids: tuple[str, ...]
    counts: np.ndarray  # (n, 3, K) int64 metrics.image_counts
    matrices: np.ndarray | None  # (n, K, K) int32, enough for any photo; None if classes may overlap

    def scores(self, metric: Metric) -> np.ndarray:
        """Return the (n,) score of each photo alone; nan if all its pixels are IGNORED."""
        return metric.score(self.counts[None])

    def class_scores(self, metric: Metric) -> np.ndarray:
        """Return the (n, K) score of each class in each photo."""
        return metric.by_class(self.counts[None])


def read_confusions(path: Path, coco: CocoSet, progress: Bar = iter) -> Confusions:
    """Count the confusions of a CSV, or read the file that an earlier call left beside it.

    `progress` wraps the image ids as tqdm does. Raises BadInput if the CSV is broken or has an image that is
    not among the photos.
    """
    cache = path.with_name(f'.{path.name}.confusions.npz')
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    competition = coco.competition
    form = competition.model_dump_json(include={'score_size', 'submission'}, exclude_defaults=True)
    facts = (status.st_size, status.st_mtime_ns, len(competition.classes), coco.fingerprint, form)
    stamp = ' '.join(map(str, facts)).removesuffix(' {}')
    confusions = _read_cache(cache, stamp, competition.is_multilabel)
    if confusions is None:
        confusions = count_confusions(path, coco, progress)
        _write_cache(cache, stamp, confusions)
    return confusions


def count_confusions(path: Path, coco: CocoSet, progress: Bar) -> Confusions:
    """Draw the truth of each row of a CSV, read its prediction and count. Raises BadInput."""
    photos = {photo.file_name: photo for photo in coco.photos}
    split = 'training' if coco.split == 'train' else coco.split
    competition, num_classes = coco.competition, len(coco.competition.classes)
    with coco.form.reader(path) as reader:
        unknown = next((image_id for image_id in reader.image_ids if image_id not in photos), None)
        if unknown is not None:
            raise BadInput(f'{path}: image {unknown!r} is not among the {split} photos of {coco.root}')
        rows = 3 if competition.is_multilabel else num_classes
        counted = np.zeros((len(reader.image_ids), rows, num_classes), np.int32)
        count = metrics.count_pixels if competition.is_multilabel else metrics.confusion_matrix
        for row, image_id in enumerate(progress(reader.image_ids)):
            truth = scored_truth(photos[image_id], competition)
            counted[row] = count(truth, reader.read(image_id), num_classes)
        return _confusions(reader.image_ids, counted, competition.is_multilabel)


def _confusions(image_ids: Sequence[str], counted: np.ndarray, is_multilabel: bool) -> Confusions:
    """Build Confusions from what was counted: (n, 3, K) if classes may overlap, else (n, K, K)."""
    if is_multilabel:
        return Confusions(tuple(image_ids), counted.astype(np.int64), None)
    hits = np.diagonal(counted, axis1=1, axis2=2)
    counts = np.stack([hits, counted.sum(1), counted.sum(2)], axis=1).astype(np.int64)
    return Confusions(tuple(image_ids), counts, counted)


def read_fold_confusions(
    paths: Sequence[Path], coco: CocoSet, progress: Bar = lambda image_ids, path: image_ids
) -> list[Confusions]:
    """Read the confusions of a model's oof.csv files. Raises BadInput if two of them have the same photo."""
    seen: dict[str, Path] = {}
    folds = []
    for path in paths:
        fold = read_confusions(path, coco, partial(progress, path=path))
        for image_id in fold.image_ids:
            if image_id in seen:
                raise BadInput(f'{path}: image {image_id!r} is out of fold in {seen[image_id]} too')
            seen[image_id] = path
        folds.append(fold)
    return folds


# the errors that numpy and zipfile raise for damaged .npz files; such a file is made again
BROKEN_NPZ = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, AttributeError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


def _read_cache(cache: Path, stamp: str, is_multilabel: bool) -> Confusions | None:
    """Return the confusions in the cache; None if it is missing, broken, or made from other files."""
    with suppress(*BROKEN_NPZ), np.load(cache) as file:
        if str(file['stamp']) == stamp:
            return _confusions(file['image_ids'].tolist(), file['matrices'], is_multilabel)
    return None


def _write_cache(cache: Path, stamp: str, confusions: Confusions) -> None:
    """Write the cache; in a folder that is read-only, leave it out."""
    with suppress(BadInput), write_whole(cache) as file:
        image_ids = np.array(confusions.image_ids)
        counted = confusions.counts if confusions.matrices is None else confusions.matrices
        np.savez_compressed(file, stamp=np.array(stamp), image_ids=image_ids, matrices=counted)


def read_counts(
    csvs: Sequence[Path], coco: CocoSet, image_ids: Sequence[str], source: Path
) -> list[np.ndarray]:
    """Return the (n, 3, K) image_counts of each CSV, with the `image_ids` of `source`. Raises BadInput."""
    form = coco.form
    for path in csvs:
        with form.reader(path) as reader:
            require_same_images(image_ids, source, reader)
    counts = []
    for path in csvs:
        confusions = read_confusions(path, coco, lambda ids: progress(ids, 'count', 'photo'))
        rows = {image_id: row for row, image_id in enumerate(confusions.image_ids)}
        counts.append(confusions.counts[[rows[image_id] for image_id in image_ids]])
    return counts


def score_csvs(csvs: Sequence[Path], labels: Path, competition: Competition) -> list[np.ndarray]:
    """Return the (n, 3, K) counts of each CSV against the labels. Raises BadInput for other images."""
    coco = read_truth(labels, competition)
    return read_counts(csvs, coco, [photo.file_name for photo in coco.photos], labels)


def read_truth(labels: Path, competition: Competition) -> CocoSet:
    """Read a COCO file of labels. Raises BadInput if it has no annotations."""
    coco = read_labels(labels, competition)
    if not any(photo.annotations for photo in coco.photos):
        raise BadInput(f'{labels}: has no annotations; expected the labels of its photos')
    return coco


def format_scores(csvs: Sequence[Path], counts: Sequence[np.ndarray], competition: Competition) -> str:
    """Format a line per CSV from its (n, 3, K) counts: the metric, its interval, mIoU if that is another, and
    the metric of each scored class, all in %; * is the best.
    """
    metric, classes = metric_of(competition), competition.classes
    scores = [*map(metric.interval, counts)]
    best = max(score.value for score in scores)
    iou = second_metric(competition)
    scored = metric.scored_ids(len(classes))
    names = [metric.label, f'{metrics.LEVEL:.0%} interval', *([iou.label] if iou else [])]
    names += [classes[k] for k in scored]
    table = [['', *(name.partition(' ')[0] for name in names)]]
    table.append(['', *(name.partition(' ')[2] for name in names)])
    for csv, score, csv_counts in zip(csvs, scores, counts, strict=True):
        star = '*' if len(csvs) > 1 and score.value == best else ' '
        values = metric.by_class(csv_counts)
        bounds = f'{100 * score.low:.1f}-{100 * score.high:.1f}'
        cells = [f'{100 * score.value:.2f}{star}', bounds]
        cells += [f'{100 * iou.score(csv_counts):.2f}'] if iou else []
        cells += ['-' if np.isnan(values[k]) else f'{100 * values[k]:.1f}' for k in scored]
        table.append([str(csv), *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for csv, *cells in table:
        padded = (f'{cell:>{width}}' for cell, width in zip(cells, widths[1:], strict=True))
        lines.append('  '.join([f'{csv:<{widths[0]}}', *padded]).rstrip())
    return '\n'.join([*lines, *filter(None, [metric.note])])


def second_metric(competition: Competition) -> Metric | None:
    """Return mIoU as `metric: miou` has it, to show beside another metric; None beside itself."""
    if competition.metric == 'miou':
        return None
    return metric_of(competition.model_copy(update={'metric': 'miou'}))


def compare_scores(csvs: Sequence[Path], data: Path, competition: Competition) -> str:
    """Format the scores of two CSVs and their difference, by class too, with intervals. Raises BadInput."""
    coco, classes, metric = read_coco(data, 'train', competition), competition.classes, metric_of(competition)
    with coco.form.reader(csvs[0]) as reader:
        image_ids = reader.image_ids
    first, second = read_counts(csvs, coco, image_ids, csvs[0])
    width = max(map(len, (*classes, metric.label)))
    iou = second_metric(competition)
    lines = []
    for path, counts in zip(csvs, (first, second), strict=True):
        beside = f', {iou.label} {iou.score(counts):.4f}' if iou else ''
        lines.append(f'{path}: {metric.label} {metric.interval(counts)}{beside}')
    lines.append(f'{"first - second":<{width}}           {metrics.LEVEL:.0%} bootstrap interval')
    total, gains = metric.paired_interval(first, second), metric.paired_class_intervals(first, second)
    rows = [(classes[k], gains[k]) for k in metric.scored_ids(len(classes))] + [(metric.label, total)]
    for name, gain in rows:
        if not np.isnan(gain.value):
            lines.append(f'{name:<{width}}  {gain.value:+.4f}  [{gain.low:+.4f}, {gain.high:+.4f}]')
    lines += filter(None, [metric.note])
    lines.append(metrics.verdict(total, len(image_ids)))
    return '\n'.join(lines)


if __name__ == '__main__':
    run_script(command)
