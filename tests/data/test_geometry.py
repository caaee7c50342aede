"""Into network space and back: nothing is moved, flipped or lost on the way."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the library's own convention
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.data.dataset import Channel
from distilldsm.data.geometry import (
    Normaliser,
    ScanMask,
    label_to_network_space,
    make_record,
    mask_of,
    nonzero_box,
    to_network_space,
)
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.resampling import ResampledSlices
from distilldsm.io.orientation import reorient
from distilldsm.io.scan import Channel as Stored
from distilldsm.io.scan import Scan
from tests.data.volumes import affine, ellipsoid

CODES = ["".join(c) for c in (("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R"), ("S", "R", "A"), ("A", "L", "I"))]


RAW = Normalisation(scheme="none")


def stored(data: np.ndarray, matrix: np.ndarray) -> Scan:
    """(C, X, Y, Z) as the reader leaves it."""
    channels = tuple(Stored(np.asfortranarray(channel, dtype=np.float32)) for channel in data)
    return Scan(channels, matrix, Path("x.nii"), None)


def normalise(image: np.ndarray, rules: list[Normalisation]) -> np.ndarray:
    """Each channel of (C, D, H, W), slice by slice."""
    pairs = [(Normaliser(rule, channel), channel) for rule, channel in zip(rules, image, strict=True)]
    return np.stack([[normaliser(plane) for plane in channel] for normaliser, channel in pairs])


def resample(array: np.ndarray, shape: tuple[int, int, int], *, order: int, coarse_slices: bool) -> np.ndarray:
    """(C, D, H, W) to another (D, H, W)."""
    slices = ResampledSlices(lambda k: array[:, k], array.shape[1:], shape, order=order, coarse_slices=coarse_slices)
    return np.stack([slices(k) for k in range(shape[0])], axis=1)


def make_plan(**changes) -> Plan:
    values = {
        "name": "test",
        "channels": (Channel(name="T1", modality="MRI"),),
        "normalisation": (Normalisation(scheme="none"),),
        "class_names": ("background", "one"),
        "class_values": (0, 1),
        "depth_axis": "z",
        "target_spacing_mm": (1.0, 1.0, 1.0),
        "crop_to_nonzero": False,
        "coarse_slices": False,
        "patch_size": (8, 16, 16),
        "batch_size": 2,
        "median_shape": (8, 16, 16),
        "training_memory_gb": 1.0,
        "reasons": {},
    }
    return Plan(**{**values, **changes})


@settings(deadline=None, max_examples=40)
@given(
    codes=st.sampled_from(CODES),
    depth_axis=st.sampled_from(["x", "y", "z"]),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
)
def test_the_way_back_undoes_orientation_and_crop_exactly(codes, depth_axis, shape):
    plan = make_plan(depth_axis=depth_axis, class_names=("a", "b", "c"), class_values=(0, 9, 4), crop_to_nonzero=True)
    labels = np.random.default_rng(0).choice([0, 9, 4], shape)
    image, record = to_network_space(stored(labels[None], affine(codes)), plan)
    maps = (image == np.array(plan.class_values)[:, None, None, None]).astype(np.float32)
    assert np.array_equal(mask_of(maps, record, plan), labels)
    restored = ScanMask(record, plan)
    for k in range(maps.shape[1]):  # in any pieces
        restored.add(k, [maps[:, k]])
    assert np.array_equal(restored.mask, labels)
    assert restored.counts.tolist() == [(labels == value).sum() for value in plan.class_values]
    with pytest.raises(ValueError, match="do not fit"):
        mask_of(maps[:, :-1], record, plan)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("depth_axis", ["x", "y", "z"])
def test_network_axes_are_scanner_axes(codes, depth_axis):
    """A voxel that is far to the right, in front, above, is so in every file orientation."""
    matrix = affine(codes)
    plan = make_plan(depth_axis=depth_axis)
    shape = (4, 5, 6)
    array = np.stack(
        [
            (nib.affines.apply_affine(matrix, np.indices(shape).reshape(3, -1).T)[:, axis]).reshape(shape)
            for axis in plan.axis_order
        ]
    )
    moved = reorient(array, matrix, plan.axis_order)
    for axis in range(3):
        assert (np.diff(moved[axis], axis=axis) > 0).all()


def world_centre(mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(matrix, np.argwhere(mask)).mean(axis=0)


@settings(deadline=None, max_examples=25)
@given(
    codes=st.sampled_from(CODES),
    depth_axis=st.sampled_from(["x", "y", "z"]),
    spacing=st.tuples(*[st.floats(0.6, 2.5)] * 3),
    target=st.tuples(*[st.floats(0.7, 2.0)] * 3),
    coarse=st.booleans(),
    crop=st.booleans(),
)
def test_a_mask_comes_back_where_it_was(codes, depth_axis, spacing, target, coarse, crop):
    """Through reorientation, crop and resampling and back: same place in mm, nearly the same voxels."""
    shape = (26, 30, 28)
    matrix = affine(codes, spacing)
    truth = ellipsoid(shape, np.array([13.0, 14.0, 15.0]), np.array([8.0, 9.0, 8.5]))
    image = np.zeros((1, *shape), dtype=np.float32)
    image[:, 2:-1, 3:-2, 1:-3] = 1
    plan = make_plan(depth_axis=depth_axis, target_spacing_mm=target, coarse_slices=coarse, crop_to_nonzero=crop)
    array, record = to_network_space(stored(image, matrix), plan)
    label = label_to_network_space(truth.astype(np.uint8), record, 2)
    assert array.shape[1:] == label.shape == record.resampled
    back = mask_of(np.stack([1.0 - label, label]).astype(np.float32), record, plan)
    assert back.shape == shape
    overlap = 2 * (truth & (back == 1)).sum() / (truth.sum() + (back == 1).sum())
    assert overlap > 0.85
    distance = np.abs(world_centre(back == 1, matrix) - world_centre(truth, matrix))
    assert (distance < 0.5 * max(*spacing, *target)).all()


def test_without_resampling_the_way_back_is_exact():
    shape = (7, 9, 8)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, shape).astype(np.uint8)
    image = np.ones((1, *shape), dtype=np.float32)
    for codes in CODES:
        plan = make_plan(depth_axis="x", class_names=("a", "b", "c"), class_values=(0, 1, 2))
        _, record = to_network_space(stored(image, affine(codes)), plan)
        label = label_to_network_space(truth, record, 3)
        maps = np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2)
        assert np.array_equal(mask_of(maps, record, plan), truth)


def test_resampling_agrees_with_simpleitk():
    """Linear resampling onto the same field of view, compared away from the border."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(20, 24, 22)).astype(np.float32)
    new = (20, 30, 33)  # not coarser: SimpleITK has no low-pass
    ours = resample(array[None], new, order=1, coarse_slices=False)[0]
    image = sitk.GetImageFromArray(array)
    spacing = [old / n for old, n in zip(array.shape[::-1], new[::-1], strict=True)]
    origin = [(s - 1) / 2 for s in spacing]
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(image, new[::-1], sitk.Transform(), sitk.sitkLinear, origin, spacing, image.GetDirection())
    )
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-4)


