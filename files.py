"""Files that are whole or not there, arrays in files, and folders that can be written. Without torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from config import BadInput, one_line, refuse_device


@contextmanager
def write_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name only when all of it is on the disk; what was there stays until then.

        with write_whole(path) as file:
            file.write(content)

    Makes the file's folder. Raises BadInput where the file cannot be written; after any error the temporary
    file, beside it, is gone.
    """
    path = Path(path)
    if not path.name:
        raise BadInput(f'{path}: cannot be written: it is a folder')
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f'{path}: cannot be written: it is there, and not a file')
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, is on the disk
        finally:
            os.close(folder)
    except OSError as error:
        raise BadInput(f'{path}: cannot be written: {error.strerror or one_line(error)}') from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all. Raises BadInput."""
    with write_whole(path) as file:
        file.write(text.encode())


def map_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The uint8 array of a .npy file, memory-mapped: nothing is allocated, whatever its header says. Raises
    BadInput for one that is cut off, or of another shape or type.
    """
    refuse_device(path)
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise BadInput(f'{path}: not an array, or cut off: {one_line(error)[:160]}') from None
    if not isinstance(array, np.memmap) or array.shape != shape or array.dtype != np.uint8:
        found = f'{array.shape} {array.dtype}' if isinstance(array, np.memmap) else 'an archive'
        raise BadInput(f'{path}: found {found}, expected {shape} uint8')
    return array


def make_folder(path: Path) -> None:
    """Makes a folder that can be written. Raises BadInput."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, 'Permission denied')
    except OSError as error:
        raise BadInput(f'{path}: this folder cannot be written: {error.strerror}') from None
