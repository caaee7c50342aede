"""Masks, probabilities and tables to disk: each file is whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import UserError
from distilldsm.core.files import whole_file
from distilldsm.io.scan import Scan

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GEOMETRY = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an error.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    try:
        with whole_file(path, suffix) as temporary:
            yield temporary
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                "no space left to write",
                where=path,
                seen=error.strerror,
                rule="nothing of it was kept",
                hint="free space or choose another place, then run the same command again",
            ) from None
        raise UserError("cannot be written", where=path, seen=error.strerror or str(error)) from None


def mask_header(scan: Scan) -> Any:
    """A header for arrays on the scan's grid: geometry, form codes and unit of its own header, nothing else of it.

    A DICOM series gets its affine as qform and sform, both of code 1 (scanner).
    """
    source = scan.source
    if not isinstance(source, nib.Nifti1Header):
        header = nib.Nifti1Header()
        header.set_data_shape(scan.shape)
        header.set_qform(scan.affine, code=1)
        header.set_sform(scan.affine, code=1)
        header.set_xyzt_units("mm")
        return header
    header = nib.Nifti2Header() if isinstance(source, nib.Nifti2Header) else nib.Nifti1Header()
    header.set_data_shape(scan.shape)
    for key in _GEOMETRY:
        header[key] = source[key]
    header["pixdim"][:4] = source["pixdim"][:4]
    header.set_xyzt_units(source.get_xyzt_units()[0])
    return header


def write_nifti(path: Path, array: npt.NDArray[np.uint8], scan: Scan, *, slope: float | None = None) -> None:
    """Write a uint8 array (X, Y, Z) or (X, Y, Z, K) on the scan's grid; `slope` goes into the header.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    header = mask_header(scan)
    header.set_data_dtype(np.uint8)
    image_type = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_type(array, None, header)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    with replacing(path, suffix) as temporary:
        if slope is None:
            nib.save(image, temporary)
            return
        _write_scaled(image, array, slope, temporary)


def _write_scaled(image: Any, array: npt.NDArray[np.uint8], slope: float, path: Path) -> None:
    # nibabel writes stored integers with a slope of one's own only this way; what it computes itself needs floats.
    header = image.header.copy()
    header.set_slope_inter(slope, 0)
    header.set_data_offset(header.single_vox_offset)
    with nib.openers.ImageOpener(path, "wb") as stream:
        header.write_to(stream)
        stream.write(b"\0" * (header.single_vox_offset - stream.tell()))
        for volume in np.moveaxis(array, -1, 0):
            for plane in np.moveaxis(volume, -1, 0):
                stream.write(plane.tobytes(order="F"))


@contextmanager
def scratch_array(path: Path, shape: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """A uint8 array, zeros, in a temporary file beside `path`: on disk, as it may be larger than the memory.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.scratch")
    size = int(np.prod(shape, dtype=object))
    try:
        try:
            with open(temporary, "wb") as stream:
                # Reserved now: a full disk found while writing through a memory map would kill the process.
                os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                "no space left to write" if error.errno in _FULL else "cannot be written",
                where=temporary.parent,
                seen=error.strerror,
                rule=f"{size / 1e9:.2f} GB for the probabilities",
            ) from None
        yield np.memmap(temporary, dtype=np.uint8, mode="r+", shape=tuple(shape), order="F")
    finally:
        temporary.unlink(missing_ok=True)


def write_volumes(path: Path, volumes_ml: Mapping[str, Mapping[str, float]]) -> None:
    """Volume per label and region, ml, per scan: .csv (a row per scan and label) or .json ({scan: {label: ml}})."""
    if path.suffix == ".csv":
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["scan", "label", "volume_ml"])
        for scan, labels in volumes_ml.items():
            writer.writerows([scan, label, f"{ml:.6g}"] for label, ml in labels.items())
        content = text.getvalue()
    else:
        import json

        content = json.dumps({scan: dict(labels) for scan, labels in volumes_ml.items()}, indent=2) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