def test_cubic_resampling_keeps_a_smooth_function():
    x = np.linspace(0, 1, 40, endpoint=False) + 0.5 / 40
    wave = np.sin(2 * np.pi * x).astype(np.float32)
    finer = resample(np.tile(wave, (1, 4, 4, 1)), (4, 4, 100), order=3, coarse_slices=False)[0, 1, 1]
    expected = np.sin(2 * np.pi * (np.arange(100) + 0.5) / 100)
    assert np.abs(finer - expected)[12:-12].max() < 1e-3  # splines are exact away from the border


def test_coarse_slices_do_not_overshoot():
    """Between a dark and a bright slice, linear resampling along the depth stays between the two."""
    array = np.zeros((1, 6, 8, 8), dtype=np.float32)
    array[:, 3:] = 1
    linear = resample(array, (15, 8, 8), order=3, coarse_slices=True)
    cubic = resample(array, (15, 8, 8), order=3, coarse_slices=False)
    assert linear.min() >= -1e-6
    assert linear.max() <= 1 + 1e-6
    assert cubic.max() > 1.01


def test_nonzero_box():
    array = np.zeros((2, 5, 6, 7))
    plan = make_plan(crop_to_nonzero=True, channels=2 * make_plan().channels, normalisation=2 * (RAW,))
    for filled, start, stop in ((False, (0, 0, 0), (7, 5, 6)), (True, (3, 1, 2), (6, 4, 3))):
        if filled:
            array[0, 1, 2, 3] = 1
            array[1, 3, 2, 5] = -1
        _, record = to_network_space(stored(array, affine()), plan)
        assert (record.crop_start, record.crop_stop) == (start, stop)
        nonzero = array.any(axis=0)
        assert nonzero_box(nonzero, nonzero.shape) == tuple((box[1], box[2], box[0]) for box in (start, stop))


