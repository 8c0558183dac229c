"""Prediction: views of test-time augmentation, probabilities, board-sized ids, and the one evaluator that
all scripts share.

Shapes: N batch, K classes, S cache_size, B side of what is kept of a prediction (256 as a rule; see
submission.downsample_probs).
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import ttach
from torch import Tensor
from torch.utils.data import DataLoader

from config import Config
from data.cache import Cache
from dataset import WholePhotos, make_loader, normalize
from engine.distributed import Ranks
from metrics import confusion_matrix, image_counts
from models import SegModel
from networks.layers import resize
from submission import SIDE, downsample_probs, probs_to_ids
from utils.errors import CheckFailed
from utils.progress import progress

STRIDE = 32  # views have sides that are multiples of it


class Flip(ttach.base.DualTransform):
    """One view a mode: '' as it is, 'h' left to right, 'v' upside down, 'hv' both."""

    identity_param = ''

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__('mode', modes)

    def apply_aug_image(self, image: Tensor, mode: str = '', **_) -> Tensor:
        image = ttach.functional.hflip(image) if 'h' in mode else image
        return ttach.functional.vflip(image) if 'v' in mode else image

    apply_deaug_mask = apply_aug_image  # each flip undoes itself

    def apply_deaug_label(self, label, **_):
        return label


class Rescale(ttach.base.DualTransform):
    """One view a scale, its sides rounded to the stride, bilinear; ttach's own Scale is nearest. A view's
    logits stay at their own size.
    """

    identity_param = 1.0

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__('scale', scales)

    def apply_aug_image(self, image: Tensor, scale: float = 1.0, **_) -> Tensor:
        height, width = (to_stride(side * scale) for side in image.shape[-2:])
        return resize(image, (height, width), antialias=True)

    def apply_deaug_mask(self, mask: Tensor, **_) -> Tensor:
        return mask

    def apply_deaug_label(self, label, **_):
        return label


def predict_probs(
    model: SegModel,
    images: Tensor,
    cfg: Config,
    device: torch.device,
    size: tuple[int, int],
    tta: bool = True,
    rule: str | None = None,
) -> Tensor:
    """(N, 3, H, W) uint8 → (N, K, *size) float32 probabilities on the device, averaged over the config's
    views; with a rule the (N, K, B, B) of them that submission.downsample_probs keeps.
    """
    chosen = (cfg.tta_flips, cfg.tta_rotations, cfg.tta_scales) if tta else ()
    views = make_views(*chosen)
    images = normalize(images.to(device, non_blocking=True), model.mean, model.std)
    return sum(view_probs(model, images, cfg, view, size, rule) for view in views) / len(views)


def to_stride(side: float) -> int:
    """The multiple of STRIDE next to a side, in pixels; at least one of it."""
    return max(STRIDE, round(side / STRIDE) * STRIDE)


def make_views(
    flips: Sequence[str] = (), rotations: Sequence[int] = (), scales: Sequence[float] = (1.0,)
) -> ttach.Compose:
    """Every flip, and none, at every scale, turned by every angle, and by none."""
    return ttach.Compose([Flip(('', *flips)), Rescale(tuple(scales)), ttach.Rotate90([0, *rotations])])


def view_probs(
    model: SegModel,
    images: Tensor,
    cfg: Config,
    view: ttach.base.Transformer,
    size: tuple[int, int],
    rule: str | None = None,
) -> Tensor:
    """(N, 3, H, W) normalised photos on the device → (N, K, *size) probabilities as seen in one view; with a
    rule what it keeps of them.
    """
    inputs = view.augment_image(images)
    if cfg.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with autocast(cfg, images.device):
        logits = view_logits(model, inputs, cfg.window)
    logits = view.deaugment_mask(logits.float())
    if rule == 'nearest':
        return resize_every(logits, size, size[0] // SIDE).softmax(dim=1)
    probs = resize(logits, size, antialias=True).softmax(dim=1)
    return probs if rule is None else downsample_probs(probs, rule)


def resize_every(logits: Tensor, size: tuple[int, int], step: int) -> Tensor:
    """(N, K, h, w) → resize(logits, size)[..., ::step, ::step], where only those pixels are computed.

    Bilinear interpolation is a product with a matrix along each side, of which the other rows are left out.
    """
    rows, columns = (
        interpolation(own, wanted, step, logits.device)
        for own, wanted in zip(logits.shape[-2:], size, strict=True)
    )
    return rows @ logits.contiguous() @ columns.T


@cache
def interpolation(own: int, wanted: int, step: int, device: torch.device) -> Tensor:
    """(wanted / step, own): what each pixel that is kept of `wanted` takes of each of `own`."""
    identity = torch.eye(own, device=device)[None, None]
    return resize(identity, (wanted, own), antialias=True)[0, 0, ::step].contiguous()


def view_logits(model: SegModel, inputs: Tensor, window: int) -> Tensor:
    """(N, 3, H, W) → (N, K, h, w) logits, at the head's own stride where the view is shown whole.

    A view larger than the window (0: none), or of another size than the only one that the encoder takes, is
    seen through windows that overlap by a third, as in mmsegmentation's slide inference; logits are averaged
    where they overlap, at the view's own size.
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
            seen = inputs[..., top : top + side, left : left + side]
            logits = resize(main_logits(model(seen)).float(), (side, side))
            edges = (left, inputs.shape[-1] - left - side, top, inputs.shape[-2] - top - side)
            total = total + F.pad(logits, edges)
            count[top : top + side, left : left + side] += 1
    return (total / count)[..., :height, :width]


