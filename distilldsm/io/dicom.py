"""The format DICOM: reads series as scans, and writes masks as DICOM segmentations.

pydicom and highdicom are in the optional dependency group `dicom`. They are imported only for DICOM files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.core.version import __version__
from distilldsm.io.errors import Refuse, first_line, raise_error
from distilldsm.io.header_rules import AFFINE_RULES, broken, orthogonal
from distilldsm.io.orientation import Affine
from distilldsm.io.output import replacing
from distilldsm.io.scan import Channel, Scan

DIRECTION_TOLERANCE = 1e-4
"""Largest difference between the direction cosines of two slices of a series."""
SPACING_TOLERANCE = 0.02
"""Largest relative difference between the distances of neighbouring slices."""
_MAY_BE_EMPTY = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""Attributes that a DICOM object must have; they may be empty. Anonymised series often lack them."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_dicom(path: Path) -> bool:
    """Whether a path is a DICOM file: `DICM` stands after the preamble."""
    if not path.is_file():
        return False
    with suppress(OSError), open(path, "rb") as stream:
        stream.seek(128)
        return stream.read(4) == b"DICM"
    return False


class Dicom:
    """Scans: one DICOM series per folder. Masks: DICOM SEG. See `formats.Format`."""

    name = "dicom"
    endings: tuple[str, ...] = ()
    mask_format = "seg"
    mask_endings: tuple[str, ...] = (".dcm",)
    mask_of_any_scan = False

    def can_read(self, path: Path) -> bool:
        """Whether the path is a folder with DICOM files; their names do not matter."""
        return path.is_dir() and any(map(is_dicom, path.iterdir()))

    def read(self, path: Path, *, refuse: Refuse = raise_error) -> Scan:
        """Read the series in a folder as a scan of one channel: slices sorted, intensities rescaled (slope, intercept).

        Array axes are (columns, rows, slices), as in other readers of series. Voxels are read later.

        Raises:
            DataError: not exactly one series, mixed slices, missing or duplicate slices, or a tilted stack.
        """
        headers = [_header(file) for file in sorted(path.iterdir()) if is_dicom(file)]
        headers = [h for h in headers if h.file_meta.MediaStorageSOPClassUID.keyword != "MediaStorageDirectoryStorage"]
        if not headers:
            raise DataError("holds no DICOM image", where=path)
        for header in headers:
            _check_image(header)
        _check_one_series(headers, path)
        ordered, affine = _arrange(headers, path)
        for error in broken(AFFINE_RULES, affine, path):
            refuse(error)
        return Scan((_channel(ordered),), orthogonal(affine), path, tuple(ordered))

    def write(
        self, path: Path, mask: npt.NDArray[np.uint8], scan: Scan, *, labels: Mapping[str, int], model: str
    ) -> None:
        """Write a mask as DICOM SEG that refers to its series: one binary segment per label, without empty frames.

        Args:
            labels: name to value. Segments are numbered in this order, without background.

        Raises:
            DataError: the headers of the series do not allow it.
            UserError: the disk is full, or the file cannot be written.
        """
        with replacing(path) as temporary:
            _segmentation(path, mask, scan.source, labels, model).save_as(temporary)


def _header(path: Path) -> Any:
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        _ = header.file_meta.TransferSyntaxUID, header.file_meta.MediaStorageSOPClassUID
        return header
    except Exception as error:  # pydicom raises many kinds for broken files
        raise DataError("is not a readable DICOM file", where=path, seen=first_line(error)) from None


def _check_image(header: Any) -> None:
    path = header.filename
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise DataError(
            "holds several frames",
            where=path,
            seen=f"{header.NumberOfFrames} frames, {header.get('SOPClassUID')}",
            rule="one slice per file",
            hint="convert it to single-frame DICOM or NIfTI (e.g. dcm2niix)",
        )
    needed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SeriesInstanceUID")
    for name in needed:
        if header.get(name) in (None, ""):
            raise DataError(
                f"has no {name}",
                where=path,
                seen=str(header.get("SOPClassUID", "")) or None,
                rule="an image slice with position, orientation and spacing",
                hint="remove files that are not slices (reports, localisers, presentation states) from the folder",
            )
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise DataError("is a colour image", where=path, seen=f"{header.SamplesPerPixel} samples", rule="one sample")
    numbers = _numbers(header, "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    if not np.isfinite(numbers).all() or min(header.PixelSpacing) <= 0:
        raise DataError(
            "has an impossible geometry",
            where=path,
            seen=f"position {list(header.ImagePositionPatient)}, spacing {list(header.PixelSpacing)}",
            rule="finite numbers, spacing above 0",
        )


def _numbers(header: Any, *names: str) -> npt.NDArray[np.float64]:
    """The numbers in the named attributes of a slice, joined in order."""
    return np.hstack([np.array(header.get(name), dtype=np.float64) for name in names])


def _check_one_series(headers: Sequence[Any], folder: Path) -> None:
    series: dict[str, list[str]] = {}
    for header in headers:
        series.setdefault(str(header.SeriesInstanceUID), []).append(Path(header.filename).name)
    if len(series) > 1:
        listed = "; ".join(f"{uid}: {len(names)} files, e.g. {names[0]}" for uid, names in series.items())
        raise DataError(
            f"holds {len(series)} series", where=folder, seen=listed, rule="one series", hint="one folder per series"
        )
    compared = (
        ("size", ("Rows", "Columns"), 0.0),
        ("spacing", ("PixelSpacing",), 1e-3),
        ("orientation", ("ImageOrientationPatient",), DIRECTION_TOLERANCE),
    )
    for header in headers[1:]:
        for what, attributes, tolerance in compared:
            expected, found = _numbers(headers[0], *attributes), _numbers(header, *attributes)
            if np.abs(found - expected).max() > tolerance:
                raise DataError(
                    f"the {what} differs from the other slices",
                    where=header.filename,
                    seen=found.tolist(),
                    rule=f"{expected.tolist()}, as {Path(headers[0].filename).name}",
                    hint="remove other kinds of slices (localisers) from the folder",
                )


def _arrange(headers: Sequence[Any], folder: Path) -> tuple[list[Any], Affine]:
    """Sort slices along their normal; also return the affine (RAS, mm) of an array (columns, rows, slices)."""
    orientation = _numbers(headers[0], "ImageOrientationPatient")
    directions = orientation.reshape(2, 3)
    if np.abs(np.linalg.norm(directions, axis=1) - 1).max() > 1e-3:
        raise DataError(
            "has an impossible orientation",
            where=headers[0].filename,
            seen=orientation.tolist(),
            rule="two directions of length 1",
        )
    normal = np.cross(*directions)
    positions = np.array([_numbers(header, "ImagePositionPatient") for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    ordered, positions = [headers[int(k)] for k in order], positions[order]
    if len(ordered) == 1:
        step = normal * _thickness(ordered[0])
    else:
        _check_steps(ordered, positions @ normal, folder)
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        away = np.abs(positions - (positions[0] + np.arange(len(ordered))[:, None] * step)).max(axis=1)
        if away.max() > max(0.05, SPACING_TOLERANCE * float(np.linalg.norm(step))):
            worst = int(away.argmax())
            raise DataError(
                "does not lie on one line with the other slices",
                where=ordered[worst].filename,
                seen=f"position {positions[worst].tolist()}, {away[worst]:.3g} mm away",
                rule="slices of one regular stack",
            )
    row_mm, column_mm = _numbers(headers[0], "PixelSpacing")
    columns = (directions[0] * column_mm, directions[1] * row_mm, step, positions[0])
    affine = np.vstack([np.column_stack(columns), (0, 0, 0, 1)])
    return ordered, _LPS_TO_RAS @ affine


def _thickness(header: Any) -> float:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = header.get(name)
        if value not in (None, "") and np.isfinite(float(value)) and float(value) > 0:
            return float(value)
    raise DataError(
        "is a single slice without a thickness", where=header.filename, rule="SpacingBetweenSlices or SliceThickness"
    )


def _check_steps(ordered: Sequence[Any], along: npt.NDArray[np.float64], folder: Path) -> None:
    steps = np.diff(along)
    usual = float(np.median(steps))
    names = [Path(h.filename).name for h in ordered]
    same = np.flatnonzero(steps < max(1e-3, 0.01 * usual))
    if same.size:
        k = int(same[0])
        raise DataError(
            "holds two slices at one position",
            where=folder,
            seen=f"{names[k]} and {names[k + 1]} at {along[k]:.3f} mm along the normal",
            rule="one slice per position",
            hint="remove the duplicate; put each echo, phase or time point into its own folder",
        )
    odd = np.flatnonzero(np.abs(steps - usual) > max(0.01, SPACING_TOLERANCE * usual))
    if odd.size:
        k = int(odd[0])
        missing = round(steps[k] / usual) - 1
        raise DataError(
            "has a gap between slices" if missing > 0 else "has slices at uneven distances",
            where=folder,
            seen=f"{steps[k]:.3f} mm between {names[k]} and {names[k + 1]}"
            + (f": {missing} missing" if missing > 0 else ""),
            rule=f"{usual:.3f} mm, as between the other slices",
            hint="copy the whole series again",
        )


def _channel(ordered: Sequence[Any]) -> Channel:
    """A channel with voxels as stored if all slices have one rescaling, else with float32 intensities."""
    scalings = [_scaling(header) for header in ordered]
    slope, intercept = scalings[0]
    shape = (int(ordered[0].Columns), int(ordered[0].Rows), len(ordered))
    size = 2 * int(np.prod(shape))
    if len(set(scalings)) > 1:
        return Channel(lambda: _voxels(ordered, scalings), shape=shape, nbytes=2 * size)
    if (slope, intercept) == (1.0, 0.0):
        return Channel(lambda: _voxels(ordered), shape=shape, nbytes=size)
    return Channel(
        lambda: _voxels(ordered),
        lambda piece: piece * np.float64(slope) + np.float64(intercept),
        shape=shape,
        nbytes=size,
    )


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept of a slice; 1 and 0 if it has none."""
    slope, intercept = float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise DataError(
            "has an impossible scaling",
            where=header.filename,
            seen=f"RescaleSlope {slope:g}, RescaleIntercept {intercept:g}",
            rule="finite numbers",
        )
    return slope, intercept


