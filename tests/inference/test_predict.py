"""From a scan to a mask on the scan's own grid, with an engine whose right answer is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import DataError
from distilldsm.data.dataset import Channel
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.inference.predict import NetworkGeometry, Predictor
from distilldsm.io import Volume
from tests.data.volumes import affine, ellipsoid
from tests.export.fake import exported

ORIENTATIONS = [
    "".join(axis[sign] for axis, sign in zip(order, signs, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for signs in product((0, 1), repeat=3)
]

PLAN = Plan(
    name="threshold",
    channels=(Channel(name="T", modality="MRI"),),
    normalisation=(Normalisation(scheme="none"),),
    class_names=("background", "bright"),
    class_values=(0, 7),
    depth_axis="z",
    target_spacing_mm=(3.0, 1.0, 2.0),
    crop_to_nonzero=True,
    coarse_slices=False,
    patch_size=(8, 16, 16),
    batch_size=2,
    median_shape=(8, 16, 16),
    training_memory_gb=1.0,
    reasons={},
)


def threshold(image: np.ndarray) -> np.ndarray:
    """Bright where the image is above one half."""
    return np.concatenate([0.5 - image, image - 0.5], axis=1).astype(np.float32)


def predictor(plan: Plan = PLAN) -> Predictor:
    return Predictor(threshold, plan, NetworkGeometry(stride=(1, 16, 16), depth_halo=0), max_voxels=5 * 32 * 32)


@settings(deadline=None, max_examples=60)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(3, 14)] * 3),
    depth_axis=st.sampled_from("xyz"),
    seed=st.integers(0, 9),
)
def test_on_the_plans_grid_the_mask_is_exact_in_every_orientation(codes, shape, depth_axis, seed):
    spacing_ras = {"R": 1.0, "L": 1.0, "A": 2.0, "P": 2.0, "S": 3.0, "I": 3.0}
    matrix = affine(codes, tuple(spacing_ras[c] for c in codes))
    rest = [a for a in "xyz" if a != depth_axis]
    by_axis = {"x": 1.0, "y": 2.0, "z": 3.0}
    target = (by_axis[depth_axis], by_axis[rest[0]], by_axis[rest[1]])
    plan = replace(PLAN, depth_axis=depth_axis, target_spacing_mm=target)
    data = np.random.default_rng(seed).choice([0.0, 0.2, 1.0], size=(1, *shape), p=(0.5, 0.2, 0.3)).astype(np.float32)
    mask = predictor(plan).predict(Volume(data, matrix, Path("scan.nii")))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, 7 * (data[0] > 0.5))


def test_resampled_masks_keep_place_and_size():
    shape = (40, 30, 12)
    body = ellipsoid(shape, np.array([22.0, 13.0, 6.0]), np.array([9.0, 8.0, 4.0]))
    data = np.where(body, 1.0, 0.01).astype(np.float32)[None]
    mask = predictor().predict(Volume(data, affine("LPS", (0.7, 1.3, 2.5)), Path("scan.nii")))
    assert mask.shape == shape
    both = ((mask == 7) & body).sum()
    assert 2 * both / ((mask == 7).sum() + body.sum()) > 0.93


def test_an_empty_scan_gives_an_empty_mask():
    mask = predictor().predict(Volume(np.zeros((1, 5, 6, 7), np.float32), affine(), Path("scan.nii")))
    assert mask.shape == (5, 6, 7)
    assert not mask.any()


def test_from_training_and_export_agree_on_plan_and_geometry(tmp_path_factory):
    made = exported(tmp_path_factory)
    trained = Predictor.from_training(made.model, device="auto")
    for runtime in ("openvino", "onnx"):
        shipped = Predictor.from_export(made.export, runtime=runtime)
        assert shipped.plan == trained.plan
        assert shipped.geometry == trained.geometry == NetworkGeometry(stride=(1, 16, 16), depth_halo=8)


def test_what_is_missing_is_named(tmp_path, tmp_path_factory):
    with pytest.raises(DataError, match=r"best\.safetensors: checkpoint not found"):
        Predictor.from_training(exported(tmp_path_factory).model, "best")
    with pytest.raises(DataError, match="is no exported model"):
        Predictor.from_export(tmp_path)
