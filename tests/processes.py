"""Run functions in processes that tests can kill; torch is imported once for all of them."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from utils.cli import run_script

CONTEXT = multiprocessing.get_context('forkserver')
PRELOADED = ['train', 'infer', 'pseudo', 'prepare', 'ensemble', 'conftest', 'torch.utils.tensorboard']
CONTEXT.set_forkserver_preload(PRELOADED)


def start(target, *args, ranks: int = 1, said: Path | str = os.devnull, **kwargs) -> list:
    """Start a process a rank, each of which runs a function; what they print goes to the file `said`."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {'RANK': rank, 'WORLD_SIZE': ranks, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        words = (env if ranks > 1 else {}, said, target, *args)
        processes.append(CONTEXT.Process(target=quietly, args=words, kwargs=kwargs))
        processes[-1].start()
    return processes


def quietly(env: dict, said: Path | str, target, *args, **kwargs) -> None:
    """Run a function on one thread, with its environment; what it prints goes to a file."""
    import torch

    torch.set_num_threads(1)
    # as in a script: workers of a fork server would outlive a run that is killed
    multiprocessing.set_start_method(None, force=True)
    os.environ |= {key: str(value) for key, value in env.items()}
    with Path(said).open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*args, **kwargs)


def ended(processes: list, seconds: float | None = None) -> list[int | None]:
    """Wait for processes; return their exit statuses, None for one that still runs after so many seconds."""
    until = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if until is None else max(0, until - time.monotonic()))
    return [process.exitcode for process in processes]


def typed(command, *words: str) -> None:
    """Run a script's function as if it were typed, and exit with its status."""
    sys.argv = ['script', *words]
    try:
        run_script(command)
    except SystemExit as end:
        status = end.code
    sys.exit(status)  # outside the except: the run's locks are released first, as at the end of a script
