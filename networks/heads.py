"""Decode heads: features of an encoder in, logits out.

    head = HEADS['upernet']([96, 192, 384, 768], num_classes=11, channels=512)
    outputs = head(feats)       # a list of logits, the main one last, in training and evaluation alike
    head.loss_weights           # one number an output, for losses.segmentation_loss

Each head gives the same numbers as mmsegmentation 1.2.2 with the same weights, which mmseg.py renames.

Shapes: N batch, K classes, C channels of the head, C_i channels of feature i, h w the finest size: H/4, W/4.
feats: finest first, (N, C_i, h / 2^i, w / 2^i); for SETR all of one size.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import Classifier, ConvBlock, Head, adaptive_avg_pool, join, resize
from networks.mask2former import Mask2Former


class FCN(Head):
    """FCN (arXiv:1411.4038): convolutions on one feature, then the classifier; a main head, or an auxiliary.

    index: the feature that it reads; None joins all of them at the finest size.
    concat_input: add a convolution that reads the feature together with the output of the others.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        index: int | None = -1,
    ) -> None:
        super().__init__()
        self.index = index
        width = sum(in_channels) if index is None else in_channels[index]
        widths = [width] + [channels] * num_convs
        self.convs = nn.Sequential(*[ConvBlock(a, b, kernel_size) for a, b in pairwise(widths)])
        self.fuse = ConvBlock(width + channels, channels, kernel_size) if concat_input else None
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        feature = join(feats) if self.index is None else feats[self.index]
        x = self.convs(feature)
        if self.fuse is not None:
            x = self.fuse(torch.cat([feature, x], dim=1))
        return [self.classifier(x)]


class FCNHRNet(FCN):
    """HRNet's head (arXiv:1908.07919): all features joined, and one 1x1 convolution."""

    def __init__(
        self, in_channels: list[int], num_classes: int, *, channels: int = 720, dropout: float = 0.0
    ) -> None:
        options = {'num_convs': 1, 'kernel_size': 1, 'concat_input': False, 'index': None}
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout, **options)


class PyramidPooling(nn.Module):
    """Join a feature and its averages over coarse grids, and fuse them (PSPNet, arXiv:1612.01105)."""

    grids = (1, 2, 3, 6)

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBlock(in_channels, channels) for _ in self.grids])
        self.fuse = ConvBlock(in_channels + len(self.grids) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.branches, self.grids, strict=True)
        return self.fuse(join([x, *(branch(adaptive_avg_pool(x, grid)) for branch, grid in pairs)]))


class UPerNet(Head):
    """UPerNet (arXiv:1807.10221): pyramid pooling, a feature pyramid down to the finest, all levels fused."""

    def __init__(
        self, in_channels: list[int], num_classes: int, *, channels: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pooling = PyramidPooling(coarsest, channels)
        self.laterals = nn.ModuleList([ConvBlock(width, channels) for width in finer])
        self.smooths = nn.ModuleList([ConvBlock(channels, channels, 3) for _ in finer])
        self.fuse = ConvBlock(len(in_channels) * channels, channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        return [self.classifier(self.fuse_levels(feats))]

    def fuse_levels(self, feats: list[Tensor]) -> Tensor:
        """Fuse the features into the map that the classifier reads, (N, C, h, w)."""
        # 1. bring all to one width; the coarsest level passes pyramid pooling
        levels = [lateral(feat) for lateral, feat in zip(self.laterals, feats[:-1], strict=True)]
        levels.append(self.pooling(feats[-1]))

        # 2. top-down: each level adds the one above it
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])

        # 3. smooth the levels, and fuse all of them at 1/4
        levels[:-1] = [smooth(level) for smooth, level in zip(self.smooths, levels[:-1], strict=True)]
        return self.fuse(join(levels))


def pixels_first(x: Tensor) -> Tensor:
    """View a map (N, C, h, w) as (N, h*w, C), so that the gradient of a product with it is NHWC, too."""
    return x.flatten(2).transpose(1, 2)


