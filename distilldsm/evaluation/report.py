"""The page of an evaluation in one file: figures, pictures and volumes of some cases, facts about data and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distilldsm.config import EvaluateConfig
from distilldsm.core.files import read_json
from distilldsm.core.hashes import MANIFEST, content_hash, package_versions
from distilldsm.core.mapping import flatten
from distilldsm.core.provenance import provenance
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.evaluation import report_sections as sections
from distilldsm.evaluation.metrics import Metric, main_metrics
from distilldsm.evaluation.postprocess import Postprocessing
from distilldsm.io import read_labels, read_scan
from distilldsm.report import figures
from distilldsm.report.overlays import overlay
from distilldsm.report.page import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWER_BYTES = 8_000_000
"""Limit for the volumes of all viewed cases, as base64, so that the page stays below 15 MB."""
VIEWED = ("worst", "second worst", "median", "best")
_START_VOXELS = 2_000_000
_FEWEST_VOXELS = 1000

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation that the page shows; names as in the stage."""

    config: EvaluateConfig
    inputs: Mapping[str, Path]
    ensemble: Sequence[Path] = ()
    """Further models of the ensemble; probabilities are averaged with those of `inputs["model"]`."""
    index: DatasetIndex
    cases: Sequence[Case]
    fold: int
    labels: Sequence[str]
    """The scored labels or regions."""
    rows: Rows
    summary: Mapping[str, Any]
    intervals: Mapping[str, Any]
    postprocessing: Postprocessing | None = None
    prediction_cost: Mapping[str, Any]
    training_cost: Mapping[str, Any]


