"""Benchmark each hot path beside what people use instead, in turn, in one process.

    python -m tools.bench csv        # also: rle, vote, search, data, cache, metric, train, infer, memory, all
    python -m tools.bench all --json output/bench.json
    python -m tools.bench train --device cuda --cfg configs/convnext_knet.yaml

Without --cfg, train and infer take configs/demo.yaml, data and cache configs/convnext.yaml. A row has the
median in seconds, the spread (slowest over fastest), the ratio to our median, and the ratio aimed at, with a
star if it is reached. A way that would take minutes does a share of the work, and its time is scaled up.
docs/benchmarks.md has the tables of one machine.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from config import load_config
from utils.cli import ArgumentParser, at_least, parse_early, run_script
from utils.files import write_text

NAMES = ('csv', 'rle', 'vote', 'search', 'data', 'cache', 'metric', 'train', 'infer', 'memory')


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('name', choices=[*NAMES, 'all'], help='the benchmark to run')
    parser.add_argument('--repeats', type=at_least(1), default=3, help='runs of each way')
    parser.add_argument('--rows', type=at_least(1), default=624, help='rows of a CSV, photos of a search')
    parser.add_argument('--photos', type=at_least(1), default=16, help='photos of data and cache')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='device of train and infer')
    parser.add_argument('--cfg', type=Path, help='config; by default demo or convnext, as said above')
    parser.add_argument('--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='its keys')
    parser.add_argument(
        '--json', type=Path, help='also write the table to this file; by default only print it'
    )
    args = parser.parse_args(argv)
    if args.cfg:
        load_config(args.cfg, args.set)  # a mistake in it ends the run here
    return args


if __name__ == '__main__':
    parse_early(read_arguments)

import cv2
import numpy as np
import torch

from tools.bench.csv_votes import bench_csv, bench_memory, bench_metric, bench_search, bench_vote
from tools.bench.fixtures import Way
from tools.bench.run_lengths import bench_run_lengths
from tools.bench.samples import bench_cache, bench_data
from tools.bench.steps import bench_infer, bench_train

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
    cv2.setNumThreads(1)
    print(describe_machine())
    print(f'{"work":<38}{"way":<34}{"median":>10}{"spread":>8}{"ratio":>10}{"target":>9}')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in NAMES if args.name == 'all' else [args.name]:
            for work, ways in BENCHMARKS[name](args):
                rows += measure(work, ways, args.repeats)
    if args.json:
        write_text(args.json, json.dumps({'machine': describe_machine(), 'rows': rows}, indent=1))
        print(f'wrote {args.json}')


def measure(work: str, ways: dict[str, Way], repeats: int) -> list[dict]:
    """Run all ways in turn, once to warm up and then `repeats` times; print and return a row for each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way.run()
            if repeat:
                times[name].append((time.perf_counter() - start) / way.share)
    rows = []
    our_median = statistics.median(times[next(iter(times))])
    for name, seconds in times.items():
        way, median = ways[name], statistics.median(seconds)
        spread = max(seconds) / min(seconds)
        row = {'work': work, 'way': name, 'seconds': median, 'spread': spread}
        row |= {'ratio': median / our_median, 'target': way.target, 'share': way.share}
        print(format_row(row), flush=True)
        rows.append(row)
    return rows


def format_row(row: dict) -> str:
    """Format a row of the table."""
    way = f'{row["way"]} ({row["share"]:.0e} of it)' if row['share'] < 1 else row['way']
    target = '' if row['target'] is None else f'{row["target"]:g}x' + '*' * (row['ratio'] >= row['target'])
    figures = f'{row["seconds"]:>8.4g} s{row["spread"]:>7.2f}x{row["ratio"]:>9.4g}x{target:>9}'
    return f'{row["work"]:<38}{way:<34}{figures}'.rstrip()


def describe_machine() -> str:
    """Name the processor, the threads and the versions that the times depend on."""
    versions = f'torch {torch.__version__}, numpy {np.__version__}, OpenCV {cv2.__version__}'
    python = f'Python {platform.python_version()}'
    return f'{platform.machine()}, {torch.get_num_threads()} threads, {python}, {versions}'


if __name__ == '__main__':
    run_script(command)
