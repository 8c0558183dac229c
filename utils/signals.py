"""Signals: SIGTERM, SIGINT and SIGUSR1 ask a run to stop."""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class StopRequest:
    """The signal that asked to stop, if any."""

    caught: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        return self.caught is not None


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Note the first signal instead of ending the process; a second one ends it as usual."""
    stop = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        stop.caught = signal.Signals(number)
        restore()

    with handled_by(note) as restore:
        yield stop


@contextmanager
def interrupt_on_signals() -> Generator[StopRequest]:
    """Raise KeyboardInterrupt for SIGTERM and SIGUSR1 as for Ctrl-C, so that half-made files are removed.

    The signal is noted too: NumPy and others make a TypeError of a KeyboardInterrupt in code that they call.
    """
    stop = StopRequest()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.caught = signal.Signals(number)
        raise KeyboardInterrupt

    with handled_by(interrupt):
        yield stop


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Generator[Callable[[], None]]:
    """Handle the signals, and then as before, or earlier by a call of what this gives."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # another cannot handle signals
        before = {number: signal.signal(number, handler) for number in SIGNALS}

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    try:
        yield restore
    finally:
        restore()


def exit_on_signals(text: str, status: int) -> None:
    """End the process at once on a signal, with one line; for the imports, while nothing is written yet."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f'{text}\n'.encode())
        os._exit(status)  # an exception would be a traceback of whatever was being imported

    for number in SIGNALS:
        signal.signal(number, end)


def leave_to_parent() -> None:
    """Let a worker ignore signals, which its parent handles; a second SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
