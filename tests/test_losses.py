"""Losses: each one equals a case worked out by hand, and none fails on ignored pixels and absent classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch import Tensor

from losses import (
    ERROR_BINS,
    LOSSES,
    binary_cross_entropy,
    cross_entropy,
    dice,
    focal,
    lovasz,
    lovasz_slopes,
    ohem,
    presence_loss,
    segmentation_loss,
)
from networks.mask2former import Queries

OF_IDS = [name for name in LOSSES if name != 'bce']


def logits_of(probs: list[list[float]]) -> Tensor:
    """Return logits (1, K, 1, P) with the given probabilities, a row of K for each of P pixels."""
    return torch.tensor(probs).log().T[None, :, None]


def mask_of(ids: list[int]) -> Tensor:
    return torch.tensor(ids)[None, None]


# two classes and four pixels: right, uncertain, wrong, ignored
LOGITS = logits_of([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0.01, 0.99]])
MASK = mask_of([0, 0, 1, 255])


def test_cross_entropy():
    expected = -(math.log(0.9) + math.log(0.5) + math.log(0.2)) / 3
    assert cross_entropy(LOGITS, MASK).item() == pytest.approx(expected)


def test_class_weights_weight_the_mean():
    expected = -(math.log(0.9) + math.log(0.5) + 3 * math.log(0.2)) / 5
    assert cross_entropy(LOGITS, MASK, class_weights=(1.0, 3.0)).item() == pytest.approx(expected)


def test_a_class_of_weight_0_does_not_count():
    expected = -(math.log(0.9) + math.log(0.5)) / 2
    assert cross_entropy(LOGITS, MASK, class_weights=(1.0, 0.0)).item() == pytest.approx(expected)
    assert cross_entropy(LOGITS, mask_of([1, 1, 1, 255]), class_weights=(1.0, 0.0)).item() == 0


def test_label_smoothing():
    # each of the two classes gets a half of the 0.2
    pixels = [(0.9, 0.1), (0.5, 0.5), (0.2, 0.8)]  # probabilities of the true and of the other class
    expected = -sum(0.9 * math.log(true) + 0.1 * math.log(other) for true, other in pixels) / 3
    assert cross_entropy(LOGITS, MASK, label_smoothing=0.2).item() == pytest.approx(expected)


def test_label_smoothing_with_class_weights_is_torchs():
    ours = cross_entropy(LOGITS, MASK, label_smoothing=0.2, class_weights=(1.0, 3.0))
    weight = torch.tensor([1.0, 3.0])
    torchs = F.cross_entropy(LOGITS, MASK, weight=weight, ignore_index=255, label_smoothing=0.2)
    assert ours.item() == pytest.approx(torchs.item())


def test_ohem_takes_the_hard_pixels():
    expected = -(math.log(0.5) + math.log(0.2)) / 2
    assert ohem(LOGITS, MASK).item() == pytest.approx(expected)
    assert ohem(LOGITS, MASK, class_weights=(1.0, 3.0)).item() == pytest.approx(
        -(math.log(0.5) + 3 * math.log(0.2)) / 4
    )


def test_ohem_takes_the_hardest_share_if_no_pixel_is_hard():
    easy = logits_of([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.01, 0.99]])
    mask = mask_of([0, 0, 0, 255])
    assert ohem(easy, mask, min_share=0.5).item() == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)
    assert ohem(easy, mask).item() == pytest.approx(-math.log(0.8))


def test_dice():
    # class 0: 2 true pixels, predicted .9 + .5 + .8, intersection .9 + .5; class 1: 1, .1 + .5 + .2, .2
    expected = ((1 - 2 * 1.4 / (2 + 2.2)) + (1 - 2 * 0.2 / (1 + 0.8))) / 2
    assert dice(LOGITS, MASK).item() == pytest.approx(expected)


def test_dice_of_an_absent_class_punishes_false_positives():
    mask = mask_of([0, 0, 255])
    few = logits_of([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    # class 0: 1 - 2 * 1.6 / (2 + 1.6); the absent ones: mean probabilities of .1
    assert dice(few, mask).item() == pytest.approx((1 - 3.2 / 3.6 + 0.1 + 0.1) / 3)
    # the same for class 0; class 2 takes over what class 1 had, and more of it must cost more
    many = few.clone().requires_grad_()
    dice(many, mask).backward()
    assert (many.grad[0, 1:, 0, :2] > 0).all() and (many.grad[..., 2] == 0).all()


def test_lovasz():
    # errors of class 0: .8 (false), .5 (true), .1 (true); IoU as they are lost, in that order: 2/3, 1/3, 0
    class_0 = 0.8 * (1 / 3) + 0.5 * (1 / 3) + 0.1 * (1 / 3)
    # of class 1: .8 (true), .5 (false), .1 (false); IoU 0 from the first
    class_1 = 0.8
    assert lovasz(LOGITS, MASK).item() == pytest.approx((class_0 + class_1) / 2)


def test_lovasz_of_false_positives():
    # class 0: errors .6, .3 (false), .1 (true), IoU 1/2, 1/3, 0; class 1: .6, .3 (true), .1, IoU 1/2, 0
    logits = logits_of([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    class_0 = 0.6 * (1 / 2) + 0.3 * (1 / 2 - 1 / 3) + 0.1 * (1 / 3)
    class_1 = 0.6 * (1 / 2) + 0.3 * (1 / 2)
    assert lovasz(logits, mask_of([0, 1, 1])).item() == pytest.approx((class_0 + class_1) / 2)


def test_lovasz_of_a_hard_prediction_is_its_mean_iou():
    torch.manual_seed(0)
    mask, pred = torch.randint(0, 3, (2, 2, 32, 32)).unbind()
    ious = [((mask == k) & (pred == k)).sum() / ((mask == k) | (pred == k)).sum() for k in range(3)]
    logits = 100.0 * F.one_hot(pred, 3).movedim(-1, 1)
    assert lovasz(logits, mask).item() == pytest.approx(1 - sum(ious).item() / 3)


def test_lovasz_keeps_its_digits_over_many_pixels():
    """Compare with the definition in double precision: differences of 1 - IoU, pixel by pixel."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 1000, 1000)
    mask = (torch.rand(1, 1000, 1000) < 0.001).long()
    expected = 0.0
    for k in range(2):
        true = (mask == k).flatten().double()
        errors, order = (true - logits.double().softmax(1)[0, k].flatten()).abs().sort(descending=True)
        wrong = true[order].cumsum(0)
        loss = 1 - (true.sum() - wrong) / (true.sum() + torch.arange(1, len(true) + 1) - wrong)
        expected += (errors * loss.diff(prepend=torch.zeros(1))).sum().item() / 2
    assert lovasz(logits, mask).item() == pytest.approx(expected, rel=1e-6)


