"""Score predictions against labels, compare two, calibrate, choose thresholds, and compare epochs.

    python evaluate.py score output/a/test.csv output/submission.csv --labels input/demo/test_labels.json
    python evaluate.py compare output/a/oof.csv output/b/oof.csv
    python evaluate.py compare output/a/fold0/oof.csv output/b/fold0/oof.csv --data input/data
    python evaluate.py compare output/a-seed{0,1,2} --against output/b-seed{0,1,2}
    python evaluate.py seeds output/a-seed{0,1,2}
    python evaluate.py calibrate output/convnext
    python evaluate.py thresholds output/hands
    python evaluate.py epochs output/convnext

score prints the competition's metric of each CSV, and of each class in it. compare says whether one of two
predictions of the same training photos is significantly better, or one of two recipes that were trained with
several seeds (scripts/compare.sh trains them). seeds prints the score of a recipe, with an interval that
holds photos and seeds. calibrate fits the temperature of a model's probabilities out of fold and writes
calibration.yaml, which pseudo.py reads. thresholds chooses those of classes that may overlap, from the
histograms that infer.py keeps, and writes thresholds.yaml, which infer.py reads. epochs says how much too
good a score is whose epoch was chosen on the photos that score it, from the metrics.csv of all folds. What is
counted in a CSV is kept beside it, in .<name>.confusions.npz, as long as the CSV and the annotations stay the
same.

Shapes: n photos, K classes, S seeds.
"""

import argparse
import math
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
from config import Competition, fold_dir, fold_files, fold_of
from data.coco import CocoSet, read_coco, read_labels, scored_truth
from engine.runs import compare_epochs
from metrics import Metric
from submission import competition_and_data, metric_of, require_same_images
from utils.cli import ArgumentParser, add_config_arguments, at_least, next_line, run_script
from utils.errors import DONE, BadInput, Interrupted, plural
from utils.files import write_whole
from utils.progress import progress
from voting.members import complete_scenes
from voting.origin import read_photos, refuse_outdated

SMALL = 0.01  # difference that compare plans seeds for
WIDTH = 100  # columns of a table on a terminal
Bar = Callable[..., Iterable[str]]  # takes image ids and yields them; with the path of their CSV for folds


