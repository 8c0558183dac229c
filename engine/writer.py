"""The files of one prediction, which all ranks fill together: <split>.csv and <split>_probs.npy, whole or not
there.

    with Predictions(folder, 'test', names, cfg, save_probs, ranks) as predictions:
        for place in ranks.shard(len(names)):
            predictions.write(place, ids, probs)
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from config import Config
from engine.distributed import Ranks
from engine.inference import check_seen
from networks.layers import resize
from submission import SIDE, SubmissionWriter
from utils.files import allocate_array, lock, remove_partials


class Predictions:
    """Ids, and probabilities where asked for, of photos in the order of `names`; in files meanwhile, so that
    any rank can write any of them and none has to be in memory. Raises BadInput where another process writes
    the same files.
    """

    def __init__(
        self, folder: Path, split: str, names: list[str], cfg: Config, save_probs: bool, ranks: Ranks
    ) -> None:
        self.folder, self.split, self.names, self.ranks = folder, split, names, ranks
        self.seen = np.zeros(len(names), np.int64)
        self.lock = lock(folder / f'.{split}.lock' if ranks.is_main else None, f'predicting {split}')
        self.files = {'ids': folder / f'.{split}_ids.npy.partial'}
        self.shapes = {'ids': (len(names), SIDE, SIDE)}
        if save_probs:
            self.files['probs'] = folder / f'.{split}_probs.npy.partial'
            self.shapes['probs'] = (len(names), len(cfg.classes), SIDE, SIDE)

    def __enter__(self) -> 'Predictions':
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            stack.callback(self.clean)
            if self.ranks.is_main:
                remove_partials(self.folder, f'{self.split}.csv')
            self.arrays = {
                key: shared(path, np.uint8, self.shapes[key], self.ranks) for key, path in self.files.items()
            }
            self.stack = stack.pop_all()
        return self

    def write(self, place: int, ids: np.ndarray, probs: torch.Tensor | np.ndarray) -> None:
        """The (256, 256) ids of a photo, and its (K, B, B) probabilities, or (K, 256, 256) uint8 as saved."""
        self.arrays['ids'][place] = ids
        self.seen[place] += 1
        if 'probs' in self.arrays:
            self.arrays['probs'][place] = probs if isinstance(probs, np.ndarray) else to_bytes(probs)

    def __exit__(self, *error) -> None:
        with self.stack:
            for array in self.arrays.values():
                array.flush()
            if error[0] is None:
                check_seen(self.seen, self.ranks, f'{self.split} of {self.folder}')
                self.ranks.wait()
                if self.ranks.is_main:
                    self.finish()
        if error[0] is None:
            self.ranks.wait()

    def clean(self) -> None:
        if self.ranks.is_main:
            for path in self.files.values():
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The CSV of what all ranks have written, and the probabilities under their own name."""
        probs_path = self.folder / f'{self.split}_probs.npy'
        probs_path.unlink(missing_ok=True)  # those of an earlier CSV
        with SubmissionWriter(self.folder / f'{self.split}.csv') as writer:
            for name, ids in zip(self.names, self.arrays['ids'], strict=True):
                writer.write(name, ids)
        if 'probs' in self.files:
            self.files['probs'].replace(probs_path)


def shared(path: Path, dtype: type, shape: tuple[int, ...], ranks: Ranks) -> np.memmap:
    """An array in a file, zeros at first, that every rank writes its part of."""
    return ranks.main_process_first(
        lambda: allocate_array(path, dtype, shape), lambda: np.lib.format.open_memmap(path, 'r+')
    )


def to_bytes(probs: torch.Tensor) -> np.ndarray:
    """(K, B, B) → (K, 256, 256) uint8, 255 times the probabilities."""
    small = resize(probs[None].float(), (SIDE, SIDE), antialias=True)[0]
    return (small * 255).round().to(torch.uint8).cpu().numpy()
