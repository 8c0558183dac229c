"""The steps of a training: what they copy, when losses are read, overflows of fp16, writing in a thread."""

import math
import re
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from operations import Operations
from test_resume import same

import engine.checkpoint
import train
from config import Config
from data.cache import open_cache
from dataset import unpack_masks
from engine.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint, to_cpu
from engine.distributed import Ranks, start_ranks
from engine.dry_run import estimate_cost
from engine.optim import build_optimizer
from engine.trainer import MIN_SCALE, Trainer, TrainingData
from models import SegModel
from utils.errors import BadInput, CheckFailed, Interrupted


def make_trainer(cfg: Config) -> Trainer:
    data = TrainingData(0, open_cache(cfg, 'train'), np.arange(12), np.arange(0), None)
    torch.manual_seed(0)
    return Trainer(cfg, SegModel(cfg), Ranks.alone(), data, cfg.run_dir(0))


def train_on(trainer: Trainer, scores: tuple[float, ...] = (math.nan,) * 9) -> list[float]:
    """Train to the end, with these scores in place of validations; return the loss of each epoch."""
    losses = []
    with trainer.bar() as bar, trainer.writer:
        for epoch in range(trainer.epoch, trainer.cfg.epochs):
            losses.append(trainer.train_epoch(epoch, bar))
            trainer.end_epoch(scores[epoch])
    return losses


def resumed(cfg: Config) -> Trainer:
    trainer = make_trainer(cfg)
    trainer.resume(cfg.run_dir(0) / 'last.pt')
    return trainer


def compare(cfg: Config, other: Config) -> None:
    """Compare the checkpoints of two runs, to the bit."""
    for name in ('last.pt', 'best.pt'):
        one, two = (load_checkpoint(c.run_dir(0) / name) for c in (cfg, other))
        same(one | {'config': {}}, two | {'config': {}}, name)


@pytest.mark.parametrize('amp', ['off', 'fp16'])
def test_a_step_waits_for_nothing(tiny, amp):
    """On a GPU, the host would launch the operations of a step without waiting for any."""
    trainer = make_trainer(tiny.model_copy(update={'amp': amp, 'clip_norm': 1.0, 'ema': 0.9}))
    trainer.start_epoch(0)
    trainer.loader = [*trainer.loader]
    with Operations() as step:
        for _ in trainer.steps(0):
            pass
    assert len(trainer.unread) == 3 and any(name.startswith('_fused_adamw_') for name in step.names)
    assert not step.waiting
    with Operations() as reading:
        trainer.read_losses()
    assert reading.names.count('stack') == 1  # one copy of all losses; tolist is not recorded on the CPU
    assert len(reading.waiting) == (amp == 'fp16') and not trainer.unread  # the scale


def test_planes_are_unpacked_without_a_copy():
    with Operations() as operations:
        planes = unpack_masks(torch.tensor([[[[1, 3]]]], dtype=torch.uint8), 3)
    assert planes.flatten().tolist() == [1, 0, 255]
    assert 'scalar_tensor' not in operations.names


def elsewhere(cfg: Config) -> Config:
    return cfg.model_copy(update={'output_dir': cfg.output_dir / 'other'})


def test_losses_that_are_read_seldom_are_the_same(tiny):
    """A GPU's losses are read after several batches."""
    cfg = tiny.model_copy(update={'epochs': 2, 'accumulate': 2})
    losses = train_on(make_trainer(cfg))
    trainer = make_trainer(elsewhere(cfg))
    trainer.read_every = 2  # of 3 batches an epoch
    assert train_on(trainer) == losses
    compare(cfg, elsewhere(cfg))


