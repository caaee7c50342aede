"""The largest component: against SciPy's components of the whole mask, taken the obvious way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distilldsm.inference.postprocess import keep_largest


def obvious(mask: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """Every component by flooding from its first voxel; the first of the largest stays."""
    left, best = np.isin(mask, values), np.zeros(mask.shape, dtype=bool)
    while left.any():
        seed = np.zeros(mask.shape, dtype=bool)
        seed[np.unravel_index(left.argmax(), mask.shape)] = True
        component = ndimage.binary_propagation(seed, np.ones((3, 3, 3)), mask=left)
        if component.sum() > best.sum():
            best = component
        left &= ~component
    return np.where(np.isin(mask, values) & ~best, 0, mask)


@settings(deadline=None, max_examples=200)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    share=st.floats(0, 0.6),
    order=st.sampled_from("CF"),
    values=st.sampled_from([(7,), (3, 7), (7, 5)]),
    seed=st.integers(0, 10**6),
)
def test_only_the_largest_component_of_a_label_or_of_several_stays(shape, share, order, values, seed):
    rng = np.random.default_rng(seed)
    mask = np.array(rng.choice([0, 3, 7], size=shape, p=(1 - share, share / 2, share / 2)), dtype=np.uint8, order=order)
    before = mask.copy()
    expected = obvious(before, values)
    gone, counts = np.unique(before[before != expected], return_counts=True)
    assert keep_largest(mask, values) == dict(zip(gone.tolist(), counts.tolist(), strict=True))
    np.testing.assert_array_equal(mask, expected)
    assert keep_largest(mask, values) == {}, "once is enough"
    assert keep_largest(mask, (5,)) == {}


@pytest.mark.parametrize("order", ["C", "F"])
def test_of_equal_components_the_first_stays(order):
    mask = np.zeros((5, 5, 5), dtype=np.uint8, order=order)
    mask[0, 4, 4] = mask[4, 0, 0] = mask[2, 0, 2] = 1
    assert keep_largest(mask, [1]) == {1: 2}
    assert np.argwhere(mask).tolist() == [[0, 4, 4]]


def test_voxels_that_share_a_corner_are_connected():
    mask = np.zeros((3, 3, 3), dtype=np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = 1
    assert keep_largest(mask, [1]) == {}


def test_more_components_than_a_slice_has_voxels():
    mask = np.zeros((40, 2, 2), dtype=np.uint8)
    mask[::2, 0, 0] = 1
    mask[20, 1, 1] = 1
    assert keep_largest(mask, [1]) == {1: 19}
    assert np.argwhere(mask).tolist() == [[20, 0, 0], [20, 1, 1]]
