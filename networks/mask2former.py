"""Mask2Former: masks and their classes from queries (arXiv:2112.01527), over four features of any encoder.

    head = Mask2Former([192, 384, 768, 1536], num_classes=11)
    outputs = head(feats)           # 10 Queries, one before the decoder and one after each of its layers
    outputs[-1].logits()            # (N, K, h, w), as other heads give

The pixel decoder is that of Deformable DETR (arXiv:2010.04159), its sampling in plain PyTorch. With the same
weights it gives what transformers' Mask2Former gives.

Shapes: N batch, K classes, Q queries, C channels, h w the finest size, L pixels of all levels, A attention
heads, P points. Levels are the strides 32, 16 and 8, in this order.
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
SET_WEIGHTS = {'class': 2.0, 'mask': 5.0, 'dice': 5.0}  # in matching and in the loss
NO_SEGMENT_WEIGHT = 0.1  # of the class 'none'


class Queries(NamedTuple):
    """What Mask2Former gives in place of logits: Q masks, and the class of each."""

    classes: Tensor  # (N, Q, K + 1) logits; the last is none of the classes
    masks: Tensor  # (N, Q, h, w) logits

    def logits(self) -> Tensor:
        """(N, K, h, w) whose softmax is each class's share of the masks that claim a pixel: the sum over the
        queries of class probability times mask probability (arXiv:2107.06278, section 3.4).
        """
        classes = self.classes.float().softmax(dim=-1)[..., :-1]
        scores = torch.einsum('nqk,nqhw->nkhw', classes, self.masks.float().sigmoid())
        return scores.clamp(min=1e-6).log()


class Mask2Former(Head):
    """Queries attend to the pixels of one level after another, each within the mask that it has so far.

    The set loss that trains it is losses.set_loss. Raises ValueError for channels that are no multiple of 32.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        *,
        channels: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        attention_heads: int = 8,
        encoder_ffn: int | None = None,
        decoder_ffn: int | None = None,
    ) -> None:
        if channels % 32 or channels % attention_heads:
            raise ValueError(f'Mask2Former: found {channels} channels, expected a multiple of 32')
        super().__init__()
        self.loss_weights = (1.0,) * (decoder_layers + 1)
        self.pixels = PixelDecoder(
            in_channels, channels, encoder_layers, attention_heads, encoder_ffn or 4 * channels
        )
        self.level = nn.Embedding(LEVELS, channels)
        self.query = nn.Embedding(queries, channels)
        self.query_position = nn.Embedding(queries, channels)
        self.layers = nn.ModuleList(
            QueryLayer(channels, attention_heads, decoder_ffn or 8 * channels) for _ in range(decoder_layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.to_class = nn.Linear(channels, num_classes + 1)
        self.to_mask = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )

    def forward(self, feats: list[Tensor]) -> list[Queries]:
        levels, pixels = self.pixels(feats)
        size = pixels.shape[0]
        sources = [
            (level.flatten(2) + self.level.weight[i][:, None]).transpose(1, 2)  # (N, h_i * w_i, C)
            for i, level in enumerate(levels)
        ]
        positions = [sine_positions(level).flatten(1).T for level in levels]  # (h_i * w_i, C)
        x = self.query.weight.expand(size, -1, -1)
        outputs = [self.predict(x, pixels)]
        for number, layer in enumerate(self.layers):
            i = number % LEVELS
            hidden = outside(outputs[-1].masks, levels[i].shape[-2:])
            x = layer(x, self.query_position.weight, sources[i], positions[i], hidden)
            outputs.append(self.predict(x, pixels))
        return outputs

    def predict(self, x: Tensor, pixels: Tensor) -> Queries:
        """Queries (N, Q, C) and pixels (N, C, h, w) → their classes and masks."""
        x = self.norm(x)
        return Queries(self.to_class(x), torch.einsum('nqc,nchw->nqhw', self.to_mask(x), pixels))


def outside(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, Q, h, w) mask logits → (N, Q, h_i * w_i) bool: the pixels of a level that a query must not see,
    those outside its mask; none where the mask is empty.
    """
    with torch.no_grad():
        hidden = resize(masks.float(), size).flatten(2) < 0
        return hidden & ~hidden.all(dim=-1, keepdim=True)


def sine_positions(x: Tensor) -> Tensor:
    """(C, h, w) position table of a map (N, C, h, w): sines and cosines of row and column, each in C / 2."""
    half = x.shape[1] // 2
    exponents = 2 * (torch.arange(half, device=x.device) // 2) / half
    parts = []
    for axis, length in enumerate(x.shape[-2:]):
        places = (torch.arange(length, device=x.device) + 1) / (length + 1e-6) * 2 * math.pi
        angles = places[:, None] / 10_000**exponents  # (length, C / 2)
        table = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1).T
        parts.append(table[:, :, None] if axis == 0 else table[:, None])
    return torch.cat([part.expand(half, *x.shape[-2:]) for part in parts])


class QueryLayer(nn.Module):
    """Masked attention to the pixels of a level, attention among the queries, feed-forward; normed after."""

    def __init__(self, channels: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.to_pixels = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.to_queries = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn), nn.ReLU(), nn.Linear(ffn, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(
        self, x: Tensor, position: Tensor, source: Tensor, source_position: Tensor, hidden: Tensor
    ) -> Tensor:
        """x (N, Q, C), position (Q, C), source (N, h_i * w_i, C), source_position (h_i * w_i, C),
        hidden (N, Q, h_i * w_i) → (N, Q, C).
        """
        hidden = hidden.repeat_interleave(self.to_pixels.num_heads, dim=0)
        key = source + source_position
        seen, _ = self.to_pixels(x + position, key, source, attn_mask=hidden, need_weights=False)
        x = self.norms[0](x + seen)
        placed = x + position
        x = self.norms[1](x + self.to_queries(placed, placed, x, need_weights=False)[0])
        return self.norms[2](x + self.ffn(x))


class PixelDecoder(nn.Module):
    """Deformable attention over the strides 32, 16 and 8, then one top-down step to stride 4.

    feats (N, C_i, h / 2^i, w / 2^i), finest first → levels, (N, C, ...) of strides 32, 16, 8, and the pixels'
    embeddings (N, C, h, w).
    """

    def __init__(self, in_channels: list[int], channels: int, layers: int, heads: int, ffn: int) -> None:
        super().__init__()
        finest, *coarser = in_channels
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(32, channels))
            for width in coarser[::-1]
        )
        self.level = nn.Parameter(torch.randn(LEVELS, channels))
        self.layers = nn.ModuleList(PixelLayer(channels, heads, ffn) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(finest, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.smooth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(32, channels), nn.ReLU()
        )
        self.embed = nn.Conv2d(channels, channels, 1)
        for module in (*self.projections, self.lateral, self.smooth, self.embed):
            for conv in module.modules():
                if isinstance(conv, nn.Conv2d):
                    nn.init.xavier_uniform_(conv.weight)
                    if conv.bias is not None:
                        nn.init.zeros_(conv.bias)

    def forward(self, feats: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        finest, *coarser = feats
        maps = [project(feat) for project, feat in zip(self.projections, coarser[::-1], strict=True)]
        sizes = [tuple(level.shape[-2:]) for level in maps]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # (N, L, C)
        position = torch.cat(
            [sine_positions(level).flatten(1).T + self.level[i] for i, level in enumerate(maps)]
        )  # (L, C)
        places = torch.cat([pixel_places(size, x.device) for size in sizes])  # (L, 2)
        for layer in self.layers:
            x = layer(x, position, places, sizes)
        parts = x.split([height * width for height, width in sizes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        lateral = self.lateral(finest)
        return levels, self.embed(self.smooth(lateral + resize(levels[-1], lateral.shape[-2:])))


def pixel_places(size: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w, 2) x and y of the pixels' middles, from 0 to 1."""
    y, x = ((torch.arange(length, device=device) + 0.5) / length for length in size)
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1)


