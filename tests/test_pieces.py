"""Pieces in a predicted mask: what they are, how sure the model is of them, and the bins they go into."""

import cv2
import numpy as np
import pytest

from config import CLASSES
from engine.pieces import (
    COLUMNS,
    NOT_SURE,
    Limits,
    bin_of,
    draw_numbers,
    find_pieces,
    paint,
    read_bins,
)
from metrics import IGNORED
from utils.errors import BadInput
from utils.plotting import overlay


def test_pieces_are_in_order_of_size_and_specks_are_left_out():
    ids = np.zeros((100, 200), np.uint8)
    ids[10:30, 10:30] = 2
    ids[50:90, 100:180] = 2
    ids[10:30, 30:50] = 6  # touches the first, but is of another class
    ids[0:2, 190:192] = 9
    confidence = np.full(ids.shape, 204, np.uint8)
    pieces = find_pieces(ids, confidence)
    assert [piece.class_ids for piece in pieces] == [(2,), (2,), (6,)]
    assert [piece.share for piece in pieces] == [0.16, 0.02, 0.02]
    assert [piece.confidence for piece in pieces] == [0.8] * 3 and all(piece.is_sure for piece in pieces)
    assert pieces[0].corner == (100, 50) and pieces[0].region.shape == (40, 80)
    assert all(ids[piece.middle[1], piece.middle[0]] == piece.class_ids[0] for piece in pieces)
    assert 115 <= pieces[0].middle[0] <= 165 and 65 <= pieces[0].middle[1] <= 75
    kept = paint(pieces, ids.shape)
    assert np.array_equal(kept, np.where(ids == 9, 0, ids))
    picture = draw_numbers(overlay(np.zeros((100, 200, 3), np.uint8), kept), pieces)
    x, y = pieces[0].middle
    assert picture.shape == (100, 200, 3) and (picture[y - 8 : y + 8, x - 8 : x + 8] == 255).all(2).any()
    assert len(find_pieces(ids, confidence, Limits(share=0))) == 4
    assert find_pieces(np.zeros_like(ids), confidence) == []


def test_pieces_that_are_not_sure_merge_where_they_touch():
    ids, confidence = np.zeros((100, 200), np.uint8), np.full((100, 200), 255, np.uint8)
    ids[10:30, 10:30], confidence[10:30, 10:30] = 2, 102
    ids[10:30, 30:70], confidence[10:30, 30:70] = 6, 51  # touches it
    ids[30:40, 10:30] = 4  # touches both, but is sure
    ids[60:64, 10:12], confidence[60:64, 10:12] = 1, 51  # below the share, and touches a speck
    ids[60:64, 12:14], confidence[60:64, 12:14] = 2, 51
    ids[60:80, 100:120], confidence[60:80, 100:120] = 9, 51
    pieces = find_pieces(ids, confidence)
    assert [piece.class_ids for piece in pieces] == [(6, 2), (9,), (4,)]
    assert [piece.is_sure for piece in pieces] == [False, False, True]
    assert [round(piece.confidence, 6) for piece in pieces] == [round((2 * 0.2 + 0.4) / 3, 6), 0.2, 1]
    assert pieces[0].corner == (10, 10) and pieces[0].region.shape == (20, 60) and pieces[0].share == 0.06
    kept = paint(pieces, ids.shape)
    assert (kept[10:30, 10:70] == IGNORED).all() and (kept[30:40, 10:30] == 4).all()
    assert not kept[60:64, :20].any()
    surer = find_pieces(ids, confidence, Limits(confidence=0.3))
    assert [(piece.class_ids, piece.is_sure) for piece in surer] == [
        ((6,), False),
        ((2,), True),
        ((9,), False),
        ((4,), True),
    ]
    assert all(piece.is_sure for piece in find_pieces(ids, confidence, Limits(confidence=0.2)))


def test_pieces_of_overlapping_classes():
    confidence = np.zeros((3, 100, 200), np.uint8)
    confidence[0, 10:60, 10:60], confidence[2, 30:80, 30:80] = 230, 90
    mask = (confidence > 0).astype(np.uint8)
    first, second = find_pieces(mask, confidence)
    assert (first.class_ids, first.share, first.is_sure) == ((0,), 0.125, True)
    assert (second.class_ids, second.share, second.is_sure) == ((2,), 0.125, False)
    painted = paint([first, second], mask.shape)
    assert painted[:, 40, 40].tolist() == [1, 0, IGNORED]
    assert overlay(np.zeros((100, 200, 3), np.uint8), painted).shape == (100, 200, 3)


def test_as_many_regions_as_pieces():
    ids = np.zeros((100, 200), np.uint8)
    for n in range(22):
        x, y = 20 * (n % 10), 30 * (n // 10)
        ids[y : y + 9 + n, x : x + 12] = 1 + n % 10
    pieces = find_pieces(ids, np.full(ids.shape, 255, np.uint8))[:20]
    kept = paint(pieces, ids.shape)
    count, _ = cv2.connectedComponents((kept > 0).astype(np.uint8))
    assert len(pieces) == 20 == count - 1
    assert not kept[0, 0] and not kept[0, 20] and np.array_equal(kept[30:], ids[30:])


@pytest.mark.parametrize('language', ['en', 'ko'])
def test_every_class_has_a_bin_in_each_language(language):
    bins = read_bins(language)
    assert set(bins) == set(CLASSES[1:])
    for bin_ in (*bins.values(), NOT_SURE[language]):
        is_korean = [
            any('가' <= letter <= '힣' for letter in text) for text in (bin_.class_name, bin_.name, bin_.how)
        ]
        assert is_korean == [language == 'ko'] * 3, bin_


def test_the_bin_of_a_piece():
    ids = np.full((10, 10), 9, np.uint8)
    sure, doubtful = (find_pieces(ids, np.full_like(ids, value))[0] for value in (200, 100))
    assert bin_of(sure, CLASSES, read_bins()).name == 'Battery box'
    assert bin_of(doubtful, CLASSES, read_bins()).name == 'Not sure'
    assert bin_of(doubtful, CLASSES, read_bins('ko'), 'ko').name == '확실하지 않음'
    assert bin_of(sure, list('abcdefghijk'), read_bins()) is None


@pytest.mark.parametrize('text', ['class,bin\nPaper,Paper\n', f'{",".join(COLUMNS)}\nPaper,Paper\n', '\xff'])
def test_bins_that_are_no_table(tmp_path, text):
    (tmp_path / 'bins.csv').write_bytes(text.encode('latin-1'))
    with pytest.raises(BadInput, match='expected lines of class,bin,how,class_ko,bin_ko,how_ko'):
        read_bins('en', tmp_path / 'bins.csv')
