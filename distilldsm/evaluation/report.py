"""One self-contained HTML page of an evaluation: nothing is loaded, its script sorts a table and shows volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilldsm.evaluation import report_sections as parts
from distilldsm.evaluation.postprocess import Postprocessing
from distilldsm.report.old_page import HOW_TO_READ, cases_table, facts_table, figure, page, section


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page."""

    path: Path
    caption: str
    alt: str = ""
    """What it shows, for those who do not see it; default: the caption."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page is made of."""

    title: str
    notes: Sequence[str] = ()
    """What a reader must know before believing the numbers."""
    rows: Sequence[Mapping[str, Any]]
    """One per case and label."""
    summary: Mapping[str, Any]
    """Of `tables.summarise`."""
    intervals: Mapping[str, Any]
    """Of `tables.intervals`."""
    postprocessing: Postprocessing | None = None
    """What keeping only the largest component would give; None where it was not scored."""
    distributions: Sequence[Picture] = ()
    volumes: Sequence[Picture] = ()
    training: Sequence[Picture] = ()
    overlays: Sequence[Picture] = ()
    viewer: str = ""
    """HTML of `distilldsm.viewer`."""
    fingerprint: Mapping[str, Any] | None = None
    plan: Mapping[str, Any]
    validation: Mapping[str, Any] | None = None
    """Of the validate stage's report.json."""
    model: Mapping[str, Any]
    """Of model.json."""
    training_cost: Mapping[str, Any]
    prediction_cost: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, key to value."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters, dotted key to value."""


def render_report(report: Report) -> str:
    """The page."""
    labels = list(report.summary["labels"])
    sections = (
        ("overview", "Overview", "Overview", parts.overview(report.rows, report.summary, report.intervals)),
        ("scores", "Scores", "Scores", _scores(report)),
        ("pictures", "Pictures", "Worst, median and best cases", _overlays(report.overlays)),
        ("viewer", "Viewer", "Look at the volumes", report.viewer),
        ("cases", "Cases", "Cases, worst first", cases_table(report.rows)),
        ("volumes", "Volumes", "Volumes", _grid(report.volumes) + parts.agreement(report.rows, labels)),
        ("training", "Training", "Training", _grid(report.training)),
        ("data", "Data", "Data", parts.fingerprint_section(report.fingerprint, report.plan)),
        ("validation", "Validation", "Validation of the data", parts.validation_section(report.validation)),
        ("cost", "Cost", "Cost", parts.cost_section(report.model, report.prediction_cost, report.training_cost)),
        ("provenance", "Provenance", "Provenance", facts_table(report.facts) + _params(report.params)),
    )
    contents = {key: short for key, short, _, content in sections if content} | {"reading": "How to read"}
    body = "".join(section(key, heading, content) for key, _, heading, content in sections)
    return page(report.title, report.notes, body + HOW_TO_READ, contents=contents)


def _scores(report: Report) -> str:
    table = parts.scores(report.summary, report.intervals)
    return table + parts.largest_component(report.postprocessing) + _grid(report.distributions)


def _grid(pictures: Sequence[Picture]) -> str:
    shown = "".join(figure(one.caption, one.path, alt=one.alt) for one in pictures)
    return f"<div class='figures'>{shown}</div>" if shown else ""


def _overlays(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    shown = "".join(figure(one.caption, one.path, alt=one.alt, kind="overlay") for one in pictures)
    return (
        f"{shown}<p class='small'>Slices through the point around which most voxels are wrong (dotted lines), "
        "cropped to the structures. Full line: truth; dashed: prediction; yellow: they differ. Letters: left, right, "
        "anterior, posterior, superior, inferior of the patient, whose left is on the left; x, y, z in the scan's "
        "coordinates (RAS+).</p>"
    )


def _params(params: Mapping[str, Any]) -> str:
    return f"<details><summary>Parameters</summary>{facts_table(params)}</details>" if params else ""
