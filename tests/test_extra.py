"""Other data roots in training: whose classes are ours, what is known there, and how often they are drawn."""

import json
import shutil

import numpy as np
import pytest
from overlaps import paint, write_overlaps
from test_cache import config_of

import pseudo
import train
from config import load_config
from data.cache import open_cache
from data.extra import open_extra
from data.folds import read_folds, split_fold
from data.planes import unpack
from dataset import EpochSampler, TrainingSet
from engine.trainer import Trainer
from metrics import IGNORED
from utils.errors import BadInput

SIZES = [(48, 64), (64, 48), (40, 64), (64, 64), (56, 64), (64, 32), (50, 60)]
THEIRS = ('Red', 'lime', 'cat')  # red by name, green by the map, and none of ours
NONE = np.arange(0)


def target_and_other(tmp_path, task='multiclass', their_task='multiclass', names=THEIRS, **entry):
    """Make two data roots, and a config that trains on both; return it and the planes of the other."""
    write_overlaps(tmp_path / 'data', SIZES, task=task)
    planes = write_overlaps(tmp_path / 'other', SIZES[:5], names, seed=1, test=0, task=their_task)
    extra = {'root': tmp_path / 'other', 'share': 0.25, 'map': {'lime': 'green'}, **entry}
    return config_of(tmp_path, cache_size=0, image_size=64, extra_data=[extra]), planes


def only_extra(cfg):
    cache = open_cache(cfg, 'train')
    (extra,) = open_extra(cfg, cache, NONE)
    return extra


@pytest.mark.parametrize('their_task', ['multiclass', 'multilabel'])
@pytest.mark.parametrize('background', [None, 'trusted', 'ignored'])
def test_what_the_other_root_does_not_label_is_not_learnt_as_background(tmp_path, their_task, background):
    cfg, planes = target_and_other(tmp_path, their_task=their_task, background=background)
    extra = only_extra(cfg)
    absent = 0 if background == 'trusted' else IGNORED
    ours = np.array([absent, 1, 2, IGNORED], np.uint8)
    for row, photo in enumerate(extra.cache.coco.photos):
        assert np.array_equal(extra.cache.masks[row], ours[paint(planes)[photo.file_name]])
        assert photo.classes == {1, 2}
    remarks = '; '.join(extra.remarks)
    unknown = {None: 'blue', 'ignored': 'red, green, blue'}.get(background)
    assert remarks == 'ignored: cat' + (f'; absence is unknown of {unknown}' if unknown else '')


def test_background_is_known_where_all_our_classes_are_labelled(tmp_path):
    cfg, planes = target_and_other(tmp_path, names=('blue', 'lime', 'RED'))
    extra = only_extra(cfg)
    ours = np.array([0, 3, 2, 1], np.uint8)
    assert np.array_equal(extra.cache.masks[2], ours[paint(planes)['002.png']]) and not extra.remarks


@pytest.mark.parametrize('background', [None, 'trusted', 'ignored'])
def test_planes_of_classes_that_the_other_root_does_not_label_are_unknown(tmp_path, background):
    cfg, planes = target_and_other(tmp_path, 'multilabel', background=background)
    extra = only_extra(cfg)
    for row, photo in enumerate(extra.cache.coco.photos):
        red, green, cat = planes[photo.file_name]
        expected = np.stack([red, green, np.zeros_like(red)])
        unknown = np.broadcast_to(cat == 1, expected.shape).copy()  # neither of ours, nor surely none
        unknown[2] |= background is None
        unknown |= background == 'ignored'
        expected[unknown & (expected == 0)] = IGNORED
        assert np.array_equal(unpack(extra.cache.masks[row], 3), expected)


def test_classes_are_those_of_the_categories_without_a_competition_file(tmp_path):
    cfg, planes = target_and_other(tmp_path, background='trusted')
    (tmp_path / 'other' / 'competition.yaml').unlink()
    ours = np.array([0, 1, 2, IGNORED], np.uint8)
    assert np.array_equal(only_extra(cfg).cache.masks[0], ours[paint(planes)['000.png']])


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (
            {'map': {'lime': 'teal'}},
            "'teal', expected ignore, or one of Background, red, green, blue",
        ),
        ({'map': {'lyme': 'green'}}, "'lyme' is no class there; expected one of Background, Red, lime, cat"),
        ({'map': {'Red': 'ignore'}}, 'none of its classes, .* is one of ours; expected a map'),
        ({'root': 'nowhere'}, 'nowhere'),
    ],
)
def test_other_root_that_does_not_fit(tmp_path, entry, message):
    cfg, _ = target_and_other(tmp_path, **entry)
    with pytest.raises(BadInput, match=message):
        only_extra(cfg)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[{root: a, share: 0.5}, {root: b, share: 0.5}]', 'the shares leave no sample for data_root'),
        ('[{root: a}]', "key 'extra_data'"),
        ('[{root: a, share: 1.5}]', "key 'extra_data': found 1.5"),
        ('[{root: a, share: 0.5, weight: 2}]', "key 'extra_data'"),
    ],
)
def test_entry_that_is_wrong(tmp_path, text, message):
    path = tmp_path / 'x.yaml'
    path.write_text(f'extra_data: {text}')
    with pytest.raises(BadInput, match=message):
        load_config(path)


