"""Open, lock and read run folders, output/<name>/fold<k>/, with their config.yaml and metrics.csv."""

import csv
import io
import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, dump_config, fold_files, fold_of, keys_free_on_resume, make_config
from utils.errors import BadInput, one_line
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
        predictions = ['oof.csv', 'oof_probs.npy', 'test.csv', 'test_probs.npy']
        # the predictions over all folds are of the earlier run, too
        merged = [folder.parent / name for name in predictions] if fold >= 0 else []
        names = [*WRITTEN, 'tracker.yaml', 'model.onnx', 'model.md', *predictions]
        curves = (folder / 'tensorboard').glob('events.out.tfevents.*')
        for path in [*(folder / name for name in names), *merged, *curves]:
            path.unlink(missing_ok=True)
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


def _difference(cfg: Config, first: Config) -> str | None:
    """Return the first key that differs, of those by which two folds are one run; None if none does."""
    for key in ('classes', 'task', 'metric', 'score_size'):
        if getattr(cfg.competition, key) != getattr(first.competition, key):
            return key
    return None if cfg.data_root == first.data_root else 'data_root'
