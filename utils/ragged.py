"""Keep arrays of different shapes in one memory-mapped .npy file, or in several, one after another."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import allocate_array, map_array

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, ...]
MOST_OPEN = 256  # files of Shards that are mapped at once; each holds a file descriptor


class Ragged:
    """Arrays by row, each of its own shape; a row is a view of the file.

    If all shapes are the same, the file holds an ordinary (n, ...) array; else all values one after another.
    """

    def __init__(self, array: 'np.memmap', shapes: Sequence[Shape]) -> None:
        import numpy as np  # slow: --help and typos do without

        self.array, self.shapes = array, [*map(tuple, shapes)]
        self._values = np.asarray(array)  # rows of a memmap would be memmaps, which are slower to work with
        self._starts = None if _shared_shape(self.shapes) else _starts(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> 'np.ndarray':
        if self._starts is None:
            return self._values[row]
        return self._values[self._starts[row] : self._starts[row + 1]].reshape(self.shapes[row])

    def __setitem__(self, row: int, values: 'np.ndarray') -> None:
        """Write a row through the file, four times as fast as through a map whose pages are not there yet."""
        import numpy as np

        assert self.array.flags.writeable
        shape, dtype = self.shapes[row], self.array.dtype
        start = row * prod(shape) if self._starts is None else self._starts[row]
        content = np.ascontiguousarray(np.broadcast_to(values, shape), dtype)
        with Path(self.array.filename).open('r+b') as file:
            file.seek(self.array.offset + start * dtype.itemsize)
            file.write(content.data)

    def flush(self) -> None:
        """Write what has changed to the disk."""
        self.array.flush()

    def __reduce__(self) -> tuple:
        """Pickle the file name: a spawned process maps the file again instead of receiving it."""
        return _reopen, (self.array.filename, self.shapes)


class Shards:
    """Arrays by row in several files, each a Ragged of the rows from its start on, mapped when it is used.

    Raises BadInput if a file holds other arrays.
    """

    def __init__(
        self, paths: Sequence[Path], starts: Sequence[int], shapes: Sequence[Shape], dtype: type
    ) -> None:
        self.paths, self.starts, self.shapes, self.dtype = [*paths], [*starts], shapes, dtype
        self._open: dict[int, Ragged] = {}

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> 'np.ndarray':
        row = range(len(self.shapes))[row]
        number = bisect_right(self.starts, row) - 1
        return self.shard(number)[row - self.starts[number]]

    def shard(self, number: int) -> Ragged:
        """Map one of the files, or return it if it is mapped."""
        if number not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.clear()
            stop = [*self.starts, len(self.shapes)][number + 1]
            shapes = self.shapes[self.starts[number] : stop]
            self._open[number] = map_ragged(self.paths[number], shapes, self.dtype)
        return self._open[number]

    def __getstate__(self) -> dict:
        """Pickle the file names: a spawned process maps the files again instead of receiving them."""
        return self.__dict__ | {'_open': {}}


def map_ragged(path: Path, shapes: Sequence[Shape], dtype: type | None = None) -> Ragged:
    """Map a file of arrays of these shapes, uint8 by default. Raises BadInput if it holds others."""
    return Ragged(map_array(path, _file_shape(shapes), dtype), shapes)


def allocate_ragged(path: Path, dtype: type, shapes: Sequence[Shape]) -> Ragged:
    """Make and map a file of zeros. Raises BadInput, or Interrupted if there is no room."""
    return Ragged(allocate_array(path, dtype, _file_shape(shapes)), shapes)


def _reopen(path: Path, shapes: Sequence[Shape]) -> Ragged:
    import numpy as np

    return Ragged(np.load(path, mmap_mode='r'), shapes)


def _shared_shape(shapes: Sequence[Shape]) -> Shape | None:
    return shapes[0] if shapes and len(set(shapes)) == 1 else None


def _file_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the shape of the one array that a file of these shapes holds."""
    shapes = [*map(tuple, shapes)]
    shared = _shared_shape(shapes)
    return (_starts(shapes)[-1],) if shared is None else (len(shapes), *shared)


def _starts(shapes: Sequence[Shape]) -> list[int]:
    """Return where each array starts in the file, and where the last one ends."""
    return [0, *accumulate(map(prod, shapes))]
