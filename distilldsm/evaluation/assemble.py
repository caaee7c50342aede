"""Gathers what the page of an evaluation shows: figures, the cases of its viewer, what earlier stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm import cost
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.data.volume import read_image, read_label
from distilldsm.evaluation import figures
from distilldsm.evaluation.overlays import overlay
from distilldsm.evaluation.run_report import RunReport, render_run_report
from distilldsm.stage import MANIFEST, read_json

WORST = 3
"""Cases of the lowest Dice that are drawn, besides the median and the best."""
VIEWED_VOXELS = 2_000_000
"""Of a volume in the viewer. Noise does not compress: four cases of so many bytes are about 11 MB in the page."""
VIEWED_CASES = 4


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things lie."""

    work: Path
    """Of the evaluation, with `predictions/`."""
    dataset: Path
    preprocessed: Path
    model: Path

    @property
    def validation(self) -> Path:
        """Report of the validation, where the stages run side by side; elsewhere nothing lies there."""
        return self.dataset.parent / "validation" / "report.json"


def write_page(
    places: Places,
    index: DatasetIndex,
    cases: Sequence[Case],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    summary: Mapping[str, Any],
    labels: Sequence[str],
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Draw `figures/` and write `report.html` into the evaluation's directory."""
    history = read_json(places.model / "history.json")
    folder = places.work / "figures"
    figures.save_figure(figures.dice_boxes(rows, labels), folder / "dice.png")
    figures.save_figure(figures.training_curves(history), folder / "training.png")
    figures.save_figure(figures.volume_agreement(rows, labels), folder / "volumes.png")
    chosen = choose(cases, rows)
    fingerprint = places.preprocessed / "fingerprint.json"
    report = RunReport(
        title=title,
        summary=summary,
        rows=rows,
        notes=notes,
        scores=[("Dice and HD95 per label, a point a case", folder / "dice.png")],
        cases=[_draw(places, index, case, kind, text) for kind, (case, text) in chosen.items()],
        volumes=[("Volumes: predicted and true, their difference, Dice by volume", folder / "volumes.png")],
        training=[("Training", folder / "training.png")],
        viewer=_viewer(places, index, list(chosen.values())),
        fingerprint=read_json(fingerprint) if fingerprint.is_file() else {},
        plan=read_json(places.model / "plan.json"),
        validation=read_json(places.validation) if places.validation.is_file() else None,
        timing={**cost.prediction_cost(places.work / "timing"), "training": cost.training_cost(places.model)},
        facts=facts,
        parameters=_parameters(places),
    )
    (places.work / "report.html").write_text(render_run_report(report), encoding="utf-8")


def _parameters(places: Places) -> dict[str, Any]:
    """Of the stages before, as their manifests tell."""
    found = {}
    for section, folder in (("download", places.dataset), ("preprocess", places.preprocessed), ("train", places.model)):
        if (folder / MANIFEST).is_file():
            found[section] = read_json(folder / MANIFEST).get("config")
    return found


def choose(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Case, str]]:
    """The worst cases, the median and the best by mean Dice over the labels: name of the figure to case and caption."""
    mean = {c.id: float(np.mean([r["dice"] for r in rows if r["case"] == c.id])) for c in cases}
    ranked = sorted(cases, key=lambda c: mean[c.id])
    picked = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    between = ranked[1 : min(WORST, len(ranked) // 2)]
    picked |= {f"worst{k}": case for k, case in enumerate(between, start=2)}
    names = {"worst": "worst case", "median": "median case", "best": "best case", "worst2": "second worst case"}
    order = sorted(picked, key=lambda kind: (mean[picked[kind].id], kind != "worst"))
    return {
        kind: (
            picked[kind],
            f"{names.get(kind, 'third worst case')}: {picked[kind].id}, mean Dice {mean[picked[kind].id]:.4f}",
        )
        for kind in order
    }


def _draw(places: Places, index: DatasetIndex, case: Case, kind: str, text: str) -> tuple[str, Path]:
    volume = read_image([places.dataset / p for p in case.images], len(index.channels))
    truth, _ = read_label(places.dataset / case.label)
    mask, _ = read_label(places.work / "predictions" / f"{case.id}.nii.gz")
    bad = kind.startswith("worst")
    where = "slices with the largest error" if bad else "slices through the middle of the structures"
    picture = overlay(volume.data[0], truth, mask, volume.affine, labels=index.labels, title=text, at_error=bad)
    path = places.work / "figures" / f"{kind}.png"
    figures.save_figure(picture, path)
    return f"{text}; {where}", path


def _viewer(places: Places, index: DatasetIndex, chosen: Sequence[tuple[Case, str]]) -> str:
    from distilldsm.viewer import ViewedCase, packed, viewer_fragment

    viewed: dict[str, ViewedCase] = {}
    # The worst two, and from the other end the best and the median.
    for case, text in [*chosen[:2], *chosen[-2:]][:VIEWED_CASES]:
        if case.id in viewed:
            continue
        volume = read_image([places.dataset / p for p in case.images], len(index.channels))
        masks = (
            read_label(path)[0]
            for path in (places.dataset / case.label, places.work / "predictions" / f"{case.id}.nii.gz")
        )
        truth, prediction = (packed(m, volume.affine, is_label=True, max_voxels=VIEWED_VOXELS) for m in masks)
        image = packed(volume.data[0], volume.affine, is_label=False, max_voxels=VIEWED_VOXELS)
        viewed[case.id] = ViewedCase(name=case.id, caption=text, image=image, truth=truth, prediction=prediction)
    return viewer_fragment(list(viewed.values()), index.labels)
