"""Islands and holes are found and removed, and only if it helps out of fold."""

import cv2
import numpy as np
import pytest
from conftest import write_csv, write_rectangles
from overlaps import write_overlaps

from config import HOME
from metrics import count_pixels
from tools import postprocess
from tools.postprocess import Choice
from utils.errors import BadInput
from utils.id_csv import IdWriter, read_masks


def test_pieces_are_given_to_what_is_around_them():
    mask = np.zeros((256, 256), np.uint8)
    mask[50:100, 50:100] = 3
    mask[60:62, 60:62] = 0  # a hole of 4
    mask[70:73, 70:73] = 5  # an island of 9 in the object
    mask[200:202, 200:202] = 7  # an island of 4 on the background
    pieces = postprocess.find_pieces(mask)
    assert sorted(pieces.sizes.tolist()) == [4, 4, 9, 2500 - 13, 256 * 256 - 2504]
    assert np.array_equal(pieces.cleaned(0, 0), mask)
    islands = pieces.cleaned(10, 0)
    assert islands[60, 60] == 0 and islands[71, 71] == 3 and islands[200, 200] == 0
    holes = pieces.cleaned(0, 5)
    assert holes[60, 60] == 3 and holes[71, 71] == 5 and holes[200, 200] == 7
    assert pieces.cleaned(5, 0)[71, 71] == 5  # 9 pixels are not below 5


def random_mask(rng, num_classes):
    return cv2.resize(rng.integers(0, num_classes, (9, 7), np.uint8), (50, 40), interpolation=0)


SIZES = [(0, 0), (40, 0), (0, 40), (60, 200), (10**6, 10**6)]


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
def test_counts_are_those_of_each_cleaned_mask(task):
    rng, choices = np.random.default_rng(0), [Choice(*sizes) for sizes in SIZES]
    if task == 'multiclass':
        choices += [Choice(*sizes, way) for way in ('pixels', 'probs') for sizes in SIZES]
    for _ in range(5):
        probs = rng.integers(0, 256, (4, 40, 50), np.uint8)
        if task == 'multiclass':
            mask, truth = random_mask(rng, 4), random_mask(rng, 4)
        else:  # each plane by itself, one of them empty
            mask, truth = (np.stack([random_mask(rng, 2) for _ in range(3)]) for _ in range(2))
            mask[2] = 0
        truth[..., :5] = 255
        mask[..., 20, 20:23] = 1
        counts = postprocess.count_cleaned(mask, truth, choices, 4 if task == 'multiclass' else 3, probs)
        for count, choice in zip(counts, choices, strict=True):
            cleaned = postprocess.clean(mask, choice, probs)
            np.testing.assert_array_equal(count, count_pixels(truth, cleaned, counts.shape[-1]))
        if task == 'multilabel':
            for k, plane in enumerate(mask):
                np.testing.assert_array_equal(cleaned[k], postprocess.clean(plane, choice))


def test_a_piece_of_objects_gets_one_class():
    mask = np.zeros((20, 20), np.uint8)
    mask[2:6, 2:6], mask[6:8, 6:8] = 3, 2  # touch at a corner
    mask[12:15, 2:4], mask[12:15, 4:6] = 1, 4  # as many pixels of each: the first
    mask[12, 15] = 2
    by_pixels = mask.copy()
    by_pixels[6:8, 6:8], by_pixels[12:15, 4:6] = 3, 1
    assert np.array_equal(postprocess.unite_classes(mask), by_pixels)
    probs = np.zeros((5, 20, 20), np.uint8)
    probs[3, 2:6, 2:6], probs[2, 6:8, 6:8] = 80, 255
    probs[2, 2:6, 2:6] = 60  # 16 * 60 + 4 * 255 is above 16 * 80
    probs[4, 12:15, 2:6], probs[1, 12:15, 2:6], probs[0, 12:15, 2:6] = 90, 80, 200  # never the background
    by_probs = mask.copy()
    by_probs[2:6, 2:6], by_probs[12:15, 2:6], by_probs[12, 15] = 2, 4, 1  # nothing is known of the last
    assert np.array_equal(postprocess.unite_classes(mask, probs), by_probs)
    empty = np.zeros((3, 4), np.uint8)
    assert np.array_equal(postprocess.unite_classes(empty), empty)


def test_diagonal_neighbours_are_one_piece():
    mask = np.eye(256, dtype=np.uint8)
    assert len(postprocess.find_pieces(mask).class_ids) == 3
    assert np.array_equal(postprocess.find_pieces(mask).cleaned(256, 0), mask)


@pytest.mark.parametrize('value', [0, 4])
def test_mask_of_one_class(value):
    mask = np.full((256, 256), value, np.uint8)
    assert np.array_equal(postprocess.find_pieces(mask).cleaned(65536, 65536), mask)


def speckled(path, masks, speckles, rng):
    """A CSV of the masks, with `speckles` single pixels of a class that is in none of them."""
    with IdWriter(path) as writer:
        for name, mask in masks.items():
            pred = mask.copy()
            pred.ravel()[rng.choice(pred.size, speckles, replace=False)] = 9
            writer.write(name, pred)


