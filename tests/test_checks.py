"""Checks that stop or warn: first batches, classes that vanish, photos that change, cut-off caches."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml

import train
from config import HOME
from data.cache import open_cache
from dataset import TrainingSet
from engine import provenance
from engine.distributed import Ranks
from engine.inference import evaluate
from engine.sanity import check_classes, check_counts, check_first_batch, check_labels, describe_labels
from engine.writer import Predictions
from metrics import IGNORED
from models import SegModel
from submission import mask_format
from utils.errors import BadInput, CheckFailed
from utils.log import log
from voting.origin import Origin


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that are logged."""
    lines = []
    monkeypatch.setattr(log, 'warning', lines.append)
    return lines


def test_first_batch_that_is_right(tiny, warnings):
    model = SegModel(tiny, load_weights=False).train()
    samples = TrainingSet(tiny, open_cache(tiny, 'train'), np.arange(8), (0, 0, 0))
    before = torch.get_rng_state()
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    check_first_batch(model, samples, tiny, torch.device('cpu'), range(8))
    assert warnings == [] and model.training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, buffers[key]) for key, value in model.state_dict().items())


def test_labels_out_of_range():
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 0, 0] = 11
    with pytest.raises(CheckFailed, match=r'found the labels \[11\], expected 0 to 10, or 255'):
        check_labels(masks, 11)


def test_ignored_pixels(warnings):
    masks = np.full((2, 8, 8), IGNORED, np.uint8)
    with pytest.raises(CheckFailed, match='every pixel is ignored'):
        check_labels(masks, 11)
    masks[0, 0] = 3
    check_labels(masks, 11)
    assert warnings == ['warning: 94% of the pixels of the first batch are ignored']


def test_what_the_first_batch_shows(tiny, warnings):
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, :2], masks[0, 2:4] = 6, IGNORED
    assert describe_labels(masks, tiny) == '12.5% ignored; Background 85.7%, Plastic 14.3%'
    assert warnings == []
    describe_labels(np.zeros((2, 8, 8), np.uint8), tiny)
    assert warnings == ['warning: the first 2 samples show only Background']


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


def test_classes_that_are_absent_or_vanish(tiny, warnings):
    check_classes([{1, 2, 3}, {4, 5, 6, 7, 8}], tiny)
    assert warnings.pop() == 'warning: no training photo has Battery, Clothing'
    counts = np.zeros((2, 3, 11), np.int64)
    counts[:, 1:, :4] = 1000
    after = counts.copy()
    after[:, 1, 3] = 0
    check_counts(after, counts, tiny)
    assert warnings.pop() == 'warning: classes that are no longer predicted: Paper pack (2,000 pixels)'
    check_counts(after, after, tiny)
    assert warnings == []
    after[0, 2] = 0
    with pytest.raises(CheckFailed, match='more or fewer labelled pixels'):
        check_counts(after, counts, tiny)


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


def test_photo_of_the_same_size_that_changed(tiny, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(tiny.data_root, data)
    cfg = tiny.model_copy(update={'data_root': data, 'cache_dir': tmp_path / 'cache'})
    open_cache(cfg, 'train')
    photo = sorted((data / 'batch_01').iterdir())[0]
    os.utime(photo, (1, 1))
    open_cache(cfg, 'train')  # copied, say: the same content at another time
    content = bytearray(photo.read_bytes())
    content[-10] ^= 1
    photo.write_bytes(content)
    with pytest.raises(BadInput, match=r'0000.jpg: is not the photo that was cached'):
        open_cache(cfg, 'train')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('train-*/00000/photos.npy', 'is damaged .*not an array, or cut off.*remove it to make it again'),
        ('train-*/00000/masks.npy', 'is damaged'),
        ('train-*/00000/files.npy', 'is damaged'),
        ('train-*/meta.json', 'is damaged'),
        ('index-train-*/photos.npy', 'is damaged .*remove it to make it again'),
        ('index-train-*/meta.json', 'is damaged'),
    ],
)
def test_cache_that_is_cut_off(tiny, tmp_path, name, message):
    cfg = tiny.model_copy(update={'cache_dir': tmp_path / 'cache'})
    open_cache(cfg, 'train')
    path = next((tmp_path / 'cache').glob(name))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=message):
        open_cache(cfg, 'train')


class Deaf(Ranks):
    """One of two ranks, which never hears of the other."""

    def sum(self, values):
        return values

    def wait(self):
        pass


def test_score_of_fewer_photos_than_the_fold_has(tiny):
    model = SegModel(tiny, load_weights=False)
    cache = open_cache(tiny, 'train')
    assert evaluate(model, cache, np.arange(5), tiny, Ranks.alone()).shape == (5, 3, 11)
    with pytest.raises(CheckFailed, match='2 of 5 photos were not predicted, and 0 more than once'):
        evaluate(model, cache, np.arange(5), tiny, Deaf(0, 2, torch.device('cpu')))


