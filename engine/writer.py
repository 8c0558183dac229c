"""Write the files of one prediction, which all ranks fill together: <split>.csv and <split>_probs.npy,
oof_histograms.npy of classes that may overlap, from which evaluate.py thresholds chooses, and last
<split>.origin.json, which says what they were made with (voting/origin.py).

with Predictions(folder / 'test.csv', names, form, save_probs, ranks, origin) as predictions:
    for position in ranks.shard(len(names)):
        predictions.write(position, mask, probs)
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engine.distributed import Ranks
from engine.inference import check_seen
from submission import MaskFormat, probs_path
from utils.files import lock, remove_partials
from utils.ragged import Ragged, allocate_ragged, map_ragged
from voting.origin import Origin, begin_origin, origin_path, write_origin
from voting.thresholds import HISTOGRAM_TYPE, HISTOGRAMS

DTYPES = {'masks': np.uint8, 'probs': np.uint8, 'histograms': HISTOGRAM_TYPE}


class Predictions:
    """The masks and, if asked for, the probabilities of the photos `names`. Each rank maps a file of its own
    shard, since several machines cannot map one, and rank 0 puts them together. Raises BadInput if another
    process writes the same files.
    """

    def __init__(
        self, csv: Path, names: list[str], form: MaskFormat, save_probs: bool, ranks: Ranks, origin: Origin
    ) -> None:
        self.csv, self.names, self.form, self.ranks, self.origin = csv, names, form, ranks, origin
        self.seen = np.zeros(len(names), np.int64)  # how often this rank wrote each photo
        self.lock = lock(
            csv.parent / f'.{csv.stem}.lock' if ranks.is_main else None, f'predicting {csv.stem}'
        )
        count = len(form.competition.classes)
        self.shapes = {'masks': [form.size(name) for name in names]}
        if form.competition.is_multilabel:  # a bit for each class
            self.shapes['masks'] = [(-(-count // 8), *size) for size in self.shapes['masks']]
        if save_probs:
            self.shapes['probs'] = [(count, *form.size(name)) for name in names]
        if csv.stem == 'oof' and form.competition.is_multilabel:
            self.shapes['histograms'] = [(count, 2, 256)] * len(names)

    def __enter__(self) -> 'Predictions':
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            if self.ranks.is_main:
                names = [self.csv.name, origin_path(self.csv).name]
                remove_partials(self.csv.parent, *names, *(f'{self.csv.stem}_{key}.npy' for key in DTYPES))
            self.ranks.wait()
            stack.callback(self.remove_files)
            self.arrays = {key: self.allocate(key) for key in self.shapes}
            self.stack = stack.pop_all()
        return self

    def part(self, key: str, rank: int) -> Path:
        """Return where the arrays of a rank's shard are."""
        return self.csv.with_name(f'.{self.csv.stem}_{key}.npy.{rank}.partial')

    def allocate(self, key: str) -> Ragged:
        """Make the arrays of this rank's shard, of zeros."""
        rank, world = self.ranks.rank, self.ranks.world
        return allocate_ragged(self.part(key, rank), DTYPES[key], self.shapes[key][rank::world])

    def array(self, key: str, position: int) -> np.ndarray:
        """Return the array of a photo of this rank's shard."""
        return self.arrays[key][position // self.ranks.world]

    def write(self, position: int, mask: np.ndarray, probs: np.ndarray | None, top: int = 0) -> None:
        """Write a photo, or rows of it from `top` on: a mask of ids or planes, and probabilities as bytes."""
        stop = top + mask.shape[-2]
        packed = np.packbits(mask, axis=0) if mask.ndim == 3 else mask
        self.array('masks', position)[..., top:stop, :] = packed
        if 'probs' in self.arrays:
            self.array('probs', position)[:, top:stop] = probs
        self.seen[position] += stop == self.shapes['masks'][position][-2]

    def add_histogram(self, position: int, counts: np.ndarray) -> None:
        """Add the (K, 2, 256) threshold_counts of rows of a photo out of fold."""
        self.array('histograms', position)[...] += counts

    def __exit__(self, *error) -> None:
        with self.stack:
            for array in self.arrays.values():
                array.flush()
            if error[0] is None:
                check_seen(self.seen, self.ranks, str(self.csv))
                self.ranks.wait()
                if self.ranks.is_main:
                    self.finish()
                self.ranks.wait()

    def remove_files(self) -> None:
        for key in self.shapes:
            self.part(key, self.ranks.rank).unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the CSV from the masks of all ranks, and name the other files; begin_origin says why so."""
        paths = {'probs': probs_path(self.csv)}
        if self.csv.stem == 'oof':
            paths['histograms'] = self.csv.with_name(HISTOGRAMS)
        with self.form.writer(self.csv) as writer:
            for name, mask in zip(self.names, self.arrays_of_all('masks'), strict=True):
                if mask.ndim == 3:
                    mask = np.unpackbits(mask, axis=0, count=len(self.form.competition.classes))
                writer.write(name, mask)
            begin_origin(self.csv, self.origin)
            for path in paths.values():
                path.unlink(missing_ok=True)  # that of an earlier CSV
        for key in self.shapes.keys() & paths.keys():
            self.put_together(key, paths[key])
        write_origin(self.csv, self.origin)

    def arrays_of_all(self, key: str) -> Iterator[np.ndarray]:
        """Yield the arrays of all photos, from the files of all ranks."""
        world, shapes = self.ranks.world, self.shapes[key]
        parts = [map_ragged(self.part(key, rank), shapes[rank::world], DTYPES[key]) for rank in range(world)]
        for position in range(len(shapes)):
            yield parts[position % world][position // world]

    def put_together(self, key: str, path: Path) -> None:
        """Make one file of those of all ranks."""
        if self.ranks.world == 1:
            self.part(key, 0).replace(path)
            return
        partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
        try:
            whole = allocate_ragged(partial, DTYPES[key], self.shapes[key])
            for position, array in enumerate(self.arrays_of_all(key)):
                whole[position] = array
            whole.flush()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
