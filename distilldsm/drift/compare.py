"""New scans against the training distribution: each scan by itself, and several together.

A scan is outside in a measure if it lies beyond the range of the training cases by more than a margin. The margin is a
quarter of that range plus a floor for rounding. With 100 training cases, about 1 in 3,000 values of a normal
distribution is outside; docs/drift.md has measured rates. With five scans or more, the two distributions are also
compared (two-sample Kolmogorov-Smirnov test), corrected for the number of measures (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distilldsm.data.drift_measures import Measure
from distilldsm.data.training_distribution import TrainingDistribution

MARGIN = 0.25
"""Share of the training range that is added at both ends."""
FEW = 20
"""With fewer training cases their range is too narrow. The margin is then multiplied by FEW / number of cases."""
MAD_TO_SD = 1.4826
SET_SIZE = 5
"""Distributions are compared if there are at least this many scans."""
ALPHA = 0.01
SET_EFFECT = 0.4
"""Smallest Kolmogorov-Smirnov statistic that counts. With many scans even a tiny difference would be significant."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A measure's training distribution."""

    measure: Measure
    values: tuple[float, ...]
    low: float
    """Below this a scan is outside."""
    high: float
    median: float

    @classmethod
    def of(cls, measure: Measure, values: Sequence[float]) -> Reference:
        scaled = np.array([measure.scaled(v) for v in values])
        low, high = float(scaled.min()), float(scaled.max())
        margin = MARGIN * (high - low) * max(1.0, FEW / len(scaled)) + measure.floor
        return cls(
            measure=measure,
            values=tuple(values),
            low=measure.unscaled(low - margin),
            high=measure.unscaled(high + margin),
            median=float(np.median(values)),
        )

    def distance(self, value: float) -> float:
        """Robust z-score: difference to the median over 1.4826 times the median absolute deviation (or the floor)."""
        scaled = np.array([self.measure.scaled(v) for v in self.values])
        median = float(np.median(scaled))
        spread = max(MAD_TO_SD * float(np.median(np.abs(scaled - median))), self.measure.floor)
        return (self.measure.scaled(value) - median) / spread

    def outside(self, value: float) -> bool:
        scaled = self.measure.scaled(value)
        return not self.measure.scaled(self.low) <= scaled <= self.measure.scaled(self.high)


@dataclass(frozen=True, kw_only=True)
class Outside:
    """One measure in which one scan is outside."""

    measure: str
    value: float
    z: float
    low: float
    high: float
    median: float
    undone: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class SetFinding:
    """One measure in which the scans together differ from the training cases."""

    measure: str
    statistic: float
    p: float
    """Holm-corrected."""
    median: float
    training_median: float
    undone: bool
    meaning: str


def references(distribution: TrainingDistribution, measures: Sequence[Measure]) -> dict[str, Reference]:
    """The training distribution of every measure that the model's file holds."""
    return {m.name: Reference.of(m, distribution.measures[m.name]) for m in measures if m.name in distribution.measures}


def check_scan(values: Mapping[str, float], known: Mapping[str, Reference]) -> tuple[Outside, ...]:
    """The measures in which one scan is outside: largest |z| first, those that preprocessing undoes last."""
    outside = [
        Outside(
            measure=name,
            value=values[name],
            z=round(reference.distance(values[name]), 2),
            low=reference.low,
            high=reference.high,
            median=reference.median,
            undone=reference.measure.undone,
            meaning=reference.measure.meaning,
        )
        for name, reference in known.items()
        if name in values and reference.outside(values[name])
    ]
    return tuple(sorted(outside, key=lambda o: (o.undone, -abs(o.z))))


def check_set(scans: Sequence[Mapping[str, float]], known: Mapping[str, Reference]) -> tuple[SetFinding, ...]:
    """The measures with a different distribution; none if there are fewer than SET_SIZE scans.

    Values are rounded to a quarter of a measure's floor before the test. Otherwise the test would detect rounding.
    """
    from scipy.stats import ks_2samp

    from distilldsm.evaluation.statistics import holm

    tested: list[tuple[Reference, float, float, float]] = []
    for name, reference in known.items():
        new = [row[name] for row in scans if name in row]
        if len(new) < SET_SIZE:
            continue
        a, b = (_without_rounding(reference.measure, v) for v in (new, reference.values))
        result = ks_2samp(a, b, method="auto")
        tested.append((reference, float(result.statistic), float(result.pvalue), float(np.median(new))))
    findings = []
    for (reference, statistic, _, median), p in zip(tested, holm([t[2] for t in tested]), strict=True):
        if p < ALPHA and statistic >= SET_EFFECT:
            findings.append(
                SetFinding(
                    measure=reference.measure.name,
                    statistic=round(statistic, 4),
                    p=float(f"{p:.3g}"),
                    median=median,
                    training_median=reference.median,
                    undone=reference.measure.undone,
                    meaning=reference.measure.meaning,
                )
            )
    return tuple(sorted(findings, key=lambda f: (f.undone, f.p, -f.statistic)))


def _without_rounding(measure: Measure, values: Sequence[float]) -> np.ndarray:
    return np.round(np.array([measure.scaled(v) for v in values]) / (measure.floor / 4))
