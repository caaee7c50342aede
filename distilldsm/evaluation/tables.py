"""Tables of scores: rows in files, scores as arrays, the summary of a fold, and text tables for the terminal."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import DataError
from distilldsm.core.text import csv_cell, from_csv_cell
from distilldsm.evaluation.metrics import METRICS, VOLUMES, Metric, main_metrics
from distilldsm.evaluation.statistics import LEVEL, METHOD, RESAMPLES, SEED, Floats, bootstrap_mean, mean_of, spread

Row = Mapping[str, Any]
"""Columns: `case`, `label`, the metrics (None if undefined), VOLUMES, and `patient` and `fold` if they are known."""


def write_csv(
    path: Path, rows: Sequence[Row], columns: Sequence[str] = (), *, text: Callable[[Any], Any] = csv_cell
) -> None:
    """Write rows as CSV. Numbers have six significant digits; undefined values are empty.

    Args:
        columns: default: those of the first row.
        text: escapes text.
    """
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns or list(*rows[:1]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else text(v) for k, v in row.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `cases.csv`: scores as float, undefined scores as None.

    Raises:
        DataError: the file is missing or is not a table of scores.
    """
    if not path.is_file():
        raise DataError("is missing", where=path, hint="dvc repro, or distilldsm evaluate")
    numbers = (*METRICS, *VOLUMES)
    with open(path, newline="", encoding="utf-8") as stream:
        rows: list[dict[str, Any]] = [
            {key: from_csv_cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()}
            for row in csv.DictReader(stream)
        ]
    needed = {"case", "label", *numbers}
    if not rows or not needed <= rows[0].keys():
        absent = ", ".join(sorted(needed - rows[0].keys())) if rows else "all rows"
        raise DataError("is not a table of scores", where=path, seen=f"lacks {absent}", hint="evaluate again")
    try:
        return [row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows]
    except ValueError as error:
        raise DataError("a score is not a number", where=path, seen=str(error)) from None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """The scores of cases and labels."""

    cases: tuple[str, ...]
    labels: tuple[str, ...]
    patients: tuple[str, ...]
    """The patient of each case; the case itself if the patient is not known."""
    scores: Mapping[str, Floats]
    """Metric (or one of VOLUMES) to an array (cases, labels); NaN: undefined."""

    @classmethod
    def of(cls, rows: Sequence[Row], labels: Iterable[str] | None = None) -> ScoreTable:
        """Make a table from rows: all their cases, and the given labels (default: all) in the given order."""
        patients = {row["case"]: row.get("patient") or row["case"] for row in rows}
        places = {case: k for k, case in enumerate(patients)}
        columns = {label: k for k, label in enumerate(dict.fromkeys(labels or (row["label"] for row in rows)))}
        names = [name for name in (*METRICS, *VOLUMES) if name in rows[0]]
        scores = {name: np.full((len(places), len(columns)), np.nan) for name in names}
        for row in rows:
            for name, array in scores.items():
                if row[name] is not None and row["label"] in columns:
                    array[places[row["case"]], columns[row["label"]]] = row[name]
        return cls(cases=tuple(places), labels=tuple(columns), patients=tuple(patients.values()), scores=scores)

    def select(self, cases: Sequence[str], labels: Sequence[str]) -> ScoreTable:
        """The part with the given cases and labels, in the given order."""
        rows = [self.cases.index(case) for case in cases]
        index = np.ix_(rows, [self.labels.index(label) for label in labels])
        return ScoreTable(
            cases=tuple(cases),
            labels=tuple(labels),
            patients=tuple(self.patients[k] for k in rows),
            scores={name: array[index] for name, array in self.scores.items()},
        )


def summarise(rows: Sequence[Row], labels: Iterable[str]) -> dict[str, Any]:
    """Statistics of every metric, per label over cases, and of the labels' mean per case.

    Returns:
        {"labels": {label: {metric: {mean, sd, median, worst, worst_case, defined, cases}}}, "mean": {metric: mean of
        the labels' means}}. sd is the sample standard deviation (n - 1), None for a single defined value.
    """
    table = ScoreTable.of(rows, labels)
    of_labels = {
        label: {name: _statistics(metric, table.scores[name][:, k], table.cases) for name, metric in METRICS.items()}
        for k, label in enumerate(table.labels)
    }
    means = {name: spread([of[name]["mean"] for of in of_labels.values()])[0] for name in METRICS}
    return {"cases": len(table.cases), "labels": of_labels, "mean": means}