ACTIVATIONS: dict[str, type[nn.Module]] = {'gelu': nn.GELU, 'relu': nn.ReLU}


class KernelUpdater(nn.Module):
    """K-Net's equations 4 and 5: gates weigh the features of a kernel's pixels against the old kernel."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()

        def project(activation: type[nn.Module]) -> nn.Sequential:
            return nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), activation())

        self.group_proj = nn.Linear(channels, 2 * channels)
        self.kernel_proj = nn.Linear(channels, 2 * channels)
        self.group_gate, self.kernel_gate = project(nn.Sigmoid), project(nn.Sigmoid)
        self.group_norm, self.kernel_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.out = project(activation)

    def forward(self, groups: Tensor, kernels: Tensor) -> Tensor:
        """Return new kernels from the summed features of each one's pixels; all are (N, M, channels)."""
        group_in, group_out = self.group_proj(groups).chunk(2, dim=-1)
        kernel_in, kernel_out = self.kernel_proj(kernels).chunk(2, dim=-1)
        product = group_in * kernel_in
        update = self.group_gate(product) * self.group_norm(group_out)
        memory = self.kernel_gate(product) * self.kernel_norm(kernel_out)
        return self.out(update + memory)


class KernelStage(nn.Module):
    """One stage of K-Net: it refines kernels (N, K, C) and masks (N, K, h, w).

    The updater is `split` times narrower than the kernels: it reads each kernel as `split` narrow ones.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        ffn_channels: int,
        split: int,
        activation: type[nn.Module],
        overlapping: bool,
    ) -> None:
        super().__init__()
        self.split, self.overlapping = split, overlapping
        self.transform = nn.Conv2d(channels, channels, 1)
        self.updater = KernelUpdater(channels // split, activation)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, ffn_channels), activation(), nn.Linear(ffn_channels, channels)
        )
        self.ffn_norm = nn.LayerNorm(channels)
        first, last = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels)
        self.to_mask_kernel = nn.Sequential(first, nn.LayerNorm(channels), nn.ReLU(), last)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, kernels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transform(x)

        # fp32 under autocast too: a group is a sum over up to h*w pixels, which overflows in fp16
        with torch.autocast(x.device.type, enabled=False):
            # 1. the group of each kernel: the features of all pixels, weighted by its mask
            probs = masks.float().sigmoid() if self.overlapping else masks.float().softmax(dim=1)
            groups = probs.flatten(2) @ pixels_first(x.float())  # (N, K, C)

            # 2. update each kernel from its group: (N, K, C) as (N, K * split, C / split)
            shape = (x.shape[0], -1, groups.shape[2] // self.split)
            kernels = self.updater(groups.reshape(shape), kernels.float().reshape(shape))
            kernels = kernels.reshape(groups.shape)

            # 3. attention among the kernels of an image
            attention, _ = self.attention(kernels, kernels, kernels, need_weights=False)
            kernels = self.attention_norm(kernels + attention)
            kernels = self.ffn_norm(kernels + self.ffn(kernels))
            mask_kernels = self.to_mask_kernel(kernels)

        # 4. new masks: each kernel is a 1x1 convolution of its image
        return kernels, torch.einsum('nkc,nchw->nkhw', mask_kernels.to(x.dtype), x)


class KNet(Head):
    """K-Net (arXiv:2106.14855) over UPerNet: the classifier's rows are kernels, one a class, and each stage
    fits them to the image. Outputs: UPerNet's own, then one a stage. Masks of `overlapping` classes are
    sigmoids, as K-Net's of instances. Raises ValueError.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
        stages: int = 3,
        attention_heads: int = 8,
        ffn_ratio: int = 4,
        split: int = 2,
        activation: str = 'gelu',
        overlapping: bool = False,
    ) -> None:
        if channels % attention_heads or channels % split:
            divisors = f'{attention_heads} and {split}'
            raise ValueError(f'K-Net: found {channels} channels, expected a multiple of {divisors}')
        if activation not in ACTIVATIONS:
            expected = ', '.join(ACTIVATIONS)
            raise ValueError(f'K-Net: found activation {activation!r}, expected one of {expected}')
        super().__init__()
        self.loss_weights = (1.0,) * (1 + stages)
        self.upernet = UPerNet(in_channels, num_classes, channels=channels, dropout=dropout)
        sizes = {'heads': attention_heads, 'ffn_channels': ffn_ratio * channels, 'split': split}
        kinds = {'activation': ACTIVATIONS[activation], 'overlapping': overlapping}
        self.stages = nn.ModuleList(KernelStage(channels, **sizes, **kinds) for _ in range(stages))

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        # 1. UPerNet: its map, its masks, and the kernels that made them
        x = self.upernet.fuse_levels(feats)  # (N, C, h, w)
        classifier = self.upernet.classifier
        masks = classifier(x)  # (N, K, h, w)
        kernels = classifier.conv.weight.flatten(1).expand(x.shape[0], -1, -1)  # (K, C, 1, 1) -> (N, K, C)

        # 2. refine kernels and masks
        outputs = [masks]
        for stage in self.stages:
            kernels, masks = stage(x, kernels, masks)
            outputs.append(masks)
        return outputs


