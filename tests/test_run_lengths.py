"""Run lengths: the published conventions, a naive loop, and pycocotools; and what is refused."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_codec

from utils.errors import BadInput
from utils.run_lengths import (
    decode_ids,
    decode_runs,
    encode_ids,
    encode_runs,
    format_runs,
    join_runs,
    parse_runs,
    pixel_of,
)

ORDERS = ('column', 'row')


def naive(mask: np.ndarray, order: str, first: int) -> str:
    """Encode pixel by pixel."""
    numbers, length = [], 0
    pixels = [*mask.ravel('F' if order == 'column' else 'C').tolist(), 0]
    for index, pixel in enumerate(pixels):
        if pixel:
            length += 1
        elif length:
            numbers += [index - length + first, length]
            length = 0
    return ' '.join(map(str, numbers))


def rectangle(size: tuple[int, int], y: slice, x: slice) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[y, x] = 1
    return mask


def dots(size: tuple[int, int], *points: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[tuple(np.transpose(points))] = 1
    return mask


HAND = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], np.uint8)
BLOCK = rectangle((256, 256), slice(10, 14), slice(20, 22))
CORNERS = dots((256, 256), (0, 0), (1, 0), (-1, -1))
PUBLISHED = [
    (BLOCK, 'column', 1, '5131 4 5387 4'),
    (BLOCK, 'row', 1, '2581 2 2837 2 3093 2 3349 2'),
    (CORNERS, 'column', 1, '1 2 65536 1'),
    (CORNERS, 'row', 1, '1 1 257 1 65536 1'),
    (HAND, 'row', 1, '2 2 5 1 12 1'),
    (HAND, 'row', 0, '1 2 4 1 11 1'),
    (HAND, 'column', 1, '2 1 4 1 7 1 12 1'),
    (np.ones((3, 4), bool), 'row', 1, '1 12'),
    (np.zeros((3, 4), bool), 'column', 1, ''),
    (np.ones((1, 1), bool), 'column', 0, '0 1'),
]


@pytest.mark.parametrize(('mask', 'order', 'first', 'text'), PUBLISHED)
def test_published_strings(mask, order, first, text):
    assert format_runs(encode_runs(mask, order), first).decode() == text == naive(mask, order, first)
    decoded = decode_runs(parse_runs(text.encode(), mask.shape, first, ''), mask.shape, order)
    assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask.astype(bool))


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(ORDERS), st.sampled_from([0, 1]))
def test_random_masks_as_a_loop_and_as_pycocotools(size, seed, share, order, first):
    mask = np.random.default_rng(seed).random(size) < share
    runs = encode_runs(mask, order)
    assert runs.dtype == np.int64 and runs.shape[1:] == (2,)
    text = format_runs(runs, first)
    assert text.decode() == naive(mask, order, first)
    np.testing.assert_array_equal(parse_runs(text, size, first, '', strict=True), runs)
    np.testing.assert_array_equal(decode_runs(runs, size, order), mask)
    counts = np.diff(np.concatenate([[0], np.stack([runs[:, 0], runs.sum(1)], 1).ravel(), [mask.size]]))
    shape = size if order == 'column' else size[::-1]  # pycocotools counts down the columns
    coco = rle_codec.decode(rle_codec.frPyObjects({'size': [*shape], 'counts': counts.tolist()}, *shape))
    np.testing.assert_array_equal(coco if order == 'column' else coco.T, mask)


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.sampled_from(ORDERS))
def test_ids_are_coded_together_as_each_alone(size, seed, order):
    mask = np.random.default_rng(seed).integers(0, 4, size, np.uint8)
    runs, ids = encode_ids(mask, order)
    for k in (1, 2, 3):
        np.testing.assert_array_equal(runs[ids == k], encode_runs(mask == k, order))
    np.testing.assert_array_equal(decode_ids(runs, ids, size, order), mask)
    joined, owners, overlaps = join_runs([runs[ids == k] for k in (1, 2, 3)])
    assert not overlaps.size
    np.testing.assert_array_equal(joined, runs)
    np.testing.assert_array_equal(owners + 1, ids)


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.floats(0, 0.4), st.sampled_from(ORDERS))
def test_masks_that_overlap_are_found_with_the_first_pixel(size, seed, share, order):
    masks = np.random.default_rng(seed).random((3, *size)) < share
    runs, _, overlaps = join_runs([encode_runs(mask, order) for mask in masks])
    shared = (masks.sum(0) > 1).ravel('F' if order == 'column' else 'C')
    assert bool(overlaps.size) == shared.any()
    if overlaps.size:
        pixel = pixel_of(int(runs[overlaps[0], 0]), size, order)
        assert masks[:, *pixel].sum() > 1 and shared.argmax() == runs[overlaps[0], 0]


@pytest.mark.parametrize(('text', 'first', 'message'), [
    ('1 2 3', 1, 'has 3 numbers; expected pairs'),
    ('0 2', 1, r'run 1 \(0 2\) begins before the first pixel, 1; is it first: 0'),
    ('12 1', 0, r'run 1 \(12 1\) goes beyond the last pixel, 11, of 3x4'),
    ('12 2', 1, r'run 1 \(12 2\) goes beyond the last pixel, 12, of 3x4'),
    ('1 1 9 99999999999999999999999', 1, 'run 2 .* goes beyond'),
    ('9999999999999999999999999 1', 1, 'run 1 .* goes beyond'),
    ('5 0', 1, r'run 1 \(5 0\) has no pixel'),
    ('5 2 6 1', 1, r'run 2 \(6 1\) overlaps run 1 \(5 2\)'),
    ('5 2 5 2', 1, r'run 2 \(5 2\) overlaps run 1'),
    ('5 1 1 2', 1, r'run 2 \(1 2\) begins before run 1 \(5 1\); expected ascending'),
    ('1 2.0', 1, "number 2 is '2.0'; expected whole numbers"),
    ('-1 2', 1, "number 1 is '-1'"),
    ('[1, 2]', 1, r"number 1 is '\[1,'"),
    ('1 \x00', 1, 'number 2 is'),
    ('nan', 1, "number 1 is 'nan'"),
])  # fmt: skip
@pytest.mark.parametrize('strict', [True, False])
def test_faults_have_their_line(text, first, message, strict):
    with pytest.raises(BadInput, match=f'^here: .*{message}') as error:
        parse_runs(text.encode(), (3, 4), first, 'here', strict)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', [' 1 2 5 1', '1 2 5 1 ', '1  2 5 1', '1 2\t5 1', '01 2 5 1', '1 2\r\n5 1'])
def test_white_space_and_zeros_are_read_but_not_handed_in(text):
    assert parse_runs(text.encode(), (3, 4), 1, '').tolist() == [[0, 2], [4, 1]]
    with pytest.raises(BadInput, match="expected such as '1 2 5 1'"):
        parse_runs(text.encode(), (3, 4), 1, '', strict=True)


def test_runs_that_touch_are_read_and_written_as_one():
    runs = parse_runs(b'1 2 3 2', (3, 4), 1, '', strict=True)
    assert format_runs(encode_runs(decode_runs(runs, (3, 4)))) == b'1 4'


@given(st.binary(max_size=40))
def test_rubbish_is_read_or_refused_in_one_line(text):
    try:
        runs = parse_runs(text, (20, 30), 1, 'here')
    except BadInput as error:
        assert '\n' not in str(error)
    else:
        assert decode_runs(runs, (20, 30)).sum() == runs[:, 1].sum()


@pytest.mark.parametrize(
    'mask', [np.zeros((2, 3, 4), np.uint8), np.zeros((3, 4)), np.zeros((3, 4), np.int64)]
)
def test_only_masks_are_encoded(mask):
    with pytest.raises(ValueError, match='a mask is'):
        encode_runs(mask)


def test_memory_is_a_few_times_the_mask():
    mask = rectangle((4000, 4000), slice(10, 3990), slice(10, 3990)).view(np.bool_)
    tracemalloc.start()
    try:
        decoded = decode_runs(encode_runs(mask), mask.shape)
        assert tracemalloc.get_traced_memory()[1] < 4 * mask.nbytes
    finally:
        tracemalloc.stop()
    assert (decoded == mask).all()
