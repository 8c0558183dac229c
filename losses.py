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
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metrics import IGNORED
from networks.layers import Queries

ERROR_BINS = 1 << 16  # of the Lovász loss
SET_WEIGHTS = {'class': 2.0, 'mask': 5.0, 'dice': 5.0}  # of Mask2Former, in matching and in the loss
NO_SEGMENT_WEIGHT = 0.1  # of the class 'none'


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
        return _ratio(loss, valid.sum())
    return _ratio(loss, (weights[mask.where(valid, 0)] * valid).sum())


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
    present = 1 - _ratio(2 * both, probs.sum(dim=1) + sizes)
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
    return _ratio((focus * pixel_loss).sum(), (mask != IGNORED).sum())


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
    cross = _ratio(cross.sum(1), known.sum(1))
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


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient whose denominator counts as 1 where it is 0."""
    return numerator / torch.where(denominator == 0, 1, denominator)


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
