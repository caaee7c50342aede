"""The look of all reports: one self-contained HTML page, no network. An evaluation's own is in `run_report`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--text:#1b1b1b;--back:#fff;--soft:#f4f4f4;--line:#ccc;--faint:#444;--note:#fff4d6}
@media(prefers-color-scheme:dark){:root{--text:#e8e8e8;--back:#16181b;--soft:#202328;--line:#444;--faint:#aaa;
--note:#3a3113}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:1080px;margin:0 auto;
padding:1rem}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1rem 0 .3rem}a{color:inherit}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid var(--faint)}
.numbers td{white-space:nowrap}
tbody tr:nth-child(even){background:var(--soft)}
img{max-width:100%;background:#fff;border-radius:4px}figure{margin:1rem 0}
.note{background:var(--note);border-left:5px solid #e69f00;padding:.6rem 1rem;margin:1rem 0}
.scroll{overflow-x:auto;margin:.6rem 0}.facts td{text-align:left;vertical-align:top}
.small{font-size:.85rem;color:var(--faint)}
.tall{max-height:30rem;overflow:auto}.tall thead th{position:sticky;top:0;background:var(--back)}
nav{font-size:.9rem}nav a{margin-right:1rem;white-space:nowrap}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid #0072b2}
th button::after{content:" \\2195";color:var(--faint)}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
"""
HOW_TO_READ = (
    "<h2 id='how-to-read-this'>How to read this</h2>"
    "<p class='small'>Dice: overlap, 1 is perfect. HD95: 95th percentile of the distance between the surfaces, mm. "
    "NSD: share of the surfaces within the tolerance of each other. Where truth and prediction are both empty, "
    "Dice and NSD are 1 and HD95 is 0; where only one is empty, Dice and NSD are 0 and HD95 is the volume's "
    "diagonal; undefined values are left out.</p>"
)
_SORT = """<script>
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => {
    const text = row.cells[k].textContent, number = parseFloat(text);
    return Number.isNaN(number) || row.cells[k].dataset.text !== undefined ? text : number;
  };
  heads.forEach((head, k) => head.querySelector('button').addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    heads.forEach((other) => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === 'number' ? -1 : 1);
    [...body.rows].map((row) => [value(row, k), row]).sort((a, b) => (up ? 1 : -1) * order(a[0], b[0]))
      .forEach(([, row]) => body.append(row));
  }));
  const choice = table.closest('section')?.querySelector('select.filter');
  choice?.addEventListener('change', () => {
    for (const row of body.rows) row.hidden = choice.value !== '' && row.dataset.label !== choice.value;
  });
}
</script>"""


def page(title: str, notes: Sequence[str], body: str) -> str:
    """A whole page around the HTML `body`: heading, then the notes; empty ones are left out."""
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        "<p>Scores on whole volumes in the scan's own geometry. Research software, not a medical device.</p>"
        f"{warnings}{body}{_SORT if 'sortable' in body else ''}</body></html>\n"
    )


def sections(parts: Mapping[str, str]) -> str:
    """Heading to HTML: the sections with a table of contents before them; empty ones are left out."""
    there = {title: (title.lower().replace(" ", "-").replace(",", ""), html) for title, html in parts.items() if html}
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for title, (anchor, _) in there.items())
    return f"<nav aria-label='Contents'>{links}</nav>" + "".join(
        f'<section><h2 id="{anchor}">{escape(title)}</h2>{html}</section>' for title, (anchor, html) in there.items()
    )


def figure(caption: str, path: Path) -> str:
    """A picture and its caption, within the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f'<figcaption class="small">{text}</figcaption></figure>'
    )


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A value as the tables show it; `-` for an undefined one."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, the first column to the left."""
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='numbers'><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cases_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All cases and labels, the lowest Dice first; sorted by a click on a column's name, and chosen by label."""
    names = ("case", "label", "Dice", "HD95 mm", "NSD", "sensitivity", "precision", "true ml", "predicted ml")
    head = "".join(
        f"<th scope='col'{' aria-sort=ascending' if name == 'Dice' else ''}><button>{name}</button></th>"
        for name in names
    )
    body = "".join(
        f'<tr data-label="{escape(str(r["label"]))}"><td data-text>{escape(str(r["case"]))}</td>'
        f"<td data-text>{escape(str(r['label']))}</td><td>{number(r['dice'])}</td>"
        f"<td>{number(r['hd95_mm'], 2)}</td><td>{number(r['nsd'])}</td><td>{number(r.get('sensitivity'))}</td>"
        f"<td>{number(r.get('precision'))}</td><td>{number(r['volume_truth_ml'], 2)}</td>"
        f"<td>{number(r['volume_predicted_ml'], 2)}</td></tr>"
        for r in sorted(rows, key=lambda r: r["dice"])
    )
    options = "".join(
        f'<option value="{escape(label)}">{escape(label)}</option>'
        for label in dict.fromkeys(str(r["label"]) for r in rows)
    )
    choice = f"<p><label>label <select class='filter'><option value=''>all</option>{options}</select></label></p>"
    return (
        f"{choice if options.count('<option') > 1 else ''}<div class='scroll tall' tabindex='0'>"
        f"<table class='sortable'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Key and value, a row each."""
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<div class='scroll'><table class='small facts'><tbody>{body}</tbody></table></div>"
