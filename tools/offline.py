"""Pack runs for a machine without the internet, and predict a hidden test set there within a time budget.

    python -m tools.offline pack output/convnext output/beit --out output/offline  # scripts/kaggle_offline.sh
    python -m tools.offline predict --photos /kaggle/input/NAME/test --minutes 500 --out submission.csv

The folder that is packed holds the code, runs/<name>/fold<k>/best.pt with config.yaml and thresholds.yaml,
competition.yaml, and the packages that inference imports: wheels/, or packages/ if they cannot be downloaded.
notebooks/offline.ipynb calls predict there, which averages the probabilities of all folds of all runs. It
times each model on the first photos, and after each part of the photos anew: if the time is too short, the
views of test-time augmentation are left out first, then the last folds.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

if not __package__:
    print('run this as: python -m tools.offline, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Config, fold_files, fold_of, read_competition, write_competition
from engine.runs import read_run_config
from utils.cli import ArgumentParser, parse_early, run_script
from utils.errors import BadInput, one_line, plural
from utils.files import exists, lock, make_folder, refuse_inside, write_text

ROOT = Path(__file__).resolve().parents[1]
CODE = ('*.py', 'configs', 'data', 'engine', 'networks', 'notebooks', 'tools', 'utils', 'voting')
PACKAGES = (  # that inference imports
    'torch', 'torchvision', 'segmentation-models-pytorch', 'timm', 'ttach', 'huggingface_hub', 'safetensors',
    'numpy', 'scipy', 'opencv-python-headless', 'pillow', 'tifffile', 'imagecodecs', 'pydantic', 'PyYAML',
    'pycocotools', 'tqdm', 'filelock',
)  # fmt: skip
PART = 32  # photos that are predicted before the time is looked at again
VALUES = 1 << 28  # their probabilities at most, unless it is one photo
TRIAL = 4  # photos on which each model is timed first
USED = 0.9  # share of the time that is planned with


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    pack = commands.add_parser('pack', 'pack runs, code and packages into one folder')
    pack.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='output/<name> of trained runs')
    pack.add_argument('--out', type=Path, default=Path('output/offline'), help='folder to make anew')
    choices = 'wheels for this Python, those that are installed here, or none; without a network, installed'
    pack.add_argument('--packages', choices=['wheels', 'installed', 'none'], default='wheels', help=choices)
    predict = commands.add_parser('predict', 'predict the photos of a folder within a time budget')
    predict.add_argument('--photos', type=Path, required=True, help='folder of the hidden test photos')
    predict.add_argument('--minutes', type=float, required=True, help='time for all of it, from now on')
    predict.add_argument('--out', type=Path, required=True, help='CSV to write')
    predict.add_argument('--bundle', type=Path, default=ROOT, help='folder that pack made')
    work = 'folder for copies of the photos, test.json and the cache'
    predict.add_argument('--work', type=Path, default=Path('work'), help=work)
    predict.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='that computes')
    args = parser.parse_args(argv)
    if args.command == 'predict' and not args.minutes > 0:
        parser.error(f'--minutes {args.minutes}: expected a number above 0')
    return args


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch

from data.cache import Cache, open_cache
from data.importers import list_photos, write_test
from engine.checkpoint import Run, load_run
from engine.distributed import start_ranks
from engine.inference import make_views, predict_rows, prediction_shapes, to_mask
from submission import MaskFormat
from utils.log import log, start_log

# --- pack ---


def pack(runs: Sequence[Path], out: Path, packages: str) -> None:
    """Make the folder `out` of the folds of runs, whole or not at all. Raises BadInput."""
    checkpoints = {run: fold_files(run, 'best.pt', with_all=True) for run in runs}
    for run, paths in checkpoints.items():
        if not paths:
            raise BadInput(f'{run}: no fold*/best.pt in it; expected the folder of a trained run')
    if len({run.name for run in runs}) < len(runs):
        raise BadInput('RUN: two runs have the same name; rename the folder of one')
    found = [read_run_config(checkpoints[run][0].parent).competition for run in runs]
    competition = found[0].model_copy(update={'group': None})  # of the training photos
    for run, other in zip(runs, found, strict=True):
        if other.model_copy(update={'group': None}) != competition:
            raise BadInput(f'{run}: is of another competition than {runs[0]}; pack them apart')
    if exists(out) and not (out / 'runs').is_dir() and any(out.iterdir()):
        raise BadInput(f'{out}: is not empty and was not packed before; give another --out')
    refuse_inside(out, runs)
    partial = out.with_name(f'.{out.name}.partial')
    with lock(out.with_name(f'.{out.name}.lock'), 'packing'):
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        copy_code(partial)
        for run, paths in checkpoints.items():
            copy_run(run, paths, partial / 'runs' / run.name)
        write_competition(partial, competition)
        print(add_packages(partial, packages))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    size = sum(path.stat().st_size for path in out.rglob('*') if path.is_file())
    folds = plural(sum(map(len, checkpoints.values())), 'model')
    print(f'wrote {out}: {folds} of {plural(len(runs), "run")}, {size / 1e6:,.0f} MB')


def copy_code(folder: Path) -> None:
    """Copy the code that inference needs."""
    skipped = shutil.ignore_patterns('__pycache__', '.*')
    for path in (path for pattern in CODE for path in sorted(ROOT.glob(pattern))):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=skipped)
        else:
            shutil.copy(path, folder)


def copy_run(run: Path, checkpoints: Sequence[Path], folder: Path) -> None:
    """Copy the best.pt, which has no optimizer, and config.yaml of each fold, and the thresholds of a run."""
    for path in checkpoints:
        make_folder(folder / path.parent.name)
        for name in ('best.pt', 'config.yaml'):
            shutil.copy(path.with_name(name), folder / path.parent.name)
    if exists(run / 'thresholds.yaml'):
        shutil.copy(run / 'thresholds.yaml', folder)


def add_packages(folder: Path, kind: str) -> str:
    """Add the packages that inference imports; return a line that says which and how."""
    if kind == 'none':
        return 'packages: none; those of the other machine are used'
    pins = [f'{name}=={metadata.version(name)}' for name in PACKAGES]
    write_text(folder / 'requirements.txt', '\n'.join(pins) + '\n')
    reason = ''
    if kind == 'wheels':
        words = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--wheel-dir', str(folder / 'wheels')]
        words += ['--retries', '1', '--timeout', '15', '--requirement', str(folder / 'requirements.txt')]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return f'packages: {plural(len(list((folder / "wheels").iterdir())), "wheel")} of this Python'
        shutil.rmtree(folder / 'wheels', ignore_errors=True)
        reason = f', for pip could not fetch wheels ({one_line(done.stderr)[-120:]})'
    names = with_requirements(PACKAGES)
    for name in sorted(names):
        copy_package(metadata.distribution(name), folder / 'packages')
    version = f'Python {sys.version_info.major}.{sys.version_info.minor}'
    return f'packages: {len(names)} as they are installed here, for {version} alone{reason}'


def with_requirements(names: Iterable[str]) -> set[str]:
    """Return packages with all that they require, as far as it is installed."""
    from packaging.requirements import Requirement

    found: set[tuple[str, str]] = set()  # with an extra that was asked for, or ''
    left = [(name, '') for name in names]
    while left:
        name, extra = left.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if (package.name, extra) in found:
            continue
        found.add((package.name, extra))
        for need in map(Requirement, package.requires or ()):
            if not need.marker or need.marker.evaluate({'extra': extra}):
                left += [(need.name, wanted) for wanted in ('', *need.extras)]
    return {name for name, _ in found}


def copy_package(package: metadata.Distribution, folder: Path) -> None:
    """Link or copy the files of an installed package into a folder that can be put on Python's path."""
    site = Path(package.locate_file('')).resolve()
    for file in package.files or ():
        source = Path(package.locate_file(file)).resolve()
        if file.suffix == '.pyc' or not source.is_relative_to(site) or not source.is_file():
            continue  # scripts and compiled files
        link_or_copy(source, folder / source.relative_to(site))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another file system."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# --- predict ---


