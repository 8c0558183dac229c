"""Open, lock and read run folders, output/<name>/fold<k>/, with their config.yaml and metrics.csv."""

import csv
import glob
import io
import math
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from config import (
    RUN_CONFIG,
    Config,
    dump_run_config,
    fold_files,
    fold_of,
    is_replaced,
    keys_free_on_resume,
    make_config,
    read_values,
)
from submission import metric_of
from utils.errors import BadInput, one_line, plural
from utils.files import lies_in, lock, remove_partials, write_text

# what train.py writes; last.pt goes first when a run is moved: without it, nothing goes on from the rest
WRITTEN = ('last.pt', 'best.pt', 'metrics.csv', RUN_CONFIG, 'provenance.yaml')
MASKS_FILE, CONFIDENCE_FILE = 'pseudo_masks.npy', 'pseudo_sure.npy'
ORIGIN_FILE = 'pseudo_masks.yaml'  # what the labels were made from
PREDICTION_ENDS = ('.csv', '.origin.json', '_probs.npy', '_histograms.npy')
PREDICTIONS = tuple(f'{split}{end}' for split in ('oof', 'test') for end in PREDICTION_ENDS)
RESULTS = ('last.pt', 'best.pt', MASKS_FILE, 'oof.csv', 'test.csv')  # that took hours
UNREADABLE = (OSError, KeyError, TypeError, ValueError, csv.Error)  # errors of a metrics.csv by another hand


def read_run_config(folder: Path) -> Config:
    """Read the config that a run was trained with, whatever its data root says now. Raises BadInput."""
    path = folder / RUN_CONFIG
    return make_config(read_values(path), where=str(path))


def check_run(cfg: Config, fold: int, resume: bool, overwrite: bool) -> list[str]:
    """Check that a run can start in its folder; return a line for each key that differs from the run there.

    Raises BadInput if the folder cannot be written, or holds another run, or this one and no flag is given.
    """
    if resume and overwrite:
        raise BadInput('--resume and --overwrite: expected one of the two')
    folder = cfg.run_dir(fold)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f'{existing}: this folder cannot be written')
    try:
        changes = [] if overwrite else compare_config(cfg, folder)
        if not overwrite:
            refuse_trained(folder, resume)
    except BadInput as error:
        raise BadInput('; '.join([str(error), *describe_replaced(folder)])) from None
    for key in ('weights', 'encoder_weights'):
        path = Path(getattr(cfg, key) or '')
        if path.is_file() and lies_in(path, folder) and not (resume and (folder / 'last.pt').exists()):
            fault = f'{path} lies in {folder}, which this run writes'
            raise BadInput(f'config key {key!r}: {fault}; give it another name: --set name=NAME')
    return changes


def compare_config(cfg: Config, folder: Path) -> list[str]:
    """Return a line for each key that differs from the run in a folder. Raises BadInput if it is another."""
    if not (folder / 'config.yaml').exists():
        return []
    old, new = _values(read_run_config(folder)), _values(cfg)
    unknown = {key for key in ('mean', 'std') if new[key] is None}  # until the photos are read
    changed = [key for key in new if new[key] != old[key] and key not in unknown]
    for key in changed:
        if key not in keys_free_on_resume():
            fault = f"holds another config's run ({key}: {old[key]!r} there, {new[key]!r} here)"
            advice = 'give this one another name, or start again with --overwrite'
            raise BadInput(f'{folder}: {fault}; {advice}')
    return [f'{key} is {new[key]}, and was {old[key]}' for key in changed]


def refuse_trained(folder: Path, resume: bool) -> None:
    """Raise BadInput if a run folder holds checkpoints that a start without --overwrite would replace."""
    again = 'start again with --overwrite'
    if not resume and (folder / 'last.pt').exists():
        raise BadInput(f'{folder}: holds this run already; go on with --resume, or {again}')
    is_run = resume and ((folder / 'last.pt').exists() or (folder / 'metrics.csv').exists())
    if (folder / 'best.pt').exists() and not is_run:
        fault = 'holds a model, best.pt, but no last.pt to go on from'
        raise BadInput(f'{folder}: {fault}; give this run another name, or {again}')


def _values(cfg: Config) -> dict[str, Any]:
    """Return the values of a config and of its competition, but the folds' groups, which folds.csv holds.
    Weights and extra data are told by their name: a run goes on where they have moved.
    """
    values = cfg.model_dump(exclude={'competition': {'group'}})
    values = {key: value.resolve() if isinstance(value, Path) else value for key, value in values.items()}
    values['weights'] = cfg.weights and cfg.weights.name
    values['extra_data'] = [{**extra, 'root': extra['root'].name} for extra in values['extra_data']]
    return values | values.pop('competition')


