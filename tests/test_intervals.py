"""Bootstrap intervals over images."""

import numpy as np
import pytest

from metrics import (
    Interval,
    Metric,
    confusion_matrix,
    count_pixels,
    draw_times,
    image_counts,
    verdict,
)
from utils.errors import BadInput
from voting.choices import cross_fit

HOME = Metric()


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
    score = HOME.interval(counts)
    assert (
        score.value == Metric().score(image_counts(confusion)[None]) and score.low < score.value < score.high
    )
    assert HOME.interval(counts) == score  # the draws are the same each time


@pytest.mark.parametrize('name', ['miou', 'dice', 'image_miou', 'image_dice'])
@pytest.mark.parametrize('empty', [1.0, None])
def test_draws_are_images_drawn_with_replacement(name, empty):
    """A draw's score is that of its images, each as often as it was drawn."""
    rng = np.random.default_rng(3)
    counts, _ = counts_of(rng, 6, 0.3)
    counts[2, :, 1] = 0  # a class that is not in every image
    metric, times = Metric(name, (1, 2), empty), draw_times(6, 40)
    assert (times.sum(1) == 6).all() and len(np.unique(times, axis=0)) > 30
    drawn = [np.repeat(counts, row.astype(int), axis=0) for row in times]
    np.testing.assert_allclose(metric.score(counts, times), [metric.score(one) for one in drawn], rtol=1e-12)
    classes = [metric.by_class(one) for one in drawn]
    np.testing.assert_allclose(metric.by_class(counts, times), classes, rtol=1e-12)
    stacked = np.stack([counts, counts[::-1]], 1)  # of two candidates at once
    both = metric.score(stacked, times)
    np.testing.assert_allclose(both[:, 0], metric.score(counts, times), rtol=1e-12)
    draws = metric.score(counts, draw_times(6))
    score = metric.interval(counts)
    assert (score.low, score.high) == tuple(np.quantile(draws, [0.025, 0.975]))
    for k, one in enumerate(metric.class_intervals(counts)):
        low, high = np.nanquantile(metric.by_class(counts, draw_times(6))[:, k], [0.025, 0.975])
        np.testing.assert_allclose((one.value, one.low, one.high), (metric.by_class(counts)[k], low, high))


def test_by_image_a_photo_weighs_the_same_whatever_its_size():
    small, large = np.ones((2, 2), np.uint8), np.ones((100, 100), np.uint8)
    counts = np.stack([count_pixels(small, 0 * small, 2), count_pixels(large, large, 2)])
    assert Metric('image_dice', (1,)).score(counts) == 0.5 and Metric('dice', (1,)).score(counts) > 0.99
    assert Metric('image_dice', (1,)).interval(counts) == Interval(0.5, 0.0, 1.0)


def test_it_covers_the_score_of_all_images():
    """Samples of 40 images: their 95 % intervals hold the score of 4,000 about 95 times of 100."""
    rng = np.random.default_rng(1)
    counts, confusion = counts_of(rng, 4000, 0.3)
    true = Metric().score(image_counts(confusion)[None])
    intervals = [HOME.interval(counts[rng.choice(4000, 40, replace=False)]) for _ in range(100)]
    assert 86 <= sum(one.low <= true <= one.high for one in intervals) <= 100


def test_pairs_are_told_apart_where_single_intervals_overlap():
    rng = np.random.default_rng(2)
    ours, _ = counts_of(rng, 30, 0.2)
    theirs = ours.copy()
    theirs[:, 0] -= 3  # three right pixels fewer of each class in each image
    theirs[:, 1] -= 3
    assert HOME.interval(ours).low < HOME.interval(theirs).high
    difference = HOME.paired_interval(ours, theirs)
    by_image = Metric('image_dice', (1, 2))
    assert by_image.paired_interval(ours, theirs).low > 0 > by_image.paired_interval(theirs, ours).high
    assert difference.low > 0 and 'the first is better' in verdict(difference, 30)
    assert 'the second is better' in verdict(HOME.paired_interval(theirs, ours), 30)
    assert 'no significant difference on 30 photos' in verdict(HOME.paired_interval(ours, ours), 30)
    assert all(one.low > 0 for one in Metric().paired_class_intervals(ours, theirs))


def test_a_class_that_is_nowhere():
    counts = np.zeros((5, 3, 2), np.int64)
    counts[:, :, 0] = 10
    assert HOME.interval(counts) == Interval(1.0, 1.0, 1.0)
    assert np.isnan(Metric().paired_class_intervals(counts, counts)[1].value)
    assert str(HOME.interval(counts)) == '1.0000 [1.0000, 1.0000]'
    assert HOME.paired_interval(counts, counts).value == pytest.approx(0)


def test_a_part_has_no_say_in_its_own_choice():
    right, wrong = np.array([[9, 1], [9, 1], [9, 1]]), np.array([[1, 1], [9, 1], [9, 1]])
    totals = np.stack([np.stack([right, wrong]), np.stack([wrong, right]), np.stack([wrong, right])])
    best, chosen = cross_fit(totals, np.arange(3), Metric())
    assert best == 1 and chosen.tolist() == [1, 0, 0]
    twice, parts = np.concatenate([totals, totals]), np.array([0, 1, 2, 0, 1, 2])
    assert cross_fit(twice, parts, Metric('image_miou'))[1].tolist() == [1, 0, 0]
    with pytest.raises(BadInput, match='fewer than 2'):
        cross_fit(totals[:1], np.zeros(1, int), Metric())
