"""The confusion matrix against the organiser's way of counting, and IoU by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import class_iou, confusion_matrix, format_table, image_counts, mean_iou, pixel_accuracy

COUNTS = st.sampled_from([11, 15, 16, 255]) | st.integers(1, 255)  # of classes


def organisers_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int) -> np.ndarray:
    known = truth != 255
    codes = num_classes * truth[known].astype(np.int64) + pred[known]
    return np.bincount(codes, minlength=num_classes**2).reshape(num_classes, num_classes)


def test_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    pred = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    confusion = confusion_matrix(truth, pred, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(class_iou(confusion), [1 / 3, 2 / 3, 0, np.nan])
    assert mean_iou(confusion) == pytest.approx(1 / 3)  # the class that is nowhere does not count
    assert pixel_accuracy(confusion) == 3 / 5


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 40]), st.integers(0, 700))
def test_equals_the_organisers_on_noise_and_on_runs(num_classes, seed, run, size):
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(0, num_classes, size), run).astype(np.uint8)
    pred = np.repeat(rng.integers(0, num_classes, size), run).astype(np.uint8)
    truth[rng.random(truth.size) < rng.choice([0, 0.05])] = 255
    expected = organisers_matrix(truth, pred, num_classes)
    np.testing.assert_array_equal(confusion_matrix(truth, pred, num_classes), expected)
    np.testing.assert_array_equal(
        confusion_matrix(truth.astype(np.int64), pred.astype(np.int32), num_classes), expected
    )


def test_many_pixels_strided():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 11, (2, 5, 512, 512), np.uint8)[..., ::2]
    np.testing.assert_array_equal(confusion_matrix(truth, pred, 11), organisers_matrix(truth, pred, 11))


@pytest.mark.parametrize('num_classes', [11, 15, 16, 255])
def test_ids_that_are_no_class_are_refused(num_classes):
    for wrong in {num_classes, (num_classes + 13) % 255, 254} - {*range(num_classes), 255}:
        ids = np.zeros((4, 4), np.uint8)
        ids[2, 2] = wrong
        with pytest.raises(
            ValueError, match=f'truth has the class id {wrong}, expected 0 to {num_classes - 1}'
        ):
            confusion_matrix(ids, np.zeros_like(ids), num_classes)
        with pytest.raises(
            ValueError, match=f'pred has the class id {wrong}, expected 0 to {num_classes - 1}'
        ):
            confusion_matrix(np.zeros_like(ids), ids, num_classes)
    ignored = np.full((4, 4), 255, np.uint8)
    with pytest.raises(ValueError, match='pred has the class id 255'):
        confusion_matrix(ignored, ignored, num_classes)


@pytest.mark.parametrize('ids', [np.array([-1, 0]), np.array([256, 0]), np.array([0.0, 1.0])])
def test_other_arrays_are_refused(ids):
    with pytest.raises(ValueError, match='pred'):
        confusion_matrix(np.zeros(2, np.uint8), ids, 11)
    with pytest.raises(ValueError, match='shape'):
        confusion_matrix(np.zeros(3, np.uint8), ids, 11)


def test_nothing_to_score(recwarn):
    nothing = confusion_matrix(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8), 3)
    assert not nothing.any()
    assert math.isnan(mean_iou(nothing)) and math.isnan(pixel_accuracy(nothing))
    assert 'pixel accuracy 0.0' in format_table(image_counts(nothing)[None], ('a', 'b', 'c'))
    assert not len(recwarn)


def test_table():
    first = image_counts(np.array([[60, 20, 0], [0, 20, 0], [0, 0, 0]]))
    second = image_counts(np.array([[20, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert format_table(np.stack([first, second]), ('Background', 'Paper', 'Glass')).splitlines() == [
        'class          IoU        pixels   share  images',
        'Background  0.8000           100  83.33%       2',
        'Paper       0.5000            20  16.67%       1',
        'Glass            -             0   0.00%       0',
        'pixel accuracy 0.8333',
    ]
