"""Compare scans with a model's training cases, one at a time. Scans that cannot be read are listed in the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.mapping import to_mapping
from distilldsm.core.progress import progress
from distilldsm.data.drift_measures import measures_of, values_of
from distilldsm.data.fingerprint import classes_from_values
from distilldsm.data.plan import Plan
from distilldsm.data.scan_measures import measure_scan
from distilldsm.data.training_distribution import load_distribution
from distilldsm.drift.compare import Reference, check_scan, check_set, references
from distilldsm.io import Scan, read_labels
from distilldsm.io.formats import LABEL_BYTES
from distilldsm.io.inputs import Input, find_inputs, tell_on_stderr
from distilldsm.io.scan import VOXEL_SHARE, Skipped


def drift_of_files(
    model: Path, inputs: Sequence[Path], *, masks: Path | None = None, name: str = "", budget: float = float("inf")
) -> dict[str, Any]:
    """Compare scans with what an exported model was trained on.

    Args:
        model: the model's directory with `plan.json` and `training_distribution.json`.
        inputs: files and folders, as for `distilldsm predict`.
        masks: a folder with one mask per scan, named like the scan.
        name: the name of the model in the report.
        budget: bytes of memory that a scan may use.

    Returns:
        The report as plain JSON types. `drift` is true if a measure is outside and preprocessing does not undo it.

    Raises:
        UserError: the model or an input path cannot be used. Scans that cannot be read are listed in `failures`.
    """
    distribution = load_distribution(model)
    plan = Plan.load(model / "plan.json")
    if masks is not None and not masks.is_dir():
        raise DataError("no such directory", where=masks, hint="give the folder that `distilldsm predict -o` wrote")
    known = references(distribution, measures_of(plan))
    scans, _, skipped = find_inputs(inputs, len(plan.channels), [c.name for c in plan.channels])
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for one in progress(scans, total=len(scans), title="drift", unit="scan"):
        try:
            row, left_out = _measure(one, plan, masks, budget)
        except Exception as error:  # no error of one scan may hide the others
            failures.append(_failure(one, error))
        else:
            rows.append(row)
            skipped += left_out
            for file in left_out:
                tell_on_stderr(str(file))
    for row in rows:
        row["outside"] = check_scan(row["values"], known)
    together = check_set([row["values"] for row in rows], known)
    report = {
        "schema_version": 1,
        "model": name,
        "trained_on": {
            "data_set": distribution.name,
            "cases": distribution.cases,
            "orientations": dict(distribution.orientations),
        },
        "drift": any(not o.undone for row in rows for o in row["outside"]) or any(not f.undone for f in together),
        "measures": {key: _describe(reference) for key, reference in known.items()},
        "scans": rows,
        "together": together,
        "failures": failures,
        "skipped": [{"path": str(file.path), "reason": file.reason} for file in skipped],
    }
    plain: dict[str, Any] = to_mapping(report)
    return plain


class TrainingCases:
    """The training cases of an exported model, to compare scans with before they are predicted."""

    def __init__(self, model: Path) -> None:
        """Raises DataError: the model has no record of its training data, or too few cases."""
        self.plan = Plan.load(model / "plan.json")
        self.known = references(load_distribution(model), measures_of(self.plan))

    def unlike(self, scan: Scan) -> dict[str, dict[str, float]]:
        """The measures in which a scan lies outside the training cases and preprocessing does not undo it.

        Returns:
            By the measure's title with its unit: the scan's value, and the limits low and high.
        """
        values = values_of(measure_scan(scan, self.plan.channels, quick=True), self.plan)
        return {
            self._title(one.measure): {key: float(f"{getattr(one, key):.4g}") for key in ("value", "low", "high")}
            for one in check_scan(values, self.known)
            if not one.undone
        }

    def _title(self, name: str) -> str:
        measure = self.known[name].measure
        return measure.title + (f" ({measure.unit})" if measure.unit else "")


def _measure(one: Input, plan: Plan, masks: Path | None, budget: float) -> tuple[dict[str, Any], Sequence[Skipped]]:
    """The values of a scan, and the files of its folder that are left out."""
    names = [channel.name for channel in plan.channels]
    scan = one.read(len(names), VOXEL_SHARE * budget, names, bytes_per_voxel=1 if masks is None else 2 * LABEL_BYTES)
    mask = None if masks is None else _find_mask(masks, one)
    classes = None if mask is None else _classes(mask, scan, plan)
    measured = measure_scan(scan, plan.channels, plan.class_names, classes)
    row = {
        "scan": one.name,
        "remarks": list(scan.remarks),
        "mask": None if mask is None else mask.name,
        "orientation": measured.orientation,
        "values": {name: float(f"{v:.6g}") for name, v in values_of(measured, plan).items()},
    }
    return row, scan.skipped


def _find_mask(folder: Path, one: Input) -> Path | None:
    """The mask of a scan: NAME.nii.gz or NAME.nii, the names that `distilldsm predict -o FOLDER` writes."""
    return next((p for p in (folder / f"{one.name}.nii.gz", folder / f"{one.name}.nii") if p.is_file()), None)


def _classes(mask: Path, scan: Scan, plan: Plan) -> npt.NDArray[np.uint8]:
    """The class indices (X, Y, Z) of a mask on the scan's grid; DataError if the model does not know a label."""
    return classes_from_values(read_labels(mask, on=scan).values, plan.class_values, mask)


def _failure(one: Input, error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, UserError) else f"{one.paths[0]}: {type(error).__name__}: {error}"
    return {"scan": one.name, "message": text}


def _describe(reference: Reference) -> dict[str, Any]:
    m = reference.measure
    numbers = {key: float(f"{getattr(reference, key):.6g}") for key in ("low", "high", "median")}
    return {"title": m.title, "unit": m.unit, "group": m.group, "undone": m.undone, **numbers}