def test_a_loss_that_is_read_late_is_named_as_at_once(tiny):
    """The run ends before the spoiled model is in a checkpoint."""
    messages = []
    for read_every in (1, 3):
        trainer = make_trainer(tiny.model_copy(update={'lr': 1e30, 'checkpoint_minutes': 0}))
        trainer.read_every = read_every
        with pytest.raises(CheckFailed) as stop:
            train_on(trainer)
        messages.append(str(stop.value))
    assert messages[0] == messages[1] and ' in epoch 1, batch 2, on batch_01/' in messages[0]
    assert not (tiny.run_dir(0) / 'last.pt').exists()


def test_a_stop_is_not_put_off(tiny):
    trainer = make_trainer(tiny)
    trainer.read_every, trainer.stop.caught = 100, signal.SIGTERM
    with pytest.raises(Interrupted, match='SIGTERM: stopped after batch 1 of 3'):
        train_on(trainer)
    assert load_checkpoint(tiny.run_dir(0) / 'last.pt')['resume']['totals'] > 0


def overflowing(trainer: Trainer, batches: set[int]) -> Trainer:
    """Let some batches overflow in fp16."""
    real, calls = trainer.prepare, iter(range(10**6))
    trainer.prepare = lambda images: real(images) * (1e6 if next(calls) in batches else 1)
    return trainer


def fp16(tiny: Config, **more) -> Config:
    small = {
        'encoder': 'test_resnet.r160_in1k',
        'amp': 'fp16',
        'optimizer': 'sgd',
        'batch_size': 2,
        'crop_size': 32,
    }
    return tiny.model_copy(update=small | more)


def test_an_overflow_is_skipped(tiny, caplog):
    """It changes neither weights nor BatchNorm's statistics, and its photos are named."""
    trainer = overflowing(make_trainer(fp16(tiny)), {0, 3})
    states, scales = [], []
    for _ in trainer.steps(0):
        trainer.read_losses()
        states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        scales.append(trainer.scaler.get_scale())
    assert all(value.isfinite().all() for state in states for value in state.values())
    norm = next(key for key in states[0] if key.endswith('running_var'))
    for key, value in states[3].items():
        assert key not in dict(trainer.model.named_parameters()) or torch.equal(value, states[2][key]), key
    assert not torch.equal(states[4][norm], states[2][norm])
    assert [low / high for high, low in zip([2**16, *scales], scales)] == [0.5, 1, 1, 0.5, 1, 1]
    assert math.isfinite(trainer.total)
    lines = [record.message for record in caplog.records if 'its step is skipped' in record.message]
    assert len(lines) == 2 and 'in epoch 1, batch 4, on batch_01/' in lines[1]


def test_a_loss_that_stays_too_large_ends_the_run(tiny):
    trainer = overflowing(make_trainer(fp16(tiny)), {*range(1, 100)})
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=MIN_SCALE * 5)
    with pytest.raises(CheckFailed, match='not finite in fp16 even of 6e-05 times the loss'):
        train_on(trainer)
    assert trainer.step == 1 + 3 and not (tiny.run_dir(0) / 'last.pt').exists()


def test_the_scale_is_resumed(tiny):
    cfg = fp16(tiny)
    train_on(overflowing(make_trainer(cfg), {1}))
    trainer = overflowing(make_trainer(elsewhere(cfg)), {1})
    real = trainer.update

    def update():
        real()
        if trainer.step == 3:
            trainer.stop.caught = signal.SIGTERM

    trainer.update = update
    with pytest.raises(Interrupted, match='stopped after batch 3 of 6'):
        train_on(trainer)
    again = resumed(elsewhere(cfg))
    assert again.scaler.get_scale() == 2**15
    train_on(again)
    compare(cfg, elsewhere(cfg))


def test_momentum_of_a_first_step_that_is_skipped(tiny):
    """torch's fused SGD leaves it uninitialised."""
    model = SegModel(tiny)
    optimizer = build_optimizer(model, tiny.model_copy(update={'optimizer': 'sgd'}))
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(sum(parameter.sum() for parameter in model.parameters()) * math.inf).backward()
    scaler.step(optimizer)
    assert all(not state['momentum_buffer'].any() for state in optimizer.state.values())


