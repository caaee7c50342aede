"""What is measured on one case: header, voxels, label, and how well they agree. Reads everything, refuses nothing.

Where a value breaks a rule, the reader must learn which of the case's files to mend: a measure may carry details, one
per file, with what was seen there.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.openers import ImageOpener

from distilldsm.data.dataset import Case, Channel
from distilldsm.data.volume import corner_distance_mm, spacing_of

Value = str | int | float | None
Float32 = npt.NDArray[np.float32]

PERCENTILES = {"p0_5": 0.5, "p50": 50.0, "p99_5": 99.5}
_FLAT = 1e-9
"""Voxel volume, mm3, below which a geometry has lost an axis (the rule of `volume.load_nifti`)."""


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What was seen in one file. `file` is relative to the data set's root, POSIX style."""

    file: str
    seen: str


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One row of the case table: values by column (None where it could not be measured), details by column."""

    values: dict[str, Value] = field(default_factory=dict)
    details: dict[str, list[Detail]] = field(default_factory=dict)

    def note(self, column: str, file: str, seen: str) -> None:
        self.details.setdefault(column, []).append(Detail(file=file, seen=seen))


def measure_case(root: Path, case: Case, channels: Sequence[Channel], labels: Mapping[str, int]) -> CaseRow:
    """Measure one case; never raises.

    Args:
        root: the data set's root.
        channels: the declared channels.
        labels: label name to value in the files.
    """
    row = CaseRow()
    row.values.update({"case": case.id, "patient": case.patient, "image": case.images[0], "label": case.label})
    try:
        with _quiet_nibabel():
            image = _measure_images(row, root, case.images, channels)
            _measure_label(row, root, case.label, labels, image)
    except Exception as error:  # whatever a damaged file provokes must not hide the findings of the other cases
        row.note("read_error", case.images[0], _first_line(error))
    errors = row.details.get("read_error", [])
    row.values["read_error"] = "; ".join(f"{e.file}: {e.seen}" for e in errors) or None
    return row


def voxels_of_largest_file(root: Path, case: Case) -> int:
    """Number of voxels in the largest of a case's files, told from the headers; 0 where none can be read."""
    largest = 0
    for file in (*case.images, case.label):
        try:
            with _quiet_nibabel():
                largest = max(largest, int(np.prod(nib.load(root / file).shape, dtype=np.int64)))
        except Exception:  # noqa: S112 (the measurement itself reports it)
            continue
    return largest


def _open(row: CaseRow, root: Path, file: str) -> nib.Nifti1Image | None:
    if not (root / file).is_file():
        row.note("read_error", file, "file not found")
        return None
    try:
        image = nib.load(root / file)
    except Exception as error:  # nibabel raises many kinds for broken headers
        row.note("read_error", file, f"is not a readable NIfTI file ({_first_line(error)})")
        return None
    if not isinstance(image, nib.Nifti1Image):
        row.note("read_error", file, f"is not a NIfTI file but {type(image).__name__}")
        return None
    if image.get_data_dtype().kind not in "biuf":
        row.note("read_error", file, f"holds {image.get_data_dtype()} instead of real numbers")
        return None
    return image


def _voxels(row: CaseRow, image: nib.Nifti1Image, file: str) -> Float32 | None:
    """The voxels, scaled, as float32; trailing axes of length 1 are dropped."""
    try:
        with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite, and is found as such
            data = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # zlib, EOF, OS errors and value errors of a short file
        row.note("read_error", file, f"is truncated or damaged ({_first_line(error)})")
        return None
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    return data


def _measure_images(
    row: CaseRow, root: Path, files: Sequence[str], channels: Sequence[Channel]
) -> nib.Nifti1Image | None:
    """Measure header and voxels of all channels; returns the first file, whose grid the others must share."""
    opened = [(file, image) for file in files if (image := _open(row, root, file)) is not None]
    if not opened:
        return None
    first = opened[0][1]
    row.values["dtype"] = ", ".join(sorted({str(image.get_data_dtype()) for _, image in opened}))
    for file, image in opened:
        _measure_header(row, root, file, image)
    _measure_geometry(row, first)
    _compare_channels(row, opened)
    _measure_intensities(row, opened, len(files), channels)
    return first if opened[0][0] == files[0] else None


def _worst(row: CaseRow, column: str, value: float, *, largest: bool = True) -> None:
    """Keep the worst value over the files of a case."""
    known = row.values.get(column)
    row.values[column] = value if known is None else max(float(known), value) if largest else min(float(known), value)


