"""Whole volumes through a network: padding, and depth chunks that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.data.targets import softmax
from distilldsm.inference.windows import predict_logits
from tests.export.fake import CHANNELS, CLASSES, random_network


class DoubleEngine:
    """A network in float64, so that a difference is a difference and no rounding; notes what it was given."""

    def __init__(self, network) -> None:
        self.network = network.double()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, image):
        self.shapes.append(image.shape)
        with torch.inference_mode():
            return self.network(torch.from_numpy(np.ascontiguousarray(image)).double()).numpy()


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(CHANNELS, *shape)).astype(np.float32)


@pytest.mark.parametrize(("name", "options"), [("distill_dsm", {"alpha": 1.0}), ("residual_dsm", {}), ("unet2d", {})])
def test_chunks_with_the_halo_change_nothing_and_with_less_they_do(name, options):
    engine = DoubleEngine(random_network(name, width=0.25, **options))
    halo = engine.network.depth_halo
    assert halo == (0 if name == "unet2d" else 8)
    image = volume(40, 16, 16)
    chunk = {"stride": engine.network.stride, "max_voxels": (6 + 2 * halo) * 16 * 16}
    whole = predict_logits(engine, image, stride=engine.network.stride, depth_halo=halo)
    assert len(engine.shapes) == 1
    chunked = predict_logits(engine, image, depth_halo=halo, **chunk)
    assert max(shape[2] for shape in engine.shapes[1:]) == 6 + 2 * halo
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-11)
    if halo:
        short = predict_logits(engine, image, depth_halo=halo - 1, **chunk)
        assert np.abs(short - whole).max() > 1e-9, "a slice at the halo's end takes part in the logits"


def test_in_plane_sizes_are_padded_around_and_cut_back():
    engine = DoubleEngine(random_network("distill_dsm", width=0.25))
    image = volume(3, 19, 30)
    found = predict_logits(engine, image, stride=(1, 16, 16), depth_halo=8)
    assert engine.shapes == [(1, CHANNELS, 3, 32, 32)]
    padded = np.zeros((CHANNELS, 3, 32, 32), dtype=np.float32)
    padded[:, :, 6:25, 1:31] = image
    np.testing.assert_array_equal(found, engine(padded[None])[0, :, :, 6:25, 1:31])


def test_a_network_of_unbounded_reach_gets_whole_strides():
    engine = DoubleEngine(random_network("unet3d", base_width=2))
    image = volume(150, 16, 16)
    found = predict_logits(engine, image, stride=(16, 16, 16), depth_halo=None, max_voxels=96 * 16 * 16)
    assert found.shape == (CLASSES, 150, 16, 16)
    assert len(engine.shapes) > 1
    assert all(shape[2] % 16 == 0 and shape[2] <= 96 for shape in engine.shapes)


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    stride=st.tuples(*[st.integers(1, 6)] * 3),
    halo=st.integers(0, 4),
    slices=st.integers(1, 12),
)
def test_every_voxel_comes_back_at_its_place(shape, stride, halo, slices):
    """An engine that returns its input: whatever is padded and cut, the image comes back."""
    halo *= stride[0]
    in_plane = [-(-n // s) * s for n, s in zip(shape[1:], stride[1:], strict=True)]

    def engine(image):
        assert all(n % s == 0 for n, s in zip(image.shape[2:], stride, strict=True))
        return image

    image = volume(*shape)
    found = predict_logits(engine, image, stride=stride, depth_halo=halo, max_voxels=slices * in_plane[0] * in_plane[1])
    np.testing.assert_array_equal(found, image)


def test_softmax_sums_to_one_and_stands_large_values():
    logits = np.array([[1000.0, 0.0], [0.0, 0.0], [-1000.0, np.log(2)]], dtype=np.float32)
    np.testing.assert_allclose(softmax(logits), [[1, 0.25], [0, 0.25], [0, 0.5]], atol=1e-6)