class Clock:
    """The time that is left, from the start of the process's work."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes * USED

    @property
    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()


class Ensemble:
    """The models of a bundle, in the order in which they are worth their time, and what each takes."""

    def __init__(self, runs: Sequence[Run], caches: Sequence[Cache]) -> None:
        self.runs, self.caches = runs, caches
        views = [(cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales) for cfg in (run.cfg for run in runs)]
        self.views = [len(make_views(*choice)) for choice in views]
        self.seconds = [0.0] * len(runs)  # a photo and view
        self.count, self.tta = len(runs), max(self.views) > 1

    def time(self, rows: np.ndarray) -> None:
        """Time each model on rows of the cache, one view; the first of them warms up."""
        for number, run in enumerate(self.runs):
            for chosen in (rows[:1], rows):
                start = time.monotonic()
                for _ in predict_rows(run.model, self.caches[number], chosen, run.cfg, tta=False):
                    pass
            self.seconds[number] = (time.monotonic() - start) / len(rows)

    def cost(self, count: int, tta: bool) -> float:
        """Return the seconds a photo of the first models."""
        views = self.views if tta else [1] * len(self.runs)
        return sum(s * v for s, v in zip(self.seconds[:count], views, strict=False))

    def fit(self, photos: int, seconds: float) -> None:
        """Choose views and models with which photos take so many seconds at most: the views go first."""
        choices = [(self.count, tta) for tta in (True, False) if self.tta or not tta]
        choices += [(count, False) for count in range(self.count - 1, 0, -1)]
        chosen = next((c for c in choices if photos * self.cost(*c) <= seconds), choices[-1])
        if chosen == (self.count, self.tta):
            return
        self.count, self.tta = chosen
        views = 'all views' if self.tta else 'no test-time augmentation'
        models = f'{self.count} of {plural(len(self.runs), "model")}'
        need = photos * self.cost(*chosen) / 60
        left = f'{seconds / 60:.1f} minutes are left for {plural(photos, "photo")}'
        log.warning(f'warning: {left}: {models}, {views}, which takes {need:.1f}')

    def predict(self, rows: np.ndarray) -> list[np.ndarray]:
        """Predict rows of the cache: the mean of the models' probabilities, as masks."""
        first, start = self.runs[0], time.monotonic()
        totals = [np.zeros(shape, np.float32) for shape in prediction_shapes(first.cfg, self.caches[0], rows)]
        for run, cache in zip(self.runs[: self.count], self.caches, strict=False):
            for band in predict_rows(run.model, cache, rows, run.cfg, self.tta):
                totals[band.position][:, band.top : band.top + band.probs.shape[1]] += (
                    band.probs.cpu().numpy()
                )
        factor = (time.monotonic() - start) / len(rows) / max(self.cost(self.count, self.tta), 1e-9)
        self.seconds = [seconds * factor for seconds in self.seconds]
        thresholds = np.mean([run.thresholds for run in self.runs[: self.count]], axis=0).tolist()
        return [to_mask(torch.from_numpy(total / self.count), first.cfg, thresholds) for total in totals]