def _measure_header(row: CaseRow, root: Path, file: str, image: nib.Nifti1Image) -> None:
    affine = image.affine
    finite = bool(np.isfinite(affine).all())
    _worst(row, "affine_finite", int(finite), largest=False)
    if not finite:
        row.note("affine_finite", file, f"affine {np.asarray(affine).tolist()}")
    unit = image.header.get_xyzt_units()[0]
    known = row.values.get("spatial_unit")
    if known is None or known in ("mm", "unknown"):
        row.values["spatial_unit"] = unit
    if unit not in ("mm", "unknown"):
        row.note("spatial_unit", file, unit)
    # nibabel mends zero and negative voxel sizes while loading, so they are read from the bytes.
    with ImageOpener(root / file) as stream:
        raw = type(image.header).from_fileobj(stream, check=False)
    pixdim = np.asarray(raw["pixdim"][1 : 1 + min(3, image.ndim)], dtype=np.float64)
    smallest = float(np.nanmin(pixdim)) if np.isfinite(pixdim).any() else 0.0
    _worst(row, "pixdim_min_mm", smallest, largest=False)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        row.values["pixdim_min_mm"] = min(smallest, 0.0)
        row.note("pixdim_min_mm", file, f"pixdim {pixdim.tolist()}")
    elif finite and image.ndim >= 3:
        stored = np.asarray(spacing_of(affine))
        relative = float(np.abs(stored - pixdim).max() / pixdim.max())
        _worst(row, "pixdim_affine_difference", relative)
        if relative > 0.01:
            row.note("pixdim_affine_difference", file, f"pixdim {_list(pixdim)}, affine {_list(stored)} mm")
    distance = _qform_sform_mm(image)
    if distance is not None:
        _worst(row, "qform_sform_mm", distance)


def _qform_sform_mm(image: nib.Nifti1Image) -> float | None:
    """Corner distance between the two geometries of a header, mm; None unless it holds both."""
    if image.ndim < 3 or image.header["qform_code"] == 0 or image.header["sform_code"] == 0:
        return None
    try:
        distance = corner_distance_mm(image.header.get_qform(), image.header.get_sform(), image.shape[:3])
    except Exception:  # a quaternion longer than 1
        return None
    return distance if np.isfinite(distance) else None


def _measure_geometry(row: CaseRow, image: nib.Nifti1Image) -> None:
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


def _compare_channels(row: CaseRow, opened: Sequence[tuple[str, nib.Nifti1Image]]) -> None:
    base_file, base = opened[0]
    row.values.update({"channel_shapes_agree": 1, "channel_offset_mm": 0.0})
    for file, image in opened[1:]:
        _compare_grids(row, (base_file, base), (file, image), "channel_shapes_agree", "channel_offset_mm")


def _compare_grids(
    row: CaseRow, a: tuple[str, nib.Nifti1Image], b: tuple[str, nib.Nifti1Image], agrees: str, offset: str
) -> None:
    """Compare b's grid with a's: shape into column `agrees` (1 or 0), corner distance into column `offset`."""
    shape_a, shape_b = a[1].shape[:3], b[1].shape[:3]
    if shape_a != shape_b:
        row.values[agrees] = 0
        row.note(agrees, b[0], f"shape {_list(shape_b)}, but {_list(shape_a)} in {a[0]}")
        return
    distance = corner_distance_mm(a[1].affine, b[1].affine, shape_a) if len(shape_a) == 3 else 0.0
    if not np.isfinite(distance):
        return  # told by affine_finite
    _worst(row, offset, distance)
    if distance > 0:
        row.note(
            offset,
            b[0],
            f"corners up to {distance:.4g} mm apart: affine {np.round(b[1].affine, 4).tolist()}, "
            f"but {np.round(a[1].affine, 4).tolist()} in {a[0]}",
        )


def _channels(row: CaseRow, opened: Sequence[tuple[str, nib.Nifti1Image]], files: int) -> Iterator[tuple[str, Float32]]:
    """One 3-D array a channel, one file in memory at a time; notes files that do not hold volumes."""
    for file, image in opened:
        data = _voxels(row, image, file)
        if data is None:
            continue
        volumes = data.shape[3] if files == 1 and data.ndim == 4 else 1
        dimensions = 3 if volumes > 1 else data.ndim
        if dimensions != 3:
            row.values["dimensions"] = dimensions
            row.note("dimensions", file, f"shape {_list(data.shape)}")
        row.values.setdefault("dimensions", 3)
        for k in range(volumes):
            yield file, data[..., k] if volumes > 1 else data