def open_run(cfg: Config, fold: int, overwrite: bool) -> Path:
    """Write the config into the locked run folder, emptied first if `overwrite`, and return the folder."""
    folder = cfg.run_dir(fold)
    if overwrite:
        move_aside(folder)
    if cfg.keep == 'last' and not (folder / 'last.pt').exists():
        (folder / 'best.pt').unlink(missing_ok=True)  # until the end it would seem to be this run's
    remove_partials(folder, *WRITTEN, 'changes*.diff')
    write_text(folder / RUN_CONFIG, dump_run_config(cfg, folder))
    return folder


def move_aside(folder: Path) -> None:
    """Move the files of a run out of its locked folder into <folder>.old-<date>, until remove_replaced. Files
    of a run that has no result yet are removed.
    """
    names = [*WRITTEN, MASKS_FILE, CONFIDENCE_FILE, ORIGIN_FILE, 'tracker.yaml', 'model.onnx', 'model.md']
    patterns = [*names, *PREDICTIONS, 'changes*.diff', 'tensorboard/events.out.tfevents.*']
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    moves = {path: path.relative_to(folder) for path in paths}
    if fold_of(folder) != -1:  # the predictions over all folds are of the earlier run, too
        merged = [path for name in PREDICTIONS for path in folder.parent.glob(name)]
        moves |= {path: Path('all_folds', path.name) for path in merged}
    if not any((folder / name).exists() for name in RESULTS):
        for path in moves:
            path.unlink()
        return
    date, count = f'{datetime.now():%Y%m%d-%H%M%S}', 0
    while (target := folder.with_name(f'{folder.name}.old-{date}{f"-{count}" if count else ""}')).exists():
        count += 1  # a clock that was set back
    for path, place in moves.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target / place)


def replaced_runs(folder: Path) -> list[Path]:
    """List the folders into which move_aside has moved runs of a run folder."""
    paths = folder.parent.glob(f'{glob.escape(folder.name)}.old-*')
    return sorted(path for path in paths if is_replaced(path))


def describe_replaced(folder: Path) -> list[str]:
    """Say where each run lies that another replaces which has no checkpoint yet."""
    rescue = f'until a new run has its first checkpoint; to keep it, move its files into {folder}'
    return [f'{path} holds an earlier run, {rescue}' for path in replaced_runs(folder)]


def remove_replaced(folder: Path) -> None:
    """Remove the runs that were moved aside: the new one has a checkpoint."""
    for path in replaced_runs(folder):
        shutil.rmtree(path, ignore_errors=True)


def lock_run(folder: Path | None, doing: str = 'training') -> AbstractContextManager:
    """Lock a run folder for this process; None locks nothing. Raises BadInput if another process holds it."""
    return lock(None if folder is None else folder / '.lock', doing)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add a row to metrics.csv in place of rows from its epoch on, which a resume left. Raises BadInput."""
    rows = []
    if path.exists():
        try:
            rows = [old for old in read_rows(path) if int(old['epoch']) < row['epoch']]
            if any(old.keys() != row.keys() for old in rows):
                raise ValueError('its columns are different')
        except UNREADABLE as error:
            fault = f'not the metrics of this run: {one_line(error)}'
            raise BadInput(f'{path}: {fault}; move it away, then --resume') from None
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows + [row])
    write_text(path, text.getvalue())


def read_metrics(path: Path, metric: str = 'miou') -> list[dict[str, float]]:
    """Read epoch, loss and, as score, the metric (nan if empty) of each row, [] without a file. Raises
    BadInput.
    """
    if not path.is_file():
        return []
    keys = {'loss': 'loss', 'score': metric}
    try:
        return [
            {'epoch': int(row['epoch'])} | {key: float(row[name] or 'nan') for key, name in keys.items()}
            for row in read_rows(path)
        ]
    except UNREADABLE as error:
        expected = f'a row an epoch with epoch, {", ".join(keys.values())}'
        raise BadInput(f'{path}: expected {expected}: {one_line(error)}') from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv as texts. Raises one of UNREADABLE."""
    with path.open(newline='', encoding='utf-8-sig') as file:  # a spreadsheet adds a byte order mark
        return list(csv.DictReader(file))


def best_score(metrics: list[dict[str, float]]) -> float:
    """Return the highest score of the rows of a metrics.csv; nan if there is none."""
    return max((row['score'] for row in metrics if not math.isnan(row['score'])), default=math.nan)


