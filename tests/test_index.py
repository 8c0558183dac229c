"""The index of a set's annotations, and the shards of its cache: the same as all at once."""

import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_set
from overlaps import write_overlaps

from config import Competition, read_competition
from data.cache import open_cache, split_shards
from data.coco import read_coco, read_photo
from data.index import STAMP, open_coco
from data.masks import Annotation
from data.records import PhotoIndex, write_index
from tools.bench import scale
from utils.errors import BadInput

SIZES = [(20, 30), (30, 20), (16, 50), (20, 30), (20, 30), (24, 24)]


@pytest.fixture
def cfg(tiny, tmp_path):
    """Return a config with a small set of its own, which was written long ago."""
    root = write_set(tmp_path / 'data', train=6, test=2, side=64)
    settle(root)
    return tiny.model_copy(update={'data_root': root, 'cache_dir': tmp_path / 'cache', 'cache_size': 64})


def settle(root):
    for path in root.glob('*.json'):
        os.utime(path, (1, 1))


def open_train(cfg):
    return open_coco(cfg.data_root, 'train', cfg.competition, cfg.cache_dir)


def refuse(*args):
    raise AssertionError('called')


def test_an_index_holds_what_the_json_file_says(cfg):
    for split in ('train', 'test'):
        coco = open_coco(cfg.data_root, split, cfg.competition, cfg.cache_dir)
        expected = read_coco(cfg.data_root, split, cfg.competition)
        assert coco.photos[:] == expected.photos and isinstance(coco.photos, PhotoIndex)
        assert replace(coco, photos=expected.photos) == expected  # fingerprint, files, ...
        for name in ('names', 'sizes', 'classes', 'annotator_counts'):
            assert getattr(coco.photos, name)() == getattr(expected.photos, name)()


def test_photos_of_all_kinds_come_back(tmp_path):
    photos = read_coco(write_set(tmp_path / 'data', train=3, test=0, side=64), 'train', Competition()).photos
    drawn = [replace(one, annotator=name) for one, name in zip(photos[0].annotations, ('7', 7, 'Ü b'))]
    photos = [
        replace(photos[0], annotations=tuple(drawn), annotators=(7, '7', 'Ü b', 'none'), first_object=0),
        replace(photos[1], image_id=10**30, file_name='a b/ü 1.png', annotations=(), first_object=0),
        replace(photos[2], image_id=-1, annotations=(Annotation(3, True, b'xyz', 2**40),), first_object=0),
    ]
    write_index(photos, tmp_path, {'other': 1})
    index = pickle.loads(pickle.dumps(PhotoIndex(tmp_path)))
    assert index[:] == tuple(photos) and [*index] == photos and index.meta['other'] == 1
    assert index[-1] == photos[-1] and index[::-2] == (photos[2], photos[0])
    assert index.classes() == [photo.classes for photo in photos] and index.classes()[1] == set()
    assert index.annotator_counts() == [4, 0, 0]
    assert [type(name) for name in index[0].annotators] == [int, str, str, str]
    with pytest.raises(IndexError):
        index[3]


def test_json_is_read_once_and_a_change_is_noticed(cfg, monkeypatch):
    first, path = open_train(cfg), cfg.data_root / 'train_all.json'
    monkeypatch.setattr('data.index.read_coco', refuse)
    assert open_train(cfg).photos[:] == first.photos[:]
    monkeypatch.setattr('data.index.fingerprint_of', refuse)
    open_train(cfg)  # by size and times alone
    for change in (lambda: path.touch(), lambda: os.utime(path, (1, 1))):
        change()
        with pytest.raises(AssertionError, match='called'):
            open_train(cfg)  # looks at the content
    monkeypatch.undo()
    text = path.read_text()
    path.write_text(text.replace('"category_id": 1,', '"category_id": 2,'))
    os.utime(path, (1, 1))
    changed = open_train(cfg)
    assert len(text) == path.stat().st_size and changed.fingerprint != first.fingerprint
    assert changed.photos[:] == read_coco(cfg.data_root, 'train', cfg.competition).photos != first.photos[:]


def test_a_file_that_may_change_within_its_time_is_read_again(cfg, monkeypatch):
    (cfg.data_root / 'train_all.json').touch()
    open_train(cfg)
    assert not list(cfg.cache_dir.rglob(STAMP))
    monkeypatch.setattr('data.index.fingerprint_of', refuse)
    with pytest.raises(AssertionError, match='called'):
        open_train(cfg)