def test_focal():
    expected = -(0.1**2 * math.log(0.9) + 0.5**2 * math.log(0.5) + 0.8**2 * math.log(0.2)) / 3
    assert focal(LOGITS, MASK).item() == pytest.approx(expected)
    assert focal(LOGITS, MASK, gamma=0).item() == pytest.approx(cross_entropy(LOGITS, MASK).item())


@pytest.mark.parametrize('name', OF_IDS)
def test_ignored_pixels_do_not_count(name):
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 4, (2, 8, 8))
    mask[:, 4:] = 255
    loss = LOSSES[name](logits, mask)
    loss.backward()
    assert loss.item() == pytest.approx(LOSSES[name](logits[:, :, :4], mask[:, :4]).item())
    assert (logits.grad[:, :, 4:] == 0).all() and (logits.grad[:, :, :4] != 0).any()


@pytest.mark.parametrize('name', OF_IDS)
def test_all_ignored_is_0_with_a_gradient(name):
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    mask = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    loss = segmentation_loss(
        [logits], mask, [1.0], {name: 1.0}, label_smoothing=0.1, class_weights=(1, 1, 1, 2)
    )
    loss.backward()
    assert loss.shape == () and loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize('name', OF_IDS)
@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_an_absent_class_is_finite(name, scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(2, 4, 8, 8)).requires_grad_()
    loss = LOSSES[name](logits, torch.randint(0, 2, (2, 8, 8)))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize('name', OF_IDS)
def test_nan_is_not_hidden(name):
    logits = torch.randn(2, 4, 8, 8)
    logits[0, 0, 0, 0] = float('nan')
    assert LOSSES[name](logits, torch.randint(0, 4, (2, 8, 8))).isnan()


