"""A scan as it is stored: voxels in the file's type and axes, converted to float32 slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.io.orientation import Affine, corner_distance_mm, reorient, spacing_of

VOXEL_SHARE = 0.8
"""Share of a memory budget that voxels may take in commands that run no network."""
SAME_GRID_MM = 1e-2
"""Two grids are the same if the corners of the volume are not further apart than this."""


class Channel:
    """One channel of a scan.

    Args:
        raw: voxels (X, Y, Z) in the file's type, or a function that reads them when they are first needed.
        scale: converts a part of `raw` to intensities; None if the stored values are intensities.
        shape: (X, Y, Z); needed only if `raw` is a function.
        nbytes: memory that `raw` will take, bytes; needed only if `raw` is a function.
    """

    def __init__(
        self,
        raw: npt.NDArray | Callable[[], npt.NDArray],
        scale: Callable[[npt.NDArray], npt.NDArray] | None = None,
        *,
        shape: Sequence[int] = (),
        nbytes: int = 0,
    ) -> None:
        self._stored = raw
        self.scale = scale
        x, y, z = raw.shape if isinstance(raw, np.ndarray) else shape
        self.shape = (x, y, z)
        self._nbytes = nbytes

    @cached_property
    def raw(self) -> npt.NDArray:
        """The voxels (X, Y, Z) in the file's type. Read once, then kept.

        Raises:
            DataError: the voxels cannot be read, or are not finite.
        """
        return self._stored if isinstance(self._stored, np.ndarray) else self._stored()

    @property
    def nbytes(self) -> int:
        """Memory of the stored voxels, bytes. An estimate for a DICOM series that is not read yet."""
        known = self._stored if isinstance(self._stored, np.ndarray) else self.__dict__.get("raw")
        return self._nbytes if known is None else int(known.nbytes)

    def values(self, piece: npt.NDArray) -> npt.NDArray[np.float32]:
        """Intensities of a part of `raw`, float32."""
        scaled = piece if self.scale is None else self.scale(piece)
        return np.asarray(scaled, dtype=np.float32)


@dataclass(frozen=True)
class Labels:
    """A label map.

    values: (X, Y, Z) uint8; affine: (4, 4), voxel to scanner mm (RAS+); path: its file.
    """

    values: npt.NDArray[np.uint8]
    affine: Affine
    path: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """(X, Y, Z)."""
        return self.values.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes, mm."""
        return spacing_of(self.affine)


@dataclass(frozen=True)
class Skipped:
    """A file that is left out because it holds no image of a scan, and the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: left out: {self.reason}"


@dataclass(frozen=True)
class Scan:
    """One scan on one grid. Its header is read and checked; voxels are read when they are first needed.

    channels: in the model's order; affine: (4, 4), voxel to scanner mm (RAS+), with axes at right angles; source: the
    NIfTI file or DICOM slices, from which the writer takes the geometry of a mask; skipped: files of series folders
    that hold no slice; remarks: what the user should know about the headers.
    """

    channels: tuple[Channel, ...]
    affine: Affine
    path: Path
    source: Any
    skipped: tuple[Skipped, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.channels[0].shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes, mm."""
        return spacing_of(self.affine)

    @property
    def nbytes(self) -> int:
        """Memory of the stored voxels, bytes."""
        return sum(channel.nbytes for channel in self.channels)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(X, Y, Z), or (X, Y, Z, C) for several channels."""
        return (*self.shape, len(self.channels)) if len(self.channels) > 1 else self.shape

    def load(self) -> Scan:
        """Read all voxels into memory and return the scan itself.

        Raises:
            DataError: voxels cannot be read, or are not finite.
        """
        for channel in self.channels:
            _ = channel.raw
        return self

    def intensities(self) -> npt.NDArray[np.float32]:
        """All intensities, (C, X, Y, Z); raises the errors of `load`."""
        data = np.empty((len(self.channels), *self.shape), dtype=np.float32)
        for k, channel in enumerate(self.channels):
            data[k] = channel.values(channel.raw)
        return data

    def planes(self, axis_order: Sequence[int]) -> tuple[list[npt.NDArray], Callable[[int, int], npt.NDArray]]:
        """Views (D, H, W) of the raw channels in network axes, and a function `read(c, k)`: slice k of channel c."""
        views = [reorient(channel.raw[None], self.affine, axis_order)[0] for channel in self.channels]

        def read(channel: int, k: int) -> npt.NDArray[np.float32]:
            return np.ascontiguousarray(self.channels[channel].values(views[channel][k]))

        return views, read


def check_same_grid(base: Scan, other: Scan | Labels, hint: str = "resample all channels to one grid") -> None:
    """Raise DataError, with both geometries, if two channels (or a scan and its mask) have different grids."""
    same_shape = base.shape == other.shape
    if same_shape and corner_distance_mm(base.affine, other.affine, base.shape) <= SAME_GRID_MM:
        return
    raise DataError(
        f"does not lie on the grid of {base.path.name}",
        where=other.path,
        seen=f"shape {other.shape}, affine {np.round(other.affine, 4).tolist()}",
        rule=f"shape {base.shape}, affine {np.round(base.affine, 4).tolist()}",
        hint=hint,
    )


def check_size(scans: Sequence[Scan], limit_bytes: float, bytes_per_voxel: float = 1) -> None:
    """Raise DataError if the stored voxels and what is computed of them (a mask) take more than `limit_bytes`.

    bytes_per_voxel: memory for each voxel of the grid, besides the stored channels.
    """
    held_bytes = sum(scan.nbytes for scan in scans) + bytes_per_voxel * math.prod(scans[0].shape)
    if held_bytes > limit_bytes:
        raise DataError(
            "needs more memory than allowed",
            where=scans[0].path,
            seen=f"image and mask take {held_bytes / 1e9:.2f} GB",
            rule=f"{limit_bytes / 1e9:.2f} GB in all",
            hint="raise --max-memory, or use a machine with more memory",
        )
