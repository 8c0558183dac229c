"""Predict with test-time augmentation: photos → probabilities → masks at the scored size, for all scripts.

Shapes: N batch, C channels, H W a photo, K classes, h w logits of a view, S cache_size, B side after
submission.downsample_probs (256, or S for block_max).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import ttach
from torch import Tensor
from torch.utils.data import DataLoader

from config import Config
from data.cache import Cache
from dataset import WholePhotos, make_loader, normalize
from engine.checkpoint import Run, load_run
from engine.distributed import Ranks
from metrics import confusion_matrix, image_counts
from models import SegModel
from networks.layers import resize
from submission import downsample_probs, probs_to_ids
from utils.errors import CheckFailed
from utils.files import allocate_array
from utils.progress import progress

STRIDE = 32  # pixels; the sides of every view are multiples of it


class Flip(ttach.base.DualTransform):
    """Flip each view: '' not at all, 'h' left to right, 'v' upside down, 'hv' both."""

    identity_param = ''

    def apply_aug_image(self, image: Tensor, mode: str = '', **_) -> Tensor:
        image = ttach.functional.hflip(image) if 'h' in mode else image
        return ttach.functional.vflip(image) if 'v' in mode else image

    apply_deaug_mask = apply_aug_image  # each flip undoes itself


class Rescale(ttach.base.ImageOnlyTransform):
    """Resize each view bilinearly, its sides rounded to the stride; view_probs resizes the logits back."""

    identity_param = 1.0

    def apply_aug_image(self, image: Tensor, scale: float = 1.0, **_) -> Tensor:
        height, width = (to_stride(side * scale) for side in image.shape[-2:])
        return resize(image, (height, width), antialias=True)


def predict_probs(
    model: SegModel,
    images: Tensor,
    cfg: Config,
    size: tuple[int, int],
    tta: bool = True,
    rule: str | None = None,
) -> Tensor:
    """Average the probabilities of a batch over the config's views, or predict one plain view without tta.

    (N, C, H, W) uint8 → (N, K, *size) float32 on the model's device; with a downsampling rule (N, K, B, B).
    """
    views = make_views(cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales) if tta else make_views()
    device = next(model.parameters()).device
    images = normalize(images.to(device, non_blocking=True), model.mean, model.std)
    return sum(view_probs(model, images, cfg, view, size, rule) for view in views) / len(views)


def to_stride(side: float) -> int:
    """Round a side in pixels to the nearest multiple of STRIDE, at least one."""
    return max(STRIDE, round(side / STRIDE) * STRIDE)


def make_views(
    flips: Sequence[str] = (), rotations: Sequence[int] = (), scales: Sequence[float] = (1.0,)
) -> ttach.Compose:
    """Combine every flip and no flip with every scale, every rotation and no rotation."""
    flip, rescale = Flip('mode', ('', *flips)), Rescale('scale', tuple(scales))
    return ttach.Compose([flip, rescale, ttach.Rotate90([0, *rotations])])


def view_probs(
    model: SegModel,
    images: Tensor,
    cfg: Config,
    view: ttach.base.Transformer,
    size: tuple[int, int],
    rule: str | None = None,
) -> Tensor:
    """Predict one view of a normalised batch; the shapes are those of predict_probs."""
    inputs = view.augment_image(images)
    if cfg.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with autocast(cfg, images.device):
        logits = view_logits(model, inputs, cfg.window)
    logits = resize(view.deaugment_mask(logits.float()), size, antialias=True)
    if rule == 'nearest':  # the softmax of a pixel needs no other pixel
        return downsample_probs(logits, rule).softmax(dim=1)
    probs = logits.softmax(dim=1)
    return probs if rule is None else downsample_probs(probs, rule)


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


def predict_rows(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, tta: bool = True, desc: str | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Predict rows of the cache in batches; yield (rows, (N, K, B, B) probabilities)."""
    size = cache.photos.shape[1:3]
    loader = make_eval_loader(cache, rows, cfg)
    model.eval()
    for images, batch in progress(loader, desc or '', 'batch', quiet=desc is None):
        with torch.inference_mode():  # not around the yield: it would reach into the caller
            probs = predict_probs(model, images, cfg, size, tta, cfg.downsample)
        yield batch.tolist(), probs


