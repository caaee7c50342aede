"""The validation report: one JSON with all findings of all cases, and the same as one HTML page without network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distilldsm.core.mapping import to_mapping
from distilldsm.data.dataset import DatasetIndex
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
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --error: #c02626; --warning: #b36b00; --good: #1b7f3b; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .95em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .note { opacity: .75; }
.error { color: var(--error); } .warning { color: var(--warning); } .good { color: var(--good); }
"""


def make_report(index: DatasetIndex, table: CaseTable, suite: Suite, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything the stage found, as plain JSON types.

    A case with a finding of severity error is excluded, every other one accepted. The report holds no time and no
    path of this machine: the same data and suite give the same bytes.
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
    """The report as one self-contained page: no script, no address, styles inline."""
    dataset, counts = report["dataset"], report["counts"]
    verdict = (
        '<span class="good">every case can be used</span>'
        if not counts["errors"]
        else f'<span class="error">{counts["errors"]} errors, {counts["excluded"]} cases cannot be used</span>'
    )
    labels = ", ".join(f"{value} {name}" for name, value in dataset["labels"].items())
    channels = ", ".join(f"{name} ({modality})" for name, modality in dataset["channels"].items())
    facts = f"Channels: {channels}. Labels: {labels}. "
    facts += f"Source: {dataset['source']}. Licence: {dataset['licence']}. {dataset['note']}"
    title = f"Validation of {dataset['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{counts['cases']} cases of {counts['patients']} patients: {verdict}; {counts['warnings']} warnings.</p>",
        f"<p class=note>{escape(facts)}</p>",
        '<p>The same rules in <a href="data_docs/index.html">Great Expectations Data Docs</a>.</p>',
    ]
    for severity, heading in (("error", "Errors"), ("warning", "Warnings")):
        found = [f for f in report["findings"] if f["severity"] == severity]
        parts.append(f"<h2 class={severity if found else 'good'}>{heading}: {len(found)}</h2>")
        if found:
            parts.append(_findings_table(found))
    parts.append("<h2>Data set</h2>" + _summary_table(report["summary"]))
    parts.append("<h2>Cases</h2>" + _case_table(report, table))
    parts.append("<h2>Rules</h2>" + _rules_table(report))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells are HTML already."""
    heads = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{heads}</tr>\n{body}\n</table></div>'


def _findings_table(findings: Sequence[Mapping[str, Any]]) -> str:
    return _rows(
        ("case", "file", "what is wrong", "seen", "allowed", "hint"),
        [
            (
                escape(f["case"] or "(data set)"),
                f"<code>{escape(f['file'])}</code>",
                f"{escape(f['message'])} <span class=note>({escape(f['rule'])})</span>",
                escape(f["seen"]),
                escape(f["allowed"]),
                escape(f["hint"]),
            )
            for f in findings
        ],
    )


def _summary_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for column, entry in summary.items():
        if "min" in entry:
            what = " / ".join(f"{entry[key]:.6g}" for key in ("min", "median", "max"))
        elif "sha256" in column or not entry.get("distinct"):
            continue
        else:
            what = ", ".join(f"{value} ({number})" for value, number in list(entry["common"].items())[:3])
            if entry["distinct"] > 3:
                what += f", ... {entry['distinct']} in all"
        rows.append((f"<code>{escape(column)}</code>", escape(entry["meaning"]), str(entry["measured"]), escape(what)))
    return _rows(("column", "meaning", "measured", "min / median / max, or commonest (cases)"), rows)


def _case_table(report: Mapping[str, Any], table: CaseTable) -> str:
    broken: dict[str, dict[str, str]] = {}
    for finding in report["findings"]:
        if finding["case"] is not None:
            broken.setdefault(finding["case"], {}).setdefault(finding["rule"], finding["severity"])
    rows = []
    for row in table.rows:
        cells = [
            escape(" · ".join(_short(row.values.get(column)) for column in columns.split())) for columns, _ in _TABLE
        ]
        rules = broken.get(str(row.values["case"]), {})
        cells.append(", ".join(f"<span class={severity}>{escape(rule)}</span>" for rule, severity in rules.items()))
        rows.append(cells)
    return _rows((*(heading for _, heading in _TABLE), "findings"), rows)


def _rules_table(report: Mapping[str, Any]) -> str:
    number = Counter(f["rule"] for f in report["findings"])
    return _rows(
        ("rule", "severity", "column", "allowed", "findings"),
        [
            (
                escape(rule["rule"]),
                f"<span class={rule['severity']}>{rule['severity']}</span>",
                f"<code>{escape(rule['column'] or '')}</code>",
                escape(rule["allowed"]),
                str(number[rule["rule"]]),
            )
            for rule in report["suite"]
        ],
    )


def _short(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value, empty="-")