def _statistics(metric: Metric, values: Floats, cases: Sequence[str]) -> dict[str, Any]:
    mean, sd, defined = spread(values)
    worst = int(np.nanargmax(metric.badness(values))) if defined else None
    return {
        "mean": mean,
        "sd": sd,
        "median": float(np.nanmedian(values)) if defined else None,
        "worst": None if worst is None else float(values[worst]),
        "worst_case": None if worst is None else cases[worst],
        "defined": defined,
        "cases": len(values),
    }


def intervals(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """Confidence intervals of the means in `summarise`, for every metric.

    Returns:
        {"level", "method", "resamples", "seed", "labels": {label: {metric: [low, high]}}, "mean": {metric: [low,
        high]}}; null if there is no interval.
    """
    table = ScoreTable.of(rows, labels)
    return {
        "level": LEVEL,
        "method": METHOD,
        "resamples": RESAMPLES,
        "seed": SEED,
        "labels": {
            label: {name: bootstrap_mean(table.scores[name][:, [k]], table.patients) for name in METRICS}
            for k, label in enumerate(table.labels)
        },
        "mean": {name: bootstrap_mean(table.scores[name], table.patients) for name in METRICS},
    }


def case_means(table: ScoreTable, metric: str) -> Floats:
    """(cases,) the mean over the labels."""
    return np.asarray(mean_of(table.scores[metric], axis=1))


def label_key(label: str) -> str:
    """A label's key: its name, or `label_mean` for a label named mean (`mean` is the key of the labels' mean)."""
    return f"label_{label}" if re.fullmatch("(label_)*mean", label) else label


def means_of(summary: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The labels' mean as `mean`, then the mean of each label by its `label_key`, without undefined values."""
    of_labels = {label_key(label): of[metric]["mean"] for label, of in summary["labels"].items()}
    means = {"mean": summary["mean"][metric], **of_labels}
    return {key: value for key, value in means.items() if value is not None}


def metrics_for_dvc(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A few rounded numbers: {metric: `means_of`}."""
    return {
        name: {key: round(value, metric.digits + 1) for key, value in means_of(summary, name).items()}
        for name, metric in METRICS.items()
    }


def metrics_for_mlflow(summary: Mapping[str, Any], intervals: Mapping[str, Any] | None = None) -> dict[str, float]:
    """`test_METRIC_mean`; for the main metrics also `test_METRIC_LABEL` and the interval of the mean."""
    values: dict[str, float] = {}
    for name, metric in METRICS.items():
        means = means_of(summary, name)
        values |= {f"test_{name}_{key}": value for key, value in means.items() if metric.main or key == "mean"}
        interval = intervals["mean"][name] if intervals is not None and metric.main else None
        if interval is not None:
            values |= {f"test_{name}_mean_ci_low": interval[0], f"test_{name}_mean_ci_high": interval[1]}
    return values


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align rows of cells as columns: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def format_table(summary: Mapping[str, Any], title: str = "") -> str:
    """The main metrics per label, for the terminal; for the first metric also sd, median and worst case."""
    first, *others = main_metrics()
    lines = [("label", first.heading, "sd", "worst", *(metric.heading for metric in others), "cases")]
    for label, of in summary["labels"].items():
        spreads = [first.text(of[first.name][key]) for key in ("mean", "sd", "worst")]
        means = [metric.text(of[metric.name]["mean"]) for metric in others]
        lines.append((label_key(label), *spreads, *means, str(of[first.name]["cases"])))
    means = [metric.text(summary["mean"][metric.name]) for metric in others]
    lines.append(("mean", first.text(summary["mean"][first.name]), "", "", *means, ""))
    return "\n".join(([title] if title else []) + aligned(lines))
