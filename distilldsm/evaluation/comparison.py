"""Several trainings side by side, compared case by case on the cases that all of them were scored on.

The test is the two-sided Wilcoxon signed-rank test of the paired differences to the first one (F. Wilcoxon, 1945), its
p-values corrected for the number of comparisons of a metric by Holm's step-down procedure (S. Holm, 1979). It takes its
pairs for independent: of several cases of a patient the mean difference is one pair.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import DataError
from distilldsm.evaluation.fold_table import COSTS, combine_costs
from distilldsm.evaluation.statistics import by_patient
from distilldsm.evaluation.trainings import COMPARED, Training

VOLUME_TOLERANCE = 1e-3
"""By which share the volumes of one truth may differ: tables hold six digits."""
_DECIMALS = 9  # of a difference: rounding errors must not rank what is equal


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One training, label and metric."""

    training: str
    label: str
    metric: str
    cases: int
    """Cases of this label for which the metric is defined in all trainings."""
    patients: int
    """Whose cases these are: the pairs of the test."""
    mean: float
    sd: float | None
    """Sample standard deviation over the cases; None for a single case."""
    sd_folds: float | None
    """Sample standard deviation of the folds' means; None for a single fold."""
    difference: float | None
    """Mean over the cases of this training minus the first; None for the first."""
    p: float | None
    """Uncorrected; None for the first."""
    p_holm: float | None
    """Corrected for the number of comparisons of the metric."""


def _check_tolerance(trainings: Sequence[Training]) -> None:
    told = [training for training in trainings if training.tolerances_mm]
    if len({tolerance for training in told for tolerance in training.tolerances_mm}) > 1:
        raise DataError(
            "were scored with different tolerances of the NSD",
            where=", ".join(str(folder) for training in told for folder in training.folders),
            seen="; ".join(f"{t.name}: {', '.join(f'{mm:g}' for mm in sorted(t.tolerances_mm))} mm" for t in told),
            rule="one evaluate.nsd_tolerance_mm",
            hint="evaluate again with the same (dvc repro, or distilldsm evaluate --set evaluate.nsd_tolerance_mm=...)",
        )


def compare(trainings: Sequence[Training]) -> list[Comparison]:
    """Every training, label and metric, over the cases that all of them have.

    Raises:
        DataError: no case is common to all, or a case was scored against another truth or with another tolerance.
    """
    _check_tolerance(trainings)
    tables = [training.scores for training in trainings]
    shared = set.intersection(*(set(table) for table in tables))
    if not shared:
        raise DataError(
            "no case was scored in all of them",
            where=", ".join(str(folder) for training in trainings for folder in training.folders),
            seen="; ".join(f"{t.name}: {_some(sorted({case for case, _ in t.scores}))}" for t in trainings),
            rule="the same cases and labels: the same folds of one data set",
            hint="compare cross-validations, or the same fold of each",
        )
    _check_truth(trainings, sorted(shared))
    patients = {case: patient for training in reversed(trainings) for case, patient in training.patients.items()}
    labels = list(dict.fromkeys(label for _, label in tables[0] if any(key[1] == label for key in shared)))
    found: list[Comparison] = []
    for metric in COMPARED:
        rows = []
        for label in labels:
            keys = sorted(k for k in shared if k[1] == label and all(metric in table[k] for table in tables))
            if not keys:
                continue
            values = np.array([[table[k][metric] for k in keys] for table in tables])
            whose = [patients.get(case, case) for case, _ in keys]
            for number, training in enumerate(trainings):
                first = number == 0
                rows.append(
                    Comparison(
                        training=training.name,
                        label=label,
                        metric=metric,
                        cases=len(keys),
                        patients=len(set(whose)),
                        mean=float(values[number].mean()),
                        sd=float(values[number].std(ddof=1)) if len(keys) > 1 else None,
                        sd_folds=_sd_of_folds(training, keys, metric),
                        difference=None if first else float((values[number] - values[0]).mean()),
                        p=None if first else wilcoxon_p(by_patient(values[number] - values[0], whose)),
                        p_holm=None,
                    )
                )
        found += _corrected(rows)
    return found


def _check_truth(trainings: Sequence[Training], shared: Sequence[tuple[str, str]]) -> None:
    """Refuse cases that are called alike but hold another structure: another data set, or labels changed since."""
    first = trainings[0].scores
    for training in trainings[1:]:
        table = training.scores
        for case, label in shared:
            volumes = [scores[case, label]["volume_truth_ml"] for scores in (first, table)]
            if not math.isclose(*volumes, rel_tol=VOLUME_TOLERANCE, abs_tol=1e-6):
                raise DataError(
                    "a case was scored against another truth",
                    where=f"{trainings[0].name}, {training.name}",
                    seen=f"{case}, {label}: {volumes[0]:g} ml and {volumes[1]:g} ml",
                    rule="the same labelled data",
                    hint="evaluate both on the same data set",
                )


