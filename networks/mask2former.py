"""Mask2Former (arXiv:2112.01527): queries that each propose a mask and its class, over four features.

    head = Mask2Former([192, 384, 768, 1536], num_classes=11)
    outputs = head(feats)           # 10 Queries: one before the decoder, one after each of its layers
    outputs[-1].logits()            # (N, K, h, w), like the output of any other head
    losses = set_losses(outputs, mask)   # (10,)

The pixel decoder is Deformable DETR's (arXiv:2010.04159), with its sampling in plain PyTorch. With the same
weights, outputs and losses are those of Mask2Former in transformers.

Shapes: N batch, K classes, Q queries, C channels, h w the finest size, h_i w_i the size of level i (strides
32, 16, 8), L pixels of all levels, A attention heads, P points, D outputs, M masks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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

Size = tuple[int, int]


class Queries(NamedTuple):
    """The output of Mask2Former in place of logits: Q masks, and the class of each. A mask is the product of
    the embeddings of a query and of the pixels, computed where it is needed.
    """

    classes: Tensor  # (N, Q, K + 1) logits; the last class is "none"
    embeddings: Tensor  # (N, Q, C)
    pixels: Tensor  # (N, C, h, w), the same in all outputs

    @property
    def masks(self) -> Tensor:
        """The logits (N, Q, h, w)."""
        return (self.embeddings @ self.pixels.flatten(2)).unflatten(2, self.pixels.shape[2:])

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
        levels, positions, pixels = self.pixels(feats)
        sources = [level.flatten(2).mT + self.level.weight[i] for i, level in enumerate(levels)]
        keys = [source + position for source, position in zip(sources, positions, strict=True)]
        # resizing and the product with an embedding commute, so masks are computed at the size of a level
        coarse = [resize(pixels.detach(), level.shape[-2:]).flatten(2) for level in levels]
        x = self.query.weight.expand(pixels.shape[0], -1, -1)  # (N, Q, C)
        outputs = [self.predict(x, pixels)]
        for number, layer in enumerate(self.layers):
            i = number % LEVELS
            attended = attended_pixels(outputs[-1].embeddings.detach() @ coarse[i])
            x = layer(x, self.query_position.weight, keys[i], sources[i], attended)
            outputs.append(self.predict(x, pixels))
        return outputs

    def predict(self, x: Tensor, pixels: Tensor) -> Queries:
        """Turn queries (N, Q, C) and pixel embeddings (N, C, h, w) into classes and masks."""
        x = self.norm(x)
        return Queries(self.to_class(x), self.to_mask(x), pixels)


# --- Pixel decoder ----------------------------------------------------------------------------------------


class PixelDecoder(nn.Module):
    """Deformable attention over the strides 32, 16 and 8, then one top-down step to stride 4.

    feats (N, C_i, h / 2^i, w / 2^i), finest first → levels (N, C, h_i, w_i), their positions (h_i * w_i, C)
    and pixels (N, C, h, w).
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

    def forward(self, feats: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        # 1. bring the coarser features to one width, and list their pixels
        finest, *coarser = feats
        levels = [project(feat) for project, feat in zip(self.projections, coarser[::-1], strict=True)]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        x = torch.cat([level.flatten(2).mT for level in levels], dim=1)  # (N, L, C)
        positions = [sine_positions(size, x.shape[2], x.device) for size in sizes]
        position = torch.cat([position + self.level[i] for i, position in enumerate(positions)])  # (L, C)
        grid = pixel_grid(sizes, x.device)

        # 2. attention among the pixels of all levels
        for layer in self.layers:
            x = layer(x, position, grid, sizes)
        parts = x.split([height * width for height, width in sizes], dim=1)
        levels = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

        # 3. top-down from stride 8 to stride 4
        lateral = self.lateral(finest)
        pixels = self.embed(self.smooth(lateral + resize(levels[-1], lateral.shape[-2:])))
        return levels, positions, pixels


class PixelLayer(nn.Module):
    """Deformable attention of each pixel to all levels, and a feed-forward; normed after each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels)
        self.ffn = feed_forward(channels, 4 * channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, position: Tensor, grid: tuple[Tensor, Tensor], sizes: list[Size]) -> Tensor:
        x = self.norms[0](x + self.attention(x + position, x, grid, sizes))
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

    def forward(self, query: Tensor, x: Tensor, grid: tuple[Tensor, Tensor], sizes: list[Size]) -> Tensor:
        """query and x (N, L, C), centres of the queries (L, 2), extents of a level's pixels → (N, L, C)."""
        offsets = self.offsets(query).unflatten(2, (ATTENTION_HEADS, LEVELS, self.points, 2))
        weights = self.weights(query).unflatten(2, (ATTENTION_HEADS, -1)).float().softmax(dim=-1)
        weights = weights.unflatten(3, (LEVELS, self.points))
        values = self.value(x).unflatten(2, (ATTENTION_HEADS, -1)).float()
        centres, extents = grid
        points = centres[:, None, None, None] + offsets * extents  # (N, L, A, levels, P, 2)
        return self.out(sample_levels(values, points, weights, sizes).flatten(2))


def sample_levels(values: Tensor, points: Tensor, weights: Tensor, sizes: list[Size]) -> Tensor:
    """Add up samples of all levels' values (N, L, A, C / A) at points (N, L, A, levels, P, 2), times their
    weights (N, L, A, levels, P) → (N, L, A, C / A).
    """
    count, heads = values.shape[0], values.shape[2]  # len() would fix it in an exported graph
    values = values.permute(0, 2, 3, 1).flatten(0, 1)  # (N * A, C / A, L)
    points = points.permute(3, 0, 2, 1, 4, 5).flatten(1, 2).flatten(2, 3)  # (levels, N * A, L * P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (levels, N * A, 1, L, P)
    total = 0.0
    parts = values.split([height * width for height, width in sizes], dim=2)
    for part, size, locations, weight in zip(parts, sizes, points, weights, strict=True):
        sampled = sample_points(part.unflatten(2, size), locations)  # (N * A, C / A, L * P)
        total = total + (sampled.unflatten(2, weight.shape[-2:]) * weight).sum(dim=-1)
    return total.unflatten(0, (count, heads)).permute(0, 3, 1, 2)


def feed_forward(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))


