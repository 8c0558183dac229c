"""Open, lock and read run folders, output/<name>/fold<k>/, with their config.yaml and metrics.csv."""

import csv
import io
import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, dump_config, fold_files, fold_of, keys_free_on_resume, make_config
from submission import metric_of
from utils.errors import BadInput, one_line, plural
from utils.files import lock, remove_partials, write_text
from utils.yaml_files import read_mapping

# what train.py writes besides config.yaml
WRITTEN = ('last.pt', 'best.pt', 'metrics.csv', 'provenance.yaml', 'changes.diff')
UNREADABLE = (OSError, KeyError, TypeError, ValueError, csv.Error)  # errors of a metrics.csv by another hand


def read_run_config(folder: Path) -> Config:
    """Read the config that a run was trained with, whatever its data root says now. Raises BadInput."""
    path = folder / 'config.yaml'
    return make_config(read_mapping(path), where=str(path))


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
    if overwrite or not (folder / 'config.yaml').exists():
        return []
    old, new = _values(read_run_config(folder)), _values(cfg)
    again = 'start again with --overwrite'
    unknown = {key for key in ('mean', 'std') if new[key] is None}  # until the photos are read
    changed = [key for key in new if new[key] != old[key] and key not in unknown]
    for key in changed:
        if key not in keys_free_on_resume():
            fault = f"holds another config's run ({key}: {old[key]!r} there, {new[key]!r} here)"
            raise BadInput(f'{folder}: {fault}; give this one another name, or {again}')
    if (folder / 'last.pt').exists() and not resume:
        raise BadInput(f'{folder}: holds this run already; go on with --resume, or {again}')
    return [f'{key} is {new[key]}, and was {old[key]}' for key in changed]


def _values(cfg: Config) -> dict[str, Any]:
    """Return the values of a config and of its competition, but the folds' groups, which folds.csv holds."""
    values = cfg.model_dump(exclude={'competition': {'group'}})
    return values | values.pop('competition')


def open_run(cfg: Config, fold: int, overwrite: bool) -> Path:
    """Write the config into the locked run folder, emptied first if `overwrite`, and return the folder."""
    folder = cfg.run_dir(fold)
    if overwrite:
        ends = ('.csv', '.origin.json', '_probs.npy', '_histograms.npy')
        predictions = [f'{split}{end}' for split in ('oof', 'test') for end in ends]
        # the predictions over all folds are of the earlier run, too
        merged = [folder.parent / name for name in predictions] if fold >= 0 else []
        names = [*WRITTEN, 'tracker.yaml', 'model.onnx', 'model.md', *predictions]
        curves = (folder / 'tensorboard').glob('events.out.tfevents.*')
        for path in [*(folder / name for name in names), *merged, *curves]:
            path.unlink(missing_ok=True)
    if cfg.keep == 'last' and not (folder / 'last.pt').exists():
        (folder / 'best.pt').unlink(missing_ok=True)  # until the end it would seem to be this run's
    remove_partials(folder, 'config.yaml', *WRITTEN)
    write_text(folder / 'config.yaml', dump_config(cfg))
    return folder


def lock_run(folder: Path | None, doing: str = 'training') -> AbstractContextManager:
    """Lock a run folder for this process; None locks nothing. Raises BadInput if another process holds it."""
    return lock(None if folder is None else folder / '.lock', doing)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add a row to metrics.csv in place of rows from its epoch on, which a resume left. Raises BadInput."""
    rows = []
    if path.exists():
        try:
            rows = [old for old in _read_rows(path) if int(old['epoch']) < row['epoch']]
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
    keys = {'epoch': 'epoch', 'loss': 'loss', 'score': metric}
    try:
        return [{key: float(row[name] or 'nan') for key, name in keys.items()} for row in _read_rows(path)]
    except UNREADABLE as error:
        expected = f'a row an epoch with {", ".join(keys.values())}'
        raise BadInput(f'{path}: expected {expected}: {one_line(error)}') from None


def _read_rows(path: Path) -> list[dict[str, str]]:
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
