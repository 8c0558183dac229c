"""Several annotators of a photo: what is trained on, what is true, and what a data set says of them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from overlaps import paint, write_json, write_overlaps
from processes import ended, start
from test_cache import config_of
from test_resume import compare, train_dying

import train
from data.cache import open_cache
from data.check import check_data
from data.coco import Photo, majority, read_coco, scored_truth
from data.extra import open_extra
from data.masks import Annotation
from data.planes import unpack
from dataset import TrainingSet
from losses import cross_entropy
from metrics import IGNORED
from utils.errors import BadInput
from viewer.app_data import with_truth

SIZES = [(48, 64), (64, 48), (40, 64), (64, 64), (56, 64)]
TASKS = pytest.mark.parametrize('task', ['multiclass', 'multilabel'])


def write_annotated(root, counts=(3, 2, 1, 4), sizes=SIZES, labels='soft', listed=False, **keys):
    """Write a data set whose photos have so many annotators, 0, 1, ...; return their planes by file name.

    If they are listed, there is one more of each photo, who found nothing.
    """
    sets = [write_overlaps(root, sizes, seed=seed, labels=labels, **keys) for seed in range(max(counts))]
    records, images, planes = [], None, {}
    for annotator in range(max(counts)):
        write_overlaps(root, sizes, seed=annotator, labels=labels, **keys)
        data = json.loads((root / 'train_all.json').read_text())
        kept = [a for a in data['annotations'] if annotator < counts[a['image_id']]]
        records += [{**a, 'id': len(records) + k, 'annotator': annotator} for k, a in enumerate(kept)]
        images = images or data['images']
    for image, count in zip(images, counts, strict=True):
        masks = [one[image['file_name']] for one in sets[:count]]
        if listed:
            image['annotators'] = [*range(count), 'nobody']
            masks.append(np.zeros_like(masks[0]))
        planes[image['file_name']] = masks
    write_overlaps(root, sizes, labels=labels, **keys)  # the photos of the first annotator
    write_json(root / 'train_all.json', images=images, categories=data['categories'], annotations=records)
    return planes


def masks_of(planes, name, task):
    """Return the masks of a photo's annotators: planes, or ids."""
    return [one if task == 'multilabel' else paint({name: one})[name] for one in planes[name]]


def vote(masks):
    """Count votes pixel by pixel, without numpy's help."""
    out = np.zeros_like(masks[0])
    for where in np.ndindex(out.shape):
        votes = [int(mask[where]) for mask in masks if mask[where] != IGNORED]
        out[where] = max(votes, key=votes.count) if votes else IGNORED  # max: the first of the most
    return out


def test_majority_is_that_of_the_annotators_who_know():
    masks = np.random.default_rng(0).choice(np.array([0, 1, 2, IGNORED], np.uint8), (4, 50, 50))
    for count in range(1, 5):
        assert np.array_equal(majority(masks[:count]), vote(masks[:count]))


@TASKS
@pytest.mark.parametrize('listed', [False, True])
@pytest.mark.parametrize('side', [0, 32])
def test_each_annotator_has_a_mask_and_their_majority_is_the_truth(tmp_path, task, listed, side):
    planes = write_annotated(tmp_path / 'data', task=task, listed=listed)
    cache = open_cache(config_of(tmp_path, cache_size=side), 'train')
    for row, photo in enumerate(cache.coco.photos):
        masks = masks_of(planes, photo.file_name, task)
        truth = vote(masks)
        assert np.array_equal(cache.truth(row), truth)
        assert np.array_equal(scored_truth(photo, cache.coco.competition), truth)
        assert len(cache.annotators[row]) == len(masks)
        if side == 0:
            for cached, mask in zip(cache.annotators[row], masks, strict=True):
                assert np.array_equal(unpack(cached, 3) if task == 'multilabel' else cached, mask)


@TASKS
def test_many_draws_have_the_cross_entropy_of_the_averaged_labels(tmp_path, task):
    planes = write_annotated(tmp_path / 'data', counts=(3, 2, 1, 2), task=task)
    cfg = config_of(tmp_path, cache_size=0, image_size=0)
    cache = open_cache(cfg, 'train')
    samples = TrainingSet(cfg, cache, np.arange(4), (0, 0, 0))
    for position, photo in enumerate(cache.coco.photos):
        masks = np.stack(masks_of(planes, photo.file_name, task))
        drawn = [samples.pixels(position, np.random.default_rng(seed))[1] for seed in range(600)]
        drawn = np.stack([unpack(mask, 3) if task == 'multilabel' else mask for mask in drawn])
        ids = range(1, 2) if task == 'multilabel' else range(4)
        for k in ids:
            assert np.allclose((drawn == k).mean(0), (masks == k).mean(0), atol=0.08)
        shares = [np.mean([np.array_equal(mask, one) for mask in drawn]) for one in masks]
        assert np.isclose(sum(shares), 1)  # each is one annotator's, never a mixture
        if task == 'multiclass':
            logits = torch.randn((1, 4, *photo.size), generator=torch.Generator().manual_seed(0))
            shares = np.stack([(masks == k).mean(axis=0) for k in range(4)])[None]
            soft = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(shares))
            hard = [float(cross_entropy(logits, torch.from_numpy(mask[None]).long())) for mask in masks]
            assert np.mean(hard) == pytest.approx(float(soft), rel=1e-5)


def test_classes_are_those_of_most_annotators_or_of_half_with_the_first():
    drawn = [Annotation(k, False, b'', 1, name) for name, ids in ABC.items() for k in ids]
    for names, expected in (('ab', {1, 2}), ('ba', {2, 3}), ('abc', {2, 3}), ('abcd', {2})):
        assert Photo(0, 'x.png', 4, 4, tuple(drawn), annotators=tuple(names)).classes == expected