def unmatched(trainings: Sequence[Training]) -> list[str]:
    """What is left out because not all trainings were scored on it, a line for each training and kind."""
    names = [[{key[k] for key in training.scores} for k in (0, 1)] for training in trainings]
    lines = []
    for k, kind in enumerate(("cases", "labels")):
        shared = set.intersection(*(of_training[k] for of_training in names))
        for training, of_training in zip(trainings, names, strict=True):
            if left := sorted(of_training[k] - shared):
                lines.append(f"{training.name}: {len(left)} of {len(of_training[k])} {kind} left out ({_some(left)})")
    return lines


def scored_differently(trainings: Sequence[Training]) -> list[str]:
    """Where trainings were evaluated with different settings, a line for each setting: what is compared may be that."""
    lines = []
    for key in dict.fromkeys(key for training in trainings for one in training.settings for key in one):
        told = {t.name: [one[key] for one in t.settings if key in one] for t in trainings}
        if len({repr(value) for values in told.values() for value in values}) > 1:
            seen = "; ".join(f"{name}: {', '.join(str(v) for v in values)}" for name, values in told.items() if values)
            lines.append(f"evaluate.{key} differs ({seen})")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test; 1 where nothing differs."""
    from scipy.stats import wilcoxon

    differences = np.round(differences, _DECIMALS)
    if not differences.any():
        return 1.0
    p = float(wilcoxon(differences).pvalue)
    return p if math.isfinite(p) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values, in their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _corrected(rows: Sequence[Comparison]) -> list[Comparison]:
    import dataclasses

    compared = [row for row in rows if row.p is not None]
    values = dict(zip(map(id, compared), holm([row.p for row in compared if row.p is not None]), strict=True))
    return [dataclasses.replace(row, p_holm=values.get(id(row))) for row in rows]


def _sd_of_folds(training: Training, keys: Sequence[tuple[str, str]], metric: str) -> float | None:
    means = []
    for fold in training.folds:
        values = [fold[key][metric] for key in keys if key in fold]
        if values:
            means.append(statistics.fmean(values))
    return statistics.stdev(means) if len(means) > 1 else None


def format_comparison(rows: Sequence[Comparison]) -> str:
    """A table for the terminal, a block per metric."""
    width = max(len(text) for row in rows for text in (row.training, row.metric)) + 2
    labels = max(len(row.label) for row in rows) + 2
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows):
        lines.append(
            f"{metric:{width}}{'label':{labels}}{'mean':>9}{'sd cases':>10}{'sd folds':>10}{'diff':>10}{'p (Holm)':>10}"
            f"{'cases':>7}"
        )
        for row in (r for r in rows if r.metric == metric):
            sd = "-" if row.sd is None else f"{row.sd:.4f}"
            folds = "" if row.sd_folds is None else f"{row.sd_folds:.4f}"
            difference = "" if row.difference is None else f"{row.difference:+.4f}"
            p = "" if row.p_holm is None else f"{row.p_holm:.2g}"
            lines.append(
                f"{row.training:{width}}{row.label:{labels}}{row.mean:9.4f}{sd:>10}{folds:>10}{difference:>10}"
                f"{p:>10}{row.cases:7d}"
            )
    return "\n".join(lines)


def cost_rows(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """What each training costs, a row each: median seconds and largest memory over its folds; unknown ones None."""
    return [{"training": training.name, **combine_costs(training.costs)} for training in trainings]


def format_costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The costs for the terminal; columns that nobody knows are left out."""
    columns = [key for key in COSTS if any(row[key] is not None for row in rows)]
    if not columns:
        return ""
    width = max(len(str(row["training"])) for row in rows) + 2
    lines = [" " * width + "".join(f"{key:>{len(key) + 2}}" for key in columns)]
    for row in rows:
        cells = ("" if row[key] is None else format(row[key], COSTS[key]) for key in columns)
        lines.append(
            f"{row['training']:{width}}" + "".join(f"{c:>{len(k) + 2}}" for k, c in zip(columns, cells, strict=True))
        )
    return "\n".join(lines)


def draw(trainings: Sequence[Training], path: Path) -> None:
    """Dice of every case that all were scored on as boxes, a panel per label, as PNG."""
    from distilldsm.report.figures import dice_panels, save_figure

    tables = [training.scores for training in trainings]
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    panels: dict[str, dict[str, list[float]]] = {
        label: {
            training.name: [table[key]["dice"] for key in keys if key[1] == label and "dice" in table[key]]
            for training, table in zip(trainings, tables, strict=True)
        }
        for label in dict.fromkeys(label for _, label in keys)
    }
    save_figure(dice_panels(panels), path)


def write_comparison(rows: Sequence[Comparison], path: Path) -> None:
    """The same numbers as CSV, undefined ones empty."""
    import dataclasses

    from distilldsm.evaluation.tables import write_csv

    write_csv(path, [dataclasses.asdict(row) for row in rows])
