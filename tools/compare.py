"""Say whether a change of a config helps: train both with several seeds, predict out of fold, and compare.

    python -m tools.compare trash481 copy_paste=0.5 --seeds 0 1 2 --folds all --set data_root=DIR
    python -m tools.compare configs/convnext.yaml lr=2e-4 epochs=50 --seeds 0 1 --folds 0 1
    python -m tools.compare trash481 --seeds 0 1 2    # without a change: how much of its score is luck
    CUDA_VISIBLE_DEVICES=0,1,2,3 python -m tools.compare convnext lr=2e-4 --jobs 4

scripts/compare.sh is the same. Runs are output/<config>-seed<s>/ and output/<config>-<changes>-seed<s>/, so
that comparisons with one config share its trainings; a change of the prediction alone takes the checkpoints
of the config. Both sides have the same folds. Type the same again to continue after a stop. The last lines
are those of `evaluate.py compare`, with the change first, so that + means that it helps; without a change
those of `evaluate.py seeds`.
Each of --jobs takes one of CUDA_VISIBLE_DEVICES in turn; that was not tried on several GPUs.
"""

import sys

if not __package__:
    print('run this as: python -m tools.compare, in the root of the repository', file=sys.stderr)
    sys.exit(2)

import hashlib
import os
import re
import signal
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import evaluate
from config import FORMER_KEYS, PREDICTION_KEYS, Config, load_config
from engine.runs import check_run, compare_config
from utils.cli import MAX_SEED, ArgumentParser, at_least, parse_fold, run_script
from utils.errors import BAD_INPUT, DONE, INTERRUPTED, BadInput, CheckFailed, Interrupted, plural
from utils.log import say

# where things are and how fast they go: no result depends on these keys
PLACES = ('data_root', 'cache_dir', 'output_dir', 'folds_csv', 'name', 'workers', 'device', 'tracker')
PLACES += ('checkpoint_minutes', 'infer_batch_size')
COMMON = (*PLACES, 'folds', 'competition', 'classes')  # both sides have the same photos and folds
LONGEST = 100  # characters of the part of a name that says the changes


@dataclass(frozen=True)
class Recipe:
    """A config with its changes, to be trained with several seeds; `name` is without the seed."""

    path: Path
    changes: tuple[str, ...]
    name: str
    is_trained: bool = True  # or takes the checkpoints of another

    def words(self, seed: int | None = None) -> list[str]:
        """Return the options that a script takes, for a seed if one is given."""
        seeded = [f'name={self.name}'] if seed is None else [f'name={self.name}-seed{seed}', f'seed={seed}']
        return ['--cfg', str(self.path), '--set', *self.changes, *seeded]

    def config(self, seed: int) -> Config:
        return load_config(self.path, self.words(seed)[3:])


def command(argv: list[str] | None = None) -> int:
    args, recipes = read_arguments(argv)
    pairs = [*product(args.seeds, args.folds)]
    for recipe, (seed, fold) in product(recipes, pairs):
        cfg = recipe.config(seed)
        if recipe.is_trained:
            check_run(cfg, fold, resume=True, overwrite=False)
        else:  # its folder has a best.pt alone, a link
            compare_config(cfg, cfg.run_dir(fold))
    trainings = plural(len(pairs) * sum(recipe.is_trained for recipe in recipes), 'training')
    say(f'{" and ".join(recipe.name for recipe in recipes)}: {trainings}')
    Runner(recipes, args.jobs).run(pairs)
    base, *changed = ([recipe.config(seed).run_dir(0).parent for seed in args.seeds] for recipe in recipes)
    words = ['compare', *changed[0], '--against', *base] if changed else ['seeds', *base]
    return evaluate.command([*map(str, [*words, '--folds', *args.folds]), *recipes[0].words()])


