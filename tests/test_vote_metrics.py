"""Votes and searches under every metric, and where classes may overlap, against loops and brute force."""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from overlaps import write_overlaps

from config import read_competition
from ensemble import main
from metrics import Metric, count_pixels
from submission import mask_format, metric_of, open_probs
from utils.errors import BadInput
from utils.ragged import allocate_ragged
from utils.run_lengths import decode_ids, encode_ids
from voting import recipe, soft, weights
from voting.hard import count_votes, member_table, vote_masks, vote_runs, weight_table
from voting.members import OofSample
from voting.recipe import calibrate_model, score_ensemble
from voting.soft import mean_bytes, soft_grid
from voting.weights import ClassWeightSearch, WeightScorer, format_search, search_weights, weight_grid

METRICS = [
    Metric('miou'),
    Metric('dice', (1, 2)),
    Metric('image_miou', (0, 1, 2), None),
    Metric('image_dice', (0, 1, 2), 1.0),
]
KINDS = ['multiclass', 'multilabel']
NUM_CLASSES, PARTS = 3, [0, 0, 1, 1, 2, 2, 2]


def draw_samples(kind: str, num_models: int = 3, seed: int = 0) -> list[OofSample]:
    """Draw photos of different sizes, with ignored pixels; the last class is rare, one photo unknown."""
    rng, samples = np.random.default_rng(seed), []
    top = 2 if kind == 'multilabel' else NUM_CLASSES
    for number, part in enumerate(PARTS):
        size = ((NUM_CLASSES,) if kind == 'multilabel' else ()) + (6 + number, 9)
        truth = rng.integers(0, top, size, np.uint8)
        if number % 3:  # in some photos, and predicted in others
            truth[truth == 2] = 0
        wrong = rng.integers(0, top, (num_models, *size), np.uint8)
        error = np.linspace(0.25, 0.5, num_models).reshape(-1, *[1] * len(size))
        preds = np.where(rng.random(wrong.shape) < error, wrong, truth).astype(np.uint8)
        truth[rng.random(size) < 0.1] = 255
        if number == 4:
            truth[:] = 255
        samples.append(OofSample(part, truth, preds))
    return samples


def score_votes(samples, table_of_part, metric, left_out=None):
    """Vote and count each photo that is kept, with the (M, K) table of its part."""
    counts = [
        count_pixels(one.truth, vote_masks(one.preds, table_of_part(one.part)), NUM_CLASSES)
        for one in samples
        if one.part != left_out
    ]
    return float(metric.score(np.stack(counts)))


def by_model(values):
    return member_table(values, NUM_CLASSES)


# --- the vote ---------------------------------------------------------------------------------------------


def test_planes_are_voted_by_weighted_majority():
    """More than half of the weight wins; at exactly half, the earliest member with a weight decides."""
    rng = np.random.default_rng(0)
    texts = [['0.1', '1', '0'], ['0.2', '1', '2'], ['0.3', '2', '2'], ['0', '0', '0']]
    exact = [[Fraction(text) for text in row] for row in texts]
    preds = rng.integers(0, 2, (4, 3, 5, 40), np.uint8)
    voted, ties = vote_masks(preds, weight_table(exact)), 0
    for k, y, x in np.ndindex(3, 5, 40):
        votes = preds[:, k, y, x].tolist()
        total = sum(row[k] for row in exact)
        given = sum(row[k] for row, one in zip(exact, votes, strict=True) if one)
        first = next(one for row, one in zip(exact, votes, strict=True) if row[k])
        ties += 2 * given == total
        assert voted[k, y, x] == (first if 2 * given == total else 2 * given > total)
    assert ties > 50


