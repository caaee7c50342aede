"""Make volumes small for a page: fewer voxels, 8 or 12 bits, compressed NIfTI. For viewing only, not for measuring."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.io.orientation import spacing_of

KEPT_PERCENTILES = (0.1, 99.9)
"""Percentiles of the intensities; values beyond them are clipped."""
SHOWN_PERCENTILES = (1.0, 99.0)
"""The window that the viewer starts with."""
EXACT_VALUES = 4096
"""Integers (CT) are stored exactly if their range has at most this many values, so that any window can be set. All
other intensities are stored in 256 steps."""
BYTES_PER_KEPT_VOXEL = 64
"""Memory of one kept voxel while it is made small, at most."""
_HEADER_BYTES = 352
_LABEL_INTENT = 1002


def packed(
    volume: npt.NDArray[np.generic],
    affine: npt.NDArray[np.floating],
    *,
    is_label: bool,
    max_voxels: int,
    values: Callable[[npt.NDArray], npt.NDArray] | None = None,
) -> bytes:
    """A volume as .nii.gz for the viewer; the same volume gives the same bytes.

    Voxels are left out, not averaged. Image and masks of one shape with the *same* affine and `max_voxels` stay on one
    grid. Each remaining voxel keeps its value and its position.

    Args:
        volume: (X, Y, Z); a label map holds integers from 0 to 255.
        affine: (4, 4), voxel to scanner mm (RAS+).
        is_label: keep the values exactly; otherwise clip them to KEPT_PERCENTILES and quantise them.
        max_voxels: the largest number of stored voxels.
        values: converts the kept voxels to intensities.

    Raises:
        ValueError: the volume has not three axes or no voxel, or a label is not an integer from 0 to 255.
    """
    if volume.ndim != 3 or not volume.size or max_voxels < 1:
        raise ValueError(f"the volume needs three axes and max_voxels at least 1: {volume.shape}, {max_voxels}")
    full: npt.NDArray[np.float64] = np.asarray(affine, dtype=np.float64)
    steps = strides(volume.shape, spacing_of(full), max_voxels)
    start = [(n - 1) % step // 2 for n, step in zip(volume.shape, steps, strict=True)]
    kept = volume[tuple(slice(first, None, step) for first, step in zip(start, steps, strict=True))]
    if values is not None:
        kept = values(kept)
    strided = full.copy()
    strided[:3, :3] = full[:3, :3] * steps
    strided[:3, 3] = full[:3, :3] @ start + full[:3, 3]
    return _label(kept, strided) if is_label else _image(kept, strided)


def strides(shape: Sequence[int], spacing_mm: Sequence[float], max_voxels: int) -> tuple[int, int, int]:
    """Sampling step along each axis, in voxels. The axis with the finest spacing is thinned out first.

    Args:
        shape: (X, Y, Z).
        spacing_mm: voxel size along the same axes.
        max_voxels: the largest number of remaining voxels, at least 1.
    """
    steps = [1, 1, 1]

    def left(axis: int) -> int:
        return -(-shape[axis] // steps[axis])

    while math.prod(left(axis) for axis in range(3)) > max_voxels:
        finest = min((axis for axis in range(3) if left(axis) > 1), key=lambda axis: spacing_mm[axis] * steps[axis])
        steps[finest] += 1
    return steps[0], steps[1], steps[2]


def _label(volume: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> bytes:
    values = np.asarray(volume).astype(np.uint8)
    if not np.array_equal(values, volume):
        raise ValueError("labels must be whole numbers from 0 to 255")
    return _nifti(values, affine, slope=1.0, offset=0.0, shown=(0.0, 255.0), intent=_LABEL_INTENT)


def _image(volume: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> bytes:
    values = np.nan_to_num(np.asarray(volume, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = _window(values, KEPT_PERCENTILES)
    shown = _window(values, SHOWN_PERCENTILES)
    whole = bool(np.array_equal(values, np.rint(values)))
    if whole:
        low, high = math.floor(low), math.ceil(high)
    slope = 1.0 if whole and high - low < EXACT_VALUES else (high - low) / 255
    # The header stores float32. Round first, so that a reader computes exactly these values.
    slope, low = float(np.float32(slope)) or 1.0, float(np.float32(low))
    steps = np.rint((np.clip(values, low, high) - low) / slope)
    stored = steps.astype(np.uint8 if steps.max() <= 255 else np.int16)
    return _nifti(stored, affine, slope=slope, offset=low, shown=shown, intent=0)


def _window(values: npt.NDArray[np.float64], percentiles: tuple[float, float]) -> tuple[float, float]:
    """The range between two percentiles; the range of all values if both are equal (a mostly empty volume)."""
    low, high = (float(v) for v in np.percentile(values, percentiles))
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def _nifti(
    stored: npt.NDArray[np.generic],
    affine: npt.NDArray[np.float64],
    *,
    slope: float,
    offset: float,
    shown: tuple[float, float],
    intent: int,
) -> bytes:
    # Set here, because nibabel would choose another scaling.
    header = nib.Nifti1Header()
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape)
    header.set_zooms(spacing_of(affine))
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, offset
    header["cal_min"], header["cal_max"] = shown
    header["intent_code"] = intent
    header["vox_offset"] = _HEADER_BYTES
    voxels = stored.astype(stored.dtype.newbyteorder("<")).tobytes(order="F")
    return gzip.compress(header.binaryblock.ljust(_HEADER_BYTES, b"\0") + voxels, mtime=0)
