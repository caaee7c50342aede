"""The format NIfTI: one file, .nii or .nii.gz, with one or several channels.

Headers are checked as they are on disk. A fault that a library would silently repair is refused.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.openers import ImageOpener
from nibabel.volumeutils import apply_read_scaling

from distilldsm.core.errors import DataError
from distilldsm.io.errors import Refuse, check_surplus, damaged, raise_error
from distilldsm.io.header_rules import (
    AFFINE_RULES,
    GEOMETRY_REMARKS,
    LAYOUT_RULES,
    MM_PER_UNIT,
    VALUE_RULES,
    broken,
    length_unit,
    orthogonal,
    stored_shape,
)
from distilldsm.io.orientation import Affine
from distilldsm.io.output import replacing
from distilldsm.io.scan import Channel, Scan

BLOCK_BYTES = 16_000_000
MAX_COMPRESSION = 1_100
"""gzip compresses by a factor of 1032 at most. A header that needs a larger factor is wrong."""
_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_SILENT = logging.Logger("distilldsm.nifti", logging.CRITICAL + 1)
"""Discards nibabel's messages about repaired headers. Our rules check the header before the repair."""


class Nifti:
    """NIfTI-1 and NIfTI-2 with header and voxels in one file; see `formats.Format`."""

    name = "nifti"
    endings: tuple[str, ...] = (".nii.gz", ".nii")
    mask_format = "nifti"
    mask_endings = endings
    mask_of_any_scan = True

    def can_read(self, path: Path) -> bool:
        """Whether the file name ends like a NIfTI file, in upper or lower case, or the file holds one."""
        if path.name.lower().endswith(self.endings):
            return True
        with suppress(OSError, EOFError, zlib.error):
            return path.is_file() and _header_kind(_head(path)) is not None
        return False

    def read(self, path: Path, *, refuse: Refuse = raise_error) -> Scan:
        """Read a scan. Its header is read and checked now, its voxels later.

        Raises:
            DataError: the file is missing or cannot be read, or its header breaks a rule.
        """
        file = NiftiFile(path, refuse)
        for error in (*broken(VALUE_RULES, file.raw_header, path), *broken(AFFINE_RULES, file.affine, path)):
            refuse(error)
        size = math.prod(file.shape) * file.kept_type.itemsize
        channels = [
            Channel(partial(file.volume, k), file.kept_scale, shape=file.shape, nbytes=size)
            for k in range(file.volumes)
        ]
        remarks = (f"{path.name}: {one.problem} ({one.seen})" for one in broken(GEOMETRY_REMARKS, file, path))
        return Scan(tuple(channels), orthogonal(file.affine), path, file, remarks=tuple(remarks))

    def check_mask(self, scan: Scan, *, labels: Mapping[str, int], model: str) -> tuple[str, ...]:
        """Return no remarks: every scan allows a NIfTI mask."""
        return ()

    def write(
        self, path: Path, mask: npt.NDArray[np.uint8], scan: Scan, *, labels: Mapping[str, int], model: str
    ) -> None:
        """Write a mask (X, Y, Z) on the scan's grid. NIfTI does not store the names of labels and model."""
        write_nifti(path, mask, scan)


