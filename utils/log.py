"""The log of a run: lines on standard output, in colours on a terminal, and in log.txt."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from utils.files import cannot_write

RED, GREEN, YELLOW, BOLD = 31, 32, 33, 1
COLOURS = {r'\berror:': RED, r'^warning:.*': YELLOW, r'(?<=^next: ).*': BOLD, r'\bbest$': GREEN}

log = logging.getLogger('trash')


def start_log(folder: Path | None, quiet: bool = False) -> None:
    """Write log lines to standard output, and to log.txt in a folder if given; if quiet, errors alone."""
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    console = Console(sys.stdout)
    console.setFormatter(logging.Formatter('%(message)s'))
    log.addHandler(console)
    if folder is not None:
        try:
            file = LogFile(folder / 'log.txt', encoding='utf-8', errors='backslashreplace')
        except OSError as error:
            raise cannot_write(folder / 'log.txt', error) from None
        file.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        log.addHandler(file)


class Console(logging.StreamHandler):
    """Write log lines for a person: above a progress bar, in colours on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record), self.stream)
        except OSError:  # the reader of a pipe is gone; the run goes on
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Write log.txt. Raises Interrupted if there is no room for a line; logging would go on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        assert error is not None  # logging calls this while it handles one
        raise cannot_write(self.baseFilename, error) if isinstance(error, OSError) else error


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text above a progress bar; in colours on a terminal, unless NO_COLOR is set (no-color.org)."""
    stream = stream or sys.stdout
    if stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb':
        for pattern, code in COLOURS.items():
            text = re.sub(pattern, rf'\033[{code}m\g<0>\033[0m', text, flags=re.MULTILINE)
    tqdm.write(text, file=stream)
    stream.flush()
