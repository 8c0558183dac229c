"""The errors that a person sees, each on one line, and the exit statuses that they stand for."""

import errno
from collections.abc import Sequence

# exit statuses; 75 is BSD's EX_TEMPFAIL: run it again
DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75

TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
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
