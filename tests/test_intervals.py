"""Bootstrap intervals over images."""

import numpy as np
import pytest

from evaluate import cross_fit
from metrics import (
    Interval,
    confusion_matrix,
    draw,
    image_counts,
    interval,
    mean_iou,
    paired_by_class,
    paired_interval,
    verdict,
)
from utils.errors import BadInput


def counts_of(rng: np.random.Generator, images: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3, 3) counts and the confusion of all, of a prediction that is wrong at that share of pixels."""
    confusions = []
    for _ in range(images):
        truth = rng.integers(0, 3, (16, 16), np.uint8)
        pred = np.where(rng.random(truth.shape) < error * rng.uniform(0.5, 1.5), (truth + 1) % 3, truth)
        confusions.append(confusion_matrix(truth, pred.astype(np.uint8), 3))
    return np.stack([image_counts(c) for c in confusions]), sum(confusions)


def test_value_is_the_score_itself():
    counts, confusion = counts_of(np.random.default_rng(0), 20, 0.2)
    score = interval(counts)
    assert score.value == mean_iou(confusion) and score.low < score.value < score.high
    assert interval(counts) == score  # the draws are the same each time


def test_draws_are_sums_of_images_drawn_with_replacement():
    counts = np.arange(3 * 3 * 2).reshape(3, 3, 2)
    for drawn in draw(counts, draws=50):
        found = [
            (a, b, 3 - a - b)
            for a in range(4)
            for b in range(4 - a)
            if np.array_equal(a * counts[0] + b * counts[1] + (3 - a - b) * counts[2], drawn)
        ]
        assert found


def test_it_covers_the_score_of_all_images():
    """Samples of 40 images: their 95 % intervals hold the score of 4,000 about 95 times of 100."""
    rng = np.random.default_rng(1)
    counts, confusion = counts_of(rng, 4000, 0.3)
    true = mean_iou(confusion)
    found = [interval(counts[rng.choice(4000, 40, replace=False)]) for _ in range(100)]
    assert 86 <= sum(one.low <= true <= one.high for one in found) <= 100


def test_pairs_are_told_apart_where_single_intervals_overlap():
    rng = np.random.default_rng(2)
    ours, _ = counts_of(rng, 30, 0.2)
    theirs = ours.copy()
    theirs[:, 0] -= 3  # three right pixels fewer of each class in each image
    theirs[:, 1] -= 3
    assert interval(ours).low < interval(theirs).high
    difference = paired_interval(ours, theirs)
    assert difference.low > 0 and 'the first is better' in verdict(difference, 30)
    assert 'the second is better' in verdict(paired_interval(theirs, ours), 30)
    assert 'no significant difference on 30 photos' in verdict(paired_interval(ours, ours), 30)
    assert all(one.low > 0 for one in paired_by_class(ours, theirs))


def test_a_class_that_is_nowhere():
    counts = np.zeros((5, 3, 2), np.int64)
    counts[:, :, 0] = 10
    assert interval(counts) == Interval(1.0, 1.0, 1.0)
    assert np.isnan(paired_by_class(counts, counts)[1].value)
    assert str(interval(counts)) == '1.0000 [1.0000, 1.0000]'
    assert paired_interval(counts, counts).value == pytest.approx(0)


def test_a_part_has_no_say_in_its_own_choice():
    right, wrong = np.array([[9, 1], [9, 1], [9, 1]]), np.array([[1, 1], [9, 1], [9, 1]])
    totals = np.stack([np.stack([right, wrong]), np.stack([wrong, right]), np.stack([wrong, right])])
    best, chosen = cross_fit(totals)
    assert best == 1 and chosen.tolist() == [1, 0, 0]
    with pytest.raises(BadInput, match='fewer than 2'):
        cross_fit(totals[:1])
