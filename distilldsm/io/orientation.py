"""Converts between array axes and scanner axes (RAS), as the affine defines them."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError

Affine = npt.NDArray[np.float64]
"""(4, 4), voxel to scanner mm (RAS+)."""


def ras_orientation(affine: Affine) -> npt.NDArray[np.float64]:
    """nibabel's orientation (axis, flip) of each array axis. An oblique axis gets the closest scanner axis.

    Raises:
        DataError: an axis has no direction (a zero column in the affine).
    """
    orientation = nib.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise DataError("has an axis without a direction", seen=np.round(affine, 3).tolist())
    return orientation


def reorient(array: npt.NDArray, affine: Affine, axis_order: Sequence[int]) -> npt.NDArray:
    """View an array (C, X, Y, Z) of a file as (C, D, H, W): along the RAS axes, in the order `axis_order`."""
    orientation = ras_orientation(affine)
    ras = np.moveaxis(nib.orientations.apply_orientation(np.moveaxis(array, 0, -1), orientation), -1, 0)
    return ras.transpose(0, *(k + 1 for k in axis_order))


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Voxel size along the three array axes, mm: the lengths of the affine's columns."""
    x, y, z = (float(v) for v in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
    return x, y, z


def spacing_along(affine: Affine, axis_order: Sequence[int]) -> tuple[float, ...]:
    """Voxel size, mm, along the RAS axes in the given order."""
    spacing = spacing_of(affine)
    ras = [0.0, 0.0, 0.0]
    for axis, (target, _) in enumerate(ras_orientation(affine)):
        ras[int(target)] = spacing[axis]
    return tuple(ras[k] for k in axis_order)


def corner_distance_mm(a: Affine, b: Affine, shape: Sequence[int]) -> float:
    """Largest distance, mm, between corresponding corners of a volume of this shape under two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
    with np.errstate(all="ignore"):  # a broken header may hold infinity; then the distance is NaN
        return float(np.linalg.norm(((a - b) @ homogeneous)[:3], axis=0).max())
