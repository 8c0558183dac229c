"""Losses of semantic segmentation: a list of logits and a mask in, one scalar out.

    loss = segmentation_loss(model(images), mask, model.loss_weights, {'ce': 1.0, 'lovasz': 0.5})

Each loss is a mean over the pixels that are not ignored, in fp32. It is finite and has a gradient even if a
class is absent or all pixels are ignored; in smp 0.6.0, Dice skips an absent class, the Lovász loss is no
scalar if all is ignored, and the focal loss is the one of K sigmoids.

A mask is (N, H, W) ids, one a pixel, whose probabilities are a softmax; or (N, K, H, W) planes of classes
that may overlap, whose probabilities are K sigmoids. There a pixel may be ignored in the plane of one class
and known in another; each loss counts pairs of a pixel and a class.

Shapes: N batch, K classes, H W input, h w = H/4, W/4, P pixels that are not ignored.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import IGNORED
from networks.layers import safe_divide
from networks.mask2former import Queries, mask_to_segments, set_loss

# Bins of the errors in the Lovász loss. Sorting the pixels instead takes .52 s in place of .21 s on logits of
# (6, 11, 256, 256) with one CPU thread, and makes a training step of configs/demo.yaml 20 % slower.
ERROR_BINS = 1 << 16


def segmentation_loss(
    outputs: list[Tensor] | list[Queries],
    mask: Tensor,
    loss_weights: Sequence[float],
    terms: dict[str, float] | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Sum the losses of all outputs, (N, K, h, w) each, times their loss_weights.

    An output is resized to the mask, (N, H, W) ids or (N, K, H, W) planes of 0 and 1, with 255 ignored; its
    loss is the weighted sum of `terms`, keys of LOSSES ({'ce': 1} by default). label_smoothing and
    class_weights, one a class, go to 'ce', 'bce' and 'ohem'. Queries get Mask2Former's set_loss instead.
    Raises ValueError for an unknown term.
    """
    if isinstance(outputs[0], Queries):
        segments = mask_to_segments(mask.long())
        losses = [set_loss(output, segments) for output in outputs]
        return sum(weight * loss for weight, loss in zip(loss_weights, losses, strict=True))
    terms = {'ce': 1.0} if terms is None else {name: weight for name, weight in terms.items() if weight}
    if unknown := terms.keys() - LOSSES.keys():
        raise ValueError(f'loss: found {", ".join(sorted(unknown))}, expected one of {", ".join(LOSSES)}')
    mask = mask.long() if mask.dim() == 3 else mask
    options = {'label_smoothing': label_smoothing, 'class_weights': class_weights}
    total = torch.zeros((), device=mask.device)
    with torch.autocast(mask.device.type, enabled=False):
        for output, output_weight in zip(outputs, loss_weights, strict=True):
            logits = F.interpolate(output.float(), size=mask.shape[-2:], mode='bilinear', align_corners=False)
            for name, weight in terms.items():
                extra = options if name in CROSS_ENTROPIES else {}
                total = total + output_weight * weight * LOSSES[name](logits, mask, **extra)
    return total


def cross_entropy(
    logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0, class_weights: Sequence | None = None
) -> Tensor:
    """Compute the mean cross entropy, weighted by class as torch does; 0 if all pixels are ignored. That of
    planes is the binary one.
    """
    if mask.dim() == 4:
        return binary_cross_entropy(
            logits, mask, label_smoothing=label_smoothing, class_weights=class_weights
        )
    weights = None if class_weights is None else logits.new_tensor(class_weights)
    loss = F.cross_entropy(
        logits, mask, weight=weights, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction='sum'
    )
    valid = mask != IGNORED
    count = valid if weights is None else weights[mask.where(valid, 0)] * valid
    return safe_divide(loss, count.sum())


def binary_cross_entropy(
    logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0, class_weights: Sequence | None = None
) -> Tensor:
    """Compute the mean binary cross entropy of (N, K, H, W) planes over all known pairs of a pixel and a
    class, each weighted by its class. Smoothing moves 1 and 0 towards each other by half of it each. Raises
    ValueError for a mask of ids.
    """
    if mask.dim() != 4:
        raise ValueError(f'bce: found a mask of {tuple(mask.shape)}, expected planes (N, K, H, W)')
    known = mask != IGNORED
    target = (mask == 1) * (1 - label_smoothing) + label_smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    weights = known.float()
    if class_weights is not None:
        weights = weights * logits.new_tensor(class_weights)[:, None, None]
    return safe_divide((weights * loss).sum(), weights.sum())


