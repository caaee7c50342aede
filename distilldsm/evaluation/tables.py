"""Tables over cases: rows, summaries, what DVC and the terminal show."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.evaluation.metrics import METRICS

Row = Mapping[str, Any]
LOWER_IS_BETTER = {"hd95_mm"}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the first row's columns; numbers with six significant digits, undefined values empty."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def summarise(rows: Sequence[Row], labels: Iterable[str]) -> dict[str, Any]:
    """Statistics of every metric, per label over cases, and of the labels' mean per case.

    Returns:
        {"labels": {label: {metric: {mean, sd, median, worst, worst_case, defined, cases}}}, "mean": {metric: mean of
        the labels' means}}. sd is the sample standard deviation (n - 1), None for a single defined value.
        `volume_error_ml` is judged by its size.
    """
    summary: dict[str, Any] = {"cases": len({row["case"] for row in rows}), "labels": {}, "mean": {}}
    for label in labels:
        of_label = [row for row in rows if row["label"] == label]
        summary["labels"][label] = {metric: _statistics(of_label, metric) for metric in METRICS}
    for metric in METRICS:
        means = [s[metric]["mean"] for s in summary["labels"].values() if s[metric]["mean"] is not None]
        summary["mean"][metric] = sum(means) / len(means) if means else None
    return summary


def _statistics(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    defined = [(float(row[metric]), str(row["case"])) for row in rows if row[metric] is not None]
    if not defined:
        return dict.fromkeys(("mean", "sd", "median", "worst", "worst_case")) | {"defined": 0, "cases": len(rows)}
    values = np.array([value for value, _ in defined])
    badness = values if metric in LOWER_IS_BETTER else np.abs(values) if metric == "volume_error_ml" else -values
    worst = int(np.argmax(badness))
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "median": float(np.median(values)),
        "worst": defined[worst][0],
        "worst_case": defined[worst][1],
        "defined": len(values),
        "cases": len(rows),
    }


def metrics_for_dvc(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Few numbers, well rounded: {metric: {"mean": ..., label: ...}}; undefined ones are left out."""
    table: dict[str, Any] = {}
    for metric in METRICS:
        entry = {"mean": summary["mean"][metric]}
        entry |= {label: s[metric]["mean"] for label, s in summary["labels"].items()}
        table[metric] = {
            key: round(value, 3 if metric.endswith(("_mm", "_ml")) else 5)
            for key, value in entry.items()
            if value is not None and math.isfinite(value)
        }
    return table


def format_table(summary: Mapping[str, Any], title: str = "") -> str:
    """Dice, HD95 and NSD per label, for the terminal."""
    width = max(len(label) for label in [*summary["labels"], "label"]) + 2
    lines = [title] if title else []
    lines.append(f"{'label':{width}}{'Dice':>8}{'sd':>8}{'worst':>8}{'HD95 mm':>10}{'NSD':>8}{'cases':>7}")
    for label, s in summary["labels"].items():
        dice, hd95, nsd = s["dice"], s["hd95_mm"], s["nsd"]
        sd = "-" if dice["sd"] is None else f"{dice['sd']:.4f}"
        lines.append(
            f"{label:{width}}{dice['mean']:8.4f}{sd:>8}{dice['worst']:8.4f}"
            f"{hd95['mean']:10.2f}{nsd['mean']:8.4f}{dice['cases']:7d}"
        )
    mean = summary["mean"]
    lines.append(f"{'mean':{width}}{mean['dice']:8.4f}{'':16}{mean['hd95_mm']:10.2f}{mean['nsd']:8.4f}")
    return "\n".join(lines)
