"""One self-contained HTML page of an evaluation: no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;max-width:1080px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #555}
tbody tr:nth-child(even){background:#f4f4f4}
img{max-width:100%}.note{background:#fff4d6;border-left:5px solid #e69f00;padding:.6rem 1rem;margin:1rem 0}
.scroll{overflow-x:auto}.small{font-size:.85rem;color:#444}
"""
HOW_TO_READ = (
    "<h2>How to read this</h2>"
    "<p class='small'>Dice: overlap, 1 is perfect. HD95: 95th percentile of the distance between the surfaces, mm. "
    "NSD: share of the surfaces within the tolerance of each other. Where truth and prediction are both empty, "
    "Dice and NSD are 1 and HD95 is 0; where only one is empty, Dice and NSD are 0 and HD95 is the volume's "
    "diagonal; undefined values are left out.</p>"
)


def render_report(
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, Path]],
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        title: heading.
        summary: of `tables.summarise`.
        rows: one per case and label.
        figures: caption and PNG, in order.
        notes: what a reader must know before believing the numbers.
        facts: provenance, key to value.
    """
    pictures = "".join(figure(caption, path) for caption, path in figures)
    return page(
        title,
        notes,
        f"<h2>Scores</h2>{_headline(summary)}<h2>Figures</h2>{pictures}"
        f"<h2>Cases, worst first</h2>{cases_table(rows)}{HOW_TO_READ}<h2>Provenance</h2>{facts_table(facts)}",
    )


def page(title: str, notes: Sequence[str], body: str) -> str:
    """A whole page around the HTML `body`: heading, then the notes; empty ones are left out."""
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        "<p>Scores on whole volumes in the scan's own geometry. Research software, not a medical device.</p>"
        f"{warnings}{body}</body></html>\n"
    )


def figure(caption: str, path: Path) -> str:
    """A picture and its caption, within the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f'<figcaption class="small">{text}</figcaption></figure>'
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _headline(summary: Mapping[str, Any]) -> str:
    columns = (("dice", 4), ("hd95_mm", 2), ("nsd", 4), ("sensitivity", 4), ("precision", 4), ("volume_error_ml", 2))
    head = (
        "<th>label</th><th>Dice mean ± sd</th><th>median</th><th>worst</th><th>HD95 mm</th><th>NSD</th>"
        "<th>sensitivity</th><th>precision</th><th>volume error ml</th><th>cases</th>"
    )
    body = ""
    for label, s in summary["labels"].items():
        dice = s["dice"]
        cells = [
            f"{_number(dice['mean'])} ± {_number(dice['sd'], 3)}",
            _number(dice["median"]),
            f"{_number(dice['worst'])} ({escape(str(dice['worst_case']))})",
            *(_number(s[metric]["mean"], digits) for metric, digits in columns[1:]),
            str(dice["cases"]),
        ]
        body += f"<tr><td>{escape(label)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    mean = summary["mean"]
    body += f"<tr><th>mean</th><td>{_number(mean['dice'])}</td><td></td><td></td>" + "".join(
        f"<td>{_number(mean[metric], digits)}</td>" for metric, digits in columns[1:]
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}<td></td></tr></tbody></table></div>"


def cases_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All cases and labels, the lowest Dice first."""
    head = "".join(
        f"<th>{name}</th>" for name in ("case", "label", "Dice", "HD95 mm", "NSD", "true ml", "predicted ml")
    )
    body = "".join(
        f"<tr><td>{escape(str(r['case']))}</td><td>{escape(str(r['label']))}</td><td>{_number(r['dice'])}</td>"
        f"<td>{_number(r['hd95_mm'], 2)}</td><td>{_number(r['nsd'])}</td><td>{_number(r['volume_truth_ml'], 2)}</td>"
        f"<td>{_number(r['volume_predicted_ml'], 2)}</td></tr>"
        for r in sorted(rows, key=lambda r: r["dice"])
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Key and value, a row each."""
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<div class='scroll'><table class='small'><tbody>{body}</tbody></table></div>"
