"""In pieces along the depth: the same labels, to the last voxel, as from the whole volume at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import DataError
from distilldsm.data.dataset import Channel as PlanChannel
from distilldsm.data.geometry import scores_to_scan, to_network_space
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.targets import softmax
from distilldsm.inference.engines import OnnxEngine, OpenVINOEngine
from distilldsm.inference.predict import Predictor
from distilldsm.inference.scores import Member, Scorer
from distilldsm.inference.streaming import NetworkImage, blend_tiles, depth_windows, predict_scan, tile_starts
from distilldsm.inference.windows import predict_logits
from distilldsm.io import Channel, Scan, Volume
from tests.data.volumes import affine
from tests.export.fake import exported
from tests.inference.test_predict import PLAN

ORIENTATIONS = [
    "".join(axis[sign] for axis, sign in zip(order, signs, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for signs in product((0, 1), repeat=3)
]
HALO = 2


def neighbours(image: np.ndarray) -> np.ndarray:
    """Three classes; a slice's logits depend on HALO slices to each side, zeros beyond the volume. Exact in pieces."""
    mean = image.mean(axis=1, keepdims=True).astype(np.float64)
    logits = [np.zeros_like(mean) for _ in range(3)]
    for k, weight in zip(range(-HALO, HALO + 1), (0.2, 0.4, 1.0, -0.3, 0.1), strict=True):
        moved = np.zeros_like(mean)
        depth = mean.shape[2]
        moved[:, :, max(-k, 0) : depth - max(k, 0)] = mean[:, :, max(k, 0) : depth - max(-k, 0)]
        logits[1] += weight * moved
        logits[2] -= weight**2 * moved
    return np.concatenate(logits, axis=1).astype(np.float32)


def stored(data: np.ndarray, matrix: np.ndarray) -> Scan:
    """(C, X, Y, Z) as the reader leaves it."""
    return Scan(tuple(Channel(np.asfortranarray(channel)) for channel in data), matrix, Path("scan.nii"), None)


def in_pieces(engine, scan: Scan, plan: Plan, *, window: int, stride=(1, 4, 4), halo: int | None = HALO, **options):
    mask = np.zeros(scan.shape, dtype=np.uint8, order="F")
    image = NetworkImage(scan, plan)
    depth = -(-image.shape[0] // stride[0]) * stride[0]
    scorer = engine if isinstance(engine, Scorer) else Scorer([Member(engine)])
    counts = predict_scan(
        scorer, image, plan, mask, stride=stride, depth_halo=halo, window=min(window, depth), **options
    )
    return mask, counts


@settings(deadline=None, max_examples=150)
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
    if integers:
        data = np.rint(data).astype(np.int16)
    plan = replace(
        PLAN,
        channels=tuple(PlanChannel(name=f"T{k}", modality="MRI") for k in range(channels)),
        normalisation=(Normalisation(scheme=scheme, low=-60, high=70, mean=5, sd=30),) * channels,
        class_names=("background", "a", "b"),
        class_values=(0, 7, 3),
        depth_axis=depth_axis,
        target_spacing_mm=target,
        coarse_slices=coarse,
        crop_to_nonzero=crop,
    )
    matrix = affine(codes, (1.0, 0.9, 1.2))
    data = data if integers else data.astype(np.float32)

    # The whole volume at once, by the functions that training and evaluation use.
    array, record = to_network_space(Volume(data.astype(np.float32), matrix, Path("scan.nii")), plan)
    logits = predict_logits(neighbours, array, stride=(1, 4, 4), depth_halo=HALO, max_voxels=10**9)
    classes = scores_to_scan(softmax(logits), record, plan.targets)
    expected = np.array(plan.class_values, dtype=np.uint8)[classes]

    found, counts = in_pieces(neighbours, stored(data, matrix), plan, window=window)
    np.testing.assert_array_equal(found, expected)
    assert counts.tolist() == [int((expected == v).sum()) for v in plan.class_values]


@settings(deadline=None, max_examples=300)
@given(
    depth=st.integers(1, 60), size=st.integers(1, 70), halo=st.one_of(st.none(), st.integers(0, 9)), k=st.integers(1, 4)
)
def test_windows_cover_each_slice_once_with_its_halo(depth, size, halo, k):
    if halo is None:
        depth, stride = depth * k, k
    else:
        stride = 1
        size = max(size, 2 * halo + 1)
    windows = depth_windows(depth, size, halo, stride)
    assert [s for w in windows for s in range(w.start, w.stop)] == list(range(depth))
    for w in windows:
        assert 0 <= w.low <= w.start < w.stop <= w.high <= depth
        if halo is not None:
            assert w.high - w.low == min(size, depth), "one size: a runtime needs one set of buffers"
            assert w.low == 0 or w.start - w.low >= halo
            assert w.high == depth or w.high - w.stop >= halo


@pytest.mark.parametrize(
    "make", [lambda d: OnnxEngine(d / "model.onnx"), lambda d: OpenVINOEngine(d / "model.xml", fixed_size=True)]
)
def test_the_real_network_in_pieces(make, tmp_path_factory):
    made = exported(tmp_path_factory)
    plan = Plan.load(made.export / "plan.json")
    rng = np.random.default_rng(0)
    data = rng.normal(100, 40, size=(2, 20, 23, 75)).astype(np.float32)
    matrix = affine("LPS", (1.0, 1.0, 1.5))
    plan = replace(plan, depth_axis="z", target_spacing_mm=(2.0, 1.0, 1.1))
    engine = make(made.export)
    whole, _ = in_pieces(engine, stored(data, matrix), plan, window=1000, stride=(1, 16, 16), halo=8)
    pieces, _ = in_pieces(engine, stored(data, matrix), plan, window=20, stride=(1, 16, 16), halo=8)
    assert len(np.unique(whole)) > 1, "a mask of one label would make any comparison pass"
    np.testing.assert_array_equal(pieces, whole)


def test_openvino_compiled_for_a_size_gives_the_same_logits(tmp_path_factory):
    path = exported(tmp_path_factory).export / "model.xml"
    free, fixed = OpenVINOEngine(path), OpenVINOEngine(path, fixed_size=True)
    for depth in (3, 17, 3):
        image = np.random.default_rng(depth).normal(size=(1, 2, depth, 32, 48)).astype(np.float32)
        np.testing.assert_array_equal(fixed(image), free(image))


def test_a_network_of_unbounded_reach_is_cut_as_before():
    """Each chunk's mean takes part in its logits, so any other way of cutting would show."""

    def engine(image):
        assert image.shape[2] % 16 == 0
        return np.concatenate([image - image.mean(), image.mean() - image], axis=1).astype(np.float32)

    data = np.random.default_rng(0).normal(size=(1, 5, 6, 150)).astype(np.float32)
    data[..., 90:] += 3
    plan = replace(PLAN, target_spacing_mm=(1.0, 1.0, 1.0), crop_to_nonzero=False)
    array, record = to_network_space(Volume(data, affine(), Path("scan.nii")), plan)
    logits = predict_logits(engine, array, stride=(16, 16, 16), depth_halo=None, max_voxels=96 * 16 * 16)
    expected = np.array(plan.class_values)[scores_to_scan(softmax(logits), record, plan.targets)]
    found, _ = in_pieces(engine, stored(data, affine()), plan, window=96, stride=(16, 16, 16), halo=None)
    np.testing.assert_array_equal(found, expected)


def test_probabilities_are_those_that_the_labels_were_chosen_by():
    data = np.random.default_rng(0).normal(size=(1, 9, 8, 12)).astype(np.float32)
    data[:, :2] = 0
    plan = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(1.5, 1, 1))
    matrix = affine("SRP", (1.0, 1.0, 1.0))
    maps = np.zeros((9, 8, 12, 3), dtype=np.uint8)
    mask, _ = in_pieces(neighbours, stored(data, matrix), plan, window=6, probabilities=maps)
    assert np.abs(maps.sum(axis=-1).astype(int) - 255).max() <= 1
    assert (maps[:2] == (255, 0, 0)).all(), "what is cropped away is background"
    chosen = np.take_along_axis(maps, np.array([0, 0, 0, 2, 0, 0, 0, 1])[mask][..., None], axis=-1)[..., 0]
    assert (chosen >= maps.max(axis=-1)).all()