def optional_inputs(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """The existing ones of the page's optional inputs: the validation report and the fingerprint."""
    paths = {"fingerprint": inputs["preprocessed"] / "fingerprint.json"}
    if "validation" in inputs:
        paths["validation"] = inputs["validation"] / "report.json"
    return {name: path for name, path in paths.items() if path.is_file()}


def write_report(work: Path, evaluation: Evaluation) -> None:
    """Write `report.html` and `figures/`; `work` holds the predicted masks."""
    (work / "report.html").write_text(render("evaluation.html", **page_contents(work, evaluation)), encoding="utf-8")


def page_contents(work: Path, evaluation: Evaluation) -> dict[str, Any]:
    """The variables of the template evaluation.html. This also writes the figures."""
    model = read_json(evaluation.inputs["model"] / "model.json")
    if evaluation.ensemble:
        model |= {key: evaluation.training_cost[key] for key in ("parameters", "macs_per_voxel")}
    optional = {name: read_json(path) for name, path in optional_inputs(evaluation.inputs).items()}
    overlays, viewer = _look_at_cases(work, evaluation)
    facts = _facts(evaluation, model)
    return {
        "title": f"{evaluation.index.name}, {facts['network']}, fold {evaluation.fold}",
        "notes": _notes(evaluation),
        "overview": sections.overview(evaluation.rows, evaluation.summary, evaluation.intervals),
        "scores": sections.score_lines(evaluation.summary, evaluation.intervals),
        "largest": sections.largest_component(evaluation.postprocessing),
        "figures": _draw(work / "figures", evaluation),
        "distributions": {_file_name(metric): metric.heading for metric in main_metrics()},
        "tolerance_mm": evaluation.config.nsd_tolerance_mm,
        "overlays": overlays,
        "viewer": viewer,
        "cases": sections.case_lines(evaluation.rows),
        "agreement": sections.agreement_lines(evaluation.rows, evaluation.labels),
        "data": sections.data_lines(optional.get("fingerprint")),
        "plan": sections.plan_facts(read_json(evaluation.inputs["model"] / "plan.json")),
        "validation": sections.validation_lines(optional.get("validation")),
        "next_steps": sections.next_steps(read_json(evaluation.inputs["model"] / "history.json")),
        "model": model,
        "cost": sections.cost_lines(evaluation.prediction_cost, evaluation.training_cost),
        "provenance": facts,
        "params": _params(evaluation),
    }


def _notes(evaluation: Evaluation) -> list[str]:
    notes = [evaluation.index.note]
    if evaluation.config.checkpoint == "best":
        notes.append("The checkpoint was chosen on these same cases, so the scores are optimistic.")
    if evaluation.config.mirror:
        notes.append("The scored predictions are averaged over mirrored views.")
    if evaluation.ensemble:
        count = 1 + len(evaluation.ensemble)
        notes.append(f"Predictions are the average of {count} networks. Plan, curves, parameters are of the first one.")
    return notes


def choose_cases(rows: Rows) -> dict[str, str]:
    """Kind (worst, second worst, third worst, median, best) to case, by mean Dice; each case once."""
    ranked = list(sections.mean_dice(rows))
    places = {"worst": 0, "best": -1, "median": len(ranked) // 2, "second worst": 1, "third worst": 2}
    chosen: dict[str, str] = {}
    for kind, place in places.items():
        if place < len(ranked) and ranked[place] not in chosen.values():
            chosen[kind] = ranked[place]
    order = ("worst", "second worst", "third worst", "median", "best")
    return {kind: chosen[kind] for kind in order if kind in chosen}


def _look_at_cases(work: Path, evaluation: Evaluation) -> tuple[list[tuple[Path, str, str]], dict[str, Any]]:
    """Overlays of the chosen cases (picture, caption, description), and the viewer's contents for some of them."""
    from distilldsm.report.viewer import ViewedCase, viewer_contents

    names = {"second worst": "worst2", "third worst": "worst3"}
    cases = {case.id: case for case in evaluation.cases}
    chosen = choose_cases(evaluation.rows)
    in_viewer = [kind for kind in VIEWED if kind in chosen]
    pictures, viewed = [], []
    for kind, id_ in chosen.items():
        case, dataset = cases[id_], evaluation.inputs["dataset"]
        scan = read_scan([dataset / p for p in case.images], len(evaluation.index.channels))
        image = scan.channels[0].values(scan.channels[0].raw)
        truth = read_labels(dataset / case.label).values
        mask = read_labels(work / "predictions" / f"{case.id}.nii.gz").values
        caption = f"{kind} case: {_caption(id_, evaluation)}"
        path = work / "figures" / f"{names.get(kind, kind)}.png"
        figure = overlay(image, truth, mask, affine=scan.affine, labels=evaluation.index.labels)
        figures.save_figure(figure, path)
        alt = f"Three planes of {id_} with the outlines of truth and prediction. {caption}"
        pictures.append((path, caption[0].upper() + caption[1:], alt))
        if kind in in_viewer:
            small = fitted(image, truth, mask, scan.affine, VIEWER_BYTES // len(in_viewer))
            parts = dict(zip(("image", "truth", "prediction"), small, strict=True))
            viewed.append(ViewedCase(name=f"{kind}: {id_}", caption=caption, **parts))
    return pictures, viewer_contents(viewed, evaluation.index.labels)


def fitted(
    image: npt.NDArray[np.floating],
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    affine: npt.NDArray[np.floating],
    max_bytes: int,
) -> tuple[bytes, bytes, bytes]:
    """The three volumes (X, Y, Z) for the viewer, thinned out until their base64 has at most `max_bytes`."""
    from distilldsm.report.viewer import packed

    voxels = min(_START_VOXELS, image.size)
    while True:
        made = (
            packed(image, affine, is_label=False, max_voxels=voxels),
            packed(truth, affine, is_label=True, max_voxels=voxels),
            packed(prediction, affine, is_label=True, max_voxels=voxels),
        )
        size = sum(len(one) for one in made) * 4 / 3
        if size <= max_bytes or voxels <= _FEWEST_VOXELS:
            return made
        voxels = max(_FEWEST_VOXELS, int(0.9 * voxels * max_bytes / size))


def _caption(case: str, evaluation: Evaluation) -> str:
    rows = [row for row in evaluation.rows if row["case"] == case]
    mean = np.mean([row["dice"] for row in rows])
    text = f"{case}, mean Dice {mean:.3f}"
    shown = sorted(rows, key=lambda row: row["dice"])[:6]
    if len(rows) > 1:
        names = [f"{row['label']} {row['dice']:.3f}" for row in shown]
        text += f" ({', '.join([*names, '...'] if len(rows) > len(shown) else names)})"
    return f"{text}, largest HD95 {max(row['hd95_mm'] for row in rows):.1f} mm"


def _draw(folder: Path, evaluation: Evaluation) -> dict[str, Path]:
    """All figures except the overlays: name to PNG."""
    history = read_json(evaluation.inputs["model"] / "history.json")
    drawn = _distributions(evaluation) | _volume_plots(evaluation.rows, evaluation.labels) | _training_plots(history)
    for name, figure in drawn.items():
        figures.save_figure(figure, folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in drawn}


def _file_name(metric: Metric) -> str:
    return metric.name.removesuffix("_mm")


def _distributions(evaluation: Evaluation) -> dict[str, Figure]:
    """Box plots of each main metric with the scores of all cases."""
    drawn = {}
    for metric in main_metrics():
        values = {
            label: [r[metric.name] for r in evaluation.rows if r["label"] == label and r[metric.name] is not None]
            for label in evaluation.labels
        }
        unit = f"{evaluation.config.nsd_tolerance_mm:g} mm" if metric.name == "nsd" else metric.unit
        title = f"{metric.title} ({unit})" if unit else metric.title
        drawn[_file_name(metric)] = figures.score_boxes(values, title)
    return drawn


def _volume_plots(rows: Rows, labels: Sequence[str]) -> dict[str, Figure]:
    """Plots of predicted volume and of Dice against true volume, ml."""
    of = {label: [row for row in rows if row["label"] == label] for label in labels}
    volumes = {label: [(r["volume_truth_ml"], r["volume_predicted_ml"]) for r in of[label]] for label in labels}
    by_volume = {label: [(r["volume_truth_ml"], r["dice"]) for r in of[label]] for label in labels}
    differences = {label: [((t + p) / 2, p - t) for t, p in volumes[label]] for label in labels}
    limits = {label: (one.low, one.bias, one.high) for label, one in sections.volume_agreement(rows, labels).items()}
    titles = ("mean of true and predicted volume (ml)", "predicted minus true (ml)")
    return {
        "volume_differences": figures.scatter(differences, *titles, limits=limits),
        "volumes": figures.scatter(volumes, "true volume (ml)", "predicted volume (ml)", diagonal=True),
        "dice_by_volume": figures.scatter(by_volume, "true volume (ml)", "Dice"),
    }


def _training_plots(history: Rows) -> dict[str, Figure]:
    """Plots of the values of each training epoch."""
    loss = [(entry["epoch"], entry["train_loss"]) for entry in history]
    rate = [(entry["epoch"], entry["learning_rate"]) for entry in history if entry.get("learning_rate") is not None]
    dice: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for label, value in entry.get("val_dice", {}).items():
            dice.setdefault(label, []).append((entry["epoch"], np.nan if value is None else value))
    return {
        "training_loss": figures.over_epochs({"": loss}, "training loss"),
        "training_dice": figures.over_epochs(dice, "Dice of held-out volumes"),
        "learning_rate": figures.over_epochs({"": rate}, "learning rate", from_zero=True),
    }


def _facts(evaluation: Evaluation, model: Mapping[str, Any]) -> dict[str, Any]:
    index, inputs = evaluation.index, evaluation.inputs
    source = provenance()
    commit = source.get("git_commit", "not known")
    recorded = inputs["model"] / "tracking.json"
    others = [read_json(folder / "model.json") for folder in evaluation.ensemble]
    run = (read_json(recorded).get("run") or {}).get("id") if recorded.is_file() else None
    return {
        "network": sections.networks_named([model, *others]),
        "epochs": model["epochs"],
        "checkpoint": evaluation.config.checkpoint,
        "fold": evaluation.fold,
        "NSD tolerance": f"{evaluation.config.nsd_tolerance_mm:g} mm",
        "data set": index.name,
        "source": index.source,
        "licence of the data": index.licence,
        "reference": index.reference,
        "data hash": content_hash(inputs["dataset"])[:16],
        "model hash": ", ".join(content_hash(folder)[:16] for folder in (inputs["model"], *evaluation.ensemble)),
        "git commit": commit + (", changed since" if source.get("git_dirty") == "true" else ""),
        "MLflow run": run or "none",
        **({"Kubeflow run": source["kfp_run_id"]} if "kfp_run_id" in source else {}),
        "versions": ", ".join(f"{k} {v}" for k, v in package_versions().items()),
    }


def _params(evaluation: Evaluation) -> dict[str, Any]:
    """The parameters of the training (from its manifest) and of the evaluation."""
    manifest = evaluation.inputs["model"] / MANIFEST
    train = read_json(manifest).get("config", {}) if manifest.is_file() else {}
    flat = flatten({"train": train, "evaluate": asdict(evaluation.config)})
    return {key: "-" if value is None else value for key, value in flat.items()}