def predict(bundle: Path, photos: Path, work: Path, out: Path, clock: Clock, device: str) -> None:
    """Write the CSV of the photos of a folder, by the runs of a bundle. Raises BadInput."""
    start_log(None)
    data = work / 'data'  # which is emptied first
    refuse_inside(data, [photos, bundle], '--work')
    competition = read_competition(bundle)
    checkpoints = in_turn([fold_files(run, 'best.pt', True) for run in sorted((bundle / 'runs').glob('*/'))])
    if competition is None or not checkpoints:
        raise BadInput(f'{bundle}: no competition.yaml and runs/*/fold*/best.pt; expected what pack made')
    collect_photos(photos, data)
    write_competition(data, competition)
    write_test(data, data, overwrite=True)
    places = {'data_root': data, 'cache_dir': work / 'cache', 'output_dir': bundle / 'runs'}
    cfgs = [config_of(path, {**places, 'device': device}) for path in checkpoints]
    caches = {cfg.cache_size: open_cache(cfg, 'test') for cfg in cfgs}
    torch_device = start_ranks(cfgs[0]).device
    runs = [
        load_run(cfg, fold_of(path.parent), torch_device) for cfg, path in zip(cfgs, checkpoints, strict=True)
    ]
    ensemble = Ensemble(runs, [caches[cfg.cache_size] for cfg in cfgs])
    with lock(out.with_name(f'.{out.name}.lock'), f'predicting {out.name}'):
        write_masks(ensemble, ensemble.caches[0].coco.form, out, clock)


def write_masks(ensemble: Ensemble, form: MaskFormat, out: Path, clock: Clock) -> None:
    """Predict part after part of the photos into a CSV, and fit the rest into the time that is left."""
    names = list(form.sizes)
    rows = np.arange(len(names))
    ensemble.time(rows[:TRIAL])
    with form.writer(out) as writer:
        for part in split_rows(prediction_shapes(ensemble.runs[0].cfg, ensemble.caches[0], rows)):
            ensemble.fit(len(rows) - part[0], clock.left)
            for row, mask in zip(part, ensemble.predict(part), strict=True):
                writer.write(names[row], mask)
    form.check(out)
    views = 'with' if ensemble.tta else 'without'
    models = f'{ensemble.count} of {plural(len(ensemble.runs), "model")}'
    log.info(
        f'wrote {out}: {plural(len(rows), "photo")}, at the end {models}, {views} test-time augmentation'
    )


def split_rows(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Split rows, whose probabilities have these shapes, into parts that are predicted together."""
    parts, values = [[]], 0
    for row, size in enumerate(map(math.prod, shapes)):
        values += size
        if parts[-1] and (len(parts[-1]) == PART or values > VALUES):
            parts.append([])
            values = size
        parts[-1].append(row)
    return parts


def collect_photos(photos: Path, data: Path) -> None:
    """Copy the photos below a folder into a new data root under the same names, which the CSV will have."""
    shutil.rmtree(data, ignore_errors=True)
    for path in list_photos(photos):
        link_or_copy(path.resolve(), data / path.relative_to(photos))


def in_turn(runs: Sequence[Sequence[Path]]) -> list[Path]:
    """Order checkpoints: the first fold of each run, then the second ones, so that no run is lost early."""
    return [path for fold in zip_longest(*runs) for path in fold if path is not None]


def config_of(path: Path, changes: dict) -> Config:
    """Return the config of a checkpoint, for the places of this machine."""
    cfg = read_run_config(path.parent)
    places = {**changes, 'name': path.parents[1].name, 'workers': min(cfg.workers, os.cpu_count())}
    return cfg.model_copy(update=places)


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    if args.command == 'pack':
        pack([run.resolve() for run in args.runs], args.out, args.packages)
    else:
        predict(args.bundle, args.photos, args.work, args.out, Clock(args.minutes), args.device)


if __name__ == '__main__':
    run_script(command)
