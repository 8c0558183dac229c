"""Thresholds of overlapping classes: chosen as by brute force, judged out of sample, kept in a file."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import write_csv

from config import Competition, Submission
from metrics import Metric, count_pixels
from submission import metric_of
from utils.errors import BadInput
from utils.yaml_files import read_yaml
from voting import thresholds
from voting.origin import Origin, origin_path, write_origin
from voting.thresholds import (
    HISTOGRAM_TYPE,
    choose_thresholds,
    fit_thresholds,
    format_thresholds,
    read_thresholds,
    threshold_counts,
)

METRICS = [('miou', 1.0), ('dice', 1.0), ('image_miou', None), ('image_dice', 1.0)]


def photos_of(seed: int, number: int, num_classes: int = 3, shift: float = 0.0):
    """Make stored probabilities and planes of photos of different sizes, with ignored pixels.

    The last class is in no photo; `shift` moves where the first one is best cut.
    """
    rng = np.random.default_rng(seed)
    photos = []
    for index in range(number):
        size = (num_classes, 5 + index % 3, 7)
        truth = (rng.random(size) < 0.3).astype(np.uint8)
        truth[-1] = 0
        probs = np.clip(rng.normal(0.35, 0.15, size) + 0.25 * truth, 0, 1)
        probs[0] = np.clip(probs[0] + shift, 0, 1)
        truth[rng.random(size) < 0.1] = 255
        photos.append(((probs * 255).round().astype(np.uint8), truth))
    return photos


def test_histograms_are_counts_of_pixels(monkeypatch):
    monkeypatch.setattr(thresholds, 'BLOCK', 10)
    for probs, truth in photos_of(0, 3):
        counts = threshold_counts(probs, truth)
        for k in range(3):
            for row, value in enumerate((1, 0)):
                expected = np.bincount(probs[k][truth[k] == value], minlength=256)
                assert counts[k, row].tolist() == expected.tolist()


def test_a_byte_reaches_a_threshold_as_its_probability_does():
    halves = [round(n / 510, 6) for n in range(1, 511)]  # of bytes, and between: means of two thresholds
    assert [thresholds.byte_of(value) for value in halves] == [-(-n // 2) for n in range(1, 511)]


def count_at(photos, values):
    """Count the pixels of each photo at thresholds by comparing each probability."""
    limits = np.array(values)[:, None, None]
    return np.stack([count_pixels(t, (p / 255 >= limits).astype(np.uint8), len(p)) for p, t in photos])


@pytest.fixture(scope='module')
def photos():
    return photos_of(1, 8, shift=0.2)


@pytest.fixture(scope='module')
def counts_by_byte(photos):
    """The counts (photos, 3, classes) at each byte's threshold, the same of all classes."""
    return [count_at(photos, [(byte - 0.5) / 255] * 3) for byte in range(1, 256)]


@pytest.mark.parametrize(('name', 'empty'), METRICS)
def test_choice_is_the_best_of_all_and_no_part_has_a_say_in_its_own(name, empty, photos, counts_by_byte):
    part = np.arange(8) // 3
    metric = Metric(name, (0, 1, 2), empty, overlap=True)
    chosen = choose_thresholds(np.stack([threshold_counts(*photo) for photo in photos]), part, metric)
    for number, values in ((None, chosen.values), *enumerate(chosen.by_part)):
        keep = part != number if number is not None else np.ones(8, bool)
        counts = count_at(photos, values)[keep]
        for k in range(2):
            scores = []
            for others in counts_by_byte:
                changed = counts.copy()
                changed[..., k] = others[keep, :, k]
                scores.append(metric.score(changed))
            assert metric.score(counts) == max(scores)
        assert values[2] == 0.5  # in no photo
    assert chosen.values[0] > chosen.values[1]
    np.testing.assert_array_equal(chosen.counts[0], count_at(photos, [0.5] * 3))
    for number, values in enumerate(chosen.by_part):
        expected = count_at(photos, values)[part == number]
        np.testing.assert_array_equal(chosen.counts[1][part == number], expected)
    expected = metric.score(chosen.counts[1]) - metric.score(chosen.counts[0])
    assert chosen.gain.low < expected < chosen.gain.high


