"""Bootstrap intervals over images."""

import numpy as np
import pytest

from metrics import (
    DRAWS,
    Interval,
    Metric,
    confusion_matrix,
    count_pixels,
    draw_times,
    image_counts,
    smoothed_interval,
    verdict,
)
from utils.errors import BadInput
from voting import choices
from voting.choices import Search, cross_fit, number_scenes, search_draws, search_gain

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
    significant = 'a significant difference on 30 photos'
    assert difference.low > 0 and verdict(difference, 30) == f'the first is better: {significant}'
    assert verdict(HOME.paired_interval(theirs, ours), 30) == f'the second is better: {significant}'
    assert verdict(HOME.paired_interval(ours, ours), 30) == 'no significant difference on 30 photos'
    _, classes = HOME.seed_intervals(ours[:, None], theirs[:, None])
    assert all(one.low > 0 for one in classes)


def test_a_class_that_is_nowhere():
    counts = np.zeros((5, 3, 2), np.int64)
    counts[:, :, 0] = 10
    assert HOME.interval(counts) == Interval(1.0, 1.0, 1.0)
    assert np.isnan(HOME.seed_intervals(counts[:, None], counts[:, None])[1][1].value)
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
    with pytest.raises(BadInput, match='fewer than 2'):
        cross_fit(totals[:0], np.zeros(0, int), Metric())


# --- the gain of a search ---------------------------------------------------------------------------------


def candidates_of(seed: int, n: int, number: int, spread: float = 40) -> np.ndarray:
    """(n, C, 3, 3) counts of candidates that are equally good on the whole, each better on some photos."""
    rng = np.random.default_rng(seed)
    true = rng.integers(200, 400, (n, 1, 3)) * np.ones((1, number, 1), int)
    hits = np.clip(0.7 * true + rng.normal(0, spread, (n, number, 3)), 0, true).astype(int)
    return np.stack([hits, true, true], 2)


def choose_slowly(counts: np.ndarray, part: np.ndarray, metric: Metric, search: Search) -> float:
    """The gain of a search in photos, one part after another."""
    allowed = np.ones((part.max() + 1, counts.shape[1]), bool) if search.allowed is None else search.allowed

    def cross_fitted(family) -> np.ndarray:
        chosen = counts[:, 0].copy()
        for p in range(part.max() + 1):
            scores = [metric.score(counts[part != p, c]) if allowed[p, c] else -1 for c in family]
            chosen[part == p] = counts[part == p, family[int(np.argmax(scores))]]
        return chosen

    def by_class(groups) -> np.ndarray:
        chosen = counts[:, 0].copy()
        for p in range(part.max() + 1):
            others, made, scores = counts[part != p], [], []
            present = others[:, 0, 2].any(0)
            for group in np.asarray(groups):
                tried = [np.where(present, metric.by_class(others[:, c]), np.nan) for c in group]
                best = group[np.nan_to_num(tried, nan=-1).argmax(0)]
                made.append(np.stack([counts[:, c, :, k] for k, c in enumerate(best)], 2))
                scores.append(metric.mean(np.where(present, metric.by_class(made[-1][part != p]), np.nan)))
            chosen[part == p] = made[int(np.argmax(scores))][part == p]
        return chosen

    options, final = [cross_fitted(family) for family in search.families], counts[:, 0].copy()
    options += [by_class(groups) for groups in search.by_class]
    for p in range(part.max() + 1):
        scores = [metric.score(option[part != p]) for option in options]
        final[part == p] = options[int(np.argmax(scores))][part == p]
    return float(metric.score(final) - metric.score(cross_fitted(search.baseline)))


GROUPS = [[6, 1, 4], [0, 2, 5]], [[3, 2]]