def ohem(logits: Tensor, mask: Tensor, *, prob: float = 0.7, min_share: float = 1 / 16, **options) -> Tensor:
    """Compute the cross entropy, with its options, of the hard pixels: hard example mining, arXiv:1604.03540.

    A pixel is hard if the probability of its true class is below `prob`, or if it is among the hardest
    `min_share` of all pixels. In planes it is a pair of a pixel and a class that is hard.
    """
    with torch.no_grad():
        pixel_loss = pixel_cross_entropy(logits, mask)
        hardness = pixel_loss[mask != IGNORED]  # (P,)
        limit = torch.tensor(-math.log(prob), device=logits.device)
        if len(hardness):
            min_count = math.ceil(min_share * len(hardness))
            limit = torch.minimum(limit, hardness.topk(min_count).values[-1])
        hard_mask = mask.masked_fill(pixel_loss < limit, IGNORED)  # a NaN counts as hard, so that it shows
    return cross_entropy(logits, hard_mask, **options)


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the soft Dice loss of the batch, arXiv:1606.04797, mean over all K classes. The loss of a class
    without a pixel is its mean probability, as all of it is false positives. A class whose plane is known
    nowhere does not count.
    """
    probs, truth = valid_probs_and_truth(logits, mask)
    intersection = (probs * truth).sum(dim=1)
    sizes = truth.sum(dim=1)
    present_loss = 1 - safe_divide(2 * intersection, probs.sum(dim=1) + sizes)
    if mask.dim() == 3:
        absent_loss = probs.sum(dim=1) / max(probs.shape[1], 1)
        return torch.where(sizes > 0, present_loss, absent_loss).mean()
    counts = (mask != IGNORED).sum((0, 2, 3))
    absent_loss = safe_divide(probs.sum(dim=1), counts)
    return safe_divide(torch.where(sizes > 0, present_loss, absent_loss).sum(), (counts > 0).sum())


def lovasz(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the Lovász-softmax loss, arXiv:1705.08790: a surrogate of 1 - IoU of the batch, mean over the
    classes present; of planes with the sigmoid. Errors are counted in ERROR_BINS bins instead of sorted; the
    true pixels of a bin get one weight, the others another.
    """
    probs, truth = valid_probs_and_truth(logits, mask)
    losses = []
    for class_probs, class_truth in zip(probs, truth):
        if not class_truth.any():
            continue
        errors = torch.where(class_truth, 1 - class_probs, class_probs)
        bins = (errors.detach().nan_to_num() * (ERROR_BINS - 1)).round().long() + ERROR_BINS * class_truth
        false, true = torch.bincount(bins, minlength=2 * ERROR_BINS).view(2, -1).flip(1).double()
        # 1. 1 - IoU if all pixels from the largest error down to a bin were wrong: true pixels leave the
        # intersection, others enter the union; a bin's change is what it adds
        inter, union = true.sum() - true.cumsum(0), true.sum() + false.cumsum(0)
        change = (1 - inter / union).diff(prepend=union.new_zeros(1))
        # 2. share a bin's change among its pixels in proportion to the derivatives at its middle: 1 / union
        # for a true pixel, inter / union^2 for another
        inter, union = inter + true / 2, union - false / 2
        weights = torch.stack([inter / union.square(), 1 / union])
        weights = weights * change / (weights[0] * false + weights[1] * true).clamp(min=1e-300)
        losses.append((errors * weights.flip(1).to(errors.dtype).view(-1)[bins]).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def focal(logits: Tensor, mask: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss, arXiv:1708.02002, without its weight alpha: the mean of -(1 - p) ** gamma
    * log p. The softmax gives p, the probability of a pixel's class; in planes the sigmoid does, p where the
    class is and 1 - p elsewhere.
    """
    pixel_loss = pixel_cross_entropy(logits, mask)
    focus = (1 - (-pixel_loss).exp()) ** gamma
    return safe_divide((focus * pixel_loss).sum(), (mask != IGNORED).sum())


def pixel_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return -log p of what is true of each pixel, (N, H, W), or of each in each plane, (N, K, H, W); it is
    0 where that is ignored.
    """
    if mask.dim() == 3:
        return F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction='none')
    loss = F.binary_cross_entropy_with_logits(logits, (mask == 1).float(), reduction='none')
    return loss * (mask != IGNORED)


def valid_probs_and_truth(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (K, P) of the valid pixels, and which class is true, (K, P) bool. In planes, P
    counts all pixels: what is ignored has probability 0, and is false.
    """
    if mask.dim() == 4:
        probs = logits.sigmoid() * (mask != IGNORED)
        return probs.movedim(1, 0).flatten(1), (mask == 1).movedim(1, 0).flatten(1)
    valid = mask != IGNORED
    probs = logits.softmax(dim=1).movedim(1, 0)[:, valid]  # (N, K, H, W) -> (K, P)
    return probs, mask[valid] == torch.arange(len(probs), device=mask.device)[:, None]


CROSS_ENTROPIES = ('ce', 'bce', 'ohem')
LOSSES: dict[str, Callable[..., Tensor]] = {
    'ce': cross_entropy,
    'bce': binary_cross_entropy,
    'ohem': ohem,
    'dice': dice,
    'lovasz': lovasz,
    'focal': focal,
}