def _voxels(ordered: Sequence[Any], scalings: Sequence[tuple[float, float]] | None = None) -> npt.NDArray:
    """Read the voxels slice by slice: as stored, or as float32 with one slope and intercept per slice (`scalings`)."""
    array: npt.NDArray | None = None
    for k, header in enumerate(ordered):
        pixels = _pixels(header)
        if scalings is not None:
            slope, intercept = scalings[k]
            pixels = (pixels * slope + intercept).astype(np.float32)
        if not np.isfinite(pixels).all():
            raise DataError("holds voxels that are not finite", where=header.filename)
        if array is None:
            # A series may mix signed and unsigned slices; then the type of the first slice does not fit all of them.
            array = np.empty((pixels.shape[1], pixels.shape[0], len(ordered)), dtype=pixels.dtype, order="F")
        elif not np.can_cast(pixels.dtype, array.dtype):
            array = array.astype(np.promote_types(pixels.dtype, array.dtype), order="F")
        array[:, :, k] = pixels.T
    assert array is not None
    return array


def _pixels(header: Any) -> npt.NDArray:
    """Stored values (rows, columns) of a slice."""
    import pydicom

    try:
        pixels: npt.NDArray = pydicom.dcmread(header.filename).pixel_array
    except Exception as error:  # missing decoders, truncated or corrupt data
        raise DataError(
            "the voxels cannot be read",
            where=header.filename,
            seen=first_line(error),
            hint="copy the file again; a compressed one can be decompressed (e.g. gdcmconv --raw)",
        ) from None
    if pixels.shape != (int(header.Rows), int(header.Columns)):
        raise DataError(
            "the number of voxels differs from the header",
            where=header.filename,
            seen=pixels.shape,
            rule=f"{header.Rows} rows, {header.Columns} columns",
        )
    return pixels


def _segmentation(
    path: Path, mask: npt.NDArray[np.uint8], headers: Sequence[Any], labels: Mapping[str, int], model: str
) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    foreground = {name: value for name, value in labels.items() if value != 0}
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model[:64], version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=hd.sr.CodedConcept(f"label-{value}"[:16], "99DISTILLDSM", name[:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, (name, value) in enumerate(foreground.items(), start=1)
    ]
    table = np.zeros(256, dtype=np.uint8)
    table[list(foreground.values())] = np.arange(1, len(foreground) + 1)
    frames = np.ascontiguousarray(table[mask].transpose(2, 1, 0))
    for header in headers:  # in memory only; the files do not change
        for name in _MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, "")
    try:
        return hd.seg.Segmentation(
            source_images=list(headers),
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=1000,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="distilldsm",
            manufacturer_model_name=model[:64],
            software_versions=__version__,
            device_serial_number="0",
            content_description="research; not a medical device",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=bool(frames.any()),
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            "cannot be written as DICOM SEG",
            where=path,
            seen=first_line(error),
            rule="headers as the DICOM standard requires for an image",
            hint="write NIfTI instead: --format nifti",
        ) from None
