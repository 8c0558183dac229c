"""Losses of semantic segmentation: a list of logits and a mask in, one scalar out.

    loss = segmentation_loss(model(images), mask, model.loss_weights, {'ce': 1.0, 'lovasz': 0.5})

Each loss is a mean over the pixels that are not ignored, in fp32; mmsegmentation divides the cross entropy by
all pixels (avg_non_ignore=False), so that a crop with much padding counts less there. It is finite and has a
gradient even if a class is absent or all pixels are ignored; in smp 0.6.0, Dice skips an absent class, the
Lovász loss is no scalar if all is ignored, and the focal loss is the one of K sigmoids.

A mask is (N, H, W) ids, one a pixel, whose probabilities are a softmax; or (N, K, H, W) planes of classes
that may overlap, whose probabilities are K sigmoids. There a pixel may be ignored in the plane of one class
and known in another; each loss counts pairs of a pixel and a class.

Shapes: N batch, K classes, H W input, h w = H/4, W/4.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from metrics import IGNORED
from networks.layers import resize, safe_divide, to_device
from networks.mask2former import Queries, set_losses

# Bins of the errors in the Lovász loss. Sorting the pixels instead takes .71 s in place of .21 s, forward and
# backward, on logits of (6, 11, 256, 256) with one CPU thread.
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
    class_weights, one a class, go to 'ce', 'bce' and 'ohem'. Queries get Mask2Former's set_losses instead,
    and (N, K) logits the presence_loss. Raises ValueError for an unknown term.
    """
    if isinstance(outputs[0], Queries):
        losses = set_losses(outputs, mask)
        return sum(weight * loss for weight, loss in zip(loss_weights, losses, strict=True))
    terms = {'ce': 1.0} if terms is None else {name: weight for name, weight in terms.items() if weight}
    if unknown := terms.keys() - LOSSES.keys():
        raise ValueError(f'loss: found {", ".join(sorted(unknown))}, expected one of {", ".join(LOSSES)}')
    mask = mask.long() if mask.dim() == 3 else mask
    options = {'label_smoothing': label_smoothing, 'class_weights': class_weights}
    total = torch.zeros((), device=mask.device)
    with torch.autocast(mask.device.type, enabled=False):
        for output, output_weight in zip(outputs, loss_weights, strict=True):
            if output.dim() == 2:
                total = total + output_weight * presence_loss(output.float(), mask)
                continue
            logits = resize(output.float(), mask.shape[-2:]).contiguous()  # as each softmax would make it
            for name, weight in terms.items():
                extra = options if name in CROSS_ENTROPIES else {}
                total = total + output_weight * weight * LOSSES[name](logits, mask, **extra)
    return total


def cross_entropy(
    logits: Tensor, mask: Tensor, *, label_smoothing: float = 0.0, class_weights: Sequence | None = None
) -> Tensor:
    """Compute the mean cross entropy, weighted by class as torch does; 0 if all pixels are ignored. Of planes
    it is the binary one.
    """
    if mask.dim() == 4:
        return binary_cross_entropy(
            logits, mask, label_smoothing=label_smoothing, class_weights=class_weights
        )
    weights = None if class_weights is None else to_device(class_weights, logits.device)
    # torch's own sum over pixels has no deterministic form on a GPU
    reduction = 'none' if torch.are_deterministic_algorithms_enabled() else 'sum'
    options = {'ignore_index': IGNORED, 'label_smoothing': label_smoothing, 'reduction': reduction}
    loss = F.cross_entropy(logits, mask, weight=weights, **options).sum()
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
        weights = weights * to_device(class_weights, logits.device)[:, None, None]
    return safe_divide((weights * loss).sum(), weights.sum())


