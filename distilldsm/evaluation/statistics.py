"""Statistics of scores: bootstrap intervals, paired tests, Bland-Altman limits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
LEVEL = 0.95
RESAMPLES = 4999
SEED = 0
METHOD = "bootstrap over patients, bias-corrected and accelerated (BCa)"
_DECIMALS = 12  # rounding errors must not change the result if patients come in another order
_DECIMALS_OF_PAIRS = 9  # rounding errors must not make equal differences unequal
_BATCH = 1 << 22
"""Number of values that one step of the bootstrap holds in memory."""

Interval = tuple[float, float]


def mean_of(values: Floats, axis: int | None = None) -> Any:
    """The mean of the defined values (not NaN), over all or along an axis; NaN if no value is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an empty set
        return np.nanmean(values, axis=axis) if np.size(values) else np.nan


def spread(values: Floats | Sequence[float | None]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation (n - 1, None for fewer than two) and number of the defined values.

    Args:
        values: undefined values are NaN or None.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        return None, None, 0
    return float(known.mean()), float(known.std(ddof=1)) if known.size > 1 else None, known.size


def bootstrap_mean(table: Floats, patients: Sequence[str] | None = None) -> Interval | None:
    """Confidence interval of the mean: first over cases, then over columns. The same table gives the same interval.

    Patients are drawn with replacement, each with all its cases and columns (Efron, 1987: BCa; a cluster bootstrap).
    If BCa is undefined, for example if all draws give the same mean, the percentile interval is returned.

    Args:
        table: (cases, columns), NaN where a score is undefined; means are over the defined scores.
        patients: the patient of each case; None: every case is a separate patient.

    Returns:
        Low and high at LEVEL, or None for fewer than two patients with a score.
    """
    from scipy.stats import bootstrap

    scored = ~np.isnan(table).all(axis=1)
    whose = np.arange(len(table)) if patients is None else _numbered(patients)
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
            means = np.nanmean(sums[drawn].sum(axis=-2) / numbers[drawn].sum(axis=-2), axis=-1)
        return np.round(means, _DECIMALS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # draws without any defined score, and BCa where it is undefined
        for method in ("BCa", "percentile"):
            interval = bootstrap(
                (np.arange(count),),
                mean,
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=max(1, _BATCH // sums.size),
                confidence_level=LEVEL,
                method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
            if math.isfinite(interval.low) and math.isfinite(interval.high):
                return float(interval.low), float(interval.high)
    return None


def _numbered(names: Sequence[Hashable]) -> npt.NDArray[np.integer]:
    """An integer for each name, in the order of first appearance."""
    number_of = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return np.array([number_of[name] for name in names], dtype=int)


def by_patient(differences: Floats, patients: Sequence[str]) -> Floats:
    """(patients,) the mean difference of each patient's cases, in the order of the patients' first cases."""
    whose = _numbered(patients)
    return np.bincount(whose, weights=differences) / np.bincount(whose)


def wilcoxon_p(differences: Floats, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """p-value of the Wilcoxon signed-rank test (F. Wilcoxon, 1945); 1 if all differences are 0.

    The test assumes independent pairs. If a patient has several cases, pass their mean difference (`by_patient`).
    """
    from scipy.stats import wilcoxon

    differences = np.round(differences, _DECIMALS_OF_PAIRS)
    if not differences.any():
        return 1.0
    p = float(wilcoxon(differences, alternative=alternative).pvalue)
    return p if math.isfinite(p) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values (S. Holm, 1979), in their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of predicted and true volumes (Bland and Altman, 1986)."""

    bias: float
    """Mean of predicted minus true."""
    low: float
    high: float
    """Limits of agreement: bias -/+ 1.96 sample standard deviations of the differences."""
    cases: int
    mean_truth: float

    @property
    def share(self) -> float:
        """The bias as a share of the mean true volume, which must not be 0."""
        return self.bias / self.mean_truth


def bland_altman(truth: Sequence[float], predicted: Sequence[float]) -> Agreement | None:
    """Bias and 95 % limits of agreement, in the unit of the volumes; None for fewer than two cases."""
    bias, sd, cases = spread(np.subtract(predicted, truth, dtype=np.float64))
    if bias is None or sd is None:
        return None
    mean_truth = float(np.mean(truth))
    return Agreement(bias=bias, low=bias - 1.96 * sd, high=bias + 1.96 * sd, cases=cases, mean_truth=mean_truth)