@pytest.mark.parametrize('name', OF_IDS)
def test_a_better_prediction_costs_less(name):
    torch.manual_seed(0)
    mask = torch.randint(0, 4, (2, 16, 16))
    right = F.one_hot(mask, 4).movedim(-1, 1).float()
    worst, bad, good = (LOSSES[name](scale * right, mask).item() for scale in (-3, 1, 8))
    assert worst > bad > good >= 0 and good < 0.01


def test_outputs_are_resized_and_weighted():
    mask = torch.randint(0, 4, (2, 32, 32), dtype=torch.uint8)
    aux, main = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 8, 8)
    aux_loss, main_loss = (
        F.cross_entropy(F.interpolate(x, size=(32, 32), mode='bilinear', align_corners=False), mask.long())
        for x in (aux, main)
    )
    loss = segmentation_loss([aux, main], mask, [0.4, 1.0])
    assert loss.item() == pytest.approx((0.4 * aux_loss + main_loss).item())


def test_terms_are_weighted():
    logits, mask = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    loss = segmentation_loss([logits], mask, [1.0], {'ce': 2.0, 'dice': 0.5, 'focal': 0})
    expected = 2 * cross_entropy(logits, mask) + 0.5 * dice(logits, mask)
    assert loss.item() == pytest.approx(expected.item())


def test_class_weights_and_smoothing_reach_the_cross_entropies():
    options = {'label_smoothing': 0.1, 'class_weights': (1.0, 3.0)}
    for name in ('ce', 'ohem'):
        expected = LOSSES[name](LOGITS, MASK, **options)
        assert expected != LOSSES[name](LOGITS, MASK)
        assert segmentation_loss([LOGITS], MASK, [1.0], {name: 1.0}, **options).item() == expected.item()


def test_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 4, 8, 8).bfloat16(), torch.randint(0, 4, (2, 32, 32))
    terms = dict.fromkeys(OF_IDS, 1.0)
    expected = segmentation_loss([logits.float()], mask, [1.0], terms)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = segmentation_loss([logits], mask, [1.0], terms)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


def test_unknown_term_and_missing_weight_are_refused():
    logits, mask = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    with pytest.raises(ValueError, match='found jaccard, expected one of ce, bce, ohem, dice, lovasz, focal'):
        segmentation_loss([logits], mask, [1.0], {'jaccard': 1.0})
    with pytest.raises(ValueError, match='zip'):
        segmentation_loss([logits, logits], mask, [1.0])


# --- planes: two classes and four pixels, the last unknown for class 1
PLANE_PROBS = torch.tensor([[0.9, 0.5, 0.8, 0.3], [0.1, 0.5, 0.2, 0.99]])
PLANE_LOGITS = PLANE_PROBS.logit()[None, :, None]
PLANES = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 255]], dtype=torch.uint8)[None, :, None]
TRUE_PROBS = [[0.9, 0.5, 0.2, 0.3], [0.1, 0.5, 0.8]]  # of what is true, by class


def planes_of(seed=0, shape=(2, 4, 8, 8)):
    torch.manual_seed(seed)
    return torch.randint(0, 2, shape, dtype=torch.uint8)


def test_binary_cross_entropy():
    losses = [-math.log(p) for row in TRUE_PROBS for p in row]
    for name in ('bce', 'ce'):
        assert LOSSES[name](PLANE_LOGITS, PLANES).item() == pytest.approx(sum(losses) / 7)
    weighted = LOSSES['bce'](PLANE_LOGITS, PLANES, class_weights=(1.0, 3.0)).item()
    assert weighted == pytest.approx((sum(losses[:4]) + 3 * sum(losses[4:])) / (4 + 9))
    smooth = [-0.9 * math.log(p) - 0.1 * math.log(1 - p) for row in TRUE_PROBS for p in row]
    assert LOSSES['bce'](PLANE_LOGITS, PLANES, label_smoothing=0.2).item() == pytest.approx(sum(smooth) / 7)
    with pytest.raises(ValueError, match=r'bce: found a mask of \(1, 1, 4\), expected planes'):
        binary_cross_entropy(LOGITS, MASK)


def test_ohem_takes_the_hard_pixels_of_planes():
    hard = [-math.log(p) for row in TRUE_PROBS for p in row if p < 0.7]
    assert ohem(PLANE_LOGITS, PLANES).item() == pytest.approx(sum(hard) / 5)


