"""The log of a run: lines for a person on standard output, and log.txt."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from utils.files import write_error

log = logging.getLogger('trash')


class LogFile(logging.FileHandler):
    """log.txt. Raises Interrupted where there is no room for a line, instead of going on without."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        raise write_error(self.baseFilename, error) if isinstance(error, OSError) else error


def start_log(folder: Path | None, quiet: bool = False) -> None:
    """Log lines go to standard output, and to log.txt in `folder` where there is one; quiet (ranks above 0)
    leaves errors alone. Raises BadInput.
    """
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
            file = LogFile(folder / 'log.txt', encoding='utf-8')
        except OSError as error:
            raise write_error(folder / 'log.txt', error) from None
        file.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        log.addHandler(file)


class Console(logging.StreamHandler):
    """Log lines for a person: above a bar, in colours on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record), self.stream)
        except OSError:  # nobody reads any more: what is done here goes on
            self.handleError(record)


RED, GREEN, YELLOW, BOLD = 31, 32, 33, 1


COLOURS = {r'\berror:': RED, r'^warning:.*': YELLOW, r'(?<=^next: ).*': BOLD, r'\bbest$': GREEN}


def say(text: str, stream: TextIO | None = None) -> None:
    """Writes lines above a bar; on standard output where nothing else is said. In colours on a terminal
    alone, and not where NO_COLOR is set (no-color.org).
    """
    stream = stream or sys.stdout
    if stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb':
        for pattern, code in COLOURS.items():
            text = re.sub(pattern, rf'\033[{code}m\g<0>\033[0m', text, flags=re.MULTILINE)
    tqdm.write(text, file=stream)
    stream.flush()
