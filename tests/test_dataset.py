"""The cache, folds, samples and loaders."""

import csv
import hashlib
import io
import json
import os
import pickle
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import write_set
from processes import CONTEXT

import data.cache
import train
from config import CLASSES, Competition
from data.cache import open_cache
from data.coco import draw_mask, read_photo
from data.folds import (
    TooFewScenes,
    find_scenes,
    folds_path,
    held_out_hash,
    is_held_out,
    read_folds,
    read_scenes,
    split_fold,
    stratify,
)
from dataset import EpochSampler, TrainingSet, WholePhotos, make_loader, normalize
from engine.distributed import Ranks
from utils.errors import BadInput
from utils.files import lock


def small(tiny, tmp_path, **sizes):
    """Make a config with its own copy of a small data set and its own cache."""
    root = write_set(tmp_path / 'data', **{'train': 6, 'test': 2, **sizes})
    return tiny.model_copy(update={'data_root': root, 'cache_dir': tmp_path / 'cache'})


def test_cache_holds_the_photos_and_masks(tiny):
    cache = open_cache(tiny, 'train')
    assert np.stack([*cache.photos]).shape == (24, 256, 256, 3) and cache.masks.shapes == [(256, 256)] * 24
    for row in (0, 23):
        photo = cache.coco.photos[row]
        assert np.array_equal(cache.photos[row], read_photo(cache.coco, photo))
        assert np.array_equal(cache.masks[row], draw_mask(photo))
    assert not np.any([*open_cache(tiny, 'test').masks])


def test_the_scored_mask_is_every_second_pixel(tiny, tmp_path):
    cfg = small(tiny, tmp_path, side=512).model_copy(update={'cache_size': 512})
    cache = open_cache(cfg, 'train')
    assert np.array_equal(cache.truth(1), cache.masks[1][::2, ::2]) and cache.truth(1).shape == (256, 256)


def test_cache_is_keyed_by_annotations_and_size(tiny, tmp_path):
    cfg = small(tiny, tmp_path)
    open_cache(cfg, 'train')
    open_cache(cfg.model_copy(update={'cache_size': 512}), 'train')
    path = cfg.data_root / 'train_all.json'
    data = json.loads(path.read_text())
    data['annotations'].pop()
    path.write_text(json.dumps(data))
    open_cache(cfg, 'train')
    assert len(list(cfg.cache_dir.glob('train-*'))) == 3


def test_a_broken_photo_leaves_no_cache_behind(tiny, tmp_path):
    cfg = small(tiny, tmp_path)
    (cfg.data_root / 'batch_01/0003.jpg').write_bytes(b'broken')
    with pytest.raises(BadInput, match='0003.jpg'):
        open_cache(cfg, 'train')
    left = [path.name for path in cfg.cache_dir.iterdir() if path.suffix != '.lock']
    assert len(left) == 1 and left[0].startswith('index-train-')  # of the JSON file


def _open(cfg, barrier, results):
    barrier.wait()
    results.put(np.sum([*open_cache(cfg, 'train').photos]))


def test_two_processes_build_the_cache_once(tiny, tmp_path):
    cfg = small(tiny, tmp_path, train=12)
    barrier, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    jobs = [CONTEXT.Process(target=_open, args=(cfg, barrier, results)) for _ in range(2)]
    for job in jobs:
        job.start()
    sums = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    assert sums[0] == sums[1] and len(list(cfg.cache_dir.glob('train-*'))) == 1


def test_two_machines_build_the_cache_without_a_common_lock(tiny, tmp_path, monkeypatch):
    """The second does all of its build in the middle of the first one's."""
    cfg, draw = small(tiny, tmp_path, train=12), data.cache.draw_cached_mask
    build, again = [open_cache(cfg.model_copy(update={'cache_dir': tmp_path / 'alone'}), 'train')], []
    monkeypatch.setattr(data.cache, 'lock', lambda *args, **kwargs: nullcontext())

    def build_again(coco, photo, size):
        if not again:
            again.append(photo)
            with monkeypatch.context() as patch:
                patch.setattr('socket.gethostname', lambda: 'second')
                build.append(open_cache(cfg, 'train'))
        return draw(coco, photo, size)

    monkeypatch.setattr(data.cache, 'draw_cached_mask', build_again)
    build.append(open_cache(cfg, 'train'))
    assert len(build) == 3 and not list(cfg.cache_dir.rglob('.*.partial'))
    for row in range(12):
        for name in ('photos', 'masks'):
            first, *others = (getattr(cache, name)[row] for cache in build)
            assert all(np.array_equal(first, other) for other in others)


