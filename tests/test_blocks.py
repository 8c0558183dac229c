"""The blocks that a GPU runs faster: the same values and gradients, one kernel, and no change of layout."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import mix_transformer
from small_networks import narrow
from timm.models import beit, convnext, swin_transformer, twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.roofline
from engine.roofline import cuda_autocast, fake_cuda, fused_attention, run_model
from losses import segmentation_loss
from models import SegModel
from networks.blocks import ConvNeXtBlock, as_autocast, use_fast_blocks

MASK = torch.where(torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.3, 0.0, -100.0)
ATTENTION = {
    'swin': (swin_transformer.WindowAttention, {'num_heads': 4, 'window_size': 4}, 16, (MASK,)),
    'swin, not square': (swin_transformer.WindowAttention, {'num_heads': 2, 'window_size': (2, 5)}, 10, ()),
    'twins, padded': (twins.LocallyGroupedAttn, {'num_heads': 4, 'ws': 7}, 150, ((10, 15),)),
    'mit': (mix_transformer.Attention, {'num_heads': 4, 'qkv_bias': True, 'sr_ratio': 2}, 24, (4, 6)),
    'mit, not reduced': (mix_transformer.Attention, {'num_heads': 4, 'qk_scale': 0.5}, 24, (4, 6)),
}


@pytest.mark.parametrize('case', ATTENTION)
def test_fused_attention_gives_the_values_and_gradients_of_the_original(case):
    cls, options, tokens, args = ATTENTION[case]
    torch.manual_seed(0)
    original = cls(32, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = copy.deepcopy(original)
    use_fast_blocks(nn.Sequential(fast), case)
    x, grad = torch.randn(2, 8, tokens, 32).unbind()
    values = [original(x, *args), fast.fused(x, args) if 'mit' in case else fast.fused(x, *args)]
    assert (values[1] - values[0]).abs().max() < 1e-5 * values[0].abs().max()
    assert torch.equal(fast(x, *args), values[0])  # on a CPU, to the bit
    pairs = zip(values, (original, fast), strict=True)
    gradients = [torch.autograd.grad(y, list(module.parameters()), grad) for y, module in pairs]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
    assert fast.state_dict().keys() == original.state_dict().keys()


def test_beit_has_the_same_biases_and_gradients_of_them():
    attention = beit.Attention(32, 4, window_size=(3, 4))
    nn.init.normal_(attention.relative_position_bias_table)
    looked_up = attention._get_rel_pos_bias()
    use_fast_blocks(nn.Sequential(attention), 'beit')
    windows = attention.window_bias()
    assert torch.equal(looked_up, windows) and torch.equal(looked_up, attention._get_rel_pos_bias())
    grad = torch.randn_like(windows)
    table = attention.relative_position_bias_table
    one, other = (torch.autograd.grad(bias, table, grad)[0] for bias in (looked_up, windows))
    assert (one - other).abs().max() < 1e-5


def test_swin_shifts_and_splits_its_map_in_bf16_with_the_same_bits():
    torch.manual_seed(0)
    block = swin_transformer.SwinTransformerBlock(32, (10, 12), 4, window_size=4, shift_size=2)
    x = torch.randn(2, 10, 12, 32)
    with torch.autocast('cpu', torch.bfloat16):
        expected = block(x)
        use_fast_blocks(nn.Sequential(block), 'swin')
        assert torch.equal(block(x), expected) and as_autocast(x).dtype == torch.bfloat16
    assert as_autocast(x) is x


def train_convnext(kind: str, steps: int = 12) -> list[float]:
    """Train a small ConvNeXt on one batch; return the losses."""
    torch.manual_seed(0)
    blocks = [convnext.ConvNeXtBlock(16, ls_init_value=0.3) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), *blocks, nn.Conv2d(16, 4, 1))
    use_fast_blocks(model, 'convnext_large.dinov3_lvd1689m' if kind == 'bf16 sum' else 'convnext')
    for block in blocks:
        assert isinstance(block, ConvNeXtBlock) and block.bf16_sum == (kind == 'bf16 sum')
        block.forward = block.forward if kind == 'fp32' else block.narrow
    coarse = torch.rand(2, 3, 4, 4)
    images = F.interpolate(coarse, (32, 32)) - 0.5 + torch.randn(2, 3, 32, 32) / 5
    masks = F.interpolate(coarse.argmax(1, keepdim=True).float(), (32, 32))[:, 0].to(torch.uint8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(steps):
        with torch.autocast('cpu', torch.bfloat16, enabled=kind != 'fp32'):
            logits = model(images)
        loss = segmentation_loss([logits], masks, [1.0], {'ce': 1})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_convnext_in_bf16_trains_as_in_fp32():
    fp32, norm, total = (torch.tensor(train_convnext(kind)) for kind in ('fp32', 'bf16 norm', 'bf16 sum'))
    assert fp32[-1] < 0.8 * fp32[0]
    assert (norm - fp32).abs().max() < 0.01 * fp32[0] and (total - fp32).abs().max() < 0.02 * fp32[0]


# --- on a GPU, whose tensors are fake here: they have a layout, but no memory -------------------------------

SWIN, TWINS = narrow('swin_tiny_patch4_window7_224'), narrow('twins_svt_small')
CONVNEXT = 'test_convnext.r160_in1k'


@pytest.mark.parametrize(
    'encoder, head, calls', [(SWIN, 'fcn', 8), (TWINS, 'fcn', 8), ('mit_b0', 'smp-fpn', 8)]
)
def test_a_gpu_gets_attention_that_its_fused_kernels_take(tiny, monkeypatch, encoder, head, calls):
    shapes = []

    def spy(query, key, value, *args, **kwargs):
        shapes.extend((x.dim(), x.stride(-1), x.dtype) for x in (query, key, value))
        return fused_attention(query, key, value, *args, **kwargs)

    channels = {'head_channels': 512} if 'smp' in head else {}
    cfg = tiny.model_copy(update={'encoder': encoder, 'head': head, **channels})
    monkeypatch.setattr(engine.roofline, 'fused_attention', spy)
    with fake_cuda(cfg) as (model, _):
        run_model(model, cfg, 2)
    assert shapes == [(4, 1, torch.bfloat16)] * (3 * calls)


@pytest.mark.parametrize('name, dtype', [('convnext', torch.float32), ('x.dinov3_y', torch.bfloat16)])
def test_convnext_adds_its_blocks_up_as_its_weights_were_trained(name, dtype):
    with FakeTensorMode(), torch.device('cuda'), cuda_autocast():
        block = convnext.ConvNeXtBlock(16)
        use_fast_blocks(nn.Sequential(block), name)
        assert block(torch.empty(1, 16, 8, 8)).dtype == dtype


# --- NHWC ---------------------------------------------------------------------------------------------------


class Changes(TorchDispatchMode):
    """Count the copies and sums of large maps that have one layout in memory and then another."""

    watched = ('clone', '_to_copy', 'copy_', 'cat', 'add')

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    @staticmethod
    def layouts(tensors: tuple) -> set[str]:
        maps = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.dim() == 4]
        maps = [t for t in maps if t.shape[1] >= 16 and t.shape[2] * t.shape[3] >= 144]
        nhwc = {'NHWC' for t in maps if t.is_contiguous(memory_format=torch.channels_last)}
        return nhwc | {'NCHW' for t in maps if t.is_contiguous()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix('aten::')
        if name in self.watched and len(self.layouts(args) | self.layouts(out)) == 2:
            self.counts[name] += 1
        return out


HEADS = {  # with the changes in the backward pass
    'upernet': {},
    'fcn_hrnet': {},
    'ocr': {},
    'setr_naive': {},
    'knet': {'add': 3},  # the gradient of a map by which einsum multiplies the kernels of a stage
}


@pytest.mark.parametrize('head', HEADS)
def test_large_maps_stay_nhwc_in_both_passes(tiny, head):
    encoder = 'vit_tiny_patch16_224' if head == 'setr_naive' else CONVNEXT
    update = {'encoder': encoder, 'head': head, 'head_channels': 64, 'aux_channels': 64, 'crop_size': 96}
    update |= {'neck': 'none'} if head == 'setr_naive' else {}
    model = SegModel(tiny.model_copy(update=update)).train().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    with Changes() as forward:
        outputs = model(images)
    with Changes() as backward:
        sum(logits.square().mean() for logits in outputs).backward()
    assert (forward.counts, backward.counts) == ({}, HEADS[head])


@pytest.mark.parametrize('encoder', [SWIN, CONVNEXT, 'resnet18', 'tf_efficientnet_lite0'])
def test_large_maps_of_an_encoder_stay_nhwc(tiny, encoder):
    model = SegModel(tiny.model_copy(update={'encoder': encoder})).to(memory_format=torch.channels_last)
    with Changes() as changes, torch.no_grad():
        model(torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last))
    assert changes.counts == {}
