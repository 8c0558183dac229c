"""The backward pass of depthwise convolutions, in float32 where a CPU is slow at it in bfloat16.

    with torch.autocast('cpu', torch.bfloat16), depthwise_backward(model, torch.bfloat16):
        outputs = model(images)

oneDNN has fast bfloat16 code for most convolutions, but plain loops for two gradients of depthwise ones. On
the processors tried so far these take a third to a ninth of the time in float32.

Shapes: N batch, C channels, H W of the input, h w of the output, k side of the kernel.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

GAIN = 1.5  # times that float32 has to be faster
Geometry = tuple[list[int], list[int], list[int]]  # stride, padding, dilation


class SlowParts(NamedTuple):
    """The gradients that bfloat16 is slow at: of weights of more than 3x3, and of inputs of strided ones."""

    weight: bool
    strided_input: bool


def depthwise_backward(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context for a model's forward pass under autocast to `dtype`, an empty one unless that is
    bfloat16 on a CPU.
    """
    if dtype == torch.bfloat16 and next(model.parameters()).is_cpu:
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        if any(is_depthwise(conv.weight, conv.groups) for conv in convolutions) and any(slow_parts()):
            return DepthwiseBackward(slow_parts())
    return nullcontext()


def is_depthwise(weight: Tensor, groups: int) -> bool:
    return 1 < groups == len(weight) and weight.shape[1] == 1


class DepthwiseBackward(TorchFunctionMode):
    """Compute each depthwise F.conv2d as a DepthwiseConvolution: of every module, timm's Conv2dSame too."""

    def __init__(self, slow: SlowParts) -> None:
        super().__init__()
        self.slow = slow

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and is_depthwise(args[1], args[6]):
            images, weight, bias, *geometry, _ = args
            pairs = [[value] * 2 if isinstance(value, int) else list(value) for value in geometry]
            return DepthwiseConvolution.apply(images, weight, bias, pairs, self.slow)
        return func(*args, **(kwargs or {}))


class DepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution in bfloat16 whose slow gradients are computed in float32: of (N, C, H, W) by a
    weight (C, 1, k, k) and a bias (C,) or None to (N, C, h, w).
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, slow: SlowParts
    ) -> Tensor:
        ctx.dtype, ctx.geometry, ctx.slow = images.dtype, geometry, slow
        images = images.bfloat16()
        ctx.save_for_backward(images, weight)
        bias = None if bias is None else bias.bfloat16()
        return torch.convolution(images, weight.bfloat16(), bias, *geometry, False, [0, 0], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        needed, geometry = ctx.needs_input_grad, ctx.geometry
        # 1. of the images, which reads their shape alone
        dtype = torch.float32 if ctx.slow.strided_input and max(geometry[0]) > 1 else torch.bfloat16
        like_images, mask = torch.empty_like(images, dtype=dtype), [needed[0], False, False]
        of_images = gradients(grad.to(dtype), like_images, weight.to(dtype), geometry, mask)[0]
        # 2. of the weight and the bias
        dtype = torch.float32 if ctx.slow.weight and max(weight.shape[2:]) > 3 else torch.bfloat16
        mask = [False, *needed[1:3]]
        of_others = gradients(grad.to(dtype), images.to(dtype), weight.to(dtype), geometry, mask)[1:]
        found = zip((of_images, *of_others), (ctx.dtype, weight.dtype, weight.dtype), strict=True)
        return *(None if x is None else x.to(dtype) for x, dtype in found), None, None


def gradients(
    grad: Tensor, images: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of images, weight and bias, of those that the mask names."""
    if not any(mask):
        return None, None, None
    channels = len(weight)
    return torch.ops.aten.convolution_backward(
        grad, images, weight, [channels], *geometry, False, [0, 0], channels, mask
    )


@cache
def slow_parts() -> SlowParts:
    """Measure which gradients bfloat16 is slow at on this processor, in some 50 ms of one thread's CPU time,
    which other work on the machine hardly changes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return SlowParts(
            weight=is_slow(side=16, kernel=5, stride=1, mask=[False, True, False]),
            strided_input=is_slow(side=17, kernel=3, stride=2, mask=[True, False, False]),
        )
    finally:
        torch.set_num_threads(threads)


def is_slow(side: int, kernel: int, stride: int, mask: list[bool]) -> bool:
    """Time a gradient of a depthwise convolution in bfloat16 and, with the casts, in float32."""
    channels, batch, geometry = 128, 4, ([stride] * 2, [0, 0], [1, 1])
    images = torch.ones(batch, channels, side, side, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(channels, 1, kernel, kernel, dtype=torch.bfloat16)
    grad = torch.conv2d(images, weight, None, *geometry, channels)
    least = dict.fromkeys((torch.bfloat16, torch.float32), float('inf'))
    for _ in range(5):
        for dtype in least:
            start = time.thread_time()
            gradients(grad.to(dtype), images.to(dtype), weight.to(dtype), geometry, mask)
            least[dtype] = min(least[dtype], time.thread_time() - start)
    return least[torch.bfloat16] > GAIN * least[torch.float32]
