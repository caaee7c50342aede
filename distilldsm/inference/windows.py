"""Whole volumes through a network: padding to its stride, and depth chunks where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from distilldsm.inference.engines import Engine

Float32 = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]
"""A part of (D, H, W)."""

WHOLE: Box = (slice(None), slice(None), slice(None))

MAX_VOXELS = 6_500_000
"""Voxels that go through the network at once; about 3 GB in float32 for the paper-size network. Slices so large that
the halo alone has more go through with it whole: `distilldsm predict` cuts them in plane, too."""
UNBOUNDED_HALO = 32
"""Overlap, in slices, for networks whose logits depend on the whole depth (there, chunks are an approximation)."""


def predict_logits(
    engine: Engine,
    image: Float32,
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int = MAX_VOXELS,
) -> Float32:
    """Logits (K, D, H, W) of an image (C, D, H, W) of any size.

    In plane the image is padded with zeros to the stride. Along the depth it is cut into chunks that fit `max_voxels`,
    each with `depth_halo` more slices on both sides: as no logit depends on slices further away, the result is the
    same as in one piece.
    """
    return _in_pieces(lambda piece, keep: engine(piece)[0][:, *keep], image, stride, depth_halo, max_voxels)


def predict_scores(
    score: Callable[[Float32, Box], Float32],
    image: Float32,
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int = MAX_VOXELS,
) -> Float32:
    """Scores (K, D, H, W) of an image (C, D, H, W), cut as for `predict_logits`; `score`: see `scores.Scorer`."""
    return _in_pieces(score, image, stride, depth_halo, max_voxels)


def _in_pieces(
    run: Callable[[Float32, Box], Float32],
    image: Float32,
    stride: Sequence[int],
    depth_halo: int | None,
    max_voxels: int,
) -> Float32:
    """`run` over pieces (1, C, D, H, W), of which it gives back the part that is asked for, (K, d, h, w)."""
    depth, height, width = image.shape[1:]
    padded = [-(-n // s) * s for n, s in zip((depth, height, width), stride, strict=True)]
    d, h, w = before = [(p - n) // 2 for p, n in zip(padded, (depth, height, width), strict=True)]
    widths = [(0, 0), *((b, p - n - b) for b, p, n in zip(before, padded, (depth, height, width), strict=True))]
    image = np.pad(image, widths)
    halo = UNBOUNDED_HALO if depth_halo is None else depth_halo
    fits = max(max_voxels // (padded[1] * padded[2]), 1)
    core = padded[0] if padded[0] <= fits else max(fits - 2 * halo, stride[0]) // stride[0] * stride[0]
    pieces = []
    for start in range(0, padded[0], core):
        stop = min(start + core, padded[0])
        low, high = max(start - halo, 0), min(stop + halo, padded[0])
        # What the depth was padded by is cut away here.
        first, last = max(start, d) - low, min(stop, d + depth) - low
        keep = (slice(first, last), slice(h, h + height), slice(w, w + width))
        part = run(image[None, :, low:high], keep)
        pieces.append(part if core == padded[0] else part.copy())
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