class NiftiFile:
    """One NIfTI file: its header, and its voxels when they are needed.

    Attributes:
        raw_header: header as stored; header: after nibabel's repairs.
        shape: (X, Y, Z); volumes: number of volumes; dtype: stored number type.
        affine: (4, 4) in mm, NaN if the header has no valid one.
        kept_type: number type of the voxels in memory: the stored type for integers of up to 16 bits, else float32.
        kept_scale: converts voxels in memory to intensities; None if they are intensities already.
        surplus_bytes: number of bytes after the last voxel; None until the voxels are read.
    """

    def __init__(self, path: Path, refuse: Refuse) -> None:
        self.path, self._refuse = path, refuse
        kind, block, size = _first_bytes(path)
        self.raw_header = kind(block, check=False)
        for error in broken(LAYOUT_RULES, self.raw_header, path):
            raise error
        self.header = self.raw_header.copy()
        self.header.check_fix(logger=_SILENT, error_level=100)
        shape = stored_shape(self.raw_header)
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self.volumes = shape[3] if len(shape) == 4 else 1
        self.dtype: np.dtype = self.raw_header.get_data_dtype()
        self.surplus_bytes: int | None = None
        self._offset = int(self.raw_header["vox_offset"])
        claimed = self._offset + math.prod(shape) * self.dtype.itemsize
        if claimed > (size * MAX_COMPRESSION + 10_000 if _zipped(path) else size):
            raise DataError(
                "is truncated or damaged",
                where=path,
                seen=f"{size} bytes",
                rule=f"shape {shape} of {self.dtype} needs {claimed} bytes",
                hint="copy or export the file again",
            )
        self.affine = _affine_mm(self.header)
        slope, intercept = (np.float64(self.raw_header[name]) for name in ("scl_slope", "scl_inter"))
        plain = slope == 0 or (slope, intercept) == (1, 0) or not np.isfinite([slope, intercept]).all()
        self._scale = None if plain else partial(apply_read_scaling, slope=slope, inter=intercept)
        small = self.dtype.kind in "iu" and self.dtype.itemsize <= 2
        keep = small or (self.dtype == np.dtype(np.float32) and self._scale is None)
        self.kept_type = self.dtype.newbyteorder("=") if keep else np.dtype(np.float32)
        self.kept_scale = self._scale if keep else None

    def volume(self, k: int) -> npt.NDArray:
        """Voxels (X, Y, Z) of volume `k`. The first call reads all volumes, from the start of the file to its end.

        Raises:
            DataError: the file is truncated or damaged, or voxels are not finite.
        """
        return self._volumes[k]

    @cached_property
    def _volumes(self) -> list[npt.NDArray]:
        try:
            with _open(self.path) as stream:
                stream.seek(self._offset)
                volumes = [self._read_volume(stream) for _ in range(self.volumes)]
                # Read to the end, where gzip stores its checksum.
                self.surplus_bytes = 0
                while rest := len(stream.read(BLOCK_BYTES // 16)):
                    self.surplus_bytes += rest
                    check_surplus(self.path, self.surplus_bytes, f"shape {self.shape} of {self.dtype}")
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(self.path, error) from None
        return volumes

    def _read_volume(self, stream: BinaryIO) -> npt.NDArray:
        array = np.empty(self.shape, dtype=self.kept_type, order="F")
        for start, stop in self._slabs():
            shape = (*self.shape[:2], stop - start)
            content = stream.read(math.prod(shape) * self.dtype.itemsize)
            if len(content) < math.prod(shape) * self.dtype.itemsize:
                raise EOFError("the file ends before its last voxel")
            block = np.frombuffer(content, self.dtype).reshape(shape, order="F")
            with np.errstate(over="ignore", invalid="ignore"):
                intensities = block if self._scale is None else self._scale(block)
                array[..., start:stop] = block if self.kept_scale else intensities
                self._check_finite(intensities)
        return array

    def _slabs(self) -> Iterator[tuple[int, int]]:
        """Start and stop slice of pieces of about BLOCK_BYTES."""
        x, y, z = self.shape
        step = max(1, BLOCK_BYTES // (x * y * self.dtype.itemsize))
        return ((start, min(start + step, z)) for start in range(0, z, step))

    def _check_finite(self, intensities: npt.NDArray) -> None:
        if intensities.dtype.kind != "f":
            return
        finite = np.isfinite(np.asarray(intensities, dtype=np.float32))
        if not finite.all():
            self._refuse(
                DataError(
                    "holds voxels that are not finite",
                    where=self.path,
                    seen=f"{int((~finite).sum())} voxels NaN, infinite or beyond float32 in the first affected block",
                    rule="finite numbers",
                    hint="replace them, e.g. with the value of air",
                )
            )


def _first_bytes(path: Path) -> tuple[Any, bytes, int]:
    """nibabel's class for the header, the header's bytes, and the size of the file.

    Raises:
        DataError: the file is missing, cannot be read, or is neither NIfTI-1 nor NIfTI-2.
    """
    if not path.is_file():
        raise DataError("is a directory" if path.is_dir() else "file not found", where=path)
    try:
        size, block = path.stat().st_size, _head(path)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from None
    kind = _header_kind(block)
    if kind is not None:
        return kind, block[: kind.sizeof_hdr], size
    raise DataError(
        "is not a readable NIfTI file",
        where=path,
        seen=f"{size} bytes" if len(block) < 348 else f"starts with {block[:4].hex(' ')}",
        rule="one file, .nii or .nii.gz, NIfTI-1 or NIfTI-2",
        hint="convert it (e.g. dcm2niix), or copy it again",
    )


def _head(path: Path) -> bytes:
    with _open(path) as stream:
        return stream.read(540)


def _header_kind(block: bytes) -> Any:
    """nibabel's class for a header; None for a block that is not the beginning of a NIfTI file."""
    lengths = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    for kind, start, magic in ((nib.Nifti1Header, 344, b"n+1\0"), (nib.Nifti2Header, 4, b"n+2\0")):
        if len(block) >= kind.sizeof_hdr in lengths and block[start : start + 4] == magic:
            return kind
    return None


def _affine_mm(header: Any) -> Affine:
    try:
        with np.errstate(invalid="ignore"):
            affine = np.array(header.get_best_affine(), dtype=np.float64)
    except Exception:  # a quaternion longer than 1, a voxel size below 0
        return np.full((4, 4), np.nan)
    affine[:3] *= MM_PER_UNIT[length_unit(header) or "unknown"]
    return affine


def _zipped(path: Path) -> bool:
    """Whether the file holds gzip, whatever its name says."""
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if _zipped(path) else open(path, "rb")


def _mask_header(scan: Scan) -> Any:
    """A header for arrays on the scan's grid. It copies geometry, form codes and unit from the scan, nothing else.

    For a scan of another format, qform and sform are its affine, both with code 1 (scanner).
    """
    if not isinstance(scan.source, NiftiFile):
        header = nib.Nifti1Header()
        header.set_data_shape(scan.shape)
        header.set_qform(scan.affine, code=1)
        header.set_sform(scan.affine, code=1)
        header.set_xyzt_units("mm")
        return header
    source = scan.source.header
    header = type(source)()
    header.set_data_shape(scan.shape)
    for key in _GEOMETRY:
        header[key] = source[key]
    header["pixdim"][:4] = source["pixdim"][:4]
    header.set_xyzt_units(length_unit(source))
    return header


def write_nifti(path: Path, array: npt.NDArray[np.uint8], scan: Scan, *, slope: float | None = None) -> None:
    """Write a uint8 array (X, Y, Z) or (X, Y, Z, K) on the scan's grid, with `slope` as scaling in the header.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    header = _mask_header(scan)
    header.set_data_dtype(np.uint8)
    image_type = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_type(array, None, header)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    with replacing(path, suffix) as temporary:
        if slope is None:
            nib.save(image, temporary)
        else:
            _write_scaled(image, array, slope, temporary)


def _write_scaled(image: Any, array: npt.NDArray[np.uint8], slope: float, path: Path) -> None:
    # Plane by plane: nibabel would copy the whole array, which may be larger than the memory.
    header = image.header.copy()
    header.set_slope_inter(slope, 0)
    header.set_data_offset(header.single_vox_offset)
    with ImageOpener(path, "wb") as stream:
        header.write_to(stream)
        stream.write(b"\0" * (header.single_vox_offset - stream.tell()))
        for volume in np.moveaxis(array, -1, 0):
            for plane in np.moveaxis(volume, -1, 0):
                stream.write(plane.tobytes(order="F"))
