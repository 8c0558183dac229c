"""The gradients of depthwise convolutions in float32: exact, only where they were slow, in every model."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from networks import depthwise
from networks.depthwise import DepthwiseBackward, SlowParts, depthwise_backward, slow_parts

BOTH = SlowParts(weight=True, strided_input=True)


def net(kernel: int, stride: int, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)


def gradients(model: nn.Module, context, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16), context:
        outputs = model(images)
    (outputs.float() * torch.randn(outputs.shape, generator=generator)).sum().backward()
    return [outputs.detach(), *(parameter.grad for parameter in model.parameters())]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ('kernel', 'stride', 'bias'), [(3, 1, False), (5, 1, True), (3, 2, False), (7, 2, True)]
)
def test_gradients_are_as_exact_as_before(kernel, stride, bias):
    model = net(kernel, stride, bias)
    exact = gradients(model, nullcontext(), torch.float32)
    before = gradients(model, nullcontext())
    after = gradients(model, DepthwiseBackward(BOTH))
    assert torch.equal(after[0], before[0])  # the forward pass keeps its bits
    assert all(x.dtype == torch.float32 for x in after[1:])
    pairs = zip(error(after, exact), error(before, exact), strict=True)
    assert all(new < 1.1 * old + 5e-4 for new, old in pairs)


def test_only_the_slow_gradients_change():
    fast = SlowParts(weight=False, strided_input=False)
    for kernel, stride in ((5, 1), (3, 2)):
        model = net(kernel, stride)
        before = gradients(model, nullcontext())
        for found, expected in zip(gradients(model, DepthwiseBackward(fast)), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)  # the weights' were bfloat16
    model = net(3, 1)
    weights = [gradients(model, DepthwiseBackward(slow))[3] for slow in (fast, BOTH)]
    assert torch.equal(*weights)


def test_a_model_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(depthwise, 'slow_parts', lambda: BOTH)
    assert isinstance(depthwise_backward(net(5, 1), torch.bfloat16), DepthwiseBackward)
    assert not isinstance(depthwise_backward(net(5, 1), torch.float32), DepthwiseBackward)
    assert not isinstance(depthwise_backward(nn.Conv2d(8, 8, 3), torch.bfloat16), DepthwiseBackward)
    monkeypatch.setattr(depthwise, 'slow_parts', lambda: SlowParts(False, False))
    assert not isinstance(depthwise_backward(net(5, 1), torch.bfloat16), DepthwiseBackward)


@pytest.mark.parametrize('slow_type', [torch.bfloat16, torch.float32])
def test_the_trial_says_which_type_is_slow(monkeypatch, slow_type):
    clock = [0.0]

    def gradients(grad, *_):
        clock[0] += 3.0 if grad.dtype == slow_type else 1.0

    monkeypatch.setattr(depthwise, 'gradients', gradients)
    monkeypatch.setattr(depthwise.time, 'thread_time', lambda: clock[0])
    threads = torch.get_num_threads()
    expected = slow_type == torch.bfloat16
    assert slow_parts.__wrapped__() == SlowParts(expected, expected)
    assert torch.get_num_threads() == threads
