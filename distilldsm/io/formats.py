"""The formats of scans, and how to read and write them.

To add a format, write a class like `Nifti` in a new file and add it to FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.io.channel_names import check_channel_names
from distilldsm.io.dicom import Dicom, is_dicom
from distilldsm.io.errors import Refuse, raise_error
from distilldsm.io.nifti import Nifti
from distilldsm.io.scan import Channel, Labels, Scan, check_same_grid, check_size

__all__ = ["FORMATS", "Channel", "Format", "Labels", "Scan", "read_labels", "read_scan", "write_mask"]

LABEL_BYTES = 6
"""Memory of one voxel while a label map is read, at most."""
LABEL_TOLERANCE = 1e-3
"""Largest difference of a label stored as float from a whole number (rounding of a scale factor)."""


class Format(Protocol):
    """A format of scans.

    Attributes:
        name: name in reports.
        endings: endings of file names, the longest first; empty if a scan is a folder.
        mask_format: name of the mask format for `distilldsm predict --format`.
        mask_endings: endings of mask file names. The first one is used if the user names only a folder.
        mask_of_any_scan: whether masks can be written for scans of other formats too.
    """

    name: str
    endings: tuple[str, ...]
    mask_format: str
    mask_endings: tuple[str, ...]
    mask_of_any_scan: bool

    def can_read(self, path: Path) -> bool:
        """Whether a path is a scan of this format, by its name or its content."""

    def read(self, path: Path, *, refuse: Refuse = raise_error) -> Scan:
        """Read and check the header of a scan with all its channels. Voxels are read when they are first needed.

        Args:
            refuse: called with each error in a scan that can still be read: a broken header rule, or voxels that are
                not finite.

        Raises:
            DataError: the scan cannot be read.
        """

    def check_mask(self, scan: Scan, *, labels: Mapping[str, int], model: str) -> tuple[str, ...]:
        """Check, before the network runs, that `write` will accept the scan. Returns remarks.

        Raises:
            DataError: the scan's headers do not allow a mask.
        """

    def write(
        self, path: Path, mask: npt.NDArray[np.uint8], scan: Scan, *, labels: Mapping[str, int], model: str
    ) -> None:
        """Write label values (X, Y, Z) on the scan's grid.

        Args:
            labels: name to value, background (0) included.
            model: name of the model.

        Raises:
            UserError: the disk is full, the file cannot be written, or the scan does not allow it.
        """


FORMATS: tuple[Format, ...] = (Nifti(), Dicom())


def format_of(path: Path) -> Format | None:
    """The format of a scan; None if no entry of FORMATS can read it."""
    return next((one for one in FORMATS if one.can_read(path)), None)


def is_scan_file(path: Path) -> bool:
    """Whether the file name has the ending of a scan, in upper or lower case."""
    return path.name.lower().endswith(tuple(ending for one in FORMATS for ending in one.endings))


def is_series(folder: Path) -> bool:
    """Whether a folder is one scan, e.g. a DICOM series."""
    return any(one.can_read(folder) for one in FORMATS if not one.endings)


def stem(path: Path) -> str:
    """The file name without the ending of its scan or mask format."""
    for one in FORMATS:
        for ending in (*one.endings, *one.mask_endings):
            if path.name.lower().endswith(ending):
                return path.name[: -len(ending)]
    return path.name


def unknown_format(path: Path) -> DataError:
    """The error to raise for a path that no entry of FORMATS can read."""
    files = " or ".join(ending for one in FORMATS for ending in reversed(one.endings))
    if path.is_dir():
        return DataError("holds no scan", where=path, rule=f"{files} files, or DICOM series")
    single = is_dicom(path)
    return DataError(
        "is a single DICOM file" if single else "is not a NIfTI file",
        where=path,
        seen=path.name,
        rule=f"a {files} file, or the folder of a DICOM series",
        hint="give the folder that holds the series" if single else None,
    )


def read_file(path: Path, *, refuse: Refuse = raise_error) -> Scan:
    """Read the scan in one file or series folder, with all its channels; see `Format.read`.

    Raises:
        DataError: the file is missing, has an unknown format, or cannot be read.
    """
    one = format_of(path)
    if one is None:
        raise unknown_format(path) if path.exists() else DataError("file not found", where=path)
    return one.read(path, refuse=refuse)


def read_scan(
    paths: Sequence[Path], channels: int, *, limit_bytes: float = float("inf"), names: Sequence[str] = ()
) -> Scan:
    """Read one scan: `channels` files or series of one channel on one grid, or one file with `channels` channels.

    Headers are read and checked now, voxels when they are first needed (`Scan.load`).

    Args:
        limit_bytes: largest memory for voxels and mask.
        names: the model's channels, for error messages; the names of files must not contradict them.

    Raises:
        ConfigError: see `check_channel_names`.
        DataError: a file cannot be read, the number of channels is wrong, the grids differ, or voxels and mask need
            more than `limit_bytes`.
    """
    if len(names) == len(paths):
        check_channel_names(paths, [stem(path) for path in paths], names)
    scans = [read_file(path) for path in paths]
    base = scans[0]
    wanted = f"{channels} channels" + (f" ({', '.join(names)})" if names else "")
    if len(scans) not in (1, channels):
        raise DataError(
            "wrong number of image files",
            where=base.path,
            seen=f"{len(scans)}: {', '.join(path.name for path in paths)}",
            rule=wanted,
            hint="give one file per channel, in this order",
        )
    for scan in scans:
        if len(scan.channels) != channels // len(scans):
            raise DataError(
                "has the wrong number of channels",
                where=scan.path,
                seen=f"{len(scan.channels)} (shape {scan.stored_shape})",
                rule=f"{wanted}: one 3-D file or series each, or one 4-D file" if channels > 1 else "one volume",
                hint="give one file per channel, in this order" if channels > 1 else None,
            )
        check_same_grid(base, scan)
    check_size(scans, limit_bytes)
    return Scan(
        tuple(channel for scan in scans for channel in scan.channels),
        base.affine,
        base.path,
        base.source,
        tuple(file for scan in scans for file in scan.skipped),
        tuple(remark for scan in scans for remark in scan.remarks),
    )


MASK_HINT = "resample the mask to the scan's grid (nearest neighbour), or give the mask of this scan"


def read_labels(path: Path, *, on: Scan | None = None) -> Labels:
    """Read a label map.

    Args:
        on: the scan that must have the same grid.

    Raises:
        DataError: the file cannot be read, values are not whole numbers from 0 to 255, or the grid differs from the
            scan's grid.
    """
    scan = read_scan([path], 1)
    if on is not None:
        check_same_grid(on, scan, MASK_HINT)
    channel = scan.channels[0]
    if channel.scale is None and channel.raw.dtype == np.uint8:
        return Labels(channel.raw, scan.affine, path)
    labels = np.empty(scan.shape, dtype=np.uint8, order="F")
    for k in range(scan.shape[2]):  # slice by slice, to save memory
        values = channel.values(channel.raw[..., k])
        whole = np.rint(values)
        odd = np.abs(values - whole) > LABEL_TOLERANCE
        if odd.any():
            raise DataError(
                "holds labels that are not whole numbers",
                where=path,
                seen="values such as " + ", ".join(f"{float(v):g}" for v in np.unique(values[odd])[:3]),
                rule="whole numbers from 0 to 255",
            )
        if whole.min() < 0 or whole.max() > 255:
            raise DataError(
                "holds labels out of range",
                where=path,
                seen=f"{whole.min():g} to {whole.max():g}",
                rule="whole numbers from 0 to 255",
            )
        labels[..., k] = whole
    return Labels(labels, scan.affine, path)


def write_mask(
    path: Path, mask: npt.NDArray[np.uint8], scan: Scan, *, labels: Mapping[str, int] | None = None, model: str = ""
) -> None:
    """Write label values (X, Y, Z) on the scan's grid. The ending of the file name selects the format.

    Args:
        labels: name to value, background (0) included. DICOM SEG needs them, because it stores label names.
        model: name of the model, for formats that store it.

    Raises:
        DataError: no format has this ending, or the scan's headers do not allow it.
        UserError: the disk is full, or the file cannot be written.
    """
    one = next((one for one in FORMATS if path.name.endswith(one.mask_endings)), None)
    if one is None:
        endings = [ending for one in FORMATS for ending in one.mask_endings]
        raise DataError("is not a file name for a mask", where=path, rule=f"ends with {' or '.join(endings)}")
    one.write(path, mask, scan, labels=labels or {}, model=model)
