"""Run folders, output/<name>/fold<k>/: opened, locked and read again, with the metrics of each epoch."""

import csv
import io
import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, dump_config, keys_free_on_resume, load_config
from utils.errors import BadInput, one_line
from utils.files import lock, remove_partials, write_text


def check_run(cfg: Config, fold: int, resume: bool, overwrite: bool) -> list[str]:
    """Raises BadInput where the run's folder cannot be written, holds another config's run, or holds this one
    and going on is not asked for. Changes nothing. Returns what else differs from the run that goes on.
    """
    folder = cfg.run_dir(fold)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f'{there}: this folder cannot be written')
    config_file = folder / 'config.yaml'
    if not config_file.exists() or overwrite:
        return []
    found = load_config(config_file).model_dump()
    asked = cfg.model_dump()
    free = keys_free_on_resume()
    other = [key for key in asked if key not in free and asked[key] != found[key]]
    if other:
        key = other[0]
        raise BadInput(
            f"{folder}: holds another config's run ({key}: {found[key]!r} there, {asked[key]!r} here); "
            f'give this one another name, or start again with --overwrite'
        )
    if (folder / 'last.pt').exists() and not resume:
        raise BadInput(
            f'{folder}: holds this run already; go on with --resume, or start again with --overwrite'
        )
    return [f'{key} is {asked[key]}, and was {found[key]}' for key in asked if asked[key] != found[key]]


def open_run(cfg: Config, fold: int, overwrite: bool) -> Path:
    """The run's folder, which lock_run made, with its config in it. overwrite: without what an earlier run
    left there, and without the predictions over all folds, of which that run was one.
    """
    folder = cfg.run_dir(fold)
    if overwrite:
        predictions = [f'{split}{end}' for split in ('oof', 'test') for end in ('.csv', '_probs.npy')]
        merged = [folder.parent / name for name in predictions] if fold >= 0 else []
        names = ['last.pt', 'best.pt', 'metrics.csv', 'tracker.yaml', 'provenance.yaml', 'changes.diff']
        names += ['model.onnx', 'model.md', *predictions]
        curves = (folder / 'tensorboard').glob('events.out.tfevents.*')
        for path in [*(folder / name for name in names), *merged, *curves]:
            path.unlink(missing_ok=True)
    remove_partials(
        folder, 'last.pt', 'best.pt', 'metrics.csv', 'config.yaml', 'provenance.yaml', 'changes.diff'
    )
    write_text(folder / 'config.yaml', dump_config(cfg))
    return folder


def lock_run(folder: Path | None, doing: str = 'training') -> AbstractContextManager:
    """Keeps a run's folder for this process; None keeps nothing. Raises BadInput where another has it."""
    return lock(None if folder is None else folder / '.lock', doing)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Writes metrics.csv again with one more row; rows of the same or a later epoch, from before a resume,
    are dropped. Raises BadInput.
    """
    rows = []
    if path.exists():
        try:
            with path.open(newline='', encoding='utf-8-sig') as file:  # a spreadsheet may have saved it
                rows = [old for old in csv.DictReader(file) if int(old['epoch']) < row['epoch']]
            if any(old.keys() != row.keys() for old in rows):
                raise ValueError('its columns are others')
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise BadInput(
                f'{path}: not the metrics of this run: {one_line(error)}; move it away, then --resume'
            ) from None
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows + [row])
    write_text(path, text.getvalue())


@dataclass(frozen=True)
class FoldRun:
    """A fold of a run: its folder, the config it was trained with, and its rows of metrics.csv."""

    number: int
    folder: Path
    cfg: Config
    metrics: list[dict[str, float]]


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
