"""The format DICOM: reads series as scans, and writes masks as DICOM segmentations.

pydicom and highdicom are in the optional dependency group `dicom`. They are imported only for DICOM files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.io.dicom_slice import Slice, is_dicom, read_slice, read_voxels, visible_files
from distilldsm.io.errors import Refuse, raise_error
from distilldsm.io.header_rules import AFFINE_RULES, broken, orthogonal
from distilldsm.io.orientation import Affine
from distilldsm.io.output import replacing
from distilldsm.io.scan import Channel, Scan, Skipped

DIRECTION_TOLERANCE = 1e-4
"""Largest difference between the direction cosines of two slices of a series."""
POSITION_TOLERANCE = (0.02, 0.02)
"""Largest distance of a slice from the grid fitted to all: mm, and as a share of the distance of slices. The larger
one counts."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Dicom:
    """Scans: one DICOM series per folder. Masks: DICOM SEG. See `formats.Format`."""

    name = "dicom"
    endings: tuple[str, ...] = ()
    mask_format = "seg"
    mask_endings: tuple[str, ...] = (".dcm",)
    mask_of_any_scan = False

    def can_read(self, path: Path) -> bool:
        """Whether the path is a folder with DICOM files: by their content, or by the ending `.dcm`."""
        return path.is_dir() and any(one.suffix.lower() == ".dcm" or is_dicom(one) for one in visible_files(path))

    def read(self, path: Path, *, refuse: Refuse = raise_error) -> Scan:
        """Read the series in a folder as a scan of one channel: slices sorted, intensities rescaled (slope, intercept).

        Array axes are (columns, rows, slices), as in other readers of series. Voxels are read later. Every visible
        file is a slice, is listed in the scan's `skipped`, or is an error.

        Raises:
            DataError: not exactly one series, mixed slices, missing or duplicate slices, a tilted stack, or a file
                that is neither a slice nor known to be harmless.
        """
        slices, skipped = _sorted_out(path)
        if not slices:
            raise DataError("holds no DICOM image", where=path, seen=skipped[0].reason if skipped else None)
        _check_one_series(slices, path)
        ordered, affine = _arrange(slices, path)
        for error in broken(AFFINE_RULES, affine, path):
            refuse(error)
        return Scan((_channel(ordered),), orthogonal(affine), path, tuple(ordered), skipped=skipped)

    def check_mask(self, scan: Scan, *, labels: Mapping[str, int], model: str) -> tuple[str, ...]:
        """Make a segmentation of one voxel, in memory, to find out whether the series allows one."""
        from distilldsm.io.dicom_seg import NO_FRAME, segmentation

        mask = np.zeros(scan.shape, dtype=np.uint8)
        mask[0, 0, 0] = max(labels.values())
        segmentation(scan.path, scan.source, mask, labels, model)
        return () if scan.source[0].frame_of_reference else (NO_FRAME,)

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
        from distilldsm.io.dicom_seg import segmentation

        with replacing(path) as temporary:
            segmentation(scan.path, scan.source, mask, labels, model).save_as(temporary)


def why_no_scan(folder: Path) -> str | None:
    """Why a series folder of a study is left out: it holds localizers or objects without an image only. Else None."""
    reason = None
    for file in visible_files(folder):
        try:
            found = read_slice(file)
        except DataError:
            return None  # reading the series reports it
        if isinstance(found, Slice) and not found.localizer:
            return None
        reason = "localizer" if isinstance(found, Slice) else reason or found
    return reason


def _sorted_out(folder: Path) -> tuple[list[Slice], tuple[Skipped, ...]]:
    """The slices in a folder, and the harmless files."""
    slices, skipped = [], []
    for file in visible_files(folder):
        found = read_slice(file)
        if isinstance(found, Slice):
            slices.append(found)
        else:
            skipped.append(Skipped(file, found))
    return slices, tuple(skipped)


def _check_one_series(slices: Sequence[Slice], folder: Path) -> None:
    series: dict[str, list[str]] = {}
    for one in slices:
        series.setdefault(one.series, []).append(one.path.name)
    if len(series) > 1:
        listed = "; ".join(f"{uid}: {len(names)} files, e.g. {names[0]}" for uid, names in series.items())
        raise DataError(
            f"holds {len(series)} series", where=folder, seen=listed, rule="one series", hint="one folder per series"
        )
    first = slices[0]
    frame = next((one.frame_of_reference for one in slices if one.frame_of_reference), "")
    for one in slices[1:]:
        compared = (
            ("size", np.array(one.size), np.array(first.size), 0.0),
            ("spacing", np.array(one.spacing_mm), np.array(first.spacing_mm), 1e-3),
            ("orientation", one.directions.ravel(), first.directions.ravel(), DIRECTION_TOLERANCE),
        )
        for what, found, expected, tolerance in compared:
            if np.abs(found - expected).max() > tolerance:
                raise DataError(
                    f"the {what} differs from the other slices",
                    where=one.path,
                    seen=found.tolist(),
                    rule=f"{expected.tolist()}, as {first.path.name}",
                    hint="remove other kinds of slices (localisers) from the folder",
                )
    other = next((one for one in slices if one.frame_of_reference not in ("", frame)), None)
    if other is not None:
        raise DataError(
            "the frame of reference differs from the other slices",
            where=other.path,
            seen=other.frame_of_reference,
            rule=frame,
            hint="slices of one series share their coordinate system; export the series again",
        )