def test_normalisation_schemes():
    rng = np.random.default_rng(0)
    image = rng.normal(50, 10, (1, 4, 5, 6)).astype(np.float32)
    image[0, 0] = 0
    foreground = image[0] != 0
    z = normalise(image, [Normalisation(scheme="zscore")])[0]
    assert z[foreground].mean() == pytest.approx(0, abs=1e-5)
    assert z[foreground].std() == pytest.approx(1, abs=1e-5)
    assert (z[~foreground] < -3).all()
    masked = normalise(image, [Normalisation(scheme="zscore_foreground")])[0]
    assert (masked[~foreground] == 0).all()
    np.testing.assert_allclose(masked[foreground], z[foreground])
    ct = normalise(image, [Normalisation(scheme="ct", low=40, high=60, mean=50, sd=5)])[0]
    assert ct.min() == pytest.approx(-2)
    assert ct.max() == pytest.approx(2)
    assert np.array_equal(normalise(image, [Normalisation(scheme="none")]), image)
    constant = normalise(np.full((1, 2, 2, 2), 7, dtype=np.float32), [Normalisation(scheme="zscore")])
    assert np.isfinite(constant).all()


@pytest.mark.parametrize("scheme", ["zscore", "zscore_foreground"])
@pytest.mark.parametrize("value", [1.0, 1000.0, 1e-9])
def test_a_mask_as_a_channel_stays_small(scheme, value):
    mask = np.zeros((1, 4, 5, 6), dtype=np.float32)
    mask[:, 1:3] = value
    z = normalise(mask, [Normalisation(scheme=scheme)])[0]
    assert np.allclose(z[mask[0] > 0], 0, atol=1e-5)
    assert np.allclose(z[mask[0] == 0], -1 if scheme == "zscore" else 0)


def test_intensities_of_any_unit_are_normalised_alike():
    image = np.random.default_rng(0).normal(50, 10, (1, 4, 5, 6))
    wanted = normalise(image.astype(np.float32), [Normalisation(scheme="zscore")])
    for factor in (1e-12, 1e6):  # diffusivity in m²/s, counts
        scaled = normalise((image * factor).astype(np.float32), [Normalisation(scheme="zscore")])
        np.testing.assert_allclose(scaled, wanted, atol=1e-4)


@pytest.mark.parametrize("coarse", [False, True])
def test_resampled_labels_are_the_largest_of_their_maps(coarse):
    """Ties go to the smaller class, as with argmax over all maps at once."""
    classes = np.random.default_rng(0).integers(0, 5, (6, 8, 10)).astype(np.uint8)
    plan = make_plan(depth_axis="x", target_spacing_mm=(2.0, 0.5, 1.5), coarse_slices=coarse, crop_to_nonzero=False)
    record = make_record(np.eye(4), classes.shape, (0, 0, 0), classes.shape, plan)
    maps = [
        resample((classes[None] == k).astype(np.float32), record.resampled, order=1, coarse_slices=coarse)[0]
        for k in range(5)
    ]
    shares = np.zeros((4, *record.resampled), dtype=np.uint8)
    assert np.array_equal(label_to_network_space(classes, record, 5, shares=shares), np.argmax(maps, axis=0))
    np.testing.assert_allclose(shares / 255, maps[1:], atol=0.5 / 255 + 1e-6)


def test_shares_of_labels_that_are_not_resampled_are_zero_and_one():
    classes = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    plan = make_plan(depth_axis="x", target_spacing_mm=(1.0, 1.0, 1.0), crop_to_nonzero=False)
    record = make_record(np.eye(4), classes.shape, (0, 0, 0), classes.shape, plan)
    shares = np.zeros((2, *record.resampled), dtype=np.uint8)
    label = label_to_network_space(classes, record, 3, shares=shares)
    assert np.array_equal(shares, 255 * np.stack([label == 1, label == 2]))
