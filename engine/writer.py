"""Write the files of one prediction, which all ranks fill together: <split>.csv and <split>_probs.npy,
oof_histograms.npy of classes that may overlap, from which evaluate.py thresholds chooses, and last
<split>.origin.json, which says what they were made with (voting/origin.py).

with Predictions(folder / 'test.csv', names, form, save_probs, ranks, origin) as predictions:
    for position in ranks.shard(len(names)):
        predictions.write(position, mask, probs)
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engine.distributed import Ranks
from engine.inference import check_seen
from submission import MaskFormat, probs_path
from utils.files import lock, remove_partials
from utils.ragged import Ragged, allocate_ragged, open_ragged
from voting.origin import Origin, begin_origin, origin_path, write_origin
from voting.thresholds import HISTOGRAM_TYPE, HISTOGRAMS


class Predictions:
    """The masks and, if asked for, the probabilities of the photos `names`, in memory-mapped files that all
    ranks write to. Raises BadInput if another process writes the same files.
    """

    def __init__(
        self, csv: Path, names: list[str], form: MaskFormat, save_probs: bool, ranks: Ranks, origin: Origin
    ) -> None:
        self.csv, self.names, self.form, self.ranks, self.origin = csv, names, form, ranks, origin
        folder, split = csv.parent, csv.stem
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
                remove_partials(self.csv.parent, self.csv.name, origin_path(self.csv).name)
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
                check_seen(self.seen, self.ranks, str(self.csv))
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
        """Write the CSV from the masks of all ranks, and rename the other files; begin_origin says why so."""
        folder, split = self.csv.parent, self.csv.stem
        paths = {'probs': probs_path(self.csv)}
        if split == 'oof':
            paths['histograms'] = folder / HISTOGRAMS
        with self.form.writer(self.csv) as writer:
            for position, name in enumerate(self.names):
                mask = self.arrays['masks'][position]
                if mask.ndim == 3:
                    mask = np.unpackbits(mask, axis=0, count=len(self.form.competition.classes))
                writer.write(name, mask)
            begin_origin(self.csv, self.origin)
            for path in paths.values():
                path.unlink(missing_ok=True)  # those of an earlier CSV
        for key, path in paths.items():
            if key in self.files:
                self.files[key].replace(path)
        write_origin(self.csv, self.origin)
