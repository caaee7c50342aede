"""Pieces of a self-contained HTML page: the frame, tables, pictures. Text is escaped here, and nothing is loaded."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

ROWS_SHOWN = 5000
"""Of the table of cases, the worst; more make a page slow, and cases.csv holds them all."""
HOW_TO_READ = (
    '<h2 id="reading">How to read this</h2>'
    "<p class='small'>Dice: overlap, 1 is perfect. HD95: 95th percentile of the distance between the surfaces, mm. "
    "NSD: share of the surfaces within the tolerance of each other. Sensitivity: share of the true structure that was "
    "found. Precision: share of what was found that is true. Where truth and prediction are both empty, "
    "Dice and NSD are 1 and HD95 is 0; where only one is empty, Dice and NSD are 0 and HD95 is the volume's "
    "diagonal; undefined values are left out.</p>"
)


def networks_named(networks: Sequence[Mapping[str, Any]]) -> str:
    """Networks of `name` and `options` as text, equal ones counted: `2 x distill_dsm (width=1) + unet2d`."""
    texts = []
    for network in networks:
        options = ", ".join(f"{key}={value}" for key, value in network["options"].items())
        texts.append(f"{network['name']} ({options})" if options else str(network["name"]))
    return " + ".join(text if n == 1 else f"{n} \u00d7 {text}" for text, n in Counter(texts).items())


def page(title: str, notes: Sequence[str], body: str, *, contents: Mapping[str, str] | None = None) -> str:
    """A whole page around the HTML `body`: heading, contents (id to heading), notes; empty ones are left out."""
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)
    links = "".join(f'<a href="#{escape(key)}">{escape(name)}</a>' for key, name in (contents or {}).items())
    nav = f'<nav aria-label="Contents">{links}</nav>' if links else ""
    script = f"<script>{_asset('templates/page.js')}</script>" if "sortable" in body else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('templates/style.css')}</style></head><body><h1>{escape(title)}</h1>"
        "<p class='small'>Scores on whole volumes in the scan's own geometry. Research software, not a medical device."
        f"</p>{nav}{warnings}{body}{script}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def section(key: str, heading: str, body: str) -> str:
    """A part of the page that the contents can lead to; nothing for an empty body, which is HTML."""
    return f'<section><h2 id="{escape(key)}">{escape(heading)}</h2>{body}</section>' if body else ""


def figure(caption: str, path: Path, *, alt: str = "", kind: str = "") -> str:
    """A picture and its caption, within the page.

    Args:
        caption: shown below.
        path: a PNG.
        alt: what the picture shows, for those who do not see it; default: the caption.
        kind: class of the figure, "overlay" for a wide one.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="{escape(kind)}"><img alt="{escape(alt or caption)}" src="data:image/png;base64,{data}">'
        f'<figcaption class="small">{escape(caption)}</figcaption></figure>'
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many decimals, "-" for an undefined one."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: Sequence[int] = (0,), kind: str = ""
) -> str:
    """A table of plain texts and numbers; columns of text are left-aligned, the others right-aligned."""

    def cell(tag: str, column: int, value: Any) -> str:
        return f"<{tag}{' class=text' if column in text_columns else ''}>{escape(str(value))}</{tag}>"

    heads = "".join(cell("th", k, name) for k, name in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", k, value) for k, value in enumerate(row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{escape(kind)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Key and value, a row each."""
    body = "".join(f"<tr><td>{escape(k)}</td><td class=text>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<div class='scroll'><table class='small'><tbody>{body}</tbody></table></div>"


_HEAD = {"label": " class=text", "Dice": " aria-sort='ascending'"}


def cases_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All cases and labels, the lowest Dice first; a reader may sort and filter it."""
    ranked = sorted(rows, key=lambda r: r["dice"])
    names = ("label", "Dice", "HD95 mm", "NSD", "true ml", "predicted ml", "error ml")
    head = "".join(f"<th{_HEAD.get(name, '')}>{name}</th>" for name in ("case", *names))
    body = "".join(
        f"<tr><td>{escape(str(r['case']))}</td><td class=text>{escape(str(r['label']))}</td>"
        f"<td>{number(r['dice'])}</td>"
        f"<td>{number(r['hd95_mm'], 2)}</td><td>{number(r['nsd'])}</td><td>{number(r['volume_truth_ml'], 2)}</td>"
        f"<td>{number(r['volume_predicted_ml'], 2)}</td>"
        f"<td>{number(r['volume_error_ml'], 2)}</td></tr>"
        for r in ranked[:ROWS_SHOWN]
    )
    more = f"<p class='small'>The worst {ROWS_SHOWN} of {len(rows)} rows.</p>" if len(rows) > ROWS_SHOWN else ""
    return (
        f"{more}<div class='tall' role='region' tabindex='0' aria-label='Scores per case and label'>"
        "<table class='sortable' data-choose='1' data-search='0'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
