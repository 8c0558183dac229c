"""Write the files of one prediction, which all ranks fill together: <split>.csv and <split>_probs.npy.

with Predictions(folder, 'test', names, cfg, save_probs, ranks) as predictions:
    for position in ranks.shard(len(names)):
        predictions.write(position, mask, probs)
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from config import Config
from engine.distributed import Ranks
from engine.inference import check_seen
from submission import SIDE, SubmissionWriter, probs_to_bytes
from utils.files import allocate_array, lock, remove_partials


class Predictions:
    """The masks and, if asked for, the probabilities of the photos `names`, in memory-mapped files that all
    ranks write to. Raises BadInput if another process writes the same files.
    """

    def __init__(
        self, folder: Path, split: str, names: list[str], cfg: Config, save_probs: bool, ranks: Ranks
    ) -> None:
        self.folder, self.split, self.names, self.ranks = folder, split, names, ranks
        self.seen = np.zeros(len(names), np.int64)  # how often this rank wrote each photo
        self.lock = lock(folder / f'.{split}.lock' if ranks.is_main else None, f'predicting {split}')
        self.files = {'masks': folder / f'.{split}_masks.npy.partial'}
        self.shapes = {'masks': (len(names), SIDE, SIDE)}
        if save_probs:
            self.files['probs'] = folder / f'.{split}_probs.npy.partial'
            self.shapes['probs'] = (len(names), len(cfg.classes), SIDE, SIDE)

    def __enter__(self) -> 'Predictions':
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            stack.callback(self.remove_files)
            if self.ranks.is_main:
                remove_partials(self.folder, f'{self.split}.csv')
            self.arrays = {key: self.open_shared(path, self.shapes[key]) for key, path in self.files.items()}
            self.stack = stack.pop_all()
        return self

    def open_shared(self, path: Path, shape: tuple[int, ...]) -> np.memmap:
        """Open a uint8 array in a file that all ranks write to; rank 0 creates it with zeros."""
        return self.ranks.main_process_first(
            lambda: allocate_array(path, np.uint8, shape), lambda: np.lib.format.open_memmap(path, 'r+')
        )

    def write(self, position: int, mask: np.ndarray, probs: torch.Tensor | np.ndarray | None) -> None:
        """Write a photo's mask (256, 256) and probabilities: a (K, B, B) tensor, or bytes (K, 256, 256)."""
        self.arrays['masks'][position] = mask
        self.seen[position] += 1
        if 'probs' in self.arrays:
            content = probs_to_bytes(probs) if isinstance(probs, torch.Tensor) else probs
            self.arrays['probs'][position] = content

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

    def remove_files(self) -> None:
        if self.ranks.is_main:
            for path in self.files.values():
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the CSV from the masks of all ranks, and rename the file of probabilities."""
        probs_path = self.folder / f'{self.split}_probs.npy'
        probs_path.unlink(missing_ok=True)  # those of an earlier CSV
        with SubmissionWriter(self.folder / f'{self.split}.csv') as writer:
            for name, mask in zip(self.names, self.arrays['masks'], strict=True):
                writer.write(name, mask)
        if 'probs' in self.files:
            self.files['probs'].replace(probs_path)
