"""Tiles and bands of rows: averages by Gaussian weights, bits that no batch changes, and little memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from overlaps import write_overlaps
from torch import nn

from config import Config, load_config, read_competition
from data.cache import open_cache
from engine import inference
from engine.checkpoint import Run
from engine.distributed import Ranks
from engine.inference import (
    decide,
    evaluate,
    group_by_shape,
    mean_band,
    photo_bands,
    photo_probs,
    predict_rows,
    predict_shard,
    predict_shard_by_folds,
    to_mask,
)
from engine.tiles import Scale, even_bands, merge_tiles, resize_rows, resize_stream, tile_starts
from engine.writer import Predictions
from metrics import count_pixels
from models import SegModel
from networks.layers import resize
from submission import mask_format
from voting.origin import Origin

SIZES = [(96, 150), (96, 150), (70, 40), (64, 64), (96, 150), (33, 200), (64, 64), (40, 40)]


class RampModel(nn.Module):
    """Logits that are a pixel's own colours, plus how far to the right it is in what the model sees."""

    fixed_size, mean, std = None, (0.5, 0.4, 0.3), (0.25, 0.25, 0.5)

    def __init__(self, ramp: float = 1.0) -> None:
        super().__init__()
        self.ramp = nn.Parameter(torch.tensor(ramp))

    def forward(self, images):
        return [images + self.ramp * torch.linspace(0, 1, images.shape[-1])]


def make_config(root: Path, task: str = 'multilabel', sizes=SIZES, **changes) -> Config:
    """Write a set of three classes and return a config of it, at each photo's own size."""
    if not (root / 'data').exists():
        names = ('red', 'green', 'blue') if task == 'multilabel' else ('red', 'green')
        write_overlaps(root / 'data', sizes, names, task=task)
    folders = {key: root / key.split('_')[0] for key in ('data_root', 'cache_dir', 'output_dir')}
    values = {**TINY, 'cache_size': 0, 'image_size': 0, **folders, **changes}
    (root / 'x.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in values.items()))
    return load_config(root / 'x.yaml')


def collect(bands) -> dict[int, np.ndarray]:
    """Put the bands of each photo together."""
    parts: dict[int, list] = {}
    for band in bands:
        assert band.top == sum(part.shape[-2] for part in parts.setdefault(band.position, []))
        parts[band.position].append(band.probs.numpy())
    return {position: np.concatenate(part, axis=-2) for position, part in parts.items()}


def colours_to_logits(photo: np.ndarray) -> np.ndarray:
    """What RampModel sees of a photo (H, W, 3): (3, H, W) float64."""
    return ((photo / 255 - RampModel.mean) / RampModel.std).transpose(2, 0, 1)


def to_probs(logits: np.ndarray, is_multilabel: bool) -> np.ndarray:
    """Sigmoid or softmax, in NumPy."""
    if is_multilabel:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits)
    return powers / powers.sum(0)


def test_tiles_cover_a_photo_evenly_and_overlap_by_half():
    assert tile_starts(64, 64) == tile_starts(40, 64) == [0]
    assert tile_starts(65, 64) == [0, 1]
    assert tile_starts(150, 64) == [0, 29, 57, 86]
    for length in range(65, 500, 7):
        starts = tile_starts(length, 64)
        assert starts[0] == 0 and starts[-1] == length - 64
        assert all(0 < b - a <= 33 for a, b in pairwise(starts))


