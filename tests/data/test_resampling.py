"""Resampling slice by slice, against scipy over the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distilldsm.data.resampling import CubicSlices, LinearSlices, cubic_weights

SHAPES = st.tuples(*[st.integers(1, 15)] * 3)


def zoom(channel: np.ndarray, shape, order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
    return ndimage.zoom(channel, factors, order=order, mode="nearest", grid_mode=True, output=np.float32)


def whole(image: np.ndarray, shape, order: int, coarse: bool) -> np.ndarray:
    """The volume at once: in one step, or in plane and then linearly along the depth."""
    if not coarse:
        return np.stack([zoom(channel, shape, order) for channel in image])
    planes = [zoom(channel, (channel.shape[0], *shape[1:]), order) for channel in image]
    return np.stack([zoom(channel, shape, 1) for channel in planes])


@settings(deadline=None, max_examples=150)
@given(old=SHAPES, new=SHAPES, coarse=st.booleans(), seed=st.integers(0, 9))
def test_linear_slices_are_scipys_to_the_last_bit(old, new, coarse, seed):
    image = np.random.default_rng(seed).normal(size=(2, *old)).astype(np.float32)
    slices = LinearSlices(lambda k: image[:, k], old, new, coarse_slices=coarse)
    found = np.stack([slices(k) for k in range(new[0])], axis=1)
    np.testing.assert_array_equal(found, whole(image, new, 1, coarse))


@settings(deadline=None, max_examples=150)
@given(old=SHAPES, new=SHAPES, coarse=st.booleans(), seed=st.integers(0, 9))
def test_cubic_slices_are_scipys_to_float32(old, new, coarse, seed):
    image = np.random.default_rng(seed).normal(size=(2, *old)).astype(np.float32)
    slices = CubicSlices(lambda k: image[:, k], old, new, coarse_slices=coarse)
    found = np.stack([slices(k) for k in range(new[0])], axis=1)
    np.testing.assert_allclose(found, whole(image, new, 3, coarse), rtol=0, atol=2e-6)


@pytest.mark.parametrize("coarse", [False, True])
def test_a_slice_does_not_depend_on_which_others_are_asked_for(coarse):
    image = np.random.default_rng(0).normal(size=(1, 90, 6, 7)).astype(np.float32)
    reads: list[int] = []

    def read(k: int) -> np.ndarray:
        reads.append(k)
        return image[:, k]

    everything = CubicSlices(read, (90, 6, 7), (61, 9, 5), coarse_slices=coarse)
    expected = [everything(k) for k in range(61)]
    assert reads == sorted(set(reads)), "each input slice is read once, in order"
    for start in (0, 17, 60):
        fresh = CubicSlices(lambda k: image[:, k], (90, 6, 7), (61, 9, 5), coarse_slices=coarse)
        for k in range(start, 61):
            np.testing.assert_array_equal(fresh(k), expected[k])


def test_weights_keep_constants_and_straight_lines():
    for index in range(20, 60):
        samples, weights = cubic_weights(index, 100, 77)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (samples * weights).sum() == pytest.approx((index + 0.5) * 100 / 77 - 0.5, abs=1e-6)