def pixel_grid(sizes: list[Size], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x and y of the centres of the pixels of all levels, (L, 2), and the extents of a pixel of each,
    (levels, 1, 2), in shares of a map; computed on the device, as the host would wait for a copy to it.
    """
    centres = []
    for size in sizes:
        y, x = ((torch.arange(length, device=device) + 0.5) / length for length in size)
        centres.append(torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1))
    # the first centre is half a pixel from the corner
    return torch.cat(centres), 2 * torch.stack([centre[0] for centre in centres])[:, None]


def sine_positions(size: Size, channels: int, device: torch.device) -> Tensor:
    """Return (h * w, C): sines and cosines of the row of each pixel, then of its column."""
    half = channels // 2
    periods = 10_000 ** (2 * torch.arange(half // 2, device=device) / half)
    tables = []
    for length in size:
        positions = (torch.arange(length, device=device) + 1) / (length + 1e-6) * 2 * math.pi
        angles = positions[:, None] / periods
        tables.append(torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))  # (length, C / 2)
    rows, columns = tables[0][:, None], tables[1][None]
    return torch.cat([table.expand(*size, half) for table in (rows, columns)], dim=2).flatten(0, 1)


# --- Transformer decoder ----------------------------------------------------------------------------------


class Attention(nn.MultiheadAttention):
    """Multi-head attention by the fused kernel, with one mask for all heads."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (N, Q, C), key and value (N, L, C), mask (N, 1, Q, L), True where it attends → (N, Q, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)  # (N, A, Q or L, C / A)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """Masked attention to the pixels of a level, attention among the queries, feed-forward; normed after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_pixels = Attention(channels, ATTENTION_HEADS)
        self.to_queries = Attention(channels, ATTENTION_HEADS)
        self.ffn = feed_forward(channels, 8 * channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, position: Tensor, key: Tensor, source: Tensor, attended: Tensor) -> Tensor:
        """x (N, Q, C), its positions (Q, C), key and source (N, h_i * w_i, C), attended (N, 1, Q, h_i * w_i),
        True at the pixels that a query attends to → (N, Q, C).
        """
        x = self.norms[0](x + self.to_pixels(x + position, key, source, attended))
        query = x + position
        x = self.norms[1](x + self.to_queries(query, query, x))
        return self.norms[2](x + self.ffn(x))


def attended_pixels(masks: Tensor) -> Tensor:
    """Return (N, 1, Q, h_i * w_i) bool for mask logits (N, Q, h_i * w_i): True at the pixels in a query's
    mask, the only ones that it attends to. A query with an empty mask attends to all.
    """
    inside = masks >= 0
    return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]