def window_starts(length: int, side: int) -> list[int]:
    """Where windows begin that cover a length: two thirds of a side apart, the last one at the end."""
    return [*range(0, length - side, 2 * side // 3), length - side]


def main_logits(outputs: list) -> Tensor:
    """The (N, K, h, w) logits of a model's main output, which Mask2Former makes from its queries."""
    return outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1].logits()


def predict_rows(
    model: SegModel,
    cache: Cache,
    rows: np.ndarray,
    cfg: Config,
    device: torch.device,
    tta: bool = True,
    desc: str | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (rows, (N, K, B, B) probabilities that the config's `downsample` keeps) for those rows of
    the cache.
    """
    size = cache.photos.shape[1:3]
    loader = make_eval_loader(cache, rows, cfg)
    model.eval()
    for images, batch in progress(loader, desc or '', 'batch', quiet=desc is None):
        with torch.inference_mode():  # not around the yield: it would reach into the caller
            probs = predict_probs(model, images, cfg, device, size, tta, cfg.downsample)
        yield batch.tolist(), probs


def make_eval_loader(cache: Cache, rows: np.ndarray, cfg: Config) -> DataLoader:
    workers = min(cfg.workers, -(-len(rows) // cfg.infer_batch_size))
    return make_loader(WholePhotos(cache, rows, cfg.image_size), workers, batch_size=cfg.infer_batch_size)


def evaluate(
    model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config, ranks: Ranks, tta: bool = False
) -> np.ndarray:
    """(n, 3, K) image_counts of the board's own 256x256 masks of the n rows; each rank predicts its share of
    them, and all get all.
    """
    counts = np.zeros((len(rows), 3, len(cfg.classes)), np.int64)
    seen = np.zeros(len(rows), np.int64)
    places = {int(row): place for place, row in enumerate(rows)}
    desc = 'valid' if ranks.is_main else None
    share = rows[ranks.rank :: ranks.world]
    for batch, probs in predict_rows(model, cache, share, cfg, ranks.device, tta, desc):
        pred = probs_to_ids(probs, cfg.downsample)
        for row, ids in zip(batch, pred.to(torch.uint8).cpu().numpy(), strict=True):
            confusion = confusion_matrix(cache.truth(row), ids, len(cfg.classes))
            counts[places[row]] = image_counts(confusion)
            seen[places[row]] += 1
    check_seen(seen, ranks, 'validation')
    return ranks.sum(torch.from_numpy(counts).to(ranks.device)).cpu().numpy()


def check_seen(seen: np.ndarray, ranks: Ranks, what: str) -> None:
    """Raises CheckFailed unless all ranks together have each photo once; `seen` (n,) is this rank's count."""
    total = ranks.sum(torch.from_numpy(seen).to(ranks.device)).cpu().numpy()
    if (total != 1).any():
        missing, twice = np.count_nonzero(total == 0), np.count_nonzero(total > 1)
        raise CheckFailed(f'{what}: of {len(seen)} photos {missing} were left out, and {twice} taken twice')


def amp_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """float32 is off. bf16 where the device computes in it (Ampere on; AVX-512 BF16 or AMX), fp16 on other
    GPUs.
    """
    if cfg.amp != 'auto':
        return {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': torch.float32}[cfg.amp]
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """The one mixed-precision path of training, validation and inference."""
    dtype = amp_dtype(cfg, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
