"""The linear probe of an encoder: its optimum, the photos and views it is fitted to, and what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from config import Competition
from data.cache import open_cache
from engine import probe
from engine.checkpoint import load_checkpoint
from engine.probe import PENALTY, class_shares, fit_linear, fit_probe, read_features
from models import SegModel
from utils.errors import CheckFailed

PROBED = {'encoder': 'test_resnet.r160_in1k', 'probe': 1.0}


@pytest.mark.parametrize('overlapping', [False, True])
def test_a_fit_is_where_the_penalised_loss_has_no_slope(overlapping):
    """Of standardised features; one that never changes has no weight."""
    torch.manual_seed(0)
    features = torch.randn(60, 5, dtype=torch.float64) * torch.tensor([1, 20, 0.1, 3, 0]) + 7
    targets = torch.rand(60, 3, dtype=torch.float64)
    targets = (targets > 0.5).double() if overlapping else targets / targets.sum(1, keepdim=True)
    weight, bias = fit_linear(features, targets, overlapping)
    assert not weight[:, 4].any()
    deviation = features.std(0, correction=0).clamp(min=1e-9)
    inputs = (features - features.mean(0)) / deviation
    own = (weight * deviation).requires_grad_()
    offset = (bias + weight @ features.mean(0)).requires_grad_()
    scores = inputs @ own.T + offset
    if overlapping:
        fit = -(targets * F.logsigmoid(scores) + (1 - targets) * F.logsigmoid(-scores)).sum(1).mean()
    else:
        fit = -(targets * scores.log_softmax(1)).sum(1).mean()
    (fit + PENALTY * (own**2).sum()).backward()
    assert own.grad.abs().max() < 1e-4 and offset.grad.abs().max() < 1e-4 and own.abs().max() > 0.1


def test_a_probe_says_what_the_photos_show(tiny, monkeypatch):
    """Of the photos with objects alone, as they are and mirrored; photos that it was fitted to, it knows."""
    cfg = tiny.model_copy(update=PROBED | {'infer_batch_size': 5})
    cache, rows = open_cache(cfg, 'train'), np.arange(16)
    shares = np.stack([class_shares(cache, row, cfg) for row in rows])
    assert np.allclose(shares.sum(1), 1) and shares.shape == (16, 10)
    model = SegModel(cfg)
    assert fit_probe(model, cache, rows, cfg) == 16
    features = read_features(model, cache, rows, cfg)
    assert features.shape[:2] == (2, 16)
    monkeypatch.setattr(probe, 'group_by_shape', lambda shapes, size: [[7, 0, 3], [2, 1], [6, 5, 4]])
    mixed = read_features(model.train(), cache, rows[:8], cfg)  # of several shapes, say
    assert torch.allclose(mixed, features[:, :8], rtol=1e-4)
    monkeypatch.undo()
    one = read_features(model, cache, rows[7:8], cfg)
    assert torch.allclose(features[:, 7], one[:, 0], rtol=1e-4) and not torch.allclose(*features)
    scores = model.probe.linear(features[0].float())[:, 1:]
    assert (scores.argmax(1).numpy() == shares.argmax(1)).mean() > 0.9
    assert not model.probe.linear.weight[0].any()  # of Background


@pytest.mark.parametrize(
    ('fixed', 'keys', 'side'),
    [(None, {}, 64), (32, {}, 32), (None, {'window': 32}, 32), (None, {'image_size': 90}, 96)],
)
def test_photos_are_as_large_as_the_encoder_sees_them(fixed, keys, side, tiny):
    cfg = tiny.model_copy(update=PROBED | keys)
    model, seen = SegModel(cfg), []
    model.fixed_size = fixed
    model.probe.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    read_features(model, open_cache(cfg, 'train'), np.arange(2), cfg)
    assert {*map(tuple, seen)} == {(side, side)}


def test_nothing_is_fitted_without_objects(tiny):
    cfg, model = tiny.model_copy(update=PROBED), SegModel(tiny.model_copy(update=PROBED))
    cache = open_cache(cfg, 'train')
    cache = replace(cache, masks=[np.zeros_like(cache.masks[row]) for row in range(3)])
    assert fit_probe(model, cache, np.arange(3), cfg) == 0 and not model.probe.linear.bias.any()


def test_classes_that_may_overlap_are_there_or_not(tiny):
    competition = Competition(task='multilabel', classes=tuple('abcdefghijk'), score_size='own')
    cfg, cache = tiny.model_copy(update={'competition': competition}), open_cache(tiny, 'train')
    shown = class_shares(cache, 0, cfg)
    assert shown.shape == (11,) and {*np.flatnonzero(shown)} == {*cache.coco.photos[0].classes}


def test_a_training_fits_it_once(tiny, monkeypatch):
    cfg = tiny.model_copy(update=PROBED | {'ema': 0.5})
    calls, fit = [], train.fit_probe
    monkeypatch.setattr(train, 'fit_probe', lambda *args: calls.append(1) or fit(*args))
    train.main(cfg, 0)
    state = load_checkpoint(cfg.run_dir(0) / 'best.pt')['model']
    assert state['probe.linear.weight'].any()
    train.main(cfg, 0, resume=True)
    assert calls == [1]


def test_features_that_are_not_finite_end_the_run_by_name(tiny):
    cfg = tiny.model_copy(update=PROBED)
    model = SegModel(cfg)
    with torch.no_grad():
        next(model.probe.encoder.parameters()).fill_(torch.inf)
    with pytest.raises(CheckFailed, match='batch_01/0000.jpg.*not finite; set amp=bf16'):
        fit_probe(model, open_cache(cfg, 'train'), np.arange(2), cfg)
