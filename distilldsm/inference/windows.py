"""Run an image through a network: at once, in windows along the depth, as a stream, or in tiles in plane.

At once means that the window is the whole depth. Windows and streams give the same result, because they contain every
slice that a logit depends on. Tiles give another result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.inference.engines import Engine, NetworkFacts
from distilldsm.inference.probabilities import Ensemble, Member

Float32 = npt.NDArray[np.float32]
Slices = tuple[int, list[Float32]]
"""Index of the first slice, and the values (K, H, W) of this slice and the following slices."""
Phases = Callable[[str], AbstractContextManager[object]]
"""Measures a phase: `with phase("network"): ...`."""

MAX_VOXELS = 6_500_000
"""Voxels in one forward pass; about 3 GB in float32 for the paper-size network. If the halo alone has more voxels, the
window still holds whole slices with their halo. `distilldsm predict` then also cuts them in plane."""
STREAM_SLICES = 8
"""Slices per chunk of a stream; more slices are not faster."""
UNBOUNDED_HALO = 32
"""Overlap, in slices, for networks whose logits depend on the whole depth (there, windows are an approximation)."""
TILE_OVERLAP = 0.5
"""Overlap of neighbouring tiles, if whole slices do not fit in memory."""


IN_PLANE_STEP = 4
"""Slices are padded to multiples of this number, whatever the network accepts: OpenVINO compiles large images anew for
each size, and fewer sizes save more time than the padding costs."""


@dataclass(frozen=True)
class Window:
    """The network computes slices [low, high). The values of slices [start, stop) are kept."""

    low: int
    high: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How an image is divided for the network."""

    window: int
    """Number of slices in one forward pass."""
    tile: tuple[int, int] | None = None
    """(height, width) in plane; None: whole slices."""
    streamed: bool = False
    """Windows follow each other without halo; features are stored between them (depth_stream.py)."""
    exact: bool = True
    """The labels are the same as for the whole volume in one piece."""
    estimate_bytes: int = 0
    """Estimated peak memory of the process."""

    def windows(self, depth: int, network: NetworkFacts) -> list[Window]:
        """The windows of a padded depth."""
        if self.streamed:
            return stream_windows(depth, self.window, network.depth_halo or 0)
        return depth_windows(depth, self.window, network.depth_halo, network.stride[0])


def size_steps(stride: Sequence[int]) -> tuple[int, int, int]:
    """(D, H, W): the sizes of images for a network of this stride are multiples of these numbers."""
    return stride[0], math.lcm(stride[1], IN_PLANE_STEP), math.lcm(stride[2], IN_PLANE_STEP)


