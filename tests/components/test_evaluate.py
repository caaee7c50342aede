"""The evaluate stage: scores of known masks, resumed, in the scan's own geometry."""

from __future__ import annotations

import csv
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.components.evaluate import STAGE, run
from distilldsm.config import EvaluateConfig, ModelConfig, PreprocessConfig, TrackingConfig, TrainConfig
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import file_hashes
from distilldsm.core.output_directory import is_current
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.evaluation import scoring
from distilldsm.evaluation.postprocess import load_postprocessing
from distilldsm.inference.engines import TorchEngine
from distilldsm.inference.loading import load_trained
from distilldsm.io import read_scan
from tests.data.volumes import write_dataset
from tests.inference.engines import slanted


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    from distilldsm.components.train import run as train

    folder = tmp_path_factory.mktemp("evaluate")
    index = write_dataset(folder / "raw", cases=6)
    preprocess_dataset(folder / "raw", index, PreprocessConfig(folds=2, workers=1), folder / "preprocessed")
    config = TrainConfig(model=ModelConfig(name="distill_dsm", options={"width": 0.25}), epochs=1, batch_size=2)
    inputs = {"dataset": folder / "raw", "preprocessed": folder / "preprocessed", "model": folder / "model"}
    train(config, inputs, {"model": inputs["model"]}, fold=0, tracking=TrackingConfig(enabled=False))
    return inputs


