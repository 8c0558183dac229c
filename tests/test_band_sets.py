"""Test data sets of other bands than RGB from end to end: check, cache, training, resume, prediction."""

import json
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

import infer
import train
from config import load_config, read_competition
from data.cache import open_cache, with_statistics
from data.check import check_data
from data.coco import read_coco, sizes_of
from engine.checkpoint import load_checkpoint
from models import SegModel
from submission import mask_format
from utils.errors import BadInput

SIDE = 64
CLASSES = ('Background', 'crop', 'water', 'road')
SIGNATURES = np.array([[300, 500, 700, 900, 1100, 1300]] * 4) + np.diag([0, 900, -250, 1700], k=2)[:4, :6]


def draw(seed: int) -> tuple[np.ndarray, list[dict]]:
    """Draw a photo of six bands and rectangles, each of a class that one band alone tells; and its labels."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 120, (SIDE, SIDE, 6)) + SIGNATURES[0]
    annotations = []
    for k, (top, left) in zip((1, 2, 3), rng.permutation([(0, 0), (0, 32), (32, 0), (32, 32)]), strict=False):
        h, w = rng.integers(18, 30, 2)
        box = slice(top, top + h), slice(left, left + w)
        photo[box] = rng.integers(0, 120, (h, w, 6)) + SIGNATURES[k]
        x, y, right, bottom = (int(v) for v in (left, top, left + w, top + h))
        polygon = [x, y, right, y, right, bottom, x, bottom]
        annotations.append({'category_id': k, 'iscrowd': 0, 'area': int(h * w), 'segmentation': [polygon]})
    return photo.clip(0, 4000).astype(np.uint16), annotations


def write_set(root: Path, save, end: str, train: int = 12, test: int = 3) -> Path:
    """Write a data root of photos of six bands and 16 bits, without competition.yaml."""
    (root / 'p').mkdir(parents=True)
    images, annotations = [], []
    for n in range(train + test):
        photo, found = draw(n)
        save(root / f'p/{n:02d}.{end}', photo)
        images.append({'id': n, 'file_name': f'p/{n:02d}.{end}', 'height': SIDE, 'width': SIDE})
        annotations += [{'id': len(annotations) + i, 'image_id': n, **one} for i, one in enumerate(found)]
    categories = [{'id': k, 'name': name} for k, name in enumerate(CLASSES) if k]
    known = [one for one in annotations if one['image_id'] < train]
    content = {'images': images[:train], 'categories': categories, 'annotations': known}
    (root / 'train_all.json').write_text(json.dumps(content))
    (root / 'test.json').write_text(json.dumps({'images': images[train:]}))
    return root


def save_tiff(path: Path, photo: np.ndarray) -> None:
    options = {'photometric': 'minisblack', 'extrasample': 0, 'compression': 'lzw', 'predictor': True}
    path.write_bytes(imagecodecs.tiff_encode(photo, planarconfig='contig', **options))


def write_competition(root: Path, **values) -> None:
    values = {'classes': [*CLASSES], 'score_size': 'own', **values}
    (root / 'competition.yaml').write_text('\n'.join(f'{k}: {json.dumps(v)}' for k, v in values.items()))


def config_of(root: Path, tmp_path: Path, **changes):
    keys = {
        **TINY, 'data_root': root, 'cache_dir': tmp_path / 'cache', 'output_dir': tmp_path / 'output',
        'cache_size': 0, 'image_size': 64, 'epochs': 7, 'lr': 6e-3, 'crop_max_share': 1,
        'scale_range': [1.0, 1.0], 'batch_size': 2, 'photometric': 0, **changes,
    }  # fmt: skip
    path = tmp_path / 'bands.yaml'
    path.write_text('\n'.join(f'{key}: {value}' for key, value in keys.items()))
    return load_config(path)


def check(root: Path) -> list[str]:
    """Check a data root for two folds; return the remarks."""
    return check_data(root, read_competition(root), 2)[0]


@pytest.mark.parametrize(('end', 'save'), [('tif', save_tiff), ('npy', np.save)])
def test_a_set_of_six_bands_and_16_bits_from_check_to_csv(tmp_path, capsys, end, save):
    root = write_set(tmp_path / 'data', save, end)
    write_competition(root)
    with pytest.raises(BadInput) as error:
        check(root)
    assert 'found photos of 6 bands, expected 3; write channels: 6; depth: 16; intensity: [[' in str(
        error.value
    )
    settings = str(error.value).split('write ')[1].split(' into ')[0]
    with (root / 'competition.yaml').open('a') as file:
        file.write('\n' + settings.replace('; ', '\n'))
    competition = read_competition(root)
    assert (competition.channels, competition.depth, len(competition.intensity)) == (6, 16, 6)
    check(root)
    out = capsys.readouterr().out
    low, high = competition.intensity[4]
    assert 'bands: 6\n  band 1: values of' in out and f'band 5: values of {low:g} to {high:g}\n' in out

    cfg = config_of(root, tmp_path, epochs=7 if end == 'tif' else 1)
    score = train.main(cfg, 0)
    assert score > 0.05 or end == 'npy'  # 0 if all is background
    trained = load_config(cfg.run_dir(0) / 'config.yaml')
    cache = open_cache(cfg, 'train')
    pixels = np.concatenate([cache.photos[row].reshape(-1, 6) for row in range(len(cache))]) / 65535
    assert cache.photos[0].dtype == np.uint16
    assert trained.mean == pytest.approx(pixels.mean(0)) and trained.std == pytest.approx(pixels.std(0))
    assert load_checkpoint(cfg.run_dir(0) / 'best.pt')['config']['mean'] == list(trained.mean)

    for split, count in (('oof', 6), ('test', 3)):
        found = infer.main(cfg, 0, split)
        assert split == 'test' or found == pytest.approx(score, abs=1e-6)
        path = cfg.run_dir(0) / f'{split}.csv'
        form = mask_format(
            competition, sizes_of(read_coco(root, split.replace('oof', 'train'), competition).photos)
        )
        with form.reader(path) as reader:
            masks = [reader.read(image_id) for image_id in reader.image_ids]
        assert [mask.shape for mask in masks] == [(SIDE, SIDE)] * count
    picture = infer.predict_photo(cfg, 0, root / f'p/12.{end}', None, tta=False)
    assert Image.open(picture).size == (SIDE, SIDE)
    with pytest.raises(BadInput, match='mean'):
        train.main(cfg.model_copy(update={'mean': (0.5,) * 6}), 0, resume=True)


def test_a_resumed_run_compares_the_statistics(tmp_path):
    root = write_set(tmp_path / 'data', np.save, 'npy', train=6)
    write_competition(root, channels=6, depth=16, intensity=[0, 5000])
    cfg = config_of(root, tmp_path, epochs=1)
    train.main(cfg, 0)
    train.main(cfg.model_copy(update={'epochs': 1}), 0, resume=True)
    resolved = with_statistics(cfg, open_cache(cfg, 'train'))
    assert resolved.mean == load_config(cfg.run_dir(0) / 'config.yaml').mean
    assert with_statistics(resolved, None) is resolved
    assert SegModel(resolved).fill == tuple(round(65535 * value) for value in resolved.mean)


def test_check_on_slices(tmp_path, capsys):
    root = tmp_path / 'data'
    root.mkdir()
    images = []
    for volume in 'ab':
        for n in (3, 4, 5, 7):
            name = f'{volume}_{n:02d}.png'
            Image.fromarray(np.random.default_rng(n).integers(0, 255, (SIDE, SIDE), np.uint8)).save(
                root / name
            )
            images.append({'id': len(images), 'file_name': name, 'height': SIDE, 'width': SIDE})
    one = draw(0)[1]
    annotations = [{'id': n, 'image_id': n, **one[n % 3]} for n in range(8)]
    categories = [{'id': k, 'name': name} for k, name in enumerate(CLASSES) if k]
    content = {'images': images, 'categories': categories, 'annotations': annotations}
    (root / 'train_all.json').write_text(json.dumps(content))
    write_competition(root, slices={'offsets': [-1, 0, 1]})
    (remark,) = (line for line in check(root) if 'slices' in line)
    assert 'slices: 2 volumes; 6 photos without all neighbours, which' in capsys.readouterr().out
    assert r'separate slices of one volume; write group: ^(.*?)_?(\d+)\.\w+$ into ' in remark
    write_competition(root, slices={'offsets': [-1, 0, 1]}, group='^(.)')
    assert not [line for line in check(root) if 'slices' in line]
    write_competition(root, slices={'offsets': [-1, 0, 1]}, group=r'(\d)\.png')
    assert 'slices of one volume are in several groups of `group`' in check(root)
    cache = open_cache(config_of(root, tmp_path), 'train')
    own = [np.asarray(Image.open(root / f'a_{n:02d}.png')) for n in (3, 4, 5)]
    assert np.array_equal(cache.photos[1], np.dstack(own))
    assert np.array_equal(cache.photos[0], np.dstack([own[0], own[0], own[1]]))
