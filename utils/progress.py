"""Progress bars on standard error; in a log file, a line a minute at most."""

import io
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS = 60  # between two lines of progress in a log file
NUMBERS = '{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}{memory}]'
T = TypeVar('T')


class Bar(tqdm):
    """tqdm with the time left at the mean rate so far, and the GPU memory; `quiet` shows nothing."""

    monitor_interval = 0  # no thread: each update looks at the clock

    def __init__(self, items: Iterable | None = None, quiet: bool = False, **options: Any) -> None:
        if sys.stderr.isatty():
            options |= {'dynamic_ncols': True, 'bar_format': '{l_bar}{bar}| ' + NUMBERS}
        else:
            options |= {'mininterval': SECONDS, 'delay': SECONDS, 'file': LogLines(), 'position': 0}
            options |= {'bar_format': '{desc}: {percentage:3.0f}%, ' + NUMBERS}
        super().__init__(items, disable=quiet, leave=False, miniters=1, smoothing=0, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that the bar's format names."""
        memory = gpu_memory()
        return super().format_dict | {'memory': memory and f', {memory}'}

    def time_left(self) -> str:
        """Return the hours, minutes and seconds to go at the mean rate so far; '' before the first update."""
        done, elapsed = self.n - self.initial, self.format_dict['elapsed']
        return f'{tqdm.format_interval((self.total - self.n) * elapsed / done)} left' if done else ''


class LogLines(io.TextIOBase):
    """Standard error for a bar that is no terminal's: each state of the bar is a line of its own."""

    def write(self, text: str) -> int:
        if text.strip():
            sys.stderr.write(f'{text.strip()}\n')
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, quiet: bool = False
) -> Iterable[T]:
    """Show a bar while the items are gone through; their total is their length unless it is given."""
    return Bar(items, quiet, desc=desc, unit=unit, total=total)


def gpu_memory() -> str:
    """Return the most memory that torch has reserved on this process's GPU; '' without one."""
    torch = sys.modules.get('torch')  # importing it only for this would take seconds
    if torch is None or not torch.cuda.is_initialized():
        return ''
    return f'GPU {torch.cuda.max_memory_reserved() / 2**30:.1f} GB'