@pytest.mark.parametrize('size', [(7, 9), (14, 5), (20, 31), (3, 4), (50, 9), (7, 100)], ids=str)
def test_rows_are_resized_as_the_whole_map_is(size):
    maps = torch.randn(2, 3, 7, 9)
    expected = resize(maps, size, antialias=True)
    scale = Scale(7 / size[0], 9 / size[1])
    for step in (1, 2, size[0]):
        bands = [range(top, min(top + step, size[0])) for top in range(0, size[0], step)]
        rows = torch.cat([resize_rows(maps, scale, band, size[1]) for band in bands], -2)
        torch.testing.assert_close(rows, expected, rtol=0, atol=5e-6)
    for heights in ([7], [1] * 7, [3, 1, 3]):
        given = list(resize_stream(maps[0].split(heights, 1), (7, 9), size))
        assert [top for top, _ in given] == [sum(r.shape[1] for _, r in given[:n]) for n in range(len(given))]
        torch.testing.assert_close(torch.cat([rows for _, rows in given], 1), expected[0], rtol=0, atol=5e-6)


def test_rows_are_resized_in_an_exported_graph():
    """Which rows they need is known before any value is, as torch.export asks for."""

    class Rows(nn.Module):
        def forward(self, maps):
            return resize_rows(maps, Scale(0.75, 0.9), range(12), 10)

    maps = torch.randn(2, 3, 9, 9)
    graph = torch.export.export(Rows(), (maps,), strict=False).module()
    torch.testing.assert_close(graph(maps), Rows()(maps))


def test_map_that_goes_on_beyond_what_is_shown():
    """Two thirds of the rows and half of the columns of a map are those of the photo."""
    maps = torch.arange(12.0).view(12, 1) + torch.arange(10.0) * 100
    rows = resize_rows(maps[None], Scale(8 / 16, 5 / 10), range(16), 10)[0]
    whole = resize(maps[None, None], (24, 20))[0, 0]
    torch.testing.assert_close(rows, whole[:16, :10])


def test_bands_have_one_height():
    parts = [(0, torch.zeros(1, 5, 2)), (5, torch.zeros(1, 1, 2)), (6, torch.zeros(1, 8, 2))]
    for rows, expected in ((4, [(0, 4), (4, 4), (8, 4), (12, 2)]), (20, [(0, 14)])):
        assert [(top, band.shape[1]) for top, band in even_bands(parts, 14, rows)] == expected


@pytest.mark.parametrize(('size', 'tile'), [((50, 90), (32, 32)), ((20, 90), (20, 32)), ((90, 33), (32, 32))])
@pytest.mark.parametrize('chunk', [1, 2, 100])
def test_tiles_are_averaged_by_gaussian_weights(size, tile, chunk):
    rng = np.random.default_rng(0)
    tiles = {
        (top, left): rng.random((3, *tile), np.float32)
        for top in tile_starts(size[0], tile[0])
        for left in tile_starts(size[1], tile[1])
    }
    asked = []

    def predict(corners):
        asked.extend(corners)
        assert len(corners) <= chunk
        return torch.from_numpy(np.stack([tiles[corner] for corner in corners]))

    found = torch.cat(list(merge_tiles(predict, size, tile, chunk)), 1).numpy()
    assert asked == list(tiles)
    total, weights = np.zeros((3, *size)), np.zeros(size)
    for (top, left), probs in tiles.items():
        for y in range(tile[0]):
            for x in range(tile[1]):
                distance = sum(
                    ((z - (side - 1) / 2) / (side / 8)) ** 2 for z, side in ((y, tile[0]), (x, tile[1]))
                )
                weight = np.exp(-distance / 2)
                total[:, top + y, left + x] += weight * probs[:, y, x]
                weights[top + y, left + x] += weight
    np.testing.assert_allclose(found, total / weights, atol=1e-6)


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
def test_tiled_probabilities_of_a_model_with_known_logits(tmp_path, task):
    cfg = make_config(tmp_path, task, window=64, tta_flips='[h]')
    cache = open_cache(cfg, 'train')
    found = collect(predict_rows(RampModel(), cache, np.arange(len(cache)), cfg))
    assert sorted(found) == list(range(len(cache)))
    for row in (0, 5):  # larger than a tile in both sides, and in one
        photo = cache.photos[row]
        (height, width), logits = photo.shape[:2], colours_to_logits(photo)
        tall, wide = min(64, height), 64
        total, weights = np.zeros((3, height, width)), np.zeros((height, width))
        gauss = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in (tall, wide)]
        weight, ramp = np.outer(*gauss), np.linspace(0, 1, 64)
        for top in tile_starts(height, tall):
            for left in tile_starts(width, wide):
                tile = logits[:, top : top + tall, left : left + wide]
                views = [to_probs(tile + r, cfg.competition.is_multilabel) for r in (ramp, ramp[::-1])]
                total[:, top : top + tall, left : left + wide] += weight * np.mean(views, 0)
                weights[top : top + tall, left : left + wide] += weight
        np.testing.assert_allclose(found[row], total / weights, atol=2e-6)


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
@pytest.mark.parametrize('window', [0, 64])
def test_nothing_is_squashed_and_padding_counts_nowhere(tmp_path, task, window):
    """A model that sees each pixel alone gives each photo its own colours back, whatever its shape."""
    cfg = make_config(tmp_path, task, window=window)
    cache = open_cache(cfg, 'train')
    model, rows = RampModel(0.0), np.arange(len(cache))
    for row, probs in collect(predict_rows(model, cache, rows, cfg)).items():
        assert probs.shape == (3, *cache.coco.photos[row].size)
        expected = to_probs(colours_to_logits(cache.photos[row]), cfg.competition.is_multilabel)
        np.testing.assert_allclose(probs, expected, atol=2e-6)
        run = Run(model, cfg, None, 0, 0, 0.0, (0.5,) * 3)
        np.testing.assert_allclose(photo_probs(run, cache.photos[row]), expected, atol=2e-6)
    counts = evaluate(model, cache, rows, cfg, Ranks.alone())
    for row, probs in collect(predict_rows(model, cache, rows, cfg)).items():
        mask = to_mask(torch.from_numpy(probs), cfg)
        assert np.array_equal(counts[row], count_pixels(cache.truth(row), mask, 3))


