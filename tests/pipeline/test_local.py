"""The whole pipeline by kfp's local runner, in subprocesses, on a tiny data set."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from distilldsm.core.errors import DataError
from distilldsm.models.package import MONAI_BUNDLE, verify
from distilldsm.pipeline import step
from distilldsm.pipeline.lineage import lineage
from tests.evaluation import folds as folds_written
from tests.pipeline.local_runs import artifacts, run_pipeline


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    cwd = tmp_path_factory.mktemp("kfp")
    return cwd, run_pipeline(cwd, "cv.folds=[0,1]", "export.int8.enabled=false")


@pytest.mark.slow
def test_two_folds_from_download_to_registered_models(finished, monkeypatch):
    cwd, done = finished
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUCCEEDED" in done.stdout
    packages = [path for path in artifacts(cwd, "metadata.json") if MONAI_BUNDLE not in path.parts]
    assert [verify(path.parent).fold for path in packages] == [0, 1]
    [summary] = artifacts(cwd, "summary")
    assert "Folds 0, 1." in summary.read_text()
    reports = [path.read_text() for path in artifacts(cwd, "report")]
    assert len(reports) == 4  # of the validation, of two evaluations, and over the folds
    assert all(text.lstrip().lower().startswith("<!doctype html") for text in reports)
    assert sum("Validation of the data" in text for text in reports) == 2, "the evaluations tell what validation found"
    assert not any("This evaluation had no validation report" in text for text in reports)


@pytest.mark.slow
def test_the_mlflow_runs_and_the_pipeline_run_lead_to_each_other(finished, monkeypatch):
    cwd, _ = finished
    monkeypatch.chdir(cwd)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    [folder] = (cwd / "kfp-runs").iterdir()
    found = lineage(folder.name)
    assert found["kind"] == "kfp"
    assert all(run["status"] == "FINISHED" for run in found["runs"])
    [parent] = [run for run in found["runs"] if run["fold"] is None]
    found["runs"].remove(parent)
    assert sorted(run["fold"] for run in found["runs"]) == ["0", "1"]
    assert all(run["models"] and run["datasets"] for run in found["runs"])
    assert {run["parent"] for run in found["runs"]} == {parent["mlflow_run_id"]}
    outputs = [json.loads(path.read_text()) for path in artifacts(cwd, "executor_output.json")]
    models = [
        artifact["metadata"]["mlflow_run_id"]
        for output in outputs
        for name, listed in output.get("artifacts", {}).items()
        if name == "model"
        for artifact in listed["artifacts"]
    ]
    assert sorted(models) == sorted(run["mlflow_run_id"] for run in found["runs"])
    one = found["runs"][0]
    assert lineage(one["mlflow_run_id"])["runs"][0]["kfp_run_id"] == folder.name
    assert lineage(folder.name[:18])["kind"] == "kfp"
    model = one["models"][0]
    assert lineage(f"{model['name']}/{model['version']}")["runs"][0]["mlflow_run_id"] == one["mlflow_run_id"]
    # What DVC says: the lock names the model's folder, and that names its run.
    [folder_of_one] = [p.parent for p in artifacts(cwd, "tracking.json") if p.parent.name == "model"][:1]
    shutil.copytree(folder_of_one, cwd / "models" / "fold0")
    outs = [{"path": "models/fold0", "md5": "1"}, {"path": "data/raw", "md5": "abc.dir"}]
    (cwd / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train@0": {"outs": outs}}}))
    sha256 = hashlib.sha256((cwd / "dvc.lock").read_bytes()).hexdigest()
    found = lineage(sha256)
    wanted = json.loads((folder_of_one / "tracking.json").read_text())["run"]["id"]
    assert (found["kind"], [run["mlflow_run_id"] for run in found["runs"]]) == ("dvc", [wanted])
    assert found["dvc_lock"]["data"] == {"data/raw": "abc.dir"}
    assert lineage(sha256[:10])["runs"] == found["runs"]
    with pytest.raises(DataError, match="no MLflow run has"):
        lineage("0123456789abcdef")


@pytest.mark.slow
def test_a_failing_step_is_shown_and_the_exit_handler_runs(tmp_path):
    done = run_pipeline(tmp_path, "download.source=nowhere.tar")
    assert done.returncode == 1
    assert "file or folder not found" in done.stdout
    assert "FAILED" in done.stdout
    assert "pipeline failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert artifacts(tmp_path, "finish")  # the exit handler's folder
    assert not artifacts(tmp_path, "validate")


def test_parameters_are_checked_before_anything_runs(tmp_path):
    done = run_pipeline(tmp_path, "preprocess.folds=7")
    assert done.returncode == 2
    assert "preprocess.folds" in done.stderr
    assert not (tmp_path / "kfp-runs").exists()


class FakeArtifact:
    def __init__(self, path: Path) -> None:
        self.path, self.metadata, self.logged = str(path), {}, {}

    def log_metric(self, key, value):
        self.logged[key] = value


def test_a_component_of_another_version_refuses_to_run(monkeypatch, capsys):
    monkeypatch.setenv(step.VERSION_VARIABLE, "0.0.1")
    with pytest.raises(SystemExit) as ended, step.component("train"):
        raise AssertionError("must not get here")
    assert ended.value.code == 2
    assert "0.0.1" in capsys.readouterr().err


def test_the_component_check_names_the_wrong_parameter(capsys):
    with pytest.raises(SystemExit) as ended:
        step.run("check", folds=[0.0], train={"epochs": 3.5})
    assert ended.value.code == 2
    assert "pipeline parameters.train.epochs" in capsys.readouterr().err


def test_unfinished_work_is_kept_where_it_outlives_the_pod(tmp_path, monkeypatch):
    monkeypatch.setenv(step.WORK_VARIABLE, str(tmp_path / "work"))
    artifact = FakeArtifact(tmp_path / "pod" / "model")
    with pytest.raises(RuntimeError), step.resumable_output(artifact, "k") as target:
        target.mkdir(parents=True)
        (target / "half").write_text("1")
        raise RuntimeError("the pod is taken away")
    with step.resumable_output(artifact, "k") as target:
        assert (target / "half").read_text() == "1"
    assert (tmp_path / "pod" / "model" / "half").read_text() == "1"
    assert not target.exists()


@pytest.mark.parametrize(("threshold", "passed"), [(0.0, True), (0.75, True), (0.76, False)])
def test_the_gate_is_the_mean_over_labels_and_folds(tmp_path, threshold, passed):
    splits = folds_written.write_splits(tmp_path, [["a", "b"], ["c", "d"]])
    for fold, dice in enumerate(({"x": 0.8, "y": 0.6}, {"x": 0.9, "y": 0.7})):
        cases = "ab" if fold == 0 else "cd"
        rows = [{**row, "dice": dice[row["label"]]} for row in folds_written.random_rows(cases, fold, ("x", "y"))]
        folds_written.write_fold(tmp_path, fold, rows, splits=splits)
    evaluation, models = (
        [FakeArtifact(tmp_path / kind / f"fold{fold}") for fold in (1, 0)] for kind in ("evaluation", "models")
    )
    cross_validation, report, collected, summary, metrics = (
        FakeArtifact(tmp_path / "pod" / name) for name in ("table", "report", "collected", "summary", "metrics")
    )
    (tmp_path / "pod").mkdir()
    over_folds = {"evaluation": evaluation, "models": models, "splits": FakeArtifact(splits.parent)}
    shown = {"cross_validation": cross_validation, "report": report, "metrics": metrics}
    step.run("cross_validate", folds=[0.0, 1.0], tracking={"enabled": False}, **over_folds, **shown)
    assert metrics.logged["dice_mean_mean"] == pytest.approx(0.75)
    assert Path(report.path).read_text().lower().startswith("<!doctype html")
    given = {"evaluation": evaluation, "model": models, "cross_validation": cross_validation}
    config = {"min_dice": threshold}
    assert step.run("gate", config=config, collected=collected, summary=summary, **given) is passed
    assert "| x | 0.8500 | 0.0707 | 0.0577 | 2 |" in Path(summary.path).read_text()
    assert json.loads((Path(collected.path) / "models/fold1/model.json").read_text())["fold"] == 1
    assert (Path(collected.path) / "evaluation/fold1/cases.csv").is_file()


def test_the_confusion_matrix_counts_pairs(tmp_path):
    (tmp_path / "c.csv").write_text("actual,predicted\nb,b\nbackground,b\nb,b\nbackground,background\n")
    assert step.confusion_matrix(tmp_path / "c.csv") == (["background", "b"], [[1, 1], [0, 2]])
