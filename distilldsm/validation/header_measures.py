"""What is measured on a file's header and bytes: can it be read, is it whole, does the header describe what follows it.

nibabel hints many flaws while loading, so they are read from the bytes.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

from distilldsm.io.volume import corner_distance_mm, spacing_of, unreadable
from distilldsm.validation.case_row import CaseRow, first_line, listed

_FLAT = 1e-9
"""Voxel volume, mm3, below which a geometry has lost an axis (the rule of `volume.load_nifti`)."""
_CHUNK = 1 << 20
_UNITS = {0: "unknown", 1: "meter", 2: "mm", 3: "micron"}
_HARMLESS = ("pixdim[1,2,3]", "vox offset")
"""What nibabel says of voxel sizes is a rule of its own; an odd place of the voxels is read rightly by everybody."""


def open_file(row: CaseRow, root: Path, file: str) -> nib.Nifti1Image | None:
    """Open a file and read it to its end; notes why it cannot be used, or the flaws of its header."""
    if not (root / file).is_file():
        row.note("read_error", file, "file not found")
        return None
    try:
        image = nib.load(root / file)
    except Exception as error:  # nibabel raises many kinds for broken headers
        row.note("read_error", file, why_unreadable(root / file, error, "is not a readable NIfTI file"))
        return None
    if not isinstance(image, nib.Nifti1Image):
        row.note("read_error", file, f"is not a NIfTI file but {type(image).__name__}")
        return None
    if image.get_data_dtype().kind not in "biuf":
        row.note("read_error", file, f"holds {image.get_data_dtype()} instead of real numbers")
        return None
    try:
        surplus = _bytes_in(root / file) - _bytes_declared(image)
    except Exception as error:  # zlib, EOF and OS errors, a checksum that does not fit
        row.note("read_error", file, why_unreadable(root / file, error))
        return None
    if surplus < 0:
        row.note("read_error", file, f"is truncated or damaged (header {image.shape}: {-surplus} bytes are missing)")
        return None
    row.worst("surplus_bytes", surplus)
    if surplus:
        row.note("surplus_bytes", file, f"{surplus} bytes more than {image.shape} of {image.get_data_dtype()} take")
    _measure_soundness(row, file, image, _header_bytes(root / file, image))
    return image


def why_unreadable(path: Path, error: BaseException, otherwise: str = "is truncated or damaged") -> str:
    """Why a file cannot be used, as a finding tells it: the system refuses it, or `otherwise`."""
    refused = unreadable(path, error)
    return f"{refused.problem} ({refused.seen})" if refused else f"{otherwise} ({first_line(error)})"


def _bytes_in(path: Path) -> int:
    """Length of what a file holds once uncompressed, read to its end: only there stands a gzip file's checksum, which
    a reader that stops after the last voxel never sees."""
    total = 0
    with gzip.open(path) if path.suffix == ".gz" else ImageOpener(path) as stream:
        while chunk := stream.read(_CHUNK):
            total += len(chunk)
    return total


def _bytes_declared(image: nib.Nifti1Image) -> int:
    """Where the voxels end by what the header says."""
    return int(image.dataobj.offset) + math.prod(int(n) for n in image.shape) * image.get_data_dtype().itemsize


def _header_bytes(path: Path, image: nib.Nifti1Image) -> Any:
    """The header as it is stored, unmended."""
    with ImageOpener(path) as stream:
        return type(image.header).from_fileobj(stream, check=False)


def _measure_soundness(row: CaseRow, file: str, image: nib.Nifti1Image, raw: Any) -> None:
    """Flaws that one program hints in silence and another does not."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    finite = bool(np.isfinite(slope) and (slope == 0 or np.isfinite(intercept)))  # slope 0: no scaling
    row.worst("scaling_finite", int(finite), largest=False)
    if not finite:
        row.note("scaling_finite", file, f"scl_slope {slope:g}, scl_inter {intercept:g}")
    told = int(raw["qform_code"]) > 0 or int(raw["sform_code"]) > 0
    row.worst("geometry_told", int(told), largest=False)
    if not told:
        row.note("geometry_told", file, "qform_code 0, sform_code 0")
    report = type(raw).diagnose_binaryblock(raw.binaryblock, raw.endianness)
    flaws = [line for line in report.splitlines() if not line.startswith(_HARMLESS)]
    if float(raw["pixdim"][0]) == 0:  # the standard says what this means
        flaws = [line for line in flaws if "qfac" not in line]
    try:
        turned = int(raw["qform_code"]) <= 0 or bool(np.isfinite(image.header.get_qform()).all())
    except Exception:  # a quaternion longer than 1
        turned = False
    if not turned:
        flaws.append("the qform is no rotation: quaternion " + listed([float(raw[f"quatern_{k}"]) for k in "bcd"]))
    if flaws:
        row.note("header_flaws", file, "; ".join(flaws))
        row.values["header_flaws"] = "; ".join(d.seen for d in row.details["header_flaws"])


