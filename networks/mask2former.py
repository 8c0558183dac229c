"""Mask2Former (arXiv:2112.01527): queries that each propose a mask and its class, over four features.

    head = Mask2Former([192, 384, 768, 1536], num_classes=11)
    outputs = head(feats)           # 10 Queries: one before the decoder, one after each of its layers
    outputs[-1].logits()            # (N, K, h, w), like the output of any other head
    loss = set_loss(outputs[-1], mask_to_segments(mask))

The pixel decoder is Deformable DETR's (arXiv:2010.04159), with its sampling in plain PyTorch. With the same
weights, outputs and loss are those of Mask2Former in transformers.

Shapes: N batch, K classes, Q queries, C channels, h w the finest size, h_i w_i the size of level i (strides
32, 16, 8), L pixels of all levels, A attention heads, P points, T segments of an image, M matched pairs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from metrics import IGNORED
from networks.layers import Head, resize, safe_divide

LEVELS = 3
ATTENTION_HEADS = 8
GROUPS = 32  # of a GroupNorm
LOSS_WEIGHTS = {'class': 2.0, 'mask': 5.0, 'dice': 5.0}  # the same in the matching and in the loss
NO_OBJECT_WEIGHT = 0.1  # the weight of the class "none" in the cross entropy
POINTS = 112 * 112  # pixels of a mask that matching and loss look at
OVERSAMPLING = 3  # random points among which the uncertain ones are sought
UNCERTAIN_SHARE = 3 / 4  # of the points; the others are random

Segments = list[tuple[Tensor, Tensor]]  # an image each, see mask_to_segments


class Queries(NamedTuple):
    """The output that Mask2Former gives in place of logits: Q masks, and the class of each."""

    classes: Tensor  # (N, Q, K + 1) logits; the last class is "none"
    masks: Tensor  # (N, Q, h, w) logits

    def logits(self) -> Tensor:
        """Return (N, K, h, w): the log of the sum over the queries of class probability times mask
        probability (arXiv:2107.06278, section 3.4). Its softmax is the share of each class.
        """
        classes = self.classes.float().softmax(dim=-1)[..., :-1]
        scores = torch.einsum('nqk,nqhw->nkhw', classes, self.masks.float().sigmoid())
        return scores.clamp(min=1e-6).log()


class Mask2Former(Head):
    """Queries attend to the pixels of one level after another, each inside the mask that it last proposed."""

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
    ) -> None:
        if channels % GROUPS:
            raise ValueError(f'Mask2Former: found {channels} channels, expected a multiple of {GROUPS}')
        super().__init__()
        self.loss_weights = (1.0,) * (decoder_layers + 1)
        self.pixels = PixelDecoder(in_channels, channels, encoder_layers)
        self.level = nn.Embedding(LEVELS, channels)
        self.query = nn.Embedding(queries, channels)
        self.query_position = nn.Embedding(queries, channels)
        self.layers = nn.ModuleList(QueryLayer(channels) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(channels)
        self.to_class = nn.Linear(channels, num_classes + 1)
        linears = [nn.Linear(channels, channels) for _ in range(3)]
        self.to_mask = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])

    def forward(self, feats: list[Tensor]) -> list[Queries]:
        levels, pixels = self.pixels(feats)
        sources = [
            (level.flatten(2) + self.level.weight[i][:, None]).transpose(1, 2)  # (N, h_i * w_i, C)
            for i, level in enumerate(levels)
        ]
        positions = [sine_positions(level).flatten(1).T for level in levels]  # (h_i * w_i, C)
        x = self.query.weight.expand(len(pixels), -1, -1)  # (N, Q, C)
        outputs = [self.predict(x, pixels)]
        for number, layer in enumerate(self.layers):
            i = number % LEVELS
            attention_mask = mask_attention(outputs[-1].masks, levels[i].shape[-2:])
            x = layer(x, self.query_position.weight, sources[i], positions[i], attention_mask)
            outputs.append(self.predict(x, pixels))
        return outputs

    def predict(self, x: Tensor, pixels: Tensor) -> Queries:
        """Turn queries (N, Q, C) and pixel embeddings (N, C, h, w) into classes and masks."""
        x = self.norm(x)
        return Queries(self.to_class(x), torch.einsum('nqc,nchw->nqhw', self.to_mask(x), pixels))


# --- Pixel decoder ----------------------------------------------------------------------------------------


class PixelDecoder(nn.Module):
    """Deformable attention over the strides 32, 16 and 8, then one top-down step to stride 4.

    feats (N, C_i, h / 2^i, w / 2^i), finest first → levels (N, C, h_i, w_i) and pixels (N, C, h, w).
    """

    def __init__(self, in_channels: list[int], channels: int, layers: int) -> None:
        super().__init__()
        finest, *coarser = in_channels
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(GROUPS, channels))
            for width in coarser[::-1]
        )
        self.level = nn.Parameter(torch.randn(LEVELS, channels))
        self.layers = nn.ModuleList(PixelLayer(channels) for _ in range(layers))
        lateral = nn.Conv2d(finest, channels, 1, bias=False)
        self.lateral = nn.Sequential(lateral, nn.GroupNorm(GROUPS, channels))
        smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.smooth = nn.Sequential(smooth, nn.GroupNorm(GROUPS, channels), nn.ReLU())
        self.embed = nn.Conv2d(channels, channels, 1)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, feats: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        # 1. bring the coarser features to one width, and list their pixels
        finest, *coarser = feats
        levels = [project(feat) for project, feat in zip(self.projections, coarser[::-1], strict=True)]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (N, L, C)
        position = torch.cat(
            [sine_positions(level).flatten(1).T + self.level[i] for i, level in enumerate(levels)]
        )  # (L, C)
        centres = torch.cat([pixel_centres(size, x.device) for size in sizes])  # (L, 2)

        # 2. attention among the pixels of all levels
        for layer in self.layers:
            x = layer(x, position, centres, sizes)
        parts = x.split([height * width for height, width in sizes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

        # 3. top-down from stride 8 to stride 4
        lateral = self.lateral(finest)
        return levels, self.embed(self.smooth(lateral + resize(levels[-1], lateral.shape[-2:])))


class PixelLayer(nn.Module):
    """Deformable attention of each pixel to all levels, and a feed-forward; normed after each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels)
        self.ffn = feed_forward(channels, 4 * channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, position: Tensor, centres: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        x = self.norms[0](x + self.attention(x + position, x, centres, sizes))
        return self.norms[1](x + self.ffn(x))


class DeformableAttention(nn.Module):
    """Each query samples points of each level, with offsets and weights of its own (equation 3)."""

    def __init__(self, channels: int, points: int = 4) -> None:
        super().__init__()
        self.points = points
        self.offsets = nn.Linear(channels, ATTENTION_HEADS * LEVELS * points * 2)
        self.weights = nn.Linear(channels, ATTENTION_HEADS * LEVELS * points)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        # each head starts in a direction of its own, and its points one pixel after another along it
        angles = torch.arange(ATTENTION_HEADS) * (2 * math.pi / ATTENTION_HEADS)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)  # (A, 2), on a square
        distances = torch.arange(1, points + 1)[:, None]
        start = (directions[:, None, None] * distances).expand(ATTENTION_HEADS, LEVELS, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())

    def forward(self, query: Tensor, x: Tensor, centres: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """query and x (N, L, C), centres of the queries (L, 2) → (N, L, C)."""
        count, length, channels = x.shape
        shape = (count, length, ATTENTION_HEADS, LEVELS, self.points)
        offsets = self.offsets(query).view(*shape, 2)
        weights = self.weights(query).view(*shape[:3], -1).softmax(dim=-1).view(shape)
        values = self.value(x).view(count, length, ATTENTION_HEADS, -1)
        total = 0.0
        for i, value in enumerate(values.split([height * width for height, width in sizes], dim=1)):
            height, width = sizes[i]
            scale = torch.tensor([width, height], device=x.device)
            points = centres[:, None, None] + offsets[:, :, :, i] / scale  # (N, L, A, P, 2)
            grid = (2 * points - 1).transpose(1, 2).flatten(0, 1)  # (N * A, L, P, 2)
            value = value.permute(0, 2, 3, 1).reshape(count * ATTENTION_HEADS, -1, height, width)
            sampled = F.grid_sample(value.to(grid.dtype), grid, align_corners=False)  # (N * A, C / A, L, P)
            weight = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)[:, None]  # (N * A, 1, L, P)
            total = total + (sampled * weight).sum(dim=-1)
        return self.out(total.view(count, channels, length).transpose(1, 2))