@pytest.mark.parametrize(
    ('metric', 'groups'),
    [
        (Metric(), ()),
        (Metric('dice', (0, 2)), GROUPS),
        (Metric('image_miou', None, None), GROUPS[:1]),
        (Metric('image_dice', None, 1.0), GROUPS),
    ],
)
def test_each_draw_makes_all_choices_again(metric, groups, monkeypatch):
    """A draw's gain is that of searching its photos, each as often as it was drawn; scenes stay whole."""
    counts, part = candidates_of(0, 12, 7), np.arange(12) // 3
    allowed = np.ones((4, 7), bool)
    allowed[1:3, 5] = allowed[0, 2] = False
    counts[3:, :, 2, 2] = counts[3:, :, 0, 2] = 0  # a class in the first part alone, predicted elsewhere
    search = Search([[0, 1], [2, 3, 4], range(7)], [1, 2], groups, allowed)
    scene = number_scenes([f'scene {i // 2}' for i in range(12)])
    monkeypatch.setattr(choices, 'BLOCK', 5000)  # several blocks of draws
    for label, number, index in ((None, 12, np.arange(12)), (scene, 6, np.arange(12) // 2)):
        draws = search_draws(counts, part, metric, search, label)
        gains = np.diff(metric.mean(draws)[:, ::-1])[:, 0]
        scene_times = draw_times(number)
        times = scene_times[:, index].astype(int)
        whole = [row for row in range(30) if all(times[row, part == p].any() for p in range(4))]
        assert len(gains) == DRAWS and len(whole) > 6
        for row in whole[:6]:
            drawn = np.repeat(np.arange(12), times[row])
            expected = choose_slowly(counts[drawn], part[drawn], metric, search)
            assert gains[row] == pytest.approx(expected, abs=1e-8)
        assert search_gain(counts, part, metric, search, label) == smoothed_interval(gains, scene_times)
    assert number_scenes(['a', None, 1, 'a', None]).tolist() == [0, 1, 2, 0, 3]
    with pytest.raises(BadInput, match='fewer than 2'):
        search_gain(counts, part * 0, metric, search)


def test_the_best_of_many_candidates_are_enough(monkeypatch):
    counts, part = candidates_of(1, 30, 50), np.arange(30) // 6
    counts[:, 40:, 0] //= 2  # hopeless
    search = Search([range(50), [3, 45, 7]], [3])
    gain = search_gain(counts, part, HOME, search)
    monkeypatch.setattr(choices, 'MAX_CANDIDATES', 40)
    assert search_gain(counts, part, HOME, search) == gain
    for most, others in ((2, (3, 7)), (4, (3, 45, 7))):
        monkeypatch.setattr(choices, 'MAX_CANDIDATES', most)
        left, small = choices.leave_hopeless(counts, part, HOME, search)
        best = np.argsort(-HOME.score(counts))[:most]
        np.testing.assert_array_equal(left, counts[:, sorted({*best, *others})])
        assert [left[0, n].tolist() for n in small.families[1]] == [counts[0, n].tolist() for n in others]


def test_smoothed_interval():
    """The interval of a mean is Student's; an estimate that jumps varies less after smoothing."""
    values = np.random.default_rng(0).normal(5, 2, 50)
    times = draw_times(50)
    mean = smoothed_interval(times @ values / 50, times)
    error = values.std(ddof=1) / np.sqrt(50)
    assert mean.value == pytest.approx(values.mean(), abs=0.1 * error)
    assert (mean.high - mean.low) / 2 == pytest.approx(2.0096 * error, rel=0.1)  # t of 49 degrees
    jumps = np.where(times @ values / 50 > values.mean(), 1.0, 0.0)
    smooth = smoothed_interval(jumps, times)
    expected = np.sqrt(2 / np.pi) / 2  # the covariance of a normal value and its sign
    assert (smooth.high - smooth.low) / 2 == pytest.approx(2.0096 * expected, rel=0.1)
    assert smoothed_interval(np.zeros(2000), times) == Interval(0.0, 0.0, 0.0)
    assert np.isnan(smoothed_interval(np.full(2000, np.nan), times).low)
    holes = np.where(np.arange(2000) % 2, times @ values, np.nan)  # of draws without any class
    assert smoothed_interval(holes, times) == smoothed_interval(holes[1::2], times[1::2])
    rare = (np.arange(2000) < 20) * 0.01  # a gain in one draw of 100 alone is none
    assert smoothed_interval(rare, times).low < 0


def test_smoothed_interval_by_hand():
    """The covariances with the two images are .5 and -.5, of variance .5; the bias is 2 / 4 of that."""
    times = np.array([[2, 0], [0, 2], [1, 1], [1, 1]])
    interval = smoothed_interval(np.array([3.0, 1, 2, 2]), times)
    margin = 12.7062 * np.sqrt((0.5 - 0.25) * 2 / (2 - 1))  # t of one degree
    assert (interval.value, interval.high - interval.value) == pytest.approx((2, margin), rel=1e-5)


def made_up_photos(seed: int, effects: np.ndarray) -> np.ndarray:
    """(4000, C, 3, 4) counts of candidates whose recall is .7 and an effect; photos differ for all alike and
    for each by itself, and most have not all classes.
    """
    rng, n, number = np.random.default_rng(seed), 4000, len(effects)
    present = rng.random((n, 1, 4)) < np.linspace(1, 0.25, 4)
    true = (rng.gamma(1.5, 150, (n, 1, 4)) * present).round().astype(int)
    rates = 0.7 + rng.normal(0, 0.15, (n, 1, 4)) + rng.normal(0, 0.06, (n, number, 4)) + effects[:, None]
    hits = np.clip(rates * true, 0, true).round().astype(int)
    wrong = rng.gamma(1, 20, (n, 1, 4)) + np.maximum(0, rng.normal(0, 10, (n, number, 4)))
    return np.stack([hits, hits + wrong.round().astype(int), np.broadcast_to(true, hits.shape)], 2)


@pytest.mark.slow
@pytest.mark.parametrize('photos', [40, 100])
def test_the_interval_of_a_gain_covers_the_truth(photos):
    """On 200 sets each of three sizes of the gain, 93 to 97 % of the intervals hold the gain of the choice on
    all 4,000 photos, and those that keep the choice fewer. If there is nothing to gain ("do not ensemble"),
    2.5 % at most claim one.
    """
    search, part = Search([range(21)], [0]), np.arange(photos) * 5 // photos
    covered, covered_without, claimed = [], [], []
    for lowest, highest in ((0.0, 0.0), (-0.02, 0.02), (0.0, 0.06)):
        population = made_up_photos(1, np.concatenate([[0], np.linspace(lowest, highest, 20)]))
        truth, rng = HOME.score(population), np.random.default_rng(0)
        for _ in range(200):
            counts = population[rng.choice(4000, photos, replace=False)]
            best, chosen = cross_fit(counts, part, HOME)
            gain, true = search_gain(counts, part, HOME, search), truth[best] - truth[0]
            kept = HOME.paired_interval(counts[np.arange(photos), chosen[part]], counts[:, 0])
            covered.append(gain.low <= true <= gain.high)
            covered_without.append(kept.low <= true <= kept.high)
            claimed.append(gain.low > 0)
    shares = [np.mean(flags[at : at + 200]) for flags in (covered, covered_without) for at in (0, 200, 400)]
    claims = np.mean(claimed[:200])
    print(f'{photos} photos: covered {shares[:3]}, if the choice is kept {shares[3:]}, claimed {claims}')
    assert 0.93 <= np.mean(covered) <= 0.97 and min(shares[:3]) >= 0.91  # 0.017 is a standard error of 200
    assert np.mean(covered_without) < 0.91
    assert claims <= 0.025 and np.mean(claimed[400:]) > 0.9