def test_other_conventions_have_another_index(cfg):
    text = (cfg.data_root / 'train_all.json').read_text()
    (cfg.data_root / 'train_all.json').write_text(text.replace('"iscrowd": 0', '"iscrowd": 1'))
    settle(cfg.data_root)
    crowds = {key: cfg.competition.model_copy(update={'crowds': key}) for key in ('ignored', 'objects')}
    for key in ('ignored', 'objects', 'ignored', 'objects'):
        coco = open_coco(cfg.data_root, 'train', crowds[key], cfg.cache_dir)
        assert coco.photos[0].annotations[0].iscrowd == (key == 'ignored') and coco.competition is crowds[key]


def test_an_index_that_cannot_be_made_leaves_nothing(cfg):
    (cfg.data_root / 'train_all.json').write_text('{')
    with pytest.raises(BadInput, match='not JSON'):
        open_train(cfg)
    assert [path.suffix for path in cfg.cache_dir.iterdir()] == ['.lock']


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
def test_shards_hold_the_same(tiny, tmp_path, monkeypatch, task):
    write_overlaps(tmp_path / 'data', SIZES, task=task)
    paths = {'data_root': tmp_path / 'data', 'competition': read_competition(tmp_path / 'data')}
    one, many = (
        tiny.model_copy(update=paths | {'cache_size': 0, 'cache_dir': tmp_path / name}) for name in 'ab'
    )
    whole = open_cache(one, 'train')
    monkeypatch.setattr('data.cache.SHARD_PHOTOS', 2)
    open_cache(many, 'train')
    cache = pickle.loads(pickle.dumps(open_cache(many, 'train')))
    count = len(whole)
    assert len(cache.photos.paths) == -(-count // 2) and len(cache) == count
    assert cache.photos.shapes == whole.photos.shapes and cache.masks.shapes == whole.masks.shapes
    for row in (*range(count), -1):
        assert np.array_equal(cache.photos[row], whole.photos[row])
        assert np.array_equal(cache.masks[row], whole.masks[row])
    assert len([*cache.photos]) == count
    with pytest.raises(AssertionError):
        cache.photos.shard(0)[0] = 0  # a file that is only read
    monkeypatch.setattr('utils.ragged.MOST_OPEN', 1)
    kept = [cache.masks[row] for row in range(count)]  # views of files that are not held open
    assert all(np.array_equal(mask, whole.masks[row]) for row, mask in enumerate(kept))
    cache.photos.paths[1].unlink()
    with pytest.raises(BadInput, match=r'00001/photos\.npy'):
        open_cache(many, 'train')


def test_shards_are_bounded(monkeypatch):
    monkeypatch.setattr('data.cache.SHARD_VALUES', 100)
    monkeypatch.setattr('data.cache.SHARD_PHOTOS', 4)
    assert split_shards([(5, 5)] * 9) == [0, 4, 8]
    assert split_shards([(5, 10)] * 5) == [0, 2, 4]
    assert split_shards([(50, 50), (1, 1), (50, 50), (50, 50)]) == [0, 1, 2, 3]


@pytest.mark.parametrize('error', [KeyboardInterrupt, BadInput])
def test_a_build_that_stopped_goes_on_with_the_next_shard(cfg, monkeypatch, error):
    whole = [
        *open_cache(cfg.model_copy(update={'cache_dir': cfg.cache_dir.with_name('other')}), 'train').photos
    ]
    monkeypatch.setattr('data.cache.SHARD_PHOTOS', 2)
    seen = []

    def read(coco, photo):
        seen.append(photo.file_name)
        if len(seen) == 4:
            raise error('stop')
        return read_photo(coco, photo)

    monkeypatch.setattr('data.cache.read_photo', read)
    with pytest.raises(error):
        open_cache(cfg, 'train')
    partial = next(cfg.cache_dir.glob('.train-*.partial'))
    assert [path.name for path in partial.iterdir()] == ['00000'] and not list(cfg.cache_dir.glob('train-*'))
    (partial / '.00001').mkdir()  # as a process leaves it that is killed at once
    (partial / '.00001' / 'photos.npy').write_text('half')
    cache = open_cache(cfg, 'train')
    assert sorted(set(seen[4:])) == cache.names(np.arange(2, 6)) and not partial.exists()
    assert all(np.array_equal(*pair) for pair in zip(cache.photos, whole, strict=True))


def test_a_photo_by_a_link_that_leads_out_is_not_cached(cfg, tmp_path):
    open_train(cfg)
    shutil.move(cfg.data_root / 'batch_01', tmp_path / 'elsewhere')
    (cfg.data_root / 'batch_01').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(BadInput, match='leads out of'):
        open_cache(cfg, 'train')
    assert not list(cfg.cache_dir.glob('train-*'))


@pytest.mark.slow
def test_bench_of_large_sets(tmp_path, capsys):
    scale.command(['--photos', '40', '--out', str(tmp_path), '--workers', '1'])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row[10:32].strip() for row in rows] == list(scale.STEPS) and not list(tmp_path.iterdir())
    assert all(float(row.split()[-1]) > 0.01 for row in rows)
