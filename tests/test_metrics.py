"""Counting against the organiser's way, and every metric by hand and against plain numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Competition
from metrics import (
    Metric,
    confusion_matrix,
    count_pixels,
    format_table,
    image_counts,
    iou_of_counts,
    row_shares,
)
from submission import metric_of

NAMES = ('miou', 'dice', 'image_miou', 'image_dice')
COUNTS = st.sampled_from([11, 15, 16, 255]) | st.integers(1, 255)  # of classes


def organisers_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    known = truth != 255
    codes = num_classes * truth[known].astype(np.int64) + pred[known]
    return np.bincount(codes, minlength=num_classes**2).reshape(num_classes, num_classes)


def test_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    pred = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    confusion = confusion_matrix(truth, pred, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(iou_of_counts(*image_counts(confusion)), [1 / 3, 2 / 3, 0, np.nan])
    score = Metric().score(image_counts(confusion)[None])
    assert score == pytest.approx(1 / 3)  # the class that is nowhere does not count
    with np.errstate(all='raise'):
        shares = row_shares(confusion)
    assert shares.tolist() == [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 40]), st.integers(0, 700))
def test_equals_the_organisers_on_noise_and_on_runs(num_classes, seed, run, size):
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(0, num_classes, size), run).astype(np.uint8)
    pred = np.repeat(rng.integers(0, num_classes, size), run).astype(np.uint8)
    truth[rng.random(truth.size) < rng.choice([0, 0.05])] = 255
    expected = organisers_matrix(truth, pred, num_classes)
    np.testing.assert_array_equal(confusion_matrix(truth, pred, num_classes), expected)
    np.testing.assert_array_equal(
        confusion_matrix(truth.astype(np.int64), pred.astype(np.int32), num_classes), expected
    )


def test_many_pixels_strided():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 11, (2, 5, 512, 512), np.uint8)[..., ::2]
    np.testing.assert_array_equal(confusion_matrix(truth, pred, 11), organisers_matrix(truth, pred, 11))


@pytest.mark.parametrize('num_classes', [11, 15, 16, 255])
def test_ids_that_are_no_class_are_refused(num_classes):
    for wrong in {num_classes, (num_classes + 13) % 255, 254} - {*range(num_classes), 255}:
        ids = np.zeros((4, 4), np.uint8)
        ids[2, 2] = wrong
        with pytest.raises(
            ValueError, match=f'truth has the class id {wrong}, expected 0 to {num_classes - 1}'
        ):
            confusion_matrix(ids, np.zeros_like(ids), num_classes)
        with pytest.raises(
            ValueError, match=f'pred has the class id {wrong}, expected 0 to {num_classes - 1}'
        ):
            confusion_matrix(np.zeros_like(ids), ids, num_classes)
    ignored = np.full((4, 4), 255, np.uint8)
    with pytest.raises(ValueError, match='pred has the class id 255'):
        confusion_matrix(ignored, ignored, num_classes)


@pytest.mark.parametrize('ids', [np.array([-1, 0]), np.array([256, 0]), np.array([0.0, 1.0])])
def test_other_arrays_are_refused(ids):
    with pytest.raises(ValueError, match='pred'):
        confusion_matrix(np.zeros(2, np.uint8), ids, 11)
    with pytest.raises(ValueError, match='shape'):
        confusion_matrix(np.zeros(3, np.uint8), ids, 11)


def test_nothing_to_score(recwarn):
    nothing = confusion_matrix(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8), 3)
    assert not nothing.any()
    counts = image_counts(nothing)[None]
    for name in NAMES:
        assert math.isnan(Metric(name).score(counts)) and np.isnan(Metric(name).by_class(counts)).all()
        assert math.isnan(Metric(name).interval(counts).low)
    assert 'pixel accuracy 0.0' in format_table(counts, ('a', 'b', 'c'))
    assert not len(recwarn)


def test_table():
    first = image_counts(np.array([[60, 20, 0], [0, 20, 0], [0, 0, 0]]))
    second = image_counts(np.array([[20, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert format_table(
        np.stack([first, second]), ('Background', 'Paper', 'Glass'), Metric()
    ).splitlines() == [
        'class          IoU        pixels   share  images',
        'Background  0.8000           100  83.33%       2',
        'Paper       0.5000            20  16.67%       1',
        'Glass            -             0   0.00%       0',
        'pixel accuracy 0.8333',
    ]
    by_image = format_table(
        np.stack([first, second]), ('-', 'Paper', 'Glass'), Metric('image_dice', (1, 2), 0)
    )
    assert by_image.splitlines() == [
        'class  image Dice        pixels   share  images',
        'Paper      0.3333            20  16.67%       1',  # 2 * 20 / (40 + 20) in one of the two
        'Glass      0.0000             0   0.00%       0',
        'pixel accuracy 0.8333',
        'image Dice: the mean over photos, then over classes; a class that neither the truth nor the '
        'prediction of a photo has counts 0 there',
    ]
    assert 'pixel accuracy' not in format_table(np.stack([first]), ('a', 'b', 'c'), Metric(overlap=True))


def test_naming_all_classes_changes_no_digit_of_a_score():
    counts = np.random.default_rng(0).integers(1, 1000, (2, 500, 3, 11))
    counts[:, :, 1:] += counts[:, :, :1]
    scores = Metric('miou', tuple(range(11))).score(counts)
    np.testing.assert_array_equal(scores, Metric().score(counts))
    np.testing.assert_array_equal(Metric('miou', (1, 2)).score(counts), Metric().score(counts[..., 1:3]))


# --- the metrics of other competitions ----------------------------------------------------------------------


def test_metrics_by_hand():
    """Two photos of a background and one class: half found, and none there but a pixel predicted."""
    truths = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]], np.uint8)
    preds = np.array([[[1, 0, 0, 0]], [[0, 0, 0, 1]]], np.uint8)
    counts = np.stack([count_pixels(*pair, 2) for pair in zip(truths, preds, strict=True)])
    assert counts.tolist() == [[[2, 1], [3, 1], [2, 2]], [[3, 0], [3, 1], [4, 0]]]
    assert Metric('miou').by_class(counts).tolist() == [5 / 7, 1 / 3]
    assert Metric('dice').by_class(counts).tolist() == [10 / 12, 2 / 4]
    assert Metric('image_miou').by_class(counts).tolist() == [(2 / 3 + 3 / 4) / 2, (1 / 2 + 0) / 2]
    assert Metric('image_dice').by_class(counts).tolist() == [(4 / 5 + 6 / 7) / 2, (2 / 3 + 0) / 2]
    assert Metric('dice', (1,)).score(counts) == 0.5
    counts[1, 1, 1] = 0  # nothing predicted either: what counts is said by the competition
    scores = [Metric('image_dice', (1,), empty).score(counts) for empty in (1, 0, None)]
    np.testing.assert_allclose(scores, [5 / 6, 1 / 3, 2 / 3])


def brute_force(name: str, pairs: list, num_classes: int, empty: float | None) -> np.ndarray:
    """The (K,) scores by class from lists of (truth, pred) planes, with loops and sets of pixels alone."""
    groups = [[pair] for pair in pairs] if name.startswith('image_') else [pairs]
    rows = []
    for group in groups:
        row = []
        for k in range(num_classes):
            true, predicted = set(), set()
            for number, (truth, pred) in enumerate(group):
                for y, x in np.ndindex(truth.shape[1:]):
                    if truth[k, y, x] != 255:
                        true |= {(number, y, x)} if truth[k, y, x] == 1 else set()
                        predicted |= {(number, y, x)} if pred[k, y, x] else set()
            if 'iou' in name:
                over, under = len(true & predicted), len(true | predicted)
            else:
                over, under = 2 * len(true & predicted), len(true) + len(predicted)
            nothing = np.nan if empty is None or len(groups) < len(pairs) else empty
            row.append(over / under if under else nothing)
        rows.append(row)
    present = [[value for value in column if not np.isnan(value)] for column in zip(*rows, strict=True)]
    return np.array([np.mean(column) if column else np.nan for column in present])


@pytest.mark.parametrize('empty', [1.0, 0.0, None])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('overlap', [False, True])
def test_metrics_equal_loops_over_pixels(name, empty, overlap):
    rng = np.random.default_rng(5)
    pairs, counts = [], []
    for number in range(4):
        if overlap:
            truth, pred = rng.random((2, 3, 5, 7)) < 0.3
            truth, pred = truth.astype(np.uint8), pred.astype(np.uint8)
            truth[0], pred[0, :, number:] = 0, 0
            truth[rng.random(truth.shape) < 0.2] = 255
            counts.append(count_pixels(truth, pred, 3))
        else:
            truth, pred = rng.integers(0, 2 + number % 2, (2, 5, 7), np.uint8)
            truth[rng.random(truth.shape) < 0.2] = 255
            counts.append(count_pixels(truth, pred, 3))
            ids = np.arange(3)[:, None, None]
            truth, pred = np.where(truth == 255, 255, truth == ids), pred == ids
        pairs.append((truth, pred))
    expected = brute_force(name, pairs, 3, empty)
    metric = Metric(name, (0, 2), empty, overlap)
    np.testing.assert_allclose(metric.by_class(np.stack(counts)), expected, rtol=1e-12)
    np.testing.assert_allclose(metric.score(np.stack(counts)), np.nanmean(expected[[0, 2]]), rtol=1e-12)
    np.testing.assert_allclose(
        metric.of_image(*mask_pair(pairs[0], overlap), 3), alone(pairs[0], name, empty)
    )


def mask_pair(pair, overlap):
    """The masks of planes: as they are, or ids."""
    if overlap:
        return pair
    truth, pred = pair
    return np.where(truth[0] == 255, 255, truth.argmax(0)).astype(np.uint8), pred.argmax(0).astype(np.uint8)


def alone(pair, name, empty):
    return np.nanmean(brute_force(name, [pair], 3, empty if name.startswith('image_') else None)[[0, 2]])


def test_image_dice_is_that_of_the_hand_bone_competition():
    """Its baseline adds 1e-4 above and below, so that two empty masks have 1."""
    rng = np.random.default_rng(1)
    truths, preds = (rng.random((2, 6, 5, 64, 64)) < 0.4).astype(np.uint8)
    preds[:3] = truths[:3]
    truths[0, 0] = preds[0, 0] = truths[1, 1] = preds[2, 2] = 0
    both = (truths * preds).sum((2, 3))
    dices = (2.0 * both + 1e-4) / (truths.sum((2, 3)) + preds.sum((2, 3)) + 1e-4)
    competition = Competition(
        task='multilabel', classes=tuple('abcde'), metric='image_dice', score_size='own'
    )
    counts = np.stack([count_pixels(*pair, 5) for pair in zip(truths, preds, strict=True)])
    assert metric_of(competition).score(counts) == pytest.approx(dices.mean(0).mean(), abs=1e-6)
    assert dices[0, 0] == 1 and dices[1, 1] < 1e-6


def test_an_ignored_photo_counts_nowhere_but_one_without_objects_does():
    counts = np.array([[[8, 1], [9, 2], [9, 2]], [[0, 0]] * 3])
    assert Metric('image_dice').score(counts) == Metric('image_dice').score(counts[:1])
    assert (
        Metric('image_dice', overlap=True).score(counts) == (Metric('image_dice').score(counts[:1]) + 1) / 2
    )
    assert Metric().known(counts).tolist() == [True, False] and Metric(overlap=True).known(counts).all()


def test_planes_that_do_not_fit_are_refused():
    planes = np.zeros((2, 4, 4), np.uint8)
    for truth, pred, num_classes in ((planes, planes[:, 1:], 2), (planes, planes, 3)):
        with pytest.raises(ValueError, match=r'expected \d planes'):
            count_pixels(truth, pred, num_classes)


def test_metric_of_a_competition():
    planes = Competition(classes=('a', 'b'), task='multilabel', metric='dice', score_size='own')
    assert metric_of(planes) == Metric('dice', (0, 1), planes.empty_score, overlap=True)
    assert not metric_of(Competition(classes=('a', 'b'))).overlap
