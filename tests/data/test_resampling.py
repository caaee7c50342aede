"""Resampling slice by slice, against scipy over the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distilldsm.data.resampling import ResampledSlices, cubic_weights

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


@settings(deadline=None, max_examples=250)
@given(old=SHAPES, new=SHAPES, order=st.sampled_from((1, 3)), coarse=st.booleans(), seed=st.integers(0, 9))
def test_slices_are_scipys_to_float32(old, new, order, coarse, seed):
    image = np.random.default_rng(seed).normal(size=(2, *old)).astype(np.float32)
    slices = ResampledSlices(lambda k: image[:, k], old, new, order=order, coarse_slices=coarse)
    found = np.stack([slices(k) for k in range(new[0])], axis=1)
    np.testing.assert_allclose(found, whole(image, new, order, coarse), rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_slice_does_not_depend_on_which_others_are_asked_for(order, coarse):
    image = np.random.default_rng(0).normal(size=(1, 90, 6, 7)).astype(np.float32)
    reads: list[int] = []

    def read(k: int) -> np.ndarray:
        reads.append(k)
        return image[:, k]

    def slices() -> ResampledSlices:
        return ResampledSlices(read, (90, 6, 7), (61, 9, 5), order=order, coarse_slices=coarse)

    everything = slices()
    expected = [everything(k) for k in range(61)]
    assert reads == sorted(set(reads)), "each input slice is read once, in order"
    for k in (0, 17, 18, 60):
        reads.clear()
        alone = slices()
        np.testing.assert_array_equal(alone(k), expected[k])
        assert reads == list(alone.needed(k))


def test_weights_keep_constants_and_straight_lines():
    for index in range(20, 60):
        samples, weights = (np.array(part) for part in cubic_weights(index, 100, 77))
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (samples * weights).sum() == pytest.approx((index + 0.5) * 100 / 77 - 0.5, abs=1e-6)
