"""A scan as it is stored: voxels in the file's own type and axes, turned into float32 a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.io.orientation import reorient, spacing_of
from distilldsm.io.volume import Volume

MAX_SHEAR = 0.01
"""Largest cosine between two axes that still counts as a right angle (0.6 degrees; rounding in headers)."""
SPACING_MM = (0.005, 500.0)


@dataclass(frozen=True)
class Channel:
    """One channel: raw (X, Y, Z) in the file's type; `scale` turns a piece of it into intensities."""

    raw: npt.NDArray
    scale: Callable[[npt.NDArray], npt.NDArray] | None = None

    def values(self, piece: npt.NDArray) -> npt.NDArray[np.float32]:
        """Intensities of a piece of `raw`, float32."""
        scaled = piece if self.scale is None else self.scale(piece)
        return np.asarray(scaled, dtype=np.float32)


@dataclass(frozen=True)
class Scan:
    """What prediction reads.

    channels: in the model's order; affine: (4, 4), voxel to scanner mm (RAS+); source: what the writer needs to put a
    mask into the scan's own geometry (a NIfTI header, DICOM headers).
    """

    channels: tuple[Channel, ...]
    affine: npt.NDArray[np.float64]
    path: Path
    source: Any

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z = self.channels[0].raw.shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes, mm."""
        return spacing_of(self.affine)

    @property
    def nbytes(self) -> int:
        """Memory of the stored voxels."""
        return sum(channel.raw.nbytes for channel in self.channels)

    def volume(self) -> Volume:
        """All intensities at once, float32."""
        data = np.empty((len(self.channels), *self.shape), dtype=np.float32)
        for k, channel in enumerate(self.channels):
            data[k] = channel.values(channel.raw)
        return Volume(data, self.affine, self.path)

    def planes(self, axis_order: Sequence[int]) -> tuple[list[npt.NDArray], Callable[[int, int], npt.NDArray]]:
        """Views (D, H, W) of the raw channels in network axes, and a function to slice k of channel c as float32."""
        views = [reorient(channel.raw[None], self.affine, axis_order)[0] for channel in self.channels]

        def read(channel: int, k: int) -> npt.NDArray[np.float32]:
            return np.ascontiguousarray(self.channels[channel].values(views[channel][k]))

        return views, read


def check_affine(affine: npt.NDArray[np.float64], path: Path) -> None:
    """Refuse geometries in which a mask would be garbage.

    Raises:
        DataError: not finite, an axis of no or absurd length, or axes that are not at right angles.
    """
    with np.errstate(over="ignore"):
        lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)) if np.isfinite(affine).all() else np.zeros(3)
    low, high = SPACING_MM
    if not (np.isfinite(lengths).all() and lengths.min() >= low and lengths.max() <= high):
        raise DataError(
            "has an impossible geometry",
            where=path,
            seen=f"affine {np.round(np.asarray(affine, dtype=float), 6).tolist()}",
            rule=f"finite numbers, voxel sizes from {low:g} to {high:g} mm",
            hint="set the file's sform or qform",
        )
    directions = affine[:3, :3] / lengths
    cosines = np.abs(directions.T @ directions - np.eye(3))
    if cosines.max() > MAX_SHEAR:
        raise DataError(
            "has sheared axes",
            where=path,
            seen=f"cosine {cosines.max():.3f} between two axes, affine {np.round(affine, 4).tolist()}",
            rule=f"axes at right angles (cosine at most {MAX_SHEAR:g})",
            hint="resample it to a rectangular grid (a tilted CT gantry needs that too)",
        )
