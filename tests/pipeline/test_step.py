"""What runs inside a Kubeflow step, with artifacts as KFP hands them over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json
from distilldsm.core.hashes import content_hash, file_hashes
from distilldsm.pipeline import packing, step
from tests.data.volumes import write_dataset
from tests.evaluation import folds as folds_written


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


def test_a_work_volume_that_is_not_writable_is_an_error_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(step.WORK_VARIABLE, str(tmp_path / "file" / "work"))
    with (
        pytest.raises(UserError, match="the work volume is not writable"),
        step.resumable_output(FakeArtifact(tmp_path / "model"), "k"),
    ):
        raise AssertionError("must not get here")


def test_refused_data_hand_their_report_on_and_the_next_step_refuses(tmp_path, capsys):
    """KFP stores nothing of a failed step: the report would be lost with the pod."""
    dataset = FakeArtifact(tmp_path / "pod" / "download" / "dataset")
    write_dataset(Path(dataset.path), 3)
    (tmp_path / "pod" / "validate").mkdir()
    names = ("validation", "report", "metrics")
    validation, report, metrics = (FakeArtifact(tmp_path / "pod" / "validate" / name) for name in names)
    config = {"bounds": {"spacing_max_mm": [0.0, 0.1]}}
    step.run("validate", config=config, dataset=dataset, validation=validation, report=report, metrics=metrics)
    assert "the data set cannot be used: 3 errors in 3 of 3 cases" in capsys.readouterr().err
    assert Path(report.path).read_text().lower().startswith("<!doctype html")
    assert metrics.logged["errors"] == 3
    assert read_json(Path(validation.path) / "report.json")["findings"]
    assert None not in validation.metadata.values()
    preprocessed = FakeArtifact(tmp_path / "pod" / "preprocessed")
    with pytest.raises(SystemExit) as ended:
        step.run("preprocess", config={}, dataset=dataset, validation=validation, preprocessed=preprocessed)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: dataset: the data set cannot be used: 3 errors in 3 of 3 cases\n")
    assert "(bounds_spacing_max_mm)" in said
    assert "hint: read the page 'report' of the step validate; fix the files" in said
    assert str(tmp_path) not in said
    assert not Path(preprocessed.path).exists()


@pytest.mark.parametrize(("run_id", "is_packed"), [("r", True), ("local-1", False)])
def test_many_files_travel_as_one_archive(tmp_path, monkeypatch, run_id, is_packed):
    """KFP moves each file with a request of its own. The next step reads what the stage wrote, byte for byte."""
    monkeypatch.setenv("KFP_RUN_ID", run_id)
    monkeypatch.setattr(packing, "FEW_FILES", 3)
    names = ("dataset", "validation", "report", "metrics", "preprocessed")
    made = {name: FakeArtifact(tmp_path / "pod" / name) for name in names}
    (tmp_path / "pod").mkdir()
    root = Path(made["dataset"].path)
    write_dataset(root, 3)
    whole = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    packing.pack(root)
    packed = {path.name for path in root.iterdir()}
    assert packed == {packing.ARCHIVE, *(str(name) for name in whole if len(name.parts) == 1)}
    data = {key: made[key] for key in ("dataset", "validation")}
    step.run("validate", config={}, **data, report=made["report"], metrics=made["metrics"])
    step.run("preprocess", config={"folds": 3}, budget=1.0, **data, preprocessed=made["preprocessed"])
    output = Path(made["preprocessed"].path)
    assert (output / packing.ARCHIVE).is_file() is is_packed
    assert (output / "splits.json").is_file(), "readable in the bucket"
    there = packing.unpacked(output, "", tmp_path / "next")
    assert content_hash(there) == made["preprocessed"].metadata["content_hash"]
    assert set(file_hashes(there)) >= set(read_json(output / "manifest.json")["files"])
    assert packing.unpacked(output, "splits.json", tmp_path / "unused") == output / "splits.json"
    assert {path.name for path in root.iterdir()} == packed, "other steps may read the same copy"
    again = packing.unpacked(root, "", tmp_path / "again")
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == whole


def test_no_null_reaches_the_metadata():
    assert step.without_null({"a": None, "b": [{"c": None, "d": 1}], "e": ("x",)}) == {"b": [{"d": 1}], "e": ["x"]}
