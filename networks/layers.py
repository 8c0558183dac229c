"""The parts of a model: small blocks, the necks between encoder and head, and the contract `Head`.

Shapes: N batch, K classes, C channels of the head, C_i channels of feature i, h w the finest size: H/4, W/4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Resize a map to (H, W), bilinear, corners not aligned; return it as it is if the size is right.

    antialias: average the pixels when the map shrinks, as photos and probabilities should be.
    """
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False, antialias=antialias)


def join(feats: list[Tensor]) -> Tensor:
    """Concatenate all features at the size of the finest: (N, sum of C_i, h, w)."""
    return torch.cat([resize(feat, feats[0].shape[-2:]) for feat in feats], dim=1)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; a denominator of 0 counts as 1."""
    return numerator / torch.where(denominator == 0, 1, denominator)


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm and ReLU; the size stays the same."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        # SyncBatchNorm counts the values of all ranks and checks them itself; it is no BatchNorm2d
        if self.training and x.numel() == x.shape[1] and isinstance(self.norm, nn.BatchNorm2d):
            raise ValueError('BatchNorm: found one value a channel; train with a batch_size of 2 or more')
        return super().forward(x)


class Classifier(nn.Sequential):
    """Dropout of whole channels, then a 1x1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)


class FeaturePyramid(nn.Module):
    """Features of strides 4, 8, 16 and 32 from four features of a plain ViT, as in BEiT (arXiv:2106.08254):
    (N, C, H/16, W/16) each → (N, C, H/4, W/4), ..., (N, C, H/32, W/32).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.up2 = nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, stride=2))
        self.down2 = nn.MaxPool2d(2)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        a, b, c, d = feats
        return [self.up4(a), self.up2(b), c, self.down2(d)]


class FeatureNorms(nn.Module):
    """A LayerNorm over the channels of each feature. Swin (arXiv:2103.14030) and ConvNeXt (arXiv:2201.03545)
    come with a norm after the last stage alone; mmsegmentation adds these too.
    """

    def __init__(self, channels: list[int], eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps) for width in channels)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        feats = [feat.permute(0, 2, 3, 1) for feat in feats]  # (N, h_i, w_i, C_i)
        feats = [norm(feat) for norm, feat in zip(self.norms, feats, strict=True)]
        return [feat.permute(0, 3, 1, 2) for feat in feats]


class Head(nn.Module):
    """The contract of every head: features in, a list of logits out, the same in training and evaluation.

    A subclass implements forward(feats) → list of (N, K, h, w), the main one last. `loss_weights` holds one
    number an output.
    """

    loss_weights: Sequence[float] = (1.0,)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError
