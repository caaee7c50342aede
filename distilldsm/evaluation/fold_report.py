"""The page of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilldsm.core.hashes import content_hash, package_versions
from distilldsm.evaluation.costs import COSTS, measured
from distilldsm.evaluation.fold_table import cost_lines, largest_lines, lines_of
from distilldsm.evaluation.folds import Fold
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.report_sections import case_lines, networks_named
from distilldsm.report.figures import dice_panels, save_figure
from distilldsm.report.page import render as render_page


def draw(folds: Sequence[Fold], path: Path) -> None:
    """Box plots of Dice, one panel per label, one box per fold, as PNG."""
    labels = dict.fromkeys(row["label"] for row in folds[0].rows)
    panels = {
        label: {f"fold {fold.number}": [row["dice"] for row in fold.rows if row["label"] == label] for fold in folds}
        for label in labels
    }
    save_figure(dice_panels(panels), path)


def render(folds: Sequence[Fold], summary: Mapping[str, Any], picture: Path) -> str:
    """The page: table, figure, costs, cases, provenance.

    Args:
        summary: from `fold_table.summarise`.
        picture: from `draw`.
    """
    notes = []
    if folds[0].evaluate["config"].get("checkpoint") == "best":
        notes.append("The checkpoints were chosen on these same cases, so the scores are optimistic.")
    if len(summary["cost"]["machines"]) > 2:  # a single machine gives one line for training and one for prediction
        notes.append("The folds were computed on different machines, so their seconds are not comparable.")
    rows = [{**row, "case": f"{row['case']} (fold {fold.number})"} for fold in folds for row in fold.rows]
    network = networks_named(summary.get("ensemble", [summary["network"]]))
    numbers = ", ".join(str(fold.number) for fold in folds)
    return render_page(
        "cross_validation.html",
        title=f"Cross-validation of {network}, folds {numbers}",
        notes=notes,
        summary=summary,
        scores=_score_lines(summary),
        largest=dict(largest_lines(summary)),
        picture=picture,
        cost=dict(cost_lines(summary)),
        costs=_costs_by_fold(summary["cost"]["folds"]),
        cases=case_lines(rows),
        provenance=_provenance(folds),
    )


def _score_lines(summary: Mapping[str, Any]) -> dict[str, Any]:
    folds = [str(fold) for fold in summary["folds"]]
    lines = []
    for label, name, entry in lines_of(summary):
        text = METRICS[name].text
        spreads = (f"{text(entry[f'mean_{over}'])} ± {text(entry[f'sd_{over}'])}" for over in ("folds", "cases"))
        means = (text(entry["fold_means"][fold]) for fold in folds)
        lines.append([label, METRICS[name].heading, *spreads, *means, entry["cases"]])
    head = ["label", "score", "over folds", "over cases", *(f"fold {fold}" for fold in folds), "cases"]
    return {"head": head, "rows": lines}


def _costs_by_fold(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = measured(folds)
    return {
        "head": ["fold", *(key.replace("_", " ") for key in columns)],
        "rows": [[row["fold"], *(COSTS[key].text(row[key]) for key in columns)] for row in folds],
    }


def _provenance(folds: Sequence[Fold]) -> dict[str, Any]:
    first = folds[0]
    return {
        "epochs": ", ".join(str(fold.model["epochs"]) for fold in folds),
        "checkpoint": first.evaluate["config"].get("checkpoint"),
        "NSD tolerance": f"{first.evaluate['config'].get('nsd_tolerance_mm')} mm",
        "data hash": str(first.evaluate["inputs"].get("dataset"))[:16],
        "split hash": str(first.evaluate["inputs"].get("splits"))[:16],
        "model hashes": ", ".join(value[:16] for fold in folds for value in _model_hashes(fold)),
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
    }


def _model_hashes(fold: Fold) -> list[str]:
    others = [f"ensemble{number}" for number in range(1, len(fold.ensemble))]
    return [content_hash(fold.model_directory), *(fold.evaluate["inputs"][other] for other in others)]
