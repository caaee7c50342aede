"""The whole DVC pipeline on a tiny data set, in a clone of its own, as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import pytest
import yaml

from distilldsm.cli.main import main
from tests.dvc_run import NOTHING_TO_DO, run, tutorial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """After `dvc repro`."""
    return tutorial(tmp_path_factory) / "clone"


def stages_that_ran(text: str) -> list[str]:
    return sorted(line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage"))


def test_every_output_is_there(clone: Path):
    for name in (
        "data/validation/report.html",
        "data/preprocessed/plan.json",
        "models/fold0/last.safetensors",
        "evaluation/fold0/metrics.json",
        "evaluation/fold0/postprocessed.csv",
        "evaluation/fold0/postprocessing.json",
        "evaluation/fold0/report.html",
        "evaluation/fold0/plots/history.csv",
        "export/fold0/model.onnx",
        "export/fold0/model.xml",
        "export/fold0/metadata.json",
        "cross_validation/report.html",
        "dvc.lock",
        "mlflow.db",
    ):
        assert (clone / name).is_file(), name
    with open(clone / "evaluation/fold0/cases.csv") as stream:
        rows = list(csv.DictReader(stream))
    held_out = json.loads((clone / "data/preprocessed/splits.json").read_text())["folds"][0]["held_out"]
    assert {row["case"] for row in rows} == set(held_out)
    assert not list(clone.rglob("*.partial"))


def test_all_that_a_stage_writes_goes_with_dvc_push(clone: Path):
    """Else `dvc pull` in another clone brings models that lack files."""
    stages = yaml.safe_load((clone / "dvc.lock").read_text())["stages"].values()
    outs = {clone / out["path"] for stage in stages for out in stage["outs"]}
    for name in ("data/validation", "evaluation/fold0", "export/fold0", "cross_validation"):
        for file in (clone / name).rglob("*"):
            assert file.is_dir() or outs & {file, *file.parents}, file


def test_nothing_to_do_runs_nothing(clone: Path):
    assert stages_that_ran((clone.parent / NOTHING_TO_DO).read_text()) == []


def test_metrics_and_plots_are_useful(clone: Path):
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=clone).stdout)
    files = shown[""]["data"]
    assert 0 <= files["evaluation/fold0/metrics.json"]["data"]["dice"]["mean"] <= 1
    assert "export/fold0/metrics.json" in files
    assert files["cross_validation/metrics.json"]["data"]["cost"]["seconds_per_epoch"] > 0
    run("dvc", "plots", "show", "-o", "plots_html", cwd=clone)
    assert "dice_by_case" in (clone / "plots_html" / "index.html").read_text()


def test_mlflow_holds_the_run(clone: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone}/mlflow.db")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.fold = '0'")
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train_loss")] == [1, 2]
    assert found.data.params["train.epochs"] == "2"
    assert len(found.data.tags["git_commit"]) == 40
    assert "test_dice_mean" in found.data.metrics, found.data.metrics
    assert found.inputs.dataset_inputs[0].dataset.digest
    assert client.search_registered_models()


def test_exported_model_predicts_on_a_scan(clone: Path, monkeypatch, capsys):
    mask, image = nib.load(clone / "mask.nii.gz"), nib.load(clone / "scan.nii.gz")
    assert mask.shape == image.shape
    assert abs(mask.affine - image.affine).max() < 1e-5
    monkeypatch.chdir(clone)
    assert main(["summary"]) == 0
    assert "organ" in capsys.readouterr().out


def test_a_change_of_the_training_leaves_the_data_as_they_are(clone: Path):
    text = (clone / "params.yaml").read_text()
    run("distilldsm", "compose", "--keep", "model=unet2d", cwd=clone)
    changed = json.loads(run("dvc", "status", "--json", cwd=clone).stdout)
    (clone / "params.yaml").write_text(text)
    assert set(changed) == {"train@0"}, changed


def test_an_experiment_adds_a_fold_whatever_else_lies_there(clone: Path):
    """Fold 1 of other parameters is left behind by hand: it must neither disturb nor get into the table."""
    for name in ("models", "evaluation"):
        shutil.copytree(clone / name / "fold0", clone / name / "fold1")
    run("git", "add", "-A", cwd=clone)
    run("git", "commit", "-qm", "trained", cwd=clone)
    before = yaml.safe_load((clone / "params.yaml").read_text())
    done = run("dvc", "exp", "run", "-S", "cv.folds=[0,2]", "cross_validate", cwd=clone)
    assert stages_that_ran(done.stdout) == ["cross_validate", "evaluate@2", "train@2"]
    before["cv"]["folds"] = [0, 2]
    assert yaml.safe_load((clone / "params.yaml").read_text()) == before
    assert json.loads((clone / "cross_validation/summary.json").read_text())["folds"] == [0, 2]
    splits = json.loads((clone / "data/preprocessed/splits.json").read_text())["folds"]
    with open(clone / "cross_validation/cases.csv") as stream:
        found = {(int(row["fold"]), row["case"]) for row in csv.DictReader(stream)}
    assert found == {(fold, case) for fold in (0, 2) for case in splits[fold]["held_out"]}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (parent,) = client.search_runs(experiments, "tags.cv_folds = '0,2'")
    children = client.search_runs(experiments, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert sorted(child.data.tags["fold"] for child in children) == ["0", "2"]


def test_nothing_is_left_in_the_home_folder(clone: Path):
    """The last test: DVC, MLflow, matplotlib and the others have run. That nobody was called: see conftest.py."""
    assert not list((clone.parent / "home").rglob("*"))
