"""Reading and writing NIfTI volumes, with checks whose messages name the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.files import whole_file
from distilldsm.io.orientation import spacing_of

FloatArray = npt.NDArray[np.floating]

LABEL_TOLERANCE = 1e-3
"""Labels stored as floats may differ by this much from a whole number (rounding of a scale factor)."""


@dataclass(frozen=True)
class Volume:
    """An image in the orientation its file has.

    data: (C, X, Y, Z) float32; affine: (4, 4), voxel to scanner mm (RAS+); path: where it was read from.
    """

    data: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    path: Path

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes, mm."""
        return spacing_of(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.data.shape[1:]  # type: ignore[return-value]


def unreadable(path: Path, error: BaseException) -> DataError | None:
    """The error to raise for a file that the system does not let us read; None where its bytes are at fault.

    Args:
        error: what reading it raised; libraries hide the system's answer behind answers of their own.
    """
    if not (isinstance(error, OSError) and error.errno is not None):  # gzip's and nibabel's own carry no number
        try:
            with open(path, "rb") as stream:
                stream.read(1)
        except OSError as refused:
            error = refused
        else:
            return None
    return DataError(
        "cannot be read",
        where=path,
        seen=_first_line(error),
        hint="get the right to read it (its owner: chmod u+r)"
        if isinstance(error, PermissionError)
        else "look after the disk or the network it lies on",
    )


def load_nifti(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Open a NIfTI file; the voxels are read later.

    Raises:
        DataError: missing or unreadable file, or a geometry that is not finite or has no volume.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("file not found", where=path)
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds for broken headers
        raise unreadable(path, error) or DataError(
            "is not a readable NIfTI file", where=path, seen=_first_line(error)
        ) from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError("is not a NIfTI file", where=path, seen=type(image).__name__, rule=".nii or .nii.gz")
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            "has an impossible geometry",
            where=path,
            seen=f"affine {np.asarray(affine).tolist()}",
            rule="finite numbers, no axis of length 0",
            hint="set the file's sform or qform",
        )
    return image


def read_voxels(image: nib.Nifti1Image, path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """The voxels with the header's scaling applied.

    Raises:
        DataError: the file is truncated or damaged, or holds colours or complex numbers.
    """
    if image.get_data_dtype().kind not in "biuf":
        raise DataError("is no volume of real numbers", where=path, seen=str(image.get_data_dtype()))
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:  # zlib, EOF, OS errors and value errors of a short file
        raise unreadable(Path(path), error) or DataError(
            "is truncated or damaged", where=path, seen=_first_line(error), hint="copy or export the file again"
        ) from None


def read_image(paths: Sequence[str | os.PathLike[str]], channels: int) -> Volume:
    """Read one case: `channels` 3-D files of one geometry, or one 4-D file with `channels` volumes.

    Raises:
        DataError: unreadable file, wrong number of channels, geometries that differ, or non-finite voxels.
    """
    first = Path(paths[0])
    opened = [(Path(p), load_nifti(p)) for p in paths]
    base = opened[0][1]
    if len(opened) == 1 and channels > 1:
        data = read_voxels(base, first)
        if data.ndim != 4 or data.shape[3] != channels:
            raise DataError(
                "has the wrong number of channels",
                where=first,
                seen=f"shape {data.shape}",
                rule=f"{channels} channels: one 3-D file each, or one 4-D file",
            )
        stacked = np.moveaxis(data, 3, 0)
    else:
        if len(opened) != channels:
            raise DataError("wrong number of image files", where=first, seen=len(opened), rule=f"{channels} channels")
        arrays = []
        for path, image in opened:
            check_same_geometry(base, image, first, path)
            arrays.append(_three_dimensional(read_voxels(image, path), path))
        stacked = np.stack(arrays)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        voxels = np.ascontiguousarray(stacked, dtype=np.float32)
    if not np.isfinite(voxels).all():
        bad = int((~np.isfinite(voxels)).sum())
        raise DataError("holds voxels that are not finite", where=first, seen=f"{bad} voxels NaN or infinite")
    return Volume(voxels, np.asarray(base.affine, dtype=np.float64), first)


def read_label(path: str | os.PathLike[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Read a label map as (X, Y, Z) uint8 and its affine.

    Raises:
        DataError: unreadable file, or values that are not whole numbers from 0 to 255.
    """
    path = Path(path)
    image = load_nifti(path)
    data = _three_dimensional(read_voxels(image, path), path)
    rounded = np.rint(data)
    if not (np.isfinite(data).all() and np.abs(data - rounded).max(initial=0) <= LABEL_TOLERANCE):
        raise DataError(
            "holds labels that are not whole numbers",
            where=path,
            seen=f"values such as {_strange(data)}",
            rule="whole numbers from 0 to 255",
        )
    if rounded.min(initial=0) < 0 or rounded.max(initial=0) > 255:
        raise DataError(
            "holds labels out of range",
            where=path,
            seen=f"{rounded.min():g} to {rounded.max():g}",
            rule="whole numbers from 0 to 255",
        )
    return rounded.astype(np.uint8), np.asarray(image.affine, dtype=np.float64)


def check_same_geometry(
    a: nib.Nifti1Image, b: nib.Nifti1Image, path_a: Path, path_b: Path, tolerance_mm: float = 1e-2
) -> None:
    """Raise DataError, printing both geometries, unless shape and affine agree.

    The affines agree when no corner of the volume lies more than `tolerance_mm` apart.
    """
    if a.shape[:3] == b.shape[:3] and corner_distance_mm(a.affine, b.affine, a.shape[:3]) <= tolerance_mm:
        return
    raise DataError(
        f"does not lie on the grid of {path_a.name}",
        where=path_b,
        seen=f"shape {b.shape[:3]}, affine {np.round(b.affine, 4).tolist()}",
        rule=f"shape {a.shape[:3]}, affine {np.round(a.affine, 4).tolist()}",
        hint="resample it to the image's grid",
    )


def corner_distance_mm(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], shape: Sequence[int]) -> float:
    """Largest distance, mm, between where two affines put the corners of a volume of this shape; axes that it lacks
    count one voxel."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1, 1)[:3]])).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
    with np.errstate(all="ignore"):  # a broken header may hold infinity; the distance then is no number
        return float(np.linalg.norm(((a - b) @ homogeneous)[:3], axis=0).max())


def write_label(path: str | os.PathLike[str], mask: npt.NDArray[np.integer], affine: npt.NDArray[np.float64]) -> None:
    """Write a mask (X, Y, Z) as uint8 NIfTI, whole or not at all."""
    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    image = nib.Nifti1Image(mask.astype(np.uint8), affine)
    image.header.set_xyzt_units("mm")
    with whole_file(path, suffix) as temporary:
        nib.save(image, temporary)


def _three_dimensional(data: npt.NDArray[np.generic], path: Path) -> npt.NDArray[np.generic]:
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or min(data.shape) < 1:
        raise DataError("is not a 3-D volume", where=path, seen=f"shape {data.shape}")
    return data


def _strange(data: npt.NDArray[np.generic]) -> str:
    odd = data[~(np.abs(data - np.rint(data)) <= LABEL_TOLERANCE)]
    return ", ".join(f"{float(v):g}" for v in np.unique(odd)[:3])


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