def test_a_cache_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(BadInput, match='cannot be written'):
        open_cache(tiny.model_copy(update={'cache_dir': tmp_path / 'file' / 'cache'}), 'train')


def test_folds_are_stratified_and_seeded_and_keep_groups_together():
    rng = np.random.default_rng(0)
    labels = rng.random((300, 6)) < [0.9, 0.5, 0.3, 0.2, 0.1, 0.04]
    groups = np.arange(300) // 2
    folds = stratify(labels, groups, 5, seed=0)
    assert (folds[::2] == folds[1::2]).all()
    assert np.ptp(np.bincount(folds)) <= 6
    for k in range(6):
        counts = np.bincount(folds[labels[:, k]], minlength=5)
        assert np.ptp(counts) <= max(3, 0.15 * counts.mean()), (k, counts)
    assert np.array_equal(folds, stratify(labels, groups, 5, seed=0))
    assert not np.array_equal(folds, stratify(labels, groups, 5, seed=1))


@pytest.mark.parametrize('seed', range(8))
def test_folds_by_hand(seed):
    def sizes(labels, groups, folds):
        return sorted(np.bincount(stratify(labels, groups, folds, seed)).tolist())

    for number in (1, 11):  # photos of the only class, the first or the last
        last = np.arange(50)[:, None] < [0, number]
        for labels in (last, last[:, ::-1]):
            folds = stratify(labels, np.arange(50), 5, seed)
            assert np.ptp(np.bincount(folds[:number], minlength=5)) == 1
            assert np.bincount(folds).tolist() == [10] * 5
    largest_last = np.array([0, 1, 2, 3, 4, 4, 4, 4])
    for labels in (np.ones((8, 1), bool), np.zeros((8, 1), bool)):
        assert sizes(labels, largest_last, 2) == [4, 4]
    labels = np.zeros((12, 2), bool)
    # two in the scene of 9: the last of the others goes to the smaller fold
    labels[[0, 1, 9, 10, 11], 0] = True
    assert sizes(labels, np.array([0] * 9 + [1, 2, 3]), 2) == [3, 9]


def test_folds_csv_is_made_once_and_checked(tiny, tmp_path):
    cfg = small(tiny, tmp_path)
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    rows = list(csv.DictReader(folds_path(cfg).read_text().splitlines()))
    assert list(rows[0]) == ['image_id', 'file_name', 'fold'] and len(rows) == 6
    classes = np.array([[k in ids for k in range(len(cfg.classes))] for ids in cache.coco.photos.classes()])
    assert np.array_equal(folds, stratify(classes, read_scenes(cfg, cache), cfg.folds, cfg.seed))
    flipped = (
        folds_path(cfg).read_text().replace(',0\n', ',x\n').replace(',1\n', ',0\n').replace(',x\n', ',1\n')
    )
    folds_path(cfg).write_text(flipped)
    assert np.array_equal(
        read_folds(cfg.model_copy(update={'seed': 9}), cache), 1 - folds
    )  # read, not made again
    with pytest.raises(BadInput, match='config key folds is 3'):
        read_folds(cfg.model_copy(update={'folds': 3}), cache)
    folds_path(cfg).write_text('\n'.join(flipped.splitlines()[:-1]))
    with pytest.raises(BadInput, match='lacks'):
        read_folds(cfg, cache)
    folds_path(cfg).write_text('a,b\n1,2\n')
    with pytest.raises(BadInput, match="found the header 'a,b', expected 'image_id,file_name,fold'"):
        read_folds(cfg, cache)
    with pytest.raises(BadInput, match='no such file'):
        read_folds(cfg.model_copy(update={'folds_csv': tmp_path / 'none.csv'}), cache)


