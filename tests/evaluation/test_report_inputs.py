"""What the page of an evaluation shows of the files that it is made from."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from distilldsm.config import EvaluateConfig
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import score_case
from distilldsm.evaluation.report import Evaluation, optional_inputs, write_report
from distilldsm.report import figures

LABELS = {"background": 0, "outer": 1, "inner": 2}
CASES = ("c0", "c1", "c2", "c3")
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


@pytest.fixture
def work(tmp_path) -> Path:
    folder = tmp_path / "work"
    (folder / "predictions").mkdir(parents=True)
    return folder


@pytest.fixture
def evaluation(tmp_path, work) -> Evaluation:
    """Four cubes in cubes; the prediction of case k is k voxels too far along the first axis."""
    inputs = {name: tmp_path / name for name in ("dataset", "preprocessed", "model")}
    for folder in inputs.values():
        folder.mkdir()
    truth = np.zeros((20, 16, 12), dtype=np.uint8)
    truth[3:11, 3:11, 2:8], truth[5:9, 5:9, 4:6] = 1, 2
    rows = []
    for k, name in enumerate(CASES):
        prediction = np.roll(truth, k, axis=0)
        nib.save(nib.Nifti1Image(truth.astype(np.float32) + k, AFFINE), inputs["dataset"] / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(truth, AFFINE), inputs["dataset"] / f"{name}_label.nii.gz")
        nib.save(nib.Nifti1Image(prediction, AFFINE), work / "predictions" / f"{name}.nii.gz")
        scored = score_case(truth, prediction, spacing_mm=(1, 1, 2), labels=LABELS)
        rows += [{"case": name, "patient": name, **row} for row in scored]
    history = [{"epoch": k, "train_loss": 1 / k, "learning_rate": 0.1, "val_dice": {"outer": 0.5}} for k in (1, 2)]
    write_json(inputs["model"] / "history.json", history)
    network = {"name": "unet2d", "options": {"width": 0.5}, "parameters": 7654321, "macs_per_voxel": 12.0, "epochs": 2}
    write_json(inputs["model"] / "model.json", network)
    write_json(inputs["model"] / "manifest.json", {"files": {}, "config": {"model": {"name": "unet2d"}, "seed": None}})
    channels, rule = [{"name": "T1", "modality": "MRI"}], [{"scheme": "zscore"}]
    plan = {"depth_axis": "z", "target_spacing_mm": [2, 1, 1], "patch_size": [16, 32, 48], "batch_size": 3}
    write_json(inputs["model"] / "plan.json", {**plan, "channels": channels, "normalisation": rule})
    index = DatasetIndex(
        name="Cubes",
        channels=(Channel(name="T1", modality="MRI"),),
        labels=LABELS,
        cases=tuple(Case(id=n, patient=n, images=(f"{n}.nii.gz",), label=f"{n}_label.nii.gz") for n in CASES),
        note="made by a test",
        licence="CC0",
    )
    labels = ["outer", "inner"]
    return Evaluation(
        config=EvaluateConfig(nsd_tolerance_mm=1.5),
        inputs=inputs,
        index=index,
        cases=index.cases,
        fold=3,
        labels=labels,
        rows=rows,
        summary=tables.summarise(rows, labels),
        intervals=tables.intervals(rows, labels),
        prediction_cost={},
        training_cost={"seconds": 12.0},
    )


def text_of(page: Path) -> str:
    """The page's words, without its tags, styles and scripts."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_page_tells_cases_numbers_and_where_they_come_from(work, evaluation, monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "kfp-7")
    write_json(evaluation.inputs["model"] / "tracking.json", {"run": {"id": "run-5"}})
    write_report(work, evaluation)
    text = text_of(work / "report.html")
    dice = {case: np.mean([row["dice"] for row in evaluation.rows if row["case"] == case]) for case in CASES}
    assert dice["c0"] == 1.0 > dice["c1"] > dice["c2"] > dice["c3"]
    hd95 = max(row["hd95_mm"] for row in evaluation.rows if row["case"] == "c3")
    inner, outer = (evaluation.summary["labels"][label]["dice"]["worst"] for label in ("inner", "outer"))
    parts = f"(inner {inner:.3f}, outer {outer:.3f}), largest HD95 {hd95:.1f} mm"
    for words in (
        "Cubes, unet2d (width=0.5), fold 3",
        "made by a test",
        f"Worst case: c3, mean Dice {dice['c3']:.3f} {parts}",
        f"Second worst case: c2, mean Dice {dice['c2']:.3f}",
        f"Best case: c0, mean Dice {dice['c0']:.3f}",
        f"Dice of {len(CASES)} cases.",
        "within 1.5 mm of each other",
        "7,654,321 parameters",
        "MLflow run run-5",
        "Kubeflow run kfp-7",
        "licence of the data CC0",
        content_hash(evaluation.inputs["model"])[:16],
        "train.model.name unet2d",
        "train.seed -",
        "evaluate.nsd_tolerance_mm 1.5",
        "had no validation report",
    ):
        assert words in text, words
    assert "optimistic" not in text
    assert "mirrored" not in text
    assert {path.stem for path in (work / "figures").iterdir()} == {
        *("dice", "hd95", "nsd", "volumes", "volume_differences", "dice_by_volume"),
        *("training_loss", "training_dice", "learning_rate", "worst", "worst2", "median", "best"),
    }


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Figure]:
    """The figures that are saved, by name."""
    found: dict[str, Figure] = {}
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: save(found.setdefault(path.stem, figure), path))
    return found


