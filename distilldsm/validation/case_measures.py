"""Measures one case: header, voxels, label, and how well they agree. It reads all files and raises no errors.

If a value breaks a rule, the user must know which file of the case to fix. So a measure can have details: one per
file, with the value in that file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.data.dataset import Case, Channel
from distilldsm.io import Scan
from distilldsm.io.errors import first_line
from distilldsm.io.formats import read_file
from distilldsm.io.nifti import NiftiFile
from distilldsm.validation.case_row import CaseRow, listed
from distilldsm.validation.content_measures import Samples, measure_content, sampled, separation
from distilldsm.validation.header_measures import (
    BYTES_PER_VOXEL,
    Grid,
    compare_grids,
    measure_geometry,
    measure_header,
    open_file,
)

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

PERCENTILES = {"p0_5": 0.5, "p50": 50.0, "p99_5": 99.5}


def measure_case(
    root: Path,
    case: Case,
    channels: Sequence[Channel],
    labels: Mapping[str, int],
    ignored: int | None = None,
    limit_bytes: float = float("inf"),
) -> CaseRow:
    """Measure one case. It never raises.

    Args:
        root: the data set's root.
        channels: the declared channels.
        labels: label name to value in the label files.
        ignored: value of the label `ignore`, if the data set declares it.
        limit_bytes: memory for one file; a file that needs more is a read error.
    """
    row = CaseRow()
    if case.surplus:
        row.values["surplus_channel_files"] = ", ".join(case.surplus)
        row.note("surplus_channel_files", case.images[0], "not used: " + ", ".join(case.surplus))
    row.values.update({"case": case.id, "patient": case.patient, "image": case.images[0], "label": case.label})
    try:
        with np.errstate(all="ignore"):  # a broken header can contain infinity
            image, blank, samples = _measure_images(row, root, case.images, channels, labels, limit_bytes)
            _measure_label(row, root, case.label, labels, image, blank, samples, ignored, limit_bytes)
    except Exception as error:  # no error in one damaged file may hide the findings of the other cases
        row.note("read_error", case.images[0], first_line(error))
    errors = row.details.get("read_error", [])
    row.values["read_error"] = "; ".join(f"{e.file}: {e.seen}" for e in errors) or None
    return row


def memory_bytes(root: Path, case: Case) -> float:
    """Memory for measuring the case's largest file, by the headers. 0 if no header can be read."""
    largest = 0.0
    for file in (*case.images, case.label):
        with suppress(Exception):  # the measurement reports this error later
            scan = read_file(root / file, refuse=lambda error: None)
            largest = max(largest, scan.nbytes + BYTES_PER_VOXEL * math.prod(scan.shape))
    return largest


def _measure_images(
    row: CaseRow,
    root: Path,
    files: Sequence[str],
    channels: Sequence[Channel],
    labels: Mapping[str, int],
    limit_bytes: float,
) -> tuple[Grid | None, Mask | None, list[Samples]]:
    """Measure header and voxels of all channels, one file in memory at a time.

    Returns:
        The first file's grid, which the other files must share; a mask of the voxels that are 0 in every channel; and
        some voxels of each channel.
    """
    grids: list[Grid] = []
    dtypes: set[str] = set()
    intensities = _Intensities(row, channels, labels)
    for file in files:
        scan = open_file(row, root, file, limit_bytes)
        if scan is None:
            continue
        grid = Grid(file, scan.shape, scan.affine)
        if not grids:
            measure_geometry(row, scan)
            row.values.update({"channel_shapes_agree": 1, "channel_offset_mm": 0.0})
        else:
            compare_grids(row, grids[0], grid, "channel_shapes_agree", "channel_offset_mm")
        grids.append(grid)
        dtypes.add(_dtype(scan))
        measure_header(row, file, scan)
        if len(files) > 1 and len(scan.channels) > 1:
            row.note("read_error", file, f"has the wrong number of channels (shape {listed(scan.stored_shape)})")
            continue
        for channel in scan.channels:
            intensities.add(file, channel.values(channel.raw))
        del scan
    if not grids:
        return None, None, []
    row.values["dtype"] = ", ".join(sorted(dtypes))
    intensities.finish(grids[0].file, whole="read_error" not in row.details)
    return grids[0] if grids[0].file == files[0] else None, intensities.blank, intensities.samples


