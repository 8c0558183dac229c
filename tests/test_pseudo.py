"""Pseudo-labels: which pixels are kept, and whose labels a student goes on with."""

import os

import numpy as np
import pytest
import yaml

import pseudo
import train
from data.cache import Cache, open_cache
from data.planes import pack, unpack
from dataset import TrainingSet, keep_pixels
from metrics import IGNORED
from pseudo import Labelling, class_cutoffs
from utils.errors import BadInput, Interrupted


def test_a_share_of_each_class_is_kept_the_surest(tiny):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (4, 64, 64), np.uint8)
    confidence = np.where(masks == 1, rng.integers(30, 90, masks.shape), rng.integers(100, 255, masks.shape))
    cutoffs = class_cutoffs(masks, confidence.astype(np.uint8), tiny.model_copy(update={'pseudo_keep': 0.25}))
    for k in range(3):
        values = confidence[masks == k]
        assert 0.25 <= (values >= cutoffs[k]).mean() < 0.29
    assert cutoffs[1] < 90 < cutoffs[0]


def test_everything_is_kept_with_a_share_of_one(tiny):
    masks = np.zeros((1, 8, 8), np.uint8)
    confidence = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert class_cutoffs(masks, confidence, tiny.model_copy(update={'pseudo_keep': 1.0}))[0] == 0


def test_soft_labels_are_kept_as_often_as_the_teacher_is_sure(tiny):
    cache = open_cache(tiny, 'test')
    masks = np.ones((len(cache), *cache.masks.shapes[0]), np.uint8)
    confidence = np.full(masks.shape, 51, np.uint8)  # a fifth
    confidence[:, :128] = 255
    confidence[:, :8] = 0
    soft = Cache(cache.coco, cache.photos, masks, confidence)
    samples = TrainingSet(tiny, cache, np.arange(0), (0, 0, 0), soft)
    _, mask = samples.pixels(0, np.random.default_rng(0))
    assert (mask[:8] == IGNORED).all() and (mask[8:128] == 1).all()
    assert abs((mask[128:] == 1).mean() - 0.2) < 0.01
    _, other = samples.pixels(0, np.random.default_rng(1))
    assert not np.array_equal(mask, other)  # drawn anew


def test_soft_labels_of_classes_that_overlap_are_kept_each_by_its_own_confidence():
    planes = np.random.default_rng(0).integers(0, 2, (9, 200, 200), np.uint8)
    packed = pack(planes)
    kept = np.random.default_rng(1).random((200, 200, 9)) < np.linspace(0, 1, 9)
    planes[~kept.transpose(2, 0, 1)] = IGNORED
    assert np.array_equal(unpack(keep_pixels(packed, kept), 9), planes)


def test_a_student_of_soft_labels(tiny, capsys):
    train.main(tiny, 0)
    soft = tiny.model_copy(update={'pseudo_soft': True, 'workers': 1})
    pseudo.main(soft, 0, Labelling([tiny.name]))
    folder = tiny.output_dir / f'{tiny.name}-pseudo/fold0'
    assert '100.0% of the pixels are used, each by its confidence' in capsys.readouterr().out
    confidence = np.load(folder / pseudo.CONFIDENCE_FILE)
    assert confidence.shape == np.load(folder / 'pseudo_masks.npy').shape and 20 < confidence.mean() < 255
    assert (folder / 'best.pt').exists()


def test_round_that_is_none(tiny_yaml, capsys):
    with pytest.raises(SystemExit) as stop:
        pseudo.command(['--cfg', str(tiny_yaml), '--fold', '0', '--teacher', 'tiny', '--round', '0'])
    assert stop.value.code == 2 and 'expected a whole number from 1' in capsys.readouterr().err


