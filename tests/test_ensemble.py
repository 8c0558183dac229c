"""Test the vote against a slow one, ties and weights by hand, the files; the search against brute force."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import mean_iou, write_rectangles
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
from config import HOME
from data.coco import draw_mask, read_coco
from ensemble import main, parse_weight
from metrics import IGNORED, Metric, confusion_matrix
from submission import downsample_mask
from utils.errors import BadInput
from utils.id_csv import IdWriter, read_masks
from utils.id_text import SIDE
from voting import hard, recipe
from voting.hard import count_votes, vote, weight_table
from voting.members import OofSample, find_members, read_samples
from voting.weights import WeightScorer, format_verdict, search_weights, weight_grid

IDS = ['b.jpg', 'a.jpg', 'c,d.jpg']


def write_csv(path: Path, masks: dict[str, np.ndarray]) -> Path:
    with IdWriter(path) as writer:
        for image_id, mask in masks.items():
            writer.write(image_id, mask)
    return path


def random_masks(seed: int, image_ids: list[str] = IDS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {image_id: rng.integers(0, 11, (SIDE, SIDE), np.uint8) for image_id in image_ids}


def table_of(weights: list[str], num_classes: int = 11) -> np.ndarray:
    return weight_table([[parse_weight(w)] * num_classes for w in weights])


# --- the vote ---------------------------------------------------------------------------------------------


def slow_vote(votes: list[int], weights: list[list[Fraction]]) -> int:
    """Vote by the rule as written: the highest sum; in a tie the class of the earliest vote with a weight."""
    sums: dict[int, Fraction] = {}
    for v, weight in zip(votes, weights, strict=True):
        if weight[v] > 0:
            sums[v] = sums.get(v, Fraction(0)) + weight[v]
    if not sums:
        return votes[0]
    tied = {c for c, total in sums.items() if total == max(sums.values())}
    return next(v for v, weight in zip(votes, weights, strict=True) if v in tied and weight[v] > 0)


WEIGHTS = st.sampled_from(
    ['0', '1', '2', '3', '0.1', '0.2', '0.3', '0.5', '1.5', '100', '0.000001', '12345.6789']
)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(2, 5), st.booleans())
def test_the_vote_is_the_slow_one(data, members, num_classes, by_class):
    rows = []
    for _ in range(members):
        count = num_classes if by_class else 1
        row = data.draw(st.lists(WEIGHTS, min_size=count, max_size=count))
        rows.append([Fraction(w) for w in (row if by_class else row * num_classes)])
    if not any(any(row) for row in rows):
        rows[0][0] = Fraction(1)
    preds = np.random.default_rng(members).integers(0, num_classes, (members, 300), np.uint8)
    table = weight_table(rows)
    expected = [slow_vote(preds[:, i].tolist(), rows) for i in range(300)]
    assert vote(preds, table).tolist() == expected
    assert vote(preds.reshape(members, 20, 15), table).ravel().tolist() == expected


@pytest.mark.parametrize(('votes', 'weights', 'winner'), [
    ([3, 5], ['1', '1'], 3),  # a tie: the first
    ([3, 5, 5, 3], ['1', '1', '1', '1'], 3),
    ([7, 5, 3, 3, 5], ['1', '1', '1', '1', '1'], 5),  # the first is not among the tied
    ([3, 5, 5], ['2', '1', '1'], 3),
    ([3, 5, 5], ['0.3', '0.1', '0.2'], 3),  # 0.1 + 0.2 is 0.3, not more
    ([5, 5, 3], ['0.1', '0.2', '0.3'], 5),
    ([3, 5, 5], ['0.3', '0.1', '0.200000001'], 5),
    ([5, 3, 5], ['0', '1', '1'], 3),  # what weighs nothing decides no tie
    ([5, 3, 5], ['0', '1', '0'], 3),
    ([3, 5, 5, 5], ['300', '100', '100', '100'], 3),  # sums beyond a byte
    ([3] + [5] * 299, ['299'] + ['1'] * 299, 3),
])  # fmt: skip
def test_ties_and_weights(votes, weights, winner):
    assert vote(np.array(votes, np.uint8)[:, None], table_of(weights)).tolist() == [winner]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 4), st.integers(2, 3), st.booleans(), st.booleans())
def test_who_decides_is_who_wins_every_vote(data, members, num_classes, by_class, overlap):
    count = num_classes if by_class else 1
    rows = [data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)) for _ in range(members)]
    table = np.array([row if by_class else row * num_classes for row in rows], np.uint8)
    if overlap:  # a vote a class, over 0 and 1
        every = np.array([*product((0, 1), repeat=members)], np.uint8).T  # (M, votes)
        preds = np.repeat(every[:, None], num_classes, 1)[..., None, :]
    else:
        preds = np.array([*product(range(num_classes), repeat=members)], np.uint8).T[:, None]
    winner = hard.vote_masks(preds, table)
    winning = [m for m in range(members) if np.array_equal(winner, preds[m])]
    assert hard.deciding_member(table, overlap) == (winning[0] if winning else None)


def test_weights_in_the_smallest_whole_numbers():
    assert table_of(['0.5', '1.5', '0'], 2).tolist() == [[1, 1], [3, 3], [0, 0]]
    assert table_of(['200', '200'], 2).dtype == np.uint8
    assert table_of(['200', '1', '55'], 2).dtype == np.uint16
    with pytest.raises(BadInput, match='all of them are 0'):
        table_of(['0', '0'])
    high, low = parse_weight('999999999.999999999'), parse_weight('0.000000001')
    with pytest.raises(BadInput, match='too many digits'):
        weight_table([[high * high], [low * low]])
    most = [[Fraction(2**63 - 2), Fraction(1)], [Fraction(1), Fraction(0)]]
    assert weight_table(most).tolist() == most
    with pytest.raises(BadInput, match='too many digits'):
        weight_table([*most, [Fraction(0), Fraction(1)]])


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def csvs(tmp_path) -> list[str]:
    """Write three members with their rows in different orders."""
    orders = [IDS, IDS[::-1], [IDS[1], IDS[2], IDS[0]]]
    members = [
        {image_id: random_masks(seed)[image_id] for image_id in order} for seed, order in enumerate(orders)
    ]
    return [str(write_csv(tmp_path / f'{seed}.csv', masks)) for seed, masks in enumerate(members)]


def expected_vote(seeds: list[int], weights: list[str]) -> dict[str, np.ndarray]:
    masks = [random_masks(seed) for seed in seeds]
    return {i: vote(np.stack([m[i] for m in masks]), table_of(weights)) for i in IDS}


def assert_same(path: Path, masks: dict[str, np.ndarray]) -> None:
    written = read_masks(path)
    assert list(written) == list(masks)
    for image_id, mask in masks.items():
        np.testing.assert_array_equal(written[image_id], mask)


def test_votes_meet_by_image(csvs, tmp_path, capsys):
    out = tmp_path / 'new' / 'vote.csv'
    assert main([*csvs, '--out', str(out)]) == 0
    expected = expected_vote([0, 1, 2], ['1', '1', '1'])
    assert_same(out, expected)
    printed = capsys.readouterr().out
    preds = np.stack([np.stack(list(random_masks(seed).values())) for seed in range(3)])
    agree = (preds == preds[0]).all(0).mean()
    assert f'all agree on {agree:.2%} of the pixels' in printed
    outvoted = (preds[1] != np.stack(list(expected.values()))).mean()
    assert f'  2       1  {outvoted:>8.2%}  {csvs[1]}' in printed
    pairs = {(preds[i] != preds[j]).mean(): f'{i + 1} and {j + 1}' for i, j in ((0, 1), (0, 2), (1, 2))}
    assert f'most alike: {pairs[min(pairs)]}, which differ on {min(pairs):.2%}' in printed
    assert f'least alike: {pairs[max(pairs)]}, which differ on {max(pairs):.2%}' in printed
    assert printed.splitlines()[-1] == f'next: python submission.py check {out} --data input/data'


def test_weights_and_the_order_of_the_test_set(csvs, tmp_path):
    out = tmp_path / 'vote.csv'
    images = [{'file_name': name} for name in sorted(IDS)]
    (tmp_path / 'test.json').write_text(json.dumps({'images': images}))
    assert main([*csvs, '--out', str(out), '--weights', '1', '2.5', '2', '--data', str(tmp_path)]) == 0
    expected = expected_vote([0, 1, 2], ['1', '2.5', '2'])
    assert_same(out, {image_id: expected[image_id] for image_id in sorted(IDS)})
    assert main([csvs[1], '--out', str(out)]) == 0  # one member: itself
    assert out.read_bytes() == Path(csvs[1]).read_bytes()


@pytest.mark.parametrize(
    ('count', 'weights', 'decider', 'advice'),
    [
        (2, [], 0, 'give a third CSV or other weights or infer.py --fold all'),
        (2, ['1', '2'], 1, 'give a third CSV or other weights or '),
        (3, ['2', '1', '1'], 0, 'give other weights or '),
        (3, ['1', '3', '1'], 1, 'give other weights or '),
        (3, ['0', '1', '1'], 1, 'give other weights or infer.py --fold all, the mean of the folds of '),
        (3, ['0', '0', '1'], 2, 'no other CSV has a weight'),
    ],
)
def test_a_vote_that_one_csv_decides_is_warned_of(count, weights, decider, advice, csvs, tmp_path, capsys):
    out, alone = tmp_path / 'vote.csv', tmp_path / 'alone.csv'
    options = ['--weights', *weights] * bool(weights)
    assert main([*csvs[:count], *options, '--out', str(out)]) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert warning.startswith(f'warning: {csvs[decider]}: decides every pixel') and advice in warning
    assert main([csvs[decider], '--out', str(alone)]) == 0
    assert read_masks(out).keys() == read_masks(alone).keys()
    for name, mask in read_masks(out).items():
        np.testing.assert_array_equal(mask, read_masks(alone)[name])


def test_a_class_that_one_csv_decides_is_no_vote_that_it_decides(csvs, tmp_path, capsys):
    """The second has the only weight for battery, and is outvoted elsewhere."""
    weights, out = tmp_path / 'weights.yaml', tmp_path / 'vote.csv'
    rows = {path: [1] * 9 + [int(path == csvs[1]), 1] for path in csvs}
    weights.write_text(json.dumps(rows))
    command = [*csvs, '--out', str(out), '--class-weights', str(weights)]
    assert main(command) == 0 and 'decides' not in capsys.readouterr().out
    weights.write_text(json.dumps({csvs[1]: [5] * 11}))
    assert main(command) == 0 and '1.csv: decides every pixel' in capsys.readouterr().out


def test_members_of_other_tools(csvs, tmp_path):
    """A vote counts them the same, and is written as test.json spells the names, in the first one's order."""
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'test.json').write_text(json.dumps({'images': [{'file_name': name} for name in sorted(IDS)]}))
    (tmp_path / 'cfg.yaml').write_text(f'data_root: {data}\n')
    expected = expected_vote([0, 1, 2], ['1', '1', '1'])
    first, second = Path(csvs[0]), Path(csvs[1])
    first.write_bytes(
        b'\xef\xbb\xbf' + first.read_bytes().replace(b'b.jpg', b'.\\b.jpg').replace(b'\n', b'\r\n')
    )
    second.write_bytes(second.read_bytes().replace(b'\na.jpg', b'\n./a.jpg')[:-1])
    out = tmp_path / 'vote.csv'
    assert main([*csvs, '--out', str(out), '--cfg', str(tmp_path / 'cfg.yaml')]) == 0
    assert_same(out, expected)
    assert main([*csvs, '--out', str(out), '--data', str(data)]) == 0
    assert_same(out, {image_id: expected[image_id] for image_id in sorted(IDS)})
    (data / 'test.json').unlink()
    assert main([*csvs[1:], csvs[0], '--out', str(out), '--cfg', str(tmp_path / 'cfg.yaml')]) == 0
    assert list(read_masks(out)) == [{'a.jpg': './a.jpg'}.get(name, name) for name in IDS[::-1]]