def read_arguments(argv: list[str] | None) -> tuple[Namespace, list[Recipe]]:
    """Read the command line: the config as it is, and with the changes if there are any. Raises BadInput."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('base', metavar='BASE', help='a config: the name of a file in configs/, or a file')
    change = {'nargs': '*', 'default': [], 'metavar': 'KEY=VALUE'}
    parser.add_argument('changes', **change, help='the change of the config that may help')
    parser.add_argument('--set', **change, action='extend', help='keys to change on both sides')
    seeds = {'nargs': '+', 'type': at_least(0, MAX_SEED), 'default': [0, 1, 2], 'metavar': 'SEED'}
    parser.add_argument('--seeds', **seeds, help='seeds to train with')
    parser.add_argument(
        '--folds', nargs='+', type=parse_fold, default=[None], metavar='K', help='folds, or all'
    )
    parser.add_argument('--jobs', type=at_least(1, 256), default=1, help='trainings side by side')
    args = parser.parse_args(argv)
    path = Path('configs', f'{args.base}.yaml')
    path = path if path.is_file() else Path(args.base)
    cfg = load_config(path, args.set)
    if args.folds == [None]:  # all
        args.folds = [*range(cfg.folds)]
    for fold in args.folds:
        if fold is None or not 0 <= fold < cfg.folds:
            found = 'all' if fold is None else fold
            raise BadInput(
                f'--folds {found}: found no such fold, expected 0 to {cfg.folds - 1}, or all alone'
            )
    for option in ('seeds', 'folds'):
        values = getattr(args, option)
        if twice := [value for value in values if values.count(value) > 1]:
            raise BadInput(f'--{option}: {twice[0]} is given twice')
    return args, make_recipes(path, cfg, args.set, args.changes)


def make_recipes(path: Path, cfg: Config, common: Sequence[str], changes: Sequence[str]) -> list[Recipe]:
    """Make the recipe of a config, and that of its changes if there are any. Raises BadInput."""
    if 'seed' in map(key_of, common):
        raise BadInput('--set seed: --seeds gives the seeds')
    trained = [change for change in common if key_of(change) not in PLACES]
    base = Recipe(path, tuple(common), name_changes(cfg.name, trained))
    if not changes:
        return [base]
    keys = [*map(key_of, changes)]
    changed = load_config(path, [*common, *changes])
    for key, change in zip(keys, changes, strict=True):
        if key == 'seed':
            raise BadInput(f'{change}: --seeds gives the seeds')
        if key in COMMON:
            raise BadInput(f'{change}: both sides have the same {key}; give it after --set')
        if keys.count(key) > 1:
            raise BadInput(f'{change}: {key} is given twice')
        if key.startswith('pseudo_'):
            raise BadInput(f'{change}: is for pseudo.py, which is not run here, and changes nothing')
        if getattr(cfg, key) == getattr(changed, key):
            raise BadInput(f'{change}: is what {path} has; expected a change')
    is_trained = not set(keys) <= {*PREDICTION_KEYS}
    name = name_changes(base.name, changes)
    return [base, Recipe(path, (*common, *changes), name, is_trained)]


def key_of(change: str) -> str:
    """Return the key of KEY=VALUE, by its present name."""
    key = change.partition('=')[0]
    return FORMER_KEYS.get(key, key)


def name_changes(name: str, changes: Sequence[str]) -> str:
    """Name a config with changes: demo-lr-0.001; with a hash of what is too long, or can stand in no name."""
    if not changes:
        return name
    text = '-'.join(changes)
    plain = re.sub(r'[^\w.-]+', '-', text, flags=re.ASCII).strip('-')
    if plain != text.replace('=', '-') or len(plain) > LONGEST:
        plain = f'{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'
    return f'{name}-{plain}'


@dataclass
class Runner:
    """Run the trainings and predictions of recipes, some side by side, and end them all on a signal."""

    recipes: list[Recipe]
    jobs: int
    processes: set[subprocess.Popen] = field(default_factory=set)
    is_stopping: bool = False
    lock: Lock = field(default_factory=Lock)
    devices: SimpleQueue = field(default_factory=SimpleQueue)  # for each job the environment of its processes

    def run(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Train and predict by each seed and fold. Raises Interrupted, BadInput and CheckFailed."""
        gpus = [gpu for gpu in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if gpu]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        for job in range(self.jobs):
            env = {'CUDA_VISIBLE_DEVICES': gpus[job % len(gpus)]} if gpus else {}
            self.devices.put({'OMP_NUM_THREADS': threads} | os.environ | env if self.jobs > 1 else None)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                # by the seed of the config itself
                self.step(['prepare.py', 'folds', *self.recipes[0].words()])
                futures = [pool.submit(self.run_pair, *pair) for pair in pairs]
                for number, future in enumerate(as_completed(futures), 1):
                    seed, fold = future.result()
                    say(f'seed {seed}, fold {fold}: done, {number} of {len(pairs)}')
            finally:  # a signal, or a step that failed, ends the others
                self.stop()

    def run_pair(self, seed: int, fold: int) -> tuple[int, int]:
        """Train and predict all recipes by one seed and fold, and return these."""
        env = self.devices.get()
        try:
            for recipe in self.recipes:
                cfg = recipe.config(seed)
                folder, words = cfg.run_dir(fold), [*recipe.words(seed), '--fold', str(fold)]
                if not recipe.is_trained:
                    link_checkpoint(folder, self.recipes[0].config(seed).run_dir(fold))
                else:  # which does nothing if the run has ended
                    self.step(['train.py', *words, '--resume'], env)
                self.step(['infer.py', *words, '--split', 'oof', '--update'], env)
        finally:
            self.devices.put(env)
        return seed, fold

    def step(self, words: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Run a script, with its output on the terminal if it is alone. Raises what its exit status says."""
        pipe = subprocess.PIPE if self.jobs > 1 else None
        with self.lock:
            if self.is_stopping:
                raise Interrupted('interrupted; type the same again to continue')
            # a group of its own: a Ctrl-C reaches it once, by stop
            process = subprocess.Popen(
                [sys.executable, *words], env=env, stdout=pipe, stderr=pipe, text=True, process_group=0
            )
            self.processes.add(process)
        error = process.communicate()[1]
        with self.lock:
            self.processes.remove(process)
        if process.returncode == DONE:
            return
        fault = (error or '').strip().rpartition('\n')[2]
        text = f'{" ".join(words)}: ended with status {process.returncode}{": " if fault else ""}{fault}'
        kinds = {BAD_INPUT: BadInput, INTERRUPTED: Interrupted}
        raise kinds.get(process.returncode, CheckFailed)(text)

    def stop(self) -> None:
        """Start nothing more, and ask what runs to stop, by a checkpoint."""
        with self.lock:
            self.is_stopping = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


def link_checkpoint(folder: Path, origin: Path) -> None:
    """Make best.pt of a run folder a link to that of another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'best.pt').unlink(missing_ok=True)
    (folder / 'best.pt').symlink_to(os.path.relpath(origin / 'best.pt', folder))


if __name__ == '__main__':
    run_script(command)
