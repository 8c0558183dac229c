"""Score masks: pixels counted by image and class → IoU or Dice of each class → their mean, with intervals.

    metric = metric_of(competition)        # submission.py; Metric() is the home competition's mIoU
    counts = np.stack([count_pixels(truth, pred, num_classes) for truth, pred in pairs])    # (n, 3, K)
    print(metric.label, metric.interval(counts))                    # mIoU 0.7222 [0.6769, 0.7658]

A confusion matrix (K, K) has true classes as rows and predicted ones as columns.

Intervals come from a bootstrap over images (the percentile interval of Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13; smoothed_interval where a choice was made). They show how much a score
depends on the choice of the images; those of seed_intervals also how much it changes with the seed of a
training.

Shapes: n images, K classes, B draws, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = 255  # in the truth: these pixels do not count
DRAWS = 2000  # of the bootstrap
LABELS = {'miou': 'mIoU', 'dice': 'Dice', 'image_miou': 'image mIoU', 'image_dice': 'image Dice'}
LEVEL = 0.95  # share of the draws that an interval holds
POWER = 0.8  # probability of seeing a difference, for which numbers of seeds are planned
MOST_SEEDS = 1000  # that are planned


def confusion_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each true and predicted class: two integer arrays of one shape → (K, K) int64.

    Pixels that are IGNORED in the truth do not count. Raises ValueError for any other value that is no class.
    """
    if truth.shape != pred.shape:
        raise ValueError(f'truth is {truth.shape}, pred is {pred.shape}; expected one shape')
    known = truth != IGNORED
    truth = truth[known]
    _check_class_ids(truth, num_classes, 'truth')
    _check_class_ids(pred, num_classes, 'pred')
    codes = truth.astype(np.int64) * num_classes + pred[known]
    return np.bincount(codes, minlength=num_classes**2).reshape(num_classes, num_classes)


def _check_class_ids(mask: np.ndarray, num_classes: int, name: str) -> None:
    if not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f'{name} is {mask.dtype}, expected class ids of an integer type')
    if mask.size and (mask.min() < 0 or mask.max() >= num_classes):
        wrong = mask.min() if mask.min() < 0 else mask.max()
        allowed = f'0 to {num_classes - 1}, or {IGNORED} in the truth'
        raise ValueError(f'{name} has the class id {wrong}, expected {allowed}')


def image_counts(confusion: np.ndarray) -> np.ndarray:
    """Count the pixels of each class that are right, predicted, and true: (K, K) → (3, K)."""
    return np.stack([np.diag(confusion), confusion.sum(0), confusion.sum(1)])


def row_shares(confusion: np.ndarray) -> np.ndarray:
    """Divide the (K, K) pixel counts of each true class by their sum; a class without a pixel has zeros."""
    totals = confusion.sum(1, keepdims=True)
    return np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)