def test_class_weights(tmp_path):
    names = [
        str(write_csv(tmp_path / m / 'fold0' / 'test.csv', random_masks(i))) for i, m in enumerate('xyz')
    ]
    rows = {'y': [2, *[1] * 10], names[2]: [0.5] * 10 + [0]}
    weights, out = tmp_path / 'weights.yaml', tmp_path / 'vote.csv'
    weights.write_text(json.dumps(rows))
    assert main([*names, '--out', str(out), '--class-weights', str(weights), '--weights', '2', '2', '1']) == 0
    exact = [[Fraction(2)] * 11, [Fraction(4), *[Fraction(2)] * 10], [Fraction(1, 2)] * 10 + [Fraction(0)]]
    preds = np.stack([random_masks(i)[IDS[0]] for i in range(3)])[:, :4]
    expected = [slow_vote(v, exact) for v in preds.reshape(3, -1).T.tolist()]
    assert read_masks(out)[IDS[0]][:4].ravel().tolist() == expected

    for content, message in [
        ('w: [1]', "'w' is no member"), ('fold0: [1]', 'no member'), (f'yy: {[1] * 11}', "did you mean 'y'"),
        ('y: [1, 2]', 'expected 11 weights'), ('y: 3', 'expected 11 weights'), ('y: [', 'not YAML'),
        ('', 'expected lines'), ('[1]', 'expected lines'), (f'y: {[-1] * 11}', "y: '-1' is not a weight"),
        (f'y: {[True] * 11}'.lower(), 'not a weight'), (f'y: {[1e-5] * 11}', 'not a weight'),
    ]:  # fmt: skip
        weights.write_text(content)
        with pytest.raises(BadInput, match=message):
            main([*names, '--out', str(out), '--class-weights', str(weights)])


