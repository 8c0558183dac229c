"""The errors that a person sees, each one line, and the exit status each stands for."""

import errno

# exit statuses; 75 is BSD's EX_TEMPFAIL: run it again
DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of writing after which room can be made


class BadInput(Exception):
    """What the user gave is wrong: the message is one line that names the file, key or id, what was found,
    and what is allowed.
    """


class Interrupted(Exception):
    """The run was asked to stop, or has no room to write, and can go on from where it is: one line that says
    where.
    """


class CheckFailed(Exception):
    """The input was right, but what came of it is not: one line that says what failed."""


def one_line(error: object) -> str:
    """Any message on one line."""
    return ' '.join(str(error).split())
