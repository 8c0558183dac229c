"""The roofline model of a training step: bytes and FLOPs, forward and in a backward pass of our own."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from config import make_config
from engine.roofline import (
    AVERAGE,
    Counts,
    Gpu,
    OperationCounter,
    count_training,
    fake_cuda,
    fused_attention,
    run_backward,
    run_model,
)
from models import SegModel, count_model
from tools.bench.fixtures import ROOT
from tools.bench.hours import NETWORKS, hours_row, hours_table

PAGE = (ROOT / 'docs' / 'scaling.md').read_text()


def counted(run) -> Counts:
    counts = Counts()
    with OperationCounter(counts.operations):
        run()
    return counts


def test_bytes_and_flops_by_hand():
    images, weight = torch.zeros(2, 8, 10, 10), torch.zeros(8, 1, 3, 3, requires_grad=True)
    counts = counted(lambda: F.conv2d(images, weight, padding=1, groups=8).view(-1))
    image_bytes, weight_bytes, flops = 4 * 2 * 8 * 100, 4 * 72, 2 * 2 * 8 * 100 * 9
    assert counts.operations == {(2 * image_bytes + weight_bytes, flops): 1}  # a view is free
    outputs = F.conv2d(images.requires_grad_(), weight, padding=1, groups=8)
    backward = counted(lambda: outputs.backward(torch.zeros_like(outputs)))
    assert backward.flops == 2 * flops  # for the images and the weight; torch's own formula has 9 times that
    assert counted(lambda: torch.zeros(1, 1).expand(100, 100) + 1).bytes == 4 * (1 + 1 + 10_000)
    product = Counts(Counter({(1000, 0): 2, (10, 6000): 1}))
    assert product.seconds(Gpu('made up', flops=2000, bandwidth=500)) == 2 * 2 + 3


def test_backward_is_that_of_the_engine():
    torch.manual_seed(0)
    model = SegModel(make_config({**TINY, 'encoder_weights': 'none'}, 'test')).train()
    images = torch.randn(2, 3, 64, 64)

    def loss() -> torch.Tensor:
        return sum(output.float().square().sum() for output in model(images))

    ours, engine = loss(), loss()
    ours, engine = counted(lambda: run_backward(ours)), counted(engine.backward)
    assert ours.flops == engine.flops > 0
    assert 0.9 < ours.bytes / engine.bytes < 1.001  # which copies some gradients into the weights' order


def test_step_is_counted_as_on_a_gpu():
    """Half precision, the optimizer and the EMA, on a machine without a GPU as on one with it."""
    cfg = make_config({**TINY, 'batch_size': 8}, 'test')
    counts = count_training(cfg)
    parameters = sum(p.numel() for p in SegModel(cfg).parameters())
    averaged = count_training(cfg.model_copy(update={'ema': 0.99}))
    assert averaged.bytes - counts.bytes == AVERAGE * parameters
    assert counts.flops == pytest.approx(3 * 2 * 8 * count_model(cfg, 64).macs, rel=0.05)
    with fake_cuda(cfg) as (model, _):
        outputs = run_model(model, cfg, 2)
    assert [(output.dtype, output.device.type) for output in outputs] == [(torch.bfloat16, 'cuda')] * 2
    assert not torch.is_autocast_enabled('cuda')


def test_attention_is_one_operation():
    query = torch.zeros(2, 4, 64, 32, device='meta')
    mask = torch.zeros(64, 64, device='meta')
    counts = counted(lambda: fused_attention(query, query, query, mask))
    assert counts.flops == 2 * 2 * 2 * 4 * 64 * 64 * 32


def test_page_of_hours_is_counted():
    """One row of the table; all of them take half a minute."""
    assert hours_row('convnext')[0] in PAGE.splitlines()
    assert all(f'| `{name}` |' in PAGE for name in NETWORKS)


@pytest.mark.slow
def test_whole_page_of_hours_is_counted():
    assert '\n'.join(hours_table()) in PAGE