def _dtype(scan: Scan) -> str:
    """The number type in the file."""
    return str(scan.source.dtype if isinstance(scan.source, NiftiFile) else scan.channels[0].raw.dtype)


class _Intensities:
    """Measures the voxels of all channels of a case."""

    def __init__(self, row: CaseRow, channels: Sequence[Channel], labels: Mapping[str, int]) -> None:
        self.row, self.channels, self.labels = row, channels, labels
        self.blank: Mask | None = None
        """Mask of the voxels that are 0 in every channel."""
        self.samples: list[Samples] = []
        self._known: dict[str, str] = {}
        """Digest of a channel's voxels to its name."""
        self._digest = hashlib.sha256()
        self._voxels = self._finite = self._constant = self._count = 0

    def add(self, file: str, array: Float32) -> None:
        """Measure the next channel, (X, Y, Z)."""
        ordered = np.sort(array, axis=None) + np.float32(0)  # -0 is 0
        # Sorted voxels and a sorted shape: the digest does not depend on the stored orientation.
        self._digest.update(str(sorted(array.shape)).encode())
        self._digest.update(ordered.data)
        empty = array == 0
        self.blank = empty if self.blank is None or self.blank.shape != empty.shape else self.blank & empty
        finite = np.isfinite(array)
        finite_count = int(finite.sum())
        self._voxels, self._finite = self._voxels + array.size, self._finite + finite_count
        if finite_count < array.size:
            self.row.note("finite_fraction", file, f"{array.size - finite_count} voxels are NaN or infinite")
        values = array if finite_count == array.size else array[finite]
        channel = self.channels[self._count] if self._count < len(self.channels) else None
        self._compare(file, array, f"channel {self._count}" if channel is None else channel.name)
        self.samples.append(sampled(array))
        self._count += 1
        if values.size and values.min() == values.max():
            self._constant += 1
            self.row.note("constant_channels", file, f"every voxel is {float(values.flat[0]):g}")
        elif values.size:
            measure_content(self.row, file, array, values, self.labels)
            if channel is None or channel.modality != "CT":  # in CT, air is expected to differ from 0
                _measure_padding(self.row, file, array)
        _measure_percentiles(self.row, values[values != 0], channel)

    def _compare(self, file: str, array: Float32, name: str) -> None:
        """Count the channels that hold the same voxels as an earlier one."""
        if len(self.channels) < 2:
            return
        first = self._known.setdefault(hashlib.sha256(np.asfortranarray(array).T.data).hexdigest(), name)
        self.row.values["identical_channels"] = int(self.row.values.get("identical_channels") or 0) + (first != name)
        if first != name:
            self.row.note("identical_channels", file, f"{name} holds the same voxels as {first}")

    def finish(self, file: str, *, whole: bool) -> None:
        """Write the measures over all channels. `whole`: all files could be read. `file`: the first file."""
        row = self.row
        if not self._voxels:
            return
        row.values.update({"finite_fraction": self._finite / self._voxels, "constant_channels": self._constant})
        if not whole:
            return
        difference = self._count - len(self.channels)
        row.values.update(
            {
                "channel_count": self._count,
                "channel_difference": difference,
                "image_sha256": self._digest.hexdigest(),
            }
        )
        if difference:
            names = ", ".join(c.name for c in self.channels)
            row.note(
                "channel_difference",
                file,
                f"{self._count} channels, but the data set declares {len(self.channels)}: {names}",
            )


def _measure_percentiles(row: CaseRow, nonzero: Float32, channel: Channel | None) -> None:
    if not nonzero.size:
        return
    for key, value in zip(PERCENTILES, np.percentile(nonzero, list(PERCENTILES.values())), strict=True):
        row.worst(f"intensity_{key}_min", float(value), largest=False)
        row.worst(f"intensity_{key}_max", float(value))
        if channel is not None:
            row.values[f"intensity_{key}[{channel.name}]"] = float(value)