def feed_forward(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))


def pixel_centres(size: tuple[int, int], device: torch.device) -> Tensor:
    """Return (h * w, 2): x and y of the centres of the pixels, from 0 to 1."""
    y, x = ((torch.arange(length, device=device) + 0.5) / length for length in size)
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1)


def sine_positions(x: Tensor) -> Tensor:
    """Return the positions (C, h, w) of a map (N, C, h, w): sines and cosines of the row, then the column."""
    half = x.shape[1] // 2
    exponents = 2 * (torch.arange(half, device=x.device) // 2) / half
    parts = []
    for axis, length in enumerate(x.shape[-2:]):
        positions = (torch.arange(length, device=x.device) + 1) / (length + 1e-6) * 2 * math.pi
        angles = positions[:, None] / 10_000**exponents  # (length, C / 2)
        table = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1).T
        parts.append(table[:, :, None] if axis == 0 else table[:, None])
    return torch.cat([part.expand(half, *x.shape[-2:]) for part in parts])


# --- Transformer decoder ----------------------------------------------------------------------------------


class QueryLayer(nn.Module):
    """Masked attention to the pixels of a level, attention among the queries, feed-forward; normed after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_pixels = nn.MultiheadAttention(channels, ATTENTION_HEADS, batch_first=True)
        self.to_queries = nn.MultiheadAttention(channels, ATTENTION_HEADS, batch_first=True)
        self.ffn = feed_forward(channels, 8 * channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(
        self, x: Tensor, position: Tensor, source: Tensor, source_position: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """x (N, Q, C), source (N, h_i * w_i, C), positions, a mask (N, Q, h_i * w_i) → (N, Q, C)."""
        attention_mask = attention_mask.repeat_interleave(ATTENTION_HEADS, dim=0)  # (N * A, Q, h_i * w_i)
        key = source + source_position
        attention, _ = self.to_pixels(x + position, key, source, attn_mask=attention_mask, need_weights=False)
        x = self.norms[0](x + attention)
        query = x + position
        attention, _ = self.to_queries(query, query, x, need_weights=False)
        x = self.norms[1](x + attention)
        return self.norms[2](x + self.ffn(x))


def mask_attention(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (N, Q, h_i * w_i) bool for mask logits (N, Q, h, w): True at the pixels outside a query's mask,
    to which it must not attend. A query with an empty mask attends to all.
    """
    with torch.no_grad():
        outside = resize(masks.float(), size).flatten(2) < 0
        return outside & ~outside.all(dim=-1, keepdim=True)