def ohem(logits: Tensor, mask: Tensor, *, prob: float = 0.7, min_share: float = 1 / 16, **options) -> Tensor:
    """Compute the cross entropy, with its options, of the hard pixels: hard example mining, arXiv:1604.03540.

    A pixel is hard if the probability of its true class is below `prob`, or if it is among the hardest
    `min_share` of all pixels. In planes it is a pair of a pixel and a class that is hard.
    """
    with torch.no_grad():
        pixel_loss = pixel_cross_entropy(logits, mask)
        ignored = mask == IGNORED
        hardest = pixel_loss.masked_fill(ignored, -math.inf).flatten()
        hardest = hardest.topk(math.ceil(min_share * len(hardest))).values  # of at most so many pixels
        min_count = (min_share * (~ignored).sum().double()).ceil().long().clamp(min=1)
        limit = hardest.gather(0, min_count[None] - 1).clamp(max=-math.log(prob))
        hard_mask = mask.masked_fill(pixel_loss < limit, IGNORED)  # a NaN counts as hard, so that it shows
    return cross_entropy(logits, hard_mask, **options)


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the soft Dice loss of the batch, arXiv:1606.04797, mean over all K classes. The loss of a class
    without a pixel is its mean probability, as all of it is false positives. A class whose plane is known
    nowhere does not count.
    """
    probs, truth = valid_probs_and_truth(logits, mask)
    intersection, volume, sizes = (x.sum((0, 2, 3)) for x in (probs * truth, probs, truth))
    present_loss = 1 - safe_divide(2 * intersection, volume + sizes)
    valid = (mask if mask.dim() == 4 else mask[:, None]) != IGNORED
    counts = valid.sum((0, 2, 3)).expand(len(sizes))
    losses = torch.where(sizes > 0, present_loss, safe_divide(volume, counts))
    return safe_divide(losses.sum(), (counts > 0).sum())


def lovasz(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the Lovász-softmax loss, arXiv:1705.08790: a surrogate of 1 - IoU of the batch, mean over the
    classes present; of planes with the sigmoid. Errors are counted in ERROR_BINS bins instead of sorted; the
    true pixels of a bin get one weight, the others another.
    """
    return Lovasz.apply(probabilities(logits, mask), mask)


class Lovasz(torch.autograd.Function):
    """The Lovász loss of probabilities (N, K, H, W): the sum of their errors times weights that depend only
    on the order of the errors. The weights are also the gradient, which needs nothing else to be saved.
    """

    @staticmethod
    def forward(ctx, probs: Tensor, mask: Tensor) -> Tensor:
        slopes = torch.empty_like(probs)  # of the loss of each class
        losses, present = [probs.new_zeros(())], []
        ignored = mask == IGNORED
        for k, slope in enumerate(slopes.unbind(1)):
            plane, unknown = (mask == k, ignored) if mask.dim() == 3 else (mask[:, k] == 1, ignored[:, k])
            exists = plane.any()
            if mask.is_cpu and not exists:  # a GPU would have to be waited for
                slope.zero_()
                continue
            truth = plane.to(probs.dtype)
            difference = probs[:, k] - truth
            # first the bins of false pixels, by their error, then those of true ones, and one of ignored ones
            bins = (difference.abs().nan_to_num_() * (ERROR_BINS - 1)).round_().add_(truth, alpha=ERROR_BINS)
            bins = bins.masked_fill_(unknown, 2 * ERROR_BINS).int().flatten()
            table = lovasz_slopes(count_bins(bins)).masked_fill_(~exists, 0).to(probs.dtype)
            slope.copy_(table.index_select(0, bins).view_as(slope))
            losses.append((difference * slope).sum())
            present.append(exists)
        count = torch.stack(present).sum() if present else ignored.new_zeros(())
        ctx.save_for_backward(slopes, count)
        return safe_divide(torch.stack(losses[1:] or losses).sum(), count)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        slopes, count = ctx.saved_tensors
        return slopes * safe_divide(grad, count), None