def test_the_nearest_of_equal_thresholds_is_taken():
    truth = np.zeros((1, 4, 4), np.uint8)
    truth[0, :2] = 1
    photos = [(np.where(truth, 220, 30).astype(np.uint8), truth)] * 4
    chosen = choose_thresholds(np.stack([threshold_counts(*p) for p in photos]), np.arange(4), Metric('dice'))
    assert chosen.values == (0.5,) and not chosen.helps and 'not used' in format_thresholds(chosen, ['a'])
    with pytest.raises(BadInput, match='thresholds: found fewer than 2 photos'):
        choose_thresholds(np.zeros((1, 1, 2, 256), np.uint32), np.zeros(1, int), Metric('dice'))


def test_a_class_in_one_part_alone_is_not_chosen_for_it():
    photos = photos_of(4, 6, shift=0.1)
    for probs, truth in photos[:4]:
        truth[0][truth[0] == 1] = 0
        probs[0] = 140  # too much, so that a higher threshold would score here
    histograms = np.stack([threshold_counts(*photo) for photo in photos])
    chosen = choose_thresholds(histograms, np.arange(6) // 2, Metric('image_dice', overlap=True))
    assert chosen.by_part[2][0] == 0.5 != chosen.by_part[0][0]


COMPETITION = Competition(
    classes=('a', 'b', 'c'), task='multilabel', metric='dice', score_size='own', submission=Submission()
)


def write_histograms(folder, shift=0.3, folds=(0, 1, 3)):
    for fold in folds:
        path = folder / f'fold{fold}' / thresholds.HISTOGRAMS
        path.parent.mkdir(parents=True)
        photos = photos_of(fold, 4, shift=shift)
        np.save(path, np.stack([threshold_counts(*photo) for photo in photos]))


def test_thresholds_are_kept_with_the_model(tmp_path, monkeypatch):
    assert read_thresholds(tmp_path, 3) == [0.5] * 3
    results = []

    def choose(*given):
        results.append(choose_thresholds(*given))
        return results[-1]

    monkeypatch.setattr(thresholds, 'choose_thresholds', choose)
    write_histograms(tmp_path)
    report = fit_thresholds(tmp_path, COMPETITION)
    (chosen,), metric = results, metric_of(COMPETITION)
    scores = [metric.by_class(counts) for counts in chosen.counts]
    for k, line in enumerate(report.splitlines()[4:7]):
        expected = ['-' if np.isnan(score[k]) else f'{score[k]:.4f}' for score in scores]
        assert line.split() == ['abc'[k], f'{chosen.values[k]:.3f}', *expected]
    content = read_yaml(tmp_path / thresholds.FILE)
    before, after = (round(float(metric.score(counts)), 5) for counts in chosen.counts)
    assert content['metric'] == 'dice' and content['used'] and content['thresholds'] == [*chosen.values]
    assert (content['score_before'], content['score_after']) == (before, after)
    assert content['by_fold'] == {k: [*row] for k, row in zip((0, 1, 3), chosen.by_part, strict=True)}
    assert 'at 0.5: Dice ' in report and 'on 12 photos' in report and report.endswith('thresholds.yaml')
    assert 'above; 95% bootstrap interval; used' in report and len(report.splitlines()) == 8
    values = read_thresholds(tmp_path, 3)
    assert values[0] > 0.55 and values[2] == 0.5
    by_fold = [read_thresholds(tmp_path, 3, fold) for fold in (0, 1, 3)]
    assert any(row != values for row in by_fold)
    assert read_thresholds(tmp_path, 3, 2) == [0.5] * 3
    with pytest.raises(BadInput, match='expected the thresholds of 4 classes'):
        read_thresholds(tmp_path, 4)
    path = tmp_path / thresholds.FILE
    good = path.read_text()
    path.write_text(good.replace('used: true', 'used: false'))
    assert read_thresholds(tmp_path, 3) == read_thresholds(tmp_path, 3, 1) == [0.5] * 3
    for bad in (
        'used: true',
        good.replace('by_fold', 'by'),
        good.replace('thresholds: [0', 'thresholds: [1'),
    ):
        path.write_text(bad)
        with pytest.raises(BadInput, match='thresholds.yaml: expected the thresholds of 3 classes'):
            read_thresholds(tmp_path, 3)


def test_scenes_of_an_origin_stay_whole_in_the_draws(tmp_path, monkeypatch):
    write_histograms(tmp_path, folds=(0, 1))
    for fold in (0, 1):
        photos = {f'{fold}{n}.jpg': [fold, 2 * fold + n // 2] for n in range(4)}
        write_origin(write_csv(tmp_path / f'fold{fold}' / 'oof.csv', {}), Origin({}, {}, photos=photos))
    given = []
    monkeypatch.setattr(thresholds, 'choose_thresholds', lambda *values: given.extend(values))
    with pytest.raises(AttributeError):  # nothing was chosen
        fit_thresholds(tmp_path, COMPETITION)
    histograms, part, metric, scene = given
    assert histograms.shape == (8, 3, 2, 256) and metric == metric_of(COMPETITION)
    assert part.tolist() == [0] * 4 + [1] * 4 and scene.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_single_fold_is_split_but_has_none_of_its_own(tmp_path):
    write_histograms(tmp_path, folds=(2,))
    fit_thresholds(tmp_path, COMPETITION)
    assert read_thresholds(tmp_path, 3)[0] > 0.55 and read_thresholds(tmp_path, 3, 2) == [0.5] * 3


def test_csvs_that_were_made_with_other_thresholds_are_named(tmp_path):
    values, by_fold = [0.4, 0.5, 0.6], [[0.1] * 3, [0.2] * 3]
    text = f'used: true\nthresholds: {values}\nby_fold: {{0: {by_fold[0]}, 1: {by_fold[1]}}}\n'
    (tmp_path / thresholds.FILE).write_text(text)
    made = {'oof.csv': by_fold, 'test.csv': [values], 'fold1/test.csv': [values]}
    made |= {f'fold{k}/oof.csv': [by_fold[k]] for k in (0, 1)}
    csvs = [write_csv(tmp_path / name, {}) for name in made]
    for csv, values in zip(csvs, made.values(), strict=True):
        assert thresholds.thresholds_of(csv, len(values), 3) == values
        write_origin(csv, Origin({}, {'thresholds': values}))
    assert thresholds.list_outdated(csvs, 3) == ''
    write_origin(csvs[0], Origin({}, {'thresholds': by_fold[::-1]}))
    write_origin(csvs[2], Origin({}, {'thresholds': [[0.5] * 3]}))
    write_origin(csvs[3], Origin({}, {}))  # of a version that knew no thresholds
    origin_path(csvs[4]).unlink()
    assert thresholds.list_outdated(csvs, 3).endswith(f': {csvs[2]}, {csvs[0]}')


def test_the_mean_of_thresholds_is_weighted_by_class(tmp_path):
    for name, row in (('a', [0.2, 0.4, 0.3]), ('b', [0.6, 0.9, 0.3])):
        (tmp_path / name).mkdir()
        content = f'used: true\nthresholds: {row}\nby_fold: {{}}\n'
        (tmp_path / name / thresholds.FILE).write_text(content)
    table = [[Fraction(1), Fraction(0), Fraction(0)], [Fraction(2), Fraction(1), Fraction(0)]]
    means = thresholds.mean_thresholds([tmp_path / 'a', tmp_path / 'b'], table)
    assert means == [0.466667, 0.9, 0.5]  # without any weight the default


def test_wrong_histograms_are_refused(tmp_path):
    with pytest.raises(BadInput, match='oof_histograms.npy: no such file; infer.py --split oof writes it'):
        fit_thresholds(tmp_path, COMPETITION)
    with pytest.raises(BadInput, match='only the classes of a multilabel task'):
        fit_thresholds(tmp_path, Competition())
    for content, message in [
        (np.zeros((4, 2, 2, 256), HISTOGRAM_TYPE), r'expected \(4, 3, 2, 256\) uint32'),
        (np.zeros((4, 3, 2, 256)), 'uint32'),
        (np.float32(1), r'expected \(0, 3'),
    ]:
        np.save(tmp_path / thresholds.HISTOGRAMS, content)
        with pytest.raises(BadInput, match=message):
            fit_thresholds(tmp_path, COMPETITION)
    (tmp_path / thresholds.HISTOGRAMS).write_text('rubbish')
    with pytest.raises(BadInput, match='not an array'):
        fit_thresholds(tmp_path, COMPETITION)