def test_a_checkpoint_is_a_copy_that_is_written_meanwhile(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(
        engine.checkpoint, 'save_checkpoint', lambda *args: gate.wait(10) and save_checkpoint(*args)
    )
    weights = {'model': {'weight': torch.ones(3)}, 'resume': {'groups': [{'betas': (0.9, 0.99)}]}}
    with CheckpointWriter() as writer:
        writer.save(tmp_path / 'a.pt', weights)
        weights['model']['weight'].zero_()
        writer.check()
        writer.save(tmp_path / 'b.pt', weights)
        assert not (tmp_path / 'a.pt').exists()
        threading.Timer(0.05, gate.set).start()
        writer.save(tmp_path / 'b.pt', weights)  # waits for the first b.pt
        assert (tmp_path / 'a.pt').exists()
    a, b = (torch.load(tmp_path / name) for name in ('a.pt', 'b.pt'))
    assert a['model']['weight'].all() and not b['model']['weight'].any()
    assert a['resume'] == b['resume'] == weights['resume']


def test_no_checkpoint_after_one_that_cannot_be_written(tmp_path):
    """last.pt would name a best.pt that is not there."""
    (tmp_path / 'best.pt').mkdir()
    with pytest.raises(BadInput, match=r'best.pt: cannot be written'), CheckpointWriter() as writer:
        writer.save(tmp_path / 'best.pt', {})
        writer.save(tmp_path / 'last.pt', {})
    assert not (tmp_path / 'last.pt').exists()
    with pytest.raises(BadInput, match=r'best.pt: cannot be written'):
        writer.check()


@pytest.mark.parametrize(('minutes', 'count'), [(10, 1), (0, 2), (1e-9, 8)])
def test_how_often_last_pt_is_written(tiny, monkeypatch, minutes, count):
    """By the clock, or after each epoch; and at the end."""
    written = []
    monkeypatch.setattr(engine.checkpoint, 'save_checkpoint', lambda path, _: written.append(path.name))
    train_on(make_trainer(tiny.model_copy(update={'epochs': 2, 'checkpoint_minutes': minutes})))
    assert written.count('last.pt') == count and written[-1] == 'last.pt'


def test_last_pt_may_be_older_than_best_pt(tiny, monkeypatch):
    """After a kill, best.pt may be of an epoch that last.pt does not have: it is made again, or kept if no
    later one is better.
    """
    cfg, scores = tiny.model_copy(update={'epochs': 3, 'checkpoint_minutes': 0}), (0.1, 0.3, 0.2)
    other = elsewhere(cfg)
    last, best = (other.run_dir(0) / name for name in ('last.pt', 'best.pt'))
    train_on(make_trainer(cfg), scores)

    def save(path, content):
        if path != last or not last.exists():
            save_checkpoint(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint, 'save_checkpoint', save)
        train_on(make_trainer(other), scores)
    older = last.read_bytes()
    assert load_checkpoint(last)['epoch'] == 0 and load_checkpoint(best)['epoch'] == 1
    train_on(resumed(other), scores)
    compare(cfg, other)
    last.write_bytes(older)
    trainer = resumed(other)
    train_on(trainer, (0.1, 0.2, 0.2))
    assert trainer.best == load_checkpoint(best)['score'] == 0.3


class OtherSees(Ranks):
    """Rank 0 beside one whose answers are the opposite."""

    def any_rank(self, *flags):
        return [True] * len(flags)


def test_a_checkpoint_that_one_rank_alone_sees(tiny):
    ranks = OtherSees(0, 2, torch.device('cpu'))
    with pytest.raises(BadInput, match='last.pt: not every rank sees it; expected an output_dir that all'):
        train.has_checkpoint(tiny, 0, ranks)


def test_two_ranks_share_a_gpu_over_gloo_alone(tiny, monkeypatch):
    joined = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 1)
    monkeypatch.setattr('atexit.register', lambda _: None)
    for name, value in (('WORLD_SIZE', '2'), ('LOCAL_RANK', '1')):
        monkeypatch.setenv(name, value)
    cfg = tiny.model_copy(update={'device': 'auto'})
    with pytest.raises(BadInput, match='or RANKS_BACKEND=gloo in the environment; torch sees 1 here'):
        start_ranks(cfg)
    monkeypatch.setenv('RANKS_BACKEND', 'gloo')
    ranks = start_ranks(cfg)
    assert (ranks.rank, ranks.device, joined) == (1, torch.device('cuda', 0), ['gloo'])
    assert ranks.sync_bn(cfg)
    monkeypatch.setenv('RANKS_BACKEND', 'mpi')
    with pytest.raises(BadInput, match="RANKS_BACKEND: found 'mpi', expected nccl or gloo on a cuda"):
        start_ranks(cfg)


