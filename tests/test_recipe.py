"""Test weights by class, soft votes and temperatures against brute force, and the command that uses them."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mean_iou, write_csv, write_rectangles

from config import HOME
from ensemble import main
from metrics import Metric, confusion_matrix
from utils.errors import BadInput
from utils.id_csv import IdWriter, read_masks
from utils.id_text import SIDE
from utils.yaml_files import read_yaml
from voting import calibration
from voting.calibration import (
    Calibration,
    apply_temperature,
    byte_powers,
    calibrate,
    calibrate_pixels,
    calibration_error,
    fit_temperature,
    log_loss,
    read_temperature,
    write_calibration,
)
from voting.hard import count_votes, vote
from voting.members import OofSample, member_of
from voting.recipe import (
    EnsembleScore,
    Recipe,
    RecipeEntry,
    calibrate_model,
    count_changes,
    merge_members,
    read_entries,
    share_weights,
)
from voting.soft import Tally, calibrated_probs, mean_probs, search_soft, soft_grid
from voting.weights import ClassWeightSearch, search_weights


def samples_of(truth, preds, parts, probs=()):
    probs = probs or [()] * len(parts)
    return [OofSample(*one) for one in zip(parts, truth, preds, probs, strict=True)]


def random_votes(seed, num_models=3, num_classes=4, images=6):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, (images, 12, 12), np.uint8)
    wrong = rng.integers(0, num_classes, (images, num_models, 12, 12), np.uint8)
    error = np.linspace(0.3, 0.6, num_models)[None, :, None, None]
    return truth, np.where(rng.random(wrong.shape) < error, wrong, truth[:, None]).astype(np.uint8)


def score(truth, preds, table, num_classes):
    return mean_iou(confusion_matrix(truth, vote(preds.swapaxes(0, 1), table), num_classes))


@pytest.mark.parametrize('seed', range(4))
def test_class_weights_are_scored_as_the_vote_is(seed):
    truth, preds = random_votes(seed)
    truth[0, :3] = 255
    parts = np.arange(6) // 2
    counts = count_votes(samples_of(truth, preds, parts.tolist()), 3, 4)
    search = ClassWeightSearch(counts)
    start = np.array([2, 1, 1])
    for left_out in (None, 0, 2):
        keep = parts != (-1 if left_out is None else left_out)
        table = search.best_table(start, left_out)
        best = score(truth[keep], preds[keep], table, 4)
        assert best >= score(truth[keep], preds[keep], np.tile(start[:, None], 4), 4)
        reached, climbed = search.ascend(start, left_out)
        assert reached == score(truth[keep], preds[keep], climbed, 4) <= best
        for model in range(3):  # no single change is better
            for category in range(4):
                for halves in range(5):
                    other = climbed.copy()
                    other[model, category] = start[model] * halves
                    assert score(truth[keep], preds[keep], other, 4) <= reached
    for part in range(3):
        sums = search.vote_sums(search.pixels[part], vote(search.votes.T, table))[0]
        confusion = confusion_matrix(
            truth[parts == part], vote(preds[parts == part].swapaxes(0, 1), table), 4
        )
        assert sums.tolist() == [np.diag(confusion).tolist(), confusion.sum(0).tolist()]


def test_weights_by_class_are_used_where_models_know_different_classes():
    """The first model knows only the classes 0 and 1, the second only 2 and 3."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (10, 32, 32), np.uint8)
    random = rng.integers(0, 4, (2, *truth.shape), np.uint8)
    first = np.where(truth < 2, truth, np.where(random[0] < 2, 2, 3)).astype(np.uint8)
    second = np.where(truth >= 2, truth, np.where(random[1] < 2, 2, 3)).astype(np.uint8)
    preds = np.stack([first, second], 1)
    counts = count_votes(samples_of(truth, preds, [i // 2 for i in range(10)]), 2, 4)
    result = search_weights(counts, by_class=True)
    by_class = result.by_class
    assert result.uses_classes and by_class.out_of_sample > result.single_out_of_sample + 0.05
    assert result.out_of_sample == by_class.out_of_sample
    parts = np.arange(10) // 2
    confusion = sum(
        confusion_matrix(
            truth[parts == p], vote(preds[parts == p].swapaxes(0, 1), by_class.part_tables[p]), 4
        )
        for p in range(5)
    )
    assert by_class.out_of_sample == mean_iou(confusion)


# --- temperatures -----------------------------------------------------------------------------------------


def overconfident(seed, pixels=20_000, temperature=2.0):
    """Make sharpened probabilities, the calibrated ones they come from, and the truth."""
    rng = np.random.default_rng(seed)
    honest = rng.dirichlet(np.ones(4) * 0.7, pixels)
    truth = (honest.cumsum(1) > rng.random((pixels, 1))).argmax(1)
    sharp = honest**temperature
    return sharp / sharp.sum(1, keepdims=True), honest, truth


def as_bytes(probs):
    return np.rint(255 * probs).astype(np.uint8)


def test_the_temperature_is_found_and_lowers_the_error():
    sharp, honest, truth = overconfident(0)
    assert fit_temperature(as_bytes(sharp), truth) == pytest.approx(2.0, rel=0.1)
    assert calibration_error(honest, truth) < 0.02 < 0.08 < calibration_error(sharp, truth)
    assert log_loss(apply_temperature(sharp, 2.0, 1), truth) < log_loss(sharp, truth)


@pytest.mark.parametrize('temperature', [0.6, 0.8, 1.0, 1.3, 1.7, 2.0, 2.5])
def test_a_known_temperature_is_fitted_within_2_percent_from_bytes(temperature):
    """Logits of 11 classes, of which one stands out, times the temperature, stored as files have them."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50_000, 11))
    rows = np.arange(len(logits))
    logits[rows, rng.integers(0, 11, len(logits))] += np.abs(rng.normal(4, 2.5, len(logits)))
    honest = np.exp(logits)
    honest /= honest.sum(1, keepdims=True)
    truth = (honest.cumsum(1) > rng.random((len(logits), 1))).argmax(1)
    probs = np.exp(logits * temperature)
    stored = (255 * probs / probs.sum(1, keepdims=True)).round().astype(np.uint8)
    if temperature == 2.5:  # impossible by its byte, though the truth
        assert 0.05 < (stored[rows, truth] == 0).mean() < 0.15
    result = calibrate_pixels(stored, truth, rows % 2)
    assert result.temperature == pytest.approx(temperature, rel=0.02)
    if temperature >= 1.3:
        assert result.helps and result.error_after < 0.5 * result.error_before


def test_the_power_of_a_byte_is_its_mean():
    for power in (0.4, 1.0, 3.0):
        fine = np.exp(np.linspace(np.log(0.501 / 255), np.log(255.49 / 255), 2_000_001))
        bytes_ = np.rint(255 * fine).astype(int)
        sums, number = np.bincount(bytes_, fine**power)[1:], np.bincount(bytes_)[1:]
        np.testing.assert_allclose(byte_powers(power)[1:], sums / number, rtol=3e-3)
    assert byte_powers(2.0)[0] == 0


def test_impossible_classes_stay_impossible():
    probs = np.array([[0.9, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for array in (probs, torch.from_numpy(probs)):
        np.testing.assert_allclose(apply_temperature(array, 2.0, 1), [[0.75, 0.25, 0, 0], [1, 0, 0, 0]])
    assert fit_temperature(as_bytes(probs), np.array([2, 0])) == 1.0  # nothing tells


def test_calibration_error_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    truth = np.array([0, 0, 1, 1])  # two thirds right at .9; none right at .6
    assert calibration_error(probs, truth) == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.6)


def test_log_loss_by_hand():
    probs, truth = np.array([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]), np.array([0, 1, 0])
    assert log_loss(probs, truth) == pytest.approx(-np.log([0.9, 0.5, 0.5 / 255]).mean())
    assert calibration_error(np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize('errors', [(0.2, 0.1), (0.1, 0.2), (0.1, 0.1)])
@pytest.mark.parametrize('losses', [(0.2, 0.1), (0.1, 0.2), (0.1, 0.1)])
def test_a_temperature_helps_if_it_lowers_both(errors, losses, monkeypatch):
    """Each is measured on probabilities that sum to 1, at the temperature fitted without their part."""
    stored, truth = np.array([[200, 50, 0], [90, 90, 70], [9, 1, 240], [30, 20, 205]], np.uint8), np.arange(4)
    part, fitted, given = np.array([0, 0, 1, 1]), {2: 1.7, 4: 2.0}, []
    monkeypatch.setattr(calibration, 'fit_temperature', lambda s, t: fitted[len(s)] + (t[0] == 0) * 0.1)

    def measure(values):
        def score(probs, true):
            given.append(probs)
            return values[not np.allclose(probs, plain)]

        return score

    plain = stored / stored.sum(1, keepdims=True)
    monkeypatch.setattr(calibration, 'calibration_error', measure(errors))
    monkeypatch.setattr(calibration, 'log_loss', measure(losses))
    result = calibrate_pixels(stored, truth, part)
    assert (result.error_before, result.error_after) == errors
    assert result.temperature == 2.1 and result.part_temperatures == (1.7, 1.8)
    assert result.helps == (errors[1] < errors[0] and losses[1] < losses[0])
    np.testing.assert_allclose(given[1][:2], apply_temperature(plain[:2], 1.7, 1), rtol=1e-5)
    np.testing.assert_allclose(given[1][2:], apply_temperature(plain[2:], 1.8, 1), rtol=1e-5)


def test_temperatures_are_the_same_in_numpy_and_torch():
    probs = overconfident(1, 50)[0].astype(np.float32)
    out = apply_temperature(torch.from_numpy(probs), 1.7, 1).numpy()
    np.testing.assert_allclose(out, apply_temperature(probs, 1.7, 1), rtol=1e-5)
    np.testing.assert_allclose(out.sum(1), 1, rtol=1e-5)
    assert apply_temperature(probs, 1, 1) is probs


def soft_samples(seed, num_models=2, images=6, side=32, temperatures=(2.0, 1.0)):
    """Make small samples with the probabilities of models, which are overconfident above temperature 1."""
    rng = np.random.default_rng(seed)
    samples = []
    for image in range(images):
        truth = rng.integers(0, 4, (side, side), np.uint8)
        probs = []
        for model in range(num_models):
            logits = rng.normal(size=(4, side, side)) * 1.2
            logits[truth, np.arange(side)[:, None], np.arange(side)] += 1.5
            p = np.exp(logits * temperatures[model])
            probs.append((255 * p / p.sum(0)).round().astype(np.uint8))
        preds = np.stack([p.argmax(0) for p in probs]).astype(np.uint8)
        samples.append(OofSample(image // 2, truth, preds, probs))
    return samples


def test_calibrate_fits_each_model_and_says_whether_it_helps():
    samples = soft_samples(0, temperatures=(4.0, 1.0), images=30, side=64)
    first, _ = calibrate(samples, 2)
    assert first.helps and first.error_after < 0.7 * first.error_before and first.used > 1.3
    assert len(first.part_temperatures) == 15 and first.used_for(3) == first.part_temperatures[3]
    samples[0].truth[0, :9] = 255  # every 8th pixel of every 8th row counts, where the truth is known
    few = np.s_[::8, ::8]
    labels = np.concatenate([one.truth[few].ravel() for one in samples])
    stored = np.concatenate([one.probs[1][:, *few].reshape(4, -1).T for one in samples])
    part = np.repeat(np.arange(30) // 2, 64)
    known = labels < 255
    assert calibrate(samples, 2)[1] == calibrate_pixels(stored[known], labels[known], part[known])
    worse = Calibration(1.5, (1.5, 1.5), 0.01, 0.02, False)
    assert worse.used == worse.used_for(1) == 1.0 and 'not used' in str(worse)
    with pytest.raises(BadInput, match='fewer than 2'):
        calibrate(samples[:2], 2)


def test_soft_search_is_the_best_of_all_means_out_of_sample():
    samples = soft_samples(1, side=16)  # the weights chosen without the first part differ from the others
    none = [Calibration(1.0, (1.0,) * 3, 0, 0, False)] * 2
    result = search_soft(samples, 2, 4, Metric(), none)

    def voted(weights, keep):
        confusion = np.zeros((4, 4), np.int64)
        for one in samples:
            if keep(one.part):
                ids = mean_probs(one.probs, np.tile(np.array(weights)[:, None], 4)).argmax(0).astype(np.uint8)
                confusion += confusion_matrix(one.truth, ids, 4)
        return confusion

    grid = soft_grid(2).tolist()
    assert [1, 1] in grid and [0, 1] not in grid
    everywhere = [mean_iou(voted(weights, lambda part: True)) for weights in grid]
    assert result.best == max(everywhere) and list(result.weights) == grid[int(np.argmax(everywhere))]
    total = 0
    for part in range(3):
        scores = [mean_iou(voted(weights, lambda other, part=part: other != part)) for weights in grid]
        chosen = grid[int(np.argmax(scores))]
        assert list(result.part_weights[part]) == chosen
        total = total + voted(chosen, lambda other, part=part: other == part)
    assert result.out_of_sample == result.uncalibrated_out_of_sample == mean_iou(total)
    assert len(set(result.part_weights)) > 1


def test_a_part_may_have_more_pixels_than_32_bits_count(monkeypatch):
    none = [Calibration(1.0, (1.0,) * 3, 0, 0, False)] * 2
    samples = soft_samples(1, side=16)
    expected, add = search_soft(samples, 2, 4, Metric(), none), Tally.add
    monkeypatch.setattr(Tally, 'add', lambda self, part, counts: add(self, part, counts * 10_000_000))
    assert search_soft(samples, 2, 4, Metric(), none) == expected


def test_temperatures_are_used_where_they_help_the_vote():
    samples = soft_samples(2, temperatures=(6.0, 0.4), images=12, side=64)
    calibrations = calibrate(samples, 2)
    result = search_soft(samples, 2, 4, Metric(), calibrations)
    assert result.out_of_sample >= result.uncalibrated_out_of_sample
    assert (result.temperatures != (1.0, 1.0)) == (result.out_of_sample > result.uncalibrated_out_of_sample)
    assert calibrated_probs(np.array([[255], [0]], np.uint8), 2.0).sum() == pytest.approx(255, rel=1e-4)


def test_ignored_pixels_do_not_count_in_the_soft_search():
    samples = soft_samples(3)
    none = [Calibration(1.0, (1.0,) * 3, 0, 0, False)] * 2
    for one in samples:
        one.truth[:10] = 255
    cut = [OofSample(o.part, o.truth[10:], o.preds[:, 10:], [p[:, 10:] for p in o.probs]) for o in samples]
    assert search_soft(samples, 2, 4, Metric(), none) == search_soft(cut, 2, 4, Metric(), none)


# --- recipes ----------------------------------------------------------------------------------------------


def members_of(*names):
    return [member_of(Path(name)) for name in names]


def test_members_share_the_weight_of_their_model():
    members = members_of('b/fold0/x.csv', 'a/fold1/x.csv', 'b/fold1/x.csv', 'b/fold2/x.csv')
    table, third = [[Fraction(3), Fraction(1)], [Fraction(2), Fraction(0)]], Fraction(1, 3)
    shared = share_weights(Recipe('soft vote', table, [1.5, 0.7], [0.4, 0.6]), members)
    assert shared == Recipe(
        'soft vote', [[1, third], [2, 0], [1, third], [1, third]], [1.5, 0.7, 1.5, 1.5], [0.4, 0.6]
    )
    assert merge_members(shared, members, 2) == (table, [1.5, 0.7])


GOOD = {'rule': 'soft vote', 'members': [{'csv': 'a/test.csv', 'oof': 'f00', 'weight': 2}]}
MEMBER = GOOD['members'][0]


@pytest.mark.parametrize(
    ('change', 'entry'),
    [
        ({}, {}),
        ({'thresholds': [0.3, 0.7]}, {'weight': ['1/3', 1.5]}),
        ({}, {'temperature': 0.2}),
        ({'rule': 'hard vote'}, {'temperature': 5}),
    ],
)
def test_a_recipe_is_read_as_it_is_written(change, entry, tmp_path):
    path = write_csv(tmp_path / 'a' / 'test.csv', {}).parents[1] / 'ensemble.yaml'
    path.write_text(json.dumps(GOOD | change | {'members': [MEMBER | entry]}))
    rule, limits, (read,) = read_entries(path, 2)
    assert rule == change.get('rule', 'soft vote') and limits == change.get('thresholds')
    weights = [Fraction(1, 3), Fraction(3, 2)] if entry.get('weight') else [2, 2]
    assert read == RecipeEntry(tmp_path / 'a/test.csv', 'f00', weights, entry.get('temperature', 1))


@pytest.mark.parametrize(
    'change',
    [{'rule': 'vote'}, {'rule': None}, {'members': 3}, {'members': [MEMBER, {}]}, {'thresholds': [0.5]}]
    + [{'thresholds': [0.5, limit]} for limit in (0.0, 1.0, 'x')]
    + [{'members': [{k: v for k, v in MEMBER.items() if k != key}]} for key in MEMBER]
    + [{'members': [MEMBER | {'weight': w}]} for w in ([1], [1, 2, 3], -1, 'x', '1/0', [1, '1e3'])]
    + [{'members': [MEMBER | {'temperature': t}]} for t in (0.19, 5.01, 'hot', [1])],
    ids=str,
)
def test_a_broken_recipe_is_refused(change, tmp_path):
    path = tmp_path / 'ensemble.yaml'
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(BadInput, match='ensemble.yaml: not a recipe of ensemble.py --search'):
        read_entries(path, 2)


@pytest.mark.parametrize('planes', [False, True])
def test_changes_are_pixels_that_one_alone_has_right(planes):
    truth, pred, winner = np.array(
        [[[0, 1, 1, 2, 2, 2, 255]], [[0, 1, 0, 0, 0, 2, 1]], [[0, 0, 1, 2, 2, 0, 255]]]
    )
    expected = [[0, 1, 2], [0, 1, 1]]
    if planes:  # each class by itself, its background too
        truth, pred, winner = (
            np.stack([np.where(m == 255, 255, m == k) for k in range(3)]) for m in (truth, pred, winner)
        )
        expected = [[3, 1, 2], [2, 1, 1]]
    assert count_changes(truth, pred, winner, 3).tolist() == expected


def test_an_ensemble_is_tabulated_beside_its_models():
    rng = np.random.default_rng(0)
    true = rng.integers(50, 99, (20, 3))
    true[:, 2] = 0
    counts = np.stack(
        [np.stack([true - lost, true, true], 1) for lost in ([30, 20, 0], [20, 9, 0], [5, 9, 0])]
    )
    changed = np.arange(12).reshape(2, 2, 3) + 1000
    weights = [[Fraction(1, 3)] * 3, [Fraction(1, 2), Fraction(2), Fraction(1)]]
    score = EnsembleScore(Metric(), 'hard vote', ['a', 'b'], weights, counts, changed)
    assert score.best == 1
    gain = score.gain()
    assert gain == Metric().paired_interval(counts[2], counts[1]) and gain.low > 0
    header, *rows = score.lines()
    assert len(header) == 4 and header[2] == 'mIoU'
    for row, name, weight, one in zip(
        rows, ('a', 'b', 'hard vote'), ('0.333', '0.5 to 2', ''), counts, strict=True
    ):
        interval = Metric().interval(one)
        scores = [f'{interval.value:.4f}', f'{interval.low:.4f} to {interval.high:.4f}']
        assert row == [name, weight, *scores]
    header, *rows = score.class_lines(('cat', 'dog', 'nowhere'))
    assert header[:3] == ['class', 'b', 'hard vote'] and len(header) == 6
    before, after = (Metric().by_class(counts[m]) for m in (1, 2))
    for k, row in enumerate(rows):
        scores = [f'{before[k]:.4f}', f'{after[k]:.4f}', f'{after[k] - before[k]:+.4f}']
        assert row == [('cat', 'dog')[k], *scores, f'{1006 + k:,}', f'{1009 + k:,}']
    assert len(rows) == 2


# --- the commands -----------------------------------------------------------------------------------------


@pytest.fixture
def soft_runs(tmp_path):
    """Write two models of two folds with probabilities; b is overconfident, and their mean beats both."""
    rng = np.random.default_rng(0)
    names = [f'{i}.jpg' for i in range(4)]
    boxes = {name: (30 + 20 * i, 60, 100, 140, 1) for i, name in enumerate(names)}
    truth = write_rectangles(tmp_path / 'data', 256, 256, boxes)
    for model, sharp in (('a', 1.0), ('b', 4.0)):
        for fold in range(2):
            folder = tmp_path / 'output' / model / f'fold{fold}'
            for split, chosen in (('oof', names[fold::2]), ('test', ['x.jpg', 'y.jpg'])):
                rows = []
                with IdWriter(folder / f'{split}.csv') as writer:
                    for name in chosen:
                        logits = rng.normal(size=(11, SIDE, SIDE))
                        logits[2:] -= 3
                        ids = truth.get(name, truth['0.jpg'])
                        logits[ids, np.arange(SIDE)[:, None], np.arange(SIDE)] += 1.5
                        p = np.exp(logits * sharp)
                        rows.append((255 * p / p.sum(0)).round().astype(np.uint8))
                        writer.write(name, rows[-1].argmax(0).astype(np.uint8))
                np.save(folder / f'{split}_probs.npy', np.stack(rows))
    return tmp_path


def test_the_soft_search_writes_a_recipe_that_gives_the_same_vote(soft_runs, capsys):
    out, again = soft_runs / 'vote.csv', soft_runs / 'again.csv'
    csvs = [str(soft_runs / 'output' / m / f'fold{k}' / 'test.csv') for m in 'ab' for k in range(2)]
    data = ['--data', str(soft_runs / 'data')]
    (soft_runs / 'data' / 'test.json').write_text(
        json.dumps({'images': [{'file_name': name} for name in ('x.jpg', 'y.jpg')]})
    )
    assert main([*csvs, '--search', '--soft', *data, '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert 'use the soft vote with weights' in printed and ', a significant difference on' in printed
    assert len(re.findall('^use |^do not ensemble', printed, re.MULTILINE)) == 1
    assert (
        'expected calibration error' in printed
        and 'rule: soft vote' in (soft_runs / 'ensemble.yaml').read_text()
    )
    assert main([*csvs, '--recipe', str(soft_runs / 'ensemble.yaml'), *data, '--out', str(again)]) == 0
    assert out.read_bytes() == again.read_bytes()
    single = read_masks(csvs[0])
    assert any((read_masks(out)[name] != single[name]).any() for name in single)
    (soft_runs / 'output' / 'b' / 'fold1' / 'oof_probs.npy').unlink()
    with pytest.raises(BadInput, match='oof_probs.npy: no such file'):
        main([*csvs, '--search', '--soft', *data, '--out', str(out)])


def test_a_temperature_is_kept_for_pseudo_labels(soft_runs):
    folder = soft_runs / 'output' / 'b'
    assert read_temperature(folder) == 1.0
    report = calibrate_model(folder, soft_runs / 'data', HOME)
    assert 'expected calibration error' in report and report.endswith(f'wrote {folder}/calibration.yaml')
    assert read_temperature(folder) > 1.2
    fitted = {'checkpoints': {}, 'files': {}}
    path = write_calibration(folder, Calibration(2.0, (2.0,), 0.1234567, 0.2345678, False), fitted)
    assert read_temperature(folder) == 1.0
    values = {'temperature': 2.0, 'used': False, 'error_before': 0.12346, 'error_after': 0.23457}
    assert read_yaml(path) == values | {'fitted_on': fitted}
    for temperature in (0.2, 5.0):
        path.write_text(f'temperature: {temperature}\nused: true')
        assert read_temperature(folder) == temperature
    for text in (
        'temperature: [1]',
        'used: true',
        'temperature: 5.01\nused: true',
        'temperature: 0.19\nused: 1',
    ):
        (folder / 'calibration.yaml').write_text(text)
        with pytest.raises(BadInput, match='calibration.yaml: '):
            read_temperature(folder)
    with pytest.raises(BadInput, match='no such file'):
        calibrate_model(soft_runs / 'output' / 'none', soft_runs / 'data', HOME)