def _measure_intensities(
    row: CaseRow, opened: Sequence[tuple[str, nib.Nifti1Image]], files: int, channels: Sequence[Channel]
) -> None:
    digest = hashlib.sha256()
    voxels = finite_voxels = constant = count = 0
    bad: dict[str, int] = defaultdict(int)
    for file, array in _channels(row, opened, files):
        digest.update(str(array.shape).encode())
        digest.update(np.asfortranarray(array).T.data)
        finite = np.isfinite(array)
        good = int(finite.sum())
        voxels, finite_voxels = voxels + array.size, finite_voxels + good
        bad[file] += array.size - good
        values = array if good == array.size else array[finite]
        channel = channels[count] if count < len(channels) else None
        if values.size and values.min() == values.max():
            constant += 1
            row.note("constant_channels", file, f"every voxel is {float(values.flat[0]):g}")
        elif array.size and (channel is None or channel.modality != "CT"):  # air in CT is not 0, and is known not to be
            _measure_padding(row, file, array)
        nonzero = values[values != 0]
        if nonzero.size:
            for key, value in zip(PERCENTILES, np.percentile(nonzero, list(PERCENTILES.values())), strict=True):
                _worst(row, f"intensity_{key}_min", float(value), largest=False)
                _worst(row, f"intensity_{key}_max", float(value))
                if channel is not None:
                    row.values[f"intensity_{key}[{channel.name}]"] = float(value)
        count += 1
    if not voxels:
        return
    row.values.update({"finite_fraction": finite_voxels / voxels, "constant_channels": constant})
    for file, number in bad.items():
        if number:
            row.note("finite_fraction", file, f"{number} voxels are NaN or infinite")
    if len(opened) == files and "read_error" not in row.details:
        row.values.update(
            {
                "channel_count": count,
                "channel_difference": count - len(channels),
                "image_sha256": digest.hexdigest(),
            }
        )
        if count != len(channels):
            names = ", ".join(c.name for c in channels)
            shapes = ", ".join(_list(image.shape) for _, image in opened)
            row.note(
                "channel_difference",
                opened[0][0],
                f"{count} channels (shape {shapes}), but the data set declares {len(channels)}: {names}",
            )


def _measure_padding(row: CaseRow, file: str, array: Float32) -> None:
    """Share of voxels with the value of the first corner, where that is not 0: padding that looks like tissue."""
    corner = array.flat[0]
    fraction = float((array == corner).mean()) if corner != 0 and np.isfinite(corner) else 0.0
    _worst(row, "padding_fraction", fraction)
    if fraction > 0:
        row.note("padding_fraction", file, f"{fraction:.0%} of the voxels are {float(corner):g}")


def _measure_label(
    row: CaseRow, root: Path, file: str, labels: Mapping[str, int], base: nib.Nifti1Image | None
) -> None:
    image = _open(row, root, file)
    if image is None:
        return
    row.values["label_dtype"] = str(image.get_data_dtype())
    data = _voxels(row, image, file)
    if data is None:
        return
    row.values["label_dimensions"] = data.ndim
    if data.ndim != 3:
        row.note("label_dimensions", file, f"shape {_list(data.shape)}")
    affine_finite = bool(np.isfinite(image.affine).all())
    row.values["label_affine_finite"] = int(affine_finite)
    if base is not None:
        row.values["label_shape_agrees"] = 1
        _compare_grids(row, (str(row.values["image"]), base), (file, image), "label_shape_agrees", "label_offset_mm")
    finite = np.isfinite(data)
    if not finite.all():
        row.note("label_finite_fraction", file, f"{int((~finite).sum())} voxels are NaN or infinite")
    row.values["label_finite_fraction"] = float(finite.mean())
    values = data if finite.all() else data[finite]
    rounded = np.rint(values)
    deviation = np.abs(values - rounded)
    row.values["label_deviation"] = float(deviation.max(initial=0))
    if deviation.max(initial=0) > 0:
        odd = np.unique(values[deviation > 0.5 * deviation.max()])[:3]
        row.note("label_deviation", file, f"values such as {', '.join(f'{float(v):g}' for v in odd)}")
    counts = _count(rounded)
    row.values["label_values"] = " ".join(str(v) for v in list(counts)[:20]) + (" ..." if len(counts) > 20 else "")
    undeclared = sorted(set(counts) - set(labels.values()))
    row.values["undeclared_values"] = " ".join(str(v) for v in undeclared[:20]) or None
    absent = [name for name, value in labels.items() if value != 0 and not counts.get(value)]
    row.values["absent_labels"] = ", ".join(absent) or None
    voxel_ml = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000 if affine_finite else float("nan")
    for name, value in labels.items():
        if value != 0 and affine_finite:
            row.values[f"volume_ml[{name}]"] = counts.get(value, 0) * voxel_ml
    row.values["foreground_fraction"] = 1 - counts.get(0, 0) / max(1, rounded.size)
    if data.ndim == 3 and finite.all():
        foreground = rounded != 0
        inside = int(np.count_nonzero(foreground))
        if inside:
            border = inside - int(np.count_nonzero(foreground[1:-1, 1:-1, 1:-1]))
            row.values["border_fraction"] = border / inside
    digest = hashlib.sha256(str(rounded.shape).encode())
    digest.update(np.asfortranarray(rounded).T.data)
    row.values["label_sha256"] = digest.hexdigest()


def _count(rounded: Float32) -> dict[int, int]:
    """Voxels per whole number, ascending."""
    if rounded.size and rounded.min() >= 0 and rounded.max() <= 255:
        counts = np.bincount(rounded.astype(np.uint8).ravel(order="K"), minlength=256)
        return {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    values, numbers = np.unique(rounded, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, numbers, strict=True)}


def _list(values: Sequence[float] | npt.NDArray[np.floating]) -> str:
    return " x ".join(f"{float(v):g}" for v in values)


def _first_line(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Header flaws are findings here; nibabel's own log lines would only tear the progress line."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
