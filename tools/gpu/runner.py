"""Run each item of the GPU check in a process of its own, under a deadline. Without torch.

An item has parts. One that crashes, or that the system kills for its memory, becomes an error result, and a
new process goes on with the next part; an item that hangs is killed at its deadline. All processes are forked
from a server that has imported torch and has never touched the GPU.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.gpu.results import ERROR, Report, Result

START, END = 'start', 'end'  # messages of a process: a part starts, with its number and name; all are done


@dataclass(frozen=True)
class Options:
    """Say on which device, how large and on what data the items run, and what item 1 found."""

    device: str  # 'cpu' or 'cuda'
    tiny: bool
    folder: Path  # for data, caches and checkpoints
    data: Path | None = None  # a data root; without one a demo set is drawn
    peak: float | None = None  # FLOP/s of a bf16 matrix product


Part = Callable[[Options, Report], None]


def parts_of(item: int, options: Options) -> dict[str, Part]:
    """Return the parts of an item by name; imports torch."""
    from tools.gpu.parts import PARTS

    return PARTS[item](options)


class ItemRunner:
    """Run items one after another; what they print goes to a log."""

    def __init__(self, parts: Callable[..., dict[str, Part]], log: Path, preload: str | None = None) -> None:
        """`parts(number, options)` returns the parts of an item, in a process of its own."""
        self.parts, self.log = parts, log
        log.write_text('')
        self.context = multiprocessing.get_context('forkserver')
        if preload:
            self.context.set_forkserver_preload([preload])

    def run(self, item: int, options: Options, seconds: float, add: Callable[[Result], None]) -> float:
        """Run the parts of an item, hand on each result at once, and return the seconds that it took."""
        began, skip = time.monotonic(), 0
        until = began + seconds
        while skip is not None:
            skip = self.run_from(item, options, skip, until, add)
        return time.monotonic() - began

    def run_from(
        self, item: int, options: Options, skip: int, until: float, add: Callable[[Result], None]
    ) -> int | None:
        """Run the parts from number `skip` on in one process; return the part to go on from if it died."""
        receiver, sender = self.context.Pipe(duplex=False)
        log_start = self.log.stat().st_size
        words = (self.parts, item, options, skip, sender, self.log)
        process = self.context.Process(target=run_parts, args=words)
        process.start()
        sender.close()
        number, name = None, 'start'
        try:
            while receiver.poll(max(0.0, until - time.monotonic())):
                message = receiver.recv()
                if message == END:
                    return None
                if isinstance(message, Result):
                    add(message)
                else:
                    _, number, name = message
            add(Result(item, name, met=ERROR, note='killed at its deadline'))
            return None
        except EOFError:  # it has died
            process.join(10)
            add(Result(item, name, met=ERROR, note=reason(process.exitcode, self.log, log_start)))
            return None if number is None else number + 1
        finally:
            end(process)


def run_parts(
    parts: Callable[..., dict[str, Part]],
    item: int,
    options: Options,
    skip: int,
    sender: Connection,
    log: Path,
) -> None:
    """Run the parts of an item from number `skip` on, and send their results."""
    os.setsid()  # so that its own processes end with it
    multiprocessing.set_start_method(None, force=True)  # loaders fork, as in a script
    with log.open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    report = Report(item, sender.send)
    for number, (name, part) in enumerate(parts(item, options).items()):
        if number >= skip:
            sender.send((START, number, name))
            print(f'== item {item}: {name}', flush=True)
            part(options, report)
    sender.send(END)


def end(process: Any) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


def reason(status: int | None, log: Path, start: int) -> str:
    """Say why a process died: its exception, in the log from byte `start` on, or its signal."""
    with log.open('rb') as file:
        file.seek(start)
        lines = file.read().decode(errors='replace').splitlines()
    traces = [number for number, line in enumerate(lines) if line.startswith('Traceback (most recent call')]
    if status == 1 and traces:
        message = next((line for line in lines[traces[-1] + 1 :] if line and not line[0].isspace()), '')
        return message[:300]
    if status is not None and status < 0:
        return f'killed by {signal.Signals(-status).name}'
    return f'ended with status {status}'
