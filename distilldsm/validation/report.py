"""The validation report: one JSON file with all findings of all cases, and one HTML page that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distilldsm.core.mapping import to_mapping
from distilldsm.data.dataset import DatasetIndex
from distilldsm.report.page import render
from distilldsm.validation.case_table import CaseTable, show
from distilldsm.validation.expectations import Finding, Suite

SCHEMA_VERSION = 1
_TABLE = (
    ("case", "case"),
    ("patient", "patient"),
    ("spacing_x_mm spacing_y_mm spacing_z_mm", "spacing, mm"),
    ("shape_x shape_y shape_z", "shape"),
    ("orientation", "axes"),
    ("dtype", "type"),
    ("intensity_p0_5_min intensity_p99_5_max", "intensity, 0.5 to 99.5 %"),
    ("label_values", "labels"),
    ("foreground_fraction", "foreground"),
)


def make_report(index: DatasetIndex, table: CaseTable, suite: Suite, findings: Sequence[Finding]) -> dict[str, Any]:
    """All results of the stage, as plain JSON types.

    A case with a finding of severity error is excluded; all other cases are accepted. The report contains no time and
    no local path: the same data and suite give the same bytes.
    """
    excluded: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "error" and finding.case is not None:
            rules = excluded.setdefault(finding.case, [])
            if finding.rule not in rules:
                rules.append(finding.rule)
    accepted = [case.id for case in index.cases if case.id not in excluded]
    severities = Counter(finding.severity for finding in findings)
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "name": index.name,
            "channels": {c.name: c.modality for c in index.channels},
            "labels": dict(index.labels),
            "licence": index.licence,
            "reference": index.reference,
            "source": index.source,
            "note": index.note,
        },
        "counts": {
            "cases": len(index.cases),
            "patients": len({case.patient for case in index.cases}),
            "accepted": len(accepted),
            "excluded": len(excluded),
            "errors": severities["error"],
            "warnings": severities["warning"],
        },
        "suite": [{**to_mapping(rule), "allowed": rule.allowed} for rule in suite.rules],
        "findings": [to_mapping(finding) for finding in findings],
        "summary": table.summary(),
        "accepted": accepted,
        "excluded": excluded,
    }


def render_html(report: Mapping[str, Any], table: CaseTable) -> str:
    """The report as one HTML page that loads nothing."""
    dataset = report["dataset"]
    about = {
        "channels": ", ".join(f"{name} ({modality})" for name, modality in dataset["channels"].items()),
        "labels": ", ".join(f"{value} {name}" for name, value in dataset["labels"].items()),
        **{key: dataset[key] for key in ("source", "licence", "note") if dataset[key]},
    }
    broken = Counter(finding["rule"] for finding in report["findings"])
    return render(
        "validation.html",
        title=f"Validation of {dataset['name']}",
        report=report,
        about=about,
        findings={severity: _finding_lines(report["findings"], severity) for severity in ("error", "warning")},
        columns=_column_lines(report["summary"]),
        case_head=[heading for _, heading in _TABLE],
        cases=_case_lines(report, table),
        rules=[
            (rule["rule"], rule["severity"], rule["column"] or "", rule["allowed"], broken[rule["rule"]])
            for rule in report["suite"]
        ],
    )


def _finding_lines(findings: Sequence[Mapping[str, Any]], severity: str) -> list[tuple[Any, ...]]:
    """The cells of the table of findings. The name of the rule stands below the message."""
    return [
        (f["case"] or "(data set)", f["file"], (f["message"], f["rule"]), f["seen"], f["allowed"], f["hint"])
        for f in findings
        if f["severity"] == severity
    ]


def _column_lines(summary: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, str]]:
    """One line per column of the case table: name, meaning, number of measured cases, values seen."""
    lines = []
    for column, entry in summary.items():
        if "min" in entry:
            seen = " / ".join(f"{entry[key]:.6g}" for key in ("min", "median", "max"))
        elif "sha256" in column or not entry.get("distinct"):
            continue
        else:
            seen = ", ".join(f"{value} ({number})" for value, number in list(entry["common"].items())[:3])
            if entry["distinct"] > 3:
                seen += f", ... {entry['distinct']} in all"
        lines.append((column, entry["meaning"], entry["measured"], seen))
    return lines


def _case_lines(report: Mapping[str, Any], table: CaseTable) -> list[tuple[list[str], dict[str, str]]]:
    """Per case: the cells below the headings of _TABLE, and the broken rules with their severity."""
    broken: dict[str, dict[str, str]] = {}
    for finding in report["findings"]:
        if finding["case"] is not None:
            broken.setdefault(finding["case"], {}).setdefault(finding["rule"], finding["severity"])
    return [
        (
            [" · ".join(_short(row.values.get(column)) for column in columns.split()) for columns, _ in _TABLE],
            broken.get(str(row.values["case"]), {}),
        )
        for row in table.rows
    ]


def _short(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value, empty="-")
