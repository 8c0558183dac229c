"""Runs that are killed, asked to stop, or out of room, and go on to the bit."""

import ctypes
import importlib
import math
import os
import resource
import shutil
import signal
import threading
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_set
from processes import ended, start, typed

import pseudo
import train
from config import Competition, Config, dump_config
from engine.checkpoint import load_checkpoint, refuse_other_pixels, save_checkpoint
from engine.trainer import Trainer
from utils.competition import read_competition
from utils.errors import BadInput, Interrupted
from utils.signals import SIGNALS, stop_requests


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Config:
    """A run of three epochs that has all there is to resume, writes a checkpoint at every step, and that
    nobody disturbed.
    """
    root = tmp_path_factory.mktemp('whole')
    data = write_set(root / 'small', train=16, test=4, side=64)
    (data / 'competition.yaml').write_text('{score_size: 64, submission: {}}')  # quick: a fifteenth of 256
    folders = {'data_root': data, 'cache_dir': root / 'cache', 'output_dir': root, 'cache_size': 64}
    more = {'epochs': 3, 'ema': 0.9, 'swa': 0.4, 'drop_path': 0.2, 'accumulate': 2, 'batch_size': 2}
    small = {'encoder': 'test_resnet.r160_in1k', 'checkpoint_minutes': 1e-9}
    competition = read_competition(data)
    cfg = Config(**TINY | folders | more | small, name='run', competition=competition)
    assert ended(start(train.main, cfg, 0)) == [0]
    return cfg


@pytest.fixture
def other(whole, tmp_path) -> Config:
    """The same run, elsewhere and not begun."""
    return whole.model_copy(update={'output_dir': tmp_path / 'output'})


def kill_again_and_again(kills: int, whole: Config, other: Config, target, *args, ranks=1, **kwargs) -> None:
    """Kills a run, one rank of it, at so many random moments of its length, and lets it go on each time; each
    time that it ends, it has the files of `whole`, and begins anew.
    """
    rng = np.random.default_rng(kills)
    began = time.monotonic()
    assert ended(start(target, other, *args, ranks=ranks, **kwargs)) == [0] * ranks
    length = time.monotonic() - began
    compare(whole, other)
    clean = other.run_dir(0)
    shutil.rmtree(clean)
    while kills:
        lines = whole.output_dir / 'lines.txt'
        lines.unlink(missing_ok=True)
        processes = start(target, other, *args, ranks=ranks, said=lines, resume=True, **kwargs)
        if None in ended(processes, rng.uniform(0, length)):
            have_met = lines.exists() and lines.read_text() != ''
            victim = processes[rng.integers(ranks)]
            victim.kill()
            if not have_met:  # the others wait for it; torchrun ends them
                for process in processes:
                    process.kill()
            statuses = ended(processes, 60)
            assert None not in statuses  # the others do not wait for it
            kills -= 1
        else:
            assert ended(processes) == [0] * ranks
            compare(whole, other)
            shutil.rmtree(clean)
    assert ended(start(target, other, *args, ranks=ranks, resume=True, **kwargs)) == [0] * ranks
    compare(whole, other)