def stopping(trainer: Trainer, step: int) -> Trainer:
    """Let the training be asked to stop after so many steps."""
    real = trainer.update

    def update():
        real()
        if trainer.step == step:
            trainer.stop.caught = signal.SIGTERM

    trainer.update = update
    return trainer


FROZEN = {'encoder': 'test_resnet.r160_in1k', 'drop_path': 0.5, 'epochs': 3, 'freeze_encoder': 2}


def test_the_encoder_is_frozen_in_the_first_epochs(tiny):
    """Its weights and its statistics of BatchNorm; the head's own change in each epoch."""
    trainer = make_trainer(tiny.model_copy(update=FROZEN | {'weight_decay': 0.5, 'ema': 0.5}))
    states = [to_cpu(trainer.model.state_dict())]
    with trainer.bar() as bar:
        for epoch in range(3):
            trainer.train_epoch(epoch, bar)
            states.append(to_cpu(trainer.model.state_dict()))
    of_encoder = [key for key in states[0] if key.startswith('encoder.')]
    norms = {key for key in states[0] if key.endswith('running_mean')}
    assert norms & {*of_encoder} and norms - {*of_encoder}
    for key in states[0]:
        changed = [not torch.equal(one[key], two[key]) for one, two in pairwise(states)]
        assert changed == ([False, False, True] if key in of_encoder else [True] * 3), key


def test_frozen_stages_never_change(tiny):
    """Nor do their statistics of BatchNorm, in training and where SWA computes those anew; others' do."""
    keys = {'encoder': 'test_resnet.r160_in1k', 'frozen_stages': 2, 'weight_decay': 0.5, 'ema': 0.5, 'swa': 1}
    frozen = {'probe': 1.0, 'epochs': 2}
    trainer = make_trainer(tiny.model_copy(update=keys | frozen))
    before = to_cpu(trainer.model.state_dict())
    train_on(trainer)
    kept = re.compile(r'probe\.|encoder\.model\.(conv1|bn1|layer[12]\.)')
    for model in (trainer.model, trainer.averaged, trainer.finish_swa()):
        state = model.state_dict()
        changed = {key for key in before if not torch.equal(before[key], state[key])}
        assert changed == {key for key in before if not kept.match(key)}


def test_a_frozen_encoder_is_resumed(tiny):
    """Within the epochs in which it is frozen, and after them."""
    cfg = tiny.model_copy(update=FROZEN | {'name': 'whole', 'ema': 0.9})
    train_on(make_trainer(cfg))
    for step in (2, 7):
        other = cfg.model_copy(update={'name': f'stopped{step}'})
        with pytest.raises(Interrupted):
            train_on(stopping(make_trainer(other), step))
        train_on(resumed(other))
        compare(cfg, other)


def test_a_dry_run_steps_with_the_whole_model(tiny):
    trainer = make_trainer(tiny.model_copy(update=FROZEN))
    estimate_cost(trainer)
    assert trainer.step > 0 and not trainer.is_frozen