def test_focal_of_planes():
    losses = [-((1 - p) ** 2) * math.log(p) for row in TRUE_PROBS for p in row]
    assert focal(PLANE_LOGITS, PLANES).item() == pytest.approx(sum(losses) / 7)
    assert focal(PLANE_LOGITS, PLANES, gamma=0).item() == pytest.approx(
        cross_entropy(PLANE_LOGITS, PLANES).item()
    )


def test_a_class_that_is_known_in_one_pixel_counts():
    known = torch.full_like(PLANES, 255)
    known[0, 0, 0, 0], known[0, 1] = PLANES[0, 0, 0, 0], PLANES[0, 1]
    alone = 1 - 2 * 0.9 / (1 + 0.9)
    assert dice(PLANE_LOGITS, known).item() == pytest.approx((alone + 1 - 2 * 0.1 / (1 + 0.8)) / 2)


def test_slopes_of_a_bin_that_has_true_and_false_pixels():
    """Of a class of two pixels one has the largest error; the other shares its bin with a false one."""
    counts = torch.zeros(2 * ERROR_BINS + 1, dtype=torch.long)
    counts[-2] = counts[ERROR_BINS + 9] = counts[9] = 1
    slopes = lovasz_slopes(counts)
    true, false = 1 / 2.5, 0.5 / 2.5**2  # at the middle of the bin, where the union is 2.5
    assert slopes[-2].item() == pytest.approx(-0.5)
    assert slopes[ERROR_BINS + 9].item() == pytest.approx(-0.5 * true / (true + false))
    assert slopes[9].item() == pytest.approx(0.5 * false / (true + false))


def test_losses_of_queries_are_weighted(monkeypatch):
    monkeypatch.setattr('losses.set_losses', lambda outputs, mask: mask[: len(outputs)])
    outputs = [Queries(None, None, None)] * 2
    assert segmentation_loss(outputs, torch.tensor([2.0, 3.0]), [1.0, 0.5]) == 3.5
    with pytest.raises(ValueError, match='longer|shorter'):
        segmentation_loss(outputs, torch.tensor([2.0, 3.0]), [1.0])


def test_dice_of_planes():
    first, second = 1 - 2 * (0.9 + 0.5 + 0.3) / (3 + 2.5), 1 - 2 * 0.1 / (1 + 0.8)
    assert dice(PLANE_LOGITS, PLANES).item() == pytest.approx((first + second) / 2)
    absent, unknown = PLANES.clone(), PLANES.clone()
    absent[0, 1, 0, 0], unknown[0, 1] = 0, 255
    assert dice(PLANE_LOGITS, absent).item() == pytest.approx((first + 0.8 / 3) / 2)  # mean probability
    assert dice(PLANE_LOGITS, unknown).item() == pytest.approx(first)


def test_lovasz_of_planes_is_that_of_a_softmax_of_two():
    """A class and its absence, as two logits, have the probabilities of one logit by the sigmoid."""
    logits, planes = torch.randn(2, 1, 8, 8), planes_of(shape=(2, 1, 8, 8))
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    absence, presence = (
        lovasz(-logits, 1 - planes).item(),
        lovasz(logits, planes).item(),
    )
    assert lovasz(two, planes[:, 0].long()).item() == pytest.approx((absence + presence) / 2)


def test_lovasz_of_a_hard_prediction_of_planes_is_its_mean_iou():
    planes, pred = planes_of(0), planes_of(1)
    planes[1, 2, :4] = 255
    known = planes != 255
    hits = ((planes == 1) & (pred == 1)).sum((0, 2, 3))
    unions = (((planes == 1) | (pred == 1)) & known).sum((0, 2, 3))
    loss = lovasz(200.0 * pred - 100, planes)
    assert loss.item() == pytest.approx(1 - (hits / unions).mean().item())


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('value', [-1e4, 0.0, 1e4])
def test_what_is_unknown_in_a_plane_does_not_count(name, value):
    """Not in that plane alone: whatever the logits there are, and it gets no gradient."""
    planes = planes_of()
    planes[:, 1, 2:5] = 255
    torch.manual_seed(3)
    logits = torch.randn(2, 4, 8, 8)
    before = LOSSES[name](logits, planes).item()
    logits[:, 1, 2:5] = value
    logits.requires_grad_()
    loss = LOSSES[name](logits, planes)
    loss.backward()
    assert loss.item() == pytest.approx(before, rel=1e-4)
    assert (logits.grad[:, 1, 2:5] == 0).all() and (logits.grad[:, 0, 2:5] != 0).any()


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_planes_that_are_empty_or_unknown_are_finite(name, scale):
    planes = planes_of()
    planes[:, 1], planes[:, 2] = 0, 255
    logits = (scale * torch.randn(2, 4, 8, 8)).requires_grad_()
    loss = LOSSES[name](logits, planes)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    logits.grad = None
    nothing = LOSSES[name](logits, torch.full_like(planes, 255))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()
    assert LOSSES[name](torch.full_like(logits, float('nan')), planes).isnan()


