"""Test stages that are stopped at any moment, that run twice at once, or that run out of disk space."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from processes import ended, start, typed
from test_resume import compare

import ensemble
import infer
import prepare
import train
from config import Config, dump_config
from data.cache import open_cache
from utils.files import lock
from utils.workers import worker_pool
from voting.origin import list_faults

ROOT = Path(__file__).resolve().parents[1]
STAGES = ('cache', 'masks', 'demo', 'infer', 'ensemble')


@pytest.fixture(scope='module')
def trained(shapes, shared_cache, tmp_path_factory) -> Config:
    """Train a fold and predict its test.csv."""
    folders = {
        'data_root': shapes,
        'cache_dir': shared_cache,
        'output_dir': tmp_path_factory.mktemp('trained'),
    }
    cfg = Config(**TINY | folders | {'encoder': 'test_resnet.r160_in1k'}, name='run')
    train.main(cfg, 0)
    infer.main(cfg, 0, 'test')
    return cfg


def stage(name: str, trained: Config, folder: Path) -> tuple:
    """Return the command of a stage that writes to a folder, as `typed` takes it."""
    folder.mkdir(exist_ok=True)
    if name == 'masks':
        return prepare.command, 'masks', '--data', str(trained.data_root), '--out', str(folder)
    if name == 'demo':
        return prepare.command, 'demo', '--out', str(folder), '--train', '3', '--test', '1'
    if name == 'ensemble':
        csv = str(trained.run_dir(0) / 'test.csv')
        return ensemble.main, csv, '--out', str(folder / 'out.csv'), '--data', str(trained.data_root)
    place = 'cache_dir' if name == 'cache' else 'output_dir'
    yaml = folder.with_suffix('.yaml')
    yaml.write_text(dump_config(trained.model_copy(update={place: folder})))
    if name == 'cache':
        return prepare.command, 'folds', '--cfg', str(yaml)
    if not (folder / 'run').exists():
        shutil.copytree(trained.run_dir(0), folder / 'run' / 'fold0')
        (folder / 'run' / 'fold0' / 'test.csv').unlink()
    return infer.command, '--cfg', str(yaml), '--fold', '0', '--split', 'test', '--save-probs'


def files_in(folder: Path) -> dict[str, bytes]:
    """Read the results in a folder: all files but logs, meta.json with its times, and names with a dot; of an
    origin.json all but the command and what a prediction adds at its end, with the time of its CSV.
    """
    paths = {path.relative_to(folder): path for path in folder.rglob('*') if path.is_file()}
    left_out = ('log.txt', 'meta.json')
    results = {
        str(name): path.read_bytes()
        for name, path in paths.items()
        if name.name not in left_out and not any(part.startswith('.') for part in name.parts)
    }
    for name, content in results.items():
        if name.endswith('.origin.json'):
            results[name] = json.dumps(json.loads(content) | {'csv': None, 'command': None}).encode()
    return results


def work_for_ever(path: Path) -> None:
    with worker_pool(1) as pool:
        path.with_suffix('.new').write_text(str(pool.submit(os.getpid).result()))
        path.with_suffix('.new').rename(path)
        pool.submit(time.sleep, 600).result()


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    path, until = tmp_path / 'pid', time.monotonic() + 60
    [process] = start(work_for_ever, path)
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    words = Path('/proc', path.read_text(), 'cmdline')
    assert words.read_bytes()
    os.kill(process.pid, signal.SIGKILL)
    while words.exists() and words.read_bytes() and time.monotonic() < until:  # empty if nobody waits for it
        time.sleep(0.02)
    assert time.monotonic() < until


@pytest.mark.parametrize('name', STAGES)
def test_stopped_at_random_moments(name, trained, tmp_path):
    """Check that each file is complete or missing, and that the next run gives the same files."""
    began = time.monotonic()
    assert ended(start(typed, *stage(name, trained, tmp_path / 'one'))) == [0]
    length = time.monotonic() - began
    whole, other = files_in(tmp_path / 'one'), tmp_path / 'two'
    rng = np.random.default_rng(0)
    for number in [signal.SIGKILL, signal.SIGTERM] * 3:
        words = stage(name, trained, other)
        processes = start(typed, *words)
        if ended(processes, rng.uniform(0, length)) == [None]:
            os.kill(processes[0].pid, number)
        status = ended(processes, 60)
        assert status in ([0], [75], [-number])
        left = files_in(other)
        assert left.items() <= whole.items()
        if status == [75]:
            assert not list(other.rglob(f'.*.{processes[0].pid}.partial'))
        if status == [0]:
            shutil.rmtree(other)
    assert ended(start(typed, *stage(name, trained, other))) == [0]
    assert files_in(other) == whole and not list(other.rglob('.*.partial'))
    assert not [*list_faults(other.rglob('*.csv'))]


@pytest.mark.parametrize(
    ('name', 'lock_name', 'doing'),
    [
        ('masks', '.lock', 'drawing masks'),
        ('demo', '.demo.lock', 'drawing a demo set'),
        ('infer', 'run/fold0/.test.lock', 'predicting test'),
        ('ensemble', '.out.csv.lock', 'voting on out.csv'),
    ],
)
def test_two_at_once(name, lock_name, doing, trained, tmp_path):
    """Check that the second run names the first and changes nothing."""
    words, output = stage(name, trained, tmp_path / 'one'), tmp_path / 'output.txt'
    before = files_in(tmp_path / 'one')
    with lock(tmp_path / 'one' / lock_name, doing):
        assert ended(start(typed, *words, said=output)) == [2]
    assert f'process {os.getpid()} is {doing} here now\n' in output.read_text()
    assert files_in(tmp_path / 'one') == before
    assert ended(start(typed, *words)) == [0]


def test_second_waits_for_the_cache(trained, tmp_path):
    words, output = stage('cache', trained, tmp_path / 'one'), tmp_path / 'output.txt'
    open_cache(trained.model_copy(update={'cache_dir': tmp_path / 'two'}), 'train')
    (lock_name,) = (path.name for path in (tmp_path / 'two').glob('.train*.lock'))
    with lock(tmp_path / 'one' / lock_name, 'making the cache of train'):
        processes = start(typed, *words, said=output)
        while not output.exists() or 'waiting for it' not in output.read_text():
            assert processes[0].is_alive()
            time.sleep(0.01)
        assert not list((tmp_path / 'one').glob('train-256-*'))
    assert ended(processes) == [0]
    assert f'process {os.getpid()} is making the cache of train here now' in output.read_text()


def test_no_room_for_the_cache(trained, tmp_path, small_disk):
    folder, output = small_disk(2), tmp_path / 'output.txt'
    words = stage('cache', trained, folder)
    assert ended(start(typed, *words, said=output)) == [75]
    assert 'cannot be written: No space left on device' in output.read_text()
    assert 'Traceback' not in output.read_text()
    assert not [name for name in files_in(folder) if not name.startswith('index-')]


@pytest.mark.slow  # gloo's own reconnection after a restart fails at times on a busy machine
def test_torchrun_starts_again_and_says_why_it_ends(trained, tmp_path):
    """Kill a rank: all ranks restart and go on. Kill one more than restarts are allowed: all end within a
    minute, with the cause in the log.
    """
    change = {'epochs': 6, 'checkpoint_minutes': 1e-9, 'workers': 1}
    one, two = (trained.model_copy(update=change | {'output_dir': tmp_path / place}) for place in ('a', 'b'))
    assert ended(start(train.main, one, 0, ranks=2)) == [0, 0]
    (tmp_path / 'run.yaml').write_text(dump_config(two))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    words = ['--max-restarts=1', 'train.py', '--cfg', str(tmp_path / 'run.yaml'), '--fold', '0', '--resume']
    log, output = two.run_dir(0) / 'log.txt', tmp_path / 'output.txt'
    with output.open('w') as out:
        env = os.environ | {'OMP_NUM_THREADS': '1'}
        process = subprocess.Popen([*launch, *words], cwd=ROOT, stdout=out, stderr=out, env=env)
    for rank, sign in ((0, 'epoch 1/6'), (1, 'resumed after')):
        while not log.exists() or sign not in log.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.01)
        killed = kill_rank(process.pid, rank)
    assert process.wait(60) != 0
    assert re.search(rf'Signal 9 \(SIGKILL\) received by PID {killed}', output.read_text()), (
        output.read_text()
    )
    assert ended(start(train.main, two, 0, ranks=2, resume=True, said=output)) == [0, 0], output.read_text()
    compare(one, two)


def kill_rank(launcher: int, rank: int) -> int:
    """Kill a rank of torchrun and return its process id."""
    children = Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()
    for pid in children:
        if f'LOCAL_RANK={rank}\0' in Path(f'/proc/{pid}/environ').read_text():
            os.kill(int(pid), signal.SIGKILL)
            return int(pid)
    raise AssertionError(f'no rank {rank} among {children}')
