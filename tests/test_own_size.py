"""Prediction of photos of any size: from infer.py to thresholds, pseudo-labels and ONNX."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from overlaps import write_overlaps

import ensemble
import evaluate
import infer
import pseudo
from config import Config, dump_config, load_config
from data.cache import open_cache
from data.folds import held_out_hash, read_folds, split_fold
from data.planes import unpack
from dataset import WholePhotos
from engine import own_photos
from engine.checkpoint import load_run, save_checkpoint
from metrics import IGNORED, count_pixels
from models import SegModel
from submission import metric_of, open_probs
from tools import export_onnx, search_tta
from tools.export_onnx import MaskModel, compare_onnx, to_onnx
from utils.errors import BadInput
from utils.plotting import overlay
from utils.ragged import map_ragged
from voting.thresholds import read_histograms, read_thresholds, threshold_counts

SIZES = [(96, 128), (100, 70), (64, 64), (96, 128), (50, 90), (64, 64), (96, 128), (100, 70)]


def make_runs(root: Path, task: str, **changes) -> Config:
    """Write a set of photos of several sizes, and two folds of an untrained network; return their config."""
    write_overlaps(root / 'data', SIZES, test=2, task=task)
    folders = {key: str(root / key.split('_')[0]) for key in ('data_root', 'cache_dir', 'output_dir')}
    loss = {'bce': 1.0} if task == 'multilabel' else {'ce': 1.0}
    values = {**TINY, **folders, 'cache_size': 0, 'image_size': 0, 'loss': loss, **changes}
    (root / 'own.yaml').write_text(yaml.safe_dump(values))
    cfg = load_config(root / 'own.yaml')
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    for k in (0, 1):
        torch.manual_seed(k)
        cfg.run_dir(k).mkdir(parents=True)
        (cfg.run_dir(k) / 'config.yaml').write_text(dump_config(cfg))
        held_out = held_out_hash(cache, split_fold(folds, k)[1])
        content = {'model': SegModel(cfg, load_weights=False).state_dict(), 'fold': k, 'held_out': held_out}
        content |= {'config': cfg.model_dump(mode='json'), 'epoch': 0, 'score': 0.5}
        save_checkpoint(cfg.run_dir(k) / 'best.pt', content)
    return cfg


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
def test_masks_and_probabilities_have_each_photos_own_size(tmp_path, task, capsys):
    cfg = make_runs(tmp_path, task, tta_flips=['h'])
    score = infer.main(cfg, None, 'oof', save_probs=True)
    assert 'Dice 0.' in capsys.readouterr().out
    cache, folder = open_cache(cfg, 'train'), cfg.output_dir / cfg.name
    counts = []
    with cache.coco.form.reader(folder / 'oof.csv') as reader:
        probs = open_probs(reader, cache.coco.form)
        for row, photo in enumerate(cache.coco.photos):
            mask = reader.read(photo.file_name)
            assert mask.shape[-2:] == photo.size and probs[row].shape == (len(cfg.classes), *photo.size)
            expected = probs[row] >= 128 if task == 'multilabel' else probs[row].argmax(0)
            assert (mask != expected).mean() < 0.05  # but for two of one byte
            counts.append(count_pixels(cache.truth(row), mask, len(cfg.classes)))
    assert float(metric_of(cfg.competition).score(np.stack(counts))) == pytest.approx(score, abs=1e-9)
    infer.main(cfg, None, 'test', save_probs=True)
    for k in (0, 1):
        infer.main(cfg, k, 'test', save_probs=True)
    test = open_cache(cfg, 'test')
    shapes = [(len(cfg.classes), *photo.size) for photo in test.coco.photos]
    mean, *of_folds = (
        map_ragged(path / 'test_probs.npy', shapes) for path in (folder, cfg.run_dir(0), cfg.run_dir(1))
    )
    for row in range(len(test)):
        average = np.mean([probs[row].astype(float) for probs in of_folds], 0)
        assert np.abs(mean[row] - average).max() <= 1
    test.coco.form.check(folder / 'test.csv')


def test_thresholds_from_the_histograms_to_the_masks(tmp_path, capsys):
    cfg = make_runs(tmp_path, 'multilabel')
    words = ['--cfg', str(tmp_path / 'own.yaml'), '--fold', 'all', '--split']
    infer.command([*words, 'oof', '--save-probs'])
    folder, cache = cfg.output_dir / cfg.name, open_cache(cfg, 'train')
    assert capsys.readouterr().out.splitlines()[-1].endswith(f'thresholds {folder} --data {cfg.data_root}')
    histograms = read_histograms(folder / 'oof_histograms.npy', 3)
    with cache.coco.form.reader(folder / 'oof.csv') as reader:
        probs = open_probs(reader, cache.coco.form)
    for row in range(len(cache)):
        assert np.array_equal(histograms[row], threshold_counts(probs[row], cache.truth(row)))

    infer.command([*words, 'test'])
    before = (folder / 'test.csv').read_bytes()
    evaluate.command(['thresholds', str(folder), '--data', str(cfg.data_root)])
    content = yaml.safe_load((folder / 'thresholds.yaml').read_text())
    content |= {'used': True, 'thresholds': [0.01, 0.99, 0.5], 'by_fold': {0: [0.99] * 3, 1: [0.01] * 3}}
    (folder / 'thresholds.yaml').write_text(yaml.safe_dump(content))
    assert [read_thresholds(folder, 3, fold)[0] for fold in (None, 0, 1)] == [0.01, 0.99, 0.01]
    infer.command([*words, 'oof'])
    infer.command([*words, 'test'])
    assert (folder / 'test.csv').read_bytes() != before
    test = open_cache(cfg, 'test')
    with test.coco.form.reader(folder / 'test.csv') as reader:
        for name in reader.image_ids:
            assert [plane.mean() for plane in reader.read(name)[:2]] == [1, 0]
    for fold, share in ((0, 0), (1, 1)):
        with cache.coco.form.reader(cfg.run_dir(fold) / 'oof.csv') as reader:
            assert all((reader.read(name) == share).all() for name in reader.image_ids)
    assert read_histograms(folder / 'oof_histograms.npy', 3).tolist() == histograms.tolist()
    capsys.readouterr()
    evaluate.command(['thresholds', str(folder), '--data', str(cfg.data_root)])
    out = capsys.readouterr().out
    assert 'made with other thresholds than thresholds.yaml has, until' in out and 'fold0/oof.csv' in out
    vote = ['--out', str(tmp_path / 'vote.csv'), '--data', str(cfg.data_root)]
    ensemble.main([str(folder / 'test.csv'), *vote])
    assert f'until they are predicted again: {folder}/test.csv\n' in capsys.readouterr().out
    infer.command([*words, 'test'])
    ensemble.main([str(folder / 'test.csv'), *vote])
    assert 'predicted again' not in capsys.readouterr().out


def test_what_competition_yaml_says_after_training(tmp_path):
    cfg = make_runs(tmp_path, 'multilabel', cache_size=128, loss={'dice': 1.0})
    path = cfg.data_root / 'competition.yaml'
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {'task': 'multiclass'}))
    with pytest.raises(BadInput, match='best.pt: was trained with task multilabel, but .* says multiclass'):
        infer.main(load_config(tmp_path / 'own.yaml'), 0, 'test')
    path.write_text(yaml.safe_dump(values | {'score_size': 64, 'submission': {}}))
    cfg = load_config(tmp_path / 'own.yaml')
    infer.main(cfg, 0, 'test')
    assert open_cache(cfg, 'test').coco.form.check(cfg.run_dir(0) / 'test.csv').shape == (3,)


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
@pytest.mark.parametrize('window', [0, 64])
def test_picture_of_one_photo_and_the_search_of_views(tmp_path, task, window, capsys):
    cfg = make_runs(tmp_path, task, window=window)
    name = str(cfg.data_root / '000.png')
    infer.command(['--cfg', str(tmp_path / 'own.yaml'), '--fold', 'all', '--image', name])
    assert f'{name}: ' in capsys.readouterr().out
    assert (cfg.output_dir / 'own/000_overlay.png').exists()
    views = cfg.model_copy(update={'tta_flips': ('h',)})
    sets = search_tta.list_sets(views)
    tally = search_tta.count(views, 0, sets)
    for number, flips in enumerate(((), ('h',))):
        score = infer.main(cfg.model_copy(update={'tta_flips': flips}), 0, 'oof')
        found = metric_of(cfg.competition).score(tally.counts[:, number])
        assert float(found) == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize('soft', [False, True])
def test_labels_of_classes_that_overlap_leave_out_what_is_in_doubt(tmp_path, soft, capsys):
    changes = {'pseudo_soft': True} if soft else {'pseudo_threshold': 0.55}
    cfg = make_runs(tmp_path, 'multilabel', **changes)
    teachers = [pseudo.Teacher(cfg, 0, 1.0)]
    cache = open_cache(cfg, 'test')
    pseudo.label(cfg, teachers, cache, tmp_path, torch.device('cpu'))
    masks = map_ragged(tmp_path / 'pseudo_masks.npy', cache.masks.shapes)
    infer.main(cfg, 0, 'test', save_probs=True)
    shapes = [(3, *photo.size) for photo in cache.coco.photos]
    probs = map_ragged(cfg.run_dir(0) / 'test_probs.npy', shapes)
    for row in range(len(cache)):
        planes, values = unpack(masks[row], 3), probs[row] / 255
        assert set(np.unique(planes)) <= ({0, 1} if soft else {0, 1, IGNORED})
        known = planes != IGNORED
        assert np.abs(values[known & (planes == 1)] - 1).max(initial=0) <= (0.51 if soft else 0.46)
        assert values[known & (planes == 0)].max(initial=0) <= (0.51 if soft else 0.46)
        if soft:
            sure = np.load(tmp_path / pseudo.CONFIDENCE_FILE, mmap_mode='r')
            assert sure.min() >= 127
        else:
            assert np.abs(values[~known] - 0.5).max(initial=0) < 0.06


def test_share_of_the_surest_labels_of_classes_that_overlap(tmp_path, capsys):
    cfg = make_runs(tmp_path, 'multilabel', pseudo_keep=0.3)
    cache = open_cache(cfg, 'test')
    pseudo.label(cfg, [pseudo.Teacher(cfg, 0, 1.0)], cache, tmp_path, torch.device('cpu'))
    masks = map_ragged(tmp_path / 'pseudo_masks.npy', cache.masks.shapes)
    known = [unpack(masks[row], 3).reshape(3, -1) != IGNORED for row in range(len(cache))]
    assert ((share := np.concatenate(known, 1).mean(1)) >= 0.3).all() and (share < 0.6).all()
    assert 'red up to 0.' in capsys.readouterr().out


def test_photos_of_any_folder_are_labelled(tmp_path):
    cfg = make_runs(tmp_path, 'multiclass')
    with pytest.raises(BadInput, match='has no test.json, which lists the photos; python prepare.py test'):
        pseudo.main(cfg, 0, pseudo.Labelling(['own'], photos=tmp_path))
    write_overlaps(tmp_path / 'more', [(40, 60)] * 3, test=2, seed=7, task='multiclass')
    pseudo.main(cfg, 0, pseudo.Labelling(['own'], photos=tmp_path / 'more'))
    shapes = [(40, 60)] * 2
    assert len(map_ragged(cfg.output_dir / 'own-pseudo/fold0/pseudo_masks.npy', shapes)) == 2


def test_threshold_of_doubt_that_is_none(tmp_path):
    cfg = make_runs(tmp_path, 'multilabel', pseudo_threshold=0.5)
    with pytest.raises(BadInput, match='expected more than 0.5 where classes may overlap'):
        pseudo.main(cfg, 0, pseudo.Labelling(['own']))


@pytest.mark.slow
@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
def test_onnx_of_photos_that_are_not_square(tmp_path, task):
    cfg = make_runs(tmp_path, task)
    run, cache = load_run(cfg, 0, torch.device('cpu')), open_cache(cfg, 'train')
    rows = export_onnx.rows_of_one_size(cache, np.arange(len(cache)), cfg)
    assert {cache.photos.shapes[row] for row in rows} == {(96, 128, 3)}
    model = MaskModel(run.model, run.cfg, run.thresholds).eval()
    photos = WholePhotos(cache, rows, 0)
    export = to_onnx(model, photos)
    agreement = compare_onnx(export.content, model, photos, 2)
    assert agreement.same_class > 0.999
    card = export_onnx.model_card(run, agreement, export, tmp_path)
    assert '| `photos` | (N, 3, 96, 128) uint8 |' in card and '.resize((128, 96))' in card
    masks = '(N, 3, 96, 128)' if task == 'multilabel' else '(N, 96, 128)'
    assert f'| `masks` | {masks} uint8 |' in card and 'Dice 0.5000 on the photos of fold 0' in card
    assert ('| 0 | red | 0.5 |' in card) == (task == 'multilabel')


@pytest.mark.parametrize('count', [0, 3])
def test_picture_in_bands_is_that_of_the_whole_photo(monkeypatch, count):
    monkeypatch.setattr(own_photos, 'BAND_ROWS', 40)
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (150, 90, 3), np.uint8)
    mask = np.kron(rng.integers(0, 4, (15, 9), np.uint8), np.ones((10, 10), np.uint8))
    if count:
        mask = np.stack([(mask == k).astype(np.uint8) for k in range(count)])
    large = own_photos.LargeMask((150, 90), count or 4)
    for top, stop in ((0, 70), (70, 150)):
        large.add(top, mask[..., top:stop, :])
    assert np.array_equal(own_photos.draw_overlay(photo, large.rows), overlay(photo, mask))
