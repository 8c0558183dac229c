"""Training on photos of mixed sizes, whose classes may overlap: samples, checks, and that it learns."""

import numpy as np
import pytest
import torch
from overlaps import write_overlaps
from test_cache import config_of

import train
from data.cache import Cache, open_cache
from data.planes import pack, unpack
from dataset import TrainingSet, keep_pixels, unpack_masks
from engine.checkpoint import load_run
from engine.distributed import Ranks
from engine.inference import evaluate
from engine.sanity import check_classes, check_first_batch, check_labels, describe_labels
from metrics import IGNORED
from models import SegModel
from submission import metric_of
from utils.errors import BadInput, CheckFailed
from utils.log import log

SIZES = [(48, 64), (64, 48), (40, 64), (64, 64), (56, 64), (64, 32), (200, 90)]
MIXES = dict.fromkeys(['mosaic', 'cutmix', 'copy_paste', 'balance', 'crop_balance', 'rot90'], 1.0)
FILL = (5, 6, 7)
LEARN = dict(
    encoder='test_resnet.r160_in1k',
    head='smp-unet',
    head_channels=512,
    aux_weight=0,
    image_size=64,
    epochs=18,
    batch_size=6,
    lr=0.01,
    loss={'ce': 1, 'dice': 1},
    dropout=0.0,
    scale_range=(1.0, 1.0),
    crop_max_share=1,
    photometric=0,
    hflip=0,
)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that are logged."""
    lines = []
    monkeypatch.setattr(log, 'warning', lines.append)
    return lines


def samples_of(cfg, count=6):
    return TrainingSet(cfg, open_cache(cfg, 'train'), np.arange(count), FILL)


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
@pytest.mark.parametrize('keys', [{}, MIXES], ids=['plain', 'mixed'])
@pytest.mark.parametrize('image_size', [0, 64])
def test_samples_of_photos_of_mixed_sizes(tmp_path, task, keys, image_size):
    """Photo and mask fit together: where a class is, its channel is bright; beside it nothing is known."""
    write_overlaps(tmp_path / 'data', SIZES, task=task)
    plain = {'scale_range': (0.5, 1.0), 'photometric': 0.0, 'crop_max_share': 1.0}
    samples = samples_of(config_of(tmp_path, cache_size=0, image_size=image_size, **plain, **keys))
    for index in [(epoch, position) for epoch in range(3) for position in range(6)]:
        image, mask, position = samples[index]
        assert image.shape == (3, 64, 64) and 0 <= position < 6
        assert mask.shape == ((64, 64, 2) if task == 'multilabel' else (64, 64))
        again = samples[index]
        assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
        beside = (image == torch.tensor(FILL)[:, None, None]).all(0)
        planes = unpack_masks(mask[None], 3)[0]
        ignored = planes == IGNORED if task == 'multiclass' else (planes == IGNORED).all(0)
        assert (ignored != beside).float().mean() < (0.02 if keys else 1e-9)  # edges of what is pasted blend
        bright, true = image > 130, planes == 1
        if task == 'multiclass':
            bright, true = bright.any(0, keepdim=True), (planes > 0)[None]
        assert (bright == true)[:, ~beside].float().mean() > 0.85


def test_only_a_part_of_a_large_photo_is_mixed(tmp_path):
    write_overlaps(tmp_path / 'data', [(300, 400), (400, 300)] * 2)
    keys = {'cache_size': 0, 'image_size': 0, 'scale_range': (0.5, 2.0), **MIXES}
    samples = samples_of(config_of(tmp_path, **keys), 3)
    rng = np.random.default_rng(0)
    photo, mask = samples.mix(samples.pixels(0, rng), rng)
    assert photo.shape == (128, 128, 3) and mask.shape == (128, 128, 2)  # what a crop shows at scale 0.5
    whole = samples_of(config_of(tmp_path, **keys | {'image_size': 64}), 3)
    assert whole.mix(whole.pixels(0, rng), rng)[0].shape == (300, 400, 3)


@pytest.mark.parametrize('num_classes', [1, 8, 11])
def test_planes_are_unpacked_on_the_device(num_classes):
    rng = np.random.default_rng(0)
    planes = rng.choice(np.array([0, 1, IGNORED], np.uint8), (2, num_classes, 5, 7))
    packed = torch.from_numpy(np.stack([pack(one) for one in planes]))
    found = unpack_masks(packed, num_classes)
    assert found.dtype == torch.uint8 and np.array_equal(found, planes)
    ids = torch.zeros(2, 5, 7, dtype=torch.uint8)
    assert unpack_masks(ids, num_classes) is ids


def test_soft_pseudo_labels_are_kept_by_class(tmp_path):
    write_overlaps(tmp_path / 'data', [(48, 64)] * 4)
    cfg = config_of(tmp_path, cache_size=0)
    cache = open_cache(cfg, 'train')
    confidence = np.zeros((3, 48, 64, 3), np.uint8)
    confidence[..., 1], confidence[..., 2] = 255, 51  # a fifth
    soft = Cache(cache.coco, cache.photos, cache.masks, confidence)
    samples = TrainingSet(cfg, cache, np.arange(0), FILL, soft)
    planes = unpack(samples.pixels(0, np.random.default_rng(0))[1], 3)
    assert (planes[0] == IGNORED).all() and np.array_equal(planes[1], unpack(cache.masks[0], 3)[1])
    assert 0.15 < (planes[2] != IGNORED).mean() < 0.25
    kept = np.array([[True, False]])
    assert keep_pixels(np.array([[3, 4]], np.uint8), kept).tolist() == [[3, IGNORED]]


def test_first_batch_of_overlapping_classes(tmp_path, warnings):
    write_overlaps(tmp_path / 'data', SIZES)
    cfg = config_of(tmp_path, cache_size=0, image_size=64)
    model = SegModel(cfg, load_weights=False)
    check_first_batch(model, samples_of(cfg), cfg, torch.device('cpu'), range(6))
    assert not warnings
    planes = np.zeros((2, 3, 8, 8), np.uint8)
    planes[:, 0, :4], planes[:, 1, :2] = 1, IGNORED
    assert describe_labels(planes, cfg) == '8.3% ignored; red 50.0%'
    assert (
        describe_labels(planes * 0, cfg) == '0.0% ignored; no object' and 'without an object' in warnings[0]
    )
    with pytest.raises(CheckFailed, match=r'found the labels \[2\], expected 0 to 1, or 255'):
        check_labels(planes + 1, 3)
    check_classes([{0, 1}], cfg)
    assert warnings[1] == 'warning: no training photo has blue'


def test_head_of_one_class_a_pixel_is_refused(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES)
    with pytest.raises(BadInput, match='mask2former gives each pixel one class, but .*task: multilabel'):
        SegModel(config_of(tmp_path, cache_size=0, head='mask2former'), load_weights=False)


def test_kernels_of_overlapping_classes_are_told_so(tmp_path):
    for task in ('multilabel', 'multiclass'):
        write_overlaps(tmp_path / 'data', SIZES, task=task)
        cfg = config_of(tmp_path, cache_size=0, head='knet')
        assert SegModel(cfg, load_weights=False).head.stages[0].overlapping == (task == 'multilabel')


def test_loss_of_overlapping_classes_is_refused_without_them(tmp_path):
    write_overlaps(tmp_path / 'data', SIZES, task='multiclass')
    with pytest.raises(BadInput, match='bce is for classes that may overlap .* expected ce'):
        config_of(tmp_path, cache_size=0, loss={'bce': 1})


@pytest.mark.parametrize('task', ['multilabel', 'multiclass'])
def test_it_learns(tmp_path, task):
    write_overlaps(tmp_path / 'data', SIZES, task=task)
    cfg = config_of(tmp_path, cache_size=0, **LEARN)
    train.main(cfg, -1)
    cache = open_cache(cfg, 'train')
    model = load_run(cfg, -1, torch.device('cpu')).model
    counts = evaluate(model, cache, np.arange(len(cache)), cfg, Ranks.alone())
    assert metric_of(cfg.competition).score(counts) > 0.9
    text = (cfg.run_dir(-1) / 'log.txt').read_text()
    assert 'fold -1: 6 train, 0 valid, classes red 6, green 6, blue 6' in text
