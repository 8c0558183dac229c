"""Score predictions against labels, compare two, and calibrate probabilities.

    python evaluate.py score output/a/test.csv output/submission.csv --labels input/demo/test_labels.json
    python evaluate.py compare output/a/oof.csv output/b/oof.csv
    python evaluate.py compare output/a/fold0/oof.csv output/b/fold0/oof.csv --data input/data
    python evaluate.py calibrate output/convnext

score prints the IoU of each class and the mIoU of each CSV. compare says whether one of two predictions of
the same training photos is significantly better. calibrate fits the temperature of a model's probabilities
out of fold and writes calibration.yaml, which pseudo.py reads. The confusion matrices of a CSV are kept
beside it, in .<name>.confusions.npz, as long as the CSV and the annotations stay the same.

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
from config import Competition
from data.coco import CocoSet, draw_mask, read_coco, read_labels
from submission import SubmissionReader, competition_and_data, downsample_mask, require_same_images
from utils.cli import ArgumentParser, add_config_arguments, run_script
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
        print(format_scores(args.csvs, score_csvs(args.csvs, args.labels, competition), competition.classes))
    elif args.command == 'compare':
        print(compare_scores(args.csvs, data, competition))
    else:
        from voting.recipe import calibrate_model  # imports scipy, which the other commands do without

        print(calibrate_model(args.folder, data, competition))
    return DONE


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    score = commands.add_parser('score', 'Print the IoU per class and the mIoU of CSVs against labels.')
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
    return parser.parse_args(argv)


def add_data_arguments(parser: ArgumentParser, place: str = 'input/data') -> None:
    parser.add_argument('--data', type=Path, help=f'data root; by default that of --cfg, or {place}')
    add_config_arguments(parser, required=False)


@dataclass(frozen=True)
class Confusions:
    """Photos of a CSV and the confusion matrix of each."""

    image_ids: tuple[str, ...]
    matrices: np.ndarray  # (n, K, K) int32: at most 65,536 pixels

    def counts(self) -> np.ndarray:
        """Return the (n, 3, K) int64 metrics.image_counts of each photo."""
        hits = np.diagonal(self.matrices, axis1=1, axis2=2)
        return np.stack([hits, self.matrices.sum(1), self.matrices.sum(2)], axis=1).astype(np.int64)

    def ious(self) -> np.ndarray:
        """Return the (n, K) IoU of each class in each photo; nan if neither truth nor prediction has it."""
        return metrics.iou_of_counts(*np.moveaxis(self.counts(), 1, 0))

    def scores(self) -> np.ndarray:
        """Return the (n,) mean IoU over the classes in each photo; nan if all its pixels are IGNORED."""
        return metrics.mean_of_iou(self.ious())


def read_confusions(path: Path, coco: CocoSet, num_classes: int, progress: Bar = iter) -> Confusions:
    """Count the confusions of a CSV, or read the file that an earlier call left beside it.

    `progress` wraps the image ids as tqdm does. Raises BadInput if the CSV is broken or has an image that is
    not among the photos.
    """
    cache = path.with_name(f'.{path.name}.confusions.npz')
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    stamp = f'{status.st_size} {status.st_mtime_ns} {num_classes} {coco.fingerprint}'
    confusions = _read_cache(cache, stamp)
    if confusions is None:
        confusions = count_confusions(path, coco, num_classes, progress)
        _write_cache(cache, stamp, confusions)
    return confusions


def count_confusions(path: Path, coco: CocoSet, num_classes: int, progress: Bar) -> Confusions:
    """Draw the truth of each row of a CSV, read its prediction and count. Raises BadInput."""
    photos = {photo.file_name: photo for photo in coco.photos}
    split = 'training' if coco.split == 'train' else coco.split
    with SubmissionReader(path, num_classes, photos) as reader:
        unknown = next((image_id for image_id in reader.image_ids if image_id not in photos), None)
        if unknown is not None:
            raise BadInput(f'{path}: image {unknown!r} is not among the {split} photos of {coco.root}')
        matrices = np.zeros((len(reader.image_ids), num_classes, num_classes), np.int32)
        for row, image_id in enumerate(progress(reader.image_ids)):
            truth = downsample_mask(draw_mask(photos[image_id]))
            matrices[row] = metrics.confusion_matrix(truth, reader.read(image_id), num_classes)
        return Confusions(tuple(reader.image_ids), matrices)


def read_fold_confusions(
    paths: Sequence[Path], coco: CocoSet, num_classes: int, progress: Bar = lambda image_ids, path: image_ids
) -> list[Confusions]:
    """Read the confusions of a model's oof.csv files. Raises BadInput if two of them have the same photo."""
    seen: dict[str, Path] = {}
    folds = []
    for path in paths:
        fold = read_confusions(path, coco, num_classes, partial(progress, path=path))
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


def _read_cache(cache: Path, stamp: str) -> Confusions | None:
    """Return the confusions in the cache; None if it is missing, broken, or made from other files."""
    with suppress(*BROKEN_NPZ), np.load(cache) as file:
        if str(file['stamp']) == stamp:
            return Confusions(tuple(file['image_ids'].tolist()), file['matrices'])
    return None


