"""Save and load checkpoints, and rebuild the model of a run from its checkpoint.

run = load_model('output/convnext/fold0')       # or a shared folder, or owner/name of the Hugging Face hub
mask = photo_mask(run, photo)                   # engine.inference: (H, W, 3) uint8 RGB → (H, W) class ids
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import COMPETITION_FILE, Config, keys_free_in_inference, make_config
from data.cache import Cache
from data.folds import is_held_out
from engine.distributed import start_ranks
from engine.hub import choose_model, is_shared, read_shared
from engine.runs import describe_replaced, remove_replaced
from models import SegModel, empty_model, memory_format
from utils.errors import BadInput
from utils.files import write_whole
from utils.safe_load import read_tensors, refuse_changed
from voting.thresholds import DEFAULT, read_thresholds

# the keys of every checkpoint, with their types
CHECKPOINT = {
    'model': dict,
    'config': dict,
    'fold': int,
    'held_out': (str, type(None)),
    'epoch': int,
    'score': float,
}


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. Raises BadInput, and Interrupted if the disk is full."""
    with write_whole(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch wraps the OSError of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class CheckpointWriter:
    """Write checkpoints in a thread while the training goes on, one after another, each from a copy in the
    memory of the CPU. If one cannot be written, none after it is; the next call raises its error, or the end
    of the `with` block, which waits for all of them.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.writes: dict[Path, Future] = {}  # the latest of each file

    def __enter__(self) -> 'CheckpointWriter':
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.pool.shutdown()
        if kind is None:
            self.wait()

    def save(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Copy a checkpoint to be written, once the one before it of the same file is on the disk. The run
        that it replaces, if any, goes afterwards.
        """
        if path in self.writes:
            self.writes[path].result()
        earlier, content = [*self.writes.values()], to_cpu(checkpoint)

        def write() -> None:
            for each in earlier:
                each.result()
            save_checkpoint(path, content)
            remove_replaced(path.parent)

        self.writes[path] = self.pool.submit(write)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written."""
        for each in self.writes.values():
            if each.done():
                each.result()

    def wait(self) -> None:
        """Wait until all checkpoints are on the disk."""
        for each in self.writes.values():
            each.result()


def to_cpu(value: Any) -> Any:
    """Copy a checkpoint, or a part of one, with its tensors in the memory of the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        result = copy(value)  # a state_dict also has _metadata
        result.update((key, to_cpu(item)) for key, item in value.items())
        return result
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def is_checkpoint(path: Path) -> bool:
    """Return whether save_checkpoint wrote a file, or is likely to have done so, or tools/share.py. Raises
    BadInput.
    """
    if is_shared(path):
        return True
    content = read_tensors(path)
    return isinstance(content, dict) and 'held_out' in content


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what save_checkpoint or tools/share.py wrote, onto the CPU, without running its code. Raises
    BadInput otherwise.
    """
    if is_shared(path):
        return load_shared(path)
    if not path.exists():
        if path.name == 'best.pt' and path.with_name('last.pt').exists():
            advice = 'go on with train.py --resume, or where the training has ended, again with --overwrite'
            raise BadInput(f'{path}: no such checkpoint, but a last.pt; {advice}')
        places = describe_replaced(path.parent)
        raise BadInput('; '.join([f'{path}: no such checkpoint', *(places or ['train it first'])]))
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or not CHECKPOINT.keys() <= checkpoint.keys():
        raise BadInput(f'{path}: not a checkpoint of train.py')
    for key, kind in CHECKPOINT.items():
        if not isinstance(checkpoint[key], kind):
            found = type(checkpoint[key]).__name__
            raise BadInput(f'{path}: not a checkpoint of train.py: {key} is of type {found}')
    for key, value in checkpoint['model'].items():
        is_tensor = isinstance(value, torch.Tensor) and not value._backward_hooks  # which torch never saves
        if not isinstance(key, str) or not is_tensor:
            raise BadInput(f'{path}: not a checkpoint of train.py: model holds {str(key)[:60]!r}, no tensor')
    refuse_changed(path)
    return checkpoint


def load_shared(path: Path) -> dict[str, Any]:
    """Load a file of a shared folder as a checkpoint, which has `thresholds` too. Raises BadInput."""
    shared = read_shared(path.parent)
    model = shared.files().get(path.name)
    if model is None:
        raise BadInput(f'{path}: is none of the files that models.yaml names: {", ".join(shared.files())}')
    state = read_tensors(path)
    facts = model.model_dump() | {'score': math.nan if model.score is None else model.score}
    thresholds = shared.facts.thresholds or [DEFAULT] * len(shared.cfg.classes)
    return {'model': state, 'config': shared.cfg.model_dump(), 'thresholds': thresholds, **facts}


def current_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of an earlier version, which kept the auxiliary heads inside the head."""
    return {key.replace('head.aux.', 'aux.'): tensor for key, tensor in state.items()}


def load_model_state(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load strictly. Raises BadInput with a tensor that does not fit."""
    state = current_names(state)
    expected = model.state_dict()
    if differing := sorted(expected.keys() ^ state.keys()):
        only = 'the file' if differing[0] in state else 'the model'
        raise BadInput(f'{path}: is of another model: {differing[0]} is only in {only}')
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            shapes = f'{tuple(state[key].shape)} there, {tuple(tensor.shape)} here'
            raise BadInput(f'{path}: is of another model: {key} is {shapes}')
    model.load_state_dict(state)


@dataclass(frozen=True)
class Run:
    """A trained model and the config it predicts with."""

    model: SegModel
    cfg: Config
    held_out: str | None  # hash of the photos whose labels it never saw; None if it saw all
    fold: int
    epoch: int
    score: float  # of the validation photos, by the competition's metric
    thresholds: tuple[float, ...]  # (K,) from which a pixel is of a class that may overlap others


def load_run(
    cfg: Config, fold: int, device: torch.device, is_oof: bool = False, path: Path | None = None
) -> Run:
    """Load a run's best.pt, or the checkpoint `path`; cfg gives the keys that are free in inference, as the
    views. Raises BadInput.

    Its thresholds are those chosen on all photos out of fold, or without its fold, to predict that (is_oof).
    """
    path = path or cfg.run_dir(fold) / 'best.pt'
    checkpoint = load_checkpoint(path)
    if checkpoint['fold'] != fold:
        seen = f', which has seen labels of fold {fold}' if fold >= 0 else ''
        fault = f'is the model of fold {checkpoint["fold"]}{seen}'
        raise BadInput(f'{path}: {fault}; expected it in {cfg.run_dir(checkpoint["fold"])}')
    trained = make_config(checkpoint['config'], where=str(path))
    for key in ('classes', 'cache_size', 'folds'):
        there, here = getattr(trained, key), getattr(cfg, key)
        if there != here:
            raise BadInput(f'{path}: was trained with {key} {there}, the config has {here}')
    refuse_other_pixels(path, trained, cfg)
    thresholds = find_thresholds(
        checkpoint, cfg.output_dir / cfg.name, len(trained.classes), fold if is_oof else None
    )
    free = {key: getattr(cfg, key) for key in ('competition', *keys_free_in_inference())}
    return build_run(checkpoint, path, trained.model_copy(update=free), thresholds, device)


def find_thresholds(
    checkpoint: dict[str, Any], folder: Path, num_classes: int, fold: int | None = None
) -> tuple[float, ...]:
    """Return the thresholds of a shared checkpoint, or those in its run's folder, chosen without a fold."""
    shared = checkpoint.get('thresholds')
    return tuple(read_thresholds(folder, num_classes, fold) if shared is None else shared)


def build_run(
    checkpoint: dict[str, Any], path: Path, cfg: Config, thresholds: tuple[float, ...], device: torch.device
) -> Run:
    """Build the model of a config with the weights of a checkpoint, read from `path`. Raises BadInput if they
    do not fit.
    """
    model = empty_model(cfg)
    load_model_state(model, checkpoint['model'], path)
    model = model.eval().to(device, memory_format=memory_format(cfg))
    if cfg.compile:
        model.compile(dynamic=True)  # in place, for photos of many sizes
    facts = [checkpoint[key] for key in ('held_out', 'fold', 'epoch', 'score')]
    return Run(model, cfg, *facts, thresholds)


def load_model(source: str | Path, fold: int | None = None, **changes: Any) -> Run:
    """Load a trained model to predict with, in evaluation mode: of a run folder or its best.pt, of a folder
    that tools/share.py wrote, or of owner/name[@revision] on the Hugging Face hub.

    `fold` is one of several; `changes` are config keys, as tta_flips=('h',) or device='cpu'. Raises BadInput.
    """
    path = choose_model(source, fold)
    if late := next((key for key in changes if key not in keys_free_in_inference()), None):
        expected = f'expected one of {", ".join(sorted(keys_free_in_inference()))}'
        raise BadInput(f'load_model: {late} cannot be changed after the training; {expected}')
    checkpoint = load_checkpoint(path)
    cfg = make_config({**checkpoint['config'], **changes}, where=str(path))
    thresholds = find_thresholds(checkpoint, path.parent.parent, len(cfg.classes))
    return build_run(checkpoint, path, cfg, thresholds, start_ranks(cfg).device)


def refuse_other_pixels(path: Path, trained: Config, cfg: Config) -> None:
    """Raise BadInput if competition.yaml now names another kind of masks than a run was trained on, or gives
    the photos that it was trained on other pixels.
    """
    keys = ['task', 'channels']
    if trained.data_root.resolve() == cfg.data_root.resolve():
        keys += ['orientation', 'intensity', 'depth', 'slices']
    for key in keys:
        there, here = getattr(trained.competition, key), getattr(cfg.competition, key)
        if None not in (there, here) and there != here:
            fault = f'was trained with {key} {there}, but {cfg.data_root / COMPETITION_FILE} says {here}'
            raise BadInput(f'{path}: {fault}; take that back, or train again')


def load_oof_run(cfg: Config, fold: int, cache: Cache, rows: np.ndarray, device: torch.device) -> Run:
    """Load a run to predict the photos of its fold, rows of a cache. Raises BadInput if it was trained on
    them.
    """
    run = load_run(cfg, fold, device, is_oof=True)
    if not is_held_out(run.held_out, cache, rows):
        raise BadInput(
            f'{cfg.run_dir(fold) / "best.pt"}: has seen labels of fold {fold} as the folds are now, so its '
            'score there would mean nothing; train this fold again'
        )
    return run
