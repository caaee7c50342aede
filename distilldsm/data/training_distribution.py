"""`training_distribution.json` of an exported model: the values of every measure in training, without case ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, read_record
from distilldsm.core.mapping import from_mapping
from distilldsm.data.drift_measures import measures_of, values_of
from distilldsm.data.fingerprint import CaseFingerprint
from distilldsm.data.plan import Plan
from distilldsm.data.scan_measures import ScanMeasures

DISTRIBUTION = "training_distribution.json"
KEPT = 200
"""Largest number of values per measure. With more cases, this many evenly spaced quantiles are stored."""
MINIMUM_CASES = 3
"""Smallest number of training cases for a comparison."""


@dataclass(frozen=True, kw_only=True)
class TrainingDistribution:
    """The contents of `training_distribution.json`."""

    schema_version: int = 1
    name: str
    """Name of the data set."""
    cases: int
    """Number of training cases of the fold."""
    orientations: Mapping[str, int]
    """Directions of the stored axes to the number of cases."""
    measures: Mapping[str, tuple[float, ...]]
    """Measure to its values in the training cases. Each list is sorted, so a value cannot be traced to a case."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the distribution", seen=self.schema_version, rule="1")
        for name, values in self.measures.items():
            if not values or not np.isfinite(values).all() or list(values) != sorted(values):
                raise ConfigError(f"the values of '{name}' are not a distribution", rule="finite numbers, ascending")


def make_distribution(name: str, scans: Sequence[ScanMeasures], plan: Plan) -> TrainingDistribution:
    """The distribution over training cases, at least one."""
    rows = [values_of(scan, plan) for scan in scans]
    kept: dict[str, tuple[float, ...]] = {}
    for measure in measures_of(plan):
        values = np.sort([row[measure.name] for row in rows if measure.name in row])
        if len(values) > KEPT:
            values = np.quantile(values, np.linspace(0, 1, KEPT))
        if len(values):
            kept[measure.name] = tuple(float(f"{v:.6g}") for v in values)
    orientations = dict(sorted(Counter(scan.orientation for scan in scans).items()))
    return TrainingDistribution(name=name, cases=len(scans), orientations=orientations, measures=kept)


def distribution_of_fold(preprocessed: Path, training: Collection[str], plan: Plan) -> TrainingDistribution:
    """The distribution over a fold's training cases.

    Raises:
        UserError: `fingerprint.json` is missing or damaged.
    """
    path, wanted = preprocessed / "fingerprint.json", set(training)
    found = read_json(path)
    cases = [from_mapping(CaseFingerprint, row, where=str(path)) for row in found["per_case"] if row["case"] in wanted]
    return make_distribution(found["name"], [case.scan for case in cases], plan)


def load_distribution(model_dir: Path) -> TrainingDistribution:
    """Read the distribution of an exported model.

    Raises:
        DataError: the model was exported without one, or it is damaged.
    """
    path = model_dir / DISTRIBUTION
    if not path.is_file():
        raise DataError(
            "the model has no record of its training data", where=path, seen="no such file", hint="export it again"
        )
    found = read_record(TrainingDistribution, path, hint="export the model again")
    if found.cases < MINIMUM_CASES:
        raise DataError(
            "too few training cases to compare with", where=path, seen=found.cases, rule=f"at least {MINIMUM_CASES}"
        )
    return found
