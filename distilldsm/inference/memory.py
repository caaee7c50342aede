"""Estimate the memory of a prediction, and choose pieces that stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distilldsm.config.networks import MODELS
from distilldsm.core.errors import DataError
from distilldsm.inference.windows import STREAM_SLICES, Pieces, size_steps, smallest_window

BASE_BYTES = 400_000_000
"""Bytes of Python, the runtime, its compiled network, scratch memory and slices in transfer."""
TORCH_BYTES = 250_000_000
"""Bytes that PyTorch needs in addition."""
MODEL_BYTES = 30_000_000
"""Bytes for each further network of an ensemble, in addition to its weights, while another network runs."""
USABLE = 0.95
"""Plan with this share of the budget only, because estimates may be wrong."""
SMALLEST_TILE = 64
"""Height and width of a tile, in voxels: smaller tiles would see too little of the slice."""
DEFAULT_PIECE_VOXELS = 26 * 512 * 512
"""Largest piece if no budget is set; larger pieces save little time."""
_SLICEWISE = {"openvino": 235.0, "openvino-auto": 150.0, "onnx": 680.0, "torch": 400.0}
BYTES_PER_VOXEL: Mapping[str, Mapping[str, float]] = {
    "unet2d": _SLICEWISE,
    "inserted": _SLICEWISE,
    "unet3d": {"openvino": 250.0, "openvino-auto": 160.0, "onnx": 390.0, "torch": 360.0},
}
"""Activations per voxel of a piece, by family and engine, at the reference widths (measured on pieces of 2 to 8 million
voxels)."""
REFERENCE_MACS = 42_816.0
"""Multiply-accumulates per voxel of the measured network; they grow with the square of the widths."""
STREAM_BYTES_PER_VOXEL: Mapping[str, float] = {"openvino": 350, "openvino-auto": 200, "torch": 500}
"""Activations per voxel of the slices in one chunk of a stream (measured on 1 to 16 slices of 512 x 512)."""
STREAM_COPIES: Mapping[str, float] = {"openvino": 2.5, "openvino-auto": 1.2, "torch": 3}
"""Copies of a stream's stored float32 features in the runtime (measured in the same way)."""


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """Memory of a streaming network: its stored features, and its activations per voxel of a chunk."""

    kept_bytes: float
    per_voxel: float


def activation_bytes(
    name: str, options: Mapping[str, object], engine: str, macs_per_voxel: float = REFERENCE_MACS
) -> float:
    """Memory of a running network per input voxel, bytes."""
    return BYTES_PER_VOXEL[_family(name)][engine] * _width(name, options, macs_per_voxel)


def stream_cost(
    name: str, options: Mapping[str, object], engine: str, state_bytes: int, macs_per_voxel: float = REFERENCE_MACS
) -> StreamCost:
    """Memory of a streaming network that stores `state_bytes` of float32 features from chunk to chunk."""
    return StreamCost(
        kept_bytes=STREAM_COPIES[engine] * state_bytes,
        per_voxel=STREAM_BYTES_PER_VOXEL[engine] * _width(name, options, macs_per_voxel),
    )


def _width(name: str, options: Mapping[str, object], macs_per_voxel: float) -> float:
    """Channels relative to the reference network; for a user's own network, estimated from its MACs."""
    if _family(name) == "inserted":
        return max(math.sqrt(macs_per_voxel / REFERENCE_MACS), 1.0)
    options = {**MODELS[name].options, **options}
    width = options["width"] if "width" in options else float(str(options["base_width"])) / 8
    return max(float(str(width)), 0.25)


def _family(name: str) -> str:
    return MODELS[name].family if name in MODELS else "inserted"


def plan_pieces(
    size: Sequence[int],
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    per_voxel: float,
    channels: int,
    classes: int,
    held_bytes: int,
    budget: int,
    where: object,
    limit_voxels: int | None = None,
    engine: str = "openvino",
    mirrored: bool = False,
    averaged: bool = False,
    after_bytes: int = 0,
    stream: Callable[[], StreamCost | None] = lambda: None,
) -> Pieces:
    """Choose the pieces for a volume of padded `size` (D, H, W) in network space.

    The first choice that fits: the whole volume, a stream (if the network can stream), windows of whole slices (if the
    halo and a few more slices fit), tiles in plane.

    Args:
        stride: the network's stride; per_voxel: see `activation_bytes`.
        held_bytes: bytes of image, mask and everything else that stays in memory.
        budget: bytes for the whole process; limit_voxels: largest piece, even if a larger one would fit.
        mirrored: probabilities of mirrored views of the piece are added up. averaged: probabilities of several networks
            are added up; one network at a time holds activations.
        after_bytes: bytes needed after the networks have freed their memory.
        stream: returns the memory of streaming, None if the network cannot stream; called only if the volume does not
            fit at once.

    Raises:
        DataError: not even the smallest tile fits, or the memory after the networks does not.
    """
    depth, height, width = size
    base = BASE_BYTES + (TORCH_BYTES if engine == "torch" else 0) + held_bytes
    smallest = smallest_window(depth, depth_halo, stride[0])
    # The piece (two copies during the call), its logits and their copy; for tiles also the sum of the logits.
    sums = 4 * ((channels + classes) * mirrored + classes * averaged)
    whole_slices, in_tiles = 4 * (2 * channels + 2 * classes) + sums, 4 * (2 * channels + 3 * classes) + sums
    after = base + after_bytes

    def estimate(window: int, tile: Sequence[int] | None) -> float:
        area = height * width
        if tile is None:
            return base + (per_voxel + whole_slices) * window * area
        return base + in_tiles * window * area + (per_voxel + whole_slices) * window * tile[0] * tile[1]

    usable = budget * USABLE
    steps = size_steps(stride)[1:]
    least = [min(max(4 * s, SMALLEST_TILE), n) for s, n in zip(steps, (height, width), strict=True)]
    if after_bytes and after > usable:
        raise _too_little(budget, max(after, estimate(smallest, least)), held_bytes, where)
    voxels = (usable - base) / (per_voxel + whole_slices)
    if limit_voxels is not None:
        voxels = min(voxels, limit_voxels)
    window = min(int(voxels // (height * width)), depth)
    cost = stream() if window < depth else None
    if cost is not None:
        for slices in range(min(STREAM_SLICES, depth), 0, -1):
            needed = base + cost.kept_bytes + (cost.per_voxel + whole_slices) * slices * height * width
            if needed <= usable:
                estimated = int(max(needed, after))
                return Pieces(window=slices, estimate_bytes=estimated, streamed=True)
    if window >= smallest or estimate(smallest, None) <= usable:
        window = max(window, smallest)
        window = max(window // stride[0] * stride[0], 1)
        return Pieces(
            window=window,
            estimate_bytes=int(max(estimate(window, None), after)),
            exact=depth_halo is not None or window >= depth,
        )
    tile = [height, width]
    while estimate(smallest, tile) > usable:
        axis = 0 if tile[0] >= tile[1] else 1
        if tile[axis] <= least[axis]:
            axis = 1 - axis
        if tile[axis] <= least[axis]:
            raise _too_little(budget, estimate(smallest, least), held_bytes, where)
        tile[axis] -= steps[axis]
    peak = int(max(estimate(smallest, tile), after))
    return Pieces(window=smallest, tile=(tile[0], tile[1]), estimate_bytes=peak, exact=False)


def _too_little(budget: int, needed: float, held_bytes: int, where: object) -> DataError:
    return DataError(
        "needs more memory than allowed",
        where=None if where is None else str(where),
        seen=f"{budget / 1e9:.2f} GB allowed",
        rule=f"at least {needed / USABLE / 1e9:.2f} GB, {held_bytes / 1e9:.2f} of it for image and mask",
        hint="raise --max-memory, or use a machine with more memory",
    )