def test_folds_that_another_process_assigns_are_waited_for(tiny, tmp_path, monkeypatch):
    cfg = small(tiny, tmp_path)
    cache, errors = open_cache(cfg, 'train'), io.StringIO()
    monkeypatch.setattr('sys.stderr', errors)
    rows = [f'{row},batch_01/{row:04d}.jpg,{row // 5}\n' for row in range(6)]
    with ThreadPoolExecutor(1) as pool:
        with lock(cfg.cache_dir / '.folds.lock', 'assigning folds'):
            reading = pool.submit(read_folds, cfg, cache)
            while not errors.getvalue() and not reading.done():
                time.sleep(0.01)
            folds_path(cfg).write_text('image_id,file_name,fold\n' + ''.join(rows))
        assert reading.result().tolist() == [0, 0, 0, 0, 0, 1]
    message = f'{cfg.cache_dir}: process {os.getpid()} is assigning folds here now; waiting for it\n'
    assert errors.getvalue() == message


def test_scenes_by_hand(tmp_path):
    names, twins = ['a1', 'a2', 'b1', 'b2'], np.array([[0, 1], [2, 3]])
    scenes, remark = find_scenes(tmp_path, names, twins[:1], None, 3)  # as many as folds are enough
    assert scenes.tolist() == [0, 0, 1, 2] and remark == ''
    scenes, remark = find_scenes(tmp_path, names, np.array([[1, 2]]), '[ab]', 2)
    assert scenes.tolist() == [0, 0, 1, 1] and 'join the 2 groups of photos to 1, fewer' in remark
    alone = '4 scenes, expected at least one for each of 5 folds; give folds=4 in the config, group in'
    with pytest.raises(TooFewScenes, match=f'found 4 photos of {alone}'):
        find_scenes(tmp_path, names, twins[:0], None, 5)
    joined = r'2 scenes \(near-duplicates, and photos of one group, are one scene\), .*; give folds=2 in the'
    with pytest.raises(TooFewScenes, match=joined):
        find_scenes(tmp_path, names, twins, None, 3)


def test_scenes_are_kept_beside_the_photos(tiny, tmp_path, monkeypatch):
    cfg = small(tiny, tmp_path, train=8, side=64)
    for copy, original in ((7, 1), (4, 2)):
        photos = cfg.data_root / 'batch_01'
        shutil.copy(photos / f'000{original}.jpg', photos / f'000{copy}.jpg')
    cache = open_cache(cfg, 'train')
    folds, scenes = read_folds(cfg, cache), read_scenes(cfg, cache)
    assert scenes.tolist() == [0, 1, 2, 3, 2, 4, 5, 1]
    assert folds[7] == folds[1] and folds[4] == folds[2]
    monkeypatch.setattr('data.folds.describe_photos', None)  # no photo is decoded again
    assert np.array_equal(read_scenes(cfg, cache), scenes)
    group = Competition(classes=CLASSES, group=r'000([0-3])|$')
    grouped = cfg.model_copy(update={'competition': group})
    assert read_scenes(grouped, cache).tolist() == [0, 1, 1, 2, 1, 1, 1, 1]
    few = cfg.model_copy(update={'folds': 7})
    with pytest.raises(BadInput, match='of 6 scenes'):
        read_folds(few.model_copy(update={'cache_dir': tmp_path / 'new'}), cache)
    assert np.array_equal(read_scenes(few, cache), scenes)  # with folds of one's own
    (kept,) = cache.folder.glob('duplicates-*.npy')
    kept.write_bytes(kept.read_bytes()[:60])
    with pytest.raises(BadInput, match=rf'{kept}: is damaged \(EOF'):
        read_scenes(cfg, cache)


def test_scenes_of_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    def fail(path, array):
        raise BadInput(f'{path}: cannot be written')

    monkeypatch.setattr('data.folds.save_array', fail)
    cfg = small(tiny, tmp_path)
    assert read_scenes(cfg, open_cache(cfg, 'train')).tolist() == [0, 1, 2, 3, 4, 5]