def test_prediction_of_fewer_photos_leaves_no_csv(tiny, tmp_path):
    names, csv = ['a.jpg', 'b.jpg', 'c.jpg'], tmp_path / 'test.csv'
    with (
        pytest.raises(CheckFailed, match='1 of 3 photos were not predicted, and 1 more than once'),
        Predictions(csv, names, mask_format(HOME, {}), False, Ranks.alone(), Origin({}, {})) as predictions,
    ):
        for place in (0, 1, 1):
            predictions.write(place, np.zeros((256, 256), np.uint8), np.empty(0))
    assert not list(tmp_path.glob('*.csv'))


def test_learning_rate_that_does_not_move(tiny):
    cfg = tiny.model_copy(update={'epochs': 2, 'min_lr': tiny.lr})
    train.main(cfg, 0)
    text = 'warning: the learning rate did not change in epoch 2: 1.00e-04 in all'
    assert text in (cfg.run_dir(0) / 'log.txt').read_text()
    train.main(cfg.model_copy(update={'min_lr': 0.0, 'name': 'moves'}), 0)
    assert 'did not change' not in (cfg.output_dir / 'moves/fold0/log.txt').read_text()


def test_class_that_vanishes_in_a_run(tiny):
    """A rate at which a network forgets some of the classes."""
    cfg = tiny.model_copy(update={'epochs': 4, 'lr': 0.005})
    train.main(cfg, 0)
    assert 'warning: classes that are no longer predicted: ' in (cfg.run_dir(0) / 'log.txt').read_text()


def test_what_differs_when_a_run_goes_on(tiny, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(tiny.data_root, data)
    cfg = tiny.model_copy(update={'data_root': data, 'cache_dir': tmp_path / 'cache'})
    train.main(cfg, 0)
    path = cfg.run_dir(0) / 'provenance.yaml'
    path.write_text(path.read_text().replace(f'timm: {timm.__version__}', 'timm: 0.1'))
    train.main(cfg.model_copy(update={'infer_batch_size': 3}), 0, resume=True)
    text = (cfg.run_dir(0) / 'log.txt').read_text()
    assert 'warning: changed since the last start: infer_batch_size is 3, and was 16' in text
    assert f'warning: changed since the last start: timm is {timm.__version__}, and was 0.1' in text
    before = (cfg.run_dir(0) / 'last.pt').read_bytes()
    labels = json.loads((data / 'train_all.json').read_text())
    labels['annotations'][0]['category_id'] = 7
    (data / 'train_all.json').write_text(json.dumps(labels))
    whole = path.read_bytes()
    for content in (b'\xff\xfe- started: 1\n', b'- started: 1\n  versions: 3\n'):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r'provenance.yaml: is damaged: .*; move it away'):
            train.main(cfg, 0, resume=True)
    path.write_bytes(whole)
    with pytest.raises(BadInput, match='provenance.yaml: the annotations have changed since the run began'):
        train.main(cfg, 0, resume=True)
    assert (cfg.run_dir(0) / 'last.pt').read_bytes() == before


def test_weights_that_are_left_over(tiny, tmp_path):
    cfg = tiny.model_copy(update={'encoder': 'mit_b0', 'head': 'smp-unet', 'head_channels': 512})
    state = SegModel(cfg, load_weights=False).encoder.state_dict()
    path = tmp_path / 'mit.pth'
    torch.save({**state, 'head.weight': torch.zeros(3), 'block9.weight': torch.zeros(3)}, path)
    report = SegModel(cfg.model_copy(update={'encoder_weights': str(path)})).encoder_report
    count = len(state)
    assert report[0] == f'encoder_weights: {path}: {count} tensors loaded, 2 of {count + 2} not used'
    assert report[1:] == ['warning: encoder_weights: 1 tensors do not belong to the encoder: block9.weight']
    lite = {'encoder': 'tf_efficientnet_lite0', 'encoder_weights': 'efficientnet-lite0'}
    report = SegModel(tiny.model_copy(update=lite)).encoder_report
    assert len(report) == 1 and 'tensors loaded' in report[0]


def test_run_says_what_made_it(tiny):
    train.main(tiny, 0)
    train.main(tiny, 0, resume=True)
    entries = yaml.safe_load((tiny.run_dir(0) / 'provenance.yaml').read_text())
    assert len(entries) == 2
    assert {'started', 'command', 'commit', 'changed', 'data', 'hardware', 'versions'} <= entries[0].keys()
    assert entries[0]['versions']['torch'] in torch.__version__
    assert entries[0]['changed'] == (tiny.run_dir(0) / 'changes.diff').exists()


def test_each_start_keeps_its_changes(tmp_path, monkeypatch):
    """A second start with other changes leaves the first's diff; one without says so."""
    names = []
    for diff in ('one', 'two', 'one', ''):
        monkeypatch.setattr(provenance, 'git', lambda *words, diff=diff: diff if words[0] == 'diff' else '')
        provenance.write_provenance(tmp_path, 'data', 1)
        entry = provenance.last_provenance(tmp_path)
        names.append(entry.get('diff'))
        assert entry['changed'] == bool(diff)
    assert names == ['changes.diff', 'changes-2.diff', 'changes.diff', None]
    assert [(tmp_path / name).read_text() for name in names[:2]] == ['one', 'two']


def test_a_checkout_of_another_user_has_its_commit(monkeypatch):
    here = provenance.commit()
    monkeypatch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')
    assert provenance.commit() == here
