"""The page of one evaluated model: in a minute, what it does well, where it fails, and whether to believe it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.evaluation.report import HOW_TO_READ, cases_table, facts_table, figure, number, page, sections, table
from distilldsm.evaluation.statistics import CONFIDENCE, agreement, mean_interval

LOW_DICE = 0.7
"""Overlaps below this are counted: above it agreement is usually called good (Zijdenbos et al., 1994)."""
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What the page shows."""

    title: str
    summary: Mapping[str, Any]
    """Of `tables.summarise`."""
    rows: Sequence[Row]
    """One per case and label."""
    notes: Sequence[str] = ()
    """What a reader must know before believing the numbers."""
    scores: Sequence[tuple[str, Path]] = ()
    """Caption and PNG of the distributions."""
    cases: Sequence[tuple[str, Path]] = ()
    """Caption and PNG of the worst, the median and the best case."""
    volumes: Sequence[tuple[str, Path]] = ()
    training: Sequence[tuple[str, Path]] = ()
    viewer: str = ""
    """HTML of `distilldsm.viewer`."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What preprocess wrote of the data; empty: not shown."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] | None = None
    """What validate wrote; None: not known here."""
    timing: Mapping[str, Any] = field(default_factory=dict)
    """Of prediction, and of training in it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, key to value."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Section of `params.yaml` to its values."""


def render_run_report(report: RunReport) -> str:
    """The page."""
    parts = {
        "Scores": _sentences(report) + _headline(report) + _pictures(report.scores),
        "Cases to look at": _pictures(report.cases),
        "Viewer": report.viewer,
        "Volumes": _pictures(report.volumes) + _agreement(report),
        "All cases, worst first": cases_table(report.rows),
        "Training": _pictures(report.training),
        "Data": _data(report),
        "Validation": _validation(report.validation),
        "Cost": _cost(report.timing),
        "Provenance": facts_table(report.facts) + _parameters(report.parameters),
    }
    return page(report.title, report.notes, sections(parts) + HOW_TO_READ)


def intervals(rows: Sequence[Row], metric: str) -> dict[str, tuple[float, float] | None]:
    """Label, and `mean` (over the labels of a case), to the confidence interval of a score's mean over cases."""
    found = {}
    for label in dict.fromkeys(str(row["label"]) for row in rows):
        found[label] = mean_interval([row[metric] for row in rows if row["label"] == label and row[metric] is not None])
    found["mean"] = mean_interval(list(_case_means(rows, metric).values()))
    return found