class Oracle:
    """Predicts the truth, one voxel further along the first array axis."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.seen: list[str] = []

    def mask(self, scan) -> np.ndarray:
        label = self.dataset / "labelsTr" / scan.path.name.replace("_0000", "")
        return np.roll(np.asarray(nib.load(label).dataobj), 1, axis=0).astype(np.uint8)

    def predict(self, scan) -> SimpleNamespace:
        self.seen.append(scan.path.name)
        return SimpleNamespace(mask=self.mask(scan))


def without(page: str, *sections: str) -> str:
    """A report without the sections that hold times, or what names the place and time of a run."""
    for name in sections:
        page, many = re.subn(rf'<section><h2 id="{name}">.*?</section>', "", page, flags=re.DOTALL)
        assert many == 1, name
    return page


def test_scores_are_in_the_scans_geometry(trained, tmp_path, monkeypatch):
    before = file_hashes(trained["dataset"])
    monkeypatch.setattr(scoring, "_predictor", lambda *_: Oracle(trained["dataset"]))
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "e"}, fold=0)
    held_out = read_json(trained["preprocessed"] / "splits.json")["folds"][0]["held_out"]
    with open(tmp_path / "e" / "cases.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert {(r["case"], r["label"]) for r in rows} == {(c, label) for c in held_out for label in ("shell", "core")}
    # One voxel along the first array axis is 2 mm there.
    assert all(float(r["hd95_mm"]) == pytest.approx(2.0, abs=0.3) for r in rows)
    assert all(0.4 < float(r["dice"]) < 1 for r in rows)
    assert all(float(r["volume_error_ml"]) == 0 for r in rows)
    case = held_out[0]
    mask = nib.load(tmp_path / "e" / "predictions" / f"{case}.nii.gz")
    scan = nib.load(trained["dataset"] / "imagesTr" / f"{case}_0000.nii.gz")
    assert np.allclose(mask.affine, scan.affine)
    metrics = read_json(tmp_path / "e" / "metrics.json")
    dice = np.mean([float(r["dice"]) for r in rows])
    assert metrics["dice"]["mean"] == pytest.approx(dice, abs=1e-5)
    for name in ("report.html", "plots/confusion.csv", "plots/dice_by_epoch.csv", "figures/worst.png", "summary.json"):
        assert (tmp_path / "e" / name).is_file()
    assert not (tmp_path / "e" / "scores").exists()
    assert file_hashes(trained["dataset"]) == before
    # Ellipsoids and a shell have one component each: so the plan keeps the largest, and there is nothing to gain.
    decided = load_postprocessing(tmp_path / "e" / "postprocessing.json")
    assert (decided.kept, decided.cases, list(decided.labels)) == (("shell", "core"), len(held_out), ["shell", "core"])
    assert (tmp_path / "e" / "postprocessed.csv").read_text() == (tmp_path / "e" / "cases.csv").read_text()
    patients = {case.id: case.patient for case in DatasetIndex.load(trained["dataset"]).cases}
    with open(tmp_path / "e" / "cases.csv") as stream:
        assert all(row["patient"] == patients[row["case"]] for row in csv.DictReader(stream))


def test_specks_are_scored_with_and_without_and_stay_in_the_masks(trained, tmp_path, monkeypatch, capsys):
    class Specks(Oracle):
        def mask(self, scan):
            mask = super().mask(scan)
            core = mask == 2
            mask[:2, :2, :2] = 2  # in a corner, far from the ellipsoid
            assert core.sum() > 8
            return mask

    monkeypatch.setattr(scoring, "_predictor", lambda *_: Specks(trained["dataset"]))
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "specks"}, fold=0)
    monkeypatch.setattr(scoring, "_predictor", lambda *_: Oracle(trained["dataset"]))
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "clean"}, fold=0)
    decided = load_postprocessing(tmp_path / "specks" / "postprocessing.json")
    assert decided.kept == ("shell", "core")
    core = decided.labels["core"]
    assert core.dice_kept > core.dice_raw + 1e-4
    assert (core.cases_changed, decided.labels["shell"].cases_changed) == (3, 0)
    assert (
        "core, largest component only: by the plan: one component in nearly all cases; mean Dice +"
        in capsys.readouterr().out
    )
    page = (tmp_path / "specks" / "report.html").read_text()
    assert re.search(
        r"Largest component only</h3>.*core</td><td[^>]*>yes</td><td[^>]*>by the plan.*?mean Dice \+", page, re.DOTALL
    )
    table = {name: (tmp_path / name).read_text() for name in ("specks/cases.csv", "specks/postprocessed.csv")}
    assert table["specks/cases.csv"] != table["specks/postprocessed.csv"]
    assert table["specks/postprocessed.csv"] == (tmp_path / "clean" / "cases.csv").read_text()
    # Reported are the predictions as they are.
    summary = read_json(tmp_path / "specks" / "summary.json")
    assert summary["labels"]["core"]["dice"]["mean"] == pytest.approx(core.dice_raw)
    mask = nib.load(next((tmp_path / "specks" / "predictions").iterdir()))
    assert np.asarray(mask.dataobj)[0, 0, 0] == 2


def test_mirroring_is_for_models_that_were_trained_with_it(trained, tmp_path, monkeypatch):
    config = EvaluateConfig(mirror=True, workers=1)
    with pytest.raises(DataError, match=r"model: was not trained with mirroring"):
        run(config, trained, {"evaluation": tmp_path / "e"}, fold=0)
    model = Path(shutil.copytree(trained["model"], tmp_path / "model"))
    spec = read_json(model / "model.json")
    assert spec["mirror_axes"] == []
    write_json(model / "model.json", spec | {"mirror_axes": ["height", "depth"]})
    # So short a training sees background everywhere: no flip would show.
    monkeypatch.setattr(TorchEngine, "__call__", lambda self, image: slanted(image))
    run(config, trained | {"model": model}, {"evaluation": tmp_path / "e"}, fold=0)
    assert "averaged over mirrored views" in (tmp_path / "e" / "report.html").read_text()
    case = read_json(trained["preprocessed"] / "splits.json")["folds"][0]["held_out"][0]
    predictor = load_trained(model, device="cpu", mirror=("depth", "height"))
    scan = read_scan([trained["dataset"] / "imagesTr" / f"{case}_0000.nii.gz"], 1)
    found = np.asarray(nib.load(tmp_path / "e" / "predictions" / f"{case}.nii.gz").dataobj)
    np.testing.assert_array_equal(found, predictor.predict(scan).mask)
    assert (found != load_trained(model, device="cpu").predict(scan).mask).any()


def test_a_model_is_not_scored_on_what_it_was_trained_on(trained, tmp_path):
    with pytest.raises(DataError, match=r"model\.json: is the model of another fold(.|\n)*fold 0(.|\n)*fold 1"):
        run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "e"}, fold=1)
    index = DatasetIndex.load(trained["dataset"])
    other = tmp_path / "preprocessed"
    preprocess_dataset(trained["dataset"], index, PreprocessConfig(folds=2, workers=1, split_seed=3), other)
    with pytest.raises(DataError, match=r"model\.json: was trained on another split(.|\n)*train again"):
        run(EvaluateConfig(workers=1), trained | {"preprocessed": other}, {"evaluation": tmp_path / "e"}, fold=0)
    assert not (tmp_path / "e").exists()


def test_every_held_out_case_is_scored_or_none(trained, tmp_path):
    lost = read_json(trained["preprocessed"] / "splits.json")["folds"][0]["held_out"][0]
    dataset = Path(shutil.copytree(trained["dataset"], tmp_path / "raw"))
    index = DatasetIndex.load(dataset)
    index.subset({case.id for case in index.cases} - {lost}).save(dataset)
    with pytest.raises(DataError, match=rf"lacks 1 of the 3 held-out cases of fold 0(.|\n)*no {lost}"):
        run(EvaluateConfig(workers=1), trained | {"dataset": dataset}, {"evaluation": tmp_path / "e"}, fold=0)


def test_interrupted_evaluation_goes_on(trained, tmp_path, monkeypatch):
    oracle = Oracle(trained["dataset"])
    original = oracle.predict

    def dies(volume):
        if len(oracle.seen) == 2:
            raise KeyboardInterrupt
        return original(volume)

    monkeypatch.setattr(scoring, "_predictor", lambda *_: oracle)
    oracle.predict = dies
    with pytest.raises(KeyboardInterrupt) as caught:
        run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "e"}, fold=0)
    scored = len(list((tmp_path / ".e.partial" / "scores").iterdir()))
    assert caught.value.__notes__ == [f"evaluate: 2 of 3 cases are kept, {scored} of them scored"]
    assert not (tmp_path / "e").exists()
    oracle.predict = original
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "e"}, fold=0)
    assert len(oracle.seen) == len(set(oracle.seen)) == 3
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "whole"}, fold=0)
    resumed, whole = file_hashes(tmp_path / "e"), file_hashes(tmp_path / "whole")
    for name in ("timing.json", "report.html"):  # both hold times, which may differ or not
        del resumed[name], whole[name]
    assert resumed == whole
    pages = [without((tmp_path / name / "report.html").read_text(), "cost") for name in ("e", "whole")]
    assert pages[0] == pages[1]
    cases = read_json(tmp_path / "e" / "timing.json")["cases"]
    assert {f"{case}_0000.nii.gz" for case in cases} == set(oracle.seen), "those before the interruption count too"


def test_network_and_best_checkpoint(trained, tmp_path, capsys):
    config = EvaluateConfig(checkpoint="best", save_masks=False)
    run(config, trained, {"evaluation": tmp_path / "e"}, fold=0)
    assert "optimistic" in (tmp_path / "e" / "report.html").read_text()
    assert list((tmp_path / "e" / "predictions").iterdir()) == []
    assert "Ellipsoids, fold 0, 3 held-out cases" in capsys.readouterr().out


def test_what_validation_found_is_told_and_evaluates_anew(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_predictor", lambda *_: Oracle(trained["dataset"]))
    config = EvaluateConfig(workers=1)
    inputs = {**trained, "validation": tmp_path / "validation"}
    assert "no validation report" in evaluated(config, inputs, tmp_path / "e"), "the report need not be there"
    assert is_current(tmp_path / "e", **STAGE.key(config, trained, 0))
    counts = {"cases": 6, "patients": 6, "accepted": 6, "excluded": 0, "errors": 0, "warnings": 1}
    finding = {"severity": "warning", "rule": "sound_header", "case": "x7"}
    report = {"counts": counts, "suite": [], "findings": [finding], "excluded": {}}
    (tmp_path / "validation").mkdir()
    write_json(tmp_path / "validation" / "report.json", report)
    assert not is_current(tmp_path / "e", **STAGE.key(config, inputs, 0))
    page = evaluated(config, inputs, tmp_path / "e")
    assert "6 accepted, 0 excluded, 0 errors, 1 warning." in page
    assert "sound_header" in page
    assert is_current(tmp_path / "e", **STAGE.key(config, inputs, 0))
    write_json(tmp_path / "validation" / "report.json", report)  # the same again
    assert is_current(tmp_path / "e", **STAGE.key(config, inputs, 0))
    # The figures, viewed cases and provenance are there, and the intervals are where a machine can read them.
    assert set(re.findall(r'<h2 id="(\w+)"', page)) == {
        *("overview", "scores", "pictures", "viewer", "cases", "volumes", "training", "data", "validation", "cost"),
        *("provenance", "reading"),
    }
    assert page.count("data:image/png") == len(list((tmp_path / "e" / "figures").iterdir()))
    summary = read_json(tmp_path / "e" / "summary.json")
    low, high = summary["intervals"]["mean"]["dice"]
    assert low < summary["mean"]["dice"] < high
    assert f"95 % interval {low:.3f} to {high:.3f}" in page


def evaluated(config: EvaluateConfig, inputs: dict[str, Path], output: Path) -> str:
    run(config, inputs, {"evaluation": output}, fold=0)
    return (output / "report.html").read_text()


def test_what_predictions_take_is_measured(trained, tmp_path, monkeypatch):
    oracle = Oracle(trained["dataset"])
    original = oracle.predict
    slowness = iter([0.5, 0.0, 0.0])
    oracle.predict = lambda volume: time.sleep(next(slowness)) or original(volume)
    monkeypatch.setattr(scoring, "_predictor", lambda *_: oracle)
    run(EvaluateConfig(workers=1), trained, {"evaluation": tmp_path / "e"}, fold=0)
    timing = read_json(tmp_path / "e" / "timing.json")
    assert len(timing["cases"]) == 3
    assert 0 < timing["seconds_per_volume"] < 0.5 <= timing["seconds"]
    assert 0.05 < timing["peak_memory_gb"] < 100
    assert timing["device_name"]
    assert timing["training"] == read_json(trained["model"] / "cost.json")
    assert not (tmp_path / "e" / "timing").exists()


def test_missing_model_is_an_error(trained, tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("{}")
    arguments = ["--params", str(tmp_path / "params.yaml"), "--dataset", str(trained["dataset"])]
    arguments += ["--preprocessed", str(trained["preprocessed"]), "--output", str(tmp_path / "e")]
    assert main(["evaluate", *arguments, "--model", str(tmp_path / "none")]) == 1
    assert "none/model.json: is missing" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
