"""Benchmark each hot path beside what people use instead, in turn, in one process.

    python -m tools.bench csv        # also: rle, vote, search, data, cache, metric, train, infer, memory, all
    python -m tools.bench all --json output/bench.json --markdown docs/benchmarks.md
    python -m tools.bench train --device cuda --cfg configs/convnext_knet.yaml
    python -m tools.bench hours --markdown docs/scaling.md    # the hours of a competition on an H100, counted

Without --cfg, train and infer take configs/demo.yaml, data and cache configs/convnext.yaml. A row has the
median in seconds, the spread (slowest over fastest), the ratio to our median, and the ratio aimed at, with a
star if it is reached. A way that would take minutes does a share of the work, and its time is scaled up.
--markdown replaces the table of a page, docs/benchmarks.md or docs/scaling.md, between its two comments.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from config import load_config
from utils.cli import ArgumentParser, at_least, parse_early, run_script
from utils.errors import BadInput
from utils.files import require_files, write_text

# around the table of a page
START, END = '<!-- made by python -m tools.bench -->', '<!-- end -->'
NAMES = ('csv', 'rle', 'vote', 'search', 'data', 'cache', 'metric', 'train', 'infer', 'memory')


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('name', choices=[*NAMES, 'hours', 'all'], help='the benchmark to run')
    parser.add_argument('--repeats', type=at_least(1), default=3, help='runs of each way')
    clocks = 'wall time, or the CPU time of this process over its threads, where other work runs too'
    parser.add_argument('--clock', choices=['wall', 'cpu'], default='wall', help=clocks)
    parser.add_argument('--rows', type=at_least(1), default=624, help='rows of a CSV, photos of a search')
    parser.add_argument('--photos', type=at_least(1), default=16, help='photos of data and cache')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='device of train and infer')
    parser.add_argument('--cfg', type=Path, help='config; by default demo or convnext, as said above')
    parser.add_argument('--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='its keys')
    only = '; by default only print it'
    parser.add_argument('--json', type=Path, help=f'also write the table to this file{only}')
    markdown = f'also write the table into this page, between comments{only}'
    parser.add_argument('--markdown', type=Path, help=markdown)
    args = parser.parse_args(argv)
    if args.markdown:
        if args.name not in ('all', 'hours'):
            parser.error(f'--markdown: writes a whole table, of all or of hours; found {args.name}')
        split_page(args.markdown)
    if args.json and args.name == 'hours':
        parser.error('--json: has no rows of hours')
    if args.cfg:
        load_config(args.cfg, args.set)  # a mistake in it ends the run here
    return args


def split_page(path: Path) -> tuple[str, str]:
    """Return what stands before and after the table of a page. Raises BadInput."""
    require_files(path)
    text = path.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise BadInput(f'{path}: found no lines {START!r} and {END!r}, between which a table is written')
    return before, after


if __name__ == '__main__':
    parse_early(read_arguments)

import cv2
import numpy as np
import torch

from tools.bench.csv_votes import bench_csv, bench_memory, bench_metric, bench_search, bench_vote
from tools.bench.fixtures import Way
from tools.bench.hours import hours_table
from tools.bench.run_lengths import bench_run_lengths
from tools.bench.samples import bench_cache, bench_data
from tools.bench.steps import bench_infer, bench_train, peak_memory

BENCHMARKS = {
    'csv': bench_csv,
    'rle': bench_run_lengths,
    'vote': bench_vote,
    'search': bench_search,
    'data': bench_data,
    'cache': bench_cache,
    'metric': bench_metric,
    'train': bench_train,
    'infer': bench_infer,
    'memory': bench_memory,
}
assert tuple(BENCHMARKS) == NAMES


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    if args.name == 'hours':
        lines = [*hours_table()]
        print(*lines, sep='\n')
    else:
        rows = run_benchmarks(args)
        lines = markdown_table(rows)
        if args.json:
            write_text(args.json, json.dumps({'machine': describe_machine(args), 'rows': rows}, indent=1))
            print(f'wrote {args.json}')
    if args.markdown:
        before, after = split_page(args.markdown)
        machine = [] if args.name == 'hours' else [f'{describe_machine(args)}.', '']
        table = '\n'.join([START, *machine, *lines, END])
        write_text(args.markdown, f'{before}{table}{after}')
        print(f'wrote {args.markdown}')


def run_benchmarks(args: argparse.Namespace) -> list[dict]:
    """Run the benchmarks that the command line names; print and return a row for each way."""
    cv2.setNumThreads(1)
    print(describe_machine(args))
    print(f'{"work":<46}{"way":<42}{"median":>10}{"spread":>8}{"ratio":>10}{"target":>9}')
    args.now = time.perf_counter if args.clock == 'wall' else cpu_time
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in NAMES if args.name == 'all' else [args.name]:
            for work, ways in BENCHMARKS[name](args):
                rows += measure(work, ways, args.repeats, args.now)
    return rows


def cpu_time() -> float:
    """Return the CPU time of this process over the threads of torch that it uses."""
    return time.process_time() / torch.get_num_threads()


def measure(work: str, ways: dict[str, Way], repeats: int, now: Callable[[], float]) -> list[dict]:
    """Run all ways in turn, once to warm up and then `repeats` times; print and return a row for each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            if way.measure is None:
                start = now()
                way.run()
                seconds = (now() - start) / way.share
            elif repeat:  # it warms up by itself
                seconds = way.measure()
                peaks[name] = peak_memory()
            if repeat:
                times[name].append(seconds)
    rows = []
    our_median = statistics.median(times[next(iter(times))])
    for name, seconds in times.items():
        way, median = ways[name], statistics.median(seconds)
        spread = max(seconds) / min(seconds)
        row = {'work': work, 'way': name, 'seconds': median, 'spread': spread}
        row |= {'ratio': median / our_median, 'target': way.target, 'share': way.share}
        row |= {'GiB': peaks.get(name, 0), 'use': way.at_peak and way.at_peak / median}
        print(format_row(row), flush=True)
        rows.append(row)
    return rows