def command(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    if args.command == 'epochs':
        print(compare_epochs(args.folder))
        return DONE
    if args.command == 'score' and args.cfg is None:
        args.data = args.data or args.labels.parent
    competition, data = competition_and_data(args)
    if args.command == 'score':
        print(format_scores(args.csvs, score_csvs(args.csvs, args.labels, competition), competition))
    elif args.command == 'compare':
        runs = read_runs(args.runs + args.against, read_coco(data, 'train', competition), args.folds)
        print(compare_runs(runs, len(args.runs), competition))
    elif args.command == 'seeds':
        runs = read_runs(args.runs, read_coco(data, 'train', competition), args.folds)
        print(describe_seeds(runs, competition))
    elif args.command == 'thresholds':
        from voting.thresholds import fit_thresholds, list_outdated

        print(fit_thresholds(args.folder, competition))
        csvs = [path for split in ('oof', 'test') for path in args.folder.glob(f'**/{split}.csv')]
        if outdated := list_outdated(csvs, len(competition.classes)):
            print(outdated)
        configs = fold_files(args.folder, 'config.yaml')
        if configs and (data / 'test.json').is_file():
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
    doc = 'Say which of two out-of-fold predictions, or of two recipes by several seeds, is better.'
    compare = commands.add_parser('compare', doc)
    run = 'an oof.csv, or the folder of a run with those of its folds'
    pair = f'{run}: two, or with --against those of the first recipe, one a seed'
    compare.add_argument('runs', nargs='+', type=Path, metavar='RUN', help=pair)
    other = 'those of the second recipe, by the same seeds in the same order; by default the second RUN'
    compare.add_argument('--against', nargs='+', type=Path, metavar='RUN', help=other)
    doc = "Print a recipe's score, averaged over seeds, and how much it changes with photos and seeds."
    seeds = commands.add_parser('seeds', doc)
    seeds.add_argument('runs', nargs='+', type=Path, metavar='RUN', help=f'{run}, one a seed')
    for command in (compare, seeds):
        only = 'folds of the run folders to take; by default all that have an oof.csv'
        command.add_argument('--folds', nargs='+', type=at_least(0), metavar='K', help=only)
        add_data_arguments(command)
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
    doc = 'Say how much the score gains by choosing the epoch on the photos that score it.'
    epochs = commands.add_parser('epochs', doc)
    folder = 'output/<name>, with the metrics.csv of two folds or more'
    epochs.add_argument('folder', type=Path, help=folder)
    args = parser.parse_args(argv)
    if args.command == 'compare' and args.against is None:
        if len(args.runs) != 2:
            compare.error(f'found {plural(len(args.runs), "RUN")}, expected two, or --against and as many')
        args.runs, args.against = args.runs[:1], args.runs[1:]
    if args.command == 'compare' and len(args.runs) != len(args.against):
        found = f'found {len(args.against)} runs for {len(args.runs)}'
        compare.error(f'--against: {found}, expected as many, each by the seed of its pair')
    for option in ('runs', 'against', 'folds'):  # a training that counts as two would hide how much they vary
        values = getattr(args, option, None) or []
        known = [value.resolve() if isinstance(value, Path) else value for value in values]
        if twice := [value for value, one in zip(values, known, strict=True) if known.count(one) > 1]:
            raise BadInput(f'{"RUN" if option == "runs" else f"--{option}"}: {twice[-1]} is given twice')
    return args


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
    """Write the cache; in a folder that is read-only or full, leave it out."""
    with suppress(BadInput, Interrupted), write_whole(cache) as file:
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
    """Format the scores of CSVs from their (n, 3, K) counts: a line each with the metric, its interval, and
    mIoU if that is another; then a line a scored class with a column a CSV. * is the best.
    """
    metric, classes = metric_of(competition), competition.classes
    scores = [*map(metric.interval, counts)]
    best = max(score.value for score in scores)
    iou = second_metric(competition)
    lines = [f'    {metric.label:<9}{f"{metrics.LEVEL:.0%} interval":<18}{iou.label if iou else ""}'.rstrip()]
    for number, (csv, score, csv_counts) in enumerate(zip(csvs, scores, counts, strict=True), start=1):
        star = '*' if len(csvs) > 1 and score.value == best else ' '
        bounds = f'[{score.low:.4f}, {score.high:.4f}]'
        other = f'{iou.score(csv_counts):.4f}  ' if iou else ''
        lines.append(f'{number:>2}  {score.value:.4f}{star}  {bounds}  {other}{csv}')
    width = max(len(classes[k]) for k in metric.scored_ids(len(classes)))
    columns = max(1, (WIDTH - width) // 7)
    for start in range(0, len(csvs), columns):
        chosen = range(start, min(start + columns, len(csvs)))
        lines += ['', ' ' * width + ''.join(f'{number + 1:7}' for number in chosen)]
        by_class = [metric.by_class(counts[number]) for number in chosen]
        for k in metric.scored_ids(len(classes)):
            cells = ['-' if np.isnan(values[k]) else f'{values[k]:.3f}' for values in by_class]
            lines.append(f'{classes[k]:<{width}}' + ''.join(f'{cell:>7}' for cell in cells))
    return '\n'.join([*lines, *filter(None, [metric.note])])


def second_metric(competition: Competition) -> Metric | None:
    """Return mIoU as `metric: miou` has it, to show beside another metric; None beside itself."""
    if competition.metric == 'miou':
        return None
    return metric_of(competition.model_copy(update={'metric': 'miou'}))


@dataclass(frozen=True)
class Runs:
    """The counts of R runs on the same photos, and what is known of these."""

    paths: tuple[Path, ...]
    counts: np.ndarray  # (n, R, 3, K) metrics.image_counts
    folds: np.ndarray | None  # (n,) fold whose training predicted a photo, the same in all runs; None if not
    scenes: np.ndarray | None  # (n,) scene, whose photos share a fold; None if it is not known


@dataclass(frozen=True)
class Run:
    """The counts of one run: those of an oof.csv, or of the folds in a folder."""

    path: Path
    image_ids: tuple[str, ...]
    counts: np.ndarray  # (n, 3, K)
    folds: list[int | None]
    scenes: list[int | None]


def read_runs(paths: Sequence[Path], coco: CocoSet, folds: Sequence[int] | None = None) -> Runs:
    """Read runs, each an oof.csv or a folder with those of its folds. Raises BadInput for other photos."""
    runs = []
    for path in paths:
        runs.append(read_run(path, coco, folds))
        require_same_images(runs[0].image_ids, paths[0], runs[-1])
    orders = []
    for run in runs:
        rows = {image_id: row for row, image_id in enumerate(run.image_ids)}
        orders.append([rows[image_id] for image_id in runs[0].image_ids])
    pairs = [*zip(runs, orders, strict=True)]
    counts = np.stack([run.counts[order] for run, order in pairs], 1)
    trained = [[run.folds[row] for row in order] for run, order in pairs]
    same = trained[0] if all(one == trained[0] for one in trained) and None not in trained[0] else None
    known = [[run.scenes[row] for row in order] for run, order in pairs]
    scenes = next((np.array(one) for one in known if None not in one), None)
    return Runs(tuple(paths), counts, None if same is None else np.array(same), scenes)


def read_run(path: Path, coco: CocoSet, folds: Sequence[int] | None) -> Run:
    """Read a run from an oof.csv, or a folder with those of its folds. Raises BadInput if there is none."""
    csvs = [path]
    if path.is_dir():
        csvs = (
            fold_files(path, 'oof.csv') if folds is None else [path / fold_dir(k) / 'oof.csv' for k in folds]
        )
        if not csvs:
            raise BadInput(f'{path}: no fold*/oof.csv in it; python infer.py --split oof writes them')
    elif folds is not None:
        raise BadInput(f'{path}: --folds goes with the folders of runs, not with a CSV')
    refuse_outdated(csvs)
    confusions = read_fold_confusions(csvs, coco, lambda ids, path: progress(ids, 'count', 'photo'))
    image_ids, parts = [], []
    for csv, fold in zip(csvs, confusions, strict=True):
        known = read_photos([csv])
        image_ids += fold.image_ids
        parts += [known.get(image_id, (fold_of(csv.parent), None)) for image_id in fold.image_ids]
    counts = np.concatenate([fold.counts for fold in confusions])
    trained, scenes = zip(*parts, strict=True) if parts else ((), ())
    scenes = complete_scenes(image_ids, scenes, coco.root, coco.competition)
    return Run(path, tuple(image_ids), counts, list(trained), scenes)


def compare_runs(runs: Runs, seeds: int, competition: Competition) -> str:
    """Format the scores of the runs, the first `seeds` of one recipe and the others of another, and the mean
    difference of the pairs, by class too, with intervals.
    """
    classes, metric = competition.classes, metric_of(competition)
    ours, theirs = runs.counts[:, :seeds], runs.counts[:, seeds:]
    total, gains = metric.seed_intervals(ours, theirs, runs.scenes, runs.folds)
    width = max(map(len, (*classes, metric.label)))
    lines = format_runs(runs, competition)
    if seeds > 1:
        for name, counts in (('first', ours), ('second', theirs)):
            lines.append(f'{name}: {format_mean(counts, runs, metric)}')
    over = f'interval over photos and {seeds} seeds' if seeds > 1 else 'bootstrap interval over photos'
    lines.append(f'{"first - second":<{width}}           {metrics.LEVEL:.0%} {over}')
    rows = [(classes[k], gains[k]) for k in metric.scored_ids(len(classes))] + [(metric.label, total)]
    for name, gain in rows:
        if not np.isnan(gain.value):
            lines.append(f'{name:<{width}}  {gain.value:+.4f}  [{gain.low:+.4f}, {gain.high:+.4f}]')
    lines += filter(None, [metric.note])
    lines.append(plan_seeds(total, len(ours)))
    lines.append(metrics.verdict(total, len(ours), seeds))
    return '\n'.join(lines)


def describe_seeds(runs: Runs, competition: Competition) -> str:
    """Format the score of each run of a recipe, their mean with its interval, and their spread."""
    metric = metric_of(competition)
    lines = format_runs(runs, competition)
    if len(runs.paths) > 1:
        lines.append(
            f'{format_mean(runs.counts, runs, metric)}: {metrics.LEVEL:.0%} interval over photos and seeds'
        )
    return '\n'.join([*lines, *filter(None, [metric.note])])


def format_runs(runs: Runs, competition: Competition) -> list[str]:
    """Format a line for each run: its score and interval over photos, and mIoU beside another metric."""
    metric, iou, lines = metric_of(competition), second_metric(competition), []
    for path, counts in zip(runs.paths, np.moveaxis(runs.counts, 1, 0), strict=True):
        beside = f', {iou.label} {iou.score(counts):.4f}' if iou else ''
        score, _ = metric.seed_intervals(counts[:, None], scenes=runs.scenes)
        lines.append(f'{path}: {metric.label} {score}{beside}')
    return lines


def format_mean(counts: np.ndarray, runs: Runs, metric: Metric) -> str:
    """Format the mean score of (n, S, 3, K) counts over S seeds, its interval, and their spread."""
    mean, _ = metric.seed_intervals(counts, None, runs.scenes, runs.folds)
    spread = f'{np.std(metric.score(counts), ddof=1):.4f}'
    if runs.folds is not None and len(np.unique(runs.folds)) > 1:
        spread += f' ({np.sqrt(mean.training):.4f} if the trainings of folds are independent)'
    return f'{mean.seeds} seeds, standard deviation {spread}, mean {metric.label} {mean}'


def plan_seeds(gain: metrics.SeedInterval, photos: int) -> str:
    """Say how many seeds would show a difference of SMALL, or that the photos hide it from any number."""
    if gain.seeds == 1:
        return 'one seed: the interval holds the photos alone, not what other seeds would change'
    if np.isnan(gain.training):
        return 'a class that only some seeds predict leaves no interval'
    visible = f'{gain.visible(gain.seeds):.4f} in {metrics.POWER:.0%} of cases'
    shown = f'{gain.seeds} seeds show a difference of {visible}'
    limit, needed = gain.visible(np.inf), gain.seeds_to_see(SMALL)
    if limit > SMALL:
        more = math.ceil(photos * (limit / SMALL) ** 2)
        return f'{shown}; to show {SMALL}, no number of seeds is enough: label {more:,} photos or more'
    if needed is None:
        return f'{shown}; to show {SMALL}, train more than {metrics.MOST_SEEDS} seeds'
    if needed <= gain.seeds:
        return f'{shown}; {needed} are enough to show {SMALL}'
    return f'{shown}; to show {SMALL}, train {needed - gain.seeds} more, {needed} in all'


if __name__ == '__main__':
    run_script(command)
