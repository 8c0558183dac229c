"""Functions that run in processes of their own, which tests can kill; torch is imported once for all."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from utils.cli import run_script

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['train', 'infer', 'pseudo', 'prepare', 'ensemble', 'conftest'])


def start(target, *args, ranks: int = 1, said: Path | str = os.devnull, **kwargs) -> list:
    """Processes that run a function, what they print in a file."""
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
    import torch

    torch.set_num_threads(1)
    # what a script has: loaders' workers of a fork server outlive a run that is killed
    multiprocessing.set_start_method(None, force=True)
    os.environ |= {key: str(value) for key, value in env.items()}
    with Path(said).open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*args, **kwargs)


def ended(processes: list, seconds: float | None = None) -> list[int | None]:
    """The exit statuses of processes, None of those that still run after so many seconds."""
    until = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if until is None else max(0, until - time.monotonic()))
    return [process.exitcode for process in processes]


def typed(command, *words: str) -> None:
    """A script as it is typed, with its exit status."""
    sys.argv = ['script', *words]
    try:
        run_script(command)
    except SystemExit as end:
        status = end.code
    sys.exit(status)  # what the run held is let go before, as where a script ends