def padded_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int]:
    """(D, H, W) rounded up to multiples of `size_steps`."""
    d, h, w = (-(-n // s) * s for n, s in zip(size, size_steps(stride), strict=True))
    return d, h, w


def smallest_window(depth: int, halo: int | None, stride: int) -> int:
    """Number of slices of the smallest window that has slices between its halos."""
    return min(depth, 2 * (UNBOUNDED_HALO if halo is None else halo) + stride)


def depth_windows(depth: int, size: int, halo: int | None, stride: int) -> list[Window]:
    """Windows that cover a padded depth. Each kept slice has its halo in the window (or the volume ends there).

    With a known halo all windows have the same size, so a runtime needs only one set of buffers. With `halo` None (the
    logits depend on the whole depth), windows overlap by UNBOUNDED_HALO, and the logits are nearly the same.

    Raises:
        ValueError: `size` leaves no slice between the halos.
    """
    if size >= depth:
        return [Window(0, depth, 0, depth)]
    windows: list[Window] = []
    start = 0
    if halo is None:
        core = max(size - 2 * UNBOUNDED_HALO, stride) // stride * stride
        for start in range(0, depth, core):
            stop = min(start + core, depth)
            windows.append(Window(max(start - UNBOUNDED_HALO, 0), min(stop + UNBOUNDED_HALO, depth), start, stop))
        return windows
    size = size // stride * stride
    while start < depth:
        low = min(max(start - halo, 0) // stride * stride, depth - size)
        stop = depth if low + size == depth else low + size - halo
        if stop <= start:
            raise ValueError(f"a window of {size} slices leaves no slice between halos of {halo}")
        windows.append(Window(low, low + size, start, stop))
        start = stop
    return windows


def stream_windows(depth: int, size: int, lag: int) -> list[Window]:
    """Windows of `size` slices, one after the other, until the logits of the last slice are out, `lag` slices late.

    The last windows reach beyond the volume. The first windows may give no value to keep.
    """
    windows = []
    for low in range(0, depth + lag, size):
        start, stop = (min(max(k - lag, 0), depth) for k in (low, low + size))
        windows.append(Window(low, low + size, start, stop))
    return windows


class Image(Protocol):
    """An image (C, D, H, W) that is read slice by slice: `data.geometry.NetworkImage`, or an array in memory."""

    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""

    def slices(self, low: int, high: int) -> Iterator[Float32]:
        """Slices [low, high), (C, H, W) each. Calls have ascending `low`."""


class _Array:
    def __init__(self, array: Float32) -> None:
        self._array = array
        self.channels = array.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        d, h, w = self._array.shape[1:]
        return d, h, w

    def slices(self, low: int, high: int) -> Iterator[Float32]:
        return iter(np.moveaxis(self._array[:, low:high], 1, 0))


def through_network(network: Ensemble, image: Image, pieces: Pieces, phase: Phases = nullcontext) -> Iterator[Slices]:
    """The network's values for consecutive slices, in ascending order: (index of the first, [(K, H, W), ...]).

    The image is padded with zeros, see `padded_size`. The values of the padding are cut away.

    Raises:
        DataError: streaming is requested, but the network cannot be streamed.
    """
    shape = image.shape
    padded = padded_size(shape, network.stride)
    d, h, w = ((p - n) // 2 for p, n in zip(padded, shape, strict=True))
    stream, lag = None, 0
    if pieces.streamed:
        stream, lag = network.open_stream((1, image.channels, pieces.window, *padded[1:])), network.depth_halo or 0
        if stream is None:
            raise DataError("the network cannot be streamed", hint="use --engine onnx, which does not need a stream")

    def run(engine: Engine, piece: Float32) -> Float32:
        if stream is not None:
            return stream(piece, part.low, padded[0])[0]
        return engine(piece)[0] if pieces.tile is None else blend_tiles(engine, piece, pieces.tile)

    for part in pieces.windows(padded[0], network):
        with phase("preprocess"):
            low, high = max(part.low - d, 0), min(part.high - d, shape[0])
            piece = np.zeros((1, image.channels, part.high - part.low, *padded[1:]), dtype=np.float32)
            for k, plane in enumerate(image.slices(low, high), start=low + d - part.low):
                piece[0, :, k, h : h + shape[1], w : w + shape[2]] = plane
        with phase("network"):
            # The padding of the depth is cut away here.
            start, stop, first = max(part.start, d), min(part.stop, d + shape[0]), part.low - lag
            keep = (slice(start - first, stop - first), slice(h, h + shape[1]), slice(w, w + shape[2]))
            with np.errstate(over="ignore", invalid="ignore"):
                values = network(piece, keep, run)
            del piece
            # One array per slice, so that each can be freed as soon as it was used.
            planes = [values[:, k].copy() for k in range(max(stop - start, 0))]
            del values
        yield start - d, planes


def predict_logits(engine: Engine, image: Float32, *, max_voxels: int = MAX_VOXELS) -> Float32:
    """Logits (K, D, H, W) of one network for an image (C, D, H, W) of any size.

    An image with more than `max_voxels` is streamed if the engine can stream, else it is divided into windows. The
    result is the same as in one piece, because no logit depends on slices beyond the network's halo.
    """
    network = Ensemble([Member(engine)], activation=lambda logits: logits)
    source = _Array(image)
    depth, height, width = padded_size(source.shape, engine.stride)
    fits = max(max_voxels // (height * width), 1)
    pieces = Pieces(window=max(fits, smallest_window(depth, engine.depth_halo, engine.stride[0])))
    if depth > fits:
        window = min(STREAM_SLICES, fits)
        if network.open_stream((1, source.channels, window, height, width)) is not None:
            pieces = Pieces(window=window, streamed=True)
    logits: Float32 | None = None
    for first, planes in through_network(network, source, pieces):
        for k, plane in enumerate(planes, start=first):
            if logits is None:
                logits = np.empty((len(plane), *source.shape), dtype=plane.dtype)
            logits[:, k] = plane
    assert logits is not None
    return logits


def blend_tiles(engine: Callable[[Float32], Float32], piece: Float32, tile: tuple[int, int]) -> Float32:
    """Logits (K, D, H, W) of a piece (1, C, D, H, W) from overlapping tiles, weighted by a Gaussian.

    The result is not exact: near a tile's border the network sees less of the slice.
    """
    height, width = piece.shape[3:]
    weight = np.outer(_gaussian(tile[0]), _gaussian(tile[1])).astype(np.float32)
    total: Float32 | None = None
    weights = np.zeros((height, width), dtype=np.float32)
    for y in tile_starts(height, tile[0]):
        for x in tile_starts(width, tile[1]):
            box = (..., slice(y, y + tile[0]), slice(x, x + tile[1]))
            logits = engine(np.ascontiguousarray(piece[box]))[0]
            if total is None:
                total = np.zeros((*logits.shape[:2], height, width), dtype=np.float32)
            logits *= weight
            total[box] += logits
            weights[box] += weight
    assert total is not None
    total /= weights
    return total


def tile_starts(size: int, tile: int) -> list[int]:
    """Start indices of overlapping tiles that cover `size`. The last tile ends at `size`."""
    if tile >= size:
        return [0]
    step = max(int(tile * (1 - TILE_OVERLAP)), 1)
    count = -(-(size - tile) // step) + 1
    return [round(k * (size - tile) / (count - 1)) for k in range(count)]


def _gaussian(size: int) -> npt.NDArray[np.float64]:
    positions = np.arange(size) - (size - 1) / 2
    # A lower bound, so that no logit is the quotient of two rounding errors.
    return np.maximum(np.exp(-0.5 * (positions / (size / 8)) ** 2), 1e-3)
