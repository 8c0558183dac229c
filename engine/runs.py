"""Run folder, log, checkpoint, seeds, distributed set-up. A closed list, not a drawer."""

import atexit
import csv
import ctypes
import io
import logging
import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from config import BadInput, Config, dump_config, load_config, one_line
from utils.files import cannot_write, hold, remove_partials, write_text, write_whole
from utils.progress import say
from utils.safe_load import read_tensors

log = logging.getLogger('trash')
T = TypeVar('T')

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h

# Keys that do not change what a run is: they may differ between training and resuming, or between training
# and inference.
FREE_KEYS = {
    'data_root',
    'cache_dir',
    'output_dir',
    'folds_csv',
    'workers',
    'checkpoint_minutes',
    'tracker',
    'device',
    'encoder_weights',
    'infer_batch_size',
    'tta_flips',
    'tta_rotations',
    'tta_scales',
    'window',
    'downsample',
    'pseudo_threshold',
    'pseudo_keep',
}
# Of them free for inference, but not for a run that goes on, since its scores or labels depend on them.
SCORE_KEYS = {'downsample', 'window', 'pseudo_threshold', 'pseudo_keep'}

# What every checkpoint holds.
CHECKPOINT = {
    'model': dict,
    'config': dict,
    'fold': int,
    'held_out': (str, type(None)),
    'epoch': int,
    'score': float,
}


# --- ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together, and its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def alone(cls) -> 'Ranks':
        """One process on the CPU."""
        return cls(0, 1, torch.device('cpu'))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sync_bn(self, cfg: Config) -> bool:
        """Whether BatchNorm is taken over all ranks; torch can do it on GPUs alone."""
        return self.world > 1 and cfg.sync_bn and self.device.type == 'cuda'

    def share(self, model: torch.nn.Module) -> None:
        """Gives every rank the weights and BatchNorm statistics of rank 0."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(world, ...) what each rank has, of one shape and type, on every rank; on the CPU."""
        if self.world == 1:
            return values[None].cpu()
        values = values.to(self.device)
        found = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(found, values)
        return torch.stack(found).cpu()

    def any(self, *flags: bool) -> list[bool]:
        """Each of the flags, set where it is on any rank."""
        if self.world == 1:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, device=self.device).int())]

    def share_of(self, count: int) -> range:
        """The places of `count` that are this rank's to do."""
        return range(self.rank, count, self.world)

    def main_first(self, make: Callable[[], T], find: Callable[[], T] | None = None) -> T:
        """What rank 0 makes, and the others find when it is there, by the same call where none is given."""
        made = make() if self.is_main else None
        self.wait()
        return made if self.is_main else (find or make)()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_ranks(cfg: Config) -> Ranks:
    """Joins the other ranks where torchrun started this process; alone otherwise. Raises BadInput for a
    device that is not there, or is one too few.
    """
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("config key 'device': found cuda, but torch sees no GPU here; expected auto or cpu")
    use_gpu = cfg.device != 'cpu' and torch.cuda.is_available()
    if not use_gpu:
        keep_freed_memory()
    device = torch.device('cuda' if use_gpu else 'cpu')
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world == 1:
        return Ranks(0, 1, device)
    if use_gpu:
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise BadInput(f'--nproc-per-node: expected one process a GPU at most; torch sees {count} here')
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # rank 0 builds caches and pseudo-labels while the others wait
        dist.init_process_group('nccl' if use_gpu else 'gloo', timeout=timedelta(hours=3))
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world, device)


def keep_freed_memory() -> None:
    """Has glibc keep what tensors free instead of handing it back to the system: the next step asks for it
    again, and the page faults cost up to a fifth of a step on the CPU. Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Of all generators that are not handed around; deterministic: torch takes no algorithm that varies."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that use the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which torch asks for
        torch.use_deterministic_algorithms(True)


# --- run folder


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
    other = [key for key in asked if key not in FREE_KEYS - SCORE_KEYS and asked[key] != found[key]]
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
    """The run's folder, which hold_run made, with its config in it. overwrite: without what an earlier run
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


def hold_run(folder: Path | None, doing: str = 'training') -> AbstractContextManager:
    """Keeps a run's folder for this process; None keeps nothing. Raises BadInput where another has it."""
    return hold(None if folder is None else folder / '.lock', doing)


class LogFile(logging.FileHandler):
    """log.txt. Raises Interrupted where there is no room for a line, instead of going on without."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        raise cannot_write(self.baseFilename, error) if isinstance(error, OSError) else error


def start_log(folder: Path | None, quiet: bool = False) -> None:
    """Log lines go to standard output, and to log.txt in `folder` where there is one; quiet (ranks above 0)
    leaves errors alone. Raises BadInput.
    """
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    console = Console(sys.stdout)
    console.setFormatter(logging.Formatter('%(message)s'))
    log.addHandler(console)
    if folder is not None:
        try:
            file = LogFile(folder / 'log.txt', encoding='utf-8')
        except OSError as error:
            raise cannot_write(folder / 'log.txt', error) from None
        file.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        log.addHandler(file)


class Console(logging.StreamHandler):
    """Log lines for a person: above a bar, in colours on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record), self.stream)
        except OSError:  # nobody reads any more: what is done here goes on
            self.handleError(record)


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


# --- checkpoints


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all. Raises BadInput, and Interrupted where there is no room."""
    with write_whole(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # which torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What save_checkpoint wrote, on the CPU; no code in it is run. Raises BadInput for anything else."""
    if not path.exists():
        raise BadInput(f'{path}: no such checkpoint; train it first')
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or not CHECKPOINT.keys() <= checkpoint.keys():
        raise BadInput(f'{path}: not a checkpoint of train.py')
    for key, kind in CHECKPOINT.items():
        if not isinstance(checkpoint[key], kind):
            found = type(checkpoint[key]).__name__
            raise BadInput(f'{path}: not a checkpoint of train.py: {key} is of type {found}')
    for key, value in checkpoint['model'].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise BadInput(f'{path}: not a checkpoint of train.py: model holds {str(key)[:60]!r}, no tensor')
    return checkpoint


def load_model_state(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Loads strictly. Raises BadInput, with the first tensor that does not fit."""
    own = model.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state:
            raise BadInput(
                f'{path}: is of another model: {key} is only in {"the file" if key in state else "the model"}'
            )
        if own[key].shape != state[key].shape:
            raise BadInput(
                f'{path}: is of another model: {key} is {tuple(state[key].shape)} there, '
                f'{tuple(own[key].shape)} here'
            )
    model.load_state_dict(state)
