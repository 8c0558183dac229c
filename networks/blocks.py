"""Blocks of timm's and smp's encoders that a GPU runs faster; on a CPU they compute what the originals do, to
the bit.

    use_fast_blocks(encoder)        # in place: the modules keep their names and weights

Shapes: N batch, W windows of an image, T tokens of a window, A attention heads, C channels, H W a map.
"""

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import mix_transformer
from timm.layers import LayerNorm
from timm.models import beit, convnext, swin_transformer, twins
from torch import Tensor, nn


def as_autocast(x: Tensor) -> Tensor:
    """Cast to the type of autocast's matrix products, so that copies move half the bytes."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def relative_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Turn a table of biases by relative position, ((2H-1) (2W-1), A), into those of pairs, (A, HW, HW).

    timm looks the pairs up by index, whose gradient sorts the pairs: a million for BEiT at 512. These are
    windows of the table, whose gradient is a sum.
    """
    height, width = window
    table = table.view(2 * height - 1, 2 * width - 1, -1).flip(0, 1)
    pairs = table.unfold(0, height, 1).unfold(1, width, 1)  # (H, W, A, H, W), the last query first
    return pairs.permute(2, 0, 1, 3, 4).flip(1, 2).reshape(-1, height * width, height * width)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Attend by torch's fused kernel, at the module's scale and dropout: (N W, A, T, C / A) → (N W, T, C)."""
    options = {'dropout_p': module.attn_drop.p if module.training else 0.0, 'scale': module.scale}
    return F.scaled_dot_product_attention(query, key, value, bias, **options).transpose(1, 2).flatten(2)


class SwinBlock(swin_transformer.SwinTransformerBlock):
    """A block that shifts and splits its map in the type in which attention reads it."""

    def _attn(self, x: Tensor) -> Tensor:
        return super()._attn(as_autocast(x))


class SwinAttention(swin_transformer.WindowAttention):
    """Attention within windows by a fused kernel, which stores no weights of attention."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fused(x, mask) if x.is_cuda else super().forward(x, mask)

    def fused(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (N W, T, C), mask (W, T, T), which is added → (N W, T, C)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = relative_bias(self.relative_position_bias_table, self.window_size)[None].to(query.dtype)
        if mask is not None:
            bias = bias + mask[:, None].to(query.dtype)  # (W, A, T, T)
            bias = bias.repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj_drop(self.proj(attend(self, query, key, value, bias)))


class BeitAttention(beit.Attention):
    """Attention with relative biases: timm's is fused, but it looks the biases up."""

    def _get_rel_pos_bias(self) -> Tensor:
        on_gpu = self.relative_position_bias_table.is_cuda
        return self.window_bias() if on_gpu else super()._get_rel_pos_bias()

    def window_bias(self) -> Tensor:
        """Return the biases (1, A, T, T) of all pairs of tokens; the class token is the first one."""
        table, last = self.relative_position_bias_table.split((self.num_relative_distance - 3, 3))
        pairs = as_autocast(relative_bias(table, self.window_size))
        to_token, to_class, of_class = last[:, :, None, None].to(pairs.dtype).unbind()  # (A, 1, 1) each
        rows = torch.cat([to_class.expand(-1, pairs.shape[1], 1), pairs], dim=2)
        first = torch.cat([of_class, to_token.expand(-1, 1, pairs.shape[2])], dim=2)
        return torch.cat([first, rows], dim=1)[None]


class TwinsAttention(twins.LocallyGroupedAttn):
    """Attention within windows that are part of the batch; timm's are a fifth dimension, which torch's fused
    kernels do not take.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.fused(x, size) if x.is_cuda else super().forward(x, size)

    def fused(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (N, H W, C) of a map of size (H, W) → (N, H W, C)."""
        side, channels = self.ws, x.shape[2]
        padding = (0, 0, 0, -size[1] % side, 0, -size[0] % side)
        x = F.pad(as_autocast(x).unflatten(1, size), padding)
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(-1, rows, side, columns, side, channels).transpose(2, 3)
        x = x.reshape(-1, side * side, channels)  # (N W, T, C)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = attend(self, query, key, value)
        x = x.view(-1, rows, columns, side, side, channels).transpose(2, 3)
        x = x.reshape(-1, rows * side, columns * side, channels)[:, : size[0], : size[1]]
        return self.proj_drop(self.proj(x.reshape(len(x), -1, channels)))


class MitAttention(mix_transformer.Attention):
    """SegFormer's attention of all pixels to averaged ones, by a fused kernel; smp's is not."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fused(x, (height, width)) if x.is_cuda else super().forward(x, height, width)

    def fused(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (N, H W, C) of a map of size (H, W) → (N, H W, C)."""
        query = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        if self.sr_ratio > 1:
            x = self.sr(x.transpose(1, 2).unflatten(2, size))
            x = self.norm(x.flatten(2).transpose(1, 2))
        key, value = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(attend(self, query, key, value)))


class ConvNeXtBlock(convnext.ConvNeXtBlock):
    """A block whose norm is in bf16 under autocast in bf16, which by itself would copy to fp32 and back. With
    `bf16_sum` the sum over the blocks is bf16, too; else it is fp32, as the layer scale is.
    """

    bf16_sum = False

    def forward(self, x: Tensor) -> Tensor:
        in_bf16 = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda') == torch.bfloat16
        is_nhwc = not self.use_conv_mlp and isinstance(self.norm, LayerNorm)
        return self.narrow(x) if x.is_cuda and in_bf16 and is_nhwc else super().forward(x)

    def narrow(self, x: Tensor) -> Tensor:
        """Compute (N, C, H, W) → (N, C, H, W) in the type that the convolution gives."""
        shortcut = self.shortcut(x)
        x = self.conv_dw(x).permute(0, 2, 3, 1)
        kind = x.dtype
        weight, bias = self.norm.weight.to(kind), self.norm.bias.to(kind)
        with torch.autocast(x.device.type, enabled=False):  # the kernel adds up in fp32
            x = F.layer_norm(x, self.norm.normalized_shape, weight, bias, self.norm.eps)
        x = self.mlp(x)
        if self.gamma is not None:
            x = x * (self.gamma.to(kind) if self.bf16_sum else self.gamma)
        return self.drop_path(x.permute(0, 3, 1, 2)) + (shortcut.to(kind) if self.bf16_sum else shortcut)


FAST_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__base__: cls
    for cls in (SwinBlock, SwinAttention, BeitAttention, TwinsAttention, MitAttention, ConvNeXtBlock)
}
# the tag of weights trained with all sums in bf16 (param_dtype of facebookresearch/dinov3); those of
# ConvNeXt's authors were not, and mixed precision in mmsegmentation leaves the sums in fp32
BF16_SUM = '.dinov3'


def use_fast_blocks(encoder: nn.Module, name: str) -> None:
    """Give the blocks of an encoder of this name the classes of FAST_BLOCKS."""
    for module in encoder.modules():
        if type(module) in FAST_BLOCKS:
            module.__class__ = FAST_BLOCKS[type(module)]
            if isinstance(module, ConvNeXtBlock):
                module.bf16_sum = BF16_SUM in name


def use_plain_blocks(encoder: nn.Module) -> None:
    """Give the blocks of an encoder their own classes back, as others run them."""
    for module in encoder.modules():
        if type(module) in FAST_BLOCKS.values():
            module.__class__ = type(module).__base__
