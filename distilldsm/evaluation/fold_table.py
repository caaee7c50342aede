"""The statistics over folds and over cases.

Over folds: mean and sample standard deviation (n - 1) of the folds' means. Over cases: the same for all held-out cases
together. Undefined scores (see distilldsm/evaluation/metrics.py) are left out. A fold does not count for a score that
is undefined in all its cases. A single value has no standard deviation (None).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distilldsm.evaluation.costs import COSTS, combine_costs, costs_of_fold, machines
from distilldsm.evaluation.folds import Fold, recipe_of
from distilldsm.evaluation.metrics import METRICS, main_metrics
from distilldsm.evaluation.postprocess import nested
from distilldsm.evaluation.statistics import Floats, spread
from distilldsm.evaluation.tables import Row, ScoreTable, aligned, case_means, label_key

LARGEST = "largest component only, as the other folds decide"


def summarise(folds: Sequence[Fold]) -> dict[str, Any]:
    """All reported results of a cross-validation.

    Returns:
        {"folds": [number], "cases": number of cases, "cases_by_fold": {fold: number},
        "labels": {label: {metric: {mean_folds, sd_folds, folds, mean_cases, sd_cases, cases, fold_means}}},
        "mean": {metric: the same for the labels' mean}, "network": its name and options, "ensemble": name and options
        of all averaged networks, "evaluate": settings of the evaluation,
        "cost": {**COSTS, "machines": [text], "folds": [the costs of each]}, "largest_component": None or
        {"labels", "mean": as above, "chosen": {fold: [labels that change]}}}. `largest_component` has the scores after
        post-processing: only the largest component is kept of the labels that gain by it in the **other** folds.
        Numbers of folds and cases count only defined scores.
    """
    first = folds[0]
    cases = {str(fold.number): len({row["case"] for row in fold.rows}) for fold in folds}
    summary = {
        "schema_version": 1,
        "folds": [fold.number for fold in folds],
        "cases": sum(cases.values()),
        "cases_by_fold": cases,
        **_scores({fold.number: fold.rows for fold in folds}, METRICS),
        "largest_component": _largest_component(folds),
        "network": _named(first.model),
        "evaluate": recipe_of(first.evaluate["config"]),
        "cost": _costs(folds),
    }
    return summary | ({"ensemble": [_named(one) for one in first.ensemble.values()]} if first.ensemble else {})


def _named(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("name", "options")}


def _scores(by_fold: Mapping[int, Sequence[Row]], metrics: Iterable[str]) -> dict[str, Any]:
    """`labels` and `mean` of a summary.

    The labels' mean of a fold is the mean of its labels' means. The labels' mean of a case is the mean of its labels.
    """
    labels = list(dict.fromkeys(row["label"] for rows in by_fold.values() for row in rows))
    tables = {str(number): ScoreTable.of(rows, labels) for number, rows in by_fold.items()}
    of_labels: dict[str, dict[str, Any]] = {label: {} for label in labels}
    of_mean: dict[str, Any] = {}
    for name in metrics:
        for k, label in enumerate(labels):
            columns = {number: table.scores[name][:, k] for number, table in tables.items()}
            means = {number: spread(column)[0] for number, column in columns.items()}
            of_labels[label][name] = _entry(np.concatenate(list(columns.values())), means)
        in_folds = {n: spread([of[name]["fold_means"][n] for of in of_labels.values()])[0] for n in tables}
        of_mean[name] = _entry(np.concatenate([case_means(table, name) for table in tables.values()]), in_folds)
    return {"labels": of_labels, "mean": of_mean}


def _entry(of_cases: Floats, fold_means: Mapping[str, float | None]) -> dict[str, Any]:
    """Statistics of one score, from each case's value and each fold's mean."""
    return {
        **dict(zip(("mean_folds", "sd_folds", "folds"), spread(list(fold_means.values())), strict=True)),
        **dict(zip(("mean_cases", "sd_cases", "cases"), spread(of_cases), strict=True)),
        "fold_means": dict(fold_means),
    }


def postprocessed_rows(folds: Sequence[Fold]) -> dict[int, list[Row]]:
    """Fold to its rows after post-processing, as the other folds decide; empty for a single fold."""
    if len(folds) < 2:
        return {}
    return nested({fold.number: (fold.rows, fold.largest) for fold in folds}, folds[0].groups, folds[0].planned)


def _largest_component(folds: Sequence[Fold]) -> dict[str, Any] | None:
    """Scores after post-processing; None for a single fold, or if nothing changes."""
    rows = postprocessed_rows(folds)
    chosen = {
        str(fold.number): sorted(
            {row["label"] for row, raw in zip(rows[fold.number], fold.rows, strict=True) if row is not raw}
        )
        for fold in folds
        if fold.number in rows
    }
    if not any(chosen.values()):
        return None
    return {"chosen": chosen, **_scores(rows, [metric.name for metric in main_metrics()])}


def _costs(folds: Sequence[Fold]) -> dict[str, Any]:
    """Costs of all folds together and of each fold, and the machines."""
    rows = [{"fold": fold.number, **costs_of_fold(fold.timing)} for fold in folds]
    return {**combine_costs(rows), "machines": machines([fold.timing for fold in folds]), "folds": rows}


def by_label(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Label to metric to statistics. If there are several labels, their mean comes last as `mean`."""
    labels = {label_key(label): of_label for label, of_label in scores["labels"].items()}
    return labels | ({"mean": scores["mean"]} if len(labels) > 1 else {})


def lines_of(summary: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Label, metric and statistics, in the order of the table."""
    return [(label, metric, of[metric]) for label, of in by_label(summary).items() for metric in METRICS]


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write `table.csv`: one row per label and metric."""
    return [
        {
            "label": label,
            "metric": metric,
            **{key: value for key, value in entry.items() if key != "fold_means"},
            **{f"fold{number}": value for number, value in entry["fold_means"].items()},
        }
        for label, metric, entry in lines_of(summary)
    ]


def cost_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The network's costs as title and text, without values that were not measured."""
    values = summary["cost"]
    lines = [(cost.title, cost.text(values[name])) for name, cost in COSTS.items() if values[name] is not None]
    if networks := summary.get("ensemble"):
        names = Counter(one["name"] for one in networks)
        lines.insert(0, ("networks, averaged", ", ".join(f"{many} {name}" for name, many in names.items())))
    return lines + ([("measured on", "; ".join(values["machines"]))] if values["machines"] else [])


def format_table(summary: Mapping[str, Any], title: str) -> str:
    """The table for the terminal."""
    lines = [("label", "", "folds", "sd", "cases", "sd")]
    for label, name, entry in lines_of(summary):
        texts = [METRICS[name].text(entry[key]) for key in ("mean_folds", "sd_folds", "mean_cases", "sd_cases")]
        lines.append((label, METRICS[name].heading, texts[0], texts[1], texts[2], texts[3]))
    numbers = ", ".join(str(fold) for fold in summary["folds"])
    return "\n".join(
        [
            f"{title}: folds {numbers}, {summary['cases']} cases",
            *aligned(lines, left=2),
            *(f"{label}, {LARGEST}: {text}" for label, text in largest_lines(summary)),
            *(f"{key}: {text}" for key, text in cost_lines(summary)),
        ]
    )


def largest_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each label and its scores after post-processing (mean and sd over folds); empty if no fold changes."""
    if not summary["largest_component"]:
        return []
    lines = []
    for label, of_label in by_label(summary["largest_component"]).items():
        texts = []
        for metric in main_metrics():
            mean, sd = of_label[metric.name]["mean_folds"], of_label[metric.name]["sd_folds"]
            texts.append(f"{metric.heading} {metric.text(mean)}" + ("" if sd is None else f" ± {metric.text(sd)}"))
        lines.append((label, ", ".join(texts)))
    return lines


def metrics_for_dvc(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A few rounded numbers: {metric: {label: {mean, sd_folds, sd_cases}}} and costs, without undefined values.

    Scores after post-processing are `postprocessed_METRIC`; they exist only if post-processing changes something.
    """
    values = {metric: _rounded(summary, metric) for metric in METRICS}
    if processed := summary["largest_component"]:
        values |= {f"postprocessed_{metric.name}": _rounded(processed, metric.name) for metric in main_metrics()}
    return values | {"cost": {name: summary["cost"][name] for name in COSTS if summary["cost"][name] is not None}}


def _rounded(scores: Mapping[str, Any], metric: str) -> dict[str, dict[str, float]]:
    entries = {label_key(label): of_label[metric] for label, of_label in scores["labels"].items()}
    return {
        label: {
            key: round(entry[source], METRICS[metric].digits + 1)
            for key, source in (("mean", "mean_folds"), ("sd_folds", "sd_folds"), ("sd_cases", "sd_cases"))
            if entry[source] is not None
        }
        for label, entry in {"mean": scores["mean"][metric], **entries}.items()
    }


def metrics_for_mlflow(summary: Mapping[str, Any]) -> dict[str, float]:
    """`cv_METRIC_LABEL_mean`, `_sd_folds`, `_sd_cases` and `cv_COST`; the labels' mean has no LABEL in its name."""
    values = metrics_for_dvc(summary)
    flat = {f"cv_{name}": value for name, value in values.pop("cost").items()}
    for metric, labels in values.items():
        for label, numbers in labels.items():
            prefix = f"cv_{metric}" if label == "mean" else f"cv_{metric}_{label}"
            flat |= {f"{prefix}_{key}": value for key, value in numbers.items()}
    return flat
