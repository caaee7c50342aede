"""The page of a cross-validation, self-contained, in the style of an evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distilldsm.core.output_directory import content_hash, package_versions
from distilldsm.evaluation.costs import COSTS, measured
from distilldsm.evaluation.fold_table import LARGEST, cost_lines, largest_lines, lines_of
from distilldsm.evaluation.folds import Fold
from distilldsm.evaluation.metrics import METRICS
from distilldsm.report.figures import dice_panels, save_figure
from distilldsm.report.old_page import HOW_TO_READ, cases_table, facts_table, figure, networks_named, page


def draw(folds: Sequence[Fold], path: Path) -> None:
    """Dice of every case as boxes, a panel per label, a box per fold, as PNG."""
    labels = dict.fromkeys(row["label"] for row in folds[0].rows)
    panels = {
        label: {f"fold {fold.number}": [row["dice"] for row in fold.rows if row["label"] == label] for fold in folds}
        for label in labels
    }
    save_figure(dice_panels(panels), path)


def render(folds: Sequence[Fold], summary: Mapping[str, Any], picture: Path) -> str:
    """The page: table, figure, costs, cases, provenance.

    Args:
        summary: of `table.summarise`.
        picture: of `draw`.
    """
    notes = []
    if folds[0].evaluate["config"].get("checkpoint") == "best":
        notes.append("The checkpoints were chosen on these very cases: the scores are optimistic.")
    cost = summary["cost"]
    if len(cost["machines"]) > 2:  # one line for training and one for prediction are what a single machine gives
        notes.append("The folds were not all computed on the same machine: their seconds are not comparable.")
    rows = [{**row, "case": f"{row['case']} (fold {fold.number})"} for fold in folds for row in fold.rows]
    numbers = ", ".join(str(fold.number) for fold in folds)
    return page(
        f"Cross-validation of {_network(summary)}, folds {numbers}",
        notes,
        f"<h2>Scores</h2><p>{summary['cases']} cases, each held out once.</p>{_scores(summary)}"
        f"{_largest(summary)}"
        f"<h2>Dice per fold</h2>{figure('Dice per fold and label, a point a case', picture)}"
        f"<h2>Cost</h2>{facts_table(dict(cost_lines(summary)))}{_costs_by_fold(cost)}"
        f"<h2>Cases, worst first</h2>{cases_table(rows)}{HOW_TO_READ}"
        "<p class='small'>sd: sample standard deviation, over the folds' means and over all cases. Seconds are "
        "medians, without validation and without reading files; memory is that of the main process.</p>"
        f"<h2>Provenance</h2>{facts_table(_provenance(folds))}",
    )


def _network(summary: Mapping[str, Any]) -> str:
    return networks_named(summary.get("ensemble", [summary["network"]]))


def _scores(summary: Mapping[str, Any]) -> str:
    folds = [str(fold) for fold in summary["folds"]]
    head = "".join(
        f"<th>{text}</th>"
        for text in ("label", "score", "over folds", "over cases", *(f"fold {fold}" for fold in folds), "cases")
    )
    body = ""
    for label, name, entry in lines_of(summary):
        text = METRICS[name].text
        cells = [
            METRICS[name].heading,
            f"{text(entry['mean_folds'])} ± {text(entry['sd_folds'])}",
            f"{text(entry['mean_cases'])} ± {text(entry['sd_cases'])}",
            *(text(entry["fold_means"][fold]) for fold in folds),
            str(entry["cases"]),
        ]
        body += f"<tr><td>{escape(label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _largest(summary: Mapping[str, Any]) -> str:
    lines = largest_lines(summary)
    return f"<h3>{LARGEST.capitalize()}</h3>{facts_table(dict(lines))}" if lines else ""


def _costs_by_fold(cost: Mapping[str, Any]) -> str:
    columns = measured(cost["folds"])
    head = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in ("fold", *columns))
    body = ""
    for row in cost["folds"]:
        cells = (str(row["fold"]), *(COSTS[key].text(row[key]) for key in columns))
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<div class='scroll'><table class='small'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


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