def test_faults_leave_the_output_as_it_was(csvs, tmp_path):
    out = tmp_path / 'vote.csv'
    out.write_text('as it was')
    second = Path(csvs[1])
    good, lines = second.read_bytes(), second.read_bytes().splitlines(keepends=True)
    for content, message in [
        (good[:-2] + b'11\n', r"line 4: image 'b\.jpg': id 65536 is '\d?11'; expected 0 to 10"),
        (good[:-3] + b'\n', r"line 4: image 'b\.jpg': "),
        (good[:-1000], 'found .* ids, expected 65,536'),
        (b''.join(lines[:3]), r"has no row of image 'b\.jpg', which .*0\.csv has"),
        (good + lines[1].replace(b'c,d', b'x'), r"has a row of image 'x\.jpg', which .*0\.csv does not have"),
        (good + lines[1], r"line 5: image 'c,d\.jpg' is listed twice, first in line 2"),
        (b'', 'is empty'),
    ]:  # fmt: skip
        second.write_bytes(content)
        with pytest.raises(BadInput, match=message) as error:
            main([*csvs, '--out', str(out)])
        assert str(error.value).startswith(f'{second}: ')
        assert out.read_text() == 'as it was'
        assert sorted(tmp_path.glob('[!.]*')) == sorted([out, *map(Path, csvs)])
    second.unlink()
    with pytest.raises(BadInput, match=r'1\.csv: cannot be read: No such file'):
        main([*csvs, '--out', str(out)])
    assert out.read_text() == 'as it was'


