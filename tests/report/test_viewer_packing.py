"""Packed volumes: each voxel that is kept stays where it was and what it was, within the size asked for."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.report.viewer import packed
from distilldsm.report.viewer.packing import EXACT_VALUES, KEPT_PERCENTILES, strides

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def opened(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


@st.composite
def geometries(draw) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape, and an affine with turned, mirrored and exchanged axes of unequal size."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    turned = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 99))).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turned * [draw(st.floats(0.2, 6.0)) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return shape, affine


@settings(max_examples=60, deadline=None)
@given(geometry=geometries(), limit=st.integers(1, 800), seed=st.integers(0, 5))
def test_every_voxel_that_is_kept_has_its_place_and_value(geometry, limit, seed):
    shape, affine = geometry
    labels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    stored = opened(packed(labels, affine, is_label=True, max_voxels=limit))
    assert np.prod(stored.shape) <= limit
    if labels.size <= limit:
        assert stored.shape == shape
    at = np.indices(stored.shape).reshape(3, -1)
    # The landmark's way: from the packed voxel to scanner mm, and from there to a voxel of the original.
    world = stored.affine[:3, :3] @ at + stored.affine[:3, 3:]
    original = np.linalg.solve(affine[:3, :3], world - affine[:3, 3:])
    assert np.abs(original - np.rint(original)).max() < 1e-3
    index = tuple(np.rint(original).astype(int))
    assert np.array_equal(np.asanyarray(stored.dataobj)[tuple(at)], labels[index])
    # No side loses more than a step.
    step = strides(shape, np.linalg.norm(affine[:3, :3], axis=0), limit)
    for axis in range(3):
        assert original[axis].min() < step[axis]
        assert original[axis].max() > shape[axis] - 1 - step[axis]


def test_an_image_and_its_masks_stay_on_one_grid():
    volume = np.random.default_rng(0).normal(size=(31, 17, 23))
    image = opened(packed(volume, AFFINE, is_label=False, max_voxels=900))
    mask = opened(packed(volume > 0, AFFINE, is_label=True, max_voxels=900))
    assert image.shape == mask.shape
    assert np.array_equal(image.affine, mask.affine)
    # Along the finest axis first: 1 mm becomes 3 mm, 2 mm becomes 4, 3 becomes 6.
    assert (np.diag(image.affine)[:3] / [1, 2, 3]).tolist() == [4.0, 2.0, 2.0]


def test_whole_numbers_of_a_ct_are_kept_exactly():
    volume = np.random.default_rng(0).integers(-1024, 2000, (12, 11, 10))
    stored = opened(packed(volume, AFFINE, is_label=False, max_voxels=10**6))
    low, high = np.percentile(volume, KEPT_PERCENTILES)
    assert stored.get_data_dtype() == np.int16
    assert np.array_equal(stored.get_fdata(), np.clip(volume, np.floor(low), np.ceil(high)))
    bytes_ = opened(packed(volume // 20, AFFINE, is_label=False, max_voxels=10**6))
    assert bytes_.get_data_dtype() == np.uint8
    assert np.unique(np.diff(np.unique(bytes_.get_fdata()))).tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_other_intensities_are_rounded_within_the_window(scale):
    volume = np.random.default_rng(0).normal(3, 1, (14, 13, 12)) * scale
    stored = opened(packed(volume, AFFINE, is_label=False, max_voxels=10**6))
    low, high = np.percentile(volume, KEPT_PERCENTILES)
    assert stored.get_data_dtype() == np.uint8
    assert np.abs(stored.get_fdata() - np.clip(volume, low, high)).max() <= (high - low) / 255 * 0.51
    shown = float(stored.header["cal_min"]), float(stored.header["cal_max"])
    assert np.allclose(shown, np.percentile(volume, [1, 99]))


def test_whole_numbers_of_too_wide_a_range_are_rounded():
    volume = np.arange(3 * EXACT_VALUES).reshape(3, 64, 64)
    stored = opened(packed(volume, AFFINE, is_label=False, max_voxels=10**6))
    assert stored.get_data_dtype() == np.uint8
    assert np.abs(stored.get_fdata() - volume).max() < 3 * EXACT_VALUES / 255


def test_odd_volumes():
    constant = opened(packed(np.full((3, 3, 3), 7.5), AFFINE, is_label=False, max_voxels=100))
    assert np.array_equal(constant.get_fdata(), np.full((3, 3, 3), 7.5))
    sparse = np.zeros((20, 20, 20))
    sparse[0, 0, 0] = 4.0
    stored = opened(packed(sparse, AFFINE, is_label=False, max_voxels=10**4))
    assert np.allclose(stored.get_fdata(), sparse)
    assert (float(stored.header["cal_min"]), float(stored.header["cal_max"])) == (0.0, 4.0)
    broken = np.ones((4, 4, 4))
    broken[0, 0, 0], broken[1, 1, 1] = np.nan, np.inf
    assert np.isfinite(opened(packed(broken, AFFINE, is_label=False, max_voxels=100)).get_fdata()).all()


def test_the_same_volume_gives_the_same_bytes():
    volume = np.random.default_rng(0).normal(size=(9, 8, 7))
    assert packed(volume, AFFINE, is_label=False, max_voxels=99) == packed(
        np.asfortranarray(volume), AFFINE, is_label=False, max_voxels=99
    )


@pytest.mark.parametrize(
    ("volume", "is_label", "limit"),
    [
        (np.zeros((2, 2)), False, 10),
        (np.zeros((2, 0, 2)), False, 10),
        (np.zeros((2, 2, 2)), False, 0),
        (np.full((2, 2, 2), 0.5), True, 10),
        (np.full((2, 2, 2), 256), True, 10),
        (np.full((2, 2, 2), -1), True, 10),
    ],
)
def test_what_cannot_be_packed_is_refused(volume, is_label, limit):
    with pytest.raises(ValueError):
        packed(volume, AFFINE, is_label=is_label, max_voxels=limit)
