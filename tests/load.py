"""A full-size job's shape: drawn photos, cache, folds, a training, predictions, votes; time, memory, disk.

    python tests/load.py --out output/load                            # 3,272 + 819 photos; half an hour
    python tests/load.py --out output/load --train 64 --test 16 --epochs 20

The network is tiny, so that what is measured is everything around it. Memory is that of all processes of a
stage together, each shared page counted once (PSS), twice a second; the last line says whether it grows from
epoch to epoch. tests/README.md has the table of one machine.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import ArgumentParser, run_script  # noqa: E402
from utils.errors import CheckFailed  # noqa: E402
from utils.files import make_folder  # noqa: E402

MODEL = ['encoder=test_resnet.r160_in1k', 'encoder_weights=none', 'head_channels=8', 'aux_weight=0']
GROWTH = 1.05  # of memory, from an early epoch to the last, before it is called a leak


def main(out: Path, train: int, test: int, epochs: int) -> None:
    """Runs the stages and prints a row for each. Raises CheckFailed where one fails or memory grows."""
    make_folder(out)
    data = out / 'data'
    where = [f'data_root={data}', f'cache_dir={out / "cache"}', f'output_dir={out / "runs"}']
    options = ['--cfg', 'configs/demo.yaml', '--set', *where, *MODEL, 'folds=5', 'workers=2', 'device=cpu']
    large = [
        'image_size=512',
        'crop_size=512',
        'batch_size=16',
        'epochs=1',
        'scale_range=[0.5,2]',
        'name=large',
    ]
    small = [
        'image_size=64', 'crop_size=64', 'batch_size=256', f'epochs={epochs}', 'name=small',
        f'data_root={out / "few"}', f'cache_dir={out / "few_cache"}',
    ]  # fmt: skip
    print(f'{"stage":<34}{"seconds":>9}{"memory, MB":>12}{"disk, MB":>10}', flush=True)
    stage('draw the photos', out, ['prepare.py', 'demo', '--out', data, '--train', train, '--test', test])
    stage('check', out, ['prepare.py', 'check', '--data', data])
    stage('cache and folds', out, ['prepare.py', 'folds', *options, *large])
    stage('an epoch, crops of 512', out, ['train.py', *options, *large, '--fold', 0, '--overwrite'])
    for split in ('oof', 'test'):
        stage(f'predict {split}', out, ['infer.py', *options, *large, '--fold', 0, '--split', split])
    csvs = [out / f'vote{n}.csv' for n in range(10)]
    for csv in csvs:
        shutil.copy(out / 'runs/large/fold0/test.csv', csv)
    voted = out / 'voted.csv'
    stage('vote of 10 CSVs', out, ['ensemble.py', *csvs, '--out', voted, '--data', data])
    if voted.read_bytes() != csvs[0].read_bytes():
        raise CheckFailed(f'{voted}: the vote of ten equal CSVs is another CSV')
    stage('check the CSV', out, ['submission.py', 'check', voted, '--data', data])
    stage('draw 16 photos', out, ['prepare.py', 'demo', '--out', out / 'few', '--train', 16, '--test', 1])
    memory: dict[int, float] = {}  # by epoch
    metrics = out / 'runs/small/fold0/metrics.csv'

    def note(megabytes: float) -> None:
        if metrics.exists():
            epoch = len(metrics.read_text().splitlines()) - 1
            memory[epoch] = max(megabytes, memory.get(epoch, 0))

    stage(f'{epochs} short epochs', out, ['train.py', *options, *small, '--fold', 0, '--overwrite'], note)
    early, last = sorted(memory)[len(memory) // 5], sorted(memory)[-2]  # in the last one the run ends
    growth = f'memory in epoch {early}: {memory[early]:.0f} MB, in epoch {last}: {memory[last]:.0f} MB'
    print(growth)
    if memory[last] > GROWTH * memory[early]:
        raise CheckFailed(growth)


def stage(name: str, out: Path, words: list, note: Callable[[float], None] = lambda megabytes: None) -> None:
    """Runs a command and prints its row; `note` is told the memory in use. Raises CheckFailed."""
    log = out / f'{re.sub(r"[^a-z0-9]+", "_", name)}.txt'
    before, started, peak = size_of(out), time.monotonic(), 0.0
    with log.open('w') as file:
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            megabytes = sum(map(memory_of, family(process.pid)))
            peak = max(peak, megabytes)
            note(megabytes)
            time.sleep(0.5)
    if process.returncode:
        raise CheckFailed(f'{name}: exit status {process.returncode}: {log}')
    seconds, disk = time.monotonic() - started, (size_of(out) - before) / 1e6
    print(f'{name:<34}{seconds:>9.1f}{peak:>12.0f}{disk:>10.0f}', flush=True)


def family(pid: int) -> list[int]:
    """A process and those that it started, theirs as well."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def memory_of(pid: int) -> float:
    """Proportional set size, MB; 0 for a process that is gone."""
    try:
        found = re.search(r'^Pss: +(\d+) kB', Path(f'/proc/{pid}/smaps_rollup').read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) / 1e3 if found else 0


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob('*'):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--out', type=Path, required=True, help='folder to fill, some 8 GB; required')
    parser.add_argument('--train', type=int, default=3272, help='training photos; default 3272')
    parser.add_argument('--test', type=int, default=819, help='test photos; default 819')
    parser.add_argument('--epochs', type=int, default=200, help='short ones; default 200')
    args = parser.parse_args(argv)
    main(args.out.resolve(), args.train, args.test, args.epochs)


if __name__ == '__main__':
    run_script(command)
