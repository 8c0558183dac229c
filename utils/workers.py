"""Start worker processes, which end with the process that started them."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """Make a pool of new processes; a multiprocessing.Pool would restart for ever those that cannot start."""
    return ProcessPoolExecutor(processes, get_context('spawn'), initializer=_watch_parent)


def _watch_parent() -> None:
    """End this worker when its parent is killed, for whose work it would wait for ever."""
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