def format_row(row: dict) -> str:
    """Format a row of the table."""
    target = '' if row['target'] is None else f'{row["target"]:g}x' + '*' * reached(row)
    figures = f'{row["seconds"]:>8.4g} s{row["spread"]:>7.2f}x{row["ratio"]:>9.4g}x{target:>9}'
    return f'{row["work"]:<46}{row["way"] + part(row):<42}{figures}  {", ".join(notes(row))}'.rstrip()


def markdown_table(rows: list[dict]) -> list[str]:
    """Format the rows as a table of Markdown; a ratio that is reached is bold."""
    lines = ['| work | way | seconds | spread | ratio | aimed at |', '|' + ' --- |' * 6]
    for row, before in zip(rows, [{'work': ''}, *rows], strict=False):
        work = row['work'] if row['work'] != before['work'] else ''
        way = ', '.join([row['way'] + part(row), *notes(row)])
        ratio = f'{row["ratio"]:.3g}' if row['ratio'] < 1e6 else f'{row["ratio"]:,.0f}'
        target = '' if row['target'] is None else f'{row["target"]:,}'
        ratio = f'**{ratio}**' if row['target'] and reached(row) else ratio
        lines.append(f'| {work} | {way} | {row["seconds"]:.3g} | {row["spread"]:.2f} | {ratio} | {target} |')
    return lines


def reached(row: dict) -> bool:
    return row['ratio'] >= row['target']


def part(row: dict) -> str:
    """Say which part of the work was done, if it was not all of it."""
    return f' ({row["share"]:.0e} of it)' if row['share'] < 1 else ''


def notes(row: dict) -> list[str]:
    """Say how much of the memory and of the FLOP peak a model uses."""
    memory = [f'{row["GiB"]:.2f} GiB'] if row['GiB'] else []
    return memory + ([f'{row["use"]:.0%} of the FLOP peak'] if row['use'] else [])


def describe_machine(args: argparse.Namespace) -> str:
    """Name the processor, the clock, the threads and the versions that the times depend on."""
    processor = torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name()
    threads = f'{torch.get_num_threads()} threads, {args.clock} time, medians of {args.repeats}'
    versions = f'torch {torch.__version__}, NumPy {np.__version__}, OpenCV {cv2.__version__}'
    return f'{processor}, {threads}, Python {platform.python_version()}, {versions}'


def cpu_name() -> str:
    """Return the processor's name, as Linux gives it."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


if __name__ == '__main__':
    run_script(command)