def count_pixels(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each class that are right, predicted, and true: two masks of one shape → (3, K).

    They are (H, W) class ids, or (K, H, W) planes of classes that may overlap. Pixels that are IGNORED in the
    truth do not count, nor do they in the plane of a class. Raises ValueError.
    """
    if truth.ndim == 2:
        return image_counts(confusion_matrix(truth, pred, num_classes))
    if truth.shape != pred.shape or len(truth) != num_classes:
        raise ValueError(
            f'truth is {truth.shape}, pred is {pred.shape}; expected {num_classes} planes of each'
        )
    counts = np.empty((3, num_classes), np.int64)
    for k in range(num_classes):  # a plane at a time, which stays in the processor's cache
        true, predicted = truth[k] == 1, (pred[k] != 0) & (truth[k] != IGNORED)
        counts[:, k] = [np.count_nonzero(part) for part in (true & predicted, predicted, true)]
    return counts


def iou_of_counts(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute the (..., K) IoU from (..., K) pixels that are right, predicted, and true; nan without any."""
    union = predicted + true - hits
    return np.divide(hits, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_of_iou(iou: np.ndarray) -> np.ndarray:
    """Average (..., K) over the classes that are not nan: (...); nan if all are."""
    present = ~np.isnan(iou)
    total = np.where(present, iou, 0.0).sum(-1)
    return np.divide(total, present.sum(-1), out=np.full(total.shape, np.nan), where=present.any(-1))


@dataclass(frozen=True)
class Interval:
    """A score or a difference, and its bootstrap interval; `str` gives '0.7222 [0.6769, 0.7658]'."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]'

    @property
    def signed(self) -> str:
        """The text of a difference, as in '+0.0159 [+0.0062, +0.0281]'."""
        return f'{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]'


@dataclass(frozen=True)
class SeedInterval(Interval):
    """The mean over S seeds of a score or a difference, its interval, and the variances that it is made of.

    `photos` is the part that no seed lessens; `training` that of one seed, which S seeds divide by S, with
    `dof` degrees of freedom. With one seed both are nan: the interval holds the photos alone.
    """

    seeds: int
    photos: float
    training: float
    dof: float

    def visible(self, seeds: float) -> float:
        """Return the difference that so many seeds show with a probability of POWER on as many photos."""
        from scipy.special import stdtrit  # the quantile of Student's t

        seed_part = self.training / seeds
        variance = self.photos + seed_part
        dof = np.inf
        if seed_part > 0:  # Satterthwaite, Biometrics Bulletin 2 (1946)
            dof = self.dof * (seeds - 1) / (self.seeds - 1) * (variance / seed_part) ** 2
        return float((stdtrit(dof, (1 + LEVEL) / 2) + stdtrit(dof, POWER)) * np.sqrt(variance))

    def seeds_to_see(self, difference: float) -> int | None:
        """Return the fewest seeds that show a difference with a probability of POWER; None if no number does,
        or more than MOST_SEEDS.
        """
        return next((s for s in range(2, MOST_SEEDS + 1) if self.visible(s) <= difference), None)


def verdict(difference: Interval, images: int, seeds: int = 1) -> str:
    """Say in plain words which of two is better, given their paired difference on images and seeds."""
    where = f'{images} photos' + (f' and {seeds} seeds' if seeds > 1 else '')
    if not (difference.low > 0 or difference.high < 0):
        return f'no significant difference on {where}'
    better = 'first' if difference.low > 0 else 'second'
    return f'the {better} is better: a significant difference on {where}'


@dataclass(frozen=True)
class Metric:
    """The score of a competition, from the image_counts of its images.

    miou and dice add up the pixels of all images; image_miou and image_dice are the means over the images of
    each class's score in an image. Either is then the mean over the `scored` classes, all if None. `empty` is
    the score in an image of a class that neither truth nor prediction has there; None leaves it out. Images
    whose pixels are all IGNORED count for nothing; if classes may `overlap`, they cannot be told from images
    without an object, which do count.
    """

    name: str = 'miou'
    scored: tuple[int, ...] | None = None
    empty: float | None = 1.0
    overlap: bool = False

    @property
    def label(self) -> str:
        """The name as it is shown."""
        return LABELS[self.name]

    @property
    def class_label(self) -> str:
        """The name of a class's score as it is shown."""
        return self.label.replace('mIoU', 'IoU')

    @property
    def class_name(self) -> str:
        """The name of a class's score in a column of a file."""
        return self.name.replace('miou', 'iou')

    @property
    def is_by_image(self) -> bool:
        """Return whether the counts of images must not be added up."""
        return self.name.startswith('image_')

    @property
    def note(self) -> str:
        """A line to stand below a table: how photos are averaged; empty if their pixels are added up."""
        if not self.is_by_image:
            return ''
        empty = 'is left out' if self.empty is None else f'counts {self.empty:g}'
        return (
            f'{self.label}: the mean over photos, then over classes; a class that neither the truth nor the '
            f'prediction of a photo has {empty} there'
        )

    def scored_ids(self, num_classes: int) -> tuple[int, ...]:
        """Return the ids of the classes that count."""
        return tuple(range(num_classes)) if self.scored is None else self.scored

    def known(self, counts: np.ndarray) -> np.ndarray:
        """Tell which images have something to score: (n, ..., 3, K) counts → (n, ...) bool."""
        return counts.any((-2, -1)) | self.overlap

    def score(self, counts: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        """Compute the score of n images: (n, ..., 3, K) counts → (...), nan without any class.

        With `times` (B, n), how often each image counts in each of B draws → (B, ...).
        """
        return self.mean(self.by_class(counts, times))

    def mean(self, scores: np.ndarray) -> np.ndarray:
        """Average the scores of the classes that count, (..., K) → (...); nan without any."""
        return mean_of_iou(scores if self.scored is None else np.take(scores, self.scored, -1))

    def of_image(self, truth: np.ndarray, pred: np.ndarray, num_classes: int) -> float:
        """Compute the score of one image alone, by two masks as for count_pixels."""
        return float(self.score(count_pixels(truth, pred, num_classes)[None]))

    def by_class(self, counts: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        """Compute the score of each class, scored or not: (n, ..., 3, K) → (..., K), nan for an absent one.

        With `times`, as in score → (B, ..., K).
        """
        sums = self.summands(counts)
        return self.class_scores(sums.sum(0) if times is None else np.tensordot(times, sums, 1))

    def summands(self, counts: np.ndarray) -> np.ndarray:
        """Return what may be added up over images, (n, ..., 3, K) counts → (n, ..., 3, K): the counts, or of
        a mean over images the score of each, 1 if it has one, and the true pixels.
        """
        if not self.is_by_image:
            return counts
        scores = self._ratio(counts)  # (n, ..., K)
        if self.empty is not None:
            absent = np.isnan(scores) & self.known(counts)[..., None]
            scores = np.where(absent, self.empty, scores)
        return np.stack([np.nan_to_num(scores), ~np.isnan(scores), counts[..., 2, :]], -2)

    def class_scores(self, sums: np.ndarray) -> np.ndarray:
        """Score each class by the sum of summands, (..., 3, K) → (..., K), nan for an absent one."""
        if not self.is_by_image:
            return self._ratio(sums)
        total, number, _ = np.moveaxis(sums, -2, 0)
        return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)

    def _ratio(self, counts: np.ndarray) -> np.ndarray:
        """Compute IoU or Dice of counts, (..., 3, K) → (..., K); nan where there is neither."""
        hits, predicted, true = np.moveaxis(counts, -2, 0)
        if self.name.endswith('miou'):
            return iou_of_counts(hits, predicted, true)
        total = predicted + true
        return np.divide(2 * hits, total, out=np.full(total.shape, np.nan), where=total > 0)

    def interval(self, counts: np.ndarray) -> Interval:
        """Compute the score of (n, 3, K) counts and its interval."""
        return _interval(self.score(counts), self.score(counts, draw_times(len(counts))))

    def class_intervals(self, counts: np.ndarray) -> list[Interval]:
        """Compute the score of each class and its interval; nan for a class that is in no image."""
        draws = self.by_class(counts, draw_times(len(counts)))
        return [_interval(*pair) for pair in zip(self.by_class(counts), draws.T, strict=True)]

    def paired_interval(self, ours: np.ndarray, theirs: np.ndarray) -> Interval:
        """Compute the score of `ours` minus that of `theirs`, both (n, 3, K), and its interval."""
        times = draw_times(len(ours))
        draws = self.score(ours, times) - self.score(theirs, times)
        return _interval(self.score(ours) - self.score(theirs), draws)

    def seed_intervals(
        self,
        ours: np.ndarray,
        theirs: np.ndarray | None = None,
        scenes: np.ndarray | None = None,
        folds: np.ndarray | None = None,
    ) -> tuple[SeedInterval, list[SeedInterval]]:
        """Compute the score of (n, S, 3, K) counts by S seeds, or that minus the score of `theirs`, paired by
        image and seed: the mean over the seeds, and that of each class, nan for one in no image.

        Images of one of the (n,) `scenes` are drawn together; by default each is a scene. Each of the (n,)
        `folds` of a seed is a training of its own, as good as independent of the others, since trainings by
        one seed that begin a bit apart differ like those of two seeds (Summers and Dinneen, ICML 2021); by
        default all images are of one.

        Scenes and trainings are crossed random effects. What both contain, a scene by a training, is counted
        once (Cameron, Gelbach and Miller, Journal of Business & Economic Statistics 29, 2011), with the
        trainings; a bootstrap of both counts it three times (Owen, Annals of Applied Statistics 1, 2007). The
        interval has the quantiles of Behrens and Fisher's distribution, which is conservative (Robinson,
        Annals of Statistics 4, 1976): draws of scenes, narrowed to what is theirs alone, plus draws of
        Student's t for the few trainings, with Welch's degrees of freedom (Biometrika 34, 1947).
        """
        scenes = np.arange(len(ours)) if scenes is None else np.unique(scenes, return_inverse=True)[1]
        folds = np.zeros(len(ours), int) if folds is None else np.unique(folds, return_inverse=True)[1]
        times = draw_times(scenes.max() + 1)[:, scenes]
        values, draws, influence = self._of_seeds(ours, times)
        if theirs is not None:
            other = self._of_seeds(theirs, times)
            values, draws, influence = values - other[0], draws - other[1], influence - other[2]
        columns = zip(values.T, draws.T, np.moveaxis(influence, -1, 0), strict=True)
        mean, *by_class = [_seed_interval(*column, scenes, folds) for column in columns]
        return mean, by_class

    def _of_seeds(self, counts: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute the score and then that of each class, of (n, S, 3, K) counts: of each seed (S, 1 + K), of
        each draw, averaged over the seeds (B, 1 + K), and how much each image adds to the score by each seed,
        linearly, about their mean (n, S, 1 + K): Jaeckel's infinitesimal jackknife (1972).
        """
        above, below, third = np.moveaxis(self.summands(counts), -2, 0)  # (n, S, K)
        if not self.is_by_image:  # right, predicted and true pixels
            below = below + third - above if self.name == 'miou' else below + third
            above = above if self.name == 'miou' else 2 * above
        total = below.sum(0).mean(0)
        score = np.divide(above.sum(0).mean(0), total, out=np.full(total.shape, np.nan), where=total > 0)
        influence = (above - score * below) / np.maximum(total, 1)
        values, draws = self.by_class(counts), self.by_class(counts, times)
        values, draws, influence = (
            np.concatenate([self.mean(part)[..., None], part], -1) for part in (values, draws, influence)
        )
        return values, draws.mean(1), influence


def draw_times(n: int, draws: int = DRAWS) -> np.ndarray:
    """Draw how often each of n images counts in each draw, alike for the same n: (B, n) float64."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)


def _interval(value: float, draws: np.ndarray) -> Interval:
    """Build the interval of a value from its (B,) draws; draws without any class, nan, do not count."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _seed_interval(
    values: np.ndarray, draws: np.ndarray, influence: np.ndarray, scenes: np.ndarray, folds: np.ndarray
) -> SeedInterval:
    """Build the interval of (S,) values by seed from the (B,) draws of images and the (n, S) influence."""
    seeds, draws = len(values), draws[~np.isnan(draws)]
    if seeds == 1 or not len(draws) or np.isnan(values).any():
        interval = _interval(values.mean(), draws)
        return SeedInterval(interval.value, interval.low, interval.high, seeds, np.nan, np.nan, 0)
    from scipy.special import stdtrit  # the quantile of Student's t; slow to import

    by_scene, by_training = np.zeros((scenes.max() + 1, seeds)), np.zeros((folds.max() + 1, seeds))
    np.add.at(by_scene, scenes, influence)
    np.add.at(by_training, folds, influence)
    not_linear = values - influence.sum(0)  # as when a class is predicted by some of the seeds alone
    parts = np.vstack([by_training, not_linear]).var(1, ddof=1) / seeds
    both = by_scene.var(1, ddof=1).sum() / seeds
    dof = parts.sum() ** 2 / max(np.square(parts).sum() / (seeds + 1), np.finfo(float).tiny) - 2
    dof = float(np.clip(dof, seeds - 1, (seeds - 1) * len(by_training)))
    photos, training = max(0.0, draws.var() - both), max(parts.sum(), both)
    share = np.sqrt(photos / draws.var()) if photos > 0 else 0.0
    luck = stdtrit(dof, (np.arange(len(draws)) + 0.5) / len(draws)) * np.sqrt(training)
    luck = np.random.default_rng(1).permutation(luck)
    interval = _interval(values.mean(), draws.mean() + share * (draws - draws.mean()) + luck)
    return SeedInterval(
        interval.value, interval.low, interval.high, seeds, photos, float(seeds * training), dof
    )


def smoothed_interval(draws: np.ndarray, times: np.ndarray) -> Interval:
    """Build the interval of an estimate that makes a choice, from its (B,) values in draws of n images and
    `times` (B, n), how often each image counts in each draw.

    Its value is the mean over the draws, which varies less than the estimate, since that jumps from choice to
    choice; its standard error is the infinitesimal jackknife's (Efron, Estimation and Accuracy After Model
    Selection, JASA 109, 2014, theorem 1), without its bias for few draws (Wager, Hastie and Efron, JMLR 15,
    2014, equation 7); the interval is Student's with n - 1 degrees of freedom. Draws without any class,
    nan, do not count; nan without an interval.
    """
    from scipy.stats import t  # slow to import, and only a search needs it

    times, draws = times[~np.isnan(draws)], draws[~np.isnan(draws)]
    number, n = times.shape
    if number < 2 or n < 2:
        return Interval(float(draws.mean()) if number else np.nan, np.nan, np.nan)
    value, variance = draws.mean(), draws.var()
    covariances = (draws - value) @ (times - 1) / number  # (n,)
    noise = np.sqrt(2 * n) / number  # of the sum of their squares, in variances
    squares = max((covariances**2).sum() - n / number * variance, noise * variance)
    margin = t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt(squares * n / (n - 1))
    return Interval(float(value), float(value - margin), float(value + margin))


def format_table(counts: np.ndarray, classes: Sequence[str], metric: Metric | None = None) -> str:
    """Format a line for each scored class, the pixel accuracy and the metric's note from (n, 3, K) counts."""
    metric = metric or Metric()
    width, label = max(map(len, classes)), metric.class_label
    (hits, _, true), scores = counts.sum(0), metric.by_class(counts)
    images = np.count_nonzero(counts[:, 2], axis=0)
    column = max(6, len(label))
    lines = [f'{"class":<{width}}  {label:>{column}}        pixels   share  images']
    for k in metric.scored_ids(len(classes)):
        share = true[k] / max(1, true.sum())
        score = '-' if np.isnan(scores[k]) else f'{scores[k]:.4f}'
        lines.append(
            f'{classes[k]:<{width}}  {score:>{column}}  {true[k]:>12,}  {share:>6.2%}  {images[k]:>6}'
        )
    if not metric.overlap:
        lines.append(f'pixel accuracy {hits.sum() / max(1, true.sum()):.4f}')
    return '\n'.join([*lines, *filter(None, [metric.note])])
