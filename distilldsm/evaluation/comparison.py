"""Compare several trainings case by case, on the cases with scores of all trainings.

The test is the two-sided Wilcoxon signed-rank test of the paired differences to the first training. Holm's procedure
corrects the p-values for the number of comparisons of a metric. The test assumes independent pairs. So each patient
gives one pair: the mean difference over the patient's cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import DataError
from distilldsm.evaluation.costs import COSTS, combine_costs, measured
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.statistics import Floats, by_patient, holm, spread, wilcoxon_p
from distilldsm.evaluation.tables import ScoreTable, aligned, write_csv
from distilldsm.evaluation.trainings import Training
from distilldsm.report.figures import dice_panels, save_figure

VOLUME_TOLERANCE = 1e-3
"""Largest relative difference between volumes of the same truth, because tables hold six digits."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result for one training, label and metric."""

    training: str
    label: str
    metric: str
    cases: int
    """Number of cases of this label for which the metric is defined in all trainings."""
    patients: int
    """Number of patients with these cases: the pairs of the test."""
    mean: float
    sd: float | None
    """Sample standard deviation over the cases; None for a single case."""
    sd_folds: float | None
    """Sample standard deviation of the folds' means; None for a single fold."""
    difference: float | None
    """Mean over the cases of this training minus the first; None for the first."""
    p: float | None
    """Uncorrected p-value; None for the first."""
    p_holm: float | None
    """p-value corrected for the number of comparisons of the metric."""


def compare(trainings: Sequence[Training]) -> list[Comparison]:
    """Compare every training, label and metric over the common cases.

    A signed error (best value 0) is left out, because its absolute value is a separate metric.

    Raises:
        DataError: there is no common case, or a case was scored against another truth or with another tolerance.
    """
    _check_tolerance(trainings)
    tables = shared_scores(trainings)
    _check_truth(trainings, tables)
    patients = _patients(tables)
    rows: list[Comparison] = []
    for name, metric in METRICS.items():
        if metric.higher_is_better is None:
            continue
        values = np.stack([table.scores[name] for table in tables])  # (trainings, cases, labels)
        of_metric = [
            row
            for k, label in enumerate(tables[0].labels)
            for row in _of_label(trainings, tables[0].cases, patients, values[:, :, k], label=label, metric=name)
        ]
        rows += _corrected(of_metric)
    return rows


def _of_label(
    trainings: Sequence[Training],
    cases: Sequence[str],
    patients: Sequence[str],
    values: Floats,
    *,
    label: str,
    metric: str,
) -> list[Comparison]:
    """One row per training from values (trainings, cases), p not yet corrected; no rows if no case counts."""
    defined = np.flatnonzero(~np.isnan(values).any(axis=0))
    values, whose = values[:, defined], [patients[int(k)] for k in defined]
    rows = []
    for number, training in enumerate(trainings if defined.size else ()):
        mean, sd, count = spread(values[number])
        differences = values[number] - values[0]
        fold_of = np.array([training.fold_of[cases[int(k)]] for k in defined])
        fold_means = [float(values[number][fold_of == fold].mean()) for fold in np.unique(fold_of)]
        rows.append(
            Comparison(
                training=training.name,
                label=label,
                metric=metric,
                cases=count,
                patients=len(set(whose)),
                mean=float(mean or 0.0),
                sd=sd,
                sd_folds=spread(fold_means)[1],
                difference=float(differences.mean()) if number else None,
                p=wilcoxon_p(by_patient(differences, whose)) if number else None,
                p_holm=None,
            )
        )
    return rows


def _corrected(rows: Sequence[Comparison]) -> list[Comparison]:
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else dataclasses.replace(row, p_holm=next(corrected)) for row in rows]


def shared_scores(trainings: Sequence[Training]) -> list[ScoreTable]:
    """The scores of each training, limited to the common cases and labels.

    Raises:
        DataError: there is no common case or label.
    """
    tables = [training.scores for training in trainings]
    cases = sorted(set.intersection(*(set(table.cases) for table in tables)))
    labels = [label for label in tables[0].labels if all(label in table.labels for table in tables)]
    if not cases or not labels:
        raise DataError(
            "no case was scored in all trainings",
            where=", ".join(str(folder) for training in trainings for folder in training.folders),
            seen="; ".join(f"{training.name}: {_some(sorted(training.scores.cases))}" for training in trainings),
            rule="the same cases and labels: the same folds of one data set",
            hint="compare cross-validations, or the same fold of each",
        )
    return [table.select(cases, labels) for table in tables]


def _patients(tables: Sequence[ScoreTable]) -> list[str]:
    """The patient of each shared case, from the first training that knows it."""
    names = zip(*(table.patients for table in tables), strict=True)
    pairs = zip(tables[0].cases, names, strict=True)
    return [next((name for name in of_case if name != case), case) for case, of_case in pairs]


