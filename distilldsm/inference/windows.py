"""Whole volumes through a network: padding to its stride, and depth chunks where memory is short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distilldsm.inference.engines import Engine

Float32 = npt.NDArray[np.float32]

MAX_VOXELS = 6_500_000
"""Voxels that go through the network at once; about 3 GB in float32 for the paper-size network."""
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
    depth, height, width = image.shape[1:]
    padded = [-(-n // s) * s for n, s in zip((depth, height, width), stride, strict=True)]
    before = [(p - n) // 2 for p, n in zip(padded, (depth, height, width), strict=True)]
    widths = [(0, 0), *((b, p - n - b) for b, p, n in zip(before, padded, (depth, height, width), strict=True))]
    image = np.pad(image, widths)
    halo = UNBOUNDED_HALO if depth_halo is None else depth_halo
    fits = max(max_voxels // (padded[1] * padded[2]), 1)
    if padded[0] <= fits:
        logits = engine(image[None])[0]
    else:
        logits = _in_chunks(engine, image, max(fits - 2 * halo, stride[0]) // stride[0] * stride[0], halo)
    d, h, w = before
    return logits[:, d : d + depth, h : h + height, w : w + width]


def _in_chunks(engine: Engine, image: Float32, core: int, halo: int) -> Float32:
    depth = image.shape[1]
    pieces = []
    for start in range(0, depth, core):
        stop = min(start + core, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        logits = engine(image[None, :, low:high])[0]
        pieces.append(logits[:, start - low : stop - low].copy())
    return np.concatenate(pieces, axis=1)