@pytest.mark.parametrize(('workers', 'kills'), [(0, 8), (1, 2), pytest.param(0, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(whole, other, workers, kills):
    """With a worker, too, the files are those of a run without."""
    kill_again_and_again(kills, whole, other.model_copy(update={'workers': workers}), train.main, 0)


@pytest.mark.parametrize('kills', [3, pytest.param(10, marks=pytest.mark.slow)])
def test_one_of_two_ranks_is_killed(whole, other, tmp_path, kills):
    """The other one ends by itself, and both go on."""
    two = whole.model_copy(update={'batch_size': 4, 'output_dir': tmp_path / 'two'})
    assert ended(start(train.main, two, 0, ranks=2)) == [0, 0]
    kill_again_and_again(kills, two, other.model_copy(update={'batch_size': 4}), train.main, 0, ranks=2)


def test_student_of_half_the_epochs_is_killed(whole, other, tmp_path):
    """While it labels as well as while it trains."""
    change = {'name': f'{whole.name}-pseudo', 'epochs': 2, 'swa': 0, 'pseudo_soft': True}
    students = [
        whole.model_copy(update=change | {'output_dir': tmp_path / place}) for place in ('one', 'two')
    ]
    for cfg in students:
        shutil.copytree(whole.run_dir(0), cfg.output_dir / whole.name / 'fold0')
    assert ended(start(train_student, students[0], whole.name)) == [0]
    kill_again_and_again(4, *students, train_student, whole.name)


def train_student(cfg: Config, teacher: str, resume: bool = False) -> None:
    labelling = pseudo.Labelling([teacher], 'half')
    pseudo.main(cfg.model_copy(update={'name': teacher}), 0, labelling, resume=resume)


def train_dying(cfg: Config, where: tuple[str, str], nth: int, seconds: float) -> None:
    """A run that is killed so many seconds after it calls a function for the nth time."""
    module = importlib.import_module(where[0])
    real, calls = getattr(module, where[1]), count(1)

    def call(*args, **kwargs):
        if next(calls) == nth:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return real(*args, **kwargs)

    setattr(module, where[1], call)
    train.main(cfg, 0, resume=True)


@pytest.mark.parametrize(
    'where', [('engine.checkpoint', 'save_checkpoint'), ('engine.inference', 'check_seen')]
)
def test_killed_while_it_writes_or_validates(whole, other, where):
    rng = np.random.default_rng(0)
    for _ in range(4):
        assert ended(start(train_dying, other, where, rng.integers(1, 4), rng.uniform(0, 0.05))) in (
            [-9],
            [0],
        )
        last = other.run_dir(0) / 'last.pt'
        assert not last.exists() or load_checkpoint(last)['config']['name'] == other.name
    train.main(other, 0, resume=True)
    assert not list(other.run_dir(0).glob('.*.partial'))
    compare(whole, other)


@pytest.mark.parametrize('number', SIGNALS)
def test_asked_to_stop(whole, other, number, capsys):
    """The step in hand ends, the checkpoint is written, and what was asked for is said."""
    other = other.model_copy(update={'checkpoint_minutes': 0})
    steps = []

    def update(self):
        real(self)
        steps.append(self.step)
        if len(steps) == 2:
            signal.raise_signal(number)

    real, Trainer.update = Trainer.update, update
    try:
        with pytest.raises(Interrupted, match=f'{number.name}: stopped after batch 4 of 4 in epoch 1'):
            train.main(other, 0)
    finally:
        Trainer.update = real
    assert steps == [1, 2] and load_checkpoint(other.run_dir(0) / 'last.pt')['resume']['batch'] == 4
    train.main(other, 0, resume=True)
    assert 'resumed after epoch 0, batch 4 of epoch 1, step 2' in capsys.readouterr().out
    compare(whole, other)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_group(whole, other, number, tmp_path):
    """Ctrl-C reaches the loader's workers too, which the step in hand still needs."""
    other = other.model_copy(update={'workers': 2, 'epochs': 50, 'swa': 0})
    path = tmp_path / 'run.yaml'
    path.write_text(dump_config(other))
    said = tmp_path / 'said.txt'
    processes = start(lead_group, '--cfg', str(path), '--fold', '0', said=said)
    while not (other.run_dir(0) / 'metrics.csv').exists():
        assert processes[0].is_alive(), said.read_text()
        time.sleep(0.05)
    os.killpg(processes[0].pid, number)
    assert ended(processes, 60) == [75], said.read_text()
    assert f'{number.name}: stopped after' in said.read_text()


def lead_group(*words: str) -> None:
    """train.py as it is typed, with a process group of its own."""
    os.setsid()
    typed(train.command, *words)


def test_second_signal_is_not_waited_for():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def command(cfg: Config, path: Path) -> None:
    """train.py as it is typed; of root's rights it keeps none over files that say no."""
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, rights)
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, rights)
    path.write_text(dump_config(cfg))
    typed(train.command, '--cfg', str(path), '--fold', '0')


@pytest.mark.parametrize('fault', ['full disk', 'file-size limit', 'no permission'])
def test_checkpoint_that_cannot_be_written(whole, other, tmp_path, request, fault):
    """In the middle of a run: one line, the old checkpoint is good, and the run goes on when it can."""
    disk = request.getfixturevalue('small_disk')(24) if fault == 'full disk' else tmp_path
    other, said = other.model_copy(update={'output_dir': disk / 'output'}), tmp_path / 'said.txt'
    folder = other.run_dir(0)
    processes = start(command, other, tmp_path / 'run.yaml', said=said)
    while not (folder / 'last.pt').exists():
        assert processes[0].is_alive(), said.read_text()
        time.sleep(0.01)
    if fault == 'full disk':
        fill(disk / 'ballast')
    elif fault == 'file-size limit':
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    else:
        folder.chmod(0o555)
    why = {'full disk': 'No space left on device', 'file-size limit': 'File too large'}
    assert ended(processes, 60) == [75 if fault in why else 2], said.read_text()
    last = [line for line in said.read_text().splitlines() if line.startswith('script: ')]
    assert len(last) == 1 and 'Traceback' not in said.read_text(), said.read_text()
    assert f'cannot be written: {why.get(fault, "Permission denied")}' in last[0]
    load_checkpoint(folder / 'last.pt')
    assert not list(folder.glob('.*.partial'))
    folder.chmod(0o755)
    (disk / 'ballast').unlink(missing_ok=True)
    train.main(other, 0, resume=True)
    compare(whole, other)


def fill(path: Path) -> None:
    """A file that leaves no room beside it."""
    with path.open('wb', buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return


def test_checkpoint_of_more_ranks_goes_on_with_fewer(whole, other, capsys):
    path = shutil.copytree(whole.run_dir(0), other.run_dir(0)) / 'last.pt'
    checkpoint = load_checkpoint(path)
    state = checkpoint['resume']
    for key in ('cpu_rng', 'totals'):
        state[key] = state[key].repeat(2, *[1] * (state[key].ndim - 1))
    save_checkpoint(path, checkpoint)
    train.main(other, 0, resume=True)
    assert 'of 2 ranks, now 1: the run goes on, but not to the bit' in capsys.readouterr().out


def test_checkpoint_of_an_older_version(whole, other):
    path = shutil.copytree(whole.run_dir(0), other.run_dir(0)) / 'last.pt'
    checkpoint = load_checkpoint(path)
    del checkpoint['resume']['batch']
    save_checkpoint(path, checkpoint)
    with pytest.raises(BadInput, match='cannot be resumed from'):
        train.main(other, 0, resume=True)


def compare(cfg: Config, other: Config) -> None:
    """The files are the same to the bit, but for the place of the runs in their configs."""
    for name in ('last.pt', 'best.pt'):
        one, two = (load_checkpoint(c.run_dir(0) / name) for c in (cfg, other))
        for key in ('output_dir', 'checkpoint_minutes', 'workers'):
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


@pytest.mark.parametrize(('key', 'value'), [('orientation', 'stored'), ('intensity', (0, 9))])
def test_a_run_does_not_predict_from_other_pixels(key, value, tmp_path):
    trained = Config(data_root=tmp_path, competition=Competition(intensity=(0, 4095)))
    competition = trained.competition.model_copy(update={key: value})
    changed = trained.model_copy(update={'competition': competition})
    with pytest.raises(BadInput, match=f'was trained with {key} .*, but .*competition.yaml says .*; take'):
        refuse_other_pixels(Path('best.pt'), trained, changed)
    refuse_other_pixels(Path('best.pt'), trained, changed.model_copy(update={'data_root': tmp_path / 'b'}))


def train_with_nan(rank: int, *words: str) -> None:
    """train.py as it is typed, whose second loss is NaN on one rank."""
    real, calls = Trainer.compute_loss, count(1)

    def compute_loss(self, *args):
        spoilt = next(calls) == 2 and self.ranks.rank == rank
        return real(self, *args) * (math.nan if spoilt else 1)

    Trainer.compute_loss = compute_loss
    typed(train.command, *words)


def test_all_ranks_end_for_a_loss_that_is_nan_on_one(tiny_yaml, tmp_path):
    """Each in one line; no rank waits for another."""
    said = tmp_path / 'said.txt'
    words = ['--cfg', str(tiny_yaml), '--fold', '0', '--set', 'batch_size=4', 'epochs=2']
    processes = start(train_with_nan, 1, *words, ranks=2, said=said)
    statuses = ended(processes, 120)
    for process in processes:
        process.kill()
    text = said.read_text()
    assert statuses == [1, 1] and 'Traceback' not in text, text
    assert text.count('error: loss is nan in epoch 1, batch 2, on batch_01/') == 1
    assert text.count('error: stopped, for the loss of another rank is not finite') == 1


def train_with_files(most: int, *words: str) -> None:
    """train.py as it is typed, with so many more open files than it has."""
    most += len(os.listdir('/dev/fd'))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    typed(train.command, *words)


@pytest.mark.parametrize(('most', 'workers'), [(30, 2), (2, 0)])
def test_too_few_open_files_end_in_one_line(tiny_yaml, tmp_path, most, workers):
    said = tmp_path / 'said.txt'
    words = ['--cfg', str(tiny_yaml), '--fold', '0', '--set', f'workers={workers}']
    processes = start(train_with_files, most, *words, said=said)
    statuses = ended(processes, 120)
    for process in processes:
        process.kill()
    text = said.read_text()
    assert statuses == [2] and 'Traceback' not in text and text.count('error: ') == 1, text
    assert workers == 0 or ('ulimit -n' in text and 'workers=0' in text)
    assert 'open files' in text
