"""python -m tools.bench: rounds in turn, one model at a time, and the tables that it writes into pages."""

import time
import weakref
from argparse import Namespace

import pytest
import torch

from engine.trainer import Trainer
from models import SegModel
from tools.bench import __main__ as bench
from tools.bench import steps
from tools.bench.fixtures import ROOT, Way
from utils.errors import BadInput


def test_ways_take_turns(capsys):
    calls = []

    def slow() -> None:
        calls.append('slow')
        time.sleep(0.02)

    def model() -> float:
        calls.append('model')
        return 0.5

    ways = {'ours': Way(slow, share=2), 'theirs': Way(target=4, measure=model, at_peak=0.1)}
    ours, theirs = bench.measure('work', ways, 3, time.perf_counter)
    assert calls == ['slow', *['slow', 'model'] * 3]  # the first call warms up
    assert 0.01 <= ours['seconds'] < 0.05 and ours['spread'] >= 1 and ours['ratio'] == 1
    assert theirs['ratio'] == 0.5 / ours['seconds'] and theirs['use'] == 0.2
    table = bench.markdown_table([ours, theirs])
    assert table[2].startswith('| work | ours | 0.0') and table[2].endswith('| 1 |  |')
    assert table[3].startswith('|  | theirs, 20% of the FLOP peak | 0.5 | 1.00 | **') and '| 4 |' in table[3]


def test_pages_have_a_table_to_replace(tmp_path):
    for name in ('benchmarks', 'scaling'):
        before, after = bench.split_page(ROOT / 'docs' / f'{name}.md')
        assert before.startswith('# ') and '|' in after
    page = tmp_path / 'page.md'
    page.write_text('no table')
    with pytest.raises(BadInput, match='found no lines'):
        bench.split_page(page)
    for words in (['csv', '--markdown', str(ROOT / 'docs' / 'benchmarks.md')], ['hours', '--json', 'out']):
        with pytest.raises(SystemExit):
            bench.read_arguments(words)


def test_training_steps_are_the_trainers_beside_the_same_samples(tiny, monkeypatch):
    """Both start from the same weights, on the same batches; no model outlives its measurement."""
    monkeypatch.setattr(steps, 'STEPS', 2)
    monkeypatch.setattr(steps, 'WARMUP', 1)
    monkeypatch.setattr(steps, 'SIDES', {'cpu': 256})
    cfg = tiny.model_copy(update={'ema': 0.9, 'clip_norm': 1.0, 'channels_last': False})
    monkeypatch.setattr(steps, 'demo_config', lambda args, default: cfg)
    losses, updates, loss_of = [], [], steps.segmentation_loss

    def note(*args, **options):
        losses.append(loss_of(*args, **options))
        return losses[-1]

    monkeypatch.setattr(steps, 'segmentation_loss', note)
    monkeypatch.setattr('engine.trainer.segmentation_loss', note)
    update = Trainer.update
    monkeypatch.setattr(Trainer, 'update', lambda self: updates.append(self.ema is not None) or update(self))
    models, build = [], steps.new_model

    def remember(*args) -> SegModel:
        model = build(*args)
        assert all(reference() is None for reference in models)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(steps, 'new_model', remember)
    args = Namespace(device='cpu', clock='wall', now=time.perf_counter)
    ((_, ways),) = steps.bench_train(args)
    for way in ways.values():
        assert way.measure() > 0
    assert len(models) == 2 and updates == [True] * 3 and len(losses) == 6
    ours, theirs = (torch.stack(part).tolist() for part in (losses[:3], losses[3:]))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(set(ours)) == 3
    assert ways['ours'].at_peak > 0