@pytest.mark.parametrize(('num_ids', 'order'), [(2, 'row'), (2, 'column'), (5, 'column')])
@pytest.mark.parametrize('members', [1, 2, 5])
def test_runs_are_voted_as_their_pixels_are(num_ids, order, members):
    rng = np.random.default_rng(members)
    for size in [(7, 11), (1, 1), (30, 3)]:
        masks = rng.integers(0, num_ids, (members, *size), np.uint8) * (rng.random((members, *size)) < 0.6)
        masks[0, 0] = 0
        table = rng.integers(0, 3, (members, num_ids)).astype(np.uint8)
        result = vote_runs([encode_ids(mask, order) for mask in masks], masks[0].size, table)
        expected = vote_masks(masks, table)
        runs, ids = encode_ids(expected, order)
        assert result.runs.tolist() == runs.tolist() and result.ids.tolist() == ids.tolist()
        np.testing.assert_array_equal(decode_ids(result.runs, result.ids, size, order), expected)
        assert result.pixels.sum() == expected.size
        for m, mask in enumerate(masks):
            assert (result.winner != result.votes[m]) @ result.pixels == np.count_nonzero(expected != mask)


# --- the search of a hard vote ----------------------------------------------------------------------------


@pytest.mark.parametrize('metric', METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize('kind', KINDS)
def test_search_finds_the_best_of_all_weights(kind, metric, monkeypatch):
    monkeypatch.setattr('voting.hard.BLOCK', 37)
    for name in ('MAX_GRID_MODELS', 'MAX_GRID_BY_IMAGE'):
        monkeypatch.setattr(weights, name, 3)
    samples = draw_samples(kind)
    counts = count_votes(samples, 3, NUM_CLASSES, metric)
    grid = weight_grid(3)
    scores = WeightScorer(counts).scores(grid)
    slow = [
        [score_votes(samples, lambda part, one=one: by_model(one), metric, part) for part in (None, 0, 1, 2)]
        for one in grid
    ]
    np.testing.assert_allclose(scores, slow, rtol=1e-12)
    different = [np.array(one) for one in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    out = score_votes(samples, lambda part: by_model(different[part]), metric)
    assert WeightScorer(counts).out_of_sample(different) == pytest.approx(out, rel=1e-12)
    result = search_weights(counts)
    assert result.best == pytest.approx(max(row[0] for row in slow))
    chosen = [grid[int(np.argmax(scores[:, 1 + part]))] for part in range(3)]
    assert result.part_weights == tuple(tuple(one.tolist()) for one in chosen)
    out = score_votes(samples, lambda part: by_model(chosen[part]), metric)
    assert result.best_out_of_sample == pytest.approx(out, rel=1e-12)
    text = format_search(result, ['a', 'b', 'c'])
    assert text.startswith(f'{metric.label} on the photos') and f'\n{metric.label} out of sample' in text
    assert ('IoU' in text) == ('IoU' in metric.label)
    values = [
        *result.singles,
        result.equal,
        result.best,
        result.best_out_of_sample,
        result.single_out_of_sample,
    ]
    assert re.findall(r'\d\.\d{4}', text) == [f'{value:.4f}' for value in values]
    # the candidates of a draw: the simple ones, then the first of each score
    first = sorted({tuple(row): n for n, row in reversed([*enumerate(scores.tolist())])}.values())
    simple = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    assert result.candidates.tolist() == [*simple, *grid[first].tolist()]
    for most in (2, 3):
        monkeypatch.setattr(weights, 'MAX_CANDIDATES', most)
        best = sorted(sorted(first, key=lambda n: -scores[n, 0])[:most])
        assert weights.choose_weights(WeightScorer(counts))[1].tolist() == [*simple, *grid[best].tolist()]


@pytest.mark.parametrize('metric', METRICS, ids=lambda metric: metric.name)
def test_weights_of_each_plane_are_the_best_of_all(metric):
    samples = draw_samples('multilabel')
    for one in samples:
        one.truth[1][one.truth[1] == 1] = 0  # a class in no photo
    result = search_weights(count_votes(samples, 3, NUM_CLASSES, metric), by_class=True)
    grid = weight_grid(3)
    for part, table in ((None, result.by_class.table), *enumerate(result.by_class.part_tables)):
        kept = [one for one in samples if one.part != part]

        def class_scores(table, kept=kept):
            voted = [count_pixels(s.truth, vote_masks(s.preds, table), NUM_CLASSES) for s in kept]
            return metric.by_class(np.stack(voted))

        scores = np.array([class_scores(by_model(one)) for one in grid])
        np.testing.assert_allclose(class_scores(table)[[0, 2]], scores.max(0)[[0, 2]])
        base = result.best_weights if part is None else result.part_weights[part]
        assert table[:, 1].tolist() == list(base)
    out = score_votes(samples, lambda part: result.by_class.part_tables[part], metric)
    assert result.by_class.out_of_sample == pytest.approx(out, rel=1e-12)


@pytest.mark.parametrize('metric', METRICS, ids=lambda metric: metric.name)
def test_weights_by_class_of_ids_are_scored_as_the_vote_is(metric):
    samples = draw_samples('multiclass')
    search = ClassWeightSearch(count_votes(samples, 3, NUM_CLASSES, metric))
    start = np.array([2, 1, 1])
    for left_out in (None, 1):
        reached, table = search.ascend(start, left_out)
        assert reached == pytest.approx(score_votes(samples, lambda _, t=table: t, metric, left_out))
        for model, category, halves in product(range(3), range(NUM_CLASSES), range(5)):
            other = table.copy()
            other[model, category] = start[model] * halves
            assert score_votes(samples, lambda _, t=other: t, metric, left_out) <= reached + 1e-12
    tables = [np.eye(3, dtype=np.int64) + part for part in range(3)]
    out = score_votes(samples, lambda part: tables[part], metric)
    assert search.out_of_sample(tables) == pytest.approx(out, rel=1e-12)


def test_weights_of_many_models_under_a_mean_over_photos(monkeypatch):
    monkeypatch.setattr(weights, 'MAX_GRID_BY_IMAGE', 2)
    metric, samples = Metric('image_dice'), draw_samples('multilabel', num_models=4)
    result = search_weights(count_votes(samples, 4, NUM_CLASSES, metric), by_class=True)
    best = score_votes(samples, lambda _: by_model(result.best_weights), metric)
    assert result.best == pytest.approx(best) and result.best >= max(result.equal, *result.singles)
    tables = result.by_class.part_tables
    out = score_votes(samples, lambda part: tables[part], metric)
    assert result.by_class.out_of_sample == pytest.approx(out)
    singles = np.eye(4, dtype=int)
    simple = [*singles, np.ones(4, int), *(1 - singles)]
    for part, table in ((None, result.by_class.table), *enumerate(tables)):
        kept = [one for one in samples if one.part != part]
        own = result.best_weights if part is None else result.part_weights[part]
        tried = [table, *map(by_model, [*simple, own])]
        voted = [[count_pixels(s.truth, vote_masks(s.preds, t), NUM_CLASSES) for s in kept] for t in tried]
        scores = np.array([metric.by_class(np.stack(one)) for one in voted])
        np.testing.assert_allclose(scores[0], scores[1:].max(0))


def test_the_simplest_of_equal_votes_is_used():
    samples = [replace(one, preds=one.preds[[0, 0, 0]]) for one in draw_samples('multiclass')]
    result = search_weights(count_votes(samples, 3, NUM_CLASSES), by_class=True)
    assert result.weights == (1, 0, 0) and not result.uses_classes
    assert result.out_of_sample == result.by_class.out_of_sample == result.equal
    np.testing.assert_array_equal(result.table, by_model((1, 0, 0)))


# --- the search of a soft vote ----------------------------------------------------------------------------


def draw_probs(kind: str) -> list[OofSample]:
    """Draw samples with probabilities of two models, of which the second is too low by a third."""
    rng, samples = np.random.default_rng(0), []
    for one in draw_samples(kind, num_models=2, seed=1):
        size = (2, NUM_CLASSES, *one.truth.shape[-2:])
        classes = np.arange(NUM_CLASSES)[:, None, None]
        planes = one.truth if kind == 'multilabel' else one.truth == classes
        probs = np.clip(rng.normal(0.35, 0.2, size) + 0.25 * (planes == 1), 0, 1)
        probs[1] *= 2 / 3
        probs[:, :, :2] = 0.25  # where models agree
        stored = (probs * 255).round().astype(np.uint8)
        preds = (stored > 127 if kind == 'multilabel' else stored.argmax(1)).astype(np.uint8)
        samples.append(OofSample(one.part, one.truth, preds, [*stored]))
    return samples


def slow_planes(sample, values, limits):
    """Compare the mean of bytes, rounded half up, with the least byte of each class."""
    total = sum(w * p.astype(np.int64) for w, p in zip(values, sample.probs, strict=True))
    mean = (2 * total + sum(values)) // (2 * sum(values))
    return (mean >= np.array(limits)[:, None, None]).astype(np.uint8)


def out_of_sample_vote(result, sample):
    """Vote with what was chosen without the part of the sample."""
    limits = result.part_thresholds[sample.part] if result.part_thresholds else None
    weights, temperatures = (v[sample.part] for v in (result.part_weights, result.part_temperatures))
    return soft.soft_vote(sample.probs, by_model(weights), temperatures, limits)


@pytest.mark.parametrize('metric', METRICS[1:3], ids=lambda metric: metric.name)
def test_weights_and_thresholds_of_a_soft_vote_are_the_best_of_all(metric, monkeypatch):
    monkeypatch.setattr(soft, 'FEW_WEIGHTS', 3)
    samples = draw_probs('multilabel')
    result = soft.search_soft_planes(samples, 2, NUM_CLASSES, metric)
    grid = soft_grid(2).tolist()

    def class_scores(values, limits, kept):
        voted = [count_pixels(s.truth, slow_planes(s, values, limits), NUM_CLASSES) for s in kept]
        return metric.by_class(np.stack(voted))

    def best_of_all(kept):
        found = []
        for values in grid:
            scores = np.array([class_scores(values, [byte] * NUM_CLASSES, kept) for byte in range(1, 256)])
            found.append(float(metric.mean(np.nanmax(scores, 0))))
        return found

    everything = best_of_all(samples)
    assert result.best == pytest.approx(max(everything))
    assert grid.index([*result.weights]) == int(np.argmax(everything))
    few = sorted(np.argsort(-np.array(everything), kind='stable')[:3])  # a draw chooses among these
    for row, values in enumerate(grid[number] for number in few):
        voted = [slow_planes(one, values, [128] * NUM_CLASSES) for one in samples]
        slow = [count_pixels(s.truth, v, NUM_CLASSES) for s, v in zip(samples, voted, strict=True)]
        np.testing.assert_array_equal(result.counts[:, result.groups[row][0]], slow)
    assert len(result.groups) == 3
    kept = [one for one in samples if one.part != 1]
    without = best_of_all(kept)
    assert grid.index([*result.part_weights[1]]) == int(np.argmax(without))
    own = [soft.byte_of(value) for value in result.part_thresholds[1]]
    assert float(metric.mean(class_scores(result.part_weights[1], own, kept))) == pytest.approx(max(without))
    voted = [count_pixels(one.truth, out_of_sample_vote(result, one), NUM_CLASSES) for one in samples]
    assert result.out_of_sample == pytest.approx(float(metric.score(np.stack(voted))), rel=1e-12)


@pytest.mark.parametrize('metric', METRICS, ids=lambda metric: metric.name)
def test_soft_vote_of_ids_under_each_metric(metric):
    samples = draw_probs('multiclass')
    none = [weights_of_nothing()] * 2
    result = soft.search_soft(samples, 2, NUM_CLASSES, metric, none)
    scores = []
    for values in soft_grid(2):
        voted = [soft.soft_vote(one.probs, by_model(values)) for one in samples]
        counts = [count_pixels(s.truth, v, NUM_CLASSES) for s, v in zip(samples, voted, strict=True)]
        scores.append(float(metric.score(np.stack(counts))))
    assert result.best == pytest.approx(max(scores))
    assert soft_grid(2).tolist().index([*result.weights]) == int(np.argmax(scores))
    own = [count_pixels(one.truth, out_of_sample_vote(result, one), NUM_CLASSES) for one in samples]
    assert result.out_of_sample == pytest.approx(float(metric.score(np.stack(own))))


def weights_of_nothing():
    return soft.Calibration(1.0, (1.0,) * 3, 0, 0, False)


def test_the_weights_of_a_mean():
    assert soft_grid(1).tolist() == [[1]] and len(soft_grid(2)) == 7
    assert [soft_grid(models).max() for models in range(2, 11)] == [3, 3, 2, 1, 1, 1, 1, 1, 1]
    without = [[int(model != other) for model in range(9)] for other in range(9)]
    assert soft_grid(9).tolist() == [[1] * 9, *without] and soft_grid(9).dtype == np.int64
    assert len(soft_grid(8)) == 2**8 - 9


def test_a_class_in_no_photo_keeps_its_threshold():
    samples = draw_probs('multilabel')
    for one in samples:
        one.truth[1][(one.truth[1] == 1) & (one.part != 2)] = 0
    result = soft.search_soft_planes(samples, 2, NUM_CLASSES, Metric('image_dice'))
    assert result.part_thresholds[2][1] == 0.5 and result.thresholds[1] != 0.5


def test_means_are_rounded_half_up_and_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    probs = rng.integers(0, 256, (3, 2, 16, 16), np.uint8)
    table = np.array([[1, 3], [1, 0], [0, 2]])
    for k in range(2):
        total = sum(int(w) * p[k].astype(np.int64) for w, p in zip(table[:, k], probs, strict=True))
        expected = (2 * total + table[:, k].sum()) // (2 * table[:, k].sum())
        np.testing.assert_array_equal(mean_bytes(probs, table)[k], expected)
    assert not mean_bytes(probs, table * (1, 0))[1].any()
    whole = [soft.soft_vote([*probs], table, None, limits) for limits in (None, [0.4, 0.6])]
    monkeypatch.setattr(soft, 'BLOCK', 100)
    for before, limits in zip(whole, (None, [0.4, 0.6]), strict=True):
        np.testing.assert_array_equal(soft.soft_vote([*probs], table, None, limits), before)


@pytest.mark.parametrize('kind', KINDS)
def test_a_gain_chooses_again_among_what_the_search_tried(kind, monkeypatch):
    """Its counts are those of each vote on each photo; a table made with a photo's part is not for it."""
    monkeypatch.setattr(recipe, 'search_gain', lambda *given: given)
    samples, metric, bytes_ = draw_probs(kind), Metric('miou'), soft.FEW_BYTES
    samples = [replace(one, scene=number // 2) for number, one in enumerate(samples)]
    hard = search_weights(count_votes(samples, 2, NUM_CLASSES, metric), by_class=True)
    tables, made_for = [*map(by_model, hard.candidates)], [None] * len(hard.candidates)
    number, grid = len(tables), [by_model(row) for row in soft_grid(2)]
    if kind == 'multiclass':
        none = soft.Calibration(1.5, (1.5, 1.2, 2.0), 0, 0, True)
        mean = soft.search_soft(samples, 2, NUM_CLASSES, metric, [none, weights_of_nothing()])
        pairs = zip(hard.by_class.part_tables, hard.by_class.further_tables, strict=True)
        for part, (table, further) in enumerate(pairs):
            for other, one in zip([p for p in range(3) if p != part], further, strict=True):
                kept = [sample for sample in samples if sample.part not in (part, other)]
                best = score_votes(kept, lambda _, t=one: t, metric)
                assert best >= score_votes(kept, lambda _, t=table: t, metric)
                for model, category, halves in product(range(2), range(NUM_CLASSES), range(5)):
                    changed = one.copy()
                    changed[model, category] = hard.part_weights[part][model] * halves
                    assert score_votes(kept, lambda _, t=changed: t, metric) <= best
            tables += [table, *further]
            made_for += [part] * 3
        last = len(tables)
        families = [[0, 1], [2], range(number), range(number, last)]
        families += [range(last, last + len(grid)), range(last + len(grid), last + 2 * len(grid))]
        groups = []
    else:
        mean = soft.search_soft_planes(samples, 2, NUM_CLASSES, metric)
        first = [row.tolist() for row in hard.candidates].index([*hard.best_weights])
        families = [[0, 1], [2], range(number)]
        assert len(mean.groups) == len(grid)
        size, last = len(bytes_), number + len(grid) * len(bytes_)
        groups = [[[first, *range(number)]], [range(at, at + size) for at in range(number, last, size)]]
    (counts, part, given, search, scene), photos = recipe.measure_gain(samples, hard, mean)
    assert photos == 7 and part.tolist() == PARTS and scene.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert given == metric and [*search.baseline] == [0, 1]
    assert [[*family] for family in search.families] == [[*family] for family in families]
    assert [[[*group] for group in groups] for groups in search.by_class] == [
        [[*group] for group in one] for one in groups
    ]
    for one, photo in zip(samples, counts, strict=True):
        voted = [vote_masks(one.preds, table) for table in tables]
        if kind == 'multiclass':
            for heat in ([1.0, 1.0], [none.used_for(one.part), 1.0]):
                voted += [soft.soft_vote(one.probs, table, heat) for table in grid]
        else:
            limits = [[soft.threshold_of(byte)] * NUM_CLASSES for byte in bytes_]
            voted += [soft.soft_vote(one.probs, t, None, row) for t in grid for row in limits]
        slow = [count_pixels(one.truth, mask, NUM_CLASSES) for mask in voted]
        np.testing.assert_array_equal(photo, slow)
    if kind == 'multiclass':
        made_for += [None] * (counts.shape[1] - len(made_for))
        assert search.allowed.tolist() == [[m in (None, p) for m in made_for] for p in range(3)]
    else:
        assert search.allowed is None
    assert recipe.measure_gain(samples, hard, None)[0][0].shape[1] == len(tables)


# --- the commands -----------------------------------------------------------------------------------------


SIZES = [(40, 56), (56, 40), (48, 48), (41, 33), (40, 56), (33, 60), (64, 40)]  # the last two are the test


@pytest.fixture(params=['image_dice', 'miou'])
def runs(request, tmp_path):
    """Write two models of two folds on overlapping rectangles, of the photos' own sizes, in run lengths."""
    data, rng = tmp_path / 'data', np.random.default_rng(0)
    planes = write_overlaps(data, SIZES, test=2, metric=request.param, submission={'image_names': 'stem'})
    competition = read_competition(data)
    form = mask_format(competition, {name: truth.shape[1:] for name, truth in planes.items()})
    names = [*planes]
    for model, low in (('a', 1.0), ('b', 0.6)):
        for fold in range(2):
            folder = tmp_path / 'output' / model / f'fold{fold}'
            for split, chosen in (('oof', names[fold:5:2]), ('test', names[5:])):
                probs = []
                for name in chosen:
                    noise = rng.normal(0.35, 0.17, planes[name].shape)
                    probs.append(np.clip(low * (noise + 0.3 * planes[name]), 0, 1))
                stored = [(255 * one).round().astype(np.uint8) for one in probs]
                folder.mkdir(parents=True, exist_ok=True)
                file = allocate_ragged(folder / f'{split}_probs.npy', np.uint8, [s.shape for s in stored])
                with form.writer(folder / f'{split}.csv') as writer:
                    for row, name in enumerate(chosen):
                        file[row] = stored[row]
                        writer.write(name, (stored[row] >= 128).astype(np.uint8))
                file.flush()
    return tmp_path, competition, form, planes


def vote(runs, *words: str, out: str = 'vote.csv', models: str = 'ab'):
    """Run ensemble.py on the test CSVs; return the path of the vote and its masks."""
    folder, _, form, _ = runs
    csvs = [folder / 'output' / m / f'fold{k}' / 'test.csv' for m in models for k in range(2)]
    argv = [*map(str, csvs), *words, '--data', str(folder / 'data'), '--out', str(folder / out)]
    assert main(argv) == 0
    with form_of_test(form).reader(folder / out) as reader:
        return folder / out, {name: reader.read(name) for name in reader.image_ids}


def form_of_test(form):
    return mask_format(form.competition, dict([*form.sizes.items()][5:]))


def read_all(runs, model: str, split: str) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read the mask and the probabilities of each photo, by fold."""
    folder, _, form, _ = runs
    folds = []
    for k in range(2):
        with form.reader(folder / 'output' / model / f'fold{k}' / f'{split}.csv') as reader:
            probs = open_probs(reader, form)
            folds.append({n: (reader.read(n), probs[row]) for row, n in enumerate(reader.image_ids)})
    return folds


def test_csvs_of_run_lengths_are_voted_in_each_plane(runs, capsys):
    weights = ['2', '1', '1', '2']
    _, masks = vote(runs, '--weights', *weights)
    printed = capsys.readouterr().out
    members = [fold for model in 'ab' for fold in read_all(runs, model, 'test')]
    outvoted = pixels = 0
    for name, mask in masks.items():
        preds = np.stack([member[name][0] for member in members])
        total = np.tensordot([2, 1, 1, 2], preds.astype(int), 1)
        expected = np.where(total == 3, preds[0], total > 3)
        np.testing.assert_array_equal(mask, expected)
        outvoted += np.count_nonzero(preds[2] != mask)
        pixels += mask.size
    assert list(masks) == [*form_of_test(runs[2]).sizes]
    assert f'  3       1  {outvoted / pixels:>8.2%}' in printed
    form_of_test(runs[2]).check(runs[0] / 'vote.csv')


def test_weights_by_class_are_for_the_planes_of_their_class(runs):
    path = runs[0] / 'weights.yaml'
    argv = ['--class-weights', str(path), '--weights', '2', '1', '1', '2']
    with pytest.raises(BadInput, match='expected 3 weights'):
        path.write_text('a: [1, 0]\n')
        vote(runs, *argv)
    path.write_text('a: [1, 0, 0.5]\nb: [0, 1, 2]\n')
    _, masks = vote(runs, *argv)
    a, _, _, b = (fold for model in 'ab' for fold in read_all(runs, model, 'test'))
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask[0], a[name][0][0])
        np.testing.assert_array_equal(mask[1], b[name][0][1])


def test_soft_votes_use_the_mean_of_the_members_thresholds(runs):
    folder = runs[0]
    text = 'used: true\nthresholds: [0.3, 0.3, 0.7]\nby_fold: {}\n'
    (folder / 'output' / 'b' / 'thresholds.yaml').write_text(text)
    _, masks = vote(runs, '--soft', '--weights', '1', '1', '3', '3')
    limits = np.array([0.35, 0.35, 0.65])[:, None, None]  # of a: 0.5
    members = [fold for model in 'ab' for fold in read_all(runs, model, 'test')]
    for name, mask in masks.items():
        stored = [member[name][1].astype(int) for member in members]
        mean = np.floor(np.tensordot([1, 1, 3, 3], stored, 1) / 8 + 0.5)
        np.testing.assert_array_equal(mask, mean >= np.round(limits * 255 + 0.5))


def test_search_of_overlapping_classes_from_the_command_line(runs, capsys):
    folder, competition, _, planes = runs
    out, _ = vote(runs, '--search', '--soft', '--by-class')
    printed = capsys.readouterr().out
    label = {'image_dice': 'image Dice', 'miou': 'mIoU'}[competition.metric]
    assert printed.startswith(f'{label} on the photos out of fold:') and 'weights by class' in printed
    assert f'{label} out of sample [' in printed and 'chooses again, not the difference' in printed
    assert 'use the soft vote with weights' in printed and 'expected calibration error' not in printed
    recipe = folder / 'ensemble.yaml'
    assert 'thresholds:' in recipe.read_text()
    again, _ = vote(runs, '--recipe', str(recipe), out='again.csv')
    assert again.read_bytes() == out.read_bytes()
    # the score of model a, from its masks and the rectangles
    counts = [
        count_pixels(planes[n], one[0], 3) for fold in read_all(runs, 'a', 'oof') for n, one in fold.items()
    ]
    metric = metric_of(competition)
    assert f'output/a  {float(metric.score(np.stack(counts))):.4f}' in printed
    score = score_ensemble(recipe, folder / 'data', competition)
    assert score.lines()[0][2] == label and score.counts.shape == (3, 5, 3, 3)
    assert score.gain().value > 0 and score.lines()[-1][0] == 'soft vote'
    assert [row[0] for row in score.class_lines(competition.classes)] == ['class', 'red', 'green', 'blue']
    best = score.counts[-1]
    mended, broken = score.changed[score.best]
    assert (mended - broken).sum() == 2 * (best[:, 0] - score.counts[score.best][:, 0]).sum() - (
        best[:, 1] - score.counts[score.best][:, 1]
    ).sum()
    text = recipe.read_text()
    for wrong in (
        text.replace('thresholds:\n', 'thresholds:\n- 2.0\n'),
        text.replace('thresholds:', 'thresholds: 3\nold:'),
    ):
        recipe.write_text(wrong)
        with pytest.raises(BadInput, match='not a recipe'):
            vote(runs, '--recipe', str(recipe))


def test_a_hard_search_is_a_hard_recipe(runs):
    out, _ = vote(runs, '--search')
    assert 'rule: hard vote' in (runs[0] / 'ensemble.yaml').read_text()
    folder, competition, _, planes = runs
    score = score_ensemble(folder / 'ensemble.yaml', folder / 'data', competition)
    assert score.rule == 'hard vote' and score.names == ['a', 'b']
    preds = [
        {n: one[0] for fold in read_all(runs, model, 'oof') for n, one in fold.items()} for model in 'ab'
    ]
    weights = weight_table(score.weights)
    counts, changed = [], np.zeros((2, 2, 3), int)
    for name in preds[0]:
        masks = [one[name] for one in preds]
        masks.append(vote_masks(np.stack(masks), weights))
        counts.append([count_pixels(planes[name], mask, 3) for mask in masks])
        changed += [recipe.count_changes(planes[name], mask, masks[-1], 3) for mask in masks[:-1]]
    np.testing.assert_array_equal(np.sort(score.counts, 1), np.sort(np.stack(counts, 1), 1))
    np.testing.assert_array_equal(score.changed, changed)
    again, _ = vote(runs, '--recipe', str(runs[0] / 'ensemble.yaml'), out='again.csv')
    assert again.read_bytes() == out.read_bytes()


def test_temperatures_are_not_for_overlapping_classes(runs):
    folder, competition, _, _ = runs
    with pytest.raises(BadInput, match='have no temperature; choose thresholds instead: evaluate.py'):
        calibrate_model(folder / 'output' / 'a', folder / 'data', competition)
