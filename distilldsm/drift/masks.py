"""Masks of new scans: where they lie, and what they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.fingerprint import classes_from_values
from distilldsm.data.plan import Plan
from distilldsm.io import Scan, read_labels
from distilldsm.io.inputs import Input


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