# --- Loss -------------------------------------------------------------------------------------------------


def set_losses(outputs: list[Queries], mask: Tensor, points: int = POINTS) -> Tensor:
    """Compute Mask2Former's loss (arXiv:2112.01527, section 3.3) of each output, (D,), for ids (N, H, W).

    The pixels of a class in an image are a segment. It is matched to one query; the other queries should
    predict "none". Masks are compared at random points, most of them where the network is uncertain. Ignored
    pixels do not count.
    """
    with torch.autocast(mask.device.type, enabled=False):
        classes = torch.stack([output.classes for output in outputs], dim=1).float()  # (N, D, Q, K + 1)
        none = classes.shape[3] - 1
        # one copy to the host, and one back for which it does not wait
        target, most = assign(matching_costs(outputs, mask, points).cpu())
        target = target.to(mask.device, non_blocking=True)  # (N, D, Q)

        # 1. the class of each query
        weight = torch.where(target == none, NO_OBJECT_WEIGHT, 1.0)
        log_probs = classes.log_softmax(dim=3).gather(3, target[..., None])[..., 0]
        losses = -LOSS_WEIGHTS['class'] * (weight * log_probs).sum((0, 2)) / weight.sum((0, 2))

        # 2. the masks of T queries in each image: the matched ones, then some of "none", the last class
        target, queries = (x[..., :most] for x in target.sort(dim=2, stable=True))  # (N, D, T)
        embeddings = torch.stack([output.embeddings for output in outputs], dim=1)
        embeddings = embeddings.gather(2, queries[..., None].expand(-1, -1, -1, embeddings.shape[3]))
        logits = outputs[0]._replace(embeddings=embeddings.flatten(1, 2)).masks.float()  # (N, D * T, h, w)
        with torch.no_grad():
            locations = uncertain_points(logits.flatten(0, 1), points)
            truth, valid = sample_truth(mask, target.flatten(1), locations.unflatten(0, logits.shape[:2]))
        sampled = sample_points(logits.flatten(0, 1)[:, None], locations).view(truth.shape)
        mask_loss, dice_loss = point_losses(sampled, truth, valid)
        pairs = (LOSS_WEIGHTS['mask'] * mask_loss + LOSS_WEIGHTS['dice'] * dice_loss).view(target.shape)
        matched = target < none
        return losses + safe_divide(pairs.where(matched, 0).sum((0, 2)), matched.sum((0, 2)))


@torch.no_grad()
def matching_costs(outputs: list[Queries], mask: Tensor, points: int) -> Tensor:
    """Return the cost (N, D, Q, K) of matching a query to a class; it is infinite if an image of the mask has
    no pixel of it. All masks of an image are compared at the same points.
    """
    pixels, none = outputs[0].pixels, outputs[0].classes.shape[2] - 1
    locations = torch.rand(len(mask), points, 2, device=mask.device)
    pixels = sample_points(pixels.float(), locations).to(pixels.dtype)  # (N, C, P)
    truth, valid = sample_truth(mask, torch.arange(none, device=mask.device), locations[:, None])
    truth, valid = truth.mT, valid.mT  # (N, P, K), (N, P, 1)
    costs = []
    for output in outputs:
        logits = (output.embeddings @ pixels).float()  # (N, Q, P)
        probs = logits.sigmoid()
        class_cost = -output.classes.float().softmax(dim=2)[..., :-1]
        # the losses of point_losses of all pairs, as matrix products
        mask_cost = (F.softplus(logits) @ valid - logits @ truth) / valid.sum(1, keepdim=True).clamp(min=1)
        dice_cost = 1 - (2 * probs @ truth + 1) / (probs @ valid + truth.sum(1, keepdim=True) + 1)
        terms = {'class': class_cost, 'mask': mask_cost, 'dice': dice_cost}
        costs.append(sum(LOSS_WEIGHTS[name] * cost for name, cost in terms.items()))
    costs = torch.stack(costs, dim=1).nan_to_num(1e6).clamp(-1e6, 1e6)
    present = mask.new_zeros(len(mask), IGNORED + 1, dtype=torch.bool)
    present.scatter_(1, mask.flatten(1).long(), True)
    return costs.masked_fill(~present[:, None, None, :none], math.inf)