class OCR(Head):
    """Object-contextual representations (arXiv:1909.11065): pixels attend to the mean features of the classes
    in a coarse map. Outputs: the coarse map, whose loss has coarse_weight, and the main one.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.0,
        ocr_channels: int | None = None,
        coarse_channels: int = 720,
        coarse_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.loss_weights = (coarse_weight, 1.0)
        width = ocr_channels or channels // 2
        self.coarse = FCNHRNet(in_channels, num_classes, channels=coarse_channels, dropout=dropout)
        self.pixels = ConvBlock(sum(in_channels), channels, 3)
        self.query = nn.Sequential(ConvBlock(channels, width), ConvBlock(width, width))
        self.key = nn.Sequential(ConvBlock(channels, width), ConvBlock(width, width))
        self.value = ConvBlock(channels, width)
        self.out = ConvBlock(width, channels)
        self.fuse = ConvBlock(2 * channels, channels)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        # 1. the coarse map, as weights of the pixels of each class
        (coarse,) = self.coarse(feats)
        weights = coarse.flatten(2).softmax(dim=2)  # (N, K, h*w), over the pixels

        # 2. the mean feature of the pixels of each class
        x = self.pixels(join(feats))  # (N, C, h, w)
        regions = weights.to(x.dtype) @ pixels_first(x)  # (N, K, C)
        regions = regions.transpose(1, 2).unsqueeze(3)  # (N, C, K, 1): a map, for the convolutions

        # 3. attention of each pixel to the classes
        query = self.query(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (N, 1, h*w, width): one head
        key = self.key(regions).flatten(2).transpose(1, 2).unsqueeze(1)  # (N, 1, K, width)
        value = self.value(regions).flatten(2).transpose(1, 2).unsqueeze(1)
        context = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        context = self.out(context.transpose(1, 2).unflatten(2, x.shape[-2:]))  # (N, C, h, w)

        # 4. classify the context joined with the feature of the pixel
        return [coarse, self.classifier(self.fuse(torch.cat([context, x], dim=1)))]


class SETR(Head):
    """SETR's naive decoder (arXiv:2012.15840) of feature `index`: LayerNorm, 1x1 convolution, 4x larger."""

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 256,
        dropout: float = 0.0,
        index: int = -1,
    ) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(in_channels[index], eps=1e-6)
        self.conv = ConvBlock(in_channels[index], channels)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        x = self.norm(feats[self.index].permute(0, 2, 3, 1))  # (N, h, w, C_i)
        x = self.conv(x.permute(0, 3, 1, 2))
        return [self.classifier(resize(x, (4 * x.shape[2], 4 * x.shape[3])))]


HEADS: dict[str, type[Head]] = {
    'fcn': FCN,
    'fcn_hrnet': FCNHRNet,
    'knet': KNet,
    'mask2former': Mask2Former,
    'ocr': OCR,
    'setr_naive': SETR,
    'upernet': UPerNet,
}
