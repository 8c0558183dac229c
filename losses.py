"""Losses of semantic segmentation: a list of logits and a mask in, one scalar out.

    loss = segmentation_loss(head(feats), mask, head.loss_weights, {'ce': 1.0, 'lovasz': 0.5})

All are averaged over the pixels that are not ignored, in fp32 whatever the logits are in, and finite, with a
gradient, where a batch lacks a class or is ignored altogether. They are ours because smp 0.6.0's Dice lets a
class that is absent from the batch pass, its Lovász loss of a batch that is all ignored is no scalar, and its
focal loss is that of K sigmoids.

Shapes: N batch, K classes, H W input, h w = H/4, W/4, P pixels that are not ignored.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import IGNORED
from networks.layers import safe_divide
from networks.mask2former import Queries, segments_of, set_loss

ERROR_BINS = 1 << 16  # of the Lovász loss


def segmentation_loss(
    outputs: list[Tensor] | list[Queries],
    mask: Tensor,
    loss_weights: list[float],
    terms: dict[str, float] | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Sum over the outputs of a head, (N, K, h, w) each, of their weight times the weighted sum of the terms.

    Each output is resized to the mask, (N, H, W) ids, 255 ignored. `terms` are weights of keys of LOSSES, by
    default {'ce': 1}; label_smoothing and class_weights, one a class, are those of 'ce' and 'ohem'. Queries
    have a loss of their own in their place, set_loss.
    Raises ValueError where outputs and loss_weights differ in number, and for an unknown term.
    """
    if isinstance(outputs[0], Queries):
        segments = segments_of(mask.long())
        losses = [set_loss(output, segments) for output in outputs]
        return sum(weight * loss for weight, loss in zip(loss_weights, losses, strict=True))
    terms = {'ce': 1.0} if terms is None else {name: weight for name, weight in terms.items() if weight}
    if unknown := terms.keys() - LOSSES.keys():
        raise ValueError(f'loss: found {", ".join(sorted(unknown))}, expected of {", ".join(LOSSES)}')
    mask = mask.long()
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
    logits: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean cross entropy; with class weights the weighted mean, as torch's; 0 where all is ignored."""
    weights = None if class_weights is None else logits.new_tensor(class_weights)
    loss = F.cross_entropy(
        logits, mask, weight=weights, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction='sum'
    )
    valid = mask != IGNORED
    if weights is None:
        return safe_divide(loss, valid.sum())
    return safe_divide(loss, (weights[mask.where(valid, 0)] * valid).sum())


def ohem(
    logits: Tensor,
    mask: Tensor,
    *,
    prob: float = 0.7,
    min_share: float = 1 / 16,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Online hard example mining, arXiv:1604.03540: the cross entropy of hard pixels alone.

    Hard are the pixels whose true class has less than `prob`, and in any case the hardest `min_share` of all.
    """
    with torch.no_grad():
        pixel_loss = F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction='none')  # (N, H, W)
        hardness = pixel_loss[mask != IGNORED]  # (P,)
        limit = torch.tensor(-math.log(prob), device=logits.device)
        if len(hardness):
            kept = math.ceil(min_share * len(hardness))
            limit = torch.minimum(limit, hardness.topk(kept).values[-1])
        hard_mask = mask.masked_fill(pixel_loss < limit, IGNORED)  # NaN stays, to be seen
    return cross_entropy(logits, hard_mask, label_smoothing=label_smoothing, class_weights=class_weights)


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice loss over the batch, arXiv:1606.04797, mean over all K classes.

    Of a class without a pixel Dice is 0 whatever is predicted: its loss is then its mean probability, all of
    which is false positives.
    """
    probs, truth = _probs_and_truth(logits, mask)
    both = (probs * truth).sum(dim=1)
    sizes = truth.sum(dim=1)
    present = 1 - safe_divide(2 * both, probs.sum(dim=1) + sizes)
    absent = probs.sum(dim=1) / max(probs.shape[1], 1)
    return torch.where(sizes > 0, present, absent).mean()


def lovasz(logits: Tensor, mask: Tensor) -> Tensor:
    """Lovász-softmax, arXiv:1705.08790, a surrogate of 1 - IoU of the batch, mean over its classes.

    Pixels are put in order of their errors by counting, in ERROR_BINS bins, instead of sorting: the true
    pixels of a bin, and the others, share one step each.
    """
    probs, truth = _probs_and_truth(logits, mask)
    losses = []
    for class_probs, class_truth in zip(probs, truth):
        if not class_truth.any():
            continue
        errors = torch.where(class_truth, 1 - class_probs, class_probs)
        bins = (errors.detach().nan_to_num() * (ERROR_BINS - 1)).round().long() + ERROR_BINS * class_truth
        false, true = torch.bincount(bins, minlength=2 * ERROR_BINS).view(2, -1).flip(1).double()
        # from the largest error on, IoU were the pixels of the bins up to here all wrong: true ones leave the
        # intersection, others enter the union
        inter, union = true.sum() - true.cumsum(0), true.sum() + false.cumsum(0)
        change = (1 - inter / union).diff(prepend=union.new_zeros(1))
        # a pixel's step: 1 / union for a true one, inter / union^2 for another, both at the middle of the
        # bin; all steps of a bin add up to its change
        inter, union = inter + true / 2, union - false / 2
        steps = torch.stack([inter / union.square(), 1 / union])
        steps = steps * change / (steps[0] * false + steps[1] * true).clamp(min=1e-300)
        weights = steps.flip(1).to(errors.dtype).view(-1)[bins]
        losses.append((errors * weights).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def focal(logits: Tensor, mask: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss of the softmax, arXiv:1708.02002: cross entropy times (1 - true class's prob) ** gamma."""
    pixel_loss = F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction='none')
    focus = (1 - (-pixel_loss).exp()) ** gamma
    return safe_divide((focus * pixel_loss).sum(), (mask != IGNORED).sum())


def _probs_and_truth(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pixels that are not ignored: probabilities (K, P), and which class is true (K, P)."""
    valid = mask != IGNORED
    probs = logits.softmax(dim=1).movedim(1, 0)[:, valid]  # (N, K, H, W) -> (K, P)
    return probs, mask[valid] == torch.arange(len(probs), device=mask.device)[:, None]


CROSS_ENTROPIES = ('ce', 'ohem')
LOSSES: dict[str, Callable[..., Tensor]] = {
    'ce': cross_entropy,
    'ohem': ohem,
    'dice': dice,
    'lovasz': lovasz,
    'focal': focal,
}