ABC = {'a': [1, 2, 2], 'b': [2, 3], 'c': [3, 3], 'd': []}


def test_hard_labels_are_those_of_one_and_check_says_so(tmp_path, capsys):
    write_annotated(tmp_path / 'data', labels='hard')
    cfg = config_of(tmp_path, cache_size=0)
    cache = open_cache(cfg, 'train')
    assert cache.annotators is None and not cache.coco.has_annotators
    remarks, _ = check_data(tmp_path / 'data', cfg.competition, 2)
    assert any('3 photos with several annotators, 4 at most, whose objects' in one for one in remarks)
    soft = cfg.competition.model_copy(update={'labels': 'soft'})
    data = json.loads((tmp_path / 'data' / 'train_all.json').read_text())
    for record in data['annotations']:
        del record['annotator']
    write_json(tmp_path / 'data' / 'train_all.json', **data)
    remarks, _ = check_data(tmp_path / 'data', soft, 2)
    assert any('labels: soft, but no photo' in one for one in remarks)


@TASKS
def test_check_counts_the_majority(tmp_path, task, capsys):
    planes = write_annotated(tmp_path / 'data', counts=(3, 2, 2, 4), task=task)
    check_data(tmp_path / 'data', config_of(tmp_path).competition, 2)
    text = capsys.readouterr().out
    assert 'labels: soft; 4 photos with several annotators, 4 at most' in text
    truths = [vote(masks_of(planes, name, task)) for name in planes]
    for k, name in enumerate(('red', 'green', 'blue')):
        pixels = sum(int((t[k] if task == 'multilabel' else t == k + 1).sum()) for t in truths)
        assert re.search(rf'{name} +4 +11 +{pixels:,} ', text)
    assert ('lie under' not in text) and ('have several classes' in text) == (task == 'multilabel')


@pytest.mark.parametrize(
    ('image', 'annotation', 'message'),
    [
        ({}, {'annotator': ['x']}, r"annotator is \"\['x'\]\", expected a whole number or text"),
        ({}, {'annotator': None}, r"images\[0\]: some of its annotations have the key 'annotator', and"),
        ({'annotators': 'ab'}, {}, r'images\[0\]: annotators is ab, expected a list'),
        ({'annotators': [0, 2]}, {}, r'images\[0\]: annotators lacks 1, of whom there are annotations'),
    ],
)
def test_annotators_that_are_none(tmp_path, image, annotation, message):
    write_annotated(tmp_path / 'data')
    path = tmp_path / 'data' / 'train_all.json'
    data = json.loads(path.read_text())
    data['images'][0] |= image
    data['annotations'][0] |= annotation
    write_json(path, **data)
    competition = config_of(tmp_path).competition
    with pytest.raises(BadInput, match=message):
        read_coco(tmp_path / 'data', 'train', competition)
    read_coco(tmp_path / 'data', 'train', competition.model_copy(update={'labels': 'hard'}))


def test_annotators_of_another_root_stay_theirs(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES, task='multiclass')
    planes = write_annotated(tmp_path / 'other', task='multiclass')
    cfg = config_of(tmp_path, cache_size=0, extra_data=[{'root': tmp_path / 'other', 'share': 0.5}])
    (extra,) = open_extra(cfg, open_cache(cfg, 'train'), np.arange(0))
    for row, name in enumerate(planes):
        masks = masks_of(planes, name, 'multiclass')
        assert np.array_equal(extra.cache.annotators[row], masks)
        assert np.array_equal(extra.cache.masks[row], vote(masks))


def test_two_ranks_go_on_to_the_bit_with_annotators_of_two_roots(tmp_path):
    for number, root in enumerate(('data', 'other')):
        write_annotated(tmp_path / root, (3, 2, 1, 4, 1, 2, 2, 3)[number:], [(48, 64)] * (9 - number))
    mixing = {'balance': 0.5, 'mosaic': 0.5, 'copy_paste': 0.5, 'cutmix': 0.3, 'crop_balance': 0.5}
    extra = {'root': tmp_path / 'other', 'share': 0.5}
    small = {'encoder': 'test_resnet.r160_in1k', 'cache_size': 0, 'crop_size': 32, 'checkpoint_minutes': 1e-9}
    more = {'loss': {'bce': 1, 'dice': 1}, 'extra_data': [extra], 'epochs': 2}
    whole = config_of(tmp_path, **mixing, **small, **more)
    other = whole.model_copy(update={'output_dir': tmp_path / 'again'})
    assert ended(start(train.main, whole, 0, ranks=2)) == [0, 0]
    dying = start(train_dying, other, ('engine.checkpoint', 'save_checkpoint'), 2, 0, ranks=2)
    assert ended(dying)[0] == -9 and (other.run_dir(0) / 'last.pt').exists()
    assert ended(start(train.main, other, 0, resume=True, ranks=2)) == [0, 0]
    compare(whole, other)


def test_labels_of_a_file_are_the_majority_in_the_app(tmp_path):
    planes = write_annotated(tmp_path / 'data')
    competition = config_of(tmp_path).competition
    coco = read_coco(tmp_path / 'data', 'train', competition)
    bare = replace(coco, photos=tuple(replace(p, annotations=(), annotators=()) for p in coco.photos))
    for photo in with_truth(bare, tmp_path / 'data' / 'train_all.json').photos:
        truth = vote(masks_of(planes, photo.file_name, 'multilabel'))
        assert np.array_equal(scored_truth(photo, competition), truth)
