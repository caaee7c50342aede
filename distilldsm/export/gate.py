"""Decide whether a newly registered model becomes champion.

It must be good enough by itself: see `Gate`. Then it is compared with the champion on the same cases, case by case.

The test assumes independent pairs. So each patient gives one pair: the mean difference over the patient's cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from distilldsm.config import ExportConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping, require
from distilldsm.evaluation.metrics import METRICS, main_metrics
from distilldsm.evaluation.statistics import by_patient, wilcoxon_p
from distilldsm.export.scores import Scores

Outcome = Literal["first", "better", "not_better", "not_significant", "not_comparable", "not_good_enough"]
MIN_CASES = 5
"""Scored cases that a champion and an INT8 model need. The mean of fewer cases says too little."""
BY_HAND = "or set the alias champion by hand"
_DECIMALS = 9  # a rounding error must not lift a difference that equals the margin above it


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The conditions for a challenger; see `ExportConfig.gate_metric`, `gate_margin`, `gate_p` and `min_dice`."""

    metric: str = "dice"
    """One of the main metrics, see `distilldsm.evaluation.metrics`."""
    margin: float = 0.0
    p: float | None = None
    min_dice: float = ExportConfig.min_dice
    min_cases: int = MIN_CASES

    def __post_init__(self) -> None:
        names = [metric.name for metric in main_metrics()]
        require(self.metric in names, "gate_metric", self.metric, f"one of {', '.join(names)}")

    @classmethod
    def of(cls, config: ExportConfig) -> Gate:
        """The gate that `params.yaml` describes."""
        return cls(metric=config.gate_metric, margin=config.gate_margin, p=config.gate_p, min_dice=config.min_dice)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision about a challenger, and the reason."""

    outcome: Outcome
    reason: str
    """The reason in one line."""
    metric: str
    margin: float
    champion: str | None = None
    """The version of the champion in the comparison; None if there was no champion."""
    difference: float | None = None
    """Mean over the cases of challenger minus champion; above 0: the challenger is better; None: not compared."""
    p: float | None = None
    """p of the one-sided Wilcoxon signed-rank test over the patients: is the difference above the margin?"""
    cases: int | None = None

    @property
    def promoted(self) -> bool:
        """Whether the challenger becomes champion."""
        return self.outcome in ("first", "better")

    def tags(self) -> dict[str, str]:
        """As tags of a model version and of a run."""
        values: dict[str, Any] = {
            "gate.decision": "champion" if self.promoted else "challenger",
            "gate.outcome": self.outcome,
            "gate.reason": self.reason,
            "gate.metric": self.metric,
            "gate.margin": f"{self.margin:g}",
            "gate.champion": self.champion or "none",
            "gate.difference": None if self.difference is None else f"{self.difference:.6g}",
            "gate.p": None if self.p is None else f"{self.p:.3g}",
            "gate.cases": self.cases,
        }
        # Write all tags each time. Otherwise a tag of an interrupted attempt could belong to another comparison.
        return {key: "-" if value is None else str(value) for key, value in values.items()}


def decide(challenger: Scores | None, champion: Scores | None, gate: Gate, *, version: str | None) -> Decision:
    """Check the challenger's own scores, then compare it with the champion.

    Two models can never both replace each other. Of two equal models, neither replaces the other.

    Args:
        challenger, champion: scores per case; None if a model has none.
        version: the champion's version; None: there is no champion.
    """
    decided = partial(Decision, metric=gate.metric, margin=gate.margin, champion=version)
    if challenger is None:
        return decided(outcome="not_good_enough", reason="the model has no scores")
    if (problem := why_not_good_enough(challenger, gate)) is not None:
        return decided(outcome="not_good_enough", reason=problem)
    if version is None:
        return decided(outcome="first", reason="there was no champion")
    problem = why_not_comparable(challenger, champion, gate.metric, version)
    if problem is not None or champion is None:
        return decided(outcome="not_comparable", reason=problem or "no scores")
    metric = METRICS[gate.metric]
    differences = paired_differences(challenger, champion, gate.metric)
    known = {**champion.patients, **challenger.patients}
    pairs = by_patient(differences, [known.get(case, case) for case in sorted(challenger.cases)])
    mean, p = round(float(differences.mean()), _DECIMALS), wilcoxon_p(pairs - gate.margin, "greater")
    outcome: Outcome = "better"
    if not mean > gate.margin:
        outcome = "not_better"
    elif gate.p is not None and not p <= gate.p:
        outcome = "not_significant"
    said = {
        "better": "better than",
        "not_better": f"not better by more than {gate.margin:g} than",
        "not_significant": f"better, but p is above {gate.p or 0:g}, than",
    }[outcome]
    of = f" of {len(pairs)} patients" if len(pairs) < len(differences) else ""
    measured = mean if metric.higher_is_better else -mean
    reason = (
        f"{said} version {version}: mean {metric.heading} difference {metric.text(measured, sign='+')} "
        f"over {len(differences)} cases{of}, p {p:.3g}"
    )
    return decided(outcome=outcome, reason=reason, difference=mean, p=p, cases=len(differences))


def why_not_good_enough(scores: Scores, gate: Gate) -> str | None:
    """Why a model cannot be champion, whatever the champion is; None if it can."""
    if not scores.cases:
        return f"{scores.note}; evaluate this fold, then export again, {BY_HAND}"
    if len(scores.cases) < gate.min_cases:
        return f"scored on {len(scores.cases)} cases, a champion needs {gate.min_cases}; use fewer folds, {BY_HAND}"
    dice = float(np.mean(list(scores.per_case("dice").values())))
    if dice < gate.min_dice:
        return f"its mean Dice {dice:.4f} is below {gate.min_dice:g} (export.min_dice); train longer, {BY_HAND}"
    return None


def why_not_comparable(challenger: Scores, champion: Scores | None, metric: str, version: str) -> str | None:
    """Why two models cannot be compared and how to fix it; None if they can be compared."""
    if champion is None or not champion.cases:
        again = f"evaluate and export that model again, {BY_HAND}"
        return f"not comparable: version {version} has no scores per case; {again}"
    again = f"train, evaluate and export both on the same data and fold, {BY_HAND}"
    for key, name in (("fold", "fold"), ("data_hash", "data"), ("labels", "labels")):
        ours, theirs = getattr(challenger, key), getattr(champion, key)
        if ours != theirs:
            seen = f"{_short(theirs)}, this one {_short(ours)}"
            return f"not comparable: version {version} was scored on {name} {seen}; {again}"
    if challenger.cases.keys() != champion.cases.keys():
        shared = len(challenger.cases.keys() & champion.cases.keys())
        return (
            f"not comparable: version {version} was scored on {len(champion.cases)} cases, this one on "
            f"{len(challenger.cases)}, {shared} of them the same; {again}"
        )
    if challenger.mirror != champion.mirror:
        seen = "with mirroring, this one without" if champion.mirror else "without mirroring, this one with it"
        return (
            f"not comparable: version {version} was scored {seen}; "
            f"evaluate both with the same evaluate.mirror, {BY_HAND}"
        )
    if metric == "nsd" and challenger.nsd_tolerance_mm != champion.nsd_tolerance_mm:
        return (
            f"not comparable: the NSD of version {version} has a tolerance of {champion.nsd_tolerance_mm} mm, this one "
            f"of {challenger.nsd_tolerance_mm} mm; evaluate both with the same evaluate.nsd_tolerance_mm, {BY_HAND}"
        )
    return None


def paired_differences(challenger: Scores, champion: Scores, metric: str) -> np.ndarray:
    """(cases,) mean over labels of challenger minus champion, cases sorted by name; above 0: the challenger is better.

    Both must have scores of the same cases (see `why_not_comparable`).
    """
    ours, theirs = challenger.per_case(metric), champion.per_case(metric)
    differences = np.array([ours[case] - theirs[case] for case in sorted(challenger.cases)])
    return -METRICS[metric].badness(differences)


def gate_from(values: Mapping[str, Any] | None) -> Gate:
    """The gate of a tracking record; the default if the record has none, or has one of another version."""
    try:
        return from_mapping(Gate, values or {}, where="gate")
    except ConfigError:
        return Gate()


def _short(value: object) -> str:
    if value is None:
        return "all folds"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value)[:12]
