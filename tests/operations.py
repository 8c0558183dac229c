"""List the operations that torch runs, and find those that do not suit a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations that raise on CUDA after torch.use_deterministic_algorithms(True): its documentation for 2.11 and
# 2.14, and the calls of alertNotDeterministic in aten/src/ATen/native/cuda. F.interpolate puts indexing in
# place of bilinear and trilinear resizing, and F.pad in place of replication (torch/nn/functional.py).
NOT_DETERMINISTIC = {
    aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward,
    aten._ctc_loss_backward,
    aten._upsample_bicubic2d_aa_backward,
    aten._upsample_bilinear2d_aa_backward,
    aten.adaptive_max_pool2d_backward,
    aten.adaptive_max_pool3d_backward,
    aten.avg_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.fractional_max_pool3d_backward,
    aten.grid_sampler_2d_backward,
    aten.grid_sampler_3d_backward,
    aten.histc,
    aten.max_pool3d_with_indices_backward,
    aten.max_unpool2d,
    aten.max_unpool3d,
    aten.put_,
    aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward,
    aten.reflection_pad3d_backward,
    aten.upsample_bicubic2d_backward,
    aten.upsample_linear1d_backward,
}

# Operations for which the host waits for a GPU: the size or the value of their output depends on the data, or
# they copy numbers of Python to it (lift_fresh, which torch.tensor calls). torch.bincount reads the maximum.
WAITING = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.lift_fresh,
    aten.masked_select,
    aten.nonzero,
    aten.unique_dim,
}


class Operations(TorchDispatchMode):
    """Record the names of the operations that run inside: of all, of those `refused` on CUDA if it is to be
    deterministic, and of those for which the host would be `waiting`; and the copies between devices, as
    (type of the device that is written to, whether the host goes on meanwhile).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.refused: set[str] = set()
        self.waiting: set[str] = set()
        self.copies: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, packet = func(*args, **kwargs), func.overloadpacket
        name = packet.__name__
        self.names.append(name)
        if packet in NOT_DETERMINISTIC or raises_for(packet, func, args):
            self.refused.add(name)
        if packet in WAITING or has_mask(packet, args):
            self.waiting.add(name)
        if packet in (aten._to_copy, aten.copy_) and result.device != args[packet == aten.copy_].device:
            self.copies.append((result.device.type, kwargs.get('non_blocking', False)))
        return result


def raises_for(packet, func, args: tuple) -> bool:
    """Return whether an operation raises with these arguments, but not with others."""
    if packet == aten.nll_loss2d_forward:
        return args[3] != 0  # the reduction: 0 is 'none'
    if packet == aten.bincount:
        return len(args) > 1 and args[1] is not None  # weights
    return packet in (aten.median, aten.nanmedian) and 'dim' in func._overloadname  # with indices


def has_mask(packet, args: tuple) -> bool:
    """Return whether tensors are indexed by a mask, whose pixels have to be counted."""
    if packet not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
