"""The fingerprint of a data set: shapes, spacings, intensities and label volumes of its cases, measured once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.data.geometry import Size, background_of, nonzero_box
from distilldsm.data.scan_measures import ScanMeasures, measure_scan
from distilldsm.io import Scan, read_labels, read_scan
from distilldsm.io.orientation import reorient

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
SAMPLES_PER_CASE = 20_000


CONNECTED = np.ones((3, 3, 3))
"""Voxels are connected over faces, edges and corners, as in post-processing."""


@dataclass(frozen=True, kw_only=True)
class LabelShape:
    """Shape of a label in one case."""

    components: int
    shape: tuple[int, int, int]
    """Size of the box around its largest component, voxels."""


@dataclass(frozen=True, kw_only=True)
class CaseFingerprint:
    """Measures of one case. Axes are in RAS order (x, y, z)."""

    case: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    nonzero_fraction: float
    """Share of the voxels of `nonzero_shape` that are not background in at least one channel."""
    foreground_mean: tuple[float, ...]
    """Per channel, over the voxels of all foreground labels (over all non-zero voxels if there is no foreground)."""
    foreground_sd: tuple[float, ...]
    foreground_percentiles: tuple[tuple[float, ...], ...]
    """Per channel, at PERCENTILES."""
    label_volumes_ml: Mapping[str, float]
    nonzero_shape: tuple[int, int, int]
    """Size of the box around the voxels that are not background in at least one channel, see `background_of`."""
    foreground_shape: tuple[int, int, int] = (0, 0, 0)
    """Size of the box around all labels; zeros without a labelled voxel."""
    labels: Mapping[str, LabelShape] = field(default_factory=dict)
    """The labels that the case holds."""
    scan: ScanMeasures
    """Measures for the comparison with new scans (docs/drift.md)."""

    @property
    def has_foreground(self) -> bool:
        """Whether the case has a labelled voxel. If not, the intensities are those of all non-zero voxels."""
        return any(self.label_volumes_ml.values())


def load_case(root: Path, case: Case, index: DatasetIndex) -> tuple[Scan, npt.NDArray[np.uint8]]:
    """Read image and label of one case, with the label as class indices.

    Returns:
        The scan, with its voxels in memory, and classes (X, Y, Z) on its grid.

    Raises:
        DataError: a file cannot be read, the label has another grid, or it holds values that are not declared.
    """
    scan = read_scan([root / p for p in case.images], len(index.channels))
    labels = read_labels(root / case.label, on=scan)
    return scan.load(), classes_from_values(labels.values, index.class_values, labels.path)


def classes_from_values(
    values: npt.NDArray[np.uint8], class_values: Sequence[int], path: Path
) -> npt.NDArray[np.uint8]:
    """Map label values to class indices 0..K-1.

    Raises:
        DataError: a value is not declared.
    """
    table = np.full(256, 255, dtype=np.uint8)
    table[list(class_values)] = np.arange(len(class_values), dtype=np.uint8)
    classes = table[values]
    if classes.max(initial=0) >= len(class_values):
        strange = sorted(set(np.unique(values).tolist()) - set(class_values))
        raise DataError(
            "holds labels that the data set does not declare",
            where=path,
            seen=strange,
            rule=f"declared: {list(class_values)}",
            hint="declare them, or leave the case out (validate.on_invalid: exclude)",
        )
    return classes


def fingerprint_case(root: Path, case: Case, index: DatasetIndex) -> CaseFingerprint:
    """Measure one case; raises the errors of `load_case`."""
    scan, classes = load_case(root, case, index)
    # In RAS order: samples and components do not depend on the file's orientation.
    intensities = reorient(scan.intensities(), scan.affine, (0, 1, 2))
    ras_classes = reorient(classes[None], scan.affine, (0, 1, 2))[0]
    empty = np.array(background_of(scan), dtype=np.float32)[:, None, None, None]
    nonzero = (intensities != empty).any(axis=0)
    box = _between(*nonzero_box(nonzero, nonzero.shape))
    mask = ras_classes > 0
    foreground = nonzero_box(mask, mask.shape) if mask.any() else ((0, 0, 0), (0, 0, 0))
    if not mask.any():
        mask = nonzero
    # A fixed, evenly spaced sample makes percentiles of large volumes cheap and repeatable.
    step = max(1, int(mask.sum()) // SAMPLES_PER_CASE)
    samples = intensities[:, mask][:, ::step].astype(np.float64)
    if samples.size == 0:
        samples = np.zeros((len(index.channels), 1))
    measures = measure_scan(scan, index.channels, index.class_names, classes)
    return CaseFingerprint(
        case=case.id,
        shape=measures.shape,
        spacing_mm=measures.spacing_mm,
        nonzero_fraction=float(nonzero.sum() / math.prod(box)),
        foreground_mean=tuple(samples.mean(axis=1).tolist()),
        foreground_sd=tuple(samples.std(axis=1).tolist()),
        foreground_percentiles=tuple(
            tuple(float(v) for v in np.percentile(channel, PERCENTILES)) for channel in samples
        ),
        label_volumes_ml={name: label.volume_ml for name, label in measures.labels.items()},
        nonzero_shape=box,
        foreground_shape=_between(*foreground),
        labels=label_shapes(ras_classes, index.class_names),
        scan=measures,
    )


def label_shapes(classes: npt.NDArray[np.uint8], class_names: Sequence[str]) -> dict[str, LabelShape]:
    """The shape of each label that classes (X, Y, Z) hold, by name."""
    from scipy import ndimage

    shapes = {}
    for k, box in enumerate(ndimage.find_objects(classes, len(class_names) - 1), start=1):
        if box is None:
            continue
        components, count = ndimage.label(classes[box] == k, CONNECTED, output=np.int32)
        largest = int(np.bincount(components.ravel())[1:].argmax())
        x, y, z = (one.stop - one.start for one in ndimage.find_objects(components)[largest])
        shapes[class_names[k]] = LabelShape(components=count, shape=(x, y, z))
    return shapes


def _between(start: Size, stop: Size) -> Size:
    x, y, z = (b - a for a, b in zip(start, stop, strict=True))
    return x, y, z


def summarise(cases: Sequence[CaseFingerprint], index: DatasetIndex) -> dict[str, object]:
    """The data set's fingerprint as plain JSON types: medians, ranges, and every case.

    Foreground intensities come from the cases with a labelled voxel, or from all cases if there is none.
    """
    labelled = [c for c in cases if c.has_foreground] or cases

    def spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
        table = np.asarray(rows, dtype=np.float64)
        return {
            "min": table.min(axis=0).tolist(),
            "median": np.median(table, axis=0).tolist(),
            "max": table.max(axis=0).tolist(),
        }

    return {
        "schema_version": 1,
        "name": index.name,
        "cases": len(cases),
        "axes": ["x", "y", "z"],
        "shape": spread([c.shape for c in cases]),
        "spacing_mm": spread([c.spacing_mm for c in cases]),
        "nonzero_fraction": spread([[c.nonzero_fraction] for c in cases]),
        "percentiles": list(PERCENTILES),
        "foreground_intensity": {
            channel.name: {
                "mean": float(np.mean([c.foreground_mean[k] for c in labelled])),
                "sd": float(np.sqrt(np.mean([c.foreground_sd[k] ** 2 for c in labelled]))),
                "percentiles": np.median([c.foreground_percentiles[k] for c in labelled], axis=0).tolist(),
            }
            for k, channel in enumerate(index.channels)
        },
        "foreground_box_mm": _box_of(
            [np.multiply(c.foreground_shape, c.spacing_mm) for c in cases if c.has_foreground]
        ),
        "foreground_box": _box_of([c.foreground_shape for c in cases if c.has_foreground]),
        "label_volumes_ml": {
            name: spread([[c.label_volumes_ml[name]] for c in cases]) for name in index.class_names[1:]
        },
        "per_case": list(cases),
    }


def _box_of(boxes: Sequence[Size | npt.NDArray[np.float64]]) -> list[float]:
    """The 90th percentile of the sizes, per axis."""
    percentile: list[float] = np.percentile(np.array(boxes), 90, axis=0).tolist()
    return percentile
