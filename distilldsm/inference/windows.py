"""Whole volumes through a network: padding to its stride, and pieces along the depth where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.inference.engines import Engine, Stream, open_stream

Float32 = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]
"""A part of (D, H, W)."""
Run = Callable[[Engine, Float32], Float32]
"""How an engine goes over a piece: (1, C, D, H, W) to logits (K, D, H, W)."""
Score = Callable[[Float32, Box, Run], Float32]
"""Scores (K, d, h, w) of the part `Box` of a piece (1, C, D, H, W)."""

WHOLE: Box = (slice(None), slice(None), slice(None))

MAX_VOXELS = 6_500_000
"""Voxels that go through the network at once; about 3 GB in float32 for the paper-size network. Slices so large that
the halo alone has more go through with it whole: `distilldsm predict` cuts them in plane, too."""
STREAM_SLICES = 8
"""At a time, of a volume that is streamed: more are no faster."""
UNBOUNDED_HALO = 32
"""Overlap, in slices, for networks whose logits depend on the whole depth (there, chunks are an approximation)."""


@dataclass(frozen=True)
class Window:
    """Slices [low, high) go through the network; logits of those in [start, stop) are kept."""

    low: int
    high: int
    start: int
    stop: int


def stream_chunks(depth: int, size: int, lag: int) -> list[Window]:
    """Chunks of `size` slices, one after the other until the logits of the last slice have come, `lag` slices late.

    The last ones reach beyond the volume. Of the first, nothing may be kept.
    """
    chunks = []
    for low in range(0, depth + lag, size):
        start, stop = (min(max(k - lag, 0), depth) for k in (low, low + size))
        chunks.append(Window(low, low + size, start, stop))
    return chunks


def predict_logits(
    engine: Engine,
    image: Float32,
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int = MAX_VOXELS,
) -> Float32:
    """Logits (K, D, H, W) of an image (C, D, H, W) of any size.

    In plane the image is padded with zeros to the stride. More than `max_voxels` are streamed where the engine can
    (depth_stream.py), else cut along the depth into windows that fit, each with `depth_halo` more slices on both sides.
    As no logit depends on slices further away, the result is the same as in one piece.
    """
    return _in_pieces(
        lambda piece, keep, run: run(engine, piece)[:, *keep], image, stride, depth_halo, max_voxels, engine
    )


def predict_scores(
    score: Score,
    image: Float32,
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int = MAX_VOXELS,
    single: Engine | None = None,
) -> Float32:
    """Scores (K, D, H, W) of an image (C, D, H, W), in pieces as for `predict_logits`.

    score, single: a `scores.Scorer`, and its `single`.
    """
    return _in_pieces(score, image, stride, depth_halo, max_voxels, single)


def _in_pieces(
    score: Score,
    image: Float32,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int,
    single: Engine | None,
) -> Float32:
    """`score` over pieces; `single`: the engine that it runs once on each."""
    depth, height, width = image.shape[1:]
    padded = [-(-n // s) * s for n, s in zip((depth, height, width), stride, strict=True)]
    d, h, w = before = [(p - n) // 2 for p, n in zip(padded, (depth, height, width), strict=True)]
    widths = [(0, 0), *((b, p - n - b) for b, p, n in zip(before, padded, (depth, height, width), strict=True))]
    image = np.pad(image, widths)
    fits = max(max_voxels // (padded[1] * padded[2]), 1)
    if single is not None and depth_halo and stride[0] == 1 and depth > fits:
        shape = (1, image.shape[0], min(STREAM_SLICES, fits), padded[1], padded[2])
        stream = open_stream(single, shape, lag=depth_halo)
        if stream is not None:
            return _streamed(score, stream, image, shape[2], depth_halo, (slice(h, h + height), slice(w, w + width)))
    halo = UNBOUNDED_HALO if depth_halo is None else depth_halo
    core = padded[0] if padded[0] <= fits else max(fits - 2 * halo, stride[0]) // stride[0] * stride[0]
    pieces = []
    for start in range(0, padded[0], core):
        stop = min(start + core, padded[0])
        low, high = max(start - halo, 0), min(stop + halo, padded[0])
        # What the depth was padded by is cut away here.
        first, last = max(start, d) - low, min(stop, d + depth) - low
        keep = (slice(first, last), slice(h, h + height), slice(w, w + width))
        part = score(image[None, :, low:high], keep, lambda engine, piece: engine(piece)[0])
        pieces.append(part if core == padded[0] else part.copy())
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def _streamed(
    score: Score, stream: Stream, image: Float32, count: int, lag: int, in_plane: tuple[slice, slice]
) -> Float32:
    """Scores of an image (C, D, H, W) that goes through `stream` in chunks of `count` slices."""
    depth, parts = image.shape[1], []

    def run(_: Engine, chunk: Float32) -> Float32:
        return stream(chunk, part.low, depth)[0]

    for part in stream_chunks(depth, count, lag):
        chunk = image[None, :, part.low : part.high]
        missing = count - chunk.shape[2]
        if missing:
            chunk = np.pad(chunk, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
        first = part.low - lag
        keep = (slice(part.start - first, part.stop - first), *in_plane)
        parts.append(score(chunk, keep, run).copy())
    return np.concatenate(parts, axis=1)
