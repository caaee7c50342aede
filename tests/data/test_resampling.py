"""Resampling slice by slice, against scipy over the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distilldsm.data.resampling import ResampledSlices, cubic_weights, low_pass

SHAPES = st.tuples(*[st.integers(1, 15)] * 3)


def zoom(channel: np.ndarray, shape, order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
    return ndimage.zoom(channel, factors, order=order, mode="nearest", grid_mode=True, output=np.float32)


def blurred(channel: np.ndarray, shape) -> np.ndarray:
    """The voxels' point spread, widened to that of the new voxels where they are larger."""
    factors = [max(old / new, 1.0) for old, new in zip(channel.shape, shape, strict=True)]
    sds = [np.sqrt(f * f - 1) / 2.3548200450309493 for f in factors]
    radii = [int(np.ceil(4 * sd)) for sd in sds]
    sds = [sd if sd >= 0.2 else 0.0 for sd in sds]
    return ndimage.gaussian_filter(channel.astype(np.float64), sds, mode="nearest", radius=radii)


def whole(image: np.ndarray, shape, order: int, coarse: bool) -> np.ndarray:
    """The volume at once: in one step, or in plane and then linearly along the depth."""
    image = np.stack([blurred(channel, shape) for channel in image])
    if not coarse:
        return np.stack([zoom(channel, shape, order) for channel in image])
    planes = [zoom(channel, (channel.shape[0], *shape[1:]), order) for channel in image]
    return np.stack([zoom(channel, shape, 1) for channel in planes])


@settings(deadline=None, max_examples=100)
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


@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_what_is_finer_than_the_new_voxels_vanishes(factor):
    """Alternating stripes have no mean to show; without the low-pass they would become a slow false wave."""
    stripes = np.tile(np.array([1.0, -1.0], dtype=np.float32), 60)
    image = np.broadcast_to(stripes[:, None, None], (120, 2, 2))[None].copy()
    new = (round(120 / factor), 2, 2)
    slices = ResampledSlices(lambda k: image[:, k], image.shape[1:], new, order=3, coarse_slices=False)
    found = np.array([slices(k)[0, 0, 0] for k in range(4, new[0] - 4)])
    assert np.abs(found).max() < {1.5: 0.45, 2.0: 0.11, 4.0: 1e-4}[factor]


def test_a_large_structure_keeps_its_place_and_height():
    ramp = np.arange(120, dtype=np.float32)
    image = np.broadcast_to(ramp[:, None, None], (120, 2, 2))[None].copy()
    slices = ResampledSlices(lambda k: image[:, k], image.shape[1:], (50, 2, 2), order=3, coarse_slices=False)
    found = [slices(k)[0, 0, 0] for k in range(10, 40)]
    assert found == pytest.approx([(k + 0.5) * 2.4 - 0.5 for k in range(10, 40)], abs=1e-4)


def test_no_low_pass_where_voxels_become_smaller():
    assert low_pass(100, 100).tolist() == low_pass(100, 130).tolist() == low_pass(100, 99).tolist() == [1.0]
    assert low_pass(100, 50).sum() == pytest.approx(1)