@pytest.mark.parametrize('again', [{}, {'overwrite': True}], ids=str)
def test_second_is_refused_while_the_first_is_labelling(tiny, monkeypatch, again):
    """Whatever it was asked for, it changes nothing: the first ends as if it had been alone."""
    train.main(tiny, 0)
    label, folder = pseudo.label, tiny.output_dir / f'{tiny.name}-pseudo/fold0'

    def label_and_start_another(*args):
        monkeypatch.setattr(pseudo, 'label', label)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(BadInput, match=f'process {os.getpid()} is labelling here now'):
            pseudo.main(tiny, 0, Labelling([tiny.name]), **again)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        label(*args)

    monkeypatch.setattr(pseudo, 'label', label_and_start_another)
    pseudo.main(tiny, 0, Labelling([tiny.name]))
    assert pseudo.label is label and (folder / 'best.pt').exists()


def test_a_student_goes_on_with_its_own_labels_alone(tiny, monkeypatch):
    train.main(tiny, 0)
    pseudo.main(tiny, 0, Labelling([tiny.name]))
    with pytest.raises(BadInput, match='schedule full of pseudo-labels, now half'):
        pseudo.main(tiny, 0, Labelling([tiny.name], 'half'), resume=True)
    student = tiny.model_copy(update={'name': f'{tiny.name}-pseudo'})
    with pytest.raises(BadInput, match='schedule full of pseudo-labels, now none'):
        train.main(student, 0, resume=True)

    def stopped(*args):
        raise Interrupted('stopped')

    monkeypatch.setattr(pseudo, 'label', stopped)
    with pytest.raises(Interrupted):
        pseudo.main(tiny, 0, Labelling([tiny.name]), overwrite=True)
    assert not (student.run_dir(0) / 'last.pt').exists()  # which other labels would go on from


def test_labels_of_other_views_or_another_window_are_not_gone_on_with(tiny, monkeypatch):
    """Nor once they are gone; what an earlier version did not write down is taken as the same."""
    train.main(tiny, 0)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'main', lambda *_, **__: None)  # it ends before it has a config.yaml
        pseudo.main(tiny, 0, Labelling([tiny.name]))
        folder = tiny.output_dir / f'{tiny.name}-pseudo/fold0'
        for key, value, name in (('window', 32, 'window'), ('tta_flips', ('h',), 'views')):
            other = tiny.model_copy(update={key: value})
            with pytest.raises(BadInput, match=f'made by other teachers or settings .{name}.'):
                pseudo.main(other, 0, Labelling([tiny.name]), resume=True)
        masks = folder / 'pseudo_masks.npy'
        before = masks.read_bytes()
        masks.unlink()
        (folder / 'last.pt').touch()
        with pytest.raises(BadInput, match='made by other teachers or settings .views.'):
            pseudo.main(other, 0, Labelling([tiny.name]), resume=True)
        pseudo.main(tiny, 0, Labelling([tiny.name]), resume=True)
        assert masks.read_bytes() == before
        origin = folder / 'pseudo_masks.yaml'
        known = yaml.safe_load(origin.read_text())
        origin.write_text(yaml.safe_dump({k: known[k] for k in known if k not in ('window', 'contents')}))
        pseudo.main(tiny, 0, Labelling([tiny.name]), resume=True)
        origin.unlink()
        with pytest.raises(BadInput, match=r'has no pseudo_masks.yaml'):
            pseudo.main(tiny, 0, Labelling([tiny.name]), resume=True)


def test_a_student_does_not_replace_its_teacher(tiny):
    name = f'{tiny.name}-pseudo'
    train.main(tiny.model_copy(update={'name': name}), 0)
    best = tiny.output_dir / name / 'fold0/best.pt'
    before = best.read_bytes()
    for labelling in (Labelling([name]), Labelling([tiny.name, name], all_folds=True)):
        with pytest.raises(BadInput, match=f'--teacher {name}: .* would replace; give --round 2'):
            pseudo.main(tiny, 0, labelling, overwrite=True)
    assert best.read_bytes() == before