@pytest.fixture
def rectangles(tmp_path):
    boxes = {f'{n}.jpg': (10 + 5 * n, 20, 60, 80, 1 + n % 3) for n in range(20)}
    return tmp_path / 'data', write_rectangles(tmp_path / 'data', 256, 256, boxes)


def test_search_accepts_what_helps(rectangles, tmp_path, capsys):
    data, masks = rectangles
    speckled(tmp_path / 'oof.csv', masks, 50, np.random.default_rng(0))
    postprocess.command(['search', str(tmp_path / 'oof.csv'), '--data', str(data)])
    said = capsys.readouterr().out
    assert 'it helps: python -m tools.postprocess apply CSV --islands 8 --holes 0' in said
    out = tmp_path / 'out.csv'
    postprocess.command(['apply', str(tmp_path / 'oof.csv'), '--islands', '8', '--out', str(out)])
    cleaned = read_masks(out)
    assert list(cleaned) == list(masks) and all(9 not in mask for mask in cleaned.values())


@pytest.mark.parametrize('way', ['pixels', 'probs'])
def test_search_finds_that_pieces_have_one_class(way, rectangles, tmp_path, capsys):
    """A part of each object is of another class: the smaller part, or the larger one with less certainty."""
    data, masks = rectangles
    preds, probs = {}, np.zeros((len(masks), 11, 256, 256), np.uint8)
    for row, (name, mask) in enumerate(masks.items()):
        x, share = 10 + 5 * row, 20 if way == 'pixels' else 40
        preds[name] = mask.copy()
        preds[name][20:100, x : x + share] = 9
        probs[row, 9][preds[name] == 9] = 140 if way == 'probs' else 255
        probs[row, mask.max()][preds[name] == mask.max()] = 255
        probs[row, mask.max()][preds[name] == 9] = 115 if way == 'probs' else 0
    write_csv(tmp_path / 'oof.csv', preds)
    arguments = ['search', str(tmp_path / 'oof.csv'), '--data', str(data)]
    if way == 'probs':
        postprocess.command(arguments)
        assert 'there is not a *_probs.npy' in capsys.readouterr().out
        np.save(tmp_path / 'oof_probs.npy', probs)
    postprocess.command(arguments)
    options = ['--islands', '0', '--holes', '0', '--one-class', way]
    assert f'it helps: python -m tools.postprocess apply CSV {" ".join(options)}' in capsys.readouterr().out
    postprocess.command(['apply', str(tmp_path / 'oof.csv'), *options, '--out', str(tmp_path / 'out.csv')])
    cleaned = read_masks(tmp_path / 'out.csv')
    assert all(np.array_equal(cleaned[name], mask) for name, mask in masks.items())


def test_names_are_written_as_in_test_json(tmp_path, capsys):
    (tmp_path / 'test.json').write_text('{"images": [{"file_name": "a/b.jpg"}]}')
    with IdWriter(tmp_path / 'in.csv') as writer:
        writer.write('a\\b.jpg', np.zeros((256, 256), np.uint8))
    out = tmp_path / 'out.csv'
    postprocess.command(['apply', str(tmp_path / 'in.csv'), '--out', str(out), '--data', str(tmp_path)])
    assert list(read_masks(out)) == ['a/b.jpg'] and 'submission.py check' in capsys.readouterr().out


def test_search_refuses_what_does_not(rectangles, tmp_path, capsys):
    data, masks = rectangles
    speckled(tmp_path / 'oof.csv', masks, 0, np.random.default_rng(0))
    _, gain = postprocess.search([tmp_path / 'oof.csv'], data, HOME)
    assert gain.value == 0 and 'no significant gain' in capsys.readouterr().out


def test_a_csv_is_not_written_over_itself(rectangles, tmp_path):
    path = tmp_path / 'oof.csv'
    speckled(path, rectangles[1], 0, np.random.default_rng(0))
    before = path.read_bytes()
    with pytest.raises(BadInput, match='give --out another name'):
        postprocess.command(['apply', str(path), '--islands', '8', '--out', str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize('size', ['-1', 'x', str(2**27 + 1), '1.5'])
def test_sizes(size, capsys):
    with pytest.raises(SystemExit) as stop:
        postprocess.command(['apply', 'a.csv', f'--islands={size}', '--out', 'b.csv'])
    assert stop.value.code == 2 and 'a whole number from 0 to 134217728' in capsys.readouterr().err


def test_classes_that_may_overlap_share_their_pieces(tmp_path):
    write_overlaps(tmp_path, [(64, 64)] * 2)
    arguments = ['apply', str(tmp_path / 'a.csv'), '--one-class', 'pixels', '--data', str(tmp_path)]
    with pytest.raises(BadInput, match='--one-class: .*classes may overlap'):
        postprocess.command([*arguments, '--out', str(tmp_path / 'b.csv')])
