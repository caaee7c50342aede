"""One DICOM file as a checked record: a slice, or a file that is known to be harmless, or an error.

Attributes are converted and checked here and nowhere else, because a damaged file can hold any value under any name.
pydicom is imported only for DICOM files.
"""

from __future__ import annotations

import logging
import math
import mmap
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.io.errors import check_surplus, damaged, first_line

HARMLESS_NAMES = ("dicomdir", "version", "lockfile", "readme", "license", "thumbs.db", "desktop.ini", "autorun.inf")
"""Names, in lower case, of files that may lie beside the slices of a series."""
HARMLESS_ENDINGS = (".txt", ".md", ".json", ".csv", ".xml", ".html", ".pdf", ".log")
"""Endings, in lower case, of further files that may lie there. A DICOM file with such a name is read."""
_WITHOUT_IMAGES = ("1.3.12.2.1107.5.9.1", "1.3.46.670589.2.", "1.3.46.670589.5.", "1.3.46.670589.11.0.0.12.")
"""Private SOP classes (Siemens, Philips) of objects without an image, or the beginnings of their UIDs."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MAX_DEFLATED = 1_000_000
"""Largest deflated file, bytes. It can expand a thousandfold."""
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice of a series, with checked attributes; positions are in patient coordinates (LPS, mm)."""

    path: Path
    series: str
    frame_of_reference: str
    """Empty if the file has none."""
    size: tuple[int, int]
    """Rows, columns."""
    position: npt.NDArray[np.float64]
    """(3,), centre of the first voxel."""
    directions: npt.NDArray[np.float64]
    """(2, 3): directions of a row and of a column."""
    spacing_mm: tuple[float, float]
    """Distance of rows, of columns."""
    thickness_mm: float | None
    """SpacingBetweenSlices, or else SliceThickness."""
    scaling: tuple[float, float]
    """Slope and intercept; 1 and 0 if the file has none."""
    voxel_bytes: int
    localizer: bool


