"""Windows, streams and tiles: what they cover, and images of any size through an engine."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.inference.windows import (
    UNBOUNDED_HALO,
    blend_tiles,
    depth_windows,
    predict_logits,
    smallest_window,
    stream_windows,
    tile_starts,
)
from tests.export.fake import CHANNELS, random_network
from tests.inference.engines import Function


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(CHANNELS, *shape)).astype(np.float32)


def in_float64(network) -> Function:
    """A network so exact that a difference is a difference and no rounding."""
    network = network.double()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(np.ascontiguousarray(image)).double()).numpy()

    return Function(run, stride=network.stride, depth_halo=network.depth_halo)


@settings(deadline=None, max_examples=150)
@given(depth=st.integers(1, 60), more=st.integers(0, 70), halo=st.integers(0, 9), stride=st.integers(1, 4))
def test_windows_cover_each_slice_once_with_its_halo(depth, more, halo, stride):
    depth *= stride
    size = 2 * halo + 2 * stride - 1 + more
    windows = depth_windows(depth, size, halo, stride)
    assert [s for w in windows for s in range(w.start, w.stop)] == list(range(depth))
    for w in windows:
        assert 0 <= w.low <= w.start < w.stop <= w.high <= depth
        assert w.low % stride == w.high % stride == 0
        assert w.high - w.low == (depth if size >= depth else size // stride * stride), "one size, one set of buffers"
        assert w.low == 0 or w.start - w.low >= halo
        assert w.high == depth or w.high - w.stop >= halo
    if stride == 1:
        smallest = smallest_window(depth, halo, 1)
        assert len(depth_windows(depth, smallest, halo, 1)) >= 1
        if smallest < depth and halo:
            with pytest.raises(ValueError, match="leaves no slice"):
                depth_windows(depth, smallest - 1, halo, 1)
        longest = max(b.stop - b.start for b in windows[1:-1]) if len(windows) > 2 else 0
        assert longest in (0, size - 2 * halo), "no slice is computed again without need"


@given(depth=st.integers(1, 20), size=st.integers(1, 200), stride=st.integers(1, 16))
def test_windows_of_a_network_of_unbounded_reach(depth, size, stride):
    depth *= stride
    windows = depth_windows(depth, size, None, stride)
    assert [s for w in windows for s in range(w.start, w.stop)] == list(range(depth))
    for w in windows:
        if len(windows) > 1:
            assert (w.low, w.high) == (max(w.start - UNBOUNDED_HALO, 0), min(w.stop + UNBOUNDED_HALO, depth))
        assert w.start % stride == w.stop % stride == 0


@given(depth=st.integers(1, 40), size=st.integers(1, 12), lag=st.integers(0, 9))
def test_stream_windows_follow_each_other_until_the_last_logits_are_out(depth, size, lag):
    windows = stream_windows(depth, size, lag)
    assert [w.low for w in windows] == list(range(0, len(windows) * size, size))
    assert [s for w in windows for s in range(w.start, w.stop)] == list(range(depth))
    for w in windows:
        assert w.high - w.low == size
        assert w.stop == w.start or w.low - lag <= w.start < w.stop <= w.high - lag
    assert windows[-1].low < depth + lag, "and no longer"


@given(size=st.integers(1, 200), tile=st.integers(1, 64))
def test_tile_starts(size, tile):
    starts = tile_starts(size, tile)
    assert (starts[0], starts[-1]) == (0, max(size - tile, 0))
    assert all(0 < b - a <= max(tile // 2, 1) for a, b in pairwise(starts)), "half of a tile overlaps"


def test_tiles_are_weighted_by_a_gaussian():
    """Against a loop over the voxels; the engine marks each tile by its number."""
    tile, number = (16, 24), iter(range(100))
    image = volume(3, 50, 37)[None]
    found = blend_tiles(lambda piece: np.concatenate([piece, piece * 0 + next(number)], axis=1), image, tile)
    np.testing.assert_allclose(found[:CHANNELS], image[0], atol=1e-5)
    corners = [(y, x) for y in tile_starts(50, 16) for x in tile_starts(37, 24)]
    for y, x in ((0, 0), (7, 30), (25, 18), (49, 36), (17, 13)):
        weights = []
        for top, left in corners:
            inside = top <= y < top + 16 and left <= x < left + 24
            dy, dx = (y - top - 7.5) / 2, (x - left - 11.5) / 3
            weights.append(max(np.exp(-dy * dy / 2), 1e-3) * max(np.exp(-dx * dx / 2), 1e-3) * inside)
        assert found[-1, 0, y, x] == pytest.approx(np.average(range(len(corners)), weights=weights), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), [("distill_dsm", {"alpha": 1.0}), ("residual_dsm", {}), ("unet2d", {})])
def test_windows_with_the_halo_change_nothing_and_with_less_they_do(name, options):
    engine = in_float64(random_network(name, width=0.25, **options))
    halo = engine.depth_halo
    assert halo == (0 if name == "unet2d" else 8)
    image = volume(40, 16, 16)
    voxels = (6 + 2 * halo) * 16 * 16
    whole = predict_logits(engine, image)
    assert len(engine.shapes) == 1
    windowed = predict_logits(engine, image, max_voxels=voxels)
    assert {shape[2] for shape in engine.shapes[1:]} == {6 + 2 * halo}
    np.testing.assert_allclose(windowed, whole, rtol=0, atol=1e-11)
    if halo:
        engine.depth_halo -= 1
        short = predict_logits(engine, image, max_voxels=voxels)
        assert np.abs(short - whole).max() > 1e-9, "a slice at the halo's end takes part in the logits"


def test_a_network_of_unbounded_reach_gets_whole_strides():
    """Each window's mean takes part in its logits, so any other way of cutting would show."""
    engine = Function(lambda image: image - image.mean(), stride=(16, 16, 16), depth_halo=None)
    image = volume(150, 16, 16)
    image[:, 90:] += 3
    found = predict_logits(engine, image, max_voxels=96 * 16 * 16)
    padded = np.pad(image, ((0, 0), (5, 5), (0, 0), (0, 0)))
    expected = []
    for start in range(0, 160, 32):
        low, high = max(start - 32, 0), min(start + 64, 160)
        expected.append((padded - padded[:, low:high].mean())[:, start : start + 32])
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1)[:, 5:155], atol=1e-5)


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    stride=st.tuples(*[st.integers(1, 6)] * 3),
    halo=st.integers(0, 4),
    slices=st.integers(1, 12),
)
def test_images_are_padded_around_with_zeros_and_cut_back(shape, stride, halo, slices):
    """An engine that returns its input: whatever is padded and cut, the image comes back."""
    steps = [math.lcm(s, 4) for s in stride[1:]]
    in_plane = [-(-n // s) * s for n, s in zip(shape[1:], steps, strict=True)]
    image = volume(*shape)

    def run(piece: np.ndarray) -> np.ndarray:
        low = [(p - n) // 2 for p, n in zip(in_plane, shape[1:], strict=True)]
        inside = (..., *(slice(b, b + n) for b, n in zip(low, shape[1:], strict=True)))
        assert not (np.abs(piece).sum() - np.abs(piece[inside]).sum()) > 1e-2
        return piece

    engine = Function(run, stride=stride, depth_halo=halo * stride[0])
    found = predict_logits(engine, image, max_voxels=slices * in_plane[0] * in_plane[1])
    np.testing.assert_array_equal(found, image)
