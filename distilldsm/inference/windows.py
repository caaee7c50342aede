"""How an image goes through a network: at once, in windows along the depth, as a stream, or in tiles in plane.

At once is the case in which the window is the whole depth. Windows and streams give the same result, as no logit
depends on slices that the network does not see; tiles do not.
"""

from __future__ import annotations

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
"""Number of the first slice, and the values (K, H, W) of it and the following ones."""
Phases = Callable[[str], AbstractContextManager[object]]
"""Measures a phase: `with phase("network"): ...`."""

MAX_VOXELS = 6_500_000
"""Voxels that go through the network at once; about 3 GB in float32 for the paper-size network. Slices so large that
the halo alone has more go through with it whole: `distilldsm predict` cuts them in plane, too."""
STREAM_SLICES = 8
"""At a time, of a volume that is streamed: more are no faster."""
UNBOUNDED_HALO = 32
"""Overlap, in slices, for networks whose logits depend on the whole depth (there, windows are an approximation)."""
TILE_OVERLAP = 0.5
"""Of neighbouring tiles, where slices do not fit in memory."""


@dataclass(frozen=True)
class Window:
    """Slices [low, high) go through the network; values of those in [start, stop) come out, and are kept."""

    low: int
    high: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How an image goes through the network."""

    window: int
    """Slices at once."""
    tile: tuple[int, int] | None = None
    """(height, width) in plane; None: whole slices."""
    streamed: bool = False
    """The windows follow each other without halo; features are kept between them (depth_stream.py)."""
    exact: bool = True
    """The labels are those of the whole volume in one piece."""
    estimate_bytes: int = 0
    """Peak of the process's memory."""

    def windows(self, depth: int, network: NetworkFacts) -> list[Window]:
        """The windows of a padded depth."""
        if self.streamed:
            return stream_windows(depth, self.window, network.depth_halo or 0)
        return depth_windows(depth, self.window, network.depth_halo, network.stride[0])


def padded_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int]:
    """(D, H, W) rounded up to multiples of the stride."""
    d, h, w = (-(-n // s) * s for n, s in zip(size, stride, strict=True))
    return d, h, w


def smallest_window(depth: int, halo: int | None, stride: int) -> int:
    """Slices of the smallest window that keeps some between its halos."""
    return min(depth, 2 * (UNBOUNDED_HALO if halo is None else halo) + stride)


def depth_windows(depth: int, size: int, halo: int | None, stride: int) -> list[Window]:
    """Windows that cover a padded depth, each kept slice with its halo inside (or at the volume's end).

    With a known halo all windows have one size, so that a runtime needs one set of buffers. `halo` None (the logits
    depend on the whole depth): windows with an overlap of UNBOUNDED_HALO, nearly the same logits.

    Raises:
        ValueError: `size` leaves nothing between the halos.
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
            raise ValueError(f"a window of {size} slices leaves nothing between halos of {halo}")
        windows.append(Window(low, low + size, start, stop))
        start = stop
    return windows


def stream_windows(depth: int, size: int, lag: int) -> list[Window]:
    """Windows of `size` slices, one after the other until the logits of the last slice have come, `lag` slices late.

    The last ones reach beyond the volume. Of the first, nothing may be kept.
    """
    windows = []
    for low in range(0, depth + lag, size):
        start, stop = (min(max(k - lag, 0), depth) for k in (low, low + size))
        windows.append(Window(low, low + size, start, stop))
    return windows


class Image(Protocol):
    """An image (C, D, H, W) slice by slice: `data.geometry.NetworkImage`, or an array in memory."""

    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""

    def slices(self, low: int, high: int) -> Iterator[Float32]:
        """Slices [low, high), (C, H, W) each; asked for with ascending `low`."""


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
    """What the network makes of consecutive slices, in ascending order: (number of the first, [(K, H, W), ...]).

    The image is padded with zeros around to the network's stride; what comes of the padding is cut away.

    Raises:
        DataError: streaming is asked for, and the network cannot be streamed.
    """
    shape = image.shape
    padded = padded_size(shape, network.stride)
    d, h, w = ((p - n) // 2 for p, n in zip(padded, shape, strict=True))
    stream, lag = None, 0
    if pieces.streamed:
        stream, lag = network.open_stream((1, image.channels, pieces.window, *padded[1:])), network.depth_halo or 0
        if stream is None:
            raise DataError("the network cannot be streamed", hint="predict with --engine onnx, which needs no stream")

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
            # What the depth was padded by is cut away here.
            start, stop, first = max(part.start, d), min(part.stop, d + shape[0]), part.low - lag
            keep = (slice(start - first, stop - first), slice(h, h + shape[1]), slice(w, w + shape[2]))
            with np.errstate(over="ignore", invalid="ignore"):
                values = network(piece, keep, run)
            del piece
            # One array per slice: each can go as soon as it has been used.
            planes = [values[:, k].copy() for k in range(max(stop - start, 0))]
            del values
        yield start - d, planes


def predict_logits(engine: Engine, image: Float32, *, max_voxels: int = MAX_VOXELS) -> Float32:
    """Logits (K, D, H, W) of an image (C, D, H, W) of any size, of one network.

    More than `max_voxels` are streamed where the engine can, else they go in windows. As no logit depends on slices
    further away than the network's halo, the result is the same as in one piece.
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

    Not exact: near a tile's border the network sees less than it would in the whole slice.
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
    """Starts of overlapping tiles that cover `size`, the last one flush with its end."""
    if tile >= size:
        return [0]
    step = max(int(tile * (1 - TILE_OVERLAP)), 1)
    count = -(-(size - tile) // step) + 1
    return [round(k * (size - tile) / (count - 1)) for k in range(count)]


def _gaussian(size: int) -> npt.NDArray[np.float64]:
    positions = np.arange(size) - (size - 1) / 2
    # Never so small that the quotient of two rounding errors would be a logit.
    return np.maximum(np.exp(-0.5 * (positions / (size / 8)) ** 2), 1e-3)
