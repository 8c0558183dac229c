"""Check on a GPU what no CPU can show: numerics, determinism, ranks, speed, memory. Needs no network.

    python -m tools.gpu --data input/data                   # all items, under 7 minutes on an H100
    python -m tools.gpu --items 1 2 6 --out output/gpu      # some of them
    python -m tools.gpu --device cpu --tiny                 # each item at a tiny size, to see that it works

Writes results.jsonl (a line for each result, at once), table.md (after each item) and log.txt into --out. The
most important items come first. Each has a deadline and a process of its own, so that one that hangs, crashes
or runs out of memory does not stop the others. Exit status 1: a limit is not met, or a part ends in an error.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.gpu.results import ERROR, NOT_APPLICABLE, PEAK, Result, ResultFiles
from tools.gpu.runner import ItemRunner, Options, parts_of
from utils.cli import ArgumentParser, at_least, run_script
from utils.errors import BadInput, CheckFailed


class Item(NamedTuple):
    """Hold the title of an item and the most seconds that it may take."""

    title: str
    seconds: float


MACHINE = 0  # the item that always runs
ITEMS = {
    MACHINE: Item('the machine', 120),  # torch is imported in it
    1: Item('peaks: a matrix product, a copy', 25),
    2: Item('numerics: CUDA against the CPU, precisions, layouts, the scaler', 70),
    3: Item('determinism: each head and each family of encoders, twice', 60),
    4: Item('resume', 60),
    5: Item('two ranks on one GPU, and one rank of NCCL', 60),
    6: Item('training speed beside mmsegmentation', 120),
    7: Item('compiled training', 120),
    8: Item("prediction beside ttach's loop", 60),
    9: Item('loader and checkpoint', 45),
    10: Item('training for real, at 512', 60),
    11: Item('the other configs, one step at full size', 90),
}


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises BadInput."""
    parser = ArgumentParser(__doc__)
    items = {'type': at_least(1, len(ITEMS) - 1), 'nargs': '+', 'metavar': 'N'}
    parser.add_argument('--items', **items, help='items to run, from 1; by default all')
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='device that is checked')
    parser.add_argument('--tiny', action='store_true', help='take tiny networks and photos')
    data = 'data root to train on, such as trash481; by default a demo set is drawn'
    parser.add_argument('--data', type=Path, help=data)
    parser.add_argument('--out', type=Path, default=Path('output/gpu'), help='folder of the results')
    parser.add_argument('--minutes', type=at_least(1), default=7, help='minutes for all items together')
    args = parser.parse_args(argv)
    if args.data and not (args.data / 'train_all.json').is_file():
        raise BadInput(f'--data: {args.data / "train_all.json"}: no such file')
    return args


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    # is_available must not touch the GPU in the server that forks the items
    os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')
    files = ResultFiles(args.out, {number: item.title for number, item in ITEMS.items()})
    runner = ItemRunner(parts_of, args.out / 'log.txt', 'tools.gpu.parts')
    with tempfile.TemporaryDirectory() as folder:
        options = Options(args.device, args.tiny, Path(folder), args.data and args.data.resolve())
        run_items(runner, options, files, args.items or [*ITEMS][1:], args.minutes * 60)
    print(f'{files.summary()}; wrote {args.out / "table.md"}')
    if bad := sum(result.is_bad for result in files.results):
        raise CheckFailed(f'{bad} of {len(files.results)} results are not as they must be')


def run_items(
    runner: ItemRunner, options: Options, files: ResultFiles, items: list[int], seconds: float
) -> None:
    """Run items in turn, each within its own seconds and those left of all; write the table after each.

    Raises BadInput if the device is not here.
    """
    until = time.monotonic() + seconds
    for number in [MACHINE, *items]:
        left = until - time.monotonic()
        if left > 0:
            files.seconds[number] = runner.run(number, options, min(left, ITEMS[number].seconds), files.add)
        else:
            files.seconds[number] = 0
            files.add(Result(number, ITEMS[number].title, met=ERROR, note='not run: no time was left'))
        files.write_table()
        if files.results[0].met == NOT_APPLICABLE:
            raise BadInput(f'--device: found {options.device}, but {files.results[0].note}; expected cpu')
        peak = next((result.value for result in files.results if result.what == PEAK), None)
        options = dataclasses.replace(options, peak=peak and peak * 1e12)


if __name__ == '__main__':
    run_script(command)
