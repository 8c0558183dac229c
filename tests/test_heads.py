"""Every head: shapes, gradients, sizes. test_reference.py compares their numbers with mmsegmentation's."""

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch import Tensor, nn

from losses import segmentation_loss
from networks.heads import FCN, HEADS, KNet
from networks.layers import adaptive_avg_pool, resize

WIDTHS = [8, 16, 24, 32]
OPTIONS = {'channels': 16, 'dropout': 0.1}  # every head takes these


def make_feats(h: int = 16, w: int = 16, n: int = 2, isotropic: bool = False) -> list[Tensor]:
    """Make features of images of 4h x 4w; isotropic ones, as of a plain ViT, all have stride 16."""
    strides = [4] * 4 if isotropic else [1, 2, 4, 8]
    return [torch.randn(n, c, -(-h // s), -(-w // s)) for c, s in zip(WIDTHS, strides, strict=True)]


def make_head(name: str, **options) -> tuple[nn.Module, bool]:
    torch.manual_seed(0)
    return HEADS[name](WIDTHS, 11, **(OPTIONS | options)), name == 'setr_naive'


OUTPUTS = {  # name: strides relative to the finest feature, and loss weights
    'fcn': ([8], [1.0]),
    'fcn_hrnet': ([1], [1.0]),
    'knet': ([1, 1, 1, 1], [1.0, 1.0, 1.0, 1.0]),
    'ocr': ([1, 1], [0.4, 1.0]),
    'setr_naive': ([1], [1.0]),
    'upernet': ([1], [1.0]),
}


def test_every_head_is_tested():
    assert OUTPUTS.keys() | {'mask2former'} == HEADS.keys()  # test_mask2former.py


@pytest.mark.parametrize('name', OUTPUTS)
def test_outputs_are_the_same_in_training_and_evaluation(name):
    head, isotropic = make_head(name)
    strides, loss_weights = OUTPUTS[name]
    assert [*head.loss_weights] == loss_weights
    for mode in (True, False):
        outputs = head.train(mode)(make_feats(isotropic=isotropic))
        assert [tuple(x.shape) for x in outputs] == [(2, 11, 16 // s, 16 // s) for s in strides]


@pytest.mark.parametrize('name', OUTPUTS)
@pytest.mark.parametrize('overlapping', [False, True])
def test_every_parameter_gets_a_gradient_under_bf16(name, overlapping):
    head, isotropic = make_head(name, **({'overlapping': overlapping} if name == 'knet' else {}))
    mask = torch.randint(0, 11, (2, 64, 64), dtype=torch.uint8)
    if overlapping:
        mask = torch.randint(0, 2, (2, 11, 64, 64), dtype=torch.uint8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = head.train()(make_feats(isotropic=isotropic))
    segmentation_loss(outputs, mask, head.loss_weights).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize('name', OUTPUTS)
@pytest.mark.parametrize('size', [(8, 8), (24, 40), (17, 23)])
@torch.no_grad()
def test_any_size_and_a_single_image(name, size):
    head, isotropic = make_head(name)
    feats = make_feats(*size, n=1, isotropic=isotropic)
    logits = head.eval()(feats)[-1]
    expected = {'fcn': feats[-1], 'setr_naive': feats[-1].repeat(1, 1, 4, 4)}.get(name, feats[0])
    assert logits.shape == (1, 11, *expected.shape[-2:]) and logits.isfinite().all()


@pytest.mark.parametrize('name', OUTPUTS)
@torch.no_grad()
def test_evaluation_does_not_mix_images(name):
    head, isotropic = make_head(name)
    feats = make_feats(isotropic=isotropic)
    for module in head.modules():  # so that kernels and logits differ from image to image
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    batch_logits = head.eval()(feats)[-1]
    second_logits = head([feat[1:] for feat in feats])[-1]
    torch.testing.assert_close(batch_logits[1:], second_logits, rtol=0, atol=1e-5)
    assert not torch.allclose(batch_logits[:1], second_logits, atol=1e-2)


@torch.no_grad()
def test_fcn_can_join_its_input():
    with_input, without = (FCN(WIDTHS, 11, **OPTIONS, concat_input=flag) for flag in (True, False))
    assert with_input.fuse.conv.in_channels == WIDTHS[-1] + 16 and without.fuse is None


@pytest.mark.parametrize('stages', [1, 5])
@torch.no_grad()
def test_stages_of_knet(stages):
    head, _ = make_head('knet', stages=stages)
    assert len(head(make_feats())) == len(head.loss_weights) == 1 + stages


@torch.no_grad()
def test_knet_sums_a_whole_image_in_fp16():
    """Sum 4,096 pixels with features near 20, more than fp16 can hold (65,504)."""
    head, _ = make_head('knet')
    nn.init.constant_(head.stages[0].transform.bias, 20.0)
    masks = torch.zeros(1, 11, 64, 64)
    masks[:, 3] = 100.0  # the whole image is class 3
    with torch.autocast('cpu', dtype=torch.float16):
        kernels, masks = head.stages[0](torch.zeros(1, 16, 64, 64), torch.randn(1, 11, 16), masks)
    assert kernels.isfinite().all() and masks.isfinite().all()


@torch.no_grad()
def test_kernels_of_overlapping_classes_read_the_same_pixels():
    """With sigmoids the kernel of a class that is everywhere reads what it would read if it were alone."""
    x, kernels = torch.randn(1, 16, 8, 8), torch.randn(1, 11, 16)
    masks = torch.full((1, 11, 8, 8), -100.0)
    masks[:, 3] = 100.0
    both = masks.clone()
    both[:, 5] = 100.0
    for overlapping in (True, False):
        stage = make_head('knet', overlapping=overlapping)[0].stages[0]
        groups = []
        stage.updater.register_forward_hook(lambda _, inputs, out, seen=groups: seen.append(inputs[0]))
        for one in (masks, both):
            stage(x, kernels, one)
        same = torch.equal(*(group.reshape(1, 11, 16)[:, 3] for group in groups))
        assert same == overlapping


def test_knet_has_the_width_of_the_paper():
    """Check 512 channels, 2,048 in the feed-forward layers, and 256 in the updater."""
    with torch.device('meta'):
        stage = KNet([192, 384, 768, 1536], 11).stages[0]
    assert stage.ffn[0].out_features == 2048 and stage.updater.out[0].out_features == 256


def test_batch_of_one_image_is_refused():
    head, _ = make_head('upernet')
    with pytest.raises(ValueError, match='batch_size of 2 or more'):
        head.train()(make_feats(n=1))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'channels': 12}, 'found 12 channels, expected a multiple of 8'),
        ({'activation': 'tanh'}, "found activation 'tanh'"),
    ],
)
def test_wrong_options_of_knet_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_head('knet', **options)


@pytest.mark.parametrize('grid', [1, 2, 3, 6])
@pytest.mark.parametrize('size', [(16, 16), (3, 7)])
def test_deterministic_pooling_is_torchs(grid, size, deterministic):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, requires_grad=True)
    expected, found = F.adaptive_avg_pool2d(x, grid), adaptive_avg_pool(x, grid)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((weights * pooled).sum(), x)[0] for pooled in (expected, found)]
    assert torch.allclose(*gradients, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.allclose(adaptive_avg_pool(x, grid), expected, atol=1e-6)


def test_torch_resizes_deterministically_on_other_devices(deterministic):
    """Look at the device meta: operations.NOT_DETERMINISTIC leaves bilinear resizing to F.interpolate."""
    x = torch.randn(2, 3, 4, 4, device='meta', requires_grad=True)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        with Operations() as operations:
            resize(x, (8, 8)).sum().backward()
        assert ('upsample_bilinear2d_backward' in operations.names) != deterministic
