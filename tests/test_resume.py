"""Runs that are killed, or asked to stop, and go on to the bit."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pseudo
import train
from config import BadInput, Config, Interrupted, dump_config
from signals import SIGNALS, stop_requests
from trainer import Trainer
from utils import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['train', 'pseudo', 'conftest'])


@pytest.fixture
def cfg(tiny) -> Config:
    """A run of three epochs that has all there is to resume, and writes a checkpoint at every step."""
    return tiny.model_copy(
        update={
            'epochs': 3,
            'ema': 0.9,
            'swa': 0.4,
            'drop_path': 0.2,
            'encoder': 'test_resnet.r160_in1k',
            'batch_size': 2,
            'accumulate': 2,
            'checkpoint_minutes': 1e-9,
        }
    )


def start(target, *args, **kwargs) -> multiprocessing.Process:
    process = CONTEXT.Process(target=quietly, args=(target, *args), kwargs=kwargs)
    process.start()
    return process


def quietly(target, *args, **kwargs) -> None:
    import torch

    torch.set_num_threads(1)
    with Path(os.devnull).open('w') as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        target(*args, **kwargs)


def kill_until_done(moments: np.ndarray, target, *args, **kwargs) -> int:
    """Starts the run again and again, and kills it after each of so many seconds; how often it was killed."""
    kills = 0
    for moment in moments:
        process = start(target, *args, **kwargs)
        process.join(moment)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    process = start(target, *args, **kwargs)
    process.join()
    assert process.exitcode == 0
    return kills


@pytest.mark.parametrize(('workers', 'kills'), [(0, 20), (1, 4)])
def test_killed_at_random_moments(cfg, workers, kills):
    cfg = cfg.model_copy(update={'workers': workers, 'epochs': 8})
    start(train.main, cfg, 0).join()
    started = time.monotonic()
    start(train.main, cfg, 0, overwrite=True).join()
    seconds = time.monotonic() - started
    other = cfg.model_copy(update={'output_dir': cfg.output_dir / 'killed'})
    moments = np.random.default_rng(workers).uniform(0.1, 0.5, kills) * seconds
    assert kill_until_done(moments, train.main, other, 0, resume=True) >= 3
    compare(cfg, other)


def test_killed_while_a_checkpoint_is_written(cfg):
    train.main(cfg, 0)
    other = cfg.model_copy(update={'output_dir': cfg.output_dir / 'killed'})
    hit = 0
    for _ in range(4):
        process = start(train.main, other, 0, resume=True)
        while process.is_alive():
            if any(other.run_dir(0).glob('.*.pt.*.partial')):
                process.kill()
                hit += 1
                break
        process.join()
        left = other.run_dir(0) / 'last.pt'
        assert not left.exists() or load_checkpoint(left)['config']['name'] == cfg.name
    train.main(other, 0, resume=True)
    assert hit >= 2
    assert not list(other.run_dir(0).glob('.*.partial'))
    compare(cfg, other)


def test_student_of_half_the_epochs_is_killed(cfg):
    train.main(cfg, 0)
    student = cfg.model_copy(update={'epochs': 4, 'pseudo_soft': True})
    whole = start(pseudo.main, student, 0, [cfg.name], 'half')
    whole.join()
    assert whole.exitcode == 0
    other = student.model_copy(update={'output_dir': cfg.output_dir / 'killed'})
    shutil.copytree(cfg.run_dir(0), other.run_dir(0))
    moments = np.random.default_rng(0).uniform(0.3, 3, 5)
    kill_until_done(moments, pseudo.main, other, 0, [cfg.name], 'half', resume=True)
    named = {'name': f'{cfg.name}-pseudo'}
    compare(student.model_copy(update=named), other.model_copy(update=named))


@pytest.mark.parametrize('number', SIGNALS)
def test_asked_to_stop(cfg, number, capsys):
    """The step in hand ends, the checkpoint is written, and what was asked for is said."""
    train.main(cfg, 0)
    other = cfg.model_copy(update={'output_dir': cfg.output_dir / 'asked', 'checkpoint_minutes': 0})
    steps = []

    def update(self):
        real(self)
        steps.append(self.step)
        if len(steps) == 2:
            signal.raise_signal(number)

    real, Trainer.update = Trainer.update, update
    try:
        with pytest.raises(Interrupted, match=f'{number.name}: stopped after batch 4 of 6 in epoch 1'):
            train.main(other, 0)
    finally:
        Trainer.update = real
    assert steps == [1, 2] and load_checkpoint(other.run_dir(0) / 'last.pt')['resume']['batch'] == 4
    train.main(other, 0, resume=True)
    assert 'resumed after epoch 0, batch 4 of epoch 1, step 2' in capsys.readouterr().out
    compare(cfg, other)


def test_second_signal_is_not_waited_for():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def torchrun(cfg: Config, path: Path, *words: str) -> subprocess.Popen:
    """train.py on two ranks, in a process group of its own."""
    path.write_text(dump_config(cfg))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    where = {'cwd': ROOT, 'start_new_session': True, 'env': os.environ | {'OMP_NUM_THREADS': '1'}}
    return subprocess.Popen(
        [*launch, 'train.py', '--cfg', str(path), '--fold', '0', *words], **options, **where
    )


def test_two_ranks_are_killed(cfg, tmp_path):
    cfg = cfg.model_copy(update={'batch_size': 4, 'epochs': 6})
    said, _ = torchrun(cfg, tmp_path / 'whole.yaml').communicate()
    assert 'best mIoU' in said, said
    other = cfg.model_copy(update={'output_dir': cfg.output_dir / 'killed'})
    process = torchrun(other, tmp_path / 'killed.yaml')
    while not (other.run_dir(0) / 'metrics.csv').exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    said, _ = torchrun(other, tmp_path / 'killed.yaml', '--resume').communicate()
    assert 'resumed after epoch' in said, said
    compare(cfg, other)


def test_checkpoint_of_more_ranks_goes_on_with_fewer(cfg, capsys):
    train.main(cfg.model_copy(update={'epochs': 1, 'swa': 0}), 0)
    path = cfg.run_dir(0) / 'last.pt'
    checkpoint = load_checkpoint(path)
    state = checkpoint['resume']
    for key in ('cpu_rng', 'totals'):
        state[key] = state[key].repeat(2, *[1] * (state[key].ndim - 1))
    save_checkpoint(path, checkpoint)
    train.main(cfg.model_copy(update={'epochs': 1, 'swa': 0}), 0, resume=True)
    assert 'of 2 ranks, now 1: the run goes on, but not to the bit' in capsys.readouterr().out


def test_checkpoint_of_an_older_version(cfg):
    train.main(cfg, 0)
    path = cfg.run_dir(0) / 'last.pt'
    checkpoint = load_checkpoint(path)
    del checkpoint['resume']['batch']
    save_checkpoint(path, checkpoint)
    with pytest.raises(BadInput, match='cannot be resumed from'):
        train.main(cfg, 0, resume=True)


def compare(cfg: Config, other: Config) -> None:
    """The files are the same to the bit, but for the place of the runs in their configs."""
    for name in ('last.pt', 'best.pt'):
        one, two = (load_checkpoint(c.run_dir(0) / name) for c in (cfg, other))
        for key in ('output_dir', 'checkpoint_minutes'):
            one['config'][key] = two['config'][key]
        same(one, two, name)
    assert (cfg.run_dir(0) / 'metrics.csv').read_bytes() == (other.run_dir(0) / 'metrics.csv').read_bytes()


def same(one, two, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f'{where} {key}')
    elif hasattr(one, 'numpy'):
        assert one.numpy().tobytes() == two.numpy().tobytes(), where
    else:
        assert one == two or one != one, where