def _check_tolerance(trainings: Sequence[Training]) -> None:
    key = "nsd_tolerance_mm"
    known = {t.name: sorted({float(one[key]) for one in t.settings if key in one}) for t in trainings}
    if len({tolerance for tolerances in known.values() for tolerance in tolerances}) > 1:
        raise DataError(
            "were scored with different tolerances of the NSD",
            where=", ".join(str(folder) for training in trainings for folder in training.folders),
            seen="; ".join(f"{name}: {', '.join(f'{mm:g}' for mm in many)} mm" for name, many in known.items() if many),
            rule="the same evaluate.nsd_tolerance_mm",
            hint="evaluate again with the same (dvc repro, or distilldsm evaluate --set evaluate.nsd_tolerance_mm=...)",
        )


def _check_truth(trainings: Sequence[Training], tables: Sequence[ScoreTable]) -> None:
    """Refuse cases with the same name but another true volume: another data set, or labels that were changed."""
    first = tables[0].scores["volume_truth_ml"]
    for training, table in zip(trainings[1:], tables[1:], strict=True):
        volumes = table.scores["volume_truth_ml"]
        same = np.isclose(volumes, first, rtol=VOLUME_TOLERANCE, atol=1e-6, equal_nan=True)
        for case, label in np.argwhere(~same)[:1]:
            raise DataError(
                "a case was scored against another truth",
                where=f"{trainings[0].name}, {training.name}",
                seen=f"{table.cases[case]}, {table.labels[label]}: {first[case, label]:g} ml and "
                f"{volumes[case, label]:g} ml",
                rule="the same labelled data",
                hint="evaluate both on the same data set",
            )


def unmatched(trainings: Sequence[Training]) -> list[str]:
    """Lines about what is left out because some trainings have no scores of it: one per training and kind."""
    lines = []
    for kind in ("cases", "labels"):
        names = {training.name: set(getattr(training.scores, kind)) for training in trainings}
        shared = set.intersection(*names.values())
        for name, own in names.items():
            if left := sorted(own - shared):
                lines.append(f"{name}: {len(left)} of {len(own)} {kind} left out ({_some(left)})")
    return lines


def scored_differently(trainings: Sequence[Training]) -> list[str]:
    """Lines about settings of the evaluation that differ. Such a difference may explain the differences in scores."""
    lines = []
    for key in dict.fromkeys(key for training in trainings for one in training.settings for key in one):
        values = {t.name: [str(one[key]) for one in t.settings if key in one] for t in trainings}
        if len({value for of_training in values.values() for value in of_training}) > 1:
            seen = "; ".join(f"{name}: {', '.join(of_training)}" for name, of_training in values.items() if of_training)
            lines.append(f"evaluate.{key} differs ({seen})")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def format_comparison(rows: Sequence[Comparison]) -> str:
    """A table for the terminal with one block per metric."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.metric for row in rows):
        metric = METRICS[name]
        lines.append((name, "label", "mean", "sd cases", "sd folds", "diff", "p (Holm)", "cases"))
        for row in (one for one in rows if one.metric == name):
            folds = "" if row.sd_folds is None else metric.text(row.sd_folds)
            difference = "" if row.difference is None else metric.text(row.difference, sign="+")
            p = "" if row.p_holm is None else f"{row.p_holm:.2g}"
            spreads = (metric.text(row.mean), metric.text(row.sd), folds)
            lines.append((row.training, row.label, *spreads, difference, p, str(row.cases)))
    return "\n".join(aligned(lines, left=2))


def cost_rows(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """The costs of each training, one row each: median seconds and largest memory over its folds; unknown: None."""
    return [{"training": training.name, **combine_costs(training.costs)} for training in trainings]


def format_costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The costs for the terminal, without columns that have no values."""
    columns = measured(rows)
    lines = [["", *columns]]
    for row in rows:
        lines.append([row["training"], *("" if row[key] is None else COSTS[key].text(row[key]) for key in columns)])
    return "\n".join(aligned(lines)) if columns else ""


def draw(trainings: Sequence[Training], path: Path) -> None:
    """Box plots of the Dice of all common cases, one panel per label, as PNG."""
    tables = shared_scores(trainings)
    panels = {
        label: {
            training.name: [float(dice) for dice in table.scores["dice"][:, k] if not np.isnan(dice)]
            for training, table in zip(trainings, tables, strict=True)
        }
        for k, label in enumerate(tables[0].labels)
    }
    save_figure(dice_panels(panels), path)


def write_comparison(rows: Sequence[Comparison], path: Path) -> None:
    """The same numbers as CSV; undefined values are empty."""
    columns = [field.name for field in dataclasses.fields(Comparison)]
    write_csv(path, [dataclasses.asdict(row) for row in rows], columns)
