"""The errors that a person sees, each on one line, and the exit statuses that they stand for."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

# exit statuses; 75 is BSD's EX_TEMPFAIL: run it again
DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of writing that a person mends by making room


class BadInput(Exception):
    """The user gave something wrong. The message is one line: where, what was found, what is allowed."""

    status = BAD_INPUT


class Interrupted(Exception):
    """The run was asked to stop, or has no room to write, and can be resumed. The message is one line."""


class CheckFailed(Exception):
    """The input was right, but the result is not. The message is one line that says what failed."""

    status = CHECK_FAILED


def one_line(error: object) -> str:
    """Return an error's message, or any other text, on one line, without what a terminal would obey."""
    text = ' '.join(str(error).split())
    return ''.join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: '1 photo', '1,200 photos'."""
    return f'{count:,} {noun}{"" if count == 1 else "s"}'


def join_first(names: Sequence[str], most: int = 3) -> str:
    """Join the first names, and say how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


@dataclass(frozen=True)
class Shortage:
    """Something that a machine runs out of, with the words by which libraries say so, and the way out."""

    advice: str
    words: tuple[str, ...]
    status: int = BAD_INPUT

    def caused(self, error: BaseException | None) -> bool:
        """Tell whether an error, or one that led to it, is of this shortage."""
        if error is None:
            return False
        text = f'{type(error).__name__}: {error}'
        return any(word in text for word in self.words) or self.caused(error.__cause__ or error.__context__)


# the first that fits is told; torch and its workers give the text of an OSError alone
SHORTAGES = (
    Shortage(
        'the GPU is out of memory; set a smaller infer_batch_size, or end what else fills it (nvidia-smi), '
        'and run it again (train.py: --resume)',
        ('OutOfMemoryError', 'CUDA error: out of memory', 'STATUS_ALLOC_FAILED'),
    ),
    Shortage(
        'the workers have too little shared memory; give /dev/shm more (docker run --shm-size=8g), or set '
        'workers=0, and run it again',
        ('</torch_', 'Bus error', 'memory object', 'out of shared memory', 'insufficient shared memory'),
    ),
    Shortage(
        'too many open files; raise the limit with ulimit -n 65536, or set workers=0, and run it again',
        (os.strerror(errno.EMFILE),),
    ),
    Shortage(
        'out of memory; end other programs, raise the limit (ulimit -v), or set fewer workers and a smaller '
        'batch_size or infer_batch_size, and run it again',
        (
            os.strerror(errno.ENOMEM), 'MemoryError', 'allocate memory', 'Insufficient memory', 'bad_alloc',
            "can't start new thread", 'failed to map segment', 'killed by signal: Killed',
        ),
    ),
    Shortage(
        'no room to write; make room, and run it again',
        tuple(map(os.strerror, sorted(NO_ROOM))),
        INTERRUPTED,
    ),
)  # fmt: skip


def find_shortage(error: BaseException) -> Shortage | None:
    """Return what the machine ran out of, if that caused an error."""
    return next((shortage for shortage in SHORTAGES if shortage.caused(error)), None)
