"""Parts of a GPU check that need no torch: some fail, crash or hang."""

import os
import signal
import subprocess
import time

from tools.gpu.results import Report
from tools.gpu.runner import Options


def pass_limit(options: Options, report: Report) -> None:
    report.at_most('a ratio', 0.5, 1, note='as | it must be')


def crash(options: Options, report: Report) -> None:
    report.measured('before the crash', 1)
    raise ValueError('no such kernel\nand more about it')


def die(options: Options, report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does for want of memory


def hang(options: Options, report: Report) -> None:
    child = subprocess.Popen(['sleep', '60'])
    report.measured('child', child.pid)
    time.sleep(60)


def no_gpu(options: Options, report: Report) -> None:
    report.not_applicable('machine', 'torch sees no GPU')


def fake_parts(item: int, options: Options) -> dict:
    """Return an item's parts in place of the real ones."""
    if item == 9:
        raise MemoryError
    return {
        0: {'machine': pass_limit},
        1: {'one': pass_limit, 'two': crash, 'three': die, 'four': pass_limit},
        2: {'one': hang, 'two': pass_limit},
        3: {'one': pass_limit},
    }[item]


def without_gpu(item: int, options: Options) -> dict:
    return {'machine': no_gpu}
