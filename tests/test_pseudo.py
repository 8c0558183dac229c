"""Which pixels of a teacher are kept."""

import numpy as np

from pseudo import class_cutoffs


def test_one_threshold_for_all(tiny):
    masks = np.zeros((1, 2, 2), np.uint8)
    cutoffs = class_cutoffs(masks, masks, tiny.model_copy(update={'pseudo_threshold': 0.8}))
    assert cutoffs.tolist() == [204] * 11


def test_a_share_of_each_class_is_kept_the_surest(tiny):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (4, 64, 64), np.uint8)
    sure = np.where(masks == 1, rng.integers(30, 90, masks.shape), rng.integers(100, 255, masks.shape))
    cutoffs = class_cutoffs(masks, sure.astype(np.uint8), tiny.model_copy(update={'pseudo_keep': 0.25}))
    for k in range(3):
        own = sure[masks == k]
        assert 0.25 <= (own >= cutoffs[k]).mean() < 0.29
    assert cutoffs[1] < 90 < cutoffs[0]


def test_everything_is_kept_with_a_share_of_one(tiny):
    masks = np.zeros((1, 8, 8), np.uint8)
    sure = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert class_cutoffs(masks, sure, tiny.model_copy(update={'pseudo_keep': 1.0}))[0] == 0