def count_bins(bins: Tensor) -> Tensor:
    """Count the values 0 to 2 * ERROR_BINS. torch.bincount makes the host wait for a GPU, but index_add_ is
    slower on a CPU, and where it has to be deterministic, for it sorts.
    """
    if bins.is_cpu or torch.are_deterministic_algorithms_enabled():
        return torch.bincount(bins, minlength=2 * ERROR_BINS + 1)
    return bins.new_zeros(2 * ERROR_BINS + 1).index_add_(0, bins, torch.ones_like(bins))


def lovasz_slopes(counts: Tensor) -> Tensor:
    """Return the derivative of a class's loss by the probability of a pixel, for each bin of pixels."""
    false, true = counts[:-1].view(2, -1).flip(1).double()
    # 1. 1 - IoU if all pixels from the largest error down to a bin were wrong: true pixels leave the
    # intersection, others enter the union; a bin's change is what it adds
    inter, union = true.sum() - true.cumsum(0), true.sum() + false.cumsum(0)
    change = (1 - inter / union).diff(prepend=union.new_zeros(1))
    # 2. share a bin's change among its pixels in proportion to the derivatives at its middle: 1 / union
    # for a true pixel, inter / union^2 for another
    inter, union = inter + true / 2, union - false / 2
    weights = torch.stack([inter / union.square(), 1 / union])
    weights = weights * change / (weights[0] * false + weights[1] * true).clamp(min=1e-300)
    # 3. the error of a true pixel falls as its probability grows
    return F.pad(torch.stack([weights[0], -weights[1]]).flip(1).flatten(), (0, 1))


def focal(logits: Tensor, mask: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss, arXiv:1708.02002, without its weight alpha: the mean of -(1 - p) ** gamma
    * log p. The softmax gives p, the probability of a pixel's class; in planes the sigmoid does, p where the
    class is and 1 - p elsewhere.
    """
    pixel_loss = pixel_cross_entropy(logits, mask)
    focus = (1 - (-pixel_loss).exp()) ** gamma
    return safe_divide((focus * pixel_loss).sum(), (mask != IGNORED).sum())


def presence_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the binary cross entropy of (N, K) logits that a class is in an image at all (the semantic
    encoding loss of EncNet, arXiv:1803.08904). The absence of a class counts by the share of the image's
    pixels that are known: it may be in the others.
    """
    planes, truth = true_planes(mask, logits.shape[1])
    present = truth.flatten(2).any(2)
    known = (planes != IGNORED).float().mean((2, 3)).expand(present.shape)
    loss = F.binary_cross_entropy_with_logits(logits, present.float(), reduction='none')
    weights = torch.where(present, 1, known)
    return safe_divide((weights * loss).sum(), weights.sum())


def pixel_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return -log p of what is true of each pixel, (N, H, W), or of each in each plane, (N, K, H, W); it is
    0 where that is ignored.
    """
    if mask.dim() == 3:
        return F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction='none')
    loss = F.binary_cross_entropy_with_logits(logits, (mask == 1).float(), reduction='none')
    return loss * (mask != IGNORED)


def probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the probabilities (N, K, H, W): a softmax for a mask of ids, K sigmoids for planes."""
    return logits.softmax(dim=1) if mask.dim() == 3 else logits.sigmoid()


def valid_probs_and_truth(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (N, K, H, W), and which classes are true, bool. What is ignored has the
    probability 0, and is false.
    """
    planes, truth = true_planes(mask, logits.shape[1])
    return probabilities(logits, mask).masked_fill(planes == IGNORED, 0), truth


def true_planes(mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return a mask of ids as one plane, (N, 1, H, W), and planes as they are; and which classes are true in
    each pixel, (N, K, H, W) bool.
    """
    if mask.dim() == 4:
        return mask, mask == 1
    planes = mask[:, None]
    return planes, planes == torch.arange(num_classes, device=mask.device)[:, None, None]


CROSS_ENTROPIES = ('ce', 'bce', 'ohem')
LOSSES: dict[str, Callable[..., Tensor]] = {
    'ce': cross_entropy,
    'bce': binary_cross_entropy,
    'ohem': ohem,
    'dice': dice,
    'lovasz': lovasz,
    'focal': focal,
}