def test_split_fold():
    folds = np.array([0, 1, 2, 0])
    train, valid = split_fold(folds, 0)
    assert train.tolist() == [1, 2] and valid.tolist() == [0, 3]
    assert split_fold(folds, -1)[0].tolist() == [0, 1, 2, 3] and not len(split_fold(folds, -1)[1])
    for fold in (3, -2):
        with pytest.raises(BadInput, match='0 to 2'):
            split_fold(folds, fold)


def test_samples_do_not_depend_on_the_workers(tiny):
    cfg = tiny.model_copy(update=dict(shift_rotate=1.0, noise=1.0))
    data = TrainingSet(cfg, open_cache(cfg, 'train'), np.arange(8), (0, 0, 0))
    epochs = []
    for workers in (0, 1, 2):
        sampler = EpochSampler(4, seed=0)
        loader = make_loader(data, workers, batch_sampler=sampler)
        for epoch in (0, 1):
            sampler.set_epoch(epoch, range(8))
            epochs.append([(images, masks, positions) for images, masks, positions in loader])
    for a, b in zip(epochs[:2] * 2, epochs[2:], strict=True):
        assert all(
            torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
        )
    first = {int(p): image for images, _, ps in epochs[0] for image, p in zip(images, ps, strict=True)}
    second = {int(p): image for images, _, ps in epochs[1] for image, p in zip(images, ps, strict=True)}
    assert not any(torch.equal(first[p], second[p]) for p in first)  # another epoch, other randomness


def test_ranks_share_the_same_global_batches():
    whole, *parts = (EpochSampler(6, seed=3, rank=r, world=w) for r, w in ((0, 1), (0, 2), (1, 2)))
    for sampler in (whole, *parts):
        sampler.set_epoch(0, range(20))
    assert len(whole) == 3
    batches = list(whole)
    whole.set_epoch(0, range(20), start=2)
    assert list(whole) == batches[2:] and len(whole) == 3
    whole.set_epoch(0, range(20))
    for batch, a, b in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(a + b) and len(a) == len(b) == 3


def test_a_spawned_process_maps_the_cache_again(tiny):
    cache = open_cache(tiny, 'train')
    sent = pickle.dumps(WholePhotos(cache, np.array([5, 7]), 64))
    assert len(sent) < cache.photos[0].nbytes / 100
    assert torch.equal(pickle.loads(sent)[1][0], WholePhotos(cache, np.array([7]), 64)[0][0])


