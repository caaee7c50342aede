"""The validation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.expectations import Finding, Rule

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;max-width:1100px;margin:0 auto;padding:1rem}
table{border-collapse:collapse;font-size:.9rem}th,td{padding:.25rem .6rem;text-align:left;vertical-align:top}
thead th{border-bottom:2px solid #555}tbody tr:nth-child(even){background:#f4f4f4}.scroll{overflow-x:auto}
.error{color:#a40000;font-weight:600}.warning{color:#8a5a00;font-weight:600}
.note{background:#fff4d6;border-left:5px solid #e69f00;padding:.6rem 1rem}
"""
_RANGES = (
    "shape_x", "shape_y", "shape_z", "spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "anisotropy", "intensity_p005",
    "intensity_p50", "intensity_p995", "foreground_fraction", "foreground_volume_ml",
)  # fmt: skip
_CASE_COLUMNS = ("case", "patient", "orientation", "dtype", "label_dtype", "label_values", *_RANGES)


def render_validation(
    index: DatasetIndex,
    rows: Sequence[Mapping[str, Any]],
    findings: Sequence[Finding],
    rules: Sequence[Rule],
    excluded: Mapping[str, Sequence[str]],
) -> str:
    """The page: summary, findings, ranges of the data set, rules, all cases."""
    errors = sum(f.severity == "error" for f in findings)
    summary = (
        f"{len(rows)} cases of {len({r['patient'] for r in rows})} patients; <span class='error'>{errors} errors</span>, "
        f"<span class='warning'>{len(findings) - errors} warnings</span>; {len(excluded)} cases left out."
    )
    broken = {f.rule for f in findings}
    note = f"<p class='note'>{escape(index.note)}</p>" if index.note else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Validation of {escape(index.name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Validation of {escape(index.name)}</h1><p>{summary}</p>{note}"
        + (f"<h2>Findings</h2>{_findings(findings)}" if findings else "<p>Every case fulfils every rule.</p>")
        + f"<h2>Ranges</h2>{_ranges(rows, index)}<h2>Rules</h2>"
        + _table(
            ("rule", "severity", "column", "meaning", "result"),
            [(r.rule, r.severity, r.column, r.message, "broken" if r.rule in broken else "fulfilled") for r in rules],
        )
        + f"<h2>Cases</h2>{_table(_CASE_COLUMNS, [[row.get(c) for c in _CASE_COLUMNS] for row in rows])}"
        + "</body></html>\n"
    )


def _findings(findings: Sequence[Finding]) -> str:
    body = "".join(
        f"<tr><td class='{f.severity}'>{f.severity}</td><td>{escape(f.case)}</td><td>{escape(f.file)}</td>"
        f"<td>{escape(f.message)}</td><td>{escape(f.seen)}</td><td>{escape(f.allowed)}</td><td>{escape(f.mend)}</td></tr>"
        for f in sorted(findings, key=lambda f: (f.severity, f.rule, f.case))
    )
    head = "".join(f"<th>{h}</th>" for h in ("severity", "case", "file", "finding", "seen", "rule", "mend"))
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _ranges(rows: Sequence[Mapping[str, Any]], index: DatasetIndex) -> str:
    columns = [*_RANGES, *(f"volume_ml_{name}" for name in index.class_names[1:])]
    lines = []
    for column in columns:
        values = sorted(float(r[column]) for r in rows if r.get(column) is not None)
        if values:
            lines.append((column, values[0], values[len(values) // 2], values[-1]))
    return _table(("column", "least", "median", "greatest"), lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_text(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
