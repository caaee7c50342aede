"""New scans, NIfTI or DICOM, to measures: one at a time, a slice at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.fingerprint import classes_from_values
from distilldsm.data.plan import Plan
from distilldsm.data.scan_measures import LabelMeasures, ScanMeasures, measure_channel
from distilldsm.io import Scan, read_labels
from distilldsm.io.inputs import Input
from distilldsm.io.orientation import ras_orientation


def measure_scan(scan: Scan, plan: Plan, classes: npt.NDArray[np.uint8] | None = None) -> ScanMeasures:
    """Measure a scan; with `classes` (X, Y, Z), class indices on its grid, its structures too."""
    order = np.argsort(ras_orientation(scan.affine)[:, 0])
    names = plan.class_names if classes is not None else ()
    found = []
    for channel, stored in zip(plan.channels, scan.channels, strict=True):

        def read(k: int, stored: object = stored) -> npt.NDArray[np.float32]:
            return stored.values(stored.raw[..., k])  # type: ignore[attr-defined]

        whole = channel.modality == "CT"
        found.append(measure_channel(read, scan.shape, whole=whole, classes=classes, class_count=len(names)))
    return ScanMeasures(
        shape=_ordered(scan.shape, order),
        spacing_mm=_ordered(scan.spacing_mm, order),
        orientation="".join(nib.aff2axcodes(scan.affine)),
        nonzero_fraction=min(one.nonzero_fraction for one in found),
        channels=tuple(one.measures for one in found),
        labels={} if classes is None else _labels(scan, plan, classes, [one.label_means for one in found]),
    )


def _labels(scan: Scan, plan: Plan, classes: npt.NDArray, means: list) -> Mapping[str, LabelMeasures]:
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    labels = {}
    for k, name in enumerate(plan.class_names[1:], start=1):
        present = tuple(row[k] for row in means if row[k] is not None)
        labels[name] = LabelMeasures(
            volume_ml=float(np.count_nonzero(classes == k)) * voxel_ml,
            means=present if len(present) == len(means) else None,
        )
    return labels


def read_mask(path: Path, scan: Scan, plan: Plan) -> npt.NDArray[np.uint8]:
    """A mask of the scan as class indices (X, Y, Z).

    Raises:
        DataError: it is unreadable, lies on another grid, or holds labels that the model does not know.
    """
    return classes_from_values(read_labels(path, on=scan).values, plan.class_values, path)


def find_mask(folder: Path, one: Input) -> Path | None:
    """The mask of a scan: NAME.nii.gz or NAME.nii, as `distilldsm predict -o FOLDER` names it."""
    return next((p for p in (folder / f"{one.name}.nii.gz", folder / f"{one.name}.nii") if p.is_file()), None)


def check_masks(folder: Path) -> None:
    """Raise DataError where there is no such folder."""
    if not folder.is_dir():
        raise DataError("no such directory", where=folder, hint="give the folder that `distilldsm predict -o` wrote")


def _ordered(values: tuple, order: npt.NDArray[np.integer]) -> tuple:
    return tuple(values[int(k)] for k in order)
