"""Measure what large data sets take: check them, assign folds, which makes index and cache, and draw samples.

    python -m tools.bench.scale --photos 1000 10000 100000 --out /tmp/scale

It draws photos of 64x64 with eight polygons each, and removes them again; no network is trained. A row has
the CPU time, the wall time, and the peak of memory of all processes of a step together, shared pages counted
once (PSS). docs/scaling.md has the table of one machine.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    print('run this as: python -m tools.bench.scale, in the root of the repository', file=sys.stderr)
    sys.exit(2)

import cv2
import numpy as np

from config import CLASSES, load_config
from tools.bench.fixtures import ROOT
from utils.cli import ArgumentParser, at_least, run_script
from utils.errors import CheckFailed
from utils.files import write_text
from utils.progress import progress

SIDE, OBJECTS, POINTS = 64, 8, 12
PER_FOLDER = 1000
CONFIG = ROOT / 'configs/trash481.yaml'
STEPS = {
    'check': ['prepare.py', 'check'],
    'folds, the first time': ['prepare.py', 'folds'],
    'folds again': ['prepare.py', 'folds'],
    'samples of an epoch': ['-m', 'tools.bench.scale', '--samples'],
}


def command(argv: list[str] | None = None) -> None:
    """Measure sets of the sizes on the command line, one after another. Raises CheckFailed."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        '--photos', type=at_least(20, 10**7), nargs='+', default=[1000, 10_000], help='sizes of sets'
    )
    parser.add_argument('--out', type=Path, default=Path('output/scale'), help='folder of the sets')
    parser.add_argument('--workers', type=at_least(0), default=2, help='processes that make samples')
    parser.add_argument('--samples', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--cfg', type=Path, default=CONFIG, help=argparse.SUPPRESS)
    parser.add_argument('--set', nargs='+', action='extend', default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.samples:
        draw_samples(args.cfg, args.set)
        return
    print(f'{"photos":>8}  {"step":<22}{"CPU s":>8}{"wall s":>8}{"GiB":>7}')
    for count in args.photos:
        root = args.out / f'{count}'
        try:
            write_photos(root, count)
            places = [f'data_root={root}', f'cache_dir={root}/cache', f'workers={args.workers}']
            sizes = [f'{key}={SIDE}' for key in ('cache_size', 'image_size', 'crop_size')]
            for step, words in STEPS.items():
                cpu, wall, memory = measure([*words, '--cfg', str(args.cfg), '--set', *places, *sizes])
                print(f'{count:>8,}  {step:<22}{cpu:>8.1f}{wall:>8.1f}{memory / 2**30:>7.2f}', flush=True)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def write_photos(root: Path, count: int) -> None:
    """Draw so many photos, no two alike, and write their train_all.json."""
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    colours = rng.integers(0, 256, (len(CLASSES), 3)).tolist()
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    for number in progress(range(count), f'draw {count:,}', 'photo'):
        name = f'{number // PER_FOLDER:04d}/{number % PER_FOLDER:04d}.jpg'
        if number % PER_FOLDER == 0:
            (root / name).parent.mkdir(parents=True)
        pixels = draw_background(rng)
        images.append({'id': number, 'file_name': name, 'height': SIDE, 'width': SIDE})
        class_ids = rng.integers(1, len(CLASSES), 3)[rng.integers(0, 3, OBJECTS)].tolist()
        centres, radii = rng.uniform(0, SIDE, (OBJECTS, 1, 2)), rng.uniform(3, 9, (OBJECTS, POINTS, 1))
        outlines = (centres + radii * circle).clip(0, SIDE).round(2)
        lows, sides = outlines.min(axis=1).tolist(), np.ptp(outlines, axis=1).tolist()
        for k, class_id in enumerate(class_ids):
            cv2.fillPoly(pixels, [outlines[k].astype(np.int32)], colours[class_id])
            record = {'id': len(annotations), 'image_id': number, 'category_id': class_id, 'iscrowd': 0}
            record |= {'bbox': [*lows[k], *sides[k]], 'area': sides[k][0] * sides[k][1]}
            annotations.append(record | {'segmentation': [outlines[k].ravel().tolist()]})
        cv2.imwrite(str(root / name), pixels)
    categories = [{'id': k, 'name': name} for k, name in enumerate(CLASSES)]
    content = {'images': images, 'categories': categories, 'annotations': annotations}
    write_text(root / 'competition.yaml', f'score_size: {SIDE}\nsubmission: {{}}\n')
    write_text(root / 'train_all.json', json.dumps(content))


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draw mostly coarse and grey noise, as photos have → (S, S, 3) uint8."""
    pixels = np.full((SIDE, SIDE, 3), 128, np.float32)
    for cells, grey, colour in ((2, 60, 15), (4, 30, 8), (8, 15, 4)):
        noise = rng.normal(0, grey, (cells, cells, 1)) + rng.normal(0, colour, (cells, cells, 3))
        pixels += cv2.resize(noise.astype(np.float32), (SIDE, SIDE))
    return pixels.clip(0, 255).astype(np.uint8)


def measure(words: list[str]) -> tuple[float, float, int]:
    """Run a script; return its CPU and wall time in seconds, and the peak of its and its children's memory in
    bytes. Raises CheckFailed if it fails.
    """
    before, began, most = cpu_seconds(), time.perf_counter(), 0
    with tempfile.TemporaryFile('w+') as errors:
        command = [sys.executable, *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        if process.returncode:
            errors.seek(0)
            raise CheckFailed(f'{" ".join(words[:2])}: ended with {process.returncode}: {errors.read()}')
    return cpu_seconds() - before, time.perf_counter() - began, most


def cpu_seconds() -> float:
    """Return the CPU time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_of(pid: int) -> int:
    """Return the bytes of a process and its children, shared pages counted once; 0 if it has ended."""
    try:
        lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return 0
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith('Pss:')), 0)
    return 1024 * kilobytes + sum(memory_of(int(child)) for child in children)


def draw_samples(cfg_path: Path, changes: list[str]) -> None:
    """Open the cache and the folds, and draw the samples of an epoch, as train.py does."""
    from data.cache import open_cache
    from data.folds import read_folds, split_fold
    from dataset import EpochSampler, TrainingSet, make_loader

    cfg = load_config(cfg_path, changes)
    cache = open_cache(cfg, 'train')
    rows, _ = split_fold(read_folds(cfg, cache), 0)
    data = TrainingSet(cfg, cache, rows, (0, 0, 0))
    sampler = EpochSampler(cfg.batch_size, cfg.seed)
    sampler.set_epoch(1, range(len(data)))
    for _ in make_loader(data, cfg.workers, batch_sampler=sampler):
        pass


if __name__ == '__main__':
    run_script(command)