def _case_means(rows: Sequence[Row], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[metric] is not None:
            values.setdefault(str(row["case"]), []).append(float(row[metric]))
    return {case: float(np.mean(of_case)) for case, of_case in values.items()}


def _sentences(report: RunReport) -> str:
    """The page in words."""
    rows, summary = report.rows, report.summary
    labels = {name: s["dice"]["mean"] for name, s in summary["labels"].items() if s["dice"]["mean"] is not None}
    if not labels:
        return ""
    worst = min(rows, key=lambda r: r["dice"])
    low = sum(row["dice"] < LOW_DICE for row in rows)
    interval = intervals(rows, "dice")["mean"]
    between = f" ({CONFIDENCE:.0%} CI {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    weak, strong = min(labels, key=lambda k: labels[k]), max(labels, key=lambda k: labels[k])
    text = [f"Mean Dice {number(summary['mean']['dice'], 3)}{between} over {summary['cases']} cases."]
    if len(labels) > 1:
        text.append(f"Best at {strong} ({labels[strong]:.3f}), weakest at {weak} ({labels[weak]:.3f}).")
    text.append(f"Worst: {worst['label']} of case {worst['case']}, Dice {worst['dice']:.3f}.")
    text.append(
        f"{low} of {len(rows)} structures are below a Dice of {LOW_DICE:g}." if low else f"None is below {LOW_DICE:g}."
    )
    return f"<p>{escape(' '.join(text))}</p>"


def _headline(report: RunReport) -> str:
    metrics = (("dice", 4), ("hd95_mm", 2), ("nsd", 4), ("sensitivity", 4), ("precision", 4), ("volume_error_ml", 2))
    spread = {metric: intervals(report.rows, metric) for metric in ("dice", "hd95_mm")}

    def interval(metric: str, label: str, digits: int) -> str:
        found = spread[metric].get(label)
        return "-" if found is None else f"{found[0]:.{digits}f} to {found[1]:.{digits}f}"

    lines = []
    for label, s in report.summary["labels"].items():
        dice = s["dice"]
        lines.append(
            [
                label,
                f"{number(dice['mean'])} ± {number(dice['sd'], 3)}",
                interval("dice", label, 3),
                f"{number(dice['worst'])} ({dice['worst_case']})",
                number(s["hd95_mm"]["mean"], 2),
                interval("hd95_mm", label, 2),
                *(number(s[metric]["mean"], digits) for metric, digits in metrics[2:]),
                str(dice["cases"]),
            ]
        )
    mean = report.summary["mean"]
    lines.append(
        [
            *("mean", number(mean["dice"]), interval("dice", "mean", 3), ""),
            *(number(mean["hd95_mm"], 2), interval("hd95_mm", "mean", 2)),
            *(number(mean[metric], digits) for metric, digits in metrics[2:]),
            "",
        ]
    )
    head = (
        "label",
        "Dice mean ± sd",
        f"{CONFIDENCE:.0%} CI",
        "worst (case)",
        "HD95 mm",
        f"{CONFIDENCE:.0%} CI",
    )
    return (
        table((*head, "NSD", "sensitivity", "precision", "volume error ml", "cases"), lines)
        + "<p class='small'>CI: confidence interval of the mean, bootstrap over cases; how much the mean depends "
        "on which cases were held out. Another training would differ too.</p>"
    )


def _pictures(pictures: Sequence[tuple[str, Path]]) -> str:
    return "".join(figure(caption, path) for caption, path in pictures)


def _agreement(report: RunReport) -> str:
    lines = []
    for label in report.summary["labels"]:
        of_label = [row for row in report.rows if row["label"] == label]
        found = agreement([r["volume_truth_ml"] for r in of_label], [r["volume_predicted_ml"] for r in of_label])
        if found is not None:
            true = float(np.mean([r["volume_truth_ml"] for r in of_label]))
            relative = f"{found.bias / true:+.1%}" if true else "-"
            low, high = number(found.low, 3, sign=True), number(found.high, 3, sign=True)
            lines.append([label, number(true, 3), number(found.bias, 3, sign=True), relative, f"{low} to {high}"])
    head = ("label", "mean true ml", "bias ml", "bias", "95 % limits of agreement ml")
    return table(head, lines) if lines else ""


def _data(report: RunReport) -> str:
    """Shapes, spacings, intensities and volumes of the data, and what the plan made of them."""
    found, plan = report.fingerprint, report.plan
    if not found:
        return ""

    def three(values: Sequence[float], digits: int = 0) -> str:
        return " x ".join(f"{value:.{digits}f}" for value in values)

    axes = ", ".join(found["axes"])
    lines = [
        [f"{what} ({axes})", *(three(found[key][k], digits) for k in ("min", "median", "max"))]
        for what, key, digits in (("shape, voxels", "shape", 0), ("spacing, mm", "spacing_mm", 2))
    ]
    for label, volumes in found["label_volumes_ml"].items():
        lines.append([f"volume of {label}, ml", *(number(volumes[k][0], 2) for k in ("min", "median", "max"))])
    html = table((f"{found['cases']} cases", "smallest", "median", "largest"), lines)
    shown = [f"{p:g} %" for p in found["percentiles"]]
    channels = [
        [name, number(i["mean"], 1), number(i["sd"], 1), *(number(v, 1) for v in i["percentiles"])]
        for name, i in found["foreground_intensity"].items()
    ]
    html += table(("intensity in the structures", "mean", "sd", *shown), channels)
    if plan:
        schemes = ", ".join(
            f"{c['name']} {n['scheme']}" for c, n in zip(plan["channels"], plan["normalisation"], strict=True)
        )
        order = [plan["depth_axis"], *(axis for axis in found["axes"] if axis != plan["depth_axis"])]
        html += facts_table(
            {
                "slices along": plan["depth_axis"],
                f"network spacing, mm ({', '.join(order)})": three(plan["target_spacing_mm"], 2),
                "patch, voxels": three(plan["patch_size"]),
                "normalisation": schemes,
            }
        )
    return html


def _validation(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    counts = report["counts"]
    html = (
        f"<p>{counts['cases']} cases of {counts['patients']} patients checked by {len(report['suite'])} rules: "
        f"{counts['errors']} errors, {counts['warnings']} warnings, {counts['excluded']} cases left out.</p>"
    )
    rules: dict[tuple[str, str], list[str]] = {}
    for finding in report["findings"]:
        rules.setdefault((str(finding["severity"]), str(finding["rule"])), []).append(str(finding["case"]))
    lines = [
        [rule, severity, str(len(cases)), ", ".join(cases[:3]) + (" ..." if len(cases) > 3 else "")]
        for (severity, rule), cases in sorted(rules.items())
    ]
    return html + (table(("rule", "severity", "findings", "cases"), lines) if lines else "")


def _cost(timing: Mapping[str, Any]) -> str:
    if not timing:
        return ""
    training = timing.get("training", {})

    def machine(one: Mapping[str, Any]) -> str:
        return f"{one.get('device_name', '-')}, {one['threads']} threads" if one.get("threads") else "-"

    def shown(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    both = [
        ("median seconds of an epoch, of a volume", "seconds_per_epoch", "seconds_per_volume", ".2f"),
        ("seconds in all", "seconds", "seconds", ",.0f"),
        ("peak memory, GB", "peak_memory_gb", "peak_memory_gb", ".2f"),
        ("peak GPU memory, GB", "peak_gpu_memory_gb", "peak_gpu_memory_gb", ".2f"),
    ]
    lines = [[text, shown(training.get(a), form), shown(timing.get(b), form)] for text, a, b, form in both]
    size = {
        "parameters": shown(training.get("parameters"), ","),
        "convolution MACs per voxel": shown(training.get("macs_per_voxel"), ",.0f"),
    }
    return (
        facts_table(size)
        + table(("", "training", "prediction (PyTorch)"), [*lines, ["machine", machine(training), machine(timing)]])
        + "<p class='small'>Without validation while training, without reading files. The exported model is faster.</p>"
    )


def _parameters(sections_: Mapping[str, Any]) -> str:
    if not sections_:
        return ""
    text = escape(json.dumps(sections_, indent=2))
    return f"<details><summary>Parameters</summary><pre class='small'>{text}</pre></details>"