def test_bits_are_the_same_at_any_batch_size_and_rank(tmp_path):
    cfg = make_config(tmp_path, window=64, tta_flips='[h]')
    cache, rows = open_cache(cfg, 'train'), np.array([5, 0, 2, 4])
    torch.manual_seed(0)
    run = Run(SegModel(cfg, load_weights=False).eval(), cfg, None, 0, 0, 0.0, (0.5,) * 3)
    expected = collect(predict_rows(run.model, cache, rows, cfg))
    for size in (1, 3):
        other = cfg.model_copy(update={'infer_batch_size': size})
        found = collect(predict_rows(run.model, cache, rows, other))
        assert all(np.array_equal(found[position], expected[position]) for position in expected)
    found = {}
    for rank in (0, 1):
        found |= collect(predict_shard(run, cache, rows, Ranks(rank, 2, torch.device('cpu')), True, ''))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[position], expected[position]) for position in expected)


@pytest.mark.parametrize('window', [0, 64])
def test_folds_are_averaged_band_by_band(tmp_path, window):
    """All folds predict a batch or a tile before any predicts the next; the sum is in their order."""
    cfg = make_config(tmp_path, window=window, folds=3, infer_batch_size=2)
    cache, rows, seen = open_cache(cfg, 'train'), np.array([5, 0, 2, 4]), []
    runs = [Run(RampModel(ramp), cfg, None, 0, 0, 0.0, (0.5,) * 3) for ramp in (0.1, 0.7, 1.3)]
    for k, run in enumerate(runs):
        run.model.register_forward_hook(lambda *_, k=k: seen.append(k))
    found = collect(map(mean_band, predict_shard_by_folds(runs, cache, rows, Ranks.alone(), True, '')))
    changes = [k for k, before in zip(seen, [None, *seen], strict=False) if k != before]
    assert len(changes) >= 9 and changes == [0, 1, 2] * (len(changes) // 3)
    one, two, three = (collect(predict_rows(run.model, cache, rows, cfg)) for run in runs)
    for position in found:
        expected = (one[position] + two[position] + three[position]) / 3
        assert np.array_equal(found[position], expected)


def test_planes_wait_for_the_csv_as_bits(tmp_path):
    """Nine classes need two bytes a pixel, and come back from the CSV as they were."""
    names = tuple('abcdefghi')
    sub = {'columns': {'i': 'image', 'c': 'class', 'm': 'mask'}}
    planes = write_overlaps(tmp_path / 'data', [(30, 40), (21, 33)], names, test=0, submission=sub)
    form = mask_format(read_competition(tmp_path / 'data'), {name: p.shape[1:] for name, p in planes.items()})
    with Predictions(tmp_path / 'test.csv', [*planes], form, False, Ranks.alone(), Origin({}, {})) as files:
        assert files.arrays['masks'].array.nbytes == 2 * (30 * 40 + 21 * 33)
        for position, mask in enumerate(planes.values()):
            files.write(position, mask[:, :11], None)
            files.write(position, mask[:, 11:], None, top=11)
    with form.reader(tmp_path / 'test.csv') as reader:
        assert all(np.array_equal(reader.read(name), mask) for name, mask in planes.items())


def test_photos_of_one_shape_are_batched_together():
    shapes = [(1, 2), (1, 2), (3, 4), (1, 2), (3, 4), (5, 6)]
    assert group_by_shape(shapes, 2) == [[0, 1], [2, 4], [3], [5]]
    assert group_by_shape([(1, 1)] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_thresholds_decide_on_each_class_by_itself(tmp_path):
    cfg = make_config(tmp_path)
    probs = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1)
    assert decide(probs, cfg).ravel().tolist() == [0, 1, 1]
    assert decide(probs, cfg, (0.2, 0.6, 0.71)).ravel().tolist() == [1, 0, 0]


@pytest.mark.parametrize('size', [96, 256])
def test_photos_that_are_not_square_become_squares_that_are_scored(tmp_path, size):
    """Tiled or not, at a score_size of 32 the mask is every so many-th pixel of the stretched photo."""
    write_overlaps(tmp_path / 'data', SIZES, ('red', 'green'), task='multiclass', score_size=32)
    for window in (0, 64):
        cfg = make_config(tmp_path, 'multiclass', cache_size=size, image_size=size, window=window)
        cache = open_cache(cfg, 'train')
        for row, probs in collect(predict_rows(RampModel(0.0), cache, np.arange(len(cache)), cfg)).items():
            assert probs.shape == (3, 32, 32)
            logits = torch.from_numpy(colours_to_logits(cache.photos[row]))
            square = resize(logits[None], (size, size), antialias=True)[0].numpy()
            expected = to_probs(square, False)[:, :: size // 32, :: size // 32]
            np.testing.assert_allclose(probs, expected, atol=0.1 if window else 1e-5)


def peak_memory(reset: bool = False) -> int:
    """Return the most memory this process had in bytes since the last reset."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


@pytest.mark.parametrize(('side', 'most'), [(2500, 60), pytest.param(10_000, 300, marks=pytest.mark.slow)])
def test_memory_grows_with_the_tile(tmp_path, monkeypatch, side, most):
    """MiB above those before, beside the photo itself; the probabilities are 72 and 1,144 MiB."""
    monkeypatch.setattr(inference, 'BAND', 1 << 20)
    monkeypatch.setattr(inference, 'TILE_PIXELS', 1)
    cfg = make_config(tmp_path, window=256)
    photo = np.zeros((side, side, 3), np.uint8)
    photo[:] = 100  # so that it is in memory
    run = Run(RampModel(), cfg, None, 0, 0, 0.0, (0.5,) * 3)
    before, rows = peak_memory(reset=True), 0
    for top, probs in photo_bands(run, photo):
        assert top == rows and probs.shape[0] == 3 and probs.numel() <= inference.BAND
        rows += probs.shape[1]
    assert rows == side
    used = (peak_memory() - before) / 2**20
    assert used < most
