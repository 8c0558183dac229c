"""Signals: SIGTERM, SIGINT and SIGUSR1 ask a run to stop."""

import os
import signal
import threading
from collections.abc import Generator
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
    if threading.current_thread() is not threading.main_thread():  # it cannot handle signals
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.caught = signal.Signals(number)
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    handlers = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        restore()


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt for SIGTERM and SIGUSR1 as for Ctrl-C, so that half-made files are removed."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


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