def make_eval_loader(cache: Cache, rows: np.ndarray, cfg: Config) -> DataLoader:
    """Load whole photos at image_size, in batches of infer_batch_size and in the order of `rows`."""
    workers = min(cfg.workers, -(-len(rows) // cfg.infer_batch_size))
    return make_loader(WholePhotos(cache, rows, cfg.image_size), workers, batch_size=cfg.infer_batch_size)


def probs_to_masks(probs: Tensor, cfg: Config) -> np.ndarray:
    """Take the most probable classes by the config's rule: (N, K, B, B) → (N, 256, 256) uint8 on the CPU."""
    return probs_to_ids(probs, cfg.downsample).to(torch.uint8).cpu().numpy()


def predict_shard(
    run: Run, cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, desc: str
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Predict this rank's shard of the rows; yield (position, (256, 256) uint8 mask, (K, B, B) probs)."""
    shard = ranks.shard(len(rows))
    positions = iter(shard)
    batches = predict_rows(run.model, cache, rows[shard], run.cfg, tta, desc if ranks.is_main else None)
    for _, batch_probs in batches:
        for mask, probs in zip(probs_to_masks(batch_probs, run.cfg), batch_probs, strict=True):
            yield next(positions), mask, probs


def predict_shard_by_folds(
    cfg: Config, cache: Cache, rows: np.ndarray, ranks: Ranks, tta: bool, folder: Path
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Predict as predict_shard does, but average the folds, in a file in `folder`, one model at a time."""
    shard = ranks.shard(len(rows))
    path = folder / f'.averaged{ranks.rank}.partial'
    total = None
    try:
        for k in range(cfg.folds):
            run = load_run(cfg, k, ranks.device)
            desc, done = f'test fold {k}' if ranks.is_main else None, 0
            for batch, probs in predict_rows(run.model, cache, rows[shard], run.cfg, tta, desc):
                if total is None:
                    total = allocate_array(path, np.float32, (len(shard), *probs.shape[1:]))
                total[done : done + len(batch)] += probs.cpu().numpy()
                done += len(batch)
        for number, position in enumerate(shard):
            mean = torch.from_numpy(total[number] / cfg.folds)
            yield position, probs_to_masks(mean[None], cfg)[0], mean
    finally:
        del total
        path.unlink(missing_ok=True)


def photo_probs(run: Run, photo: np.ndarray, tta: bool = True) -> Tensor:
    """Predict a photo of any size, its longer side resized to image_size: (H, W, 3) uint8 RGB → (K, H, W)."""
    height, width = photo.shape[:2]
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    scale = run.cfg.image_size / max(height, width)
    size = (to_stride(height * scale), to_stride(width * scale))
    inputs = resize(image, size, antialias=True).round().to(torch.uint8)
    with torch.inference_mode():
        probs = predict_probs(run.model, inputs, run.cfg, size, tta)
        return resize(probs, (height, width), antialias=True)[0]


def evaluate(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, ranks: Ranks, tta: bool = False
) -> np.ndarray:
    """Score a model on rows of the cache, each rank on its shard; return all (n, 3, K) image_counts."""
    counts = np.zeros((len(rows), 3, len(cfg.classes)), np.int64)
    seen = np.zeros(len(rows), np.int64)
    positions = {int(row): position for position, row in enumerate(rows)}
    desc = 'valid' if ranks.is_main else None
    for batch, probs in predict_rows(model, cache, rows[ranks.shard(len(rows))], cfg, tta, desc):
        for row, mask in zip(batch, probs_to_masks(probs, cfg), strict=True):
            counts[positions[row]] = image_counts(confusion_matrix(cache.truth(row), mask, len(cfg.classes)))
            seen[positions[row]] += 1
    check_seen(seen, ranks, 'validation')
    return ranks.sum(torch.from_numpy(counts).to(ranks.device)).cpu().numpy()


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