def test_samples_are_never_views_of_the_cache(tiny):
    whole = {'crop_size': 256, 'image_size': 256, 'scale_range': (1.0, 1.0), 'crop_max_share': 1.0}
    cfg = tiny.model_copy(update={**whole, 'hflip': 0.0, 'photometric': 0.0})
    samples = TrainingSet(cfg, open_cache(cfg, 'train'), np.array([0]), (0, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch warns of a tensor that may not be written to
        samples[0, 0][0].zero_()


def test_rare_classes_are_pasted_more_often(tiny):
    cache = open_cache(tiny, 'train')
    rows = np.arange(len(cache))
    samples = TrainingSet(tiny.model_copy(update={'copy_paste': 1.0}), cache, rows, (0, 0, 0))
    samples.donors = {3: samples.donors[3], 4: samples.donors[4][:1]}
    black = np.zeros((256, 256, 3), np.uint8), np.zeros((256, 256), np.uint8)
    rng = np.random.default_rng(0)
    pasted = np.concatenate([np.unique(samples.paste(black, rng)[1]) for _ in range(60)])
    assert (pasted == 4).sum() > 2 * (pasted == 3).sum() > 0
    assert torch.equal(samples[2, 5][0], samples[2, 5][0])  # from (seed, epoch, position) alone


def test_whole_photos_and_normalisation(tiny):
    cache = open_cache(tiny, 'train')
    image, row = WholePhotos(cache, np.array([5, 7]), 64)[1]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and row == 7
    images = torch.tensor([0, 255, 127], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalize(images, (0.5, 0.25, 0.5), (0.5, 0.5, 0.25)).flatten()
    assert torch.allclose(out, torch.tensor([-1.0, 1.5, (127 / 255 - 0.5) / 0.25]))


def test_balance_draws_photos_by_class(tiny):
    cache = open_cache(tiny, 'train')
    rows = np.arange(4, 20)
    samples = TrainingSet(tiny.model_copy(update={'balance': 1.0}), cache, rows, (0, 0, 0))
    samples.donors = {3: samples.donors[3], 4: samples.donors[4][:1]}
    drawn = [samples[0, position][2] for position in range(16)]
    drawn += [samples[epoch, 0][2] for epoch in range(1, 40)]
    assert set(drawn) == {*samples.donors[3], *samples.donors[4]}
    assert 15 < drawn.count(samples.donors[4][0]) < 40


@pytest.mark.parametrize('key', ['mosaic', 'cutmix', 'balance', 'crop_balance', 'copy_paste'])
def test_what_mixes_photos_changes_samples_and_is_seeded(tiny, key):
    cache = open_cache(tiny, 'train')
    plain = TrainingSet(tiny, cache, np.arange(8), (0, 0, 0))
    mixed = TrainingSet(tiny.model_copy(update={key: 1.0}), cache, np.arange(8), (0, 0, 0))
    for epoch in range(3):
        assert torch.equal(mixed[epoch, 5][1], mixed[epoch, 5][1])
    assert any(not torch.equal(plain[epoch, 5][1], mixed[epoch, 5][1]) for epoch in range(3))


def test_photos_that_a_model_never_saw_are_known_by_content(tiny, tmp_path, caplog):
    """Whatever they are called, and not by a name that another photo has by now."""
    cfg = small(tiny, tmp_path)
    cache, rows = open_cache(cfg, 'train'), np.array([0, 2, 4])
    known = held_out_hash(cache, rows)
    table = cfg.data_root / 'train_all.json'
    content = json.loads(table.read_text())
    names = [image['file_name'] for image in content['images']]
    for image, name in zip(content['images'], names[1:] + names[:1], strict=True):  # renumbered by one
        shutil.copy(cfg.data_root / image['file_name'], tmp_path / name.replace('/', '_'))
        image['file_name'] = name
    for name in names:
        shutil.move(tmp_path / name.replace('/', '_'), cfg.data_root / name)
    table.write_text(json.dumps(content))
    again = open_cache(cfg, 'train')
    same_names = [again.names(np.arange(6)).index(name) for name in cache.names(rows)]
    assert is_held_out(known, again, rows) and not is_held_out(known, again, np.array(same_names))
    assert held_out_hash(cache, rows[:0]) is None and is_held_out(None, cache, rows[:0])
    assert not is_held_out(None, cache, rows) and not is_held_out(known, cache, rows[:0])
    text = '\n'.join(cache.names(rows))  # of an earlier version
    assert is_held_out(hashlib.sha256(text.encode()).hexdigest(), cache, rows)
    assert 'of an earlier version knows by name alone' in caplog.text


def test_training_says_that_its_folds_split_near_duplicates(tiny, tmp_path, caplog):
    cfg = small(tiny, tmp_path, train=8, side=64)
    photos = cfg.data_root / 'batch_01'
    shutil.copy(photos / '0002.jpg', photos / '0005.jpg')
    rows = [f'{n},batch_01/{n:04d}.jpg,{fold}' for n, fold in enumerate((0, 0, 0, 1, 1, 1, 2, 2))]
    cfg = cfg.model_copy(update={'folds': 3, 'batch_size': 2, 'folds_csv': tmp_path / 'folds.csv'})
    cfg.folds_csv.write_text('\n'.join(['image_id,file_name,fold', *rows]))
    for fold, count in ((0, 1), (1, 1), (2, 0), (-1, 0)):
        data = train.load_data(cfg, fold, Ranks.alone(), None, None)
        assert len(data.remarks) == count
        caplog.clear()
        train.log_header(cfg, data, [], [])
        assert caplog.text.count('1 pair of near-duplicates in two folds') == count
    assert "'batch_01/0002.jpg' (fold 0)" in train.load_data(cfg, 1, Ranks.alone(), None, None).remarks[0]
