"""Predict with test-time augmentation: photos → probabilities → masks at the scored size, for all scripts.

    for band in predict_rows(model, cache, rows, cfg):      # or predict_sizes(predictor, cache, rows, sizes)
        mask = to_mask(band.probs, cfg)

A photo takes one of two ways: Predictor.whole, in batches of one shape, or Predictor.tiled (engine/tiles.py)
if it is larger than `window` at scale 1, where its longer side is image_size. Both keep its aspect and yield
its probabilities in bands of rows, so that a large photo needs no more memory than a band. A single view that
is larger than `window`, or not of the encoder's fixed size, passes through sliding windows (view_logits).

Shapes: N batch, C channels, H W a photo, K classes, V views, h w logits of a view, S cache_size, B side after
submission.downsample_probs (256, or S for block_max).
"""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import ttach
import ttach.functional
from torch import Tensor

from config import Config
from data.cache import Cache, fit_size, resize_image
from dataset import WholePhotos, make_loader, normalize
from engine.checkpoint import Run
from engine.distributed import Ranks
from engine.tiles import Scale, Size, even_bands, merge_tiles, resize_rows, resize_steps, resize_stream
from metrics import count_pixels
from models import SegModel, memory_format
from networks.layers import resize
from submission import downsample_ids, downsample_probs
from utils.errors import BadInput, CheckFailed
from utils.progress import progress
from voting.thresholds import DEFAULT

STRIDE = 32  # pixels; the sides of every view are multiples of it
BAND = 1 << 24  # probabilities in a band of a photo
TILE_PIXELS = 1 << 20  # of the tiles that go through the model together

Share = tuple[float, float]  # of the rows and the columns of padded images, that shows the photos
WHOLE = (1.0, 1.0)
# the number of a photo, the first of some of its rows, and their probabilities (K, h, W)
Part = tuple[int, int, Tensor]


class Flip(ttach.base.DualTransform):
    """Flip each view: '' not at all, 'h' left to right, 'v' upside down, 'hv' both."""

    identity_param = ''

    def apply_aug_image(self, image: Tensor, mode: str = '', **_) -> Tensor:
        image = ttach.functional.hflip(image) if 'h' in mode else image
        return ttach.functional.vflip(image) if 'v' in mode else image

    apply_deaug_mask = apply_aug_image  # each flip undoes itself


class Rescale(ttach.base.ImageOnlyTransform):
    """Resize each view bilinearly, its sides rounded to the stride; resize_logits undoes it."""

    identity_param = 1.0

    def apply_aug_image(self, image: Tensor, scale: float = 1.0, **_) -> Tensor:
        height, width = (to_stride(side * scale) for side in image.shape[-2:])
        return resize(image, (height, width), antialias=True)


