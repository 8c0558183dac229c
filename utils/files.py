"""Write files whole or not at all, map arrays, make folders and lock them. Without torch.

A disk, a quota or a file-size limit that is full raises Interrupted: make room, and resume.
"""

import csv
import hashlib
import io
import os
import re
import shutil
import socket
import sys
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO

import filelock

from utils.errors import NO_ROOM, BadInput, Interrupted, one_line

if TYPE_CHECKING:
    import numpy as np

# what a spreadsheet runs: =, +, -, @, in full width too, tab or line end at the beginning; numbers aside
FORMULA = re.compile(r'(?![-+]?\d+(\.\d+)?(e[-+]?\d+)?\Z)[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]', re.IGNORECASE)


@contextmanager
def write_whole(path: str | Path) -> Generator[BinaryIO]:
    """Write a binary file that gets its name when all of it is on the disk; the old file stays until then.

    Makes the file's folder. Raises BadInput if the file cannot be written, Interrupted if there is no room.
    """
    path = Path(path)
    if not path.name:
        raise BadInput(f'{path}: cannot be written: it is a folder')
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f'{path}: cannot be written: it exists, and is not a file')
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
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """Make a folder that gets its name when all of it is there. If another has that name by then, it stays: a
    machine on which our lock does not hold was faster. Raises BadInput, Interrupted if there is no room.
    """
    partial = folder.with_name(f'.{folder.name}.{socket.gethostname()}.partial')
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    try:
        make_folder(partial)
        yield partial
        try:
            partial.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all. Raises BadInput, or Interrupted if there is no room."""
    with write_whole(path) as file:
        file.write(text.encode())


def write_csv(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV that scripts read, as they are; whole or not at all, as write_text does."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_text(path, text.getvalue())


def write_sheet(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV that people open in a spreadsheet and no script reads; as write_csv otherwise.

    A text that a spreadsheet would run gets an apostrophe, and every cell quotes, which keep a ';' from
    beginning another (OWASP, CSV Injection). Names of photos and classes may come from anybody.
    """
    text = io.StringIO()
    safe = ([f"'{cell}" if FORMULA.match(str(cell)) else cell for cell in row] for row in rows)
    csv.writer(text, lineterminator='\n', quoting=csv.QUOTE_ALL).writerows(safe)
    write_text(path, text.getvalue())


def remove_partials(folder: Path, *names: str) -> None:
    """Remove temporary files of those names, left by processes that were killed. Lock the folder first."""
    for name in names:
        for partial in folder.glob(f'.{name}.*.partial'):
            partial.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: OSError) -> BadInput | Interrupted:
    """Return the error to raise when a file cannot be written: Interrupted if a person can make room."""
    message = f'{path}: cannot be written: {error.strerror or one_line(error)}'
    if error.errno in NO_ROOM:
        rescue = 'the old file, if any, is unchanged; make room, and run it again (train.py: --resume)'
        return Interrupted(f'{message}; {rescue}')
    return BadInput(message)


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder or lies inside it, whatever links lead there."""
    return path.resolve().is_relative_to(folder.resolve())


def refuse_inside(out: Path, inputs: Iterable[Path | None], option: str = '--out') -> None:
    """Raise BadInput if a file or folder that is read is the output, or lies inside it."""
    for path in inputs:
        if path is not None and lies_in(path, out):
            place = 'is' if path.resolve() == out.resolve() else 'contains'
            raise BadInput(f'{option} {out}: {place} {path}, which is read; give another {option}')


def exists(path: Path) -> bool:
    """Return True if a path exists; Path.exists raises OSError for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def refuse_device(path: Path) -> None:
    """Raise BadInput for a device or a pipe, which would be read without end, or waited for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(f'{path}: is not a file')


def require_files(*paths: Path) -> None:
    """Raise BadInput for the first file that does not exist, before anything slow begins."""
    for path in paths:
        if not path.exists():
            raise BadInput(f'{path}: cannot be read: No such file or directory')


def normal_name(name: str) -> str:
    """Return the form of a file's name in which a Mac, Windows and Linux write it the same, to compare names.

    A Mac decomposes letters (NFD), Windows writes backslashes, and some tools begin paths with './'.
    """
    return re.sub(r'^(\./+)+', '', unicodedata.normalize('NFC', name).replace('\\', '/'))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content. Raises BadInput."""
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def map_array(path: Path, shape: tuple[int, ...], dtype: type | None = None) -> 'np.memmap':
    """Map the array of a .npy file, uint8 by default. Raises BadInput for a bad file, shape or type."""
    import numpy as np  # slow: --help and typos do without

    refuse_device(path)
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise BadInput(f'{path}: not an array, or cut off: {one_line(error)[:160]}') from None
    expected = np.dtype(dtype or np.uint8)
    if not isinstance(array, np.memmap) or array.shape != shape or array.dtype != expected:
        content = f'{array.shape} {array.dtype}' if isinstance(array, np.memmap) else 'an archive'
        raise BadInput(f'{path}: found {content}, expected {shape} {expected}')
    return array


def allocate_array(path: Path, dtype: type, shape: tuple[int, ...]) -> 'np.memmap':
    """Make and map a .npy file of zeros. Raises BadInput, or Interrupted if there is no room."""
    import numpy as np  # slow: --help and typos do without

    try:
        array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
        with path.open('r+b') as file:  # a disk that fills up later would kill the process without a message
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        size = np.dtype(dtype).itemsize * int(np.prod(shape)) / 2**30
        raise cannot_write(f'{path.parent}: {size:.2f} GiB', error) from None
    return array


def save_array(path: Path, array: 'np.ndarray') -> None:
    """Write a .npy file, whole or not at all, as write_text does."""
    import numpy as np  # slow: --help and typos do without

    with write_whole(path) as file:
        # NumPy would write into a file of the system by itself, and not see that the disk is full
        np.save(SimpleNamespace(write=file.write), array)


def make_folder(path: Path) -> None:
    """Make a folder. Raises BadInput if files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, 'Permission denied')
    except OSError as error:
        raise BadInput(f'{path}: this folder cannot be written: {error.strerror}') from None


@contextmanager
def lock(path: Path | None, doing: str, wait: bool = False) -> Generator[None]:
    """Lock a file (None: nothing), and make its folder; the lock ends with this process.

    If another process holds the lock, says what it is `doing`, and waits for it or raises BadInput.
    """
    if path is None:
        yield
        return
    make_folder(path.parent)
    with acquire(path, doing, wait):
        try:
            path.write_text(str(os.getpid()))
        except OSError as error:
            raise cannot_write(path, error) from None
        yield


def acquire(path: Path, doing: str, wait: bool) -> filelock.AcquireReturnProxy:
    """Take a lock that leaving its `with` block releases. Raises BadInput as lock says."""
    file_lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        try:
            return file_lock.acquire(blocking=False)
        except filelock.Timeout:
            holder = path.read_text(errors='replace')[:20].strip()
            message = f'{path.parent}: process {holder} is {doing} here now'
            if not wait:
                raise BadInput(message) from None
            print(f'{message}; waiting for it', file=sys.stderr)
            return file_lock.acquire()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise cannot_write(path, error) from None
        raise BadInput(f'{path}: cannot be locked: {error.strerror or one_line(error)}') from None