def test_wrong_arguments(csvs, tmp_path, capsys):
    out = str(tmp_path / 'vote.csv')
    before = Path(csvs[0]).read_bytes()
    (tmp_path / 'link.csv').symlink_to(csvs[0])
    for argv, message in [
        ([*csvs, '--out', csvs[0]], 'is both the --out and one of the CSVs'),
        ([*csvs, '--out', str(tmp_path / 'link.csv')], 'is both the --out and one of the CSVs'),
        ([*csvs, csvs[0], '--out', out], 'is given twice'),
        ([*csvs, '--out', out, '--weights', '1', '2'], 'found 2, expected 3'),
        ([*csvs, '--out', out, '--weights', '0', '0', '0'], 'all of them are 0'),
        ([*csvs, '--out', str(tmp_path)], 'cannot be written: it is a folder'),
        ([*csvs, '--out', '.'], 'cannot be written: it is a folder'),
        ([*csvs, '--out', '/'], 'cannot be written: it is a folder'),
        ([*csvs, '--out', out, '--data', str(tmp_path / 'none')], r'test\.json: cannot be read'),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message):
            main(argv)
    for weights in (
        ['-1', '1', '1'],
        ['nan', '1', '1'],
        ['1e9', '1', '1'],
        ['inf', '1', '1'],
        ['x', '1', '1'],
        ['1' * 10, '1', '1'],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*csvs, '--out', out, '--weights', *weights])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count('\n') == 1
    for argv in (
        [],
        ['--search', '--weights', '1', '1', '1'],
        ['--search', '--class-weights', 'x.yaml', '--out', out],
        ['--recipe', 'x.yaml', '--class-weights', 'x.yaml', '--out', out],
        ['--recipe', 'x.yaml', '--soft', '--out', out],
        ['--by-class', '--out', out],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*csvs, *argv])
        assert stop.value.code == 2
    assert Path(csvs[0]).read_bytes() == before and not Path(out).exists()


def test_the_script_ends_in_one_line_with_status_2_and_without_torch(csvs, tmp_path):
    Path(csvs[2]).write_bytes(b'rubbish')
    script = [sys.executable, ensemble.__file__, *csvs, '--out', str(tmp_path / 'vote.csv')]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ''
    assert (
        result.stderr.startswith(f'ensemble.py: error: {csvs[2]}: line 1:') and result.stderr.count('\n') == 1
    )
    code = 'import sys, ensemble; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(ensemble.__file__).parent)


# --- the search -------------------------------------------------------------------------------------------


def samples_of(truth: np.ndarray, preds: np.ndarray, parts: list[int]) -> list[OofSample]:
    """Make samples of truth (images, H, W) and preds (images, M, H, W)."""
    return [OofSample(part, t, p) for part, t, p in zip(parts, truth, preds, strict=True)]


def noisy(rng: np.random.Generator, truth: np.ndarray, error: float, num_classes: int) -> np.ndarray:
    wrong = rng.integers(0, num_classes, truth.shape, np.uint8)
    return np.where((rng.random(truth.shape) < error) | (truth == 255), wrong, truth).astype(np.uint8)


