"""Drift findings as sentences, and as one page with a strip of points for each measure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from distilldsm.data.drift_measures import measures_of
from distilldsm.data.plan import Plan
from distilldsm.data.training_distribution import TrainingDistribution
from distilldsm.drift.compare import SET_SIZE, Reference, references
from distilldsm.report import page

WIDTH, MARGIN = 520, 8
"""Width and margin of a strip, in SVG units."""


def number(value: float, unit: str = "") -> str:
    return f"{value:.3g} {unit}".strip() if abs(value) < 1000 else f"{value:.0f} {unit}".strip()


def sentence(finding: Mapping[str, Any], measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A finding about one scan: its value, the range in training, the distance, and what it may mean."""
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
    """The result in one sentence."""
    trained, scans = report["trained_on"], report["scans"]
    out = [row["scan"] for row in scans if any(not o["undone"] for o in row["outside"])]
    together = sorted({f["measure"] for f in report["together"] if not f["undone"]})
    base = f"the {trained['cases']} training cases of {trained['data_set']}"
    if not scans:
        return "no scan could be compared"
    if not report["drift"]:
        extra = "" if len(scans) >= SET_SIZE else f"; with at least {SET_SIZE} scans, distributions are compared too"
        return f"{len(scans)} of {len(scans)} scans lie within {base}{extra}"
    parts = []
    if out:
        parts.append(f"{len(out)} of {len(scans)} scans lie outside {base}")
    if together:
        parts.append(f"together the scans differ from them in {len(together)} measures")
    return "drift: " + "; ".join(parts) + ". Check masks of such scans by eye before you trust them"


def render(report: Mapping[str, Any], distribution: TrainingDistribution, plan: Plan) -> str:
    """The HTML page of a report from `drift_of_files`."""
    measures = report["measures"]
    scans = [
        {
            "name": row["scan"],
            "mask": row["mask"],
            "outside": sum(not one["undone"] for one in row["outside"]),
            "findings": [{"text": sentence(one, measures), "undone": one["undone"]} for one in row["outside"]],
        }
        for row in report["scans"]
    ]
    return page.render(
        "drift.html",
        title=f"Drift against {report['model']}",
        report=report,
        verdict=verdict(report),
        trained_axes=", ".join(f"{n} {axes}" for axes, n in distribution.orientations.items()),
        together=[{"text": set_sentence(one, measures), "undone": one["undone"]} for one in report["together"]],
        scans=sorted(scans, key=lambda scan: -scan["outside"]),
        strips=[
            _strip(reference, [(row["scan"], row["values"].get(name)) for row in report["scans"]])
            for name, reference in references(distribution, measures_of(plan)).items()
        ],
        width=WIDTH,
        margin=MARGIN,
    )


def _strip(reference: Reference, scans: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """The points of one strip: training values and new values, scaled as the measure says, from 0 to WIDTH.

    Args:
        scans: name and value of each scan; the value is None if the scan has none.
    """
    m = reference.measure
    known = [(scan, value) for scan, value in scans if value is not None]
    new = [value for _, value in known]
    everything = [m.scaled(v) for v in (*reference.values, reference.low, reference.high, *new)]
    start, stop = min(everything), max(everything)

    def x(value: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (m.scaled(value) - start) / ((stop - start) or 1.0), 1)

    low, high = x(reference.low), x(reference.high)
    return {
        "group": m.group,
        "title": m.title + (f" ({m.unit})" if m.unit else ""),
        "undone": m.undone,
        "range": (low, max(round(high - low, 1), 1)),
        "training": [(x(value), _height(f"t{k}", 6)) for k, value in enumerate(reference.values)],
        "scans": [
            {
                "x": x(value),
                "y": _height(scan, 20),
                "outside": reference.outside(value),
                "text": f"{scan}: {number(value, m.unit)}",
            }
            for scan, value in known
        ],
        "ends": (number(m.unscaled(start)), number(m.unscaled(stop))),
    }


def _height(name: str, top: float) -> float:
    """A vertical position from `top` to 10 below it. It spreads the points and is the same in every run."""
    return round(top + hashlib.sha256(name.encode()).digest()[0] / 25.5, 1)
