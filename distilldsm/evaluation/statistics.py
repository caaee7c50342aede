"""How sure the means are, and how volumes agree: bootstrap intervals over patients, Bland-Altman limits."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.evaluation.metrics import METRICS

LEVEL = 0.95
RESAMPLES = 4999
SEED = 0
METHOD = "bootstrap over patients, bias-corrected and accelerated (BCa)"
_DECIMALS = 12  # the same patients in another order are the same draw, whatever rounding errors make of it
_BATCH = 1 << 22
"""Numbers that a step of the bootstrap holds at a time."""

Interval = tuple[float, float]


def bootstrap_mean(table: npt.NDArray[np.floating], patients: Sequence[str] | None = None) -> Interval | None:
    """The interval of the mean over columns of the means over cases; the same table gives the same interval.

    Patients are drawn with replacement, each with all its cases and columns (Efron, 1987: BCa; a cluster bootstrap).
    Where BCa is undefined, as for a mean that does not depend on the draw, the percentile interval is given.

    Args:
        table: (cases, columns), NaN where a score is undefined; means are over the defined ones.
        patients: of each case; None: every case is a patient of its own.

    Returns:
        Low and high at LEVEL, or None for fewer than two patients with a score.
    """
    from scipy.stats import bootstrap

    scored = ~np.isnan(table).all(axis=1)
    number_of = {patient: k for k, patient in enumerate(dict.fromkeys(patients or ()))}
    whose = np.arange(len(table)) if patients is None else np.array([number_of[patient] for patient in patients])
    table, whose = table[scored], np.unique(whose[scored], return_inverse=True)[1]
    count = int(whose.max()) + 1 if len(whose) else 0
    if count < 2:
        return None
    if (table == table[0]).all():
        return float(table[0].mean()), float(table[0].mean())

    sums, numbers = np.zeros((count, table.shape[1])), np.zeros((count, table.shape[1]))
    np.add.at(sums, whose, np.nan_to_num(table))
    np.add.at(numbers, whose, ~np.isnan(table))

    def mean(drawn: npt.NDArray[np.integer], axis: int = -1) -> Any:
        drawn = np.moveaxis(drawn, axis, -1)
        with np.errstate(invalid="ignore"):  # a column without a score in this draw does not count
            found = np.nanmean(sums[drawn].sum(axis=-2) / numbers[drawn].sum(axis=-2), axis=-1)
        return np.round(found, _DECIMALS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # draws without any defined score, and BCa where it is undefined
        for method in ("BCa", "percentile"):
            found = bootstrap(
                (np.arange(count),),
                mean,
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=max(1, _BATCH // sums.size),
                confidence_level=LEVEL,
                method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
            if math.isfinite(found.low) and math.isfinite(found.high):
                return float(found.low), float(found.high)
    return None


def intervals(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Intervals of what `tables.summarise` calls mean, for every metric.

    Returns:
        {"level", "method", "resamples", "seed", "labels": {label: {metric: [low, high]}}, "mean": {metric: [low,
        high]}}; null where there is none.
    """
    patient_of = {row["case"]: row.get("patient") or row["case"] for row in rows}
    cases, patients = {case: k for k, case in enumerate(patient_of)}, list(patient_of.values())
    columns = {label: k for k, label in enumerate(labels)}
    tables = {metric: np.full((len(cases), len(columns)), np.nan) for metric in METRICS}
    for row in rows:
        for metric, table in tables.items():
            if row[metric] is not None:
                table[cases[row["case"]], columns[row["label"]]] = row[metric]
    return {
        "level": LEVEL,
        "method": METHOD,
        "resamples": RESAMPLES,
        "seed": SEED,
        "labels": {
            label: {metric: bootstrap_mean(table[:, [k]], patients) for metric, table in tables.items()}
            for label, k in columns.items()
        },
        "mean": {metric: bootstrap_mean(table, patients) for metric, table in tables.items()},
    }


def by_patient(differences: Sequence[float] | npt.NDArray[np.floating], patients: Sequence[str]) -> npt.NDArray:
    """(patients,) the mean difference of each patient's cases, in the order of their first ones."""
    of_patient: dict[str, list[float]] = {}
    for patient, difference in zip(patients, differences, strict=True):
        of_patient.setdefault(patient, []).append(float(difference))
    return np.array([statistics.fmean(values) for values in of_patient.values()])


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of predicted with true volumes (Bland and Altman, 1986)."""

    bias: float
    """Mean of predicted minus true."""
    low: float
    high: float
    """Limits of agreement: bias -/+ 1.96 sample standard deviations of the differences."""
    cases: int


def bland_altman(truth: Sequence[float], predicted: Sequence[float]) -> Agreement | None:
    """Bias and 95 % limits of agreement, in the unit of the volumes; None for fewer than two cases."""
    differences = np.asarray(predicted, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    if len(differences) < 2:
        return None
    bias, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1))
    return Agreement(bias=bias, low=bias - spread, high=bias + spread, cases=len(differences))