@pytest.mark.parametrize('name', LOSSES)
def test_a_better_prediction_of_planes_costs_less(name):
    planes = planes_of()
    planes[:, 0, :2] = 255
    right = 2.0 * (planes == 1) - 1
    losses = [segmentation_loss([scale * right], planes, [1.0], {name: 1.0}).item() for scale in (-3, 1, 9)]
    assert losses[0] > losses[1] > losses[2] >= 0 and losses[2] < 0.01


# --- on a GPU
EVERY_LOSS = [(name, planes) for name in LOSSES for planes in (False, True) if planes or name != 'bce']


def loss_and_gradient(name: str, planes: bool) -> Tensor:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, 4, requires_grad=True)
    mask = torch.randint(0, 2 if planes else 4, (2, 4, 16, 16) if planes else (2, 16, 16), dtype=torch.uint8)
    mask[..., :3].fill_(255)
    options = {'label_smoothing': 0.1, 'class_weights': (1.0, 1.0, 1.0, 2.0)}
    loss = segmentation_loss([logits], mask, [1.0], {name: 1.0}, **options)
    loss.backward()
    return torch.cat([loss.detach()[None], logits.grad.flatten()])


@pytest.mark.parametrize(('name', 'planes'), EVERY_LOSS)
def test_no_loss_waits_for_the_gpu(name, planes, monkeypatch):
    monkeypatch.setattr(Tensor, 'is_cpu', False)
    with Operations() as operations:
        loss_and_gradient(name, planes)
    assert not operations.waiting


@pytest.mark.parametrize(('name', 'planes'), EVERY_LOSS)
def test_each_loss_is_deterministic(name, planes, deterministic):
    with Operations() as operations:
        found = loss_and_gradient(name, planes)
    assert not operations.refused
    torch.use_deterministic_algorithms(False)
    assert torch.allclose(found, loss_and_gradient(name, planes), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('absent', [0, 2])
@pytest.mark.parametrize('planes', [False, True])
def test_lovasz_of_a_gpu_is_that_of_the_cpu(planes, absent, monkeypatch):
    """A GPU computes an absent class and drops it, and counts by another operation."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 16, 16, requires_grad=True)
    mask = torch.randint(0, 5 - absent, (2, 16, 16))
    if planes:
        mask = (mask[:, None] == torch.arange(5)[:, None, None]).byte()
    mask[..., :3] = 255

    def gradient() -> Tensor:
        return torch.autograd.grad(lovasz(logits, mask), logits)[0]

    expected, loss = gradient(), lovasz(logits, mask).item()
    monkeypatch.setattr(Tensor, 'is_cpu', False)
    assert torch.equal(gradient(), expected) and lovasz(logits, mask).item() == loss


def test_presence_is_of_the_whole_image_and_absence_of_what_is_known():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    mask = torch.tensor([[[0, 2], [2, 0]], [[1, 255], [255, 255]]])  # the second: a quarter is known
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), reduction='none'
    )
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.25, 1.0, 0.25]])
    expected = ((losses * weights).sum() / weights.sum()).item()
    assert presence_loss(logits, mask).item() == pytest.approx(expected)
    planes = F.one_hot(mask.where(mask != 255, 0), 3).permute(0, 3, 1, 2)
    planes = planes.where(mask[:, None] != 255, 255)
    assert presence_loss(logits, planes).item() == pytest.approx(expected)
    both = segmentation_loss([logits, torch.zeros(2, 3, 2, 2)], mask, [0.5, 1.0])
    assert both.item() == pytest.approx(0.5 * expected + math.log(3))
    nothing = presence_loss(logits.requires_grad_(), torch.full_like(mask, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()