def _measure_padding(row: CaseRow, file: str, array: Float32) -> None:
    """Measure the share of voxels equal to the first corner voxel, if that is not 0: padding that looks like tissue."""
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
    base: Grid | None,
    blank: Mask | None,
    samples: Sequence[Samples],
    ignored: int | None,
    limit_bytes: float,
) -> None:
    scan = open_file(row, root, file, limit_bytes)
    if scan is None:
        return
    if len(scan.channels) > 1:
        row.note("read_error", file, f"has the wrong number of channels (shape {listed(scan.stored_shape)})")
        return
    row.values["label_dtype"] = _dtype(scan)
    if base is not None:
        row.values["label_shape_agrees"] = 1
        label_grid = Grid(file, scan.shape, scan.affine)
        compare_grids(row, base, label_grid, "label_shape_agrees", "label_offset_mm")
    data = scan.channels[0].values(scan.channels[0].raw)
    rounded = _measure_whole_numbers(row, file, data)
    counts = _count(rounded)
    _measure_values(row, file, counts, labels, ignored)
    if np.isfinite(scan.affine).all():
        voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
        row.values.update(
            {f"volume_ml[{name}]": counts.get(value, 0) * voxel_ml for name, value in labels.items() if value != 0}
        )
    row.values["foreground_fraction"] = 1 - counts.get(0, 0) / max(1, rounded.size)
    if rounded.size == data.size:
        auc = separation(samples, sampled(data) != 0)
        if auc is not None:
            row.values["label_auc"] = auc
        _measure_foreground(row, file, rounded.reshape(data.shape) != 0, blank)
    digest = hashlib.sha256(str(data.shape).encode())
    digest.update(np.asfortranarray(rounded).T.data)
    row.values["label_sha256"] = digest.hexdigest()


def _measure_whole_numbers(row: CaseRow, file: str, data: Float32) -> Float32:
    """Measure how far a label is from whole numbers. Returns its finite values, rounded."""
    finite = np.isfinite(data)
    if not finite.all():
        row.note("label_finite_fraction", file, f"{int((~finite).sum())} voxels are NaN or infinite")
    row.values["label_finite_fraction"] = float(finite.mean())
    values = data if finite.all() else data[finite]
    rounded = np.rint(values)
    deviation = np.abs(values - rounded)
    largest = float(deviation.max(initial=0))
    row.values["label_deviation"] = largest
    if largest > 0:
        odd = np.unique(values[deviation > 0.5 * largest])[:3]
        row.note("label_deviation", file, f"values such as {', '.join(f'{float(v):g}' for v in odd)}")
    return rounded


def _measure_values(
    row: CaseRow, file: str, counts: Mapping[int, int], labels: Mapping[str, int], ignored: int | None
) -> None:
    """Note the values in a label, those that are not declared, and the declared labels that are absent."""
    row.values["label_values"] = " ".join(str(v) for v in list(counts)[:20]) + (" ..." if len(counts) > 20 else "")
    undeclared = sorted(set(counts) - set(labels.values()) - {ignored})
    row.values["undeclared_values"] = " ".join(str(v) for v in undeclared[:20]) or None
    if ignored is not None:
        row.values["ignored_voxels"] = counts.get(ignored, 0)
        row.note("ignored_voxels", file, f"{counts.get(ignored, 0)} voxels of the label 'ignore', {ignored}")
    absent = [name for name, value in labels.items() if value != 0 and not counts.get(value)]
    row.values["absent_labels"] = ", ".join(absent) or None


def _measure_foreground(row: CaseRow, file: str, foreground: Mask, blank: Mask | None) -> None:
    """Measure the share of the foreground (X, Y, Z) where the image is 0, and the share on the volume's border."""
    inside = int(np.count_nonzero(foreground))
    if not inside:
        return
    if blank is not None and blank.shape == foreground.shape:
        share = int(np.count_nonzero(foreground & blank)) / inside
        row.values["blank_foreground_fraction"] = share
        row.note("blank_foreground_fraction", file, f"the image is 0 in {share:.0%} of the labelled voxels")
    border = inside - int(np.count_nonzero(foreground[1:-1, 1:-1, 1:-1]))
    row.values["border_fraction"] = border / inside


def _count(rounded: Float32) -> dict[int, int]:
    """Number of voxels per whole number, in ascending order."""
    if rounded.size and rounded.min() >= 0 and rounded.max() <= 255:
        counts = np.bincount(rounded.astype(np.uint8).ravel(order="K"), minlength=256)
        return {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    values, numbers = np.unique(rounded, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, numbers, strict=True)}