def measure_header(row: CaseRow, root: Path, file: str, image: nib.Nifti1Image) -> None:
    """Affine, unit and voxel size of an image file, worst over the files of a case."""
    affine = image.affine
    finite = bool(np.isfinite(affine).all())
    row.worst("affine_finite", int(finite), largest=False)
    if not finite:
        row.note("affine_finite", file, f"affine {np.asarray(affine).tolist()}")
    raw = _header_bytes(root / file, image)
    code = int(raw["xyzt_units"]) & 7  # the rest is the unit of time
    unit = _UNITS.get(code, f"code {code}")
    known = row.values.get("spatial_unit")
    if known is None or known in ("mm", "unknown"):
        row.values["spatial_unit"] = unit
    if unit not in ("mm", "unknown"):
        row.note("spatial_unit", file, unit)
    pixdim = np.asarray(raw["pixdim"][1 : 1 + min(3, image.ndim)], dtype=np.float64)
    smallest = float(np.nanmin(pixdim)) if np.isfinite(pixdim).any() else 0.0
    row.worst("pixdim_min_mm", smallest, largest=False)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        row.values["pixdim_min_mm"] = min(smallest, 0.0)
        row.note("pixdim_min_mm", file, f"pixdim {pixdim.tolist()}")
    elif finite and image.ndim >= 3:
        stored = np.asarray(spacing_of(affine))
        relative = float(np.abs(stored - pixdim).max() / pixdim.max())
        row.worst("pixdim_affine_difference", relative)
        if relative > 0.01:
            row.note("pixdim_affine_difference", file, f"pixdim {listed(pixdim)}, affine {listed(stored)} mm")
    distance = _qform_sform_mm(image)
    if distance is not None:
        row.worst("qform_sform_mm", distance)


def _qform_sform_mm(image: nib.Nifti1Image) -> float | None:
    """Corner distance between the two geometries of a header, mm; None unless it holds both."""
    if image.ndim < 3 or image.header["qform_code"] == 0 or image.header["sform_code"] == 0:
        return None
    try:
        distance = corner_distance_mm(image.header.get_qform(), image.header.get_sform(), image.shape[:3])
    except Exception:  # a quaternion longer than 1
        return None
    return distance if np.isfinite(distance) else None


def measure_geometry(row: CaseRow, image: nib.Nifti1Image) -> None:
    """Shape and spacing in the order of the scanner's axes (RAS: x left-right, y back-front, z feet-head)."""
    affine, shape = np.asarray(image.affine, dtype=np.float64), image.shape[:3]
    order = list(range(len(shape)))
    if np.isfinite(affine).all():
        volume_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
        row.values["voxel_volume_mm3"] = volume_mm3
        if volume_mm3 >= _FLAT and len(shape) == 3:
            order = [int(k) for k in np.argsort(nib.orientations.io_orientation(affine)[:, 0])]
            row.values["orientation"] = "".join(nib.aff2axcodes(affine))
            columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
            cosine = np.abs(columns.T @ columns - np.eye(3)).max()
            row.values["shear_deg"] = round(float(np.degrees(np.arcsin(min(1.0, cosine)))), 4)
        spacing = [round(v, 6) for v in spacing_of(affine)]
        for name, axis in zip("xyz", order, strict=False):
            row.values[f"spacing_{name}_mm"] = spacing[axis]
        row.values.update({"spacing_min_mm": min(spacing), "spacing_max_mm": max(spacing)})
        if min(spacing) > 0:
            row.values["anisotropy"] = round(max(spacing) / min(spacing), 4)
    for name, axis in zip("xyz", order, strict=False):
        row.values[f"shape_{name}"] = int(shape[axis])


def compare_grids(
    row: CaseRow, a: tuple[str, nib.Nifti1Image], b: tuple[str, nib.Nifti1Image], agrees: str, offset: str
) -> None:
    """Compare b's grid with a's: shape into column `agrees` (1 or 0), corner distance into column `offset`."""
    shape_a, shape_b = a[1].shape[:3], b[1].shape[:3]
    if shape_a != shape_b:
        row.values[agrees] = 0
        row.note(agrees, b[0], f"shape {listed(shape_b)}, but {listed(shape_a)} in {a[0]}")
        return
    distance = corner_distance_mm(a[1].affine, b[1].affine, shape_a) if len(shape_a) == 3 else 0.0
    if not np.isfinite(distance):
        return  # told by affine_finite
    row.worst(offset, distance)
    if distance > 0:
        row.note(
            offset,
            b[0],
            f"corners up to {distance:.4g} mm apart: affine {np.round(b[1].affine, 4).tolist()}, "
            f"but {np.round(a[1].affine, 4).tolist()} in {a[0]}",
        )
