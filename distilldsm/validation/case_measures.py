"""What is measured on one case: header, voxels, label, and how well they agree. Reads everything, refuses nothing.

Where a value breaks a rule, the reader must learn which of the case's files to fix: a measure may carry details, one
per file, with what was seen there.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.data.dataset import Case, Channel
from distilldsm.validation.case_row import CaseRow, first_line, listed
from distilldsm.validation.content_measures import measure_content
from distilldsm.validation.header_measures import (
    compare_grids,
    measure_geometry,
    measure_header,
    open_file,
    why_unreadable,
)

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

PERCENTILES = {"p0_5": 0.5, "p50": 50.0, "p99_5": 99.5}


def measure_case(
    root: Path, case: Case, channels: Sequence[Channel], labels: Mapping[str, int], ignored: int | None = None
) -> CaseRow:
    """Measure one case; never raises.

    Args:
        root: the data set's root.
        channels: the declared channels.
        labels: label name to value in the files.
        ignored: value of the label `ignore`, where the data set declares one.
    """
    row = CaseRow()
    row.values.update({"case": case.id, "patient": case.patient, "image": case.images[0], "label": case.label})
    try:
        with _quiet_nibabel():
            image, blank = _measure_images(row, root, case.images, channels, labels)
            _measure_label(row, root, case.label, labels, image, blank, ignored)
    except Exception as error:  # whatever a damaged file provokes must not hide the findings of the other cases
        row.note("read_error", case.images[0], first_line(error))
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


def _voxels(row: CaseRow, root: Path, image: nib.Nifti1Image, file: str) -> Float32 | None:
    """The voxels, scaled, as float32; trailing axes of length 1 are dropped."""
    try:
        with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite, and is found as such
            data = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # zlib, EOF, OS errors and value errors of a short file
        row.note("read_error", file, why_unreadable(root / file, error))
        return None
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    return data


def _measure_images(
    row: CaseRow, root: Path, files: Sequence[str], channels: Sequence[Channel], labels: Mapping[str, int]
) -> tuple[nib.Nifti1Image | None, Mask | None]:
    """Measure header and voxels of all channels.

    Returns:
        The first file, whose grid the others must share, and where every channel is 0.
    """
    opened = [(file, image) for file in files if (image := open_file(row, root, file)) is not None]
    if not opened:
        return None, None
    first = opened[0][1]
    row.values["dtype"] = ", ".join(sorted({str(image.get_data_dtype()) for _, image in opened}))
    for file, image in opened:
        measure_header(row, root, file, image)
    measure_geometry(row, first)
    _compare_channels(row, opened)
    blank = _measure_intensities(row, root, opened, len(files), channels, labels)
    return first if opened[0][0] == files[0] else None, blank


def _compare_channels(row: CaseRow, opened: Sequence[tuple[str, nib.Nifti1Image]]) -> None:
    base_file, base = opened[0]
    row.values.update({"channel_shapes_agree": 1, "channel_offset_mm": 0.0})
    for file, image in opened[1:]:
        compare_grids(row, (base_file, base), (file, image), "channel_shapes_agree", "channel_offset_mm")


def _channels(
    row: CaseRow, root: Path, opened: Sequence[tuple[str, nib.Nifti1Image]], files: int
) -> Iterator[tuple[str, Float32]]:
    """One 3-D array a channel, one file in memory at a time; notes files that do not hold volumes."""
    for file, image in opened:
        data = _voxels(row, root, image, file)
        if data is None:
            continue
        volumes = data.shape[3] if files == 1 and data.ndim == 4 else 1
        dimensions = 3 if volumes > 1 else data.ndim
        if dimensions != 3:
            row.values["dimensions"] = dimensions
            row.note("dimensions", file, f"shape {listed(data.shape)}")
        row.values.setdefault("dimensions", 3)
        for k in range(volumes):
            yield file, data[..., k] if volumes > 1 else data


def _measure_intensities(
    row: CaseRow,
    root: Path,
    opened: Sequence[tuple[str, nib.Nifti1Image]],
    files: int,
    channels: Sequence[Channel],
    labels: Mapping[str, int],
) -> Mask | None:
    """Measure the voxels of all channels; returns where every channel is 0."""
    blank: Mask | None = None
    digest = hashlib.sha256()
    voxels = finite_voxels = constant = count = 0
    bad: dict[str, int] = defaultdict(int)
    for file, array in _channels(row, root, opened, files):
        ordered = np.sort(array, axis=None) + np.float32(0)  # -0 is 0
        digest.update(str(sorted(array.shape)).encode())  # a scan that is stored in another orientation is no other
        digest.update(ordered.data)
        empty = array == 0
        blank = empty if blank is None or blank.shape != empty.shape else blank & empty
        finite = np.isfinite(array)
        good = int(finite.sum())
        voxels, finite_voxels = voxels + array.size, finite_voxels + good
        bad[file] += array.size - good
        values = array if good == array.size else array[finite]
        channel = channels[count] if count < len(channels) else None
        if values.size and values.min() == values.max():
            constant += 1
            row.note("constant_channels", file, f"every voxel is {float(values.flat[0]):g}")
        elif values.size:
            measure_content(row, file, array, values, labels)
            if channel is None or channel.modality != "CT":  # air in CT is not 0, and is known not to be
                _measure_padding(row, file, array)
        nonzero = values[values != 0]
        if nonzero.size:
            for key, value in zip(PERCENTILES, np.percentile(nonzero, list(PERCENTILES.values())), strict=True):
                row.worst(f"intensity_{key}_min", float(value), largest=False)
                row.worst(f"intensity_{key}_max", float(value))
                if channel is not None:
                    row.values[f"intensity_{key}[{channel.name}]"] = float(value)
        count += 1
    if not voxels:
        return None
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
            shapes = ", ".join(listed(image.shape) for _, image in opened)
            row.note(
                "channel_difference",
                opened[0][0],
                f"{count} channels (shape {shapes}), but the data set declares {len(channels)}: {names}",
            )
    return blank


def _measure_padding(row: CaseRow, file: str, array: Float32) -> None:
    """Share of voxels with the value of the first corner, where that is not 0: padding that looks like tissue."""
    corner = array.flat[0]
    fraction = float((array == corner).mean()) if corner != 0 and np.isfinite(corner) else 0.0
    row.worst("padding_fraction", fraction)
    if fraction > 0:
        row.note("padding_fraction", file, f"{fraction:.0%} of the voxels are {float(corner):g}")


def _measure_label(
    row: CaseRow,
    root: Path,
    file: str,
    labels: Mapping[str, int],
    base: nib.Nifti1Image | None,
    blank: Mask | None,
    ignored: int | None,
) -> None:
    image = open_file(row, root, file)
    if image is None:
        return
    row.values["label_dtype"] = str(image.get_data_dtype())
    data = _voxels(row, root, image, file)
    if data is None:
        return
    row.values["label_dimensions"] = data.ndim
    if data.ndim != 3:
        row.note("label_dimensions", file, f"shape {listed(data.shape)}")
    affine_finite = bool(np.isfinite(image.affine).all())
    row.values["label_affine_finite"] = int(affine_finite)
    if base is not None:
        row.values["label_shape_agrees"] = 1
        compare_grids(row, (str(row.values["image"]), base), (file, image), "label_shape_agrees", "label_offset_mm")
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
    undeclared = sorted(set(counts) - set(labels.values()) - {ignored})
    row.values["undeclared_values"] = " ".join(str(v) for v in undeclared[:20]) or None
    if ignored is not None:
        row.values["ignored_voxels"] = counts.get(ignored, 0)
        row.note("ignored_voxels", file, f"{counts.get(ignored, 0)} voxels of the label 'ignore', {ignored}")
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
        if inside and blank is not None and blank.shape == foreground.shape:
            share = int(np.count_nonzero(foreground & blank)) / inside
            row.values["blank_foreground_fraction"] = share
            row.note("blank_foreground_fraction", file, f"the image is 0 in {share:.0%} of the labelled voxels")
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


@contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Header flaws are findings here; nibabel's own log lines would only tear the progress line."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with np.errstate(all="ignore"):  # a broken header may hold infinity
            yield
    finally:
        logger.setLevel(level)
