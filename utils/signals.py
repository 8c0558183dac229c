"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 end a run after the step in hand, with a checkpoint.

    with stop_requests() as stop:
        while not stop.asked:
            ...

Without torch.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class StopRequest:
    """The signal that asked to stop, or None."""

    caught: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        return self.caught is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Keeps the first signal for the one who asks; a second one ends the process where it is, as always.

    Nothing is kept outside the main thread, where Python takes no signals.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.caught = signal.Signals(number)
        for one in SIGNALS:
            signal.signal(one, before[one])

    before = {one: signal.signal(one, note) for one in SIGNALS}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def interrupt_on_signals() -> None:
    """SIGTERM and SIGUSR1 are as Ctrl-C: KeyboardInterrupt, so that what is half done is cleaned up."""
    for one in SIGNALS:
        signal.signal(one, signal.default_int_handler)


def leave_to_parent() -> None:
    """For a worker: a signal that reaches a whole process group, as Ctrl-C does, is the parent's to answer,
    which still needs its workers. A second SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