@dataclass(frozen=True)
class Predictor:
    """A model, and the views of a photo whose probabilities it averages, or with `stack` keeps apart.

    Then a result is (N, V, K, ...) in place of (N, K, ...).
    """

    model: SegModel
    cfg: Config
    views: Sequence[ttach.base.Transformer]
    stack: bool = False

    @classmethod
    def of(cls, model: SegModel, cfg: Config, tta: bool = True) -> 'Predictor':
        """Take the config's views, or without tta the plain one alone."""
        views = make_views(cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales) if tta else make_views()
        return cls(model, cfg, views)

    def whole(self, images: Tensor, sizes: Sequence[Size | None]) -> Iterator[Part]:
        """Predict images (N, C, H, W), each at a size (H, W), or (None) by the downsampling rule.

        The logits of all are in memory, and the probabilities of a band.
        """
        if None in sizes:
            side = self.cfg.cache_size
            with torch.inference_mode():  # not around the yield: it would reach into the caller
                batch = self.batch(images, (side, side), self.cfg.downsample)
            yield from ((number, 0, probs) for number, probs in enumerate(batch))
            return
        with torch.inference_mode():
            inputs, share = self.prepare(images)
            maps = list(self.logits_of_views(inputs))
        for number, size in enumerate(sizes):
            step = self.band_rows(size)
            for top in range(0, size[0], step):
                rows = range(top, min(top + step, size[0]))
                with torch.inference_mode():
                    bands = (resize_logits(logits[number, None], share, size, rows) for logits in maps)
                    probs = self.merge(to_probs(band, self.cfg)[0] for band in bands)
                yield number, top, probs

    def tiled(self, photos: Iterable[np.ndarray], sizes: Sequence[Size | None]) -> Iterator[Part]:
        """Predict photos (h, w, C) at scale 1 through tiles, each at a size, or (None) by the rule."""
        cfg = self.cfg
        for number, (photo, size) in enumerate(zip(photos, sizes, strict=True)):
            if size is None:
                square = torch.cat([probs for _, probs in self.tiles(photo, (cfg.cache_size,) * 2)], dim=-2)
                flat = square.flatten(0, -3)  # (K, S, S), or (V K, S, S)
                probs = downsample_probs(flat[None], cfg.downsample, cfg.competition.score_size)[0]
                yield number, 0, probs.unflatten(0, square.shape[:-2])
            else:
                yield from ((number, top, probs) for top, probs in self.tiles(photo, size))

    def tiles(self, photo: np.ndarray, size: Size) -> Iterator[tuple[int, Tensor]]:
        """Predict a photo (h, w, C) at scale 1 through tiles; yield bands of its probabilities at a size."""
        side, num_classes = self.cfg.window, len(self.cfg.classes)
        tile = min(side, photo.shape[0]), min(side, photo.shape[1])

        def predict(corners: list[tuple[int, int]]) -> Tensor:
            crops = [photo[top : top + tile[0], left : left + tile[1]] for top, left in corners]
            with torch.inference_mode():
                return self.batch(to_images(np.stack(crops)), tile).flatten(1, -3)

        parts = merge_tiles(predict, photo.shape[:2], tile, max(1, TILE_PIXELS // (tile[0] * tile[1])))
        bands = even_bands(resize_stream(parts, photo.shape[:2], size), size[0], self.band_rows(size))
        for top, probs in bands:
            yield top, probs.unflatten(0, (-1, num_classes)) if self.stack else probs

    def batch(self, images: Tensor, size: Size, rule: str | None = None) -> Tensor:
        """Predict images (N, C, H, W): (N, K, *size) float32, or with a downsampling rule (N, K, B, B)."""
        inputs, share = self.prepare(images)
        maps = self.logits_of_views(inputs)
        if rule == 'nearest' and share == WHOLE:  # the probabilities of a pixel need no other pixel
            step, rule = size[0] // self.cfg.competition.score_size, None
            maps = (resize_steps(logits, size, step) for logits in maps)
        else:
            maps = (resize_logits(logits, share, size) for logits in maps)
        return self.merge((to_probs(logits, self.cfg, rule) for logits in maps), dim=1)

    def prepare(self, images: Tensor) -> tuple[Tensor, Share]:
        """Normalise (N, C, H, W) images on the model's device, and pad their sides to multiples of STRIDE."""
        device = next(self.model.parameters()).device
        images = normalize(images.to(device, non_blocking=True), self.model.mean, self.model.std)
        height, width = images.shape[-2:]
        if height % STRIDE == width % STRIDE == 0:
            return images, WHOLE
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))  # 0 is the mean colour
        return padded, (height / padded.shape[-2], width / padded.shape[-1])

    def logits_of_views(self, inputs: Tensor) -> Iterable[Tensor]:
        """Compute the float32 logits (N, K, h, w) of each view of prepared images, turned back, in order.

        A GPU takes views of one shape together, for a few photos do not fill it; a CPU gains nothing by that,
        and would compute other bits.
        """
        if inputs.is_cuda:
            return self.stacked_logits(inputs)
        return (view.deaugment_mask(self.logits(view.augment_image(inputs))) for view in self.views)

    def stacked_logits(self, inputs: Tensor) -> list[Tensor]:
        """Compute the logits of all views, up to infer_batch_size images of one shape in a forward pass."""
        shapes = [view.augment_image(inputs[:1]).shape for view in self.views]
        maps: list[Tensor] = [inputs] * len(self.views)
        for group in group_by_shape(shapes, max(1, self.cfg.infer_batch_size // len(inputs))):
            logits = self.logits(torch.cat([self.views[i].augment_image(inputs) for i in group]))
            for i, part in zip(group, logits.chunk(len(group)), strict=True):
                maps[i] = self.views[i].deaugment_mask(part)
        return maps

    def logits(self, inputs: Tensor) -> Tensor:
        """Compute the float32 logits of images: (N, C, H, W) → (N, K, h, w)."""
        inputs = inputs.contiguous(memory_format=memory_format(self.cfg))
        with autocast(self.cfg, inputs.device):
            return view_logits(self.model, inputs, self.cfg.window).float()

    def merge(self, views: Iterable[Tensor], dim: int = 0) -> Tensor:
        """Average the probabilities of all views, or stack them along a dimension."""
        if self.stack:
            return torch.stack(list(views), dim)
        total = reduce(operator.add, views)
        return total if len(self.views) == 1 else total / len(self.views)

    def band_rows(self, size: Size) -> int:
        """Return how many rows a band has of a photo that is predicted at a size."""
        channels = len(self.cfg.classes) * (len(self.views) if self.stack else 1)
        return max(1, min(size[0], BAND // (channels * size[1])))


def resize_logits(maps: Tensor, share: Share, size: Size, rows: range | None = None) -> Tensor:
    """Resize the share of maps (..., h, w) that shows a photo to a size (H, W); return all rows, or some."""
    rows = range(size[0]) if rows is None else rows
    if share == WHOLE and len(rows) == size[0]:
        return resize(maps, size, antialias=True)
    scale = Scale(*(a * b / c for a, b, c in zip(maps.shape[-2:], share, size, strict=True)))
    height, width = (math.ceil(a * b - 1e-6) for a, b in zip(maps.shape[-2:], share, strict=True))
    return resize_rows(maps[..., :height, :width], scale, rows, size[1])


def to_images(photos: np.ndarray) -> Tensor:
    """Turn photos (N, H, W, C) into images (N, C, H, W)."""
    return torch.from_numpy(photos).permute(0, 3, 1, 2)


def to_probs(logits: Tensor, cfg: Config, rule: str | None = None) -> Tensor:
    """Turn logits (N, K, H, W) into the probabilities of one class a pixel, or of each class by itself; with
    a downsampling rule into (N, K, B, B).
    """
    probs = logits.sigmoid() if cfg.competition.is_multilabel else logits.softmax(dim=1)
    return probs if rule is None else downsample_probs(probs, rule, cfg.competition.score_size)


def to_stride(side: float) -> int:
    """Round a side in pixels to the nearest multiple of STRIDE, at least one."""
    return max(STRIDE, round(side / STRIDE) * STRIDE)


def list_views(
    flips: Sequence[str] = (), rotations: Sequence[int] = (), scales: Sequence[float] = (1.0,)
) -> list[tuple[str, float, int]]:
    """List the views of every flip and no flip, every scale, every rotation and no rotation, as (flip, scale,
    degrees). Of those that show the same only the first is listed, so that each counts once in a mean.
    """
    distinct = {}
    for view in product(('', *flips), scales, (0, *rotations)):
        distinct.setdefault(same_view(*view), view)
    return [*distinct.values()]


def same_view(flip: str, scale: float, degrees: int) -> tuple[bool, float, int]:
    """Return what two views have in common if they show the same: v is h and then half a turn."""
    return len(flip) == 1, scale, (degrees + 180 * ('v' in flip)) % 360


def make_views(
    flips: Sequence[str] = (), rotations: Sequence[int] = (), scales: Sequence[float] = (1.0,)
) -> list[ttach.base.Transformer]:
    """Make the views that list_views names."""
    flip, rescale = Flip('mode', ('', *flips)), Rescale('scale', tuple(scales))
    every = ttach.Compose([flip, rescale, ttach.Rotate90([0, *rotations])])
    distinct = {*list_views(flips, rotations, scales)}
    views = dict(zip(every.aug_transform_parameters, every, strict=True))
    return [view for name, view in views.items() if name in distinct]


def view_logits(model: SegModel, inputs: Tensor, window: int) -> Tensor:
    """Compute the logits of a view, (N, C, H, W) → (N, K, h, w), in one pass or through windows, which are
    used if the view is larger than `window` (0: never) or not of the encoder's fixed size. They overlap by a
    third, and logits are averaged there, as in mmsegmentation's slide inference.
    """
    side = model.fixed_size or window
    height, width = inputs.shape[-2:]
    fits = (height, width) == (side, side) if model.fixed_size else max(height, width) <= side
    if not side or fits:
        return main_logits(model(inputs))
    inputs = F.pad(inputs, (0, max(0, side - width), 0, max(0, side - height)))  # 0 is the mean colour
    total, count = 0.0, torch.zeros(inputs.shape[-2:], device=inputs.device)
    for top in window_starts(inputs.shape[-2], side):
        for left in window_starts(inputs.shape[-1], side):
            crop = inputs[..., top : top + side, left : left + side]
            logits = resize(main_logits(model(crop)).float(), (side, side))
            edges = (left, inputs.shape[-1] - left - side, top, inputs.shape[-2] - top - side)
            total = total + F.pad(logits, edges)
            count[top : top + side, left : left + side] += 1
    return (total / count)[..., :height, :width]


def window_starts(length: int, side: int) -> list[int]:
    """List the starts of windows that cover a length: two thirds of a side apart, the last one at the end."""
    return [*range(0, length - side, 2 * side // 3), length - side]


def main_logits(outputs: list) -> Tensor:
    """Return the (N, K, h, w) logits of a model's main output."""
    return outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1].logits()


class Band(NamedTuple):
    """The probabilities of a photo, or of some of its rows; all bands of a photo come one after another."""

    position: int  # of the photo among the rows that were asked for
    top: int  # the first of its rows
    probs: Tensor  # (K, h, W), of several views (V, K, h, W); with a downsampling rule (K, B, B)
    is_last: bool


def predict_rows(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, tta: bool = True, desc: str | None = None
) -> Iterator[Band]:
    """Predict rows of the cache at the scored size, photos of one shape together; yield Bands of each."""
    yield from predict_sizes(Predictor.of(model, cfg, tta), cache, rows, scored_sizes(cache, rows, cfg), desc)


def scored_sizes(cache: Cache, rows: np.ndarray, cfg: Config) -> list[Size | None]:
    """Return the size (H, W) at which each row is scored; None for a square, by the downsampling rule."""
    is_own = cfg.competition.score_size == 'own'
    sizes = cache.coco.photos.sizes() if is_own else [None] * len(cache)
    return [sizes[row] for row in rows]


class EvalBatches:
    """Rows of a cache in batches of one shape, and the loader of those that need no tiles, whose workers live
    as long as it.
    """

    def __init__(self, cache: Cache, rows: np.ndarray, cfg: Config) -> None:
        self.batches = group_by_shape([cache.photos.shapes[row] for row in rows], cfg.infer_batch_size)
        self.is_tiled = [needs_tiles(cache.photos.shapes[rows[batch[0]]], cfg) for batch in self.batches]
        whole = [batch for batch, tiled in zip(self.batches, self.is_tiled, strict=True) if not tiled]
        photos, workers = WholePhotos(cache, rows, cfg.image_size), min(cfg.workers, len(whole))
        self.loader = make_loader(photos, workers, batch_sampler=whole)


def predict_sizes(
    predictor: Predictor,
    cache: Cache,
    rows: np.ndarray,
    sizes: Sequence[Size | None],
    desc: str | None = None,
    batches: EvalBatches | None = None,
) -> Iterator[Band]:
    """Predict rows of the cache, each at its size (H, W), or (None) by the downsampling rule."""
    cfg = predictor.cfg
    batches = batches or EvalBatches(cache, rows, cfg)
    loader = iter(batches.loader)
    predictor.model.eval()
    bar = progress(batches.batches, desc or '', 'batch', quiet=desc is None)
    for batch, tiled in zip(bar, batches.is_tiled, strict=True):
        batch_sizes = [sizes[position] for position in batch]
        if tiled:
            photos = (scaled_photo(cache.photos[rows[position]], cfg) for position in batch)
            parts = predictor.tiled(photos, batch_sizes)
        else:
            images, _ = next(loader)
            parts = predictor.whole(images, batch_sizes)
        for number, top, probs in parts:
            size = batch_sizes[number]
            is_last = size is None or top + probs.shape[-2] == size[0]
            yield Band(batch[number], top, probs, is_last)


def group_by_shape(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """Group positions into batches of one shape, in the order in which they are full; smaller ones last."""
    batches, waiting = [], {}
    for position, shape in enumerate(shapes):
        batch = waiting.setdefault(tuple(shape), [])
        batch.append(position)
        if len(batch) == size:
            batches.append(waiting.pop(tuple(shape)))
    return [*batches, *waiting.values()]


def scaled_size(shape: Sequence[int], cfg: Config) -> Size:
    """Return the size (h, w) at scale 1 of a photo of a shape (H, W, ...)."""
    return fit_size(tuple(shape[:2]), cfg.image_size)


def needs_tiles(shape: Sequence[int], cfg: Config) -> bool:
    """Tell whether a photo of a shape (H, W, ...) is larger at scale 1 than the config's window."""
    return 0 < cfg.window < max(scaled_size(shape, cfg))


def scaled_photo(photo: np.ndarray, cfg: Config) -> np.ndarray:
    """Resize a photo (H, W, C) to scale 1; one that has that size stays mapped."""
    return resize_image(photo, scaled_size(photo.shape, cfg))


def to_mask(probs: Tensor, cfg: Config, thresholds: Sequence[float] | None = None) -> np.ndarray:
    """Decide on the classes of a Band's pixels: (K, ...) probabilities → (H, W) uint8 ids on the CPU, or
    (K, H, W) planes of those that reach their thresholds, by default 0.5.
    """
    return finish_mask(decide(probs, cfg, thresholds), cfg).cpu().numpy()


def decide(probs: Tensor, cfg: Config, thresholds: Sequence[float] | None = None) -> Tensor:
    """Return the likeliest classes, (..., K, H, W) → (..., H, W), or whether classes that may overlap reach
    their thresholds, (..., K, H, W).
    """
    if not cfg.competition.is_multilabel:
        return probs.max(-3).indices  # argmax takes four times as long on a CPU
    lowest = probs.new_tensor(thresholds or [DEFAULT] * len(cfg.classes))
    return (probs >= lowest[:, None, None]).to(torch.uint8)


def finish_mask(pred: Tensor, cfg: Config) -> Tensor:
    """Bring what was decided, (..., B, B), to the scored size, as uint8."""
    side = cfg.competition.score_size
    if side != 'own':
        planes = downsample_ids(pred.reshape(-1, *pred.shape[-2:]), cfg.downsample, side)
        pred = planes.reshape(*pred.shape[:-2], side, side)
    return pred.to(torch.uint8)


def predict_shard(
    run: Run, cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, desc: str
) -> Iterator[Band]:
    """Predict this rank's shard of the rows; yield its Bands, with positions in `rows`."""
    shard = ranks.shard(len(rows))
    desc = desc if ranks.is_main and desc else None
    for band in predict_rows(run.model, cache, rows[shard], run.cfg, tta, desc):
        yield band._replace(position=shard[band.position])


def predict_shard_by_folds(
    runs: Sequence[Run], cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, desc: str
) -> Iterator[tuple[Band, ...]]:
    """Predict as predict_shard does, but with several runs, a batch or a tile after another; yield a Band of
    each run.
    """
    folds = []
    for k, run in enumerate(runs):
        workers = math.ceil(run.cfg.workers / len(runs))
        run = replace(run, cfg=run.cfg.model_copy(update={'workers': workers}))
        folds.append(predict_shard(run, cache, rows, ranks, tta, '' if k else desc))
    yield from zip(*folds, strict=True)


def mean_band(bands: Sequence[Band]) -> Band:
    """Average the probabilities of the same rows of a photo."""
    total = sum(band.probs.cpu().numpy() for band in bands)
    return bands[0]._replace(probs=torch.from_numpy(total / len(bands)))


def prediction_shapes(cfg: Config, cache: Cache, rows: np.ndarray) -> list[tuple[int, ...]]:
    """Return the shape (K, H, W), or (K, B, B), of the probabilities of each row."""
    side = cfg.cache_size if cfg.downsample == 'block_max' else cfg.competition.score_size
    return [(len(cfg.classes), *(size or (side, side))) for size in scored_sizes(cache, rows, cfg)]


def photo_bands(run: Run, photo: np.ndarray, tta: bool = True) -> Iterator[tuple[int, Tensor]]:
    """Predict a photo of any size (H, W, C), at scale 1 as a photo of the cache is: yield its bands, the
    first row of each and its (K, rows, W) probabilities.
    """
    yield from ((top, probs) for _, top, probs in batch_bands(run, [photo], tta))


def batch_bands(run: Run, photos: Sequence[np.ndarray], tta: bool = True) -> Iterator[Part]:
    """Predict photos (H, W, C) of one free_size together: yield the bands of each."""
    predictor, sizes = Predictor.of(run.model, run.cfg, tta), [photo.shape[:2] for photo in photos]
    scaled = [resize_image(photo, free_size(photo.shape, run.cfg)) for photo in photos]
    if 0 < run.cfg.window < max(scaled[0].shape[:2]):
        yield from predictor.tiled(scaled, sizes)
    else:
        yield from predictor.whole(to_images(np.stack(scaled)), sizes)


def free_size(shape: Sequence[int], cfg: Config) -> Size:
    """Return the size (h, w) at scale 1 of a photo (H, W, ...) that is in no cache."""
    return fit_size(tuple(shape[:2]), cfg.image_size or cfg.cache_size)


def photo_probs(run: Run, photo: np.ndarray, tta: bool = True) -> Tensor:
    """Predict a photo of any size: (H, W, C) → (K, H, W)."""
    return torch.cat([probs for _, probs in photo_bands(run, photo, tta)], dim=1)


def photo_mask(run: Run, photo: np.ndarray, tta: bool = True) -> np.ndarray:
    """Predict a photo of any size: (H, W, C) → (H, W) uint8 class ids, or (K, H, W) planes of classes that
    may overlap. Raises BadInput for an array of another shape or type.
    """
    competition = run.cfg.competition
    expected = f'(H, W, {competition.channels}) uint{competition.depth}'
    shape = photo.shape if photo.ndim == 3 else (*photo.shape, 1)
    if len(shape) != 3 or shape[2] != competition.channels or photo.dtype != f'uint{competition.depth}':
        raise BadInput(f'photo: found {photo.shape} {photo.dtype}, expected {expected}')
    own = run.cfg.model_copy(update={'competition': competition.model_copy(update={'score_size': 'own'})})
    return to_mask(photo_probs(run, photo.reshape(shape), tta), own, run.thresholds)


def evaluate(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, ranks: Ranks, tta: bool = False
) -> np.ndarray:
    """Count the pixels of a model's masks of n rows of the cache, each rank those of its shard: (n, 3, K)."""
    return Evaluation(cache, rows, cfg, ranks).count(model, tta)


class Evaluation:
    """n rows of a cache to validate models on, one after another; each rank predicts its shard of them."""

    def __init__(self, cache: Cache, rows: np.ndarray, cfg: Config, ranks: Ranks) -> None:
        self.cache, self.rows, self.cfg, self.ranks = cache, rows, cfg, ranks
        self.shard = ranks.shard(len(rows))
        self.batches = EvalBatches(cache, rows[self.shard], cfg)

    def count(self, model: SegModel, tta: bool = False) -> np.ndarray:
        """Count the pixels of a model's masks: (n, 3, K)."""
        cfg, ranks, rows = self.cfg, self.ranks, self.rows[self.shard]
        counts = np.zeros((len(self.rows), 3, len(cfg.classes)), np.int64)
        seen = np.zeros(len(self.rows), np.int64)
        truths, desc = Truths(self.cache, self.rows), 'valid' if ranks.is_main else None
        predictor, sizes = Predictor.of(model, cfg, tta), scored_sizes(self.cache, rows, cfg)
        for band in predict_sizes(predictor, self.cache, rows, sizes, desc, self.batches):
            position = self.shard[band.position]
            counts[position] += truths.count(position, band.top, to_mask(band.probs, cfg))
            seen[position] += band.is_last
        check_seen(seen, ranks, 'validation')
        return ranks.sum(torch.from_numpy(counts).to(ranks.device)).cpu().numpy()


class Truths:
    """The masks of rows of a cache at the scored size, of which the last one is in memory."""

    def __init__(self, cache: Cache, rows: np.ndarray) -> None:
        self.cache, self.rows, self.position = cache, rows, None

    def rows_of(self, position: int, top: int, height: int) -> np.ndarray:
        """Return rows of a mask: (height, w) ids, or (K, height, w) planes."""
        if position != self.position:
            self.position, self.mask = position, self.cache.truth(int(self.rows[position]))
        return self.mask[..., top : top + height, :]

    def count(self, position: int, top: int, pred: np.ndarray) -> np.ndarray:
        """Count the pixels of a predicted mask, or of rows of it: (3, K)."""
        truth = self.rows_of(position, top, pred.shape[-2])
        return count_pixels(truth, pred, len(self.cache.coco.competition.classes))


def check_seen(seen: np.ndarray, ranks: Ranks, task: str) -> None:
    """Raise CheckFailed unless the ranks together predicted every photo once; seen (n,) counts them."""
    total = ranks.sum(torch.from_numpy(seen).to(ranks.device)).cpu().numpy()
    if (total != 1).any():
        missing, twice = np.count_nonzero(total == 0), np.count_nonzero(total > 1)
        counts = f'{missing} of {len(seen)} photos were not predicted, and {twice} more than once'
        raise CheckFailed(f'{task}: {counts}; expected each exactly once')


def amp_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Choose the type that autocast computes in; float32 means that autocast is off."""
    if cfg.amp != 'auto':
        return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': torch.float32}[cfg.amp]
    if device.type == 'cuda':  # Ampere is the first to compute in bf16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """Open the one mixed-precision context of training, validation and inference."""
    dtype = amp_dtype(cfg, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