class PixelLayer(nn.Module):
    """Deformable attention of each pixel to all levels, and a feed-forward; normed after each."""

    def __init__(self, channels: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, heads)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn), nn.ReLU(), nn.Linear(ffn, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, position: Tensor, places: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        x = self.norms[0](x + self.attention(x + position, x, places, sizes))
        return self.norms[1](x + self.ffn(x))


class DeformableAttention(nn.Module):
    """Each query looks at a few points of each level, whose places and weights it chooses
    (arXiv:2010.04159, equation 3).
    """

    def __init__(self, channels: int, heads: int, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(channels, heads * LEVELS * points * 2)
        self.weights = nn.Linear(channels, heads * LEVELS * points)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)  # (A, 2), on a square
        steps = torch.arange(1, points + 1)[:, None]  # the points of a head one after another, outwards
        start = (directions[:, None, None] * steps).expand(heads, LEVELS, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())

    def forward(self, query: Tensor, x: Tensor, places: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """query and x (N, L, C), places (L, 2) of the queries → (N, L, C)."""
        count, length, channels = x.shape
        shape = (count, length, self.heads, LEVELS, self.points)
        offsets = self.offsets(query).view(*shape, 2)
        weights = self.weights(query).view(*shape[:3], -1).softmax(dim=-1).view(shape)
        values = self.value(x).view(count, length, self.heads, -1)
        total = 0.0
        for i, value in enumerate(values.split([height * width for height, width in sizes], dim=1)):
            height, width = sizes[i]
            scale = torch.tensor([width, height], device=x.device)
            where = places[:, None, None] + offsets[:, :, :, i] / scale  # (N, L, A, P, 2)
            grid = (2 * where - 1).transpose(1, 2).flatten(0, 1)  # (N * A, L, P, 2)
            picture = value.permute(0, 2, 3, 1).reshape(count * self.heads, -1, height, width)
            sampled = F.grid_sample(picture.to(grid.dtype), grid, align_corners=False)  # (N * A, C / A, L, P)
            share = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)[:, None]  # (N * A, 1, L, P)
            total = total + (sampled * share).sum(dim=-1)
        return self.out(total.view(count, channels, length).transpose(1, 2))


Segments = list[tuple[Tensor, Tensor]]


def segments_of(mask: Tensor) -> Segments:
    """(N, H, W) ids → of each image the classes in it, (T,), and (T + 1, H, W) float: all pixels of each of
    them, which are a segment, and last those that are ignored.
    """
    segments = []
    for image in mask:
        ids = image.unique()
        ids = ids[ids != IGNORED]
        segments.append((ids, (image == torch.cat([ids, ids.new_tensor([IGNORED])])[:, None, None]).float()))
    return segments


def set_loss(output: Queries, segments: Segments, points: int = 12_544) -> Tensor:
    """Mask2Former's loss of one output (arXiv:2112.01527, section 3.3), the mean over the batch's segments.

    Each segment is matched to one query; the others are to say that they are none. Masks are compared at
    random points, most of them where the network is unsure; ignored pixels do not count.
    """
    with torch.autocast(output.masks.device.type, enabled=False):
        classes, masks = output.classes.float(), output.masks.float()
        device = masks.device
        target = torch.full(classes.shape[:2], classes.shape[2] - 1, device=device)  # (N, Q): none
        chosen, truths = [], []
        for i, (ids, truth) in enumerate(segments):
            queries, places = match(classes[i], masks[i], ids, truth, points)
            target[i, queries] = ids[places]
            chosen.append(masks[i, queries])
            truths.append(torch.stack([truth[places], truth[-1:].expand(len(places), -1, -1)], dim=1))
        weight = torch.ones(classes.shape[2], device=device)
        weight[-1] = NO_SEGMENT_WEIGHT
        loss = SET_WEIGHTS['class'] * F.cross_entropy(classes.transpose(1, 2), target, weight)
        chosen, truths = torch.cat(chosen), torch.cat(truths)  # (M, h, w), (M, 2, H, W)
        if not len(chosen):
            return loss + masks.sum() * 0
        with torch.no_grad():
            where = unsure_points(chosen, points)
            truth, ignored = at_points(truths, where).unbind(dim=1)  # (M, P)
        logits = at_points(chosen[:, None], where)[:, 0]
        mask_loss, dice_loss = point_losses(logits, truth, 1 - ignored)
        return loss + SET_WEIGHTS['mask'] * mask_loss.mean() + SET_WEIGHTS['dice'] * dice_loss.mean()


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, ids: Tensor, truth: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """The queries and the segments that belong together at the lowest cost in all: (min(Q, T),) each.

    classes (Q, K + 1), masks (Q, h, w), ids (T,) of the segments, truth (T + 1, H, W): the last is what is
    ignored.
    """
    where = torch.rand(1, points, 2, device=masks.device)
    logits = at_points(masks[None], where)[0]  # (Q, P)
    *_, ignored = sampled = at_points(truth[None], where)[0]  # (T + 1, P)
    known, truth = 1 - ignored, sampled[:-1]
    total = known.sum().clamp(min=1)
    # cross entropy of every pair, from that of all ones and that of all zeros
    ones, zeros = F.softplus(-logits), F.softplus(logits)
    cost_mask = (ones @ truth.T + zeros @ (known - truth).T) / total
    probs = logits.sigmoid() * known
    cost_dice = 1 - (2 * probs @ truth.T + 1) / (probs.sum(1)[:, None] + truth.sum(1) + 1)
    cost_class = -classes.softmax(dim=-1)[:, ids]
    weights = SET_WEIGHTS
    cost = weights['class'] * cost_class + weights['mask'] * cost_mask + weights['dice'] * cost_dice
    queries, segments = linear_sum_assignment(cost.nan_to_num(1e6).clamp(-1e6, 1e6).cpu())
    return (
        torch.as_tensor(queries, device=masks.device, dtype=torch.long),
        torch.as_tensor(segments, device=masks.device, dtype=torch.long),
    )


def point_losses(logits: Tensor, truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) cross entropy and (M,) Dice loss of masks at points, (M, P) each.

    known: the share of a point that is not ignored; truth: the share that is the mask's, part of known.
    """
    cross = F.softplus(-logits) * truth + F.softplus(logits) * (known - truth)
    cross = safe_divide(cross.sum(1), known.sum(1))
    probs = logits.sigmoid()
    return cross, 1 - (2 * (probs * truth).sum(1) + 1) / ((probs * known).sum(1) + truth.sum(1) + 1)


def unsure_points(masks: Tensor, points: int) -> Tensor:
    """(M, P, 2) places for (M, h, w) mask logits: three quarters are the unsurest of three times as many
    random ones (PointRend, arXiv:1912.08193), the others random.
    """
    places = torch.rand(len(masks), 3 * points, 2, device=masks.device)
    sure = at_points(masks[:, None], places)[:, 0].abs()
    kept = (3 * points) // 4
    best = (-sure).topk(kept, dim=1).indices
    places = places.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([places, torch.rand(len(masks), points - kept, 2, device=masks.device)], dim=1)


def at_points(maps: Tensor, where: Tensor) -> Tensor:
    """(M, C, H, W) at (M, P, 2) places, x and y from 0 to 1, bilinear → (M, C, P)."""
    return F.grid_sample(maps, 2 * where[:, :, None] - 1, align_corners=False)[..., 0]
