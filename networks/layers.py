"""What models are made of: small blocks, necks between encoder and head, the contract `Head`, and `Queries`,
which Mask2Former gives in place of logits.

Shapes: N batch, K classes, C channels of the head, C_i channels of feature i, h w the finest size: H/4, W/4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """A map at another (H, W), bilinear, corners not aligned; itself where the size is right.

    antialias: averaged where it shrinks, as pictures and probabilities should be.
    """
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False, antialias=antialias)


def join(feats: list[Tensor]) -> Tensor:
    """All features at the size of the finest, side by side: (N, sum of C_i, h, w)."""
    return torch.cat([resize(feat, feats[0].shape[-2:]) for feat in feats], dim=1)


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, ReLU. The size stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        # SyncBatchNorm, which counts all ranks, is no BatchNorm2d and does its own check
        if self.training and x.numel() == x.shape[1] and isinstance(self.norm, nn.BatchNorm2d):
            raise ValueError('BatchNorm has one value a channel: train with a batch_size of 2 or more')
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
    """Strides 4, 8, 16 and 32 from four features of stride 16, as BEiT fine-tunes a plain ViT
    (arXiv:2106.08254): (N, C, H/16, W/16) each → (N, C, H/4, W/4), ..., (N, C, H/32, W/32).
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
    """A LayerNorm over the channels of each feature, which networks that were made to end in one alone need
    (Swin, arXiv:2103.14030; ConvNeXt, arXiv:2201.03545; as mmsegmentation has it).
    """

    def __init__(self, channels: list[int], eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps) for width in channels)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        normed = (norm(feat.permute(0, 2, 3, 1)) for norm, feat in zip(self.norms, feats, strict=True))
        return [feat.permute(0, 3, 1, 2) for feat in normed]


class Head(nn.Module):
    """What all heads share: auxiliary heads, whose outputs come before its own, and the outputs' weights.

    A subclass implements decode(feats) -> list[logits], the main one last; `outputs` is how many these are.
    """

    def __init__(self, aux: list['Head'], aux_weight: float, outputs: int = 1) -> None:
        super().__init__()
        self.aux = nn.ModuleList(aux)
        self.loss_weights = [aux_weight] * len(aux) + [1.0] * outputs

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        aux = [logits for head in self.aux for logits in head(feats)]
        return aux + self.decode(feats)

    def decode(self, feats: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError
