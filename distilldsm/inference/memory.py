"""How much memory a prediction takes, and how large the pieces must be to stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distilldsm.config.networks import MODELS
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.machine import available_memory_bytes
from distilldsm.inference.windows import STREAM_SLICES, Pieces, smallest_window

DEFAULT_GB = 3.0
BASE_BYTES = 400_000_000
"""Python, the runtime, its compiled network and scratch memory, slices on their way."""
TORCH_BYTES = 250_000_000
"""What PyTorch takes besides."""
MODEL_BYTES = 30_000_000
"""What each further network of an ensemble takes besides its weights while another one runs."""
USABLE = 0.95
"""Share of the budget that is planned with; estimates are no promises."""
DEFAULT_PIECE_VOXELS = 26 * 512 * 512
"""Largest piece when no budget is given: larger ones save little time."""
_SLICEWISE = {"openvino": 235.0, "openvino-auto": 150.0, "onnx": 680.0, "torch": 400.0}
BYTES_PER_VOXEL: Mapping[str, Mapping[str, float]] = {
    "unet2d": _SLICEWISE,
    "inserted": _SLICEWISE,
    "unet3d": {"openvino": 250.0, "openvino-auto": 160.0, "onnx": 390.0, "torch": 360.0},
}
"""Activations per voxel of a piece, by family and engine, at the reference widths (measured on pieces of 2 to 8 million
voxels)."""
REFERENCE_MACS = 42_816.0
"""Multiply-accumulates per voxel of the network that those figures are of; they grow with the square of the widths."""
STREAM_BYTES_PER_VOXEL: Mapping[str, float] = {"openvino": 350, "openvino-auto": 200, "torch": 500}
"""Activations per voxel of the slices that are streamed at a time (measured on 1 to 16 slices of 512 x 512)."""
STREAM_COPIES: Mapping[str, float] = {"openvino": 2.5, "openvino-auto": 1.2, "torch": 3}
"""Copies that the runtime holds of what a stream keeps, for float32 features (measured likewise)."""


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """Memory of a network that streams: what it keeps, and its activations per voxel of a chunk."""

    kept_bytes: float
    per_voxel: float


def budget_bytes(max_memory_gb: float | None) -> int:
    """The budget: what was asked for, else DEFAULT_GB or half of what is available, whichever is less.

    Raises:
        ConfigError: no positive number.
    """
    if max_memory_gb is not None:
        if not (math.isfinite(max_memory_gb) and max_memory_gb > 0):
            raise ConfigError(
                "has an impossible value", where="--max-memory", seen=max_memory_gb, rule="above 0, in GB"
            )
        return int(max_memory_gb * 1e9)
    free = available_memory_bytes()
    return int(DEFAULT_GB * 1e9) if free is None else min(int(DEFAULT_GB * 1e9), free // 2)


def activation_bytes(
    name: str, options: Mapping[str, object], engine: str, macs_per_voxel: float = REFERENCE_MACS
) -> float:
    """Memory that a network takes while it runs, per voxel that goes in at once."""
    return BYTES_PER_VOXEL[_family(name)][engine] * _width(name, options, macs_per_voxel)


def stream_cost(
    name: str, options: Mapping[str, object], engine: str, state_bytes: int, macs_per_voxel: float = REFERENCE_MACS
) -> StreamCost:
    """Memory of a network that streams and keeps `state_bytes` of float32 features from chunk to chunk."""
    return StreamCost(
        kept_bytes=STREAM_COPIES[engine] * state_bytes,
        per_voxel=STREAM_BYTES_PER_VOXEL[engine] * _width(name, options, macs_per_voxel),
    )


def _width(name: str, options: Mapping[str, object], macs_per_voxel: float) -> float:
    """Channels over those of the reference network; of a network of the user's, guessed from its arithmetic."""
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

    All at once if that fits, else streamed where the network can be, else in windows of whole slices as long as the
    depth's halo and a few slices more fit; tiles in plane only beyond that.

    Args:
        stride: the network's; per_voxel: see `activation_bytes`.
        held_bytes: image, mask and what else stays in memory.
        budget: bytes for the whole process; limit_voxels: largest piece even if more would fit.
        mirrored: views of the piece are mirrored and their scores added up; averaged: those of several networks are,
            of which one at a time holds activations.
        after_bytes: what is taken when the networks have given their memory back.
        stream: what streaming takes, None if the network cannot; asked for where the volume does not fit at once.

    Raises:
        DataError: not even the smallest tile fits, or what comes after it does not.
    """
    depth, height, width = size
    base = BASE_BYTES + (TORCH_BYTES if engine == "torch" else 0) + held_bytes
    smallest = smallest_window(depth, depth_halo, stride[0])
    # The piece itself, twice while it is handed over; its logits and their copy; for tiles, their sum too.
    sums = 4 * ((channels + classes) * mirrored + classes * averaged)
    whole_slices, in_tiles = 4 * (2 * channels + 2 * classes) + sums, 4 * (2 * channels + 3 * classes) + sums
    after = base + after_bytes

    def estimate(window: int, tile: Sequence[int] | None) -> float:
        area = height * width
        if tile is None:
            return base + (per_voxel + whole_slices) * window * area
        return base + in_tiles * window * area + (per_voxel + whole_slices) * window * tile[0] * tile[1]

    usable = budget * USABLE
    least = [min(4 * s, n) for s, n in zip(stride[1:], (height, width), strict=True)]
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
        tile[axis] -= stride[axis + 1]
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
