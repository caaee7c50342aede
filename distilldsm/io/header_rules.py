"""Rules for the headers of scans: one table for every command.

Readers refuse a scan at the first broken rule. `distilldsm validate` checks the same table and lists all broken rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import DataError
from distilldsm.io.orientation import Affine, corner_distance_mm, spacing_of

MAX_SHEAR = 0.01
"""Largest cosine between two axes that still counts as a right angle (0.6 degrees)."""
ROUNDING = 1e-6
"""Smaller cosines between axes come from float32 rounding in the header. Such an affine is not changed."""
SPACING_MM = (0.005, 500.0)
"""Smallest and largest allowed voxel size, mm."""
UNITS = {0: "unknown", 1: "meter", 2: "mm", 3: "micron"}
"""Units of length by the code in a NIfTI header."""
FORMS_MM = 0.1
"""Largest distance between the corners of the volume by qform and by sform that is not remarked on."""
SPACING_DIFFERENCE = 0.01
"""Largest relative difference of voxel size between pixdim and affine that is not remarked on."""
MM_PER_UNIT = {"unknown": 1.0, "meter": 1000.0, "mm": 1.0, "micron": 0.001}


@dataclass(frozen=True)
class HeaderRule:
    """One rule. `seen` checks a header (or an affine) and returns the wrong value as text, or None if all is right."""

    name: str
    seen: Callable[[Any], str | None]
    problem: str
    rule: str
    hint: str | None = None

    def error(self, header: Any, path: Path) -> DataError | None:
        """The error for this header; None if the header follows the rule."""
        seen = self.seen(header)
        if seen is None:
            return None
        return DataError(self.problem, where=path, seen=seen, rule=self.rule, hint=self.hint)


def broken(rules: Sequence[HeaderRule], header: Any, path: Path) -> Iterator[DataError]:
    """An error for each rule that a header (or an affine) breaks, in the order of the table."""
    for rule in rules:
        error = rule.error(header, path)
        if error is not None:
            yield error


def stored_shape(header: Any) -> tuple[int, ...]:
    """The shape in a NIfTI header. Axes of length 1 at the end are dropped, down to three axes."""
    dimensions = [int(n) for n in header["dim"]]
    shape = dimensions[1 : max(dimensions[0], 0) + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def length_unit(header: Any) -> str | None:
    """The unit of length in a NIfTI header; None for an unknown code. The upper bits hold the unit of time."""
    return UNITS.get(int(header["xyzt_units"]) & 7)


def orthogonal(affine: Affine) -> Affine:
    """The affine with its axes turned to right angles (nearest rotation by SVD). Voxel sizes and origin stay.

    If the axes are at right angles up to rounding, the affine is returned unchanged.
    """
    if _impossible_affine(affine) or _largest_cosine(affine) <= ROUNDING:
        return affine
    lengths = np.array(spacing_of(affine))
    left, _, right = np.linalg.svd(affine[:3, :3] / lengths)
    out = affine.copy()
    out[:3, :3] = (left @ right) * lengths
    return out


def _largest_cosine(affine: Affine) -> float:
    directions = affine[:3, :3] / np.array(spacing_of(affine))
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def _impossible_shape(header: Any) -> str | None:
    count, *lengths = (int(n) for n in header["dim"])
    return None if 1 <= count <= 7 and min(lengths[:count]) >= 1 else f"dim {[count, *lengths]}"


def _other_axes(header: Any) -> str | None:
    shape = stored_shape(header)
    return None if len(shape) in (3, 4) else f"shape {shape}"


def _other_numbers(header: Any) -> str | None:
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel does not know this type
        return f"datatype {int(header['datatype'])}"
    return None if dtype.kind in "iuf" else str(dtype)


def _wrong_offset(header: Any) -> str | None:
    offset = float(header["vox_offset"])
    whole = np.isfinite(offset) and offset == int(offset)
    return None if whole and offset >= header.single_vox_offset else f"vox_offset {offset:g}"


def _wrong_voxel_size(header: Any) -> str | None:
    sizes = [float(v) for v in header["pixdim"][1:4]]
    return None if all(np.isfinite(v) and v > 0 for v in sizes) else f"pixdim {sizes}"


def _wrong_scaling(header: Any) -> str | None:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    finite = slope == 0 or (np.isfinite(slope) and np.isfinite(intercept))  # slope 0: no scaling
    return None if finite else f"scl_slope {slope:g}, scl_inter {intercept:g}"


def _unknown_unit(header: Any) -> str | None:
    return None if length_unit(header) else f"xyzt_units {int(header['xyzt_units'])}"


def _impossible_affine(affine: Affine) -> str | None:
    with np.errstate(over="ignore"):
        lengths = np.array(spacing_of(affine)) if np.isfinite(affine).all() else np.zeros(3)
    low, high = SPACING_MM
    possible = np.isfinite(lengths).all() and lengths.min() >= low and lengths.max() <= high
    return None if possible else f"affine {np.round(affine, 6).tolist()}"


def _sheared(affine: Affine) -> str | None:
    if _impossible_affine(affine):
        return None
    cosine = _largest_cosine(affine)
    if cosine <= MAX_SHEAR:
        return None
    return f"cosine {cosine:.3f} between two axes, affine {np.round(affine, 4).tolist()}"


def qform_of(header: Any) -> Affine | None:
    """The geometry in the qform. None if its quaternion is longer than 1 or not finite."""
    try:
        affine: Affine = header.get_qform()
    except Exception:  # nibabel raises many types
        return None
    return affine if np.isfinite(affine).all() else None


def forms_distance_mm(header: Any) -> float | None:
    """Distance between corresponding corners of the volume by qform and by sform; None unless both are set."""
    qform = qform_of(header)
    if qform is None or not (int(header["qform_code"]) and int(header["sform_code"])):
        return None
    distance = corner_distance_mm(qform, header.get_sform(), stored_shape(header)[:3])
    return distance if np.isfinite(distance) else None


def spacing_difference(header: Any, affine: Affine) -> tuple[float, tuple[float, ...]] | None:
    """Relative difference of the voxel sizes in pixdim and in the affine (mm), and those of pixdim. None if unknown."""
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64) * MM_PER_UNIT.get(length_unit(header) or "", 1.0)
    stored = np.array(spacing_of(affine))
    if not np.isfinite([pixdim, stored]).all() or pixdim.min() <= 0:
        return None
    return float(np.abs(stored - pixdim).max() / pixdim.max()), tuple(pixdim.tolist())


def _forms_differ(file: Any) -> str | None:
    distance = forms_distance_mm(file.header)
    if distance is None or distance <= FORMS_MM:
        return None
    qform, sform = (np.round(form, 4).tolist() for form in (file.header.get_qform(), file.header.get_sform()))
    return f"corners {distance:.4g} mm apart: qform {qform}, sform {sform}"


def _sizes_differ(file: Any) -> str | None:
    difference = spacing_difference(file.raw_header, file.affine)
    if difference is None or difference[0] <= SPACING_DIFFERENCE:
        return None
    sizes = (" x ".join(f"{v:g}" for v in np.round(size, 5)) for size in (difference[1], spacing_of(file.affine)))
    return "pixdim {}, affine {} mm".format(*sizes)


LAYOUT_RULES = (
    HeaderRule("shape", _impossible_shape, "has an impossible shape", "1 or more along each axis"),
    HeaderRule(
        "three_dimensional",
        _other_axes,
        "is not a 3-D volume",
        "three axes, or four with the channels last",
        "a single slice needs a third axis of length 1",
    ),
    HeaderRule("number_type", _other_numbers, "has an unsupported number type", "integers or floats, not colours"),
    HeaderRule(
        "voxel_offset",
        _wrong_offset,
        "has an impossible position of the first voxel",
        "vox_offset: a whole number from 352 (NIfTI-1) or 544 (NIfTI-2)",
    ),
)
"""Rules for a NIfTI header as stored. If one is broken, voxels cannot be read. Each needs the rules before it."""

VALUE_RULES = (
    HeaderRule(
        "voxel_size",
        _wrong_voxel_size,
        "has an impossible voxel size",
        "three numbers above 0 (mm)",
        "write the voxel size into the header; other programs would silently use 1 mm or drop the sign",
    ),
    HeaderRule(
        "scaling",
        _wrong_scaling,
        "has an impossible scaling",
        "finite numbers (slope 0: none)",
        "set scl_slope and scl_inter",
    ),
    HeaderRule(
        "length_unit",
        _unknown_unit,
        "has an unknown unit of length",
        "one of " + ", ".join(f"{code} ({name})" for code, name in UNITS.items()),
        "set xyzt_units to 2 (mm), if lengths are in mm",
    ),
)
"""Further rules for a NIfTI header as stored."""

AFFINE_RULES = (
    HeaderRule(
        "geometry",
        _impossible_affine,
        "has an impossible geometry",
        f"finite numbers, voxel sizes from {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm",
        "set the file's sform or qform",
    ),
    HeaderRule(
        "right_angles",
        _sheared,
        "has sheared axes",
        f"axes at right angles (cosine at most {MAX_SHEAR:g})",
        "resample it to a rectangular grid (also for CT with a tilted gantry)",
    ),
)
"""Rules for an affine (4, 4) in mm, for all formats."""

GEOMETRY_REMARKS = (
    HeaderRule(
        "one_voxel_size",
        _sizes_differ,
        "pixdim and affine of the header give different voxel sizes; the affine is used",
        "one voxel size",
        "find out which one is right and write it into both",
    ),
    HeaderRule(
        "qform_agrees_with_sform",
        _forms_differ,
        "qform and sform of the header differ; the sform is used here, but other programs may use the qform",
        "one geometry",
        "find out which one is right and set both to it",
    ),
)
"""Conflicts in a NIfTI file (`nifti.NiftiFile`) that is read all the same. `predict` remarks on them, `validate` warns
by the rules of the same names."""
