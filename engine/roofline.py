"""Estimate the time of a training step on a GPU that is not here by the roofline model: an operation takes as
long as its bytes at the GPU's bandwidth, or its FLOPs at its peak if that is longer (Williams et al.,
"Roofline", CACM 2009).

    counts = count_training(cfg)             # the operations of a step, by their bytes and FLOPs
    seconds = counts.seconds(H100)           # of an eager step
    share = counts.flops / seconds / H100.flops

The operations are those that torch runs under CUDA's autocast, forward and backward, on tensors that have
shapes and no memory. Each reads its inputs and writes its outputs once, and waits for no launch, so that an
eager step takes no less than the sum. torch.compile fuses operations, which can take less.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from config import Config
from losses import segmentation_loss
from models import SegModel, memory_format
from networks.encoders import timm_cfg
from networks.mask2former import Queries

aten, plain_attention = torch.ops.aten, F.scaled_dot_product_attention
# operations that launch no kernel, besides views
FREE = {
    aten.lift_fresh,
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    torch.ops.prim.device,
}
# bytes a parameter: AdamW reads four numbers and writes three; clipping and the EMA
ADAMW, CLIP, AVERAGE = 28, 12, 12


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak of dense bf16 matrix products, and its memory bandwidth, a second."""

    name: str
    flops: float
    bandwidth: float  # bytes


# as measured on one; its data sheet has 990 TFLOP/s and 3.35 TB/s
H100 = Gpu('H100', 798e12, 3.0e12)


@dataclass
class Counts:
    """Operations by their bytes and FLOPs."""

    operations: Counter = field(default_factory=Counter)

    @property
    def bytes(self) -> float:
        return sum(size * number for (size, _), number in self.operations.items())

    @property
    def flops(self) -> float:
        return sum(flops * number for (_, flops), number in self.operations.items())

    def seconds(self, gpu: Gpu) -> float:
        """Return what the operations take on a GPU, one after another."""
        return sum(
            max(size / gpu.bandwidth, flops / gpu.flops) * number
            for (size, flops), number in self.operations.items()
        )


def count_training(cfg: Config) -> Counts:
    """Count a training step: a batch of crops forward and backward under bf16 autocast, then the optimizer,
    clipping and the EMA. The loss is the cross entropy, or a sum for Mask2Former, whose own loss is left out.
    """
    side, planes = cfg.crop_size, [len(cfg.classes)] * cfg.competition.is_multilabel
    with fake_cuda(cfg) as (model, counts):
        outputs = run_model(model.train(), cfg, cfg.batch_size)
        if isinstance(outputs[0], Queries):
            loss = sum(part.float().sum() for part in tree_leaves(outputs))
        else:
            masks = torch.empty(cfg.batch_size, *planes, side, side, dtype=torch.uint8, device='cuda')
            loss = segmentation_loss(outputs, masks, model.loss_weights)
        run_backward(loss)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts.operations[update_bytes(cfg, parameters), 0] += 1
    return counts


def update_bytes(cfg: Config, parameters: int) -> int:
    """Return the bytes that AdamW, clipping and the EMA move."""
    return parameters * (ADAMW + (CLIP if cfg.clip_norm else 0) + (AVERAGE if cfg.ema else 0))


def count_prediction(cfg: Config) -> Counts:
    """Count a forward pass of infer_batch_size photos of the crop's size, without a view's resizing."""
    with fake_cuda(cfg) as (model, counts), torch.no_grad():
        run_model(model.eval(), cfg, cfg.infer_batch_size)
    return counts


@contextmanager
def fake_cuda(cfg: Config) -> Generator[tuple[SegModel, Counts]]:
    """Build a model of CUDA tensors without memory, and count the operations of the block."""
    with torch.device('meta' if timm_cfg(cfg.encoder) else 'cpu'):  # smp's encoders compute while being built
        model = SegModel(cfg, load_weights=False)
    model.to('meta', memory_format=memory_format(cfg))
    counts = Counts()
    attention = patch.object(F, 'scaled_dot_product_attention', fused_attention)
    with FakeTensorMode(allow_non_fake_inputs=True), attention:
        model.to_empty(device='cuda')
        with OperationCounter(counts.operations):
            yield model, counts


def run_model(model: SegModel, cfg: Config, count: int) -> list:
    """Run a model on so many images under CUDA's autocast."""
    images = torch.empty(count, cfg.competition.channels, cfg.crop_size, cfg.crop_size, device='cuda')
    images = images.contiguous(memory_format=memory_format(cfg))
    with cuda_autocast():
        return model(images)


@contextmanager
def cuda_autocast() -> Generator[None]:
    """Let CUDA's autocast compute in bf16, which torch.autocast refuses without a GPU."""
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled('cuda', before[0])
        torch.set_autocast_dtype('cuda', before[1])


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more, **options
) -> Tensor:
    """Attend in one operation, as a GPU does with four dimensions; torch asks the GPU, and none is here."""
    if query.dim() != 4:
        return plain_attention(query, key, value, attn_mask, *more, **options)
    dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(dtype).expand(*query.shape[:-1], key.shape[-2])
    attend = aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, *more, **options)[0]


def run_backward(loss: Tensor) -> None:
    """Run the backward pass of a scalar node by node: torch's engine refuses CUDA tensors without a GPU."""
    root = loss.grad_fn
    waiting, stack = Counter(), [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                stack += [] if waiting[child] else [child]
                waiting[child] += 1
    grads, ready = {root: {0: torch.ones_like(loss)}}, [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            inputs = grads.pop(node, {})
            if node.name() == 'torch::autograd::AccumulateGrad':
                continue
            call = node.apply if isinstance(node, BackwardCFunction) else node
            results = call(*(inputs.get(i) for i in range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (child, place), grad in zip(node.next_functions, results, strict=True):
                if child is None:
                    continue
                if grad is not None:
                    wanted, mine = child._input_metadata[place], grads.setdefault(child, {})
                    grad = grad if grad.shape == wanted.shape else grad.sum_to_size(wanted.shape)
                    grad = grad.to(wanted.dtype)
                    mine[place] = mine[place] + grad if place in mine else grad
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)


class OperationCounter(TorchDispatchMode):
    """Count the operations by (bytes, FLOPs)."""

    def __init__(self, operations: Counter) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (func.is_view or func.overloadpacket in FREE):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            flops = count_flops(func.overloadpacket, args, kwargs, result)
            self.operations[sum(map(read_bytes, tensors)), flops] += 1
        return result


def read_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an expanded one has those of what it was expanded from."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_flops(operation, args: tuple, kwargs: dict, result) -> int:
    """Return the FLOPs of an operation that multiplies matrices or convolves; 0 for others."""
    if operation == aten.convolution_backward:  # torch's formula overcounts groups
        grad, images, weight, *_, transposed, _, _, output_mask = args
        return sum(output_mask[:2]) * conv_flop_count(images.shape, weight.shape, grad.shape, transposed)
    if operation not in flop_registry:
        return 0
    return flop_registry[operation](*args, **kwargs, out_val=result)
