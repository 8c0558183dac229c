"""Predict a photo through overlapping tiles, and resize its rows as they come: memory grows with the tile.

Probabilities of overlapping tiles are averaged with Gaussian weights, which are highest in the middle of a
tile. The overlap, half a tile, and the Gaussian's sigma, an eighth of a tile's side, are nnU-Net's (Isensee
et al., Nature Methods 18, 2021: tile_step_size .5, sigma_scale 1/8).

Shapes: C channels (the classes, of several views one after another), h w a photo at scale 1, t u a tile, H W
the size of the result.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 0.5  # from a tile to the next, in tiles, at most
SIGMA = 1 / 8  # of the Gaussian, in tiles

Size = tuple[int, int]
Rows = tuple[int, Tensor]  # the number of the first row, and a map (C, rows, W)


class Scale(NamedTuple):
    """How far two neighbouring pixels of a result are apart in the map that it is resized from."""

    down: float
    across: float


def tile_starts(length: int, side: int) -> list[int]:
    """List the starts of tiles that cover a length: half a tile apart at most, the last at the end."""
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / (side * STEP))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def tile_weights(tile: Size, device: torch.device) -> Tensor:
    """Return the (t, u) weights of a tile's pixels: a Gaussian that is 1 in the middle."""
    tall, wide = (_gaussian(side, device) for side in tile)
    return tall[:, None] * wide


def _gaussian(side: int, device: torch.device) -> Tensor:
    offsets = torch.arange(side, device=device) - (side - 1) / 2
    return torch.exp(-0.5 * (offsets / (SIGMA * side)) ** 2)


def merge_tiles(
    predict: Callable[[list[tuple[int, int]]], Tensor], size: Size, tile: Size, chunk: int
) -> Iterator[Tensor]:
    """Average the tiles of a photo; yield its finished rows, (C, rows, w), from the top.

    `predict` returns the (n, C, t, u) probabilities of tiles by their corners (top, left), `chunk` of them at
    a time; a tile is not larger than the photo. One row of tiles is in memory.
    """
    (height, width), (tall, wide) = size, tile
    tops, lefts = tile_starts(height, tall), tile_starts(width, wide)
    total = weights = sums = None
    for top, below in zip(tops, [*tops[1:], height], strict=True):
        for start in range(0, len(lefts), chunk):
            columns = lefts[start : start + chunk]
            tiles = predict([(top, left) for left in columns])
            if total is None:
                total = tiles.new_zeros((tiles.shape[1], tall, width))
                weights, sums = tile_weights(tile, tiles.device), tiles.new_zeros((tall, width))
            for left, probs in zip(columns, tiles, strict=True):
                total[..., left : left + wide] += probs * weights
                sums[:, left : left + wide] += weights
        done = below - top
        yield total[:, :done] / sums[:done]
        for band in (total, sums):  # the rows that the next tiles cover too move up
            band[..., : tall - done, :] = band[..., done:, :].clone()
            band[..., tall - done :, :] = 0


def resize_stream(parts: Iterable[Tensor], size: Size, result: Size) -> Iterator[Rows]:
    """Resize the rows of a map (C, h, w), given in parts from the top, to a result (H, W)."""
    scale = Scale(*(a / b for a, b in zip(size, result, strict=True)))
    if size == result:
        top = 0
        for part in parts:
            yield top, part
            top += part.shape[1]
        return
    reach, rows, first, done = max(1.0, scale.down), None, 0, 0
    for part in parts:
        rows = part if rows is None else torch.cat([rows, part], 1)
        known = first + rows.shape[1]
        ready = math.floor((known - reach) / scale.down + 0.5)  # rows of the result that need no further one
        stop = result[0] if known == size[0] else min(ready, result[0])
        if stop > done:
            yield done, resize_rows(rows, scale, range(done, stop), result[1], first)
            done = stop
            needed = max(first, math.floor((done + 0.5) * scale.down - reach))
            rows, first = rows[:, needed - first :], needed


def resize_rows(maps: Tensor, scale: Scale, rows: range, width: int, first: int = 0) -> Tensor:
    """Compute some rows of a map that is resized as networks.layers.resize does it: bilinear, antialiased.

    `maps` (..., h, w) begins with row `first` of the map; the result is (..., len(rows), width).
    """
    reach = max(1.0, scale.down)
    low = max(first, math.floor((rows.start + 0.5) * scale.down - reach))
    high = min(first + maps.shape[-2], math.ceil((rows.stop - 0.5) * scale.down + reach))
    weights = pixel_weights(rows, scale.down, range(low, high)).to(maps)
    tall = weights @ maps[..., low - first : high - first, :]
    batch = tall.reshape(1, -1, *tall.shape[-2:])
    options = {'mode': 'bilinear', 'align_corners': False, 'antialias': True}
    if abs(scale.across * width - maps.shape[-1]) < 1e-6:
        resized = F.interpolate(batch, (len(rows), width), **options)
    else:  # the map goes on to the right of what is shown
        factors = (1.0, 1 / scale.across)
        resized = F.interpolate(batch, scale_factor=factors, recompute_scale_factor=False, **options)
    return resized[..., :width].reshape(*tall.shape[:-1], width)


def resize_steps(maps: Tensor, size: Size, step: int) -> Tensor:
    """Compute every `step`-th row and column of maps (..., h, w) resized to a size (H, W), as
    networks.layers.resize does it.
    """
    tall, wide = (
        pixel_weights(range(0, side, step), length / side, range(length)).to(maps)
        for side, length in zip(size, maps.shape[-2:], strict=True)
    )
    return tall @ maps @ wide.T


def pixel_weights(pixels: range, scale: float, sources: range) -> Tensor:
    """Return the weight of each source pixel in each pixel of a line that is resized, float64: bilinear, and
    antialiased if it shrinks. `scale` is how far two neighbouring pixels are apart in the source.
    """
    reach = max(1.0, scale)
    lines = ((line.start, line.stop, line.step) for line in (pixels, sources))
    centres, positions = (torch.arange(*line, dtype=torch.float64) + 0.5 for line in lines)
    centres = centres * scale
    weights = (1 - (positions - centres[:, None]).abs() / reach).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def even_bands(parts: Iterable[Rows], height: int, rows: int) -> Iterator[Rows]:
    """Cut what comes in parts from the top into bands of `rows` rows; the last has what is left of them."""
    waiting, top = None, 0
    for _, part in parts:
        waiting = part if waiting is None else torch.cat([waiting, part], 1)
        while waiting.shape[1] >= min(rows, height - top) > 0:
            count = min(rows, height - top)
            yield top, waiting[:, :count]
            waiting, top = waiting[:, count:], top + count