def test_notes_say_what_makes_scores_optimistic_or_others(work, evaluation, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "model.json", {**read_json(evaluation.inputs["model"] / "model.json"), "name": "unet3d"})
    config = EvaluateConfig(checkpoint="best", mirror=True)
    cost = {"parameters": 99, "macs_per_voxel": 3.0}
    write_report(work, replace(evaluation, config=config, ensemble=[other], training_cost=cost))
    text = text_of(work / "report.html")
    for words in (
        "The checkpoint was chosen on these same cases, so the scores are optimistic.",
        "The scored predictions are averaged over mirrored views.",
        "Predictions are the average of 2 networks",
        "99 parameters",
        "unet2d (width=0.5) + unet3d (width=0.5)",
        "MLflow run none",
    ):
        assert words in text, words


def test_figures_show_the_rows(work, evaluation, drawn):
    """The limits are those of Bland and Altman; what is undefined is no point."""
    errors = {"c0": 1.0, "c1": -1.0, "c2": 3.0, "c3": 1.0}
    changed = [row | {"volume_predicted_ml": row["volume_truth_ml"] + errors[row["case"]]} for row in evaluation.rows]
    changed[0]["nsd"] = None
    history = read_json(evaluation.inputs["model"] / "history.json")
    history[1] |= {"learning_rate": None, "val_dice": {"outer": 0.4, "inner": None}}
    write_json(evaluation.inputs["model"] / "history.json", history)
    write_report(work, replace(evaluation, rows=changed))
    axes = {name: figure.axes[0] for name, figure in drawn.items()}

    def points(name: str, place: int) -> list[tuple[float, float]]:
        return [tuple(point) for point in axes[name].collections[place].get_offsets()]

    of = [[row for row in changed if row["label"] == label] for label in ("outer", "inner")]
    for metric, title in {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD (1.5 mm)"}.items():
        name = metric.removesuffix("_mm")
        assert axes[name].get_xlabel() == title
        for place in (0, 1):
            expected = [row[metric] for row in of[place] if row[metric] is not None]
            assert [x for x, _ in points(name, place)] == pytest.approx(expected)
    for place in (0, 1):
        volumes = [(row["volume_truth_ml"], row["volume_predicted_ml"], row["dice"]) for row in of[place]]
        assert points("volumes", place) == [(t, p) for t, p, _ in volumes]
        assert points("dice_by_volume", place) == [(t, dice) for t, _, dice in volumes]
        assert points("volume_differences", place) == [((t + p) / 2, p - t) for t, p, _ in volumes]
    assert len(axes["volumes"].lines) == 1, "where both volumes are equal"
    heights = [line.get_ydata()[0] for line in axes["volume_differences"].lines]
    spread = 1.96 * (8 / 3) ** 0.5
    assert heights == pytest.approx([0] + [1 - spread, 1, 1 + spread] * 2)
    curves = {name: [line.get_xydata().tolist() for line in axes[name].lines] for name in axes if "_" in name}
    assert curves["training_loss"] == [[[1, 1.0], [2, 0.5]]]
    assert curves["learning_rate"] == [[[1, 0.1]]]
    assert curves["training_dice"][0] == [[1, 0.5], [2, 0.4]]
    assert np.isnan(curves["training_dice"][1][0][1])
    assert drawn["worst"].axes


def test_what_may_be_missing(evaluation, tmp_path):
    assert optional_inputs(evaluation.inputs) == {}
    inputs = {**evaluation.inputs, "validation": tmp_path / "validation"}
    assert optional_inputs(inputs) == {}
    (tmp_path / "validation").mkdir()
    for path in (tmp_path / "validation" / "report.json", inputs["preprocessed"] / "fingerprint.json"):
        path.write_text("{}")
    assert set(optional_inputs(inputs)) == {"validation", "fingerprint"}