def _arrange(slices: Sequence[Slice], folder: Path) -> tuple[list[Slice], Affine]:
    """Sort slices along their normal; also return the affine (RAS, mm) of an array (columns, rows, slices)."""
    first = slices[0]
    normal = np.cross(*first.directions)
    positions = np.array([one.position for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    ordered, positions = [slices[int(k)] for k in order], positions[order]
    if len(ordered) == 1:
        if first.thickness_mm is None:
            raise DataError(
                "is a single slice without a thickness", where=first.path, rule="SpacingBetweenSlices or SliceThickness"
            )
        origin, step = positions[0], normal * first.thickness_mm
    else:
        _check_steps(ordered, positions @ normal, folder)
        origin, step = _fitted_line(ordered, positions)
    row_mm, column_mm = first.spacing_mm
    columns = (first.directions[0] * column_mm, first.directions[1] * row_mm, step, origin)
    return ordered, _LPS_TO_RAS @ np.vstack([np.column_stack(columns), (0, 0, 0, 1)])


def _check_steps(ordered: Sequence[Slice], along: npt.NDArray[np.float64], folder: Path) -> None:
    """Refuse slices at one position, and missing slices, whatever the tolerance of positions is."""
    steps = np.diff(along)
    usual = float(np.median(steps))
    names = [one.path.name for one in ordered]
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
    wide = np.flatnonzero(steps > 1.5 * usual)
    if wide.size:
        k = int(wide[0])
        raise DataError(
            "has a gap between slices",
            where=folder,
            seen=f"{steps[k]:.3f} mm between {names[k]} and {names[k + 1]}: {round(steps[k] / usual) - 1} missing",
            rule=f"{usual:.3f} mm, as between the other slices",
            hint="copy the whole series again",
        )


def _fitted_line(
    ordered: Sequence[Slice], positions: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Origin and step (mm) of the regular grid that fits the positions best (least squares)."""
    design = np.column_stack([np.ones(len(ordered)), np.arange(len(ordered))])
    fit, *_ = np.linalg.lstsq(design, positions, rcond=None)
    origin, step = fit
    away = np.linalg.norm(positions - design @ fit, axis=1)
    allowed = max(POSITION_TOLERANCE[0], POSITION_TOLERANCE[1] * float(np.linalg.norm(step)))
    worst = int(away.argmax())
    if away[worst] > allowed:
        raise DataError(
            "does not lie on one regular grid with the other slices",
            where=ordered[worst].path,
            seen=f"position {positions[worst].tolist()}, {away[worst]:.3g} mm away",
            rule=f"at most {allowed:.3g} mm from a line with equal steps",
            hint="copy the whole series again; resample a stack with uneven distances",
        )
    return origin, step


def _channel(ordered: Sequence[Slice]) -> Channel:
    """A channel with voxels as stored if all slices have one rescaling, else with float32 intensities."""
    scalings = [one.scaling for one in ordered]
    slope, intercept = scalings[0]
    rows, columns = ordered[0].size
    shape = (columns, rows, len(ordered))
    voxels = rows * columns * len(ordered)
    if len(set(scalings)) > 1:
        return Channel(lambda: _voxels(ordered, scalings), shape=shape, nbytes=4 * voxels)
    size = max(one.voxel_bytes for one in ordered) * voxels
    if (slope, intercept) == (1.0, 0.0):
        return Channel(lambda: _voxels(ordered), shape=shape, nbytes=size)
    return Channel(
        lambda: _voxels(ordered),
        lambda piece: piece * np.float64(slope) + np.float64(intercept),
        shape=shape,
        nbytes=size,
    )


def _voxels(ordered: Sequence[Slice], scalings: Sequence[tuple[float, float]] | None = None) -> npt.NDArray:
    """Read the voxels slice by slice: as stored, or as float32 with one slope and intercept per slice (`scalings`)."""
    array: npt.NDArray | None = None
    for k, one in enumerate(ordered):
        pixels = read_voxels(one)
        if scalings is not None:
            slope, intercept = scalings[k]
            pixels = (pixels * slope + intercept).astype(np.float32)
        if array is None:
            # A series may mix signed and unsigned slices; then the type of the first slice does not fit all of them.
            array = np.empty((pixels.shape[1], pixels.shape[0], len(ordered)), dtype=pixels.dtype, order="F")
        elif not np.can_cast(pixels.dtype, array.dtype):
            array = array.astype(np.promote_types(pixels.dtype, array.dtype), order="F")
        array[:, :, k] = pixels.T
    assert array is not None
    return array
