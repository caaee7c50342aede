"""What a mean over few cases is worth, and how well volumes agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 5000


def mean_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over cases (Efron, 1979); None for fewer than two.

    The cases are drawn again with replacement `RESAMPLES` times; the interval tells how much the mean depends on which
    cases happened to be held out, not how it would change with another training.

    Args:
        values: one per case.
        confidence: e.g. 0.95.
        seed: of the draws: the same values give the same interval.
    """
    if len(values) < 2:
        return None
    from scipy.stats import bootstrap

    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    found = bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Predicted minus true, over cases."""

    bias: float
    sd: float
    """Sample standard deviation of the differences."""
    low: float
    high: float
    """Limits of agreement: bias ± 1.96 sd."""


def agreement(truth: Sequence[float], predicted: Sequence[float]) -> Agreement | None:
    """Bias and limits of agreement (Bland and Altman, Lancet 1986); None for fewer than two cases."""
    if len(truth) < 2:
        return None
    difference = np.asarray(predicted, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    bias, sd = float(difference.mean()), float(difference.std(ddof=1))
    return Agreement(bias=bias, sd=sd, low=bias - 1.96 * sd, high=bias + 1.96 * sd)
