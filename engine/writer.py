"""Write the files of one prediction, which all ranks fill together: <split>.csv and <split>_probs.npy, and
oof_histograms.npy of classes that may overlap, from which evaluate.py thresholds chooses.

with Predictions(folder, 'test', names, form, save_probs, ranks) as predictions:
    for position in ranks.shard(len(names)):
        predictions.write(position, mask, probs)
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engine.distributed import Ranks
from engine.inference import check_seen
from submission import MaskFormat
from utils.files import lock, remove_partials
from utils.ragged import Ragged, allocate_ragged, open_ragged
from voting.thresholds import HISTOGRAM_TYPE, HISTOGRAMS


class Predictions:
    """The masks and, if asked for, the probabilities of the photos `names`, in memory-mapped files that all
    ranks write to. Raises BadInput if another process writes the same files.
    """

    def __init__(
        self, folder: Path, split: str, names: list[str], form: MaskFormat, save_probs: bool, ranks: Ranks
    ) -> None:
        self.folder, self.split, self.names, self.form, self.ranks = folder, split, names, form, ranks
        self.seen = np.zeros(len(names), np.int64)  # how often this rank wrote each photo
        self.lock = lock(folder / f'.{split}.lock' if ranks.is_main else None, f'predicting {split}')
        self.files = {'masks': folder / f'.{split}_masks.npy.partial'}
        count = len(form.competition.classes)
        self.shapes = {'masks': [form.size(name) for name in names]}
        if form.competition.is_multilabel:  # a bit for each class
            self.shapes['masks'] = [(-(-count // 8), *size) for size in self.shapes['masks']]
        if save_probs:
            self.files['probs'] = folder / f'.{split}_probs.npy.partial'
            self.shapes['probs'] = [(count, *form.size(name)) for name in names]
        if split == 'oof' and form.competition.is_multilabel:
            self.files['histograms'] = folder / f'.{HISTOGRAMS}.partial'
            self.shapes['histograms'] = [(count, 2, 256)] * len(names)

    def __enter__(self) -> 'Predictions':
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            stack.callback(self.remove_files)
            if self.ranks.is_main:
                remove_partials(self.folder, f'{self.split}.csv')
            self.arrays = {key: self.open_shared(key) for key in self.files}
            self.stack = stack.pop_all()
        return self

    def open_shared(self, key: str) -> Ragged:
        """Open an array in a file that all ranks write to; rank 0 creates it with zeros."""
        path, shapes = self.files[key], self.shapes[key]
        dtype = HISTOGRAM_TYPE if key == 'histograms' else np.uint8
        return self.ranks.main_process_first(
            lambda: allocate_ragged(path, dtype, shapes), lambda: open_ragged(path, shapes)
        )

    def write(self, position: int, mask: np.ndarray, probs: np.ndarray | None, top: int = 0) -> None:
        """Write a photo, or rows of it from `top` on: a mask of ids or planes, and probabilities as bytes."""
        stop = top + mask.shape[-2]
        packed = np.packbits(mask, axis=0) if mask.ndim == 3 else mask
        self.arrays['masks'][position][..., top:stop, :] = packed
        if 'probs' in self.arrays:
            self.arrays['probs'][position][:, top:stop] = probs
        self.seen[position] += stop == self.shapes['masks'][position][-2]

    def add_histogram(self, position: int, counts: np.ndarray) -> None:
        """Add the (K, 2, 256) threshold_counts of rows of a photo out of fold."""
        self.arrays['histograms'][position] += counts

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
        """Write the CSV from the masks of all ranks, and rename the other files."""
        finals = {'probs': f'{self.split}_probs.npy', 'histograms': HISTOGRAMS}
        paths = {key: self.folder / name for key, name in finals.items()}
        if self.split != 'oof':
            del paths['histograms']
        for path in paths.values():
            path.unlink(missing_ok=True)  # those of an earlier CSV
        with self.form.writer(self.folder / f'{self.split}.csv') as writer:
            for position, name in enumerate(self.names):
                mask = self.arrays['masks'][position]
                if mask.ndim == 3:
                    mask = np.unpackbits(mask, axis=0, count=len(self.form.competition.classes))
                writer.write(name, mask)
        for key, path in paths.items():
            if key in self.files:
                self.files[key].replace(path)
