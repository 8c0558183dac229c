"""Measures each hot path beside what people use instead, in turn, in one process.

    python -m tools.bench csv        # also: vote, search, data, cache, metric, train, infer, memory, all
    python -m tools.bench all --json output/bench.json
    python -m tools.bench train --device cuda --cfg configs/convnext_knet.yaml

A row of the table: median seconds, the spread (slowest over fastest), how many times as long as ours it
took, and the ratio that is aimed at, with a star where it is reached. Times are of this machine as it is now;
the ratio is what carries over. A peer that would take minutes does a share of the work, and is scaled up.
docs/benchmarks.md has the tables of one machine.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from tools.bench.cases import Case
from tools.bench.csv_votes import bench_csv, bench_memory, bench_metric, bench_search, bench_vote
from tools.bench.samples import bench_cache, bench_data
from tools.bench.steps import bench_infer, bench_train
from utils.cli import ArgumentParser, at_least, run_script
from utils.files import write_text

BENCHES = {
    'csv': bench_csv,
    'vote': bench_vote,
    'search': bench_search,
    'data': bench_data,
    'cache': bench_cache,
    'metric': bench_metric,
    'train': bench_train,
    'infer': bench_infer,
    'memory': bench_memory,
}
HEADINGS = f'{"work":<38}{"way":<34}{"median":>10}{"spread":>8}{"ratio":>10}{"target":>9}'


def measure(case: Case, repeats: int) -> list[dict]:
    """Runs every way of a case in turn, `repeats` times after a first that does not count; prints them."""
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    for repeat in range(repeats + 1):
        for name, way in case.ways.items():
            started = time.perf_counter()
            way.run()
            if repeat:
                times[name].append((time.perf_counter() - started) / way.share)
    rows = []
    ours = statistics.median(times[next(iter(times))])
    for name, seconds in times.items():
        way, median = case.ways[name], statistics.median(seconds)
        row = {'work': case.name, 'way': name, 'seconds': median, 'spread': max(seconds) / min(seconds)}
        rows.append({**row, 'ratio': median / ours, 'target': way.target, 'share': way.share})
        print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict) -> str:
    shown = f'{row["way"]} ({row["share"]:.0e} of it)' if row['share'] < 1 else row['way']
    target = '' if row['target'] is None else f'{row["target"]:g}x' + '*' * (row['ratio'] >= row['target'])
    figures = f'{row["seconds"]:>8.4g} s{row["spread"]:>7.2f}x{row["ratio"]:>9.4g}x{target:>9}'
    return f'{row["work"]:<38}{shown:<34}{figures}'.rstrip()


def machine() -> str:
    versions = f'torch {torch.__version__}, numpy {np.__version__}, OpenCV {cv2.__version__}'
    python = f'Python {platform.python_version()}'
    return f'{platform.machine()}, {torch.get_num_threads()} threads, {python}, {versions}'


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog='python -m tools.bench')
    parser.add_argument('path', choices=[*BENCHES, 'all'], help='what to measure')
    parser.add_argument('--repeats', type=at_least(1), default=3, help='of each case')
    parser.add_argument('--rows', type=at_least(1), default=624, help='of a CSV, photos of a search')
    parser.add_argument('--photos', type=at_least(1), default=16, help='of the set drawn for data and cache')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='of train and infer')
    parser.add_argument('--cfg', type=Path, help='default: demo for train and infer, convnext for data')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='changes of the config'
    )
    parser.add_argument('--json', type=Path, help='also write the table here; by default nowhere')
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    print(machine())
    print(HEADINGS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in BENCHES if args.path == 'all' else [args.path]:
            for case in BENCHES[name](args):
                rows += measure(case, args.repeats)
    if args.json:
        write_text(args.json, json.dumps({'machine': machine(), 'rows': rows}, indent=1))
        print(f'wrote {args.json}')


if __name__ == '__main__':
    run_script(command)
