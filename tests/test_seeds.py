"""Intervals that hold photos and the seeds of trainings."""

import numpy as np
import pytest
from scipy.stats import t

from metrics import Metric, SeedInterval, verdict

HOME = Metric()
K = 7


def experiment(
    rng: np.random.Generator, seeds: int, folds: int, photos: int = 288, training: float = 0.5
) -> tuple[list[np.ndarray], np.ndarray]:
    """Counts (n, S, 3, K) of two sides that are equally good, and the fold of each photo.

    A pixel of a photo and class is right with a probability whose logit has the effects of the photo, the
    photo on this side, the training (a side, seed and fold), and the photo in this training.
    """
    area = np.zeros((photos, K))  # background, and one or two classes
    area[:, 0] = rng.uniform(0.3, 0.8, photos)
    objects = rng.random((photos, K - 1)).argsort(1).argsort(1) < rng.integers(1, 3, (photos, 1))
    parts = rng.exponential(1, objects.shape) * objects
    area[:, 1:] = (1 - area[:, :1]) * parts / parts.sum(1, keepdims=True)
    area = np.rint(area * 256**2)[:, None]  # (n, 1, K)
    fold = np.arange(photos) % folds
    photo = np.linspace(2.6, 1.4, K) + rng.normal(0, 3.2, (photos, 1, K))
    sides = []
    for _ in range(2):
        on_side, by_training = rng.normal(0, 0.6, photo.shape), rng.normal(0, training, (folds, seeds, K))
        logits = photo + on_side + by_training[fold] + rng.normal(0, 0.7, (photos, seeds, K))
        right = np.rint(area / (1 + np.exp(-logits)))
        wrong, predicted = area - right, right.copy()
        predicted[..., 0] += 0.6 * wrong[..., 1:].sum(-1)  # as background, or as the next class
        predicted[..., 1:] += 0.4 * np.roll(wrong[..., 1:], 1, -1) + wrong[..., :1] / (K - 1)
        sides.append(np.stack([right, predicted, np.broadcast_to(area, right.shape)], 2))
    return sides, fold


def covered(seeds: int, folds: int, experiments: int, seed: int = 0) -> tuple[float, float, float]:
    """The shares of made-up experiments whose intervals hold the true difference, 0, and the true score; and
    the median half width of the former.
    """
    rng = np.random.default_rng(seed)
    training = 0.5 if folds > 1 else 0.22  # that of a score over all photos is the same
    scores, differences, values = [], [], []
    for _ in range(experiments):
        (ours, theirs), fold = experiment(rng, seeds, folds, training=training)
        differences.append(HOME.seed_intervals(ours, theirs, folds=fold)[0])
        scores.append(HOME.seed_intervals(ours, folds=fold)[0])
        values += [HOME.score(ours).mean(), HOME.score(theirs).mean()]
    truth = np.mean(values)
    right = np.mean([one.low <= 0 <= one.high for one in differences])
    width = np.median([one.high - one.low for one in differences]) / 2
    return float(right), float(np.mean([one.low <= truth <= one.high for one in scores])), float(width)


@pytest.mark.slow
@pytest.mark.parametrize('folds', [1, 5])
@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_it_covers_the_truth(seeds, folds):
    """Intervals of 95 % hold the truth in 93 % to 99 %, or always with two trainings a side."""
    difference, score, width = covered(seeds, folds, 200)
    print(f'{seeds} seeds, {folds} folds: {difference:.3f}, of the score {score:.3f}, half width {width:.4f}')
    assert min(difference, score) >= 0.93
    assert (seeds, folds) == (2, 1) or min(difference, score) <= 0.99


def test_the_effects_of_the_simulation_have_real_sizes():
    (ours, theirs), _ = experiment(np.random.default_rng(0), 40, 5)
    assert 0.012 < HOME.score(ours).std() < 0.02
    one = HOME.interval(ours[:, 0])
    assert 0.035 < (one.high - one.low) / 2 < 0.055
    assert np.abs(HOME.score(ours).mean() - HOME.score(theirs).mean()) < 0.02


def test_one_seed_is_the_paired_bootstrap():
    (ours, theirs), fold = experiment(np.random.default_rng(1), 1, 5, 60)
    for metric in (HOME, Metric('image_dice', (1, 2, 3))):
        one, classes = metric.seed_intervals(ours, theirs, folds=fold)
        pair = metric.paired_interval(ours[:, 0], theirs[:, 0])
        assert (one.value, one.low, one.high) == (pair.value, pair.low, pair.high)
        assert one.seeds == 1 and np.isnan(one.training) and len(classes) == K


@pytest.mark.parametrize('name', ['miou', 'dice', 'image_miou', 'image_dice'])
def test_photos_that_are_all_alike_leave_the_t_interval_of_the_seeds(name):
    right = (900, 880, 905)  # of 1,000 pixels of the first class, by seed, and 450 of 500 of the second
    photo = np.array([[[r, 450], [r + 50, 1450 - r], [1000, 500]] for r in right])
    counts, metric = np.repeat(photo[None], 50, 0), Metric(name)
    scores = metric.score(counts)
    interval, _ = metric.seed_intervals(counts)
    half = t.ppf(0.975, 2) * scores.std(ddof=1) / np.sqrt(3)
    assert interval.value == pytest.approx(scores.mean()) and interval.dof == pytest.approx(2, abs=0.02)
    assert interval.high - interval.value == pytest.approx(half, rel=0.05)
    assert interval.photos == pytest.approx(0, abs=1e-9)
    assert interval.training == pytest.approx(scores.var(ddof=1), rel=0.02)


