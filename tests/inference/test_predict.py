"""From a scan to a mask on the scan's own grid: whatever the pieces, the labels of the whole volume at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import DataError
from distilldsm.data.dataset import Channel as PlanChannel
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.inference.engines import OnnxEngine, OpenVINOEngine
from distilldsm.inference.loading import load_exported, load_trained
from distilldsm.inference.predict import Predictor
from distilldsm.inference.probabilities import Ensemble, Member
from distilldsm.inference.windows import Pieces
from tests.data.volumes import affine, ellipsoid
from tests.export.fake import exported
from tests.inference.engines import (
    HALO,
    ORIENTATIONS,
    PLAN,
    THREE,
    Function,
    at_once,
    in_pieces,
    neighbours,
    stored,
    threshold,
)

WHOLE = Pieces(window=1000)


def bright(scan, plan: Plan = PLAN) -> np.ndarray:
    engine = Function(threshold, stride=(1, 16, 16), depth_halo=0)
    return in_pieces(engine, scan, plan, Pieces(window=5)).mask


@settings(deadline=None, max_examples=40)
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
    mask = bright(stored(data, matrix), plan)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, 7 * (data[0] > 0.5))


def test_resampled_masks_keep_place_and_size():
    shape = (40, 30, 12)
    body = ellipsoid(shape, np.array([22.0, 13.0, 6.0]), np.array([9.0, 8.0, 4.0]))
    data = np.where(body, 1.0, 0.01).astype(np.float32)[None]
    mask = bright(stored(data, affine("LPS", (0.7, 1.3, 2.5))))
    assert mask.shape == shape
    both = ((mask == 7) & body).sum()
    assert 2 * both / ((mask == 7).sum() + body.sum()) > 0.93
    assert not bright(stored(np.zeros((1, 5, 6, 7), np.float32), affine())).any(), "an empty scan, an empty mask"


@settings(deadline=None, max_examples=60)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    channels=st.integers(1, 2),
    depth_axis=st.sampled_from("xyz"),
    target=st.sampled_from([(1.0, 1.0, 1.0), (2.5, 0.8, 0.7), (0.6, 1.7, 1.0), (0.45, 1.0, 1.3)]),
    coarse=st.booleans(),
    crop=st.booleans(),
    scheme=st.sampled_from(["none", "zscore", "zscore_foreground", "ct"]),
    window=st.integers(2 * HALO + 1, 12),
    integers=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pieces_give_the_labels_of_the_whole_volume(
    codes, shape, channels, depth_axis, target, coarse, crop, scheme, window, integers, seed
):
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 50, size=(channels, *shape)) * rng.choice([0, 1], size=(channels, *shape), p=(0.4, 0.6))
    data = np.rint(data).astype(np.int16) if integers else data.astype(np.float32)
    plan = replace(
        THREE,
        channels=tuple(PlanChannel(name=f"T{k}", modality="MRI") for k in range(channels)),
        normalisation=(Normalisation(scheme=scheme, low=-60, high=70, mean=5, sd=30),) * channels,
        depth_axis=depth_axis,
        target_spacing_mm=target,
        coarse_slices=coarse,
        crop_to_nonzero=crop,
    )
    scan = stored(data, affine(codes, (1.0, 0.9, 1.2)))
    expected = at_once(Function(neighbours), scan, plan)
    found = in_pieces(Function(neighbours), scan, plan, Pieces(window=window))
    np.testing.assert_array_equal(found.mask, expected)
    voxel_ml = 0.9 * 1.2 / 1000
    for name, value in (("a", 7), ("b", 3)):
        assert found.volumes_ml[name] == pytest.approx(voxel_ml * (expected == value).sum(), abs=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda d, n: OnnxEngine(d / "model.onnx", n), lambda d, n: OpenVINOEngine(d / "model.xml", n, fixed_size=True)],
)
def test_the_real_network_in_pieces(make, tmp_path_factory):
    made = exported(tmp_path_factory)
    plan = replace(Plan.load(made.export / "plan.json"), depth_axis="z", target_spacing_mm=(2.0, 1.0, 1.1))
    data = np.random.default_rng(0).normal(100, 40, size=(2, 20, 23, 75)).astype(np.float32)
    scan = stored(data, affine("LPS", (1.0, 1.0, 1.5)))
    engine = make(made.export, load_exported(made.export).described[0])
    whole = in_pieces(engine, scan, plan, WHOLE)
    assert len(np.unique(whole.mask)) > 1, "a mask of one label would make any comparison pass"
    np.testing.assert_array_equal(whole.mask, at_once(engine, scan, plan))
    streamed = [Pieces(window=8, streamed=True)] if isinstance(engine, OpenVINOEngine) else []
    for pieces in (Pieces(window=20), *streamed):
        found = in_pieces(engine, scan, plan, pieces)
        np.testing.assert_array_equal(found.mask, whole.mask)
        assert (found.volumes_ml, found.exact) == (whole.volumes_ml, True)
        assert found.count > whole.count == 1


def test_probabilities_are_those_that_the_labels_were_chosen_by():
    data = np.random.default_rng(0).normal(size=(1, 9, 8, 12)).astype(np.float32)
    data[:, :2] = 0
    plan = replace(THREE, target_spacing_mm=(1.5, 1, 1))
    scan = stored(data, affine("SRP"))
    maps, exact = np.zeros((9, 8, 12, 3), dtype=np.uint8), np.zeros((9, 8, 12, 3), dtype=np.float32)
    mask = in_pieces(Function(neighbours), scan, plan, Pieces(window=6), probabilities=maps).mask
    in_pieces(Function(neighbours), scan, plan, Pieces(window=6), probabilities=exact)
    np.testing.assert_array_equal(maps, np.rint(exact * 255))
    np.testing.assert_allclose(exact.sum(axis=-1), 1, atol=1e-6)
    assert (maps[:2] == (255, 0, 0)).all(), "what is cropped away is background"
    chosen = np.take_along_axis(exact, np.array([0, 0, 0, 2, 0, 0, 0, 1])[mask][..., None], axis=-1)[..., 0]
    assert (chosen == exact.max(axis=-1)).all()


def test_only_pieces_are_ever_in_memory():
    """The engine sees windows, never the depth of the volume."""
    engine = Function(neighbours)
    data = np.random.default_rng(0).normal(size=(1, 8, 8, 200)).astype(np.float32)
    in_pieces(engine, stored(data, affine()), replace(THREE, target_spacing_mm=(2.0, 1, 1)), Pieces(window=10))
    assert {shape[2] for shape in engine.shapes} == {10}


def test_what_makes_no_mask():
    data = np.full((1, 5, 6, 7), 3e38, dtype=np.float32)
    with pytest.raises(DataError, match=r"scan.nii: the network's outputs are not finite"), np.errstate(all="ignore"):
        in_pieces(Function(neighbours), stored(data, affine()), replace(THREE, target_spacing_mm=(3, 1, 1)), WHOLE)
    far = stored(data, affine("RAS", (30.0, 30.0, 70.0)))
    with pytest.raises(DataError, match="another order of size"):
        in_pieces(Function(neighbours), far, THREE, WHOLE)
    with pytest.raises(DataError, match="cannot be streamed"):
        in_pieces(Function(neighbours), stored(0 * data, affine()), THREE, Pieces(window=8, streamed=True))


def test_without_a_budget_pieces_are_no_larger_than_is_worth_while():
    engine = Function(neighbours)
    scan = stored(np.random.default_rng(0).normal(size=(1, 8, 8, 40)).astype(np.float32), affine())
    plan = replace(THREE, target_spacing_mm=(1.0, 1.0, 1.0))
    predictor = Predictor(Ensemble([Member(engine)]), plan, max_voxels=9 * 64)
    found = predictor.predict(scan)
    assert (found.pieces.window, found.count) == (9, 8)
    assert predictor.predict(scan, memory=10**12).count == 1
    with pytest.raises(DataError, match="needs more memory than allowed"):
        predictor.predict(scan, memory=10**8)
    image = np.random.default_rng(0).normal(size=(1, 40, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(predictor.logits(image), neighbours(image[None])[0])


def test_from_training_and_export_agree(tmp_path_factory, tmp_path):
    made = exported(tmp_path_factory)
    trained = load_trained(made.model, device="auto")
    for runtime in ("openvino", "onnx", "torch"):
        shipped = load_exported(made.export, runtime=runtime)
        assert shipped.plan == trained.plan
        assert shipped.described == trained.described
        engine = shipped.network.members[0].engine
        assert (engine.stride, engine.depth_halo) == ((1, 1, 1), 8)
    with pytest.raises(DataError, match=r"best\.safetensors: checkpoint not found"):
        load_trained(made.model, "best")
    with pytest.raises(DataError, match="is not an exported model"):
        load_exported(tmp_path)
