"""What a person sees: progress, colours, help. On a terminal a stage has one bar; elsewhere, as in a log
file, a line a minute. Imports nothing of ours, and no torch.

    for photo in progress(photos, 'check', 'photo'):
        ...
    with Bar('train', 'batch', total=900) as bar:
        bar.step(loss='0.512')
    say(next_line('infer.py', '--fold', 0, cfg=args.cfg, changes=args.set))
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

from tqdm import tqdm

from utils.log import say

EVERY = 60  # seconds between lines of progress, where there is no terminal
T = TypeVar('T')


# --- progress


class Bar:
    """Progress of one stage, on standard error: figures, time left at the mean rate so far, GPU memory. A
    stage within it has no bar of its own, but shows in front of this one.
    """

    outer: ClassVar['Bar | None'] = None

    def __init__(self, desc: str, unit: str, total: int, initial: int = 0, quiet: bool = False) -> None:
        """`initial` of the total were done before; quiet shows nothing."""
        self.desc, self.unit, self.total, self.quiet = desc, unit, total, quiet
        self.initial = self.done = initial
        self.figures: dict[str, str] = {}
        self.started = self.said = time.monotonic()
        self.within = Bar.outer
        self.drawn: tqdm | None = None
        if quiet or self.within is not None:
            return
        Bar.outer = self
        if sys.stderr.isatty():
            shape = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}'
            options = {'leave': False, 'dynamic_ncols': True, 'miniters': 0, 'bar_format': shape}
            self.drawn = tqdm(desc=desc, total=total, initial=initial, **options)

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *error: object) -> None:
        if Bar.outer is self:
            Bar.outer = None
        if self.drawn is not None:
            self.drawn.close()

    def step(self, **figures: str) -> None:
        """One more is done; its figures are shown until others of the same name come."""
        self.done += 1
        self.show(**figures)
        if self.quiet:
            return
        if self.within is not None:
            self.within.tell(f'{self.within.desc}, {self.desc} {self.done}/{self.total}')
            return
        if self.drawn is not None:
            self.drawn.n = self.done
        self.tell(self.desc)

    def show(self, **figures: str) -> None:
        """Figures to show from the next step on."""
        self.figures.update(figures)

    def tell(self, label: str) -> None:
        """Draws the bar anew, or writes a line where it is time for one."""
        if self.drawn is not None:
            self.drawn.set_description_str(label, refresh=False)
            self.drawn.set_postfix_str(self.numbers(), refresh=False)
            self.drawn.update(0)
        elif time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            share = f'{self.done / max(self.total, 1):.0%}, {self.done}/{self.total}'
            say(f'{label} {share}, {self.numbers()}', sys.stderr)

    def numbers(self) -> str:
        """Time left, rate, figures, memory."""
        rate, memory = self.rate(), gpu_memory()
        pace = f'{rate:.1f} {self.unit}/s' if rate >= 1 else f'{1 / rate:.1f} s/{self.unit}' if rate else ''
        shown = [f'{name} {value}' for name, value in self.figures.items()]
        return ', '.join(text for text in (self.left(), pace, *shown, memory) if text)

    def rate(self) -> float:
        """Steps a second since the beginning, what lay between them included."""
        return (self.done - self.initial) / max(time.monotonic() - self.started, 1e-9)

    def left(self) -> str:
        """Hours, minutes and seconds to go; '' where nothing is done yet."""
        rate = self.rate()
        return f'{tqdm.format_interval((self.total - self.done) / rate)} left' if rate else ''


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, quiet: bool = False
) -> Iterator[T]:
    """Goes through the items under a bar; the total is their number, where they have one."""
    with Bar(desc, unit, len(items) if total is None else total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.step()


def gpu_memory() -> str:
    """The most that torch has reserved on this process's GPU; '' without one."""
    torch = sys.modules.get('torch')  # not imported for this alone
    if torch is None or not torch.cuda.is_initialized():
        return ''
    return f'GPU {torch.cuda.max_memory_reserved() / 2**30:.1f} GB'


# --- lines


# --- options and help
