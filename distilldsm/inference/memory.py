"""How much memory a prediction takes, and how large the pieces must be to stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distilldsm.errors import ConfigError, DataError
from distilldsm.inference.windows import UNBOUNDED_HALO

DEFAULT_GB = 3.0
BASE_BYTES = 350_000_000
"""Python, the runtime, its compiled network and scratch memory, slices on their way."""
TORCH_BYTES = 250_000_000
"""What PyTorch takes besides."""
USABLE = 0.95
"""Share of the budget that is planned with; estimates are no promises."""
DEFAULT_PIECE_VOXELS = 26 * 512 * 512
"""Largest piece when no budget is given: larger ones save little time."""
BYTES_PER_VOXEL: Mapping[str, Mapping[str, float]] = {
    "unet2d": {"openvino": 235, "openvino-auto": 150, "onnx": 680, "torch": 400},
    "unet3d": {"openvino": 250, "openvino-auto": 160, "onnx": 390, "torch": 360},
}
"""Activations per voxel of a piece, at the reference widths (measured on pieces of 2 to 8 million voxels)."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How a scan goes through the network.

    window: slices at once; tile: (height, width) in plane, None for whole slices; estimate_bytes: peak of the
    process; exact: the labels are those of the whole volume in one piece.
    """

    window: int
    tile: tuple[int, int] | None
    estimate_bytes: int
    exact: bool


def available_bytes() -> int | None:
    """Memory that is free on this machine or in this container; None where nothing tells."""
    found = []
    try:
        with open("/proc/meminfo") as stream:
            found += [int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable")]
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as stream, open(used) as other:
                found.append(int(stream.read()) - int(other.read()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(min(found), 0) if found else None


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
    free = available_bytes()
    return int(DEFAULT_GB * 1e9) if free is None else min(int(DEFAULT_GB * 1e9), free // 2)


def bytes_per_voxel(name: str, options: Mapping[str, object], engine: str, channels: int, classes: int) -> float:
    """Memory of a piece, per voxel: activations, the piece itself, logits and scores."""
    family = "unet3d" if name == "unet3d" else "unet2d"
    width = float(str(options.get("base_width", 8))) / 8 if family == "unet3d" else float(str(options.get("width", 1)))
    return BYTES_PER_VOXEL[family][engine] * max(width, 0.25) + 4.0 * (2 * channels + 2 * classes)


def plan_pieces(
    size: Sequence[int],
    *,
    stride: Sequence[int],
    depth_halo: int | None,
    per_voxel: float,
    held_bytes: int,
    budget: int,
    where: object,
    limit_voxels: int | None = None,
    engine: str = "openvino",
) -> Pieces:
    """Choose the pieces for a volume of padded `size` (D, H, W) in network space.

    Whole slices as long as the depth's halo and a few slices more fit; tiles in plane only beyond that.

    Args:
        stride: the network's; per_voxel: see `bytes_per_voxel`; held_bytes: image, mask and what else stays in memory.
        budget: bytes for the whole process; limit_voxels: largest piece even if more would fit.

    Raises:
        DataError: not even the smallest tile fits.
    """
    depth, height, width = size
    base = BASE_BYTES + (TORCH_BYTES if engine == "torch" else 0) + held_bytes
    voxels = int((budget * USABLE - base) / per_voxel)
    if limit_voxels is not None:
        voxels = min(voxels, limit_voxels)
    halo = UNBOUNDED_HALO if depth_halo is None else depth_halo
    smallest = min(depth, 2 * halo + stride[0])

    def pieces(window: int, tile: tuple[int, int] | None) -> Pieces:
        area = height * width if tile is None else tile[0] * tile[1]
        return Pieces(
            window=window,
            tile=tile,
            estimate_bytes=int(base + per_voxel * window * area),
            exact=tile is None and (depth_halo is not None or window >= depth),
        )

    window = min(voxels // (height * width), depth)
    if window >= smallest:
        return pieces(max(window // stride[0] * stride[0], 1), None)
    least = [min(4 * s, n) for s, n in zip(stride[1:], (height, width), strict=True)]
    tile = [height, width]
    while tile[0] * tile[1] * smallest > voxels and (tile[0] > least[0] or tile[1] > least[1]):
        axis = 0 if (tile[0] >= tile[1] and tile[0] > least[0]) or tile[1] <= least[1] else 1
        tile[axis] -= stride[axis + 1]
    if tile[0] * tile[1] * smallest > voxels:
        needed = (base + per_voxel * smallest * least[0] * least[1]) / USABLE
        raise DataError(
            "needs more memory than allowed",
            where=None if where is None else str(where),
            seen=f"{budget / 1e9:.2f} GB allowed",
            rule=f"at least {needed / 1e9:.2f} GB: image and mask {held_bytes / 1e9:.2f}, the rest for the network",
            mend="raise --max-memory, or use a machine with more memory",
        )
    return pieces(smallest, (tile[0], tile[1]))