def visible_files(folder: Path) -> list[Path]:
    """All entries of a folder that are neither folders nor hidden, sorted by name. Broken links are among them."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and not path.is_dir()]


def is_dicom(path: Path) -> bool:
    """Whether a file starts like a DICOM file. Preamble and prefix may be missing."""
    if not path.is_file():
        return False
    with suppress(OSError), open(path, "rb") as stream:
        return _start(stream.read(_HEAD_BYTES)) is not None
    return False


def _start(head: bytes) -> int | None:
    """Where pydicom has to start to read a file that begins with `head`; None for a file that is not DICOM.

    Some files lack the prefix, or the preamble too. Then the first element is of group 2 or 8, in either byte order.
    """
    if head[128:132] == b"DICM":
        return 0
    groups = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
    plausible = (k for k in (0, 128, 132) if head[k : k + 2] in groups and head[k + 3 : k + 4] <= b"\x30" and head[k:])
    return next(plausible, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Discard the remarks of pydicom and highdicom on values: our checks refuse a value, or it does not matter."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def dataset(path: Path, *, voxels: bool = False) -> tuple[Any, int]:
    """pydicom's data set of a file, up to its voxels or with them; and how many bytes follow (deflated: 0 or 1).

    Raises:
        DataError: the file is not DICOM, or is damaged.
    """
    import pydicom

    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
            start = _start(head)
            if start is None:
                raise DataError("is not a DICOM file", where=path, seen=f"starts with {head[:4].hex(' ') or 'nothing'}")
            # A memory map, because a wrong length in a damaged file must not reserve gigabytes.
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if _DEFLATED in head and len(content) > _MAX_DEFLATED:
                    raise DataError(
                        "is a deflated file of unusual size",
                        where=path,
                        seen=f"{len(content)} bytes",
                        rule=f"at most {_MAX_DEFLATED} bytes",
                        hint="inflate it, e.g. gdcmconv --raw",
                    )
                source: Any = BytesIO(content[start:]) if start else content
                found = pydicom.dcmread(source, stop_before_pixels=not voxels, force=True)
                follow = len(content) - start - source.tell() or int(_DEFLATED in head and "Rows" in found)
    except DataError:
        raise
    except OSError as error:
        raise damaged(path, error) from None
    except Exception as error:  # pydicom raises many kinds for broken files
        raise DataError("is not a readable DICOM file", where=path, seen=first_line(error)) from None
    if "TransferSyntaxUID" not in found.file_meta:
        implicit, little = found.original_encoding
        kinds = pydicom.uid
        explicit = kinds.ExplicitVRLittleEndian if little else kinds.ExplicitVRBigEndian
        found.file_meta.TransferSyntaxUID = kinds.ImplicitVRLittleEndian if implicit else explicit
    return found, follow


def value(header: Any, name: str, where: Path) -> Any:
    """The value of an attribute; None if it is absent or empty.

    Raises:
        DataError: pydicom cannot convert it.
    """
    try:
        found = header.get(name)
        return None if found is None or (hasattr(found, "__len__") and len(found) == 0) else found
    except Exception as error:  # of many kinds
        raise DataError(f"has a malformed {name}", where=where, seen=first_line(error)) from None


def _texts(header: Any, name: str, where: Path) -> list[str]:
    """The values of an attribute as text: as written in the file, without padding."""
    from pydicom import Sequence
    from pydicom.multival import MultiValue

    found = value(header, name, where)
    if isinstance(found, Sequence):
        raise DataError(f"has a malformed {name}", where=where, seen="a sequence", rule="text or numbers")
    items = [] if found is None else list(found) if isinstance(found, list | MultiValue) else [found]
    texts = [str(getattr(item, "original_string", item)).strip(" \0") for item in items]
    return [] if not any(texts) else texts


def _numbers(header: Any, name: str, where: Path, *, count: int = 1) -> tuple[float, ...] | None:
    """The numbers of an attribute; None if it is absent or empty. NaN and infinity may be among them.

    Raises:
        DataError: another number of values than `count`, or a value is not a number.
    """
    texts = _texts(header, name, where)
    if not texts:
        return None
    if len(texts) != count or not all(_NUMBER.fullmatch(text) for text in texts):
        raise DataError(
            f"has a malformed {name}",
            where=where,
            seen="\\".join(texts)[:100],
            rule="one number" if count == 1 else f"{count} numbers, separated by \\",
            hint="export the series again, or correct the attribute in every file",
        )
    return tuple(float(text) for text in texts)


def _text(header: Any, name: str, where: Path) -> str:
    texts = _texts(header, name, where)
    if len(texts) > 1:
        raise DataError(f"has a malformed {name}", where=where, seen="\\".join(texts)[:100], rule="one value")
    return texts[0] if texts else ""


def _whole(header: Any, name: str, where: Path, default: int) -> int:
    (number,) = _numbers(header, name, where) or (float(default),)
    if not (number.is_integer() and 0 <= number < 2**31):
        raise DataError(f"has a malformed {name}", where=where, seen=f"{number:g}", rule="a whole number from 0")
    return int(number)


def read_slice(path: Path) -> Slice | str:
    """The slice in a file of a series folder; or a text that says why the file may be left out.

    Raises:
        DataError: the file is neither a slice nor known to be harmless.
    """
    if not path.is_file():
        dangling = path.is_symlink() and not path.exists()
        raise DataError("is a link to a file that is missing" if dangling else "is not a file", where=path)
    if not is_dicom(path):
        name = path.name.lower()
        if name in HARMLESS_NAMES or name.endswith(HARMLESS_ENDINGS):
            return "not DICOM"
        try:
            dataset(path)
        except DataError as error:
            raise DataError(
                error.problem,
                where=path,
                seen=error.seen,
                rule=f"DICOM, or the name {', '.join(HARMLESS_NAMES)} or *{', *'.join(HARMLESS_ENDINGS)}",
                hint="copy it again, or remove it if it does not belong to the series",
            ) from None
    with quiet():
        header, follow = dataset(path)
        if harmless := _without_image(header, bool(follow), path):
            return harmless
        one = _checked(header, path)
        check_surplus(path, follow - math.prod(one.size) * one.voxel_bytes, f"{one.size} of {one.voxel_bytes} bytes")
        return one


def _without_image(header: Any, has_voxels: bool, path: Path) -> str | None:
    """What an object without an image is; None for an image, or if it may have been one before it was damaged."""
    from pydicom.uid import UID_dictionary

    uid = _text(header, "SOPClassUID", path) or _text(header.file_meta, "MediaStorageSOPClassUID", path)
    name = UID_dictionary[uid][0] if uid in UID_dictionary else ""
    if name == "Media Storage Directory Storage":
        return "index of a medium"
    if has_voxels or "Image Storage" in name or not (name or uid.startswith(_WITHOUT_IMAGES)):
        return None
    return f"object without an image ({name or uid})"


def _image_type(header: Any, path: Path, kind: str | None) -> list[str]:
    """The values of ImageType in upper case, of a file that holds one slice.

    Raises:
        DataError: the file holds several frames or a mosaic.
    """
    frames = _whole(header, "NumberOfFrames", path, 1)
    if frames > 1:
        raise DataError(
            "holds several frames",
            where=path,
            seen=f"{frames} frames, {kind}",
            rule="one slice per file",
            hint="convert it to single-frame DICOM or NIfTI (e.g. dcm2niix)",
        )
    image_type = [text.upper() for text in _texts(header, "ImageType", path)]
    if not {"MOSAIC", "VFRAME"}.isdisjoint(image_type):
        raise DataError(
            "is a mosaic: one image with all slices of a volume",
            where=path,
            seen="ImageType " + "\\".join(image_type),
            rule="one slice per file",
            hint="convert it to NIfTI (e.g. dcm2niix)",
        )
    return image_type


def _checked(header: Any, path: Path) -> Slice:
    kind = _text(header, "SOPClassUID", path) or None
    image_type = _image_type(header, path, kind)
    position, orientation, spacing = (
        _numbers(header, name, path, count=count)
        for name, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    )
    size = _whole(header, "Rows", path, 0), _whole(header, "Columns", path, 0)
    series = _text(header, "SeriesInstanceUID", path)
    needed = {
        "ImagePositionPatient": position,
        "ImageOrientationPatient": orientation,
        "PixelSpacing": spacing,
        "Rows": size[0],
        "Columns": size[1],
        "SeriesInstanceUID": series,
    }
    for name, found in needed.items():
        if not found:
            raise DataError(
                f"has no {name}",
                where=path,
                seen=kind,
                rule="an image slice with position, orientation and spacing",
                hint="remove files that are not slices (localisers, screenshots) from the folder",
            )
    assert position is not None
    assert orientation is not None
    assert spacing is not None
    _check_grey(header, path)
    if not np.isfinite([*position, *orientation, *spacing]).all() or min(spacing) <= 0:
        raise DataError(
            "has an impossible geometry",
            where=path,
            seen=f"position {list(position)}, spacing {list(spacing)}",
            rule="finite numbers, spacing above 0",
        )
    directions = np.array(orientation).reshape(2, 3)
    if np.abs(np.linalg.norm(directions, axis=1) - 1).max() > 1e-3:
        raise DataError(
            "has an impossible orientation", where=path, seen=list(orientation), rule="two directions of length 1"
        )
    return Slice(
        path=path,
        series=series,
        frame_of_reference=_text(header, "FrameOfReferenceUID", path),
        size=size,
        position=np.array(position),
        directions=directions,
        spacing_mm=(spacing[0], spacing[1]),
        thickness_mm=_thickness(header, path),
        scaling=_scaling(header, path),
        voxel_bytes=max(1, _whole(header, "BitsAllocated", path, 16) // 8),
        localizer="LOCALIZER" in image_type,
    )


def _check_grey(header: Any, path: Path) -> None:
    """Refuse colours, and stored values that a table converts."""
    samples, colours = _whole(header, "SamplesPerPixel", path, 1), _text(header, "PhotometricInterpretation", path)
    if samples != 1 or colours.upper().startswith(("RGB", "YBR", "PALETTE")):
        raise DataError("is a colour image", where=path, seen=f"{samples} samples {colours}", rule="one sample of grey")
    if value(header, "ModalityLUTSequence", path) is not None:
        raise DataError(
            "has a table of intensities", where=path, seen="ModalityLUTSequence", rule="RescaleSlope, RescaleIntercept"
        )


def _thickness(header: Any, path: Path) -> float | None:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        with suppress(DataError):  # needed for a single slice only
            (number,) = _numbers(header, name, path) or (0.0,)
            if np.isfinite(number) and number > 0:
                return number
    return None


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    (slope,) = _numbers(header, "RescaleSlope", path) or (1.0,)
    (intercept,) = _numbers(header, "RescaleIntercept", path) or (0.0,)
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise DataError(
            "has an impossible scaling",
            where=path,
            seen=f"RescaleSlope {slope:g}, RescaleIntercept {intercept:g}",
            rule="finite numbers",
        )
    return slope or 1.0, intercept


def read_voxels(one: Slice) -> npt.NDArray:
    """The stored values (rows, columns) of a slice.

    Raises:
        DataError: they cannot be decoded, are not finite, or have another shape than the header says.
    """
    try:
        with quiet():
            found: npt.NDArray = dataset(one.path, voxels=True)[0].pixel_array
    except DataError:
        raise
    except Exception as error:  # missing decoders, truncated or corrupt data
        raise DataError(
            "the voxels cannot be read",
            where=one.path,
            seen=first_line(error),
            hint="copy the file again; a compressed one can be decompressed (e.g. gdcmconv --raw)",
        ) from None
    if found.shape != one.size:
        raise DataError(
            "the number of voxels differs from the header",
            where=one.path,
            seen=found.shape,
            rule=f"{one.size[0]} rows, {one.size[1]} columns",
        )
    if not np.isfinite(found).all():
        raise DataError("holds voxels that are not finite", where=one.path)
    return found