def test_each_root_has_its_share_of_the_samples(tmp_path):
    cfg, _ = target_and_other(tmp_path)
    write_overlaps(tmp_path / 'third', SIZES[:3], seed=2, test=0, task='multiclass')
    third = {'root': tmp_path / 'third', 'share': 0.45}
    cfg = config_of(tmp_path, cache_size=0, image_size=64, balance=1.0, extra_data=[*cfg.extra_data, third])
    cache = open_cache(cfg, 'train')
    samples = TrainingSet(cfg, cache, np.arange(6), (0, 0, 0), None, open_extra(cfg, cache, NONE))
    assert len(samples) == 6 + 5 + 3
    epochs = [samples.extra_positions(epoch, 6).tolist() for epoch in range(3)]
    assert all(len(epoch) == 5 + 9 for epoch in epochs)  # 25 % and 45 % of 20
    for epoch in epochs:
        assert sorted(epoch[:5]) == [6, 7, 8, 9, 10] and sorted(epoch[5:8]) == [11, 12, 13]
    assert epochs[0] != epochs[1] and epochs[0] == samples.extra_positions(0, 6).tolist()
    for position in (0, 8, 12):  # a photo drawn by class comes from the same root
        drawn = {samples[epoch, position][2] for epoch in range(8)}
        group = next(g for g in (range(6), range(6, 11), range(11, 14)) if position in g)
        assert len(drawn) > 1 and drawn <= set(group)
    whole, *ranks = (EpochSampler(4, 0, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    for sampler in (whole, *ranks):
        sampler.set_epoch(0, np.concatenate([np.arange(6), epochs[0]]))
    for batch, one, other in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(one + other)


def test_copies_of_photos_to_validate_on_are_left_out(tmp_path):
    cfg, _ = target_and_other(tmp_path)
    cache = open_cache(cfg, 'train')
    _, held_out = split_fold(read_folds(cfg, cache), 0)
    name = cache.names(held_out)[0]
    other = json.loads((tmp_path / 'other' / 'train_all.json').read_text())
    height, width = cache.coco.photos[held_out[0]].size
    other['images'][3] |= {'file_name': 'copy.png', 'height': height, 'width': width}
    (tmp_path / 'other' / 'train_all.json').write_text(json.dumps(other))
    shutil.copy(tmp_path / 'data' / name, tmp_path / 'other' / 'copy.png')
    (extra,) = open_extra(cfg, cache, held_out)
    assert extra.rows.tolist() == [0, 1, 2, 4]
    assert extra.remarks[-1] == 'left out 1 near-duplicates of photos to validate on'
    assert len(open_extra(cfg, cache, NONE)[0].rows) == 5


def test_run_on_two_roots(tmp_path):
    cfg, _ = target_and_other(tmp_path)
    cfg = cfg.model_copy(update={'batch_size': 2, 'epochs': 2})
    train.main(cfg, 0)
    origin = f'5 photos of {tmp_path / "other"}, classes red 5, green 5, blue 0; ignored: cat;'
    assert f'extra data: 25% of the samples from {origin}' in (cfg.run_dir(0) / 'log.txt').read_text()
    assert load_config(cfg.run_dir(0) / 'config.yaml').extra_data == cfg.extra_data
    path = tmp_path / 'other' / 'train_all.json'
    path.write_text(path.read_text() + ' ')
    with pytest.raises(BadInput, match='the annotations have changed since the run began'):
        train.main(cfg, 0, resume=True)


def test_a_student_of_soft_labels_beside_another_root(tmp_path, monkeypatch):
    cfg, _ = target_and_other(tmp_path, 'multilabel')
    keys = {'batch_size': 2, 'epochs': 2, 'pseudo_soft': True, 'balance': 0.5, 'mosaic': 0.5}
    cfg = cfg.model_copy(update=keys)
    train.main(cfg, 0)
    with pytest.raises(BadInput, match='--schedule pretrain: found 1 labelled photo, expected at least 2'):
        pseudo.main(cfg, 0, pseudo.Labelling(['run'], 'pretrain'))
    shutil.rmtree(tmp_path / 'output' / 'run-pseudo')
    real, epochs = Trainer.train_epoch, []

    def noted(self, epoch, bar):
        groups = range(3), range(3, 4), self.samples.extra[0].positions  # clean, labelled, of the other root
        epochs.append([len({*self.positions_in(epoch)} & {*group}) for group in groups])
        return real(self, epoch, bar)

    monkeypatch.setattr(Trainer, 'train_epoch', noted)
    pseudo.main(cfg, 0, pseudo.Labelling(['run'], 'half'))
    assert epochs == [[3, 1, 1], [3, 0, 1]]  # a quarter of 5, and of 4