# --- Loss -------------------------------------------------------------------------------------------------


def mask_to_segments(mask: Tensor) -> Segments:
    """Split (N, H, W) ids into classes (T,) and float masks (T + 1, H, W), the last of ignored pixels."""
    segments = []
    for image_mask in mask:
        classes = image_mask.unique()
        classes = classes[classes != IGNORED]
        values = torch.cat([classes, classes.new_tensor([IGNORED])])
        segments.append((classes, (image_mask == values[:, None, None]).float()))
    return segments


def set_loss(output: Queries, segments: Segments, points: int = POINTS) -> Tensor:
    """Compute Mask2Former's loss of one output (arXiv:2112.01527, section 3.3), averaged over the segments.

    Each segment is matched to one query; the other queries should predict "none". Masks are compared at
    random points, most of them where the network is uncertain. Ignored pixels do not count.
    """
    with torch.autocast(output.masks.device.type, enabled=False):
        classes, masks = output.classes.float(), output.masks.float()
        device = masks.device
        none = classes.shape[2] - 1
        target = torch.full(classes.shape[:2], none, device=device)  # (N, Q)
        matched_masks, matched_truth = [], []
        for i, (ids, truth) in enumerate(segments):
            query_index, segment_index = match(classes[i], masks[i], ids, truth, points)
            target[i, query_index] = ids[segment_index]
            matched_masks.append(masks[i, query_index])
            ignored = truth[-1:].expand(len(segment_index), -1, -1)
            matched_truth.append(torch.stack([truth[segment_index], ignored], dim=1))
        weight = torch.ones(none + 1, device=device)
        weight[none] = NO_OBJECT_WEIGHT
        loss = LOSS_WEIGHTS['class'] * F.cross_entropy(classes.transpose(1, 2), target, weight)
        logits, truth = torch.cat(matched_masks), torch.cat(matched_truth)  # (M, h, w), (M, 2, H, W)
        if not len(logits):
            return loss + masks.sum() * 0
        with torch.no_grad():
            locations = uncertain_points(logits, points)
            truth, ignored = sample_points(truth, locations).unbind(dim=1)  # (M, P)
        logits = sample_points(logits[:, None], locations)[:, 0]
        mask_loss, dice_loss = point_losses(logits, truth, 1 - ignored)
        return loss + LOSS_WEIGHTS['mask'] * mask_loss.mean() + LOSS_WEIGHTS['dice'] * dice_loss.mean()


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, ids: Tensor, truth: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Match queries and segments at the lowest total cost; return the indices of both, (min(Q, T),) each.

    classes (Q, K + 1) and masks (Q, h, w) are logits; ids (T,) and truth (T + 1, H, W) are the segments.
    """
    locations = torch.rand(1, points, 2, device=masks.device)
    logits = sample_points(masks[None], locations)[0]  # (Q, P)
    sampled = sample_points(truth[None], locations)[0]  # (T + 1, P)
    truth, valid = sampled[:-1], 1 - sampled[-1]
    # the cross entropy of all pairs, from those against all ones and against all zeros
    ones, zeros = F.softplus(-logits), F.softplus(logits)
    mask_cost = (ones @ truth.T + zeros @ (valid - truth).T) / valid.sum().clamp(min=1)
    probs = logits.sigmoid() * valid
    dice_cost = 1 - (2 * probs @ truth.T + 1) / (probs.sum(1)[:, None] + truth.sum(1) + 1)
    class_cost = -classes.softmax(dim=-1)[:, ids]
    weights = LOSS_WEIGHTS
    cost = weights['class'] * class_cost + weights['mask'] * mask_cost + weights['dice'] * dice_cost
    pairs = linear_sum_assignment(cost.nan_to_num(1e6).clamp(-1e6, 1e6).cpu())
    return tuple(torch.as_tensor(index, device=masks.device, dtype=torch.long) for index in pairs)


def point_losses(logits: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy and the Dice loss, (M,) each, of masks at points, (M, P) each; valid is the
    share of a point that is not ignored, and truth the part of it that belongs to the mask.
    """
    cross = F.softplus(-logits) * truth + F.softplus(logits) * (valid - truth)
    cross = safe_divide(cross.sum(1), valid.sum(1))
    probs = logits.sigmoid()
    return cross, 1 - (2 * (probs * truth).sum(1) + 1) / ((probs * valid).sum(1) + truth.sum(1) + 1)


def uncertain_points(masks: Tensor, points: int) -> Tensor:
    """Choose points (M, P, 2) for mask logits (M, h, w): three quarters are the most uncertain of three times
    as many random points (PointRend, arXiv:1912.08193), the others are random.
    """
    candidates = torch.rand(len(masks), OVERSAMPLING * points, 2, device=masks.device)
    certainty = sample_points(masks[:, None], candidates)[:, 0].abs()
    count = int(UNCERTAIN_SHARE * points)
    index = (-certainty).topk(count, dim=1).indices
    uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, torch.rand(len(masks), points - count, 2, device=masks.device)], dim=1)


def sample_points(maps: Tensor, locations: Tensor) -> Tensor:
    """Sample (M, C, H, W) at (M, P, 2), x and y from 0 to 1, bilinear → (M, C, P)."""
    return F.grid_sample(maps, 2 * locations[:, :, None] - 1, align_corners=False)[..., 0]
