"""The whole Kubeflow pipeline in the images, on a tiny data set."""

from __future__ import annotations

import json
import os

import pytest

from distilldsm.models.package import MONAI_BUNDLE, verify
from tests.containers.conftest import BuiltImages
from tests.pipeline.local_runs import artifacts, run_pipeline

pytestmark = [pytest.mark.containers, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(images: BuiltImages, tmp_path_factory: pytest.TempPathFactory):
    cwd = tmp_path_factory.mktemp("containers")
    options = ("--runner", "docker", "--engine", images.host)
    return cwd, run_pipeline(cwd, "cv.folds=[0]", "export.int8.enabled=false", options=options)


def test_from_download_to_the_exported_model(finished) -> None:
    cwd, done = finished
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    [metadata] = [path for path in artifacts(cwd, "metadata.json") if MONAI_BUNDLE not in path.parts]
    assert verify(metadata.parent).fold == 0
    manifests = {m["stage"]: m for m in (json.loads(path.read_text()) for path in artifacts(cwd, "manifest.json"))}
    assert {"download", "validate", "preprocess", "train", "evaluate", "export"} <= manifests.keys()
    # Each stage ran in its own image: what is installed there differs.
    assert "torch" not in manifests["preprocess"]["packages"]
    assert "torch" in manifests["train"]["packages"]
    assert "onnxruntime" not in manifests["train"]["packages"]
    assert "onnxruntime" in manifests["export"]["packages"]
    assert {path.stat().st_uid for path in (cwd / "kfp-runs").rglob("*")} == {os.getuid()}


def test_the_mlflow_run_in_the_callers_store(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    cwd, _ = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    [folder] = (cwd / "kfp-runs").iterdir()
    assert run.data.tags["kfp_run_id"] == folder.name
    assert len(run.data.tags["git_commit"].removesuffix("-dirty")) == 40
    assert "val_dice_mean" in run.data.metrics
    assert any(name.startswith("export_openvino") for name in run.data.metrics)
    [model] = client.search_registered_models()
    assert client.get_model_version_by_alias(model.name, "challenger").run_id == run.info.run_id
