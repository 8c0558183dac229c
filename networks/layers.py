"""The parts of a model: small blocks, the necks between encoder and head, and the contract `Head`.

Shapes: N batch, K classes, C channels of the head, C_i channels of feature i, h w the finest size: H/4, W/4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Resize a map to (H, W), bilinear, corners not aligned; antialias averages pixels when it shrinks."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False, antialias=antialias)


def join(feats: list[Tensor]) -> Tensor:
    """Concatenate all features at the size of the finest: (N, sum of C_i, h, w)."""
    maps = [resize(feat, feats[0].shape[-2:]) for feat in feats]
    for resized in maps[1:]:
        # the gradient is a slice; a CPU is slow to resize it back unless it is copied
        if resized.is_cpu and resized.requires_grad and not torch.compiler.is_compiling():
            resized.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return torch.cat(maps, dim=1)


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as a float32 tensor that a GPU fills itself; the host would wait for a copy to it."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; a denominator of 0 counts as 1."""
    return numerator / torch.where(denominator == 0, 1, denominator)


def adaptive_avg_pool(x: Tensor, grid: int) -> Tensor:
    """Average a map over the cells of a grid, (N, C, h, w) → (N, C, grid, grid), as F.adaptive_avg_pool2d.
    Its gradient has no deterministic form on a GPU; if torch has to be deterministic, two matrix products in
    fp32 replace it.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(x, grid)
    rows, columns = (averaging_matrix(length, grid, x.device) for length in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ x.float() @ columns.T).to(x.dtype)


def averaging_matrix(length: int, cells: int, device: torch.device) -> Tensor:
    """Return (cells, length): each row averages the pixels of a cell. Cells overlap unless they divide the
    length.
    """
    pixel = torch.arange(length, device=device)
    cell = torch.arange(cells, device=device)[:, None]
    inside = (pixel >= cell * length // cells) & (pixel * cells < (cell + 1) * length)
    return inside / inside.sum(dim=1, keepdim=True)


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


def feature_maps(feats: list[Tensor] | tuple[list[Tensor], ...]) -> list[Tensor]:
    """Return the (N, C, h, w) features of an encoder, without the prefix tokens that smp's plain ViTs add."""
    return feats[0] if isinstance(feats, tuple) else feats


class Presence(nn.Module):
    """Say which classes an image shows, by the mean of a feature: (N, C, h, w) → logits (N, K)."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(self.dropout(feature.mean((-2, -1))))


class Probe(nn.Module):
    """Say which classes an image shows, by a linear probe of an encoder that never learns: images
    (N, B, H, W) → the logarithms (N, K) of each class's share of the objects, up to a constant, or, if
    classes may overlap, of the probability that it is there. engine.probe fits it; until then all are equal.
    """

    def __init__(self, encoder: nn.Module, channels: int, num_classes: int, overlapping: bool) -> None:
        super().__init__()
        self.encoder, self.overlapping = encoder, overlapping
        self.linear = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return the means of the last feature: images (N, B, H, W) → (N, C)."""
        return feature_maps(self.encoder(images))[-1].mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(self.features(images))
        return F.logsigmoid(logits.float()) if self.overlapping else logits


def weigh_by_presence(logits: Tensor, log_presence: Tensor, background: int) -> Tensor:
    """Share out the probability that a pixel has of all objects together by that of their presence in the
    image: logits (N, K, h, w) and logarithms (N, K) → logits (N, K, h, w), fp32. The first `background`
    classes, 1 or none, are no objects and keep theirs: whether there is an object is for the pixel to say.
    """
    logits = logits.float()
    objects = logits[:, background:]
    weighed = objects + log_presence[:, background:].float()[..., None, None]
    weighed = weighed + objects.logsumexp(1, keepdim=True) - weighed.logsumexp(1, keepdim=True)
    return torch.cat((logits[:, :background], weighed), 1)


def multiply_by_presence(logits: Tensor, log_presence: Tensor) -> Tensor:
    """Multiply the probability of each class in a pixel, a sigmoid of logits (N, K, h, w), by that of its
    presence in the image, whose logarithms are (N, K): → logits (N, K, h, w), fp32.
    """
    log_prob = F.logsigmoid(logits.float()) + log_presence.float()[..., None, None]
    return log_prob - torch.log(-torch.expm1(log_prob.clamp(max=-1e-6)))


class FeaturePyramid(nn.Module):
    """Features of strides 4, 8, 16 and 32 from four of a plain ViT's stride 16 (BEiT, arXiv:2106.08254)."""

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
    """A LayerNorm over the channels of each feature, as mmsegmentation adds them to Swin and ConvNeXt."""

    def __init__(self, channels: list[int], eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps) for width in channels)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        pairs = zip(self.norms, feats, strict=True)  # a norm reads (N, h_i, w_i, C_i)
        return [norm(feat.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, feat in pairs]


class Head(nn.Module):
    """The contract of every head: features in, a list of logits (N, K, h, w) out, the main one last, the same
    in training and evaluation. `loss_weights` holds one number an output.
    """

    loss_weights: Sequence[float] = (1.0,)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError
