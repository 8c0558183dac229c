"""Every shipped config trains and predicts: with a small encoder of its family, and at its real size with
`pytest -m slow tests/test_configs.py`.
"""

import gc
import resource
from pathlib import Path

import pytest
import torch
from operations import Operations
from small_networks import narrow

from config import Config, load_config
from engine.inference import main_logits, view_logits
from losses import segmentation_loss
from metrics import IGNORED
from models import SegModel
from networks.mask2former import Queries

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*.yaml'))
SMALL = {
    'beit': narrow('beit_base_patch16_224'),
    'convnext': 'test_convnext.r160_in1k',
    'hrnet': 'hrnet_w18_small',
    'mit': 'mit_b0',
    'resnet': narrow('resnet18'),
    'swin': narrow('swin_tiny_patch4_window7_224'),
    'tf_efficientnet': 'tf_efficientnet_lite0',
    'twins': narrow('twins_svt_small'),
    'vit_large_patch16_384': narrow('vit_tiny_patch16_224'),
    'vit_large_patch16_dinov3': narrow('vit_small_patch16_dinov3'),
}


def small(path: Path) -> Config:
    """Load a config, and give it a small encoder of the same family and a narrow head."""
    cfg = load_config(path)
    update = {
        'encoder': next(name for family, name in SMALL.items() if cfg.encoder.startswith(family)),
        'encoder_weights': 'none',
        'crop_size': 64,
        'window': min(cfg.window, 64),
    }
    if cfg.features:
        update['features'] = (3, 6, 9, 12)
    if not cfg.head.startswith('smp-'):
        update['head_channels'] = 64
    if cfg.head == 'mask2former':
        update['queries'] = 20
    return cfg.model_copy(update=update)


def loss_of(model: SegModel, cfg: Config, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(images)
    return segmentation_loss(outputs, mask, model.loss_weights, cfg.loss, class_weights=cfg.class_weights)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_predicts_at_any_size(path, deterministic):
    torch.manual_seed(0)
    cfg = small(path)
    model = SegModel(cfg).train()
    images = torch.randn(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[:, 16:48, 16:48] = 3  # only classes 0 and 3 are present
    with Operations() as operations:
        loss_of(model, cfg, images, mask).backward()
    assert not operations.refused
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in learning if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert loss_of(model, cfg, images, torch.full_like(mask, IGNORED)).isfinite()
    model.eval()
    with torch.inference_mode():
        assert len(model(images)) == len(model.loss_weights) - (model.presence is not None)
        for height, width in ((32, 32), (64, 64), (96, 96), (64, 96)):
            logits = view_logits(model, torch.randn(1, 3, height, width), cfg.window)
            stride = height // logits.shape[2]
            assert stride in (1, 2, 4, 8, 32) and logits.shape == (1, 11, height // stride, width // stride)


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_at_its_real_size(path):
    """Run forward and backward at the config's crop in under 20 GB, and predict at 256 to 768."""
    cfg = load_config(path).model_copy(update={'encoder_weights': 'none'})
    model = SegModel(cfg).eval()  # BatchNorm cannot train on one image
    side = cfg.crop_size
    mask = torch.randint(0, 11, (1, side, side))
    loss = segmentation_loss(model(torch.randn(1, 3, side, side)), mask, model.loss_weights, cfg.loss)
    loss.backward()
    assert loss.isfinite()
    model.zero_grad(set_to_none=True)
    with torch.inference_mode():
        for height, width in ((256, 256), (384, 384), (512, 512), (640, 640), (768, 768), (512, 768)):
            logits = view_logits(model, torch.randn(1, 3, height, width), cfg.window)
            assert logits.shape[:2] == (1, 11) and logits.isfinite().all()
    del model
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB, the most of all configs so far
    print(f'{path.stem}: peak {peak:.1f} GB')
    assert peak < 20


def test_main_logits_of_logits_and_queries():
    logits = torch.zeros(1, 2, 4, 4)
    queries = Queries(torch.randn(1, 3, 5), torch.randn(1, 3, 2), torch.randn(1, 2, 4, 4))
    assert main_logits([None, logits]) is logits
    assert torch.equal(main_logits([None, queries]), queries.logits())