def test_each_fold_is_a_training_of_its_own():
    (ours, theirs), fold = experiment(np.random.default_rng(2), 3, 5)
    one, of_folds = (HOME.seed_intervals(ours, theirs, folds=folds)[0] for folds in (None, fold))
    assert one.dof <= 2.1 and 4 < of_folds.dof <= 10 and of_folds.photos == one.photos


def test_photos_of_a_scene_count_once():
    """Each photo twice says as much as each once, if it is known that they are of one scene."""
    (ours, theirs), fold = experiment(np.random.default_rng(3), 3, 2, 40)
    once, _ = HOME.seed_intervals(ours, theirs, folds=fold)
    pairs = [np.concatenate([part, part]) for part in (ours, theirs)]
    scenes, folds = np.tile(np.arange(40), 2), np.tile(fold, 2)
    same, _ = HOME.seed_intervals(*pairs, scenes, folds)
    np.testing.assert_allclose(list(vars(same).values()), list(vars(once).values()), atol=1e-12)
    assert HOME.seed_intervals(*pairs, None, folds)[0].photos < 0.8 * once.photos


def test_what_a_training_does_to_single_photos_is_not_counted_with_the_photos():
    """Seeds of one side against others of it: that photos are hard is common to them, and cancels."""
    (counts, _), fold = experiment(np.random.default_rng(4), 6, 5, training=0)
    same, _ = HOME.seed_intervals(counts[:, :3], counts[:, 3:], folds=fold)
    assert same.photos < 0.2 * same.training / 3


def test_a_class_that_one_seed_alone_predicts_adds_to_the_spread():
    """It is a whole class of score 0 for that seed, which nothing linear tells."""
    counts = np.zeros((30, 2, 3, 2), np.int64)
    counts[:, :, :, 0] = [90, 100, 95]
    counts[0, 1, 1, 1] = 1
    interval, _ = HOME.seed_intervals(counts)
    scores = HOME.score(counts)
    assert scores[1] == pytest.approx(scores[0] / 2, rel=0.01)
    assert interval.training == pytest.approx(scores.var(ddof=1), rel=0.02)


def test_how_many_seeds_show_a_difference():
    many = SeedInterval(0.004, -0.01, 0.02, 3, photos=0.0, training=0.02**2, dof=1e9)
    assert many.visible(8) == pytest.approx(2.8016 * 0.02 / np.sqrt(8), rel=1e-3)
    assert many.seeds_to_see(0.01) == 32  # (2.8016 x .02 / .01)² = 31.4
    few = SeedInterval(0.004, -0.01, 0.02, 3, photos=0.0, training=0.02**2, dof=2)
    assert few.seeds_to_see(0.01) > 32 and few.visible(2) > 0.1
    bounded = SeedInterval(0.004, -0.01, 0.02, 3, photos=0.005**2, training=0.02**2, dof=10)
    assert bounded.seeds_to_see(0.01) is None and bounded.visible(np.inf) == pytest.approx(
        2.8016 * 0.005, rel=1e-3
    )
    assert verdict(bounded, 30, 3) == 'no significant difference on 30 photos and 3 seeds'
    mixed = SeedInterval(0.004, -0.01, 0.02, 3, photos=3e-4, training=3e-4, dof=4)
    dof = 4 * (2 - 1) / (3 - 1) * (4.5e-4 / 1.5e-4) ** 2  # 18
    assert mixed.visible(2) == pytest.approx((t.ppf(0.975, dof) + t.ppf(0.8, dof)) * np.sqrt(4.5e-4))
    assert mixed.seeds_to_see(1) == 2


# of one side, and of the difference: value, low, high, photos, training, dof
EXAMPLE = {
    'miou': [
        (0.480028, 0.362122, 0.574069, 0.00216054, 0.00066909, 2.153),
        (-0.00277479, -0.0604966, 0.055963, 0.000250018, 0.00111799, 4),
    ],
    'dice': [
        (0.62176, 0.486052, 0.70208, 0.00217186, 0.000766064, 2.1922),
        (-0.00183907, -0.0514063, 0.0483616, 0.000158746, 0.000876643, 4),
    ],
    'image_dice': [
        (0.270471, 0.226988, 0.313457, 0.000137726, 0.000279543, 2.14862),
        (0.00766783, -0.0213138, 0.0366431, 2.98976e-05, 0.000311434, 4),
    ],
}


@pytest.mark.parametrize('name', EXAMPLE)
def test_numbers_of_an_example(name):
    """They are of the formula whose coverage test_it_covers_the_truth measures, which takes minutes."""
    (ours, theirs), fold = experiment(np.random.default_rng(5), 3, 2, 20)
    for other, expected in zip((None, theirs), EXAMPLE[name], strict=True):
        one, _ = Metric(name).seed_intervals(ours, other, folds=fold)
        assert (one.value, one.low, one.high, one.photos, one.training, one.dof) == pytest.approx(
            expected, rel=1e-4
        )


@pytest.mark.filterwarnings('error')
def test_a_class_in_no_photo_has_no_interval():
    counts = np.zeros((30, 2, 3, 2), np.int64)
    counts[..., 0] = [90, 100, 95]
    for name in ('miou', 'image_miou'):
        _, (_, absent) = Metric(name, empty=None).seed_intervals(counts)
        assert np.isnan([absent.value, absent.low, absent.photos, absent.training]).all() and absent.dof == 0
