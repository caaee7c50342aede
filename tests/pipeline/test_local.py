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
from distilldsm.pipeline.lineage import lineage
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
    texts = [path.read_text() for path in artifacts(cwd, "report")]
    reports = [text for text in texts if not text.startswith("```")]  # finish's is Markdown
    assert len(reports) == len(texts) - 1 == 4  # of the validation, of two evaluations, and over the folds
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
