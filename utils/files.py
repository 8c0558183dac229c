"""Files that are whole or not there, arrays in files, folders that can be written, and who writes there.
Without torch.

Where the disk, the quota or the file-size limit is full, what is written raises Interrupted: make room, and
go on.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import NO_ROOM, BadInput, Interrupted, one_line


def write_error(path: str | Path, error: OSError) -> BadInput | Interrupted:
    """What to raise for an error of writing: Interrupted where room can be made, BadInput else."""
    what = f'{path}: cannot be written: {error.strerror or one_line(error)}'
    if error.errno in NO_ROOM:
        return Interrupted(
            f'{what}; what was there before is as it was; make room, and run it again (train.py: --resume)'
        )
    return BadInput(what)


@contextmanager
def write_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name only when all of it is on the disk; what was there stays until then.

        with write_whole(path) as file:
            file.write(content)

    Makes the file's folder. Raises BadInput where the file cannot be written, and Interrupted where there is
    no room for it; after any error the temporary file, beside it, is gone.
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
        raise write_error(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path, *names: str) -> None:
    """Removes what processes that were killed while they wrote left beside the files of those names; for the
    one who holds the folder.
    """
    for name in names:
        for left in folder.glob(f'.{name}.*.partial'):
            left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all. Raises BadInput, and Interrupted where there is no room."""
    with write_whole(path) as file:
        file.write(text.encode())


def file_hash(path: Path) -> str:
    """The SHA-256 of what is in a file. Raises BadInput."""
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


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


def allocate_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros in a new .npy file, whose room on the disk is taken now: a full disk would else end
    the process without a word when it is written to. Raises BadInput, and Interrupted where there is no room.
    """
    try:
        array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
        with path.open('r+b') as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        size = np.dtype(dtype).itemsize * int(np.prod(shape)) / 2**30
        raise write_error(f'{path.parent}: {size:.2f} GiB', error) from None
    return array


@contextmanager
def lock(path: Path | None, doing: str, wait: bool = False) -> Iterator[None]:
    """Keeps a lock file for this process, and makes its folder; None keeps nothing. Where another has it,
    waits for that one, or raises BadInput; either says who it is. Raises BadInput where there can be no lock.
    """
    if path is None:
        yield
        return
    make_folder(path.parent)
    try:
        file = path.open('a+', errors='replace')
    except OSError as error:  # such as another user's
        raise write_error(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy = f'{path.parent}: process {file.read(20).strip()} is {doing} here now'
            if not wait:
                raise BadInput(busy) from None
            print(f'{busy}; waiting for it', file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # of a file system without locks
            raise BadInput(f'{path}: cannot be locked: {error.strerror}') from None
        os.register_at_fork(after_in_child=file.close)  # a loader's workers, who outlive a kill, hold nothing
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def refuse_device(path: Path) -> None:
    """Raises BadInput for a device or a pipe, which would be read without end, or waited for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(f'{path}: is not a file')