def test_tiles_cover_the_slice_and_agree_where_the_network_looks_at_single_voxels():
    image = np.random.default_rng(0).normal(size=(1, 1, 3, 50, 37)).astype(np.float32)
    found = blend_tiles(lambda piece: np.concatenate([piece, -piece], axis=1), image, (16, 24))
    np.testing.assert_allclose(found, np.concatenate([image, -image], axis=1)[0], atol=1e-5)


@given(size=st.integers(1, 200), tile=st.integers(1, 64))
def test_tile_starts(size, tile):
    starts = tile_starts(size, tile)
    assert starts[0] == 0
    assert starts[-1] == max(size - tile, 0)
    assert all(0 < b - a <= tile for a, b in pairwise(starts))


def test_only_pieces_are_ever_in_memory():
    """The engine sees windows, never the depth of the volume; scores are dropped as soon as they are used."""
    sizes = []

    def engine(image):
        sizes.append(image.shape[2])
        return neighbours(image)

    data = np.random.default_rng(0).normal(size=(1, 8, 8, 200)).astype(np.float32)
    plan = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(2.0, 1, 1))
    in_pieces(engine, stored(data, affine()), plan, window=10)
    assert set(sizes) == {10}


def test_predictor_and_stream_agree(tmp_path_factory):
    made = exported(tmp_path_factory)
    predictor = Predictor.from_export(made.export)
    data = np.random.default_rng(3).normal(100, 40, size=(2, 12, 20, 18)).astype(np.float32)
    matrix = affine("LPS", (1.3, 1.1, 1.0))
    expected = predictor.predict(Volume(data, matrix, Path("scan.nii")))
    found, _ = in_pieces(
        predictor.engine, stored(data, matrix), predictor.plan, window=1000, stride=(1, 16, 16), halo=8
    )
    np.testing.assert_array_equal(found, expected)


def test_scores_that_are_not_finite_are_no_mask():
    data = np.full((1, 5, 6, 7), 3e38, dtype=np.float32)
    plan = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(3, 1, 1))
    with pytest.raises(DataError, match="not finite"), np.errstate(all="ignore"):
        in_pieces(neighbours, stored(data, affine()), plan, window=6)
