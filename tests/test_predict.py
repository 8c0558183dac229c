"""Prediction: views and windows, downsampled probabilities, ranks, and the files that infer.py writes."""

import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import file_limit
from processes import ended, start, typed
from torch import nn
from torch._dynamo.testing import CompileCounter

import infer
import train
from data.cache import open_cache
from engine.distributed import Ranks
from engine.inference import Evaluation, Predictor, evaluate, view_logits, window_starts
from models import SegModel
from submission import downsample_ids, downsample_probs
from utils.errors import BadInput, Interrupted
from utils.files import lock
from utils.id_csv import read_masks


class PixelModel(nn.Module):
    """Logits that are a pixel's own colours, at a quarter of the size or at all of it."""

    def __init__(self, fixed_size: int | None = None, stride: int = 1) -> None:
        super().__init__()
        self.fixed_size, self.stride, self.seen = fixed_size, stride, []

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        return [images[:, :, :: self.stride, :: self.stride]]


def test_windows_cover_the_view_and_overlap_by_a_third():
    assert window_starts(512, 512) == [0]
    assert window_starts(768, 512) == [0, 256]
    assert window_starts(1280, 512) == [0, 341, 682, 768]
    for length in range(512, 2000, 32):
        starts = window_starts(length, 512)
        assert starts[-1] == length - 512 and all(b - a <= 341 for a, b in pairwise(starts))


@torch.no_grad()
def test_views_of_one_shape_go_through_the_model_together(tiny):
    flips = {'tta_flips': ('h',), 'tta_rotations': (90,), 'tta_scales': (1.0, 1.5), 'infer_batch_size': 7}
    model, sizes = SegModel(tiny).eval(), []
    predictor = Predictor.of(model, tiny.model_copy(update=flips))
    images = torch.randn(2, 3, 64, 96)
    one_by_one = list(predictor.logits_of_views(images))
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    together = predictor.stacked_logits(images)
    assert len(together) == len(one_by_one) == 8
    assert sorted(sizes) == [(4, 3, 64, 96), (4, 3, 96, 64), (4, 3, 96, 128), (4, 3, 128, 96)]
    for one, other in zip(one_by_one, together, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < 1e-5 * one.abs().max()


def test_workers_of_the_validation_stay(tiny):
    cfg = tiny.model_copy(update={'workers': 1, 'infer_batch_size': 2})
    cache, rows, models = open_cache(cfg, 'train'), np.arange(5), [SegModel(cfg) for _ in range(2)]
    evaluation, workers = Evaluation(cache, rows, cfg, Ranks.alone()), []
    for model in models:
        counts = evaluation.count(model)
        assert (counts == evaluate(model, cache, rows, tiny, Ranks.alone())).all()
        workers.append([worker.pid for worker in evaluation.batches.loader._iterator._workers])
    assert workers[0] == workers[1] and len(workers[0]) == 1


@pytest.mark.parametrize(('height', 'width'), [(64, 96), (160, 128), (64, 64), (32, 96), (32, 32)])
def test_slid_logits_are_in_their_places(height, width):
    images = torch.randn(2, 3, height, width)
    model = PixelModel(fixed_size=64)
    assert torch.allclose(view_logits(model, images, window=0), images, atol=1e-6)
    assert set(model.seen) == {(64, 64)}


def test_window_of_the_config_slides_over_larger_views_alone():
    model = PixelModel(stride=4)
    assert view_logits(model, torch.zeros(1, 3, 64, 32), window=64).shape == (1, 3, 16, 8)
    assert view_logits(model, torch.zeros(1, 3, 96, 96), window=64).shape == (1, 3, 96, 96)
    assert view_logits(model, torch.zeros(1, 3, 96, 96), window=0).shape == (1, 3, 24, 24)
    assert model.seen[0] == (64, 32) and set(model.seen[1:-1]) == {(64, 64)} and model.seen[-1] == (96, 96)


@pytest.mark.parametrize('text', ['x', '-2', '1.5', '', '0x1'])
def test_fold_of_infer_is_a_number_or_all(text, capsys, tiny_yaml):
    with pytest.raises(SystemExit) as stop:
        infer.command(['--cfg', str(tiny_yaml), f'--fold={text}', '--split', 'oof'])
    assert stop.value.code == 2 and 'expected a fold from 0, -1, or all' in capsys.readouterr().err


def test_fold_of_infer_beyond_the_last(tiny_yaml):
    with pytest.raises(BadInput, match='expected 0 to 1, -1 or all'):
        infer.command(['--cfg', str(tiny_yaml), '--fold', '2', '--split', 'oof'])


def test_probabilities_of_a_photo_are_the_same_through_windows_that_see_it_whole():
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32))
    assert torch.equal(view_logits(PixelModel(), images, 64), view_logits(PixelModel(64), images, 0))


