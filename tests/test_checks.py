"""Nothing goes wrong without a word: first batches, classes that vanish, photos that change, full disks."""

import logging
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml

import train
from checks import check_classes, check_epoch, check_first_batch, check_labels
from config import BadInput, CheckFailed
from dataset import TrainingSet, open_cache
from metrics import IGNORED
from models import SegModel
from utils import load_checkpoint, log


@pytest.fixture
def said(monkeypatch):
    """The warnings that are logged."""
    lines = []
    monkeypatch.setattr(log, 'warning', lines.append)
    return lines


def test_first_batch_that_is_right(tiny, said):
    model = SegModel(tiny, load_weights=False).train()
    samples = TrainingSet(tiny, open_cache(tiny, 'train'), np.arange(8), (0, 0, 0))
    before = torch.get_rng_state()
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    check_first_batch(model, samples, tiny, torch.device('cpu'), range(8))
    assert said == [] and model.training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, buffers[key]) for key, value in model.state_dict().items())


def test_labels_out_of_range():
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 0, 0] = 11
    with pytest.raises(CheckFailed, match=r'found the labels \[11\], expected 0 to 10, or 255'):
        check_labels(masks, 11)


def test_ignored_pixels(said):
    masks = np.full((2, 8, 8), IGNORED, np.uint8)
    with pytest.raises(CheckFailed, match='every pixel is ignored'):
        check_labels(masks, 11)
    masks[0, 0] = 3
    check_labels(masks, 11)
    assert said == ['warning: 94% of the pixels of the first batch are ignored']


def test_head_that_does_not_look_at_the_photo(tiny):
    model = SegModel(tiny, load_weights=False)
    for parameter in model.head.parameters():
        parameter.data.zero_()
    samples = TrainingSet(tiny, open_cache(tiny, 'train'), np.arange(8), (0, 0, 0))
    with pytest.raises(CheckFailed, match='does not change with the photo'):
        check_first_batch(model, samples, tiny, torch.device('cpu'), range(8))
    for parameter in model.head.parameters():
        parameter.data.fill_(float('nan'))
    with pytest.raises(CheckFailed, match='not finite'):
        check_first_batch(model, samples, tiny, torch.device('cpu'), range(8))


def test_classes_that_are_absent_or_vanish(tiny, said):
    check_classes([{1, 2, 3}, {4, 5, 6, 7, 8}], tiny)
    assert said.pop() == 'warning: no training photo has Battery, Clothing'
    counts = np.zeros((2, 3, 11), np.int64)
    counts[:, 1:, :4] = 1000
    after = counts.copy()
    after[:, 1, 3] = 0
    check_epoch(after, counts, tiny)
    assert said.pop() == 'warning: predicted an epoch ago, and no more: Paper pack (2,000 pixels)'
    check_epoch(after, after, tiny)
    assert said == []
    after[0, 2] = 0
    with pytest.raises(CheckFailed, match='not as many'):
        check_epoch(after, counts, tiny)


def test_photo_that_changed_since_it_was_cached(tiny, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(tiny.data_root, data)
    cfg = tiny.model_copy(update={'data_root': data, 'cache_dir': tmp_path / 'cache'})
    open_cache(cfg, 'train')
    open_cache(cfg, 'train')
    photo = sorted((data / 'batch_01').iterdir())[0]
    photo.write_bytes(photo.read_bytes() + b'\0')
    with pytest.raises(
        BadInput, match=r'0000.jpg: is not the photo that was cached \([\d,]+ bytes, now [\d,]+\); remove'
    ):
        open_cache(cfg, 'train')


def test_run_says_what_made_it(tiny):
    train.main(tiny, 0)
    train.main(tiny, 0, resume=True)
    entries = yaml.safe_load((tiny.run_dir(0) / 'provenance.yaml').read_text())
    assert len(entries) == 2
    assert {'started', 'command', 'commit', 'changed', 'data', 'hardware', 'versions'} <= entries[0].keys()
    assert entries[0]['versions']['torch'] in torch.__version__
    assert entries[0]['changed'] == (tiny.run_dir(0) / 'changes.diff').exists()


def test_disk_that_is_full_at_a_checkpoint(tiny, caplog):
    """The old checkpoint stays good, one line says what happened, and the run goes on when there is room."""
    train.main(tiny, 0)
    before = (tiny.run_dir(0) / 'last.pt').read_bytes()
    longer = tiny.model_copy(update={'name': 'full', 'epochs': 2})
    shutil.copytree(tiny.run_dir(0), longer.run_dir(0))
    for name in ('config.yaml', 'metrics.csv'):
        (longer.run_dir(0) / name).unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(BadInput, match=r'last.pt: cannot be written: File too large|best.pt: cannot be'):
            train.main(longer, 0, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (longer.run_dir(0) / 'last.pt').read_bytes() == before
    assert not list(longer.run_dir(0).glob('.*.partial'))
    train.main(longer, 0, resume=True)
    assert load_checkpoint(longer.run_dir(0) / 'last.pt')['epoch'] == 1
    logging.getLogger('trash').handlers.clear()
