"""Findings of drift in words, and as one self-contained HTML page with a strip plot per measure: no script."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distilldsm.data.plan import Plan
from distilldsm.drift.compare import SET_SIZE, Reference, references
from distilldsm.drift.fingerprint import TrainingFingerprint
from distilldsm.drift.measures import measures_of

WIDTH, HEIGHT, MARGIN = 520, 46, 8
_LIMITS = (
    "Not a medical device. Inside means that these numbers lie in the range of the training cases, no more: anatomy "
    "and pathology that no number here shows may differ. Measures that the model's preprocessing undoes are told and "
    "are no drift."
)
_STYLE = """
:root{color-scheme:light dark;--line:#8885;--in:#0072b2;--out:#d55e00;--train:#8889;--range:#0072b222}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.8rem 0 .4rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;font-size:.9rem}th,td{text-align:left;padding:.25rem .8rem .25rem 0;vertical-align:top}
th{border-bottom:1px solid var(--line)}.scroll{overflow-x:auto}.small{font-size:.85rem;opacity:.8}
.verdict{border-left:5px solid var(--in);padding:.5rem 1rem;margin:1rem 0}.verdict.drift{border-color:var(--out)}
.out{color:var(--out);font-weight:600}.undone{opacity:.7}
.strip{display:grid;grid-template-columns:17rem 1fr;align-items:center;gap:.2rem 1rem;
 border-bottom:1px solid var(--line)}
svg{width:100%;height:auto;max-width:40rem}svg text{font-size:9px;fill:currentColor;opacity:.75}
.t{fill:var(--train)}.i{fill:var(--in)}.o{fill:var(--out)}.r{fill:var(--range)}
@media(max-width:40rem){.strip{grid-template-columns:1fr}}
"""


def number(value: float, unit: str = "") -> str:
    return f"{value:.3g} {unit}".strip() if abs(value) < 1000 else f"{value:.0f} {unit}".strip()


def sentence(finding: Mapping[str, Any], measures: Mapping[str, Mapping[str, Any]]) -> str:
    """One scan's finding: what was seen, what the model was trained on, how far, what it may mean."""
    m = measures[finding["measure"]]
    unit = m["unit"]
    text = (
        f"{m['title']}: {number(finding['value'], unit)}, trained on {number(finding['low'])} to "
        f"{number(finding['high'], unit)} (median {number(finding['median'])}; z {finding['z']:+.1f}): "
    )
    return text + finding["meaning"] + (" (no drift)" if finding["undone"] else "")


def set_sentence(finding: Mapping[str, Any], measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A finding about all scans together."""
    m = measures[finding["measure"]]
    text = (
        f"all scans, {m['title']}: median {number(finding['median'], m['unit'])}, in training "
        f"{number(finding['training_median'], m['unit'])} (Kolmogorov-Smirnov D {finding['statistic']:.2f}, "
        f"corrected p {finding['p']:.2g}): "
    )
    return text + finding["meaning"] + (" (no drift)" if finding["undone"] else "")


def verdict(report: Mapping[str, Any]) -> str:
    """The whole in one sentence."""
    trained, scans = report["trained_on"], report["scans"]
    out = [row["scan"] for row in scans if any(not o["undone"] for o in row["outside"])]
    together = sorted({f["measure"] for f in report["together"] if not f["undone"]})
    base = f"the {trained['cases']} training cases of {trained['data_set']}"
    if not scans:
        return "no scan could be compared"
    if not report["drift"]:
        extra = "" if len(scans) >= SET_SIZE else f"; from {SET_SIZE} scans on, distributions are compared too"
        return f"{len(scans)} of {len(scans)} scans lie within {base}{extra}"
    parts = []
    if out:
        parts.append(f"{len(out)} of {len(scans)} scans lie outside {base}")
    if together:
        parts.append(f"together the scans differ from them in {len(together)} measures")
    return "drift: " + "; ".join(parts) + ". Check masks of such scans by eye before you trust them"


def render(report: Mapping[str, Any], fingerprint: TrainingFingerprint, plan: Plan) -> str:
    """The page of a report of `drift_of_files`."""
    known = references(fingerprint, measures_of(plan))
    measures = report["measures"]
    title = f"Drift against {report['model']}"
    trained = ", ".join(f"{n} {axes}" for axes, n in fingerprint.orientations.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='verdict{' drift' if report['drift'] else ''}'>{escape(verdict(report))}</p>",
        f"<p class='small'>{_LIMITS} Stored axes in training: {escape(trained)}; their order does not matter.</p>",
    ]
    if report["together"]:
        lines = "".join(
            f"<li class='{'undone' if f['undone'] else ''}'>{escape(set_sentence(f, measures))}</li>"
            for f in report["together"]
        )
        body.append(f"<h2>All scans together</h2><ul>{lines}</ul>")
    body += ["<h2>Scans</h2>", _table(report)]
    if report["failures"]:
        lines = "".join(f"<li>{escape(f['message'])}</li>" for f in report["failures"])
        body.append(f"<h2>Not compared</h2><ul>{lines}</ul>")
    body.append(
        "<h2>Measures</h2><p class='small'>Grey: training cases. Blue: new scans inside, orange: outside. "
        "Shaded: the range that counts as inside.</p>"
    )
    group = None
    for name, reference in known.items():
        if reference.measure.group != group:
            group = reference.measure.group
            body.append(f"<h3>{escape(group)}</h3>")
        body.append(_strip(reference, [(row["scan"], row["values"].get(name)) for row in report["scans"]]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(report: Mapping[str, Any]) -> str:
    rows = []
    for row in sorted(report["scans"], key=lambda r: -sum(not o["undone"] for o in r["outside"])):
        serious = sum(not o["undone"] for o in row["outside"])
        items = "".join(
            f"<li class='{'undone' if o['undone'] else ''}'>{escape(sentence(o, report['measures']))}</li>"
            for o in row["outside"]
        )
        state = f"<span class=out>outside in {serious}</span>" if serious else "inside"
        rows.append(
            f"<tr><td>{escape(row['scan'])}</td><td>{state}</td><td>{escape(row['mask'] or 'none')}</td>"
            f"<td>{f'<ul>{items}</ul>' if items else ''}</td></tr>"
        )
    head = "<tr><th>scan</th><th></th><th>mask</th><th>what is outside</th></tr>"
    return f"<div class='scroll'><table>{head}{''.join(rows)}</table></div>"


def _strip(reference: Reference, new: Sequence[tuple[str, float | None]]) -> str:
    """Training values and new ones as points along one axis, in the measure's own scale."""
    m = reference.measure
    values = [(scan, v) for scan, v in new if v is not None]
    everything = [m.scaled(v) for v in (*reference.values, reference.low, reference.high, *(v for _, v in values))]
    start, stop = min(everything), max(everything)

    def x(value: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (m.scaled(value) - start) / ((stop - start) or 1.0)

    dots = "".join(
        f"<circle class=t cx='{x(v):.1f}' cy='{6 + _jitter(f't{k}') * 10:.1f}' r='2'/>"
        for k, v in enumerate(reference.values)
    )
    for scan, value in values:
        kind = "o" if reference.outside(value) else "i"
        dots += (
            f"<circle class={kind} cx='{x(value):.1f}' cy='{20 + _jitter(scan) * 10:.1f}' r='2.6'>"
            f"<title>{escape(scan)}: {number(value, m.unit)}</title></circle>"
        )
    low, high = x(reference.low), x(reference.high)
    marks = "".join(
        f"<text x='{x(v):.1f}' y='{HEIGHT - 4}' text-anchor='{anchor}'>{number(v)}</text>"
        for v, anchor in ((m.unscaled(start), "start"), (m.unscaled(stop), "end"))
    )
    title = escape(m.title) + (f" ({escape(m.unit)})" if m.unit else "")
    note = "<br><span class='small'>undone by preprocessing</span>" if m.undone else ""
    return (
        f"<div class='strip'><div>{title}{note}</div><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{title}'><rect class=r x='{low:.1f}' y='2' width='{max(high - low, 1):.1f}' height='32'/>"
        f"{dots}{marks}</svg></div>"
    )


def _jitter(text: str) -> float:
    """A number from 0 to 1 that is the same in every run."""
    return hashlib.sha256(text.encode()).digest()[0] / 255