def assign(costs: Tensor) -> tuple[Tensor, int]:
    """Match queries and classes at the lowest total cost, (N, D, Q, K). Return the class of each query,
    (N, D, Q), with K for "none", and the largest number of matched queries of an image, or 1 if none is.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and no other head needs it

    costs = costs.numpy()
    target = np.full(costs.shape[:3], costs.shape[3])
    for place in np.ndindex(costs.shape[:2]):
        present = np.flatnonzero(np.isfinite(costs[place][0]))
        queries, segments = linear_sum_assignment(costs[place][:, present])
        target[place][queries] = present[segments]
    most = (target < costs.shape[3]).sum(axis=2).max()
    return torch.from_numpy(target), max(1, int(most))


def point_losses(logits: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy and the Dice loss, (...), of masks at points, (..., P) each; valid is the
    share of a point that is not ignored, and truth the part of it that belongs to the mask.
    """
    cross = safe_divide((F.softplus(logits) * valid - logits * truth).sum(-1), valid.sum(-1))
    probs = logits.sigmoid()
    return cross, 1 - (2 * (probs * truth).sum(-1) + 1) / ((probs * valid).sum(-1) + truth.sum(-1) + 1)


def uncertain_points(masks: Tensor, points: int) -> Tensor:
    """Choose points (M, P, 2) for mask logits (M, h, w): three quarters are the most uncertain of three times
    as many random points (PointRend, arXiv:1912.08193), the others are random.
    """
    candidates = torch.rand(len(masks), OVERSAMPLING * points, 2, device=masks.device)
    certainty = sample_points(masks[:, None], candidates)[:, 0].abs()
    count = int(UNCERTAIN_SHARE * points)
    index = certainty.topk(count, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, torch.rand(len(masks), points - count, 2, device=masks.device)], dim=1)


def sample_truth(mask: Tensor, ids: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a mask (N, H, W) at (N, M, P, 2), x and y from 0 to 1: return the shares, (N, M, P) each, of a
    point that have the id (N, M), and that are not ignored. One of the two M may be 1.
    """
    index, weights = corners(locations, mask.shape[1:])  # (N, 4, M, P)
    padded = F.pad(mask, (1, 1, 1, 1), value=IGNORED - 1).flatten(1)
    found = padded.gather(1, index.flatten(1)).view(index.shape)
    truth = weights.where(found == ids.to(mask.dtype)[..., None, :, None], 0).sum(1)
    return truth, 1 - weights.where(found == IGNORED, 0).sum(1)


def sample_points(maps: Tensor, locations: Tensor) -> Tensor:
    """Sample (M, C, h, w) at (M, P, 2), x and y from 0 to 1, bilinear → (M, C, P)."""
    if not (torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()):
        return F.grid_sample(maps, 2 * locations[:, :, None] - 1, align_corners=False)[..., 0]
    # the gradient of grid_sample has no deterministic form on a GPU: add up the four pixels around a point
    rows = F.pad(maps, (1, 1, 1, 1)).flatten(2).mT  # (M, (h + 2) * (w + 2), C)
    index, weights = corners(locations, maps.shape[2:])  # (M, 4, P)
    first = rows.shape[1] * torch.arange(len(rows), device=rows.device)
    index = (index + first[:, None, None]).int()
    index, weights = (x.mT.flatten(0, 1) for x in (index, weights))  # (M * P, 4)
    sums = F.embedding_bag(index, rows.flatten(0, 1), mode='sum', per_sample_weights=weights)
    return sums.unflatten(0, locations.shape[:2]).mT


def corners(points: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Return the bilinear weights of the four pixels around points (N, ..., 2), x and y from 0 to 1, of a map
    of (h, w) pixels, and their indices in this map once it is padded by one pixel on each side: (N, 4, ...).
    """
    lows, shares = [], []
    for position, length in zip(points.unbind(-1), size[::-1], strict=True):
        position = (position * length + 0.5).clamp(0, length + 1)
        low = position.detach().long().clamp(0, length)  # after long, so that a NaN has an index
        lows.append(low)
        shares.append(torch.stack([low + 1 - position, position - low], dim=1))
    stride = size[1] + 2
    first = lows[1] * stride + lows[0]
    index = torch.stack([first, first + 1, first + stride, first + stride + 1], dim=1)
    return index, (shares[1][:, :, None] * shares[0][:, None]).flatten(1, 2)
