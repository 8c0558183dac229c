"""A machine that runs out of memory, shared memory, open files or disk: one line says what to set."""

import errno
import multiprocessing
import os
import re
import signal
import sys
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import cv2
import pytest
import torch

import train
from dataset import make_loader
from engine.inference import Predictor
from engine.trainer import Trainer
from utils import cli
from utils.errors import BadInput
from utils.signals import SIGNALS

WORKER = 'Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
GPU = 'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB'
ERRORS = [
    (torch.OutOfMemoryError(GPU), 'error: the GPU .* infer_batch_size'),
    (RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be'), 'error: the GPU'),
    (
        RuntimeError(f'{WORKER}unable to write to file </torch_12_3>: No space left on device (28)'),
        'error: .* /dev/shm .* workers=0',
    ),
    (RuntimeError('DataLoader worker (pid 9) is killed by signal: Bus error. It'), 'error: .* /dev/shm'),
    (RuntimeError('DataLoader worker (pid 9) is killed by signal: Killed.'), 'error: out of memory; '),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:130] . can't allocate memory"), 'error: out of memory; '),
    (RuntimeError("can't start new thread"), 'error: out of memory; '),
    (MemoryError(f'{WORKER}Unable to allocate 3 GiB'), 'error: out of memory; '),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'error: out of memory; '),
    (cv2.error('resize.cpp: error: (-4:Insufficient memory) Failed to allocate'), 'error: out of memory; '),
    (ImportError('libtorch_cpu.so: failed to map segment from shared object'), 'error: out of memory; '),
    (OSError(errno.EMFILE, 'Too many open files', 'a.jpg'), 'error: a.jpg: too many .* ulimit -n'),
    (OSError(errno.ENOSPC, 'No space left on device', 'a.csv'), 'a.csv: no room to write; make room'),
    (RuntimeError(f'{WORKER}OSError: [Errno 122] Disk quota exceeded'), 'no room to write; make room'),
]  # fmt: skip


def ending(error: Exception, cause: Exception | None = None) -> int:
    """Return the exit status of a command that raises an error."""

    def main():
        raise error from cause

    return cli.exit_status(main)


@pytest.fixture(autouse=True)
def _typed(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py'])


@pytest.mark.parametrize(('error', 'line'), ERRORS, ids=[line for _, line in ERRORS])
def test_what_a_machine_lacks_is_one_line(error, line, capfd):
    status = 2 if line.startswith('error') else 75
    assert ending(error) == status
    said = capfd.readouterr().err
    assert re.match(f'script.py: {line}', said) and said.count('\n') == 1, said
    assert ending(RuntimeError('a library gave up'), error) == status
    assert capfd.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('error', [TypeError("__array__() got 'copy'"), BadInput('a.jpg: cannot be read')])
def test_a_signal_interrupts_whatever_a_library_makes_of_it(number, error, capfd):
    before = [*map(signal.getsignal, SIGNALS)]

    def main():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise error from None

    assert cli.exit_status(main) == 75
    assert capfd.readouterr().err == 'script.py: interrupted\n'
    assert [*map(signal.getsignal, SIGNALS)] == before


@pytest.mark.parametrize(
    'error', [KeyError('x'), RuntimeError('a bug'), OSError(errno.EIO, 'Input/output error')]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        ending(error)


def test_imports_that_find_no_memory_end_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(os, '_exit', sys.exit)
    with pytest.raises(SystemExit, match='2'):
        cli.end_for_shortage(MemoryError, MemoryError(), None)
    assert capfd.readouterr().err.startswith('script.py: error: out of memory; ')
    cli.end_for_shortage(KeyError, KeyError('x'), None)
    assert capfd.readouterr().err == "KeyError: 'x'\n"


def test_workers_without_shared_memory_are_refused(monkeypatch):
    monkeypatch.setattr(
        multiprocessing, 'Lock', Mock(side_effect=OSError(errno.EROFS, 'Read-only file system'))
    )
    with pytest.raises(BadInput, match='workers=2 share memory in /dev/shm, .*: Read-only .* set workers=0'):
        make_loader([], 2)
    assert len(make_loader([1], 0)) == 1


def train_again(path: Path, *words: str) -> int:
    return cli.exit_status(lambda: train.command(['--cfg', str(path), '--fold', '0', *words]))


def test_a_gpu_that_fills_up_in_a_step_says_what_to_set_and_the_run_goes_on(
    tiny, tiny_yaml, monkeypatch, capfd
):
    real, calls = Trainer.compute_loss, count(1)

    def compute_loss(self, *args):
        if next(calls) == 5:
            raise torch.OutOfMemoryError(GPU)
        return real(self, *args)

    monkeypatch.setattr(Trainer, 'compute_loss', compute_loss)
    words = ['--set', 'epochs=2', 'checkpoint_minutes=0']
    assert train_again(tiny_yaml, *words) == 2
    said = capfd.readouterr().err
    assert 'script.py: error: the GPU is out of memory in epoch 2, batch 2; ' in said
    assert (
        'start again with --overwrite and a change by --set: batch_size=2 accumulate=2, as many photos'
        in said
    )
    assert f'a crop_size below {tiny.crop_size}' in said and 'Traceback' not in said
    assert train_again(tiny_yaml, '--resume', *words) == 0
    folder = tiny.run_dir(0)
    resumed = (folder / 'metrics.csv').read_text()
    assert train_again(tiny_yaml, '--overwrite', *words) == 0
    assert (folder / 'metrics.csv').read_text() == resumed


def test_a_gpu_that_fills_up_in_validation_names_the_key_that_may_change(tiny, tiny_yaml, monkeypatch, capfd):
    def logits(self, inputs):
        raise torch.OutOfMemoryError(GPU)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, 'logits', logits)
        assert train_again(tiny_yaml, '--set', 'checkpoint_minutes=1e-9') == 2
    assert 'infer_batch_size' in capfd.readouterr().err
    assert train_again(tiny_yaml, '--resume', '--set', 'checkpoint_minutes=1e-9', 'infer_batch_size=2') == 0
    assert (tiny.run_dir(0) / 'best.pt').exists()
