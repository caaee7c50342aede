"""The whole DVC pipeline on a tiny data set, in a clone of its own, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distilldsm.core.privacy import SWITCHES
from tests.conftest import OFFLINE

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TINY = [
    "download.sample.subjects=6",
    "train.model.options.width=0.25",
    "train.epochs=2",
    "train.validate_every=1",
    "preprocess.folds=3",
    "export.parity_cases=1",
    "export.int8.enabled=false",  # half of the seconds of an export; the run of the tutorial quantises
]

ORDER = ["train@0", "evaluate@0", "cross_validate", "export@0"]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    home = cwd.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in (*SWITCHES, "CI", "PYTEST_CURRENT_TEST")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{OFFLINE}{os.pathsep}{cwd}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done


def make_clone(target: Path) -> Path:
    """A repository with the files of this working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if name == "dvc.lock" or not (ROOT / name).is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    run("git", "init", "-q", cwd=target)
    run("git", "config", "user.email", "test@example.org", cwd=target)
    run("git", "config", "user.name", "Test", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "clone", cwd=target)
    return target


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """After `dvc repro` on a tiny sample."""
    target = make_clone(tmp_path_factory.mktemp("clone") / "distilldsm")
    run("distilldsm", "compose", *TINY, cwd=target)
    run("dvc", "repro", cwd=target)
    return target


def stages_that_ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


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
    done = run("dvc", "repro", cwd=clone)
    assert sorted(stages_that_ran(done), key=ORDER.index) == []


def test_metrics_plots_and_experiments_are_useful(clone: Path):
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=clone).stdout)
    files = shown[""]["data"]
    assert 0 <= files["evaluation/fold0/metrics.json"]["data"]["dice"]["mean"] <= 1
    assert "export/fold0/metrics.json" in files
    assert files["cross_validation/metrics.json"]["data"]["cost"]["seconds_per_epoch"] > 0
    run("dvc", "plots", "show", "-o", "plots_html", cwd=clone)
    assert "dice_by_case" in (clone / "plots_html" / "index.html").read_text()
    assert "evaluation/fold0/metrics.json" in run("dvc", "exp", "show", "--json", cwd=clone).stdout


def test_mlflow_holds_the_run(clone: Path):
    code = """
import distilldsm  # switches MLflow's telemetry off
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
client = mlflow.MlflowClient()
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
assert len(runs) == 1, runs
run = runs[0]
history = client.get_metric_history(run.info.run_id, "train_loss")
assert [m.step for m in history] == [1, 2], history
assert run.data.params["train.epochs"] == "2"
assert run.data.tags["fold"] == "0"
assert len(run.data.tags["git_commit"]) == 40
assert "test_dice_mean" in run.data.metrics, run.data.metrics
assert run.inputs.dataset_inputs[0].dataset.digest
assert client.search_registered_models()
print("ok")
"""
    assert run(sys.executable, "-c", code, cwd=clone).stdout.strip().endswith("ok")


def test_exported_model_predicts_on_a_scan(clone: Path):
    import nibabel as nib

    index = json.loads((clone / "data/raw/dataset_index.json").read_text())
    scan = clone / "data/raw" / index["cases"][0]["images"][0]
    run("distilldsm", "predict", "export/fold0", str(scan), "-o", "mask.nii.gz", cwd=clone)
    mask, image = nib.load(clone / "mask.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    assert abs(mask.affine - image.affine).max() < 1e-5
    assert "grey" in run("distilldsm", "summary", cwd=clone).stdout.lower()


def test_an_experiment_changes_what_is_named_and_runs_from_train(clone: Path):
    run("git", "add", "-A", cwd=clone)
    run("git", "commit", "-qm", "trained", cwd=clone)
    before = yaml.safe_load((clone / "params.yaml").read_text())
    run("distilldsm", "compose", "--keep", "model=unet2d", cwd=clone)
    done = run("dvc", "exp", "run", "-S", "train.weight_decay=0.02", "cross_validate", cwd=clone)
    assert sorted(stages_that_ran(done), key=ORDER.index) == ["train@0", "evaluate@0", "cross_validate"]
    changed = json.loads(run("dvc", "status", "export@0", "--json", cwd=clone).stdout)
    assert {"changed deps": {"models/fold0": "modified"}}.items() <= {
        key: {"models/fold0": value.get("models/fold0")} for one in changed["export@0"] for key, value in one.items()
    }.items(), "the export would follow"
    assert json.loads((clone / "models/fold0/model.json").read_text())["name"] == "unet2d"
    before["train"]["model"] = {"name": "unet2d", "options": {"width": 1.0}}
    before["train"]["weight_decay"] = 0.02
    assert yaml.safe_load((clone / "params.yaml").read_text()) == before


def test_several_folds_are_summed_up_whatever_else_lies_there(clone: Path):
    """Fold 1 of other parameters is left behind by hand: it must neither disturb nor get into the table."""
    done = run("dvc", "repro", "cross_validate", cwd=clone)
    assert stages_that_ran(done) == []
    for name in ("models", "evaluation"):
        shutil.copytree(clone / name / "fold0", clone / name / "fold1")
    run("dvc", "repro", "cross_validate", cwd=clone)
    assert json.loads((clone / "cross_validation/summary.json").read_text())["folds"] == [0]
    text = (clone / "params.yaml").read_text()
    done = run("dvc", "exp", "run", "-S", "cv.folds=[0,2]", "cross_validate", cwd=clone)
    assert sorted(stages_that_ran(done)) == ["cross_validate", "evaluate@2", "train@2"]
    (clone / "params.yaml").write_text(text)
    summary = json.loads((clone / "cross_validation/summary.json").read_text())
    assert summary["folds"] == [0, 2]
    splits = json.loads((clone / "data/preprocessed/splits.json").read_text())["folds"]
    with open(clone / "cross_validation/cases.csv") as stream:
        found = {(int(row["fold"]), row["case"]) for row in csv.DictReader(stream)}
    assert found == {(fold, case) for fold in (0, 2) for case in splits[fold]["held_out"]}
    code = """
import distilldsm  # switches MLflow's telemetry off
import mlflow
client = mlflow.MlflowClient("sqlite:///mlflow.db")
runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.cv_folds = '0,2'")
assert len(runs) == 1, runs
children = client.search_runs([runs[0].info.experiment_id], f"tags.mlflow.parentRunId = '{runs[0].info.run_id}'")
assert sorted(run.data.tags["fold"] for run in children) == ["0", "2"], children
print("ok")
"""
    assert run(sys.executable, "-c", code, cwd=clone).stdout.strip().endswith("ok")


def test_a_mistake_in_params_stops_with_exit_code_2(clone: Path):
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace("epochs:", "epoch:"))
    done = run(sys.executable, "-m", "distilldsm.components.train", cwd=clone, check=False)
    (clone / "params.yaml").write_text(text)
    assert done.returncode == 2
    assert "did you mean 'epochs'" in done.stderr


def test_nothing_is_left_in_the_home_folder(clone: Path):
    """The last test: DVC, MLflow, matplotlib and the others have run. That nobody was called: see conftest.py."""
    assert not list((clone.parent / "home").rglob("*"))