def brute_force(truth: np.ndarray, preds: np.ndarray, weights: tuple[int, ...], num_classes: int) -> float:
    table = table_of([str(w) for w in weights], num_classes)
    voted = vote(preds.swapaxes(0, 1), table)
    return mean_iou(confusion_matrix(truth, voted, num_classes))


@pytest.mark.parametrize(('num_models', 'num_classes'), [(1, 2), (2, 3), (3, 4), (4, 11)])
def test_scores_are_those_of_voting_each_time_to_the_last_digit(num_models, num_classes):
    rng = np.random.default_rng(num_models)
    truth = rng.integers(0, num_classes, (6, 9, 9), np.uint8)
    truth[rng.random(truth.shape) < 0.1] = 255
    truth[5] = 255  # a photo without truth
    preds = np.stack([noisy(rng, truth, 0.3 + 0.1 * m, num_classes) for m in range(num_models)], 1)
    parts = [0, 0, 1, 1, 2, 2]
    scorer = WeightScorer(count_votes(samples_of(truth, preds, parts), num_models, num_classes))
    candidates = [w for w in product(range(4), repeat=num_models) if any(w)]
    scores = scorer.scores(np.array(candidates))
    keep = [np.ones(6, bool), *(np.array(parts) != part for part in range(3))]
    for weights, row in list(zip(candidates, scores, strict=True))[:: 1 + len(candidates) // 60]:
        assert row.tolist() == [brute_force(truth[k], preds[k], weights, num_classes) for k in keep]
    result = search_weights(count_votes(samples_of(truth, preds, parts), num_models, num_classes))
    assert result.best == scores[:, 0].max() == brute_force(truth, preds, result.best_weights, num_classes)
    assert result.equal == brute_force(truth, preds, (1,) * num_models, num_classes)
    chosen = {
        part: weight_grid(num_models)[scorer.scores(weight_grid(num_models))[:, 1 + part].argmax()]
        for part in range(3)
    }
    confusion = sum(
        confusion_matrix(
            one.truth, vote(one.preds, table_of([str(w) for w in chosen[one.part]], num_classes)), num_classes
        )
        for one in samples_of(truth, preds, parts)
    )
    assert result.best_out_of_sample == mean_iou(confusion)


def test_merging_the_counts_in_between_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    samples = [(i % 3, *np.split(rng.integers(0, 5, (4, 8, 8), np.uint8), [1])) for i in range(20)]
    samples = [OofSample(part, truth[0], preds) for part, truth, preds in samples]
    whole = count_votes(samples, 3, 5)
    keys = np.column_stack([whole.unit, whole.truth, whole.votes])
    slow: dict[tuple[int, ...], int] = {}
    for one in samples:
        for pixel in zip(one.truth.ravel().tolist(), *one.preds.reshape(3, -1).tolist(), strict=True):
            slow[one.part, *pixel] = slow.get((one.part, *pixel), 0) + 1
    assert {tuple(key): n for key, n in zip(keys.tolist(), whole.pixels.tolist(), strict=True)} == slow
    monkeypatch.setattr(hard, 'MAX_PENDING', 50)
    merged = count_votes(samples, 3, 5)
    assert merged.pixels.tolist() == whole.pixels.tolist() and (merged.votes == whole.votes).all()


def test_the_grid():
    grid = weight_grid(3).tolist()
    assert grid[:3] == sorted(grid[:3]) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [1, 1, 1] in grid and [2, 2, 2] not in grid and [0, 0, 0] not in grid and [3, 2, 1] in grid
    proportions = {tuple(Fraction(a, sum(w)) for a in w) for w in product(range(4), repeat=3) if any(w)}
    assert len(grid) == len(proportions)


def test_the_best_member_beats_every_vote():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (10, 32, 32), np.uint8)
    same = noisy(rng, truth, 0.6, 4)  # two bad models that make the same mistakes, and outvote
    preds = np.stack([same, noisy(rng, truth, 0.02, 4), same.copy()], 1)
    result = search_weights(count_votes(samples_of(truth, preds, [i // 2 for i in range(10)]), 3, 4))
    assert result.weights == (0, 1, 0)
    assert result.equal < result.singles[1] == result.best == result.single_out_of_sample
    assert 'do not ensemble: use model good' in format_verdict(result, ['bad', 'good', 'worse'])


def test_independent_models_are_better_together():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (10, 32, 32), np.uint8)
    preds = np.stack([noisy(rng, truth, error, 4) for error in (0.3, 0.35, 0.3)], 1)
    result = search_weights(count_votes(samples_of(truth, preds, [i // 2 for i in range(10)]), 3, 4))
    assert np.count_nonzero(result.weights) == 3
    assert max(result.equal, result.best_out_of_sample) > result.single_out_of_sample
    assert 'use the vote with weights' in format_verdict(result, ['a', 'b', 'c'])


def test_a_choice_that_is_luck_is_not_used():
    """On each part another model is right, so that weights are better in sample only."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, (4, 16, 16), np.uint8)
    preds = np.stack([noisy(rng, truth, 0.5, 3) for _ in range(2)], 1)
    for part in range(4):
        preds[part, part % 2] = truth[part]
    result = search_weights(count_votes(samples_of(truth, preds, [0, 1, 2, 3]), 2, 3))
    assert result.best >= max(result.singles)
    assert result.best_out_of_sample < result.best
    assert result.weights in ((1, 1), (1, 0), (0, 1))


def test_weights_of_many_models_are_changed_one_by_one():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (4, 16, 16), np.uint8)
    preds = np.stack([noisy(rng, truth, 0.3 + 0.06 * m, 3) for m in range(10)], 1)
    result = search_weights(count_votes(samples_of(truth, preds, [0, 0, 1, 1]), 10, 3))
    assert result.best == brute_force(truth, preds, result.best_weights, 3)
    assert result.best >= max(result.equal, *result.singles)
    near = []
    for part, reached in ((slice(None), result.best_weights), *enumerate(result.part_weights)):
        kept = slice(None) if part == slice(None) else slice(2 - 2 * part, 4 - 2 * part)
        score = brute_force(truth[kept], preds[kept], reached, 3)
        for model, weight in product(range(10), range(4)):  # no single change is better
            changed = (*reached[:model], weight, *reached[model + 1 :])
            assert brute_force(truth[kept], preds[kept], changed, 3) <= score
            near.append(changed)
    singles = np.eye(10, dtype=int).tolist()
    candidates = [*map(tuple, singles), (1,) * 10, *sorted(set(near))]
    assert [*map(tuple, result.candidates.tolist())] == candidates
    with pytest.raises(BadInput, match='20 models'):
        count_votes([], 20, 11)


# --- the search as a command ------------------------------------------------------------------------------


PHOTOS = [f'train/{i}.jpg' for i in range(6)]


@pytest.fixture
def runs(tmp_path) -> Path:
    """Write two models of two folds, `good` and `bad`, on rectangles; photos are 320 x 512."""
    rng = np.random.default_rng(0)
    boxes = {name: (100 + 20 * i, 60, 200, 160, 1 + i % 3) for i, name in enumerate(PHOTOS)}
    masks = write_rectangles(tmp_path / 'data', 320, 512, boxes)
    truth = {name: mask[np.arange(SIDE) * 320 // SIDE][:, ::2] for name, mask in masks.items()}
    for model, error in (('bad', 0.5), ('good', 0.1)):
        for fold in range(2):
            folder = tmp_path / 'output' / model / f'fold{fold}'
            write_csv(folder / 'oof.csv', {n: noisy(rng, truth[n], error, 4) for n in PHOTOS[fold::2]})
            write_csv(folder / 'test.csv', random_masks(fold + 10 * len(model)))
    return tmp_path


def search_command(runs: Path, out: Path) -> list[str]:
    tests = [str(runs / 'output' / m / f'fold{k}' / 'test.csv') for m in ('bad', 'good') for k in range(2)]
    cfg = runs / 'cfg.yaml'
    cfg.write_text(f'data_root: {runs / "data"}\n')
    return [*tests, '--search', '--cfg', str(cfg), '--out', str(out)]


def test_search_uses_the_better_model(runs, tmp_path, capsys):
    out = tmp_path / 'vote.csv'
    argv = search_command(runs, out)
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f'do not ensemble: use model {runs}/output/good;' in printed
    alone = tmp_path / 'alone.csv'
    assert (
        f'note: {argv[2]}: decides every pixel, as ' in printed
        and 'give other weights or infer.py' in printed
    )
    assert main([argv[2], '--out', str(alone)]) == 0
    assert out.read_bytes() == alone.read_bytes()
    # the score is that of all photos out of fold together
    oof = {}
    for fold in range(2):
        oof |= read_masks(runs / 'output' / 'good' / f'fold{fold}' / 'oof.csv')
    truth = [downsample_mask(draw_mask(photo)) for photo in read_coco(runs / 'data', 'train', HOME).photos]
    score = mean_iou(confusion_matrix(np.stack(truth), np.stack([oof[name] for name in PHOTOS]), 11))
    assert f'{runs}/output/good  {score:.4f}' in printed


def test_search_and_recipe_with_csvs_of_other_tools(runs, tmp_path):
    first, second, third = (tmp_path / f'{name}.csv' for name in 'abc')
    assert main(search_command(runs, first)) == 0
    recipe = (tmp_path / 'ensemble.yaml').read_text()
    for path in (runs / 'output' / 'good' / 'fold0').glob('*.csv'):
        content = path.read_bytes().replace(b'\n', b'\r\n./').removesuffix(b'./').replace(b'./"', b'"./')
        path.write_bytes(b'\xef\xbb\xbf' + content)
    assert main(search_command(runs, second)) == 0
    assert second.read_bytes() == first.read_bytes()
    weights = [line for line in recipe.splitlines() if 'weight' in line]
    again = (tmp_path / 'ensemble.yaml').read_text()
    assert weights and [line for line in again.splitlines() if 'weight' in line] == weights
    command = [*search_command(runs, third), '--recipe', str(tmp_path / 'ensemble.yaml')]
    command.remove('--search')
    assert main(command) == 0
    assert third.read_bytes() == second.read_bytes()


def test_search_shares_a_models_weight_among_its_csvs(runs, tmp_path, monkeypatch):
    given: list[Fraction] = []
    monkeypatch.setattr(
        ensemble, 'write_recipe', lambda path, members, one: given.extend(row[0] for row in one.table)
    )
    argv = search_command(runs, tmp_path / 'vote.csv')
    main(argv)
    assert given == [0, 0, Fraction(1, 2), Fraction(1, 2)]
    main([*argv[:3:2], *argv[4:]])  # fold 0 of both: no folds to leave out, so stretches of its photos
    assert given[4:] == [0, 1]


@pytest.mark.parametrize(
    ('metric', 'planes', 'most'), [('miou', (), 51), ('image_miou', (), 41), ('dice', (2,), 50)]
)
def test_search_of_ignored_pixels_alone_or_of_too_many_models_is_refused(metric, planes, most):
    truth = np.full((*planes, 2, 2), IGNORED, np.uint8)
    for models, message in ((most, 'nothing can be scored'), (most + 1, f'{most + 1} models, too many')):
        sample = OofSample(0, truth, np.zeros((models, *truth.shape), np.uint8))
        with pytest.raises(BadInput, match=message):
            hard.count_votes([sample], models, 2, Metric(metric))


def test_search_refuses(runs, tmp_path):
    out = tmp_path / 'vote.csv'
    argv = search_command(runs, out)
    for drop in (argv[:1] + argv[2:], argv[1:]):  # a fold is missing of one model
        with pytest.raises(BadInput, match='only one has .* out of fold; give the same folds of each'):
            main(drop)
    oof = runs / 'output' / 'good' / 'fold1' / 'oof.csv'
    good = read_masks(oof)
    write_csv(oof, good | {PHOTOS[0]: good[PHOTOS[1]]})
    with pytest.raises(
        BadInput, match=r"fold1/oof\.csv: photo 'train/0\.jpg' is also in .*fold0/oof\.csv; expected"
    ):
        main(argv)
    write_csv(oof, good | {'else.jpg': good[PHOTOS[1]]})
    with pytest.raises(BadInput, match=r"oof\.csv: 'else\.jpg' is not a training photo of"):
        main(argv)
    oof.unlink()
    with pytest.raises(BadInput, match=r'fold1/oof\.csv: no such file; infer.py --split oof writes it'):
        main(argv)
    write_csv(oof, good)
    (runs / 'data' / 'train_all.json').write_text('{"images"')
    with pytest.raises(BadInput, match=r'train_all\.json: not JSON'):
        main(argv)
    assert not out.exists()


def write_probs(folder: Path, ids: list[str], seed: int) -> np.ndarray:
    """Write a test.csv and its test_probs.npy; return the probabilities."""
    probs = np.random.default_rng(seed).integers(0, 256, (len(ids), 11, SIDE, SIDE), np.uint8)
    write_csv(folder / 'test.csv', dict(zip(ids, probs.argmax(1).astype(np.uint8), strict=True)))
    np.save(folder / 'test_probs.npy', probs)
    return probs


def test_soft_vote_is_the_weighted_mean(tmp_path, capsys):
    a = write_probs(tmp_path / 'a', ['x.jpg', 'y.jpg'], 0)
    b = write_probs(tmp_path / 'b', ['y.jpg', 'x.jpg'], 1)[::-1]  # votes meet by image_id
    out = tmp_path / 'vote.csv'
    csvs = [str(tmp_path / name / 'test.csv') for name in 'ab']
    assert main([*csvs, '--soft', '--weights', '3', '1', '--out', str(out)]) == 0
    expected = (3.0 * a + b).argmax(1)
    masks = read_masks(out)
    assert all(np.array_equal(masks[name], expected[i]) for i, name in enumerate(('x.jpg', 'y.jpg')))
    assert 'mean of the probabilities of 2 models on 2 photos' in capsys.readouterr().out


def test_soft_vote_refuses(tmp_path):
    write_probs(tmp_path / 'a', ['x.jpg'], 0)
    path = tmp_path / 'a' / 'test_probs.npy'
    argv = [str(tmp_path / 'a' / 'test.csv'), '--soft', '--out', str(tmp_path / 'vote.csv')]
    np.save(path, np.zeros((2, 11, SIDE, SIDE), np.uint8))
    with pytest.raises(BadInput, match='expected .1, 11, 256, 256. uint8'):
        main(argv)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match='not an array, or cut off'):
        main(argv)
    path.unlink()
    with pytest.raises(BadInput, match='infer.py --save-probs writes it'):
        main(argv)
    assert not (tmp_path / 'vote.csv').exists()


def test_recipe_applies_the_search_to_the_same_members_alone(runs, tmp_path, capsys):
    out, again = tmp_path / 'vote.csv', tmp_path / 'again.csv'
    argv = search_command(runs, out)
    assert main(argv) == 0
    assert f'gain above the best model, {runs}/output/good: ' in capsys.readouterr().out
    recipe_yaml = tmp_path / 'ensemble.yaml'
    csvs = [word for word in argv if word.endswith('test.csv')]
    options = ['--recipe', str(recipe_yaml), '--out', str(again)]
    assert main([*csvs, *options]) == 0
    assert again.read_bytes() == out.read_bytes()
    good = [csv for csv in csvs if '/good/' in csv]
    with pytest.raises(BadInput, match='is not among the CSVs'):
        main([good[0], *options])
    oof = Path(good[0]).with_name('oof.csv')
    oof.write_text(oof.read_text().replace(' 0 0\n', ' 0 1\n', 1))
    with pytest.raises(
        BadInput, match='oof.csv: has changed since .*ensemble.yaml was made; search it again'
    ):
        main([*csvs, *options])
    chosen = recipe_yaml.read_text()
    for text in ('members: [1, 2]', re.sub('weight: .*', 'weight: 1e999999999', chosen)):
        recipe_yaml.write_text(text)
        with pytest.raises(BadInput, match='not a recipe'):
            main([*csvs, *options])


def test_gain_is_that_of_the_search_over_the_best_model(runs):
    members = [find_members([runs / 'output' / name / f'fold{k}' / 'test.csv' for k in (0, 1)],
                                     runs / 'x.csv') for name in ('bad', 'good')]  # fmt: skip
    photos = {p.file_name: p for p in read_coco(runs / 'data', 'train', HOME).photos}

    def samples():
        return read_samples(members, photos, runs / 'data', HOME)

    result = search_weights(count_votes(samples(), 2, 11))
    gain, photos = recipe.measure_gain(samples(), result, None)
    line = recipe.format_gain(gain, photos, result, ['bad', 'good'])
    assert f' {gain.value:+.4f} mIoU out of sample [' in line
    assert (
        line.startswith('gain above the best model, good: ') and ' significant difference on 6 photos' in line
    )
    assert gain.low <= 0 <= gain.high


def test_one_model_has_nothing_to_search(runs, tmp_path, capsys):
    """Its folds vote with equal weights, and no verdict is given on them; two are no vote."""
    folder = runs / 'output' / 'good' / 'fold2'
    for split, masks in (('oof', {'7.jpg': random_masks(1)['a.jpg']}), ('test', random_masks(99))):
        write_csv(folder / f'{split}.csv', masks)
    out, again = tmp_path / 'vote.csv', tmp_path / 'again.csv'
    argv = [word for word in search_command(runs, out) if '/bad/' not in word]
    assert main(argv) == 0
    assert 'decides every pixel' in capsys.readouterr().out
    assert main([str(folder / 'test.csv'), *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('one model: nothing to search; its CSVs vote with equal weights\n')
    assert 'best model' not in printed and 'interval' not in printed
    plain = [str(again) if word == str(out) else word for word in argv if word != '--search']
    assert main([str(folder / 'test.csv'), *plain]) == 0 and again.read_bytes() == out.read_bytes()
    recipe = ['--recipe', str(tmp_path / 'ensemble.yaml')]
    assert main([str(folder / 'test.csv'), *plain, *recipe]) == 0 and again.read_bytes() == out.read_bytes()