def _write_cache(cache: Path, stamp: str, confusions: Confusions) -> None:
    """Write the cache; in a folder that is read-only, leave it out."""
    with suppress(BadInput), write_whole(cache) as file:
        image_ids = np.array(confusions.image_ids)
        np.savez_compressed(file, stamp=np.array(stamp), image_ids=image_ids, matrices=confusions.matrices)


def read_counts(
    csvs: Sequence[Path], coco: CocoSet, num_classes: int, image_ids: Sequence[str], source: Path
) -> list[np.ndarray]:
    """Return the (n, 3, K) image_counts of each CSV, with the `image_ids` of `source`. Raises BadInput."""
    for path in csvs:
        with SubmissionReader(path, num_classes, image_ids) as reader:
            require_same_images(image_ids, source, reader)
    counts = []
    for path in csvs:
        confusions = read_confusions(path, coco, num_classes, lambda ids: progress(ids, 'count', 'photo'))
        rows = {image_id: row for row, image_id in enumerate(confusions.image_ids)}
        counts.append(confusions.counts()[[rows[image_id] for image_id in image_ids]])
    return counts


def score_csvs(csvs: Sequence[Path], labels: Path, competition: Competition) -> list[np.ndarray]:
    """Return the (n, 3, K) counts of each CSV against the labels. Raises BadInput for other images."""
    coco = read_truth(labels, competition)
    return read_counts(
        csvs, coco, len(competition.classes), [photo.file_name for photo in coco.photos], labels
    )


def read_truth(labels: Path, competition: Competition) -> CocoSet:
    """Read a COCO file of labels. Raises BadInput if it has no annotations."""
    coco = read_labels(labels, competition)
    if not any(photo.annotations for photo in coco.photos):
        raise BadInput(f'{labels}: has no annotations; expected the labels of its photos')
    return coco


def format_scores(csvs: Sequence[Path], counts: Sequence[np.ndarray], classes: Sequence[str]) -> str:
    """Format a line per CSV from its (n, 3, K) counts: mIoU, interval, IoU per class in %; * is the best."""
    scores = [*map(metrics.interval, counts)]
    best = max(score.value for score in scores)
    names = ('mIoU', f'{metrics.LEVEL:.0%} interval', *classes)
    table = [['', *(name.partition(' ')[0] for name in names)]]
    table.append(['', *(name.partition(' ')[2] for name in names)])
    for csv, score, csv_counts in zip(csvs, scores, counts, strict=True):
        star = '*' if len(csvs) > 1 and score.value == best else ' '
        ious = metrics.iou_of_counts(*csv_counts.sum(0))
        cells = ('-' if np.isnan(iou) else f'{100 * iou:.1f}' for iou in ious)
        bounds = f'{100 * score.low:.1f}-{100 * score.high:.1f}'
        table.append([str(csv), f'{100 * score.value:.2f}{star}', bounds, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for csv, *cells in table:
        padded = (f'{cell:>{width}}' for cell, width in zip(cells, widths[1:], strict=True))
        lines.append('  '.join([f'{csv:<{widths[0]}}', *padded]).rstrip())
    return '\n'.join(lines)


def compare_scores(csvs: Sequence[Path], data: Path, competition: Competition) -> str:
    """Format the scores of two CSVs and their difference, by class too, with intervals. Raises BadInput."""
    coco, classes = read_coco(data, 'train', competition), competition.classes
    with SubmissionReader(csvs[0], len(classes), [photo.file_name for photo in coco.photos]) as reader:
        image_ids = reader.image_ids
    first, second = read_counts(csvs, coco, len(classes), image_ids, csvs[0])
    width = max(map(len, classes))
    totals = map(metrics.interval, (first, second))
    lines = [f'{path}: mIoU {score}' for path, score in zip(csvs, totals, strict=True)]
    lines.append(f'{"first - second":<{width}}           {metrics.LEVEL:.0%} bootstrap interval')
    total = metrics.paired_interval(first, second)
    for name, gain in zip([*classes, 'mIoU'], [*metrics.paired_by_class(first, second), total], strict=True):
        if not np.isnan(gain.value):
            lines.append(f'{name:<{width}}  {gain.value:+.4f}  [{gain.low:+.4f}, {gain.high:+.4f}]')
    lines.append(metrics.verdict(total, len(image_ids)))
    return '\n'.join(lines)


def cross_fit(totals: np.ndarray) -> tuple[int, np.ndarray]:
    """Choose among C candidates by their (parts, C, 3, K) counts, and for each part on the other parts alone.

    Returns the best candidate on all parts, and the (parts,) best ones without each part; the first of equal
    ones. Raises BadInput for a single part.
    """
    if len(totals) < 2:
        fault = 'found fewer than 2 photos out of fold'
        raise BadInput(f'{fault}; expected 2 or more, to choose on some for others')
    everything = totals.sum(0)
    without = [metrics.miou_of_counts(everything - part).argmax() for part in totals]
    return int(metrics.miou_of_counts(everything).argmax()), np.array(without)


if __name__ == '__main__':
    run_script(command)
