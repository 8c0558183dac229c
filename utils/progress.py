"""What a person sees: progress, colours, help. On a terminal a stage has one bar; elsewhere, as in a log
file, a line a minute. Imports nothing of ours, and no torch.

    for photo in progress(photos, 'check', 'photo'):
        ...
    with Bar('train', 'batch', total=900) as bar:
        bar.step(loss='0.512')
    say(next_line('infer.py', '--fold', 0, cfg=args.cfg, changes=args.set))
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TextIO, TypeVar

from tqdm import tqdm

EVERY = 60  # seconds between lines of progress, where there is no terminal
RED, GREEN, YELLOW, BOLD = 31, 32, 33, 1
COLOURS = {r'\berror:': RED, r'^warning:.*': YELLOW, r'(?<=^next: ).*': BOLD, r'\bbest$': GREEN}
MAX_SEED = 2**32 - 1  # of an option; NumPy takes no negative one
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


def say(text: str, stream: TextIO | None = None) -> None:
    """Writes lines above a bar; on standard output where nothing else is said. In colours on a terminal
    alone, and not where NO_COLOR is set (no-color.org).
    """
    stream = stream or sys.stdout
    if stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb':
        for pattern, code in COLOURS.items():
            text = re.sub(pattern, rf'\033[{code}m\g<0>\033[0m', text, flags=re.MULTILINE)
    tqdm.write(text, file=stream)
    stream.flush()


def next_line(*words: object, cfg: Path | None = None, changes: Sequence[str] = ()) -> str:
    """The next command to type, quoted for a shell; --cfg and --set at its end, where they were given."""
    given = ['--cfg', cfg] if cfg else []
    given += ['--set', *changes] if changes else []
    return f'next: python {shlex.join(str(word) for word in [*words, *given])}'


# --- options and help


def at_least(least: int, most: int = 10_000) -> Callable[[str], int]:
    """The type of an option that is a whole number within these."""

    def parse(text: str) -> int:
        if not re.fullmatch(r'\d{1,12}', text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f'found {text[:40]!r}, expected a whole number from {least} to {most}'
            )
        return int(text)

    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of a description, and says of each option what it is by default, or that it is
    required. Where the default is None, the option's own help has to say what happens then.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        if not action.option_strings or isinstance(action, argparse._HelpAction) or 'default' in text:
            return text
        if action.required:
            return f'{text}; required'
        if action.default is None:
            return text
        value = action.default
        if isinstance(value, bool):
            value = 'on' if value else 'off'
        elif isinstance(value, list | tuple):
            value = ' '.join(str(part) for part in value) or 'none'
        return f'{text}; default {value}'


def examples_of(prog: str, text: str) -> str:
    """The lines of a text that call `prog`, as the end of its help; '' where there are none."""
    lines = [
        f'    {line.strip()}'
        for line in text.splitlines()
        if f'python {prog.removeprefix("python ")} ' in line
    ]
    return '\n'.join(['examples:', *lines]) if lines else ''