@dataclass(frozen=True)
class FoldRun:
    """Hold a fold of a run: its folder, the config it was trained with, and the rows of its metrics.csv."""

    fold: int
    folder: Path
    cfg: Config
    metrics: list[dict[str, float]]

    @property
    def score(self) -> float:
        """The validation score of the epoch that best.pt is of, or will be; nan without one."""
        if self.cfg.keep == 'best':
            return best_score(self.metrics)
        last = self.cfg.epochs - 1
        return next((row['score'] for row in self.metrics if row['epoch'] == last), math.nan)

    @property
    def oof_csv(self) -> Path:
        return self.folder / 'oof.csv'


def read_fold(folder: Path) -> FoldRun:
    """Read the config and the metrics of a run folder. Raises BadInput."""
    cfg = read_run_config(folder)
    metrics = read_metrics(folder / 'metrics.csv', cfg.competition.metric)
    return FoldRun(fold_of(folder), folder, cfg, metrics)


def read_runs(run: Path) -> list[FoldRun]:
    """Read the folds of a run that have an oof.csv. Raises BadInput if none has."""
    if not run.is_dir():
        raise BadInput(f'{run}: no such run; train it first')
    folds = [read_fold(path.parent) for path in fold_files(run, 'oof.csv')]
    if not folds:
        raise BadInput(f'{run}: no fold*/oof.csv in it; python infer.py --split oof writes them')
    for fold in folds[1:]:
        if key := _difference(fold.cfg, folds[0].cfg):
            raise BadInput(f'{fold.folder / "config.yaml"}: {key} is not that of {folds[0].folder}')
    return folds


def compare_epochs(run: Path) -> str:
    """Format the scores of three epochs of each fold, from its metrics.csv: of its best one, of the one that
    is best in the other folds, and of the last one. Raises BadInput.
    """
    folds = [read_fold(path.parent) for path in fold_files(run, 'metrics.csv')]
    if len(folds) < 2:
        raise BadInput(f'{run}: found {plural(len(folds), "fold")} with a metrics.csv, expected two or more')
    epochs = folds[0].cfg.epochs
    for fold in folds:
        if fold.cfg.epochs != epochs:
            found = f'is of {fold.cfg.epochs} epochs, {folds[0].folder} of {epochs}'
            raise BadInput(f'{fold.folder}: {found}; train all folds for as many, with --overwrite')
        if (found := len(fold.metrics)) != epochs:
            raise BadInput(f'{fold.folder}: has {found} of {epochs} epochs; go on with --resume')
    curves = np.array([[row['score'] for row in fold.metrics] for fold in folds])
    validated = np.flatnonzero(np.isfinite(curves).all(axis=0))
    if epochs - 1 not in validated:
        raise BadInput(f'{run}: a fold has no validation score of the last epoch')
    rules = choose_epochs(curves[:, validated])
    label = metric_of(folds[0].cfg.competition).label
    names = ['best epoch', 'by the other folds', 'last epoch']
    lines = [f'{label:<10}' + ''.join(f'{name:>20}' for name in names)]
    scores = np.array([curves[range(len(folds)), validated[rule]] for rule in rules])
    for number, fold in enumerate(folds):
        cells = [f'{scores[n, number]:.4f} in {validated[rule[number]] + 1}' for n, rule in enumerate(rules)]
        lines.append(f'fold {fold.fold:<5}' + ''.join(f'{cell:>20}' for cell in cells))
    best, chosen, last = scores.mean(axis=1)
    lines.append(f'{"mean":<10}' + ''.join(f'{score:>20.4f}' for score in (best, chosen, last)))
    lines.append(f'optimism of keep: best, from choosing on the photos that score it: {best - chosen:+.4f}')
    lines.append(f'the last epoch against one that was chosen on other photos: {last - chosen:+.4f}')
    return '\n'.join(lines)


def choose_epochs(curves: np.ndarray) -> np.ndarray:
    """Choose an epoch of each of F folds by three rules, from validation curves (F, E) → (3, F): the best one
    of the fold, the one with the best mean of the other folds, and the last one; of equal ones the first.
    """
    folds = range(len(curves))
    by_others = [np.delete(curves, fold, axis=0).mean(axis=0).argmax() for fold in folds]
    return np.array([curves.argmax(axis=1), by_others, [curves.shape[1] - 1 for _ in folds]])


def _difference(cfg: Config, first: Config) -> str | None:
    """Return the first key that differs, of those by which two folds are one run; None if none does."""
    for key in ('classes', 'task', 'metric', 'score_size'):
        if getattr(cfg.competition, key) != getattr(first.competition, key):
            return key
    return None if cfg.data_root == first.data_root else 'data_root'
