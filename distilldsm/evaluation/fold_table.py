"""The statistics over folds and over cases.

Over folds: mean and sample standard deviation (n - 1) of the folds' means. Over cases: the same of all held-out cases
together. Undefined scores (see distilldsm/evaluation/metrics.py) are left out; a fold in which a score is defined for
no case does not count. What is defined once has no standard deviation (None).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distilldsm.evaluation.folds import ALIKE, Fold, Row
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import nested

REPORTED = (*METRICS, "volume_error_abs_ml")
"""The scores of `metrics.LabelScore`, and the size of the volume error."""
POSTPROCESSED_METRICS = ("dice", "hd95_mm", "nsd")
TITLES = {
    "dice": "Dice",
    "hd95_mm": "HD95 mm",
    "nsd": "NSD",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "volume_error_ml": "volume error ml",
    "volume_error_abs_ml": "|volume error| ml",
}
LARGEST = "largest component only, as the other folds decide"
COSTS = {
    "parameters": ",",
    "macs_per_voxel": ",.0f",
    "seconds_per_epoch": ".2f",
    "training_seconds": ".0f",
    "training_gb": ".2f",
    "training_gpu_gb": ".2f",
    "seconds_per_volume": ".3f",
    "prediction_gb": ".2f",
    "prediction_gpu_gb": ".2f",
}
"""What a network costs, and how each is written. Seconds are medians (those of a training its sum over the epochs),
memory (10^9 bytes) is the peak of the main process."""


def spread(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation (None for fewer than two) and number of the defined values."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None, len(known)


def summarise(folds: Sequence[Fold]) -> dict[str, Any]:
    """Everything that is reported of a cross-validation.

    Returns:
        {"folds": [number], "cases": number of cases, "cases_by_fold": {fold: number},
        "labels": {label: {metric: {mean_folds, sd_folds, folds, mean_cases, sd_cases, cases, fold_means}}},
        "mean": {metric: the same of the labels' mean}, "network": its name and options, "ensemble": those of all
        networks where several were averaged, "evaluate": how it was scored,
        "cost": {**COSTS, "machines": [text], "folds": [the costs of each]}, "largest_component": None or
        {"labels", "mean": as above, "chosen": {fold: [labels that change]}}: the same scores where, of labels that gain
        by it in the **other** folds, only the largest component is kept}. The numbers of folds and cases are those
        where the score is defined.
    """
    by_fold = {fold.number: [_with_size(row) for row in fold.rows] for fold in folds}
    labels = list(dict.fromkeys(row["label"] for row in folds[0].rows))
    summary: dict[str, Any] = {
        "schema_version": 1,
        "folds": list(by_fold),
        "cases": sum(len({row["case"] for row in rows}) for rows in by_fold.values()),
        "cases_by_fold": {str(number): len({row["case"] for row in rows}) for number, rows in by_fold.items()},
        "labels": {},
        "mean": {},
    }
    for label in labels:
        of_label = {number: [row for row in rows if row["label"] == label] for number, rows in by_fold.items()}
        summary["labels"][label] = {
            metric: _statistics({number: [row[metric] for row in rows] for number, rows in of_label.items()})
            for metric in REPORTED
        }
    for metric in REPORTED:
        summary["mean"][metric] = _of_labels(by_fold, summary["labels"], metric)
    model = folds[0].model
    summary["largest_component"] = _largest_component(folds, labels)
    summary["network"] = {key: model[key] for key in ("name", "options")}
    if folds[0].ensemble:
        summary["ensemble"] = [{key: one[key] for key in ("name", "options")} for one in folds[0].ensemble.values()]
    summary["evaluate"] = {key: value for key, value in folds[0].evaluate["config"].items() if key not in ALIKE}
    summary["cost"] = _costs(folds)
    return summary


def postprocessed_rows(folds: Sequence[Fold]) -> dict[int, list[Mapping[str, Any]]] | None:
    """Fold to its rows after post-processing, decided for each fold by the others; None where that cannot be."""
    tables = {fold.number: (fold.rows, fold.largest) for fold in folds if fold.largest is not None}
    return nested(tables, folds[0].groups) if len(tables) >= max(len(folds), 2) else None


def _largest_component(folds: Sequence[Fold], labels: Sequence[str]) -> dict[str, Any] | None:
    """Scores after post-processing; None for one fold or without a change."""
    rows = postprocessed_rows(folds)
    if rows is None:
        return None
    changed = {
        fold.number: sorted(
            {row["label"] for row, raw in zip(rows[fold.number], fold.rows, strict=True) if row is not raw}
        )
        for fold in folds
    }
    if not any(changed.values()):
        return None
    of_labels = {
        label: {
            metric: _statistics({f: [r[metric] for r in of if r["label"] == label] for f, of in rows.items()})
            for metric in POSTPROCESSED_METRICS
        }
        for label in labels
    }
    return {
        "chosen": {str(fold): chosen for fold, chosen in changed.items()},
        "labels": of_labels,
        "mean": {metric: _of_labels(rows, of_labels, metric) for metric in POSTPROCESSED_METRICS},
    }


def _with_size(row: Row) -> Row:
    error = row["volume_error_ml"]
    return {**row, "volume_error_abs_ml": None if error is None else abs(error)}


def _statistics(values: Mapping[int, Sequence[float | None]]) -> dict[str, Any]:
    """Of one score: fold to its cases' values."""
    fold_means = {str(number): spread(of_fold)[0] for number, of_fold in values.items()}
    over_folds = spread(fold_means.values())
    over_cases = spread(value for of_fold in values.values() for value in of_fold)
    return _entry(over_folds, over_cases, fold_means)


def _of_labels(by_fold: Mapping[int, Sequence[Mapping]], labels: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Of the labels' mean: in a fold the mean of its labels' means, in a case that of its labels."""
    fold_means = {
        str(number): spread(of_label[metric]["fold_means"][str(number)] for of_label in labels.values())[0]
        for number in by_fold
    }
    by_case: dict[str, list[float | None]] = {}
    for rows in by_fold.values():
        for row in rows:
            by_case.setdefault(row["case"], []).append(row[metric])
    return _entry(spread(fold_means.values()), spread(spread(values)[0] for values in by_case.values()), fold_means)


def _entry(over_folds: tuple, over_cases: tuple, fold_means: Mapping[str, float | None]) -> dict[str, Any]:
    return {
        **dict(zip(("mean_folds", "sd_folds", "folds"), over_folds, strict=True)),
        **dict(zip(("mean_cases", "sd_cases", "cases"), over_cases, strict=True)),
        "fold_means": dict(fold_means),
    }


def costs_of_fold(timing: Mapping[str, Any]) -> dict[str, Any]:
    """The costs of one fold, named as in `COSTS`, from its `timing.json`; what that does not tell is None."""
    training = timing.get("training", {})
    return {
        "parameters": training.get("parameters"),
        "macs_per_voxel": training.get("macs_per_voxel"),
        "seconds_per_epoch": training.get("seconds_per_epoch"),
        "training_seconds": training.get("seconds"),
        "training_gb": training.get("peak_memory_gb"),
        "training_gpu_gb": training.get("peak_gpu_memory_gb"),
        "seconds_per_volume": timing.get("seconds_per_volume"),
        "prediction_gb": timing.get("peak_memory_gb"),
        "prediction_gpu_gb": timing.get("peak_gpu_memory_gb"),
    }


def combine_costs(of_folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of the folds' seconds, the largest of anything else; None where no fold tells."""
    found: dict[str, Any] = {}
    for key in COSTS:
        values = [one[key] for one in of_folds if one.get(key) is not None]
        combine = statistics.median if "seconds" in key else max
        found[key] = combine(values) if values else None
    return found


def _costs(folds: Sequence[Fold]) -> dict[str, Any]:
    """Of all folds together, of each, and what they were measured on."""
    rows = [{"fold": fold.number, **costs_of_fold(fold.costs)} for fold in folds]
    machines = (_machine(part) for fold in folds for part in (fold.costs.get("training", {}), fold.costs))
    return {
        **combine_costs(rows),
        "machines": list(dict.fromkeys(text for text in machines if text)),
        "folds": rows,
    }


def _machine(facts: Mapping[str, Any]) -> str:
    if "device_name" not in facts:
        return ""
    threads = f"threads: {facts['threads']}" if facts.get("device") == "cpu" else str(facts.get("device"))
    precision = f", {facts['precision']}" if "precision" in facts else ""
    return f"{facts['device_name']}, {threads}{precision}, torch {facts['torch']}"


def lines_of(summary: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Label, metric and statistics, in the order of the table; the labels' mean last, where there are several."""
    labels = dict(summary["labels"]) | ({"mean": summary["mean"]} if len(summary["labels"]) > 1 else {})
    return [(label, metric, of_label[metric]) for label, of_label in labels.items() for metric in REPORTED]


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`table.csv`: a row per label and metric."""
    return [
        {
            "label": label,
            "metric": metric,
            **{key: value for key, value in entry.items() if key != "fold_means"},
            **{f"fold{number}": value for number, value in entry["fold_means"].items()},
        }
        for label, metric, entry in lines_of(summary)
    ]


def number(value: float | None, metric: str = "dice") -> str:
    """A score as text, a dash where it is undefined."""
    return "-" if value is None else f"{value:.{2 if metric.endswith(('_mm', '_ml')) else 4}f}"


def cost_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the network costs, as title and text; what was not measured is left out."""
    cost = summary["cost"]
    titles = {
        "parameters": "parameters",
        "macs_per_voxel": "convolution MACs per voxel",
        "seconds_per_epoch": "seconds per epoch",
        "training_seconds": "seconds per training",
        "training_gb": "peak memory of training, GB",
        "training_gpu_gb": "peak GPU memory of training, GB",
        "seconds_per_volume": "seconds per volume",
        "prediction_gb": "peak memory of prediction, GB",
        "prediction_gpu_gb": "peak GPU memory of prediction, GB",
    }
    lines = [(titles[key], format(cost[key], form)) for key, form in COSTS.items() if cost[key] is not None]
    if networks := summary.get("ensemble"):
        names = Counter(one["name"] for one in networks)
        lines.insert(0, ("networks, averaged", ", ".join(f"{many} {name}" for name, many in names.items())))
    return lines + ([("measured on", "; ".join(cost["machines"]))] if cost["machines"] else [])


def format_table(summary: Mapping[str, Any], title: str) -> str:
    """The table for the terminal."""
    width = max(len(label) for label in [*summary["labels"], "label"]) + 2
    numbers = ", ".join(str(fold) for fold in summary["folds"])
    lines = [
        f"{title}: folds {numbers}, {summary['cases']} cases",
        f"{'label':{width}}{'':19}{'folds':>10}{'sd':>9}{'cases':>10}{'sd':>9}",
    ]
    for label, metric, entry in lines_of(summary):
        cells = [number(entry[key], metric) for key in ("mean_folds", "sd_folds", "mean_cases", "sd_cases")]
        lines.append(f"{label:{width}}{TITLES[metric]:19}{cells[0]:>10}{cells[1]:>9}{cells[2]:>10}{cells[3]:>9}")
    lines += [f"{label}, {LARGEST}: {text}" for label, text in largest_lines(summary)]
    return "\n".join(lines + [f"{key}: {text}" for key, text in cost_lines(summary)])


def largest_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and its scores after post-processing, mean and sd over folds; nothing where no fold was changed."""
    found = summary["largest_component"]
    if not found:
        return []

    def text(metric: str, entry: Mapping[str, Any]) -> str:
        sd = "" if entry["sd_folds"] is None else f" ± {number(entry['sd_folds'], metric)}"
        return f"{TITLES[metric]} {number(entry['mean_folds'], metric)}{sd}"

    # Summaries from before the labels' mean was written hold none.
    labels = dict(found["labels"]) | ({"mean": found["mean"]} if len(found["labels"]) > 1 and "mean" in found else {})
    return [
        (label, ", ".join(text(metric, of_label[metric]) for metric in POSTPROCESSED_METRICS))
        for label, of_label in labels.items()
    ]


def metrics_for_dvc(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Few numbers, well rounded: {metric: {label: {mean, sd_folds, sd_cases}}} and costs; undefined ones left out.

    Scores after post-processing, where it changed anything, are `postprocessed_METRIC`.
    """
    found = {metric: _rounded(summary, metric) for metric in REPORTED}
    if processed := summary["largest_component"]:
        found |= {f"postprocessed_{metric}": _rounded(processed, metric) for metric in POSTPROCESSED_METRICS}
    measured = {key: value for key, value in summary["cost"].items() if isinstance(value, int | float)}
    return found | {"cost": measured}


def _rounded(scores: Mapping[str, Any], metric: str) -> dict[str, dict[str, float]]:
    digits = 3 if metric.endswith(("_mm", "_ml")) else 5
    entries = {label: of_label[metric] for label, of_label in scores["labels"].items()}
    return {
        label: {
            key: round(entry[source], digits)
            for key, source in (("mean", "mean_folds"), ("sd_folds", "sd_folds"), ("sd_cases", "sd_cases"))
            if entry[source] is not None
        }
        for label, entry in {"mean": scores["mean"][metric], **entries}.items()
    }


def metrics_for_mlflow(summary: Mapping[str, Any]) -> dict[str, float]:
    """`cv_METRIC_LABEL_mean`, `_sd_folds` and `_sd_cases`, without LABEL for the labels' mean, and `cv_COST`."""
    found: dict[str, float] = {}
    for metric, labels in metrics_for_dvc(summary).items():
        if metric == "cost":
            found |= {f"cv_{key}": value for key, value in labels.items()}
            continue
        for label, numbers in labels.items():
            prefix = f"cv_{metric}" if label == "mean" else f"cv_{metric}_{label}"
            found |= {f"{prefix}_{key}": value for key, value in numbers.items()}
    return found