@pytest.mark.parametrize('rule', ['nearest', 'prob_mean', 'block_max'])
def test_downsampled_probabilities_are_those_of_the_whole_photo(tiny, rule):
    torch.manual_seed(0)
    model = SegModel(tiny, load_weights=False).eval()
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    cfg = tiny.model_copy(update={'tta_flips': ('h',), 'tta_scales': (1.0, 1.5)})
    with torch.inference_mode():
        whole, small = (Predictor.of(model, cfg).batch(photos, (512, 512), r) for r in (None, rule))
    assert torch.allclose(whole.sum(1), torch.ones(2, 512, 512), atol=1e-5)
    torch.testing.assert_close(small, downsample_probs(whole, rule), rtol=0, atol=1e-6)
    ids = [downsample_ids(probs.argmax(1), rule) for probs in (small, downsample_probs(whole, rule))]
    assert torch.equal(*ids)


def test_ranks_share_prediction_and_write_one_set_of_files(tiny, tiny_yaml, tmp_path):
    """On the CPU: the same CSVs and probabilities as one process, byte for byte."""
    for fold in (0, 1):
        train.main(tiny, fold)
    first, said = tmp_path / 'first', tmp_path / 'said.txt'
    for fold, split in ((None, 'oof'), (0, 'test'), (None, 'test')):
        infer.main(tiny, fold, split, save_probs=True)
    shutil.copytree(tiny.output_dir, first)
    for words in (['all', 'oof'], ['0', 'test'], ['all', 'test']):
        options = ['--cfg', str(tiny_yaml), '--fold', words[0], '--split', words[1], '--save-probs']
        assert ended(start(typed, infer.command, *options, ranks=2, said=said)) == [0, 0], said.read_text()
    written = sorted(
        path.relative_to(first) for path in first.glob('**/*') if path.suffix in ('.csv', '.npy')
    )
    assert len([path for path in written if path.name != 'metrics.csv']) == 12
    for path in written:
        assert (first / path).read_bytes() == (tiny.output_dir / path).read_bytes(), path
    assert not list(tiny.output_dir.glob('**/*.partial'))


def test_merged_predictions_are_those_of_the_folds(tiny):
    for fold in (0, 1):
        train.main(tiny, fold)
    infer.main(tiny, None, 'oof', save_probs=True)
    merged, probs = (tiny.output_dir / tiny.name / f'oof{end}' for end in ('.csv', '_probs.npy'))
    names = list(read_masks(merged))
    for fold in (0, 1):
        masks = read_masks(tiny.run_dir(fold) / 'oof.csv')
        for row, (name, mask) in enumerate(masks.items()):
            assert np.array_equal(read_masks(merged)[name], mask)
            fold_probs = np.load(tiny.run_dir(fold) / 'oof_probs.npy', mmap_mode='r')[row]
            assert np.array_equal(np.load(probs, mmap_mode='r')[names.index(name)], fold_probs)


def test_all_folds_write_what_each_writes_alone(tiny):
    for fold in (0, 1):
        train.main(tiny, fold)
        infer.main(tiny, fold, 'test', save_probs=True)
    files = [tiny.run_dir(k) / name for k in (0, 1) for name in ('test.csv', 'test_probs.npy')]
    alone = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    infer.main(tiny, None, 'test', save_probs=True)
    assert [path.read_bytes() for path in files] == alone


def test_two_predictions_of_one_folder(tiny):
    train.main(tiny, 0)
    busy = pytest.raises(BadInput, match=f'process {os.getpid()} is predicting test here now')
    with lock(tiny.run_dir(0) / '.test.lock', 'predicting test'), busy:
        infer.main(tiny, 0, 'test')
    infer.main(tiny, 0, 'test')


def test_no_room_for_probabilities(tiny):
    train.main(tiny, 0)
    infer.main(tiny, 0, 'test')
    before = (tiny.run_dir(0) / 'test.csv').read_bytes()
    with file_limit(1 << 20), pytest.raises(Interrupted, match='GiB: cannot be written: File too large'):
        infer.main(tiny, 0, 'test', save_probs=True)
    assert (tiny.run_dir(0) / 'test.csv').read_bytes() == before
    assert not list(tiny.run_dir(0).glob('.*partial'))


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['test_convnext.r160_in1k', 'swin_tiny_patch4_window7_224.ms_in22k'])
def test_a_compiled_model_is_one_graph_and_keeps_its_names(tiny, encoder):
    update = {'encoder': encoder, 'head': 'knet', 'image_size': 64, 'crop_size': 64}
    model, counter = SegModel(tiny.model_copy(update=update)), CompileCounter()
    names = list(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    train = torch.compile(model, backend=counter, fullgraph=True)  # raises at a break of the graph
    for _ in range(2):
        train(images)
    assert counter.frame_count == 1 and list(model.state_dict()) == names
