"""Keep the results of a GPU check: what was found, its limit, and whether that is met. Without torch."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.files import write_text

# whether a result meets its limit
MET, FAILED, ERROR, NOT_APPLICABLE, MEASURED = 'yes', 'NO', 'ERROR', 'not applicable', ''
PEAK = 'bf16 matrix product'  # result of item 1, in TFLOP/s, that other items take shares of


@dataclass(frozen=True)
class Result:
    """Hold what an item found, its limit, and whether it is met."""

    item: int
    what: str
    value: float | None = None
    unit: str = ''
    limit: str = ''
    met: str = MEASURED
    note: str = ''

    @property
    def is_bad(self) -> bool:
        return self.met in (FAILED, ERROR)

    def row(self) -> str:
        """Format a row of the table."""
        cells = [self.what, show(self.value, self.unit), self.limit, self.met, self.note]
        return f'| {self.item} | ' + ' | '.join(cell.replace('|', '/') for cell in cells) + ' |'


def show(value: float | None, unit: str = '') -> str:
    """Format a value with four digits and its unit."""
    if value is None:
        return ''
    text = f'{value:.4g}' if not math.isfinite(value) or abs(value) < 1e4 else f'{value:,.0f}'
    return f'{text} {unit}'.strip()


class Report:
    """Send the results of an item at once."""

    def __init__(self, item: int, send: Callable[[Result], None]) -> None:
        self.item, self.send = item, send

    def measured(self, what: str, value: float, unit: str = '', note: str = '') -> None:
        """Report a value that has no limit."""
        self.send(Result(self.item, what, float(value), unit, note=note))

    def at_most(self, what: str, value: float, limit: float, unit: str = '', note: str = '') -> None:
        """Report a value that must not be above a limit, nor NaN."""
        met = MET if value <= limit else FAILED
        self.send(Result(self.item, what, float(value), unit, f'≤ {limit:g}', met, note))

    def at_least(self, what: str, value: float, limit: float, unit: str = '', note: str = '') -> None:
        """Report a value that must not be below a limit, nor NaN."""
        met = MET if value >= limit else FAILED
        self.send(Result(self.item, what, float(value), unit, f'≥ {limit:g}', met, note))

    def holds(self, what: str, is_so: bool, note: str = '') -> None:
        """Report a statement that must be true."""
        self.send(Result(self.item, what, limit='must hold', met=MET if is_so else FAILED, note=note))

    def not_applicable(self, what: str, why: str) -> None:
        """Report what this device or this size cannot show."""
        self.send(Result(self.item, what, met=NOT_APPLICABLE, note=why))


class ResultFiles:
    """Keep the results of a check, and write results.jsonl and table.md into a folder."""

    def __init__(self, folder: Path, titles: dict[int, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.titles = folder, titles
        self.results: list[Result] = []
        self.seconds: dict[int, float] = {}  # by item
        write_text(folder / 'results.jsonl', '')

    def add(self, result: Result) -> None:
        """Write a result to results.jsonl, and print it."""
        self.results.append(result)
        with (self.folder / 'results.jsonl').open('a', encoding='utf-8') as file:
            file.write(json.dumps(asdict(result), ensure_ascii=False) + '\n')
        print(result.row(), flush=True)

    def write_table(self) -> None:
        """Write all results so far as a Markdown page."""
        write_text(self.folder / 'table.md', '\n'.join(self.lines()) + '\n')

    def lines(self) -> Iterable[str]:
        """Yield the lines of the page."""
        yield f'{self.summary()}\n'
        yield '| item | what | found | limit | met | note |\n| --- | --- | --- | --- | --- | --- |'
        for item, title in self.titles.items():
            if item in self.seconds:
                yield f'| **{item}** | **{title}** | {self.seconds[item]:.0f} s | | | |'
                yield from (result.row() for result in self.results if result.item == item)

    def summary(self) -> str:
        """Count the results by whether they are met."""
        counts = {met: sum(result.met == met for result in self.results) for met in (MET, FAILED, ERROR)}
        return f'{counts[MET]} met, {counts[FAILED]} not met, {counts[ERROR]} errors'
