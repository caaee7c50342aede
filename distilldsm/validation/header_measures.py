"""Measures a file's header and bytes: can the file be read, and does the header describe the bytes correctly?

distilldsm/io/header_rules.py defines which headers are valid. This module only collects the violations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from distilldsm.core.errors import DataError
from distilldsm.io import Scan
from distilldsm.io.formats import read_file
from distilldsm.io.header_rules import (
    SPACING_DIFFERENCE,
    forms_distance_mm,
    length_unit,
    qform_of,
    spacing_difference,
)
from distilldsm.io.nifti import NiftiFile
from distilldsm.io.orientation import Affine, corner_distance_mm
from distilldsm.io.scan import check_size
from distilldsm.validation.case_row import CaseRow, listed

_HARMLESS = ("pixdim[1,2,3]", "vox offset")
"""Ignored nibabel remarks: another rule checks voxel sizes, and all programs read an unusual voxel offset correctly."""


@dataclass(frozen=True)
class Grid:
    """Grid of a measured file, and the file's name in the data set."""

    file: str
    shape: tuple[int, int, int]
    affine: Affine


BYTES_PER_VOXEL = 24
"""Memory of one voxel while a channel is measured, besides the stored channels: a scaled copy, sorted, masks."""


def open_file(row: CaseRow, root: Path, file: str, limit_bytes: float = float("inf")) -> Scan | None:
    """Read a file to its end. Notes why it cannot be used, or which flaws its header has.

    limit_bytes: memory for measuring the file. A larger one is refused by its header.
    """
    broken: list[DataError] = []
    try:
        scan = read_file(root / file, refuse=broken.append)
        rules = list(broken)  # non-finite voxels are found later, and case_measures counts them
        check_size([scan], limit_bytes, BYTES_PER_VOXEL)
        scan.load()
    except DataError as error:
        row.note("read_error", file, error.problem + (f" ({error.seen})" if error.seen is not None else ""))
        return None
    for rule in rules:
        hint = f"; {rule.hint}" if rule.hint else ""
        row.note("header_error", file, f"{rule.problem} ({rule.seen}); rule: {rule.rule}{hint}")
        row.values["header_error"] = "; ".join(d.seen for d in row.details["header_error"])
    if isinstance(scan.source, NiftiFile):
        _measure_soundness(row, file, scan.source)
    return scan


def _measure_soundness(row: CaseRow, file: str, nifti: NiftiFile) -> None:
    """Note flaws that some programs repair silently and others do not."""
    surplus = nifti.surplus_bytes or 0
    row.worst("surplus_bytes", surplus)
    if surplus:
        row.note("surplus_bytes", file, f"{surplus} bytes more than shape {nifti.shape} of {nifti.dtype} needs")
    raw = nifti.raw_header
    has_geometry = int(raw["qform_code"]) > 0 or int(raw["sform_code"]) > 0
    row.worst("has_geometry", int(has_geometry), largest=False)
    if not has_geometry:
        row.note("has_geometry", file, "qform_code 0, sform_code 0")
    flaws = _flaws(nifti)
    if flaws:
        row.note("header_flaws", file, "; ".join(flaws))
        row.values["header_flaws"] = "; ".join(d.seen for d in row.details["header_flaws"])


def _flaws(nifti: NiftiFile) -> list[str]:
    """The flaws that nibabel finds in a header, and a qform that is not a rotation."""
    raw = nifti.raw_header
    report = type(raw).diagnose_binaryblock(raw.binaryblock, raw.endianness)
    flaws = [line for line in report.splitlines() if not line.startswith(_HARMLESS)]
    if float(raw["pixdim"][0]) == 0:  # the NIfTI standard defines the meaning of 0
        flaws = [line for line in flaws if "qfac" not in line]
    if int(raw["qform_code"]) > 0 and qform_of(nifti.header) is None:
        flaws.append("the qform is not a rotation: quaternion " + listed([float(raw[f"quatern_{k}"]) for k in "bcd"]))
    return flaws


def measure_header(row: CaseRow, file: str, scan: Scan) -> None:
    """Measure unit and voxel size of an image file; the row keeps the worst value over the files of a case."""
    if not isinstance(scan.source, NiftiFile):
        return
    raw, header = scan.source.raw_header, scan.source.header
    unit = length_unit(raw) or "undefined"
    if row.values.get("spatial_unit") in (None, "mm", "unknown"):
        row.values["spatial_unit"] = unit
    if unit not in ("mm", "unknown"):
        row.note("spatial_unit", file, unit)
    difference = spacing_difference(raw, scan.source.affine)
    if difference is not None:
        row.worst("pixdim_affine_difference", difference[0])
        if difference[0] > SPACING_DIFFERENCE:
            sizes = f"pixdim {listed(difference[1])}, affine {listed(scan.spacing_mm)} mm"
            row.note("pixdim_affine_difference", file, sizes)
    distance = forms_distance_mm(header)
    if distance is not None:
        row.worst("qform_sform_mm", distance)


def measure_geometry(row: CaseRow, scan: Scan) -> None:
    """Measure shape and spacing in the order of the scanner's axes (RAS: x left-right, y back-front, z feet-head)."""
    affine, order = scan.affine, [0, 1, 2]
    if np.isfinite(affine).all():
        orientation = nib.orientations.io_orientation(affine)
        if np.isfinite(orientation).all():
            order = [int(k) for k in np.argsort(orientation[:, 0])]
            row.values["orientation"] = "".join(nib.aff2axcodes(affine))
        row.values["voxel_volume_mm3"] = abs(float(np.linalg.det(affine[:3, :3])))
        spacing = [round(v, 6) for v in scan.spacing_mm]
        row.values.update({f"spacing_{name}_mm": spacing[axis] for name, axis in zip("xyz", order, strict=True)})
        row.values.update({"spacing_min_mm": min(spacing), "spacing_max_mm": max(spacing)})
        if min(spacing) > 0:
            row.values["anisotropy"] = round(max(spacing) / min(spacing), 4)
    row.values.update({f"shape_{name}": scan.shape[axis] for name, axis in zip("xyz", order, strict=True)})


def compare_grids(row: CaseRow, a: Grid, b: Grid, agrees: str, offset: str) -> None:
    """Compare grid b with grid a. Column `agrees` gets 1 or 0 for the shape, `offset` the corner distance, mm."""
    if a.shape != b.shape:
        row.values[agrees] = 0
        row.note(agrees, b.file, f"shape {listed(b.shape)}, but {listed(a.shape)} in {a.file}")
        return
    distance = corner_distance_mm(a.affine, b.affine, a.shape)
    if not np.isfinite(distance):
        return  # header_error reports it
    row.worst(offset, distance)
    if distance > 0:
        row.note(
            offset,
            b.file,
            f"corners up to {distance:.4g} mm apart: affine {np.round(b.affine, 4).tolist()}, "
            f"but {np.round(a.affine, 4).tolist()} in {a.file}",
        )
