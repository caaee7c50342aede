"""Cross-validations as parent runs: in a real store, while it is away, and when the parts arrive in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distilldsm.components import cross_validate
from distilldsm.config import CrossValidationConfig, EvaluateConfig, TrackingConfig
from distilldsm.core.files import read_json
from distilldsm.pipeline.lineage import lineage
from distilldsm.tracking import default_uri
from distilldsm.tracking.publish import publish
from tests.evaluation.folds import write_fold, write_folds
from tests.tracking.store import ABSENT, CONFIG, all_runs, evaluated, publish_known, trained


def train(place: Path, fold: int) -> dict[str, Any]:
    """The record of a training."""
    return read_json(trained(place / f"work{fold}", name=f"net-fold{fold}", tags={"fold": fold}) / "tracking.json")


def cross_validation(place: Path, folds: int = 3, **options: Any) -> list[list[dict[str, Any]]]:
    """Evaluated folds whose models know their runs."""
    splits, rows = write_folds(place, count=folds, **options)
    for fold in range(folds):
        write_fold(place, fold, rows[fold], splits=splits, run=train(place, fold), **options)
    return rows


def sum_up(place: Path, folds: int = 3) -> None:
    inputs = {"evaluation": place / "evaluation", "models": place / "models", "splits": place / "splits.json"}
    outputs = {"cross_validation": place / "cross_validation"}
    cross_validate.run(CrossValidationConfig(folds=tuple(range(folds))), inputs, outputs, tracking=CONFIG)


def children(client: Any, parent: Any) -> list[str]:
    found = all_runs(client, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert all(run.info.run_id != parent.info.run_id for run in found)
    return [run.info.run_name for run in found]


def the_parent(client: Any) -> Any:
    [parent] = [run for run in all_runs(client) if "cv_folds" in run.data.tags]
    return parent


def test_a_parent_with_a_child_a_fold(place, client, no_sender):
    cross_validation(place)
    sum_up(place)
    publish_known()
    parent = the_parent(client)
    assert children(client, parent) == ["net-fold0", "net-fold1", "net-fold2"]
    assert len(all_runs(client)) == 4
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "distill_dsm-cv3")
    assert "mlflow.parentRunId" not in parent.data.tags
    summary = read_json(place / "cross_validation" / "summary.json")
    core = summary["labels"]["core"]["dice"]
    logged = parent.data.metrics
    assert logged["cv_dice_core_mean"] == pytest.approx(core["mean_folds"], abs=1e-5)
    assert logged["cv_dice_core_sd_folds"] == pytest.approx(core["sd_folds"], abs=1e-5)
    assert logged["cv_dice_core_sd_cases"] == pytest.approx(core["sd_cases"], abs=1e-5)
    assert logged["cv_dice_mean"] == pytest.approx(summary["mean"]["dice"]["mean_folds"], abs=1e-5)
    assert (logged["cv_seconds_per_epoch"], logged["cv_parameters"]) == (2.0, 1000)
    assert (parent.data.params["folds"], parent.data.params["train.model.name"]) == ("[0, 1, 2]", "distill_dsm")
    fetched = Path(client.download_artifacts(parent.info.run_id, "cross_validation", str(place)))
    assert {path.name for path in fetched.iterdir()} >= {"report.html", "table.csv", "table.json", "cases.json"}
    record = read_json(place / "cross_validation" / "tracking.json")
    assert record["run"]["key"] == parent.data.tags["distilldsm.run_key"]


def test_summed_up_again_it_is_the_same_parent(place, client, no_sender):
    cross_validation(place)
    for _ in range(2):
        sum_up(place)
        publish_known()
    assert len(all_runs(client)) == 4
    assert len(children(client, the_parent(client))) == 3


def test_another_evaluation_or_training_is_another_parent_and_takes_the_children(place, client, no_sender):
    rows = cross_validation(place)
    sum_up(place)
    publish_known()
    first = the_parent(client)
    for fold in range(3):
        run = read_json(place / "models" / f"fold{fold}" / "tracking.json")
        config = EvaluateConfig(nsd_tolerance_mm=2.0)
        write_fold(place, fold, rows[fold], splits=place / "splits.json", run=run, evaluate=config)
    sum_up(place)
    publish_known()
    [second] = [r for r in all_runs(client) if "cv_folds" in r.data.tags and r.info.run_id != first.info.run_id]
    assert children(client, first) == []
    assert len(children(client, second)) == 3


def test_while_the_server_is_away_links_are_kept_and_sent_later(place, client, no_sender, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ABSENT)
    cross_validation(place)
    sum_up(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    publish_known(to=default_uri())
    assert children(client, the_parent(client)) == ["net-fold0", "net-fold1", "net-fold2"]
    assert {run.info.status for run in all_runs(client)} == {"FINISHED"}
    assert all(run.data.metrics["seconds"] == 2.0 for run in all_runs(client) if "fold" in run.data.tags)


def test_a_child_that_arrives_after_its_parent(place, client, no_sender):
    """Its output is on another machine, and published last; an evaluation of it before that."""
    cross_validation(place, folds=2)
    sum_up(place, folds=2)
    publish(place / "cross_validation")
    parent = the_parent(client)
    assert children(client, parent) == ["distill_dsm-fold0", "distill_dsm-fold1"]
    evaluated(place / "evaluation" / "again", place / "models" / "fold1", test_dice_mean=0.5)
    publish(place / "evaluation" / "again")
    publish_known()
    assert children(client, parent) == ["net-fold0", "net-fold1"]
    assert len(all_runs(client)) == 3
    stored = all_runs(client, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert [run.data.tags["fold"] for run in stored] == ["0", "1"]
    assert all(run.info.status == "FINISHED" and run.data.metrics["seconds"] == 2.0 for run in stored)
    assert all_runs(client, "metrics.test_dice_mean > 0")[0].info.run_name == "net-fold1"


def test_a_run_below_the_task_of_a_pipeline(place, client, no_sender, monkeypatch):
    """Kubeflow's MLflow plugin names its run in MLFLOW_RUN_ID."""
    plugins = client.create_experiment("plugin's")
    root = client.create_run(plugins, run_name="pipeline", tags={"kfp.pipeline_run_id": "kfp-run-1"})
    outer = client.create_run(plugins, run_name="task")
    rows = cross_validation(place, folds=2)  # of an earlier run, without the plugin
    monkeypatch.setenv("KFP_RUN_ID", "kfp-run-1")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", plugins)
    write_fold(place, 1, rows[1], splits=place / "splits.json", run=train(place, 5))
    sum_up(place, folds=2)
    publish_known()
    parent = the_parent(client)
    assert sorted(children(client, outer)) == sorted([parent.info.run_name, "net-fold5"])
    assert parent.info.experiment_id == plugins
    assert children(client, parent) == ["net-fold0"], "a fold stays below its own task"
    found = lineage("kfp-run-1")
    assert {run["name"] for run in found["runs"]} == {"pipeline", "net-fold5", parent.info.run_name}
    assert {run["kfp_run_id"] for run in found["runs"]} == {root.data.tags["kfp.pipeline_run_id"]}


def test_one_fold_has_no_parent(place, client, no_sender):
    cross_validation(place, folds=1)
    sum_up(place, folds=1)
    publish_known()
    assert [run.info.run_name for run in all_runs(client)] == ["net-fold0"]
    assert read_json(place / "cross_validation" / "tracking.json")["run"] is None


def test_folds_of_no_store_or_another_are_left_out(place, client, no_sender, caplog):
    rows = cross_validation(place)
    write_fold(place, 0, rows[0], splits=place / "splits.json")
    there = place / "there.db"
    there.touch()
    run = read_json(place / "models" / "fold1" / "tracking.json")
    run["run"] |= {"tracking_uri": f"sqlite:///{there}"}
    write_fold(place, 1, rows[1], splits=place / "splits.json", run=run)
    sum_up(place)
    assert "there.db" in caplog.text
    publish_known()
    assert children(client, the_parent(client)) == ["net-fold2"]


def test_tracking_that_is_off_leaves_nothing(place):
    splits, _ = write_folds(place)
    inputs = {"evaluation": place / "evaluation", "models": place / "models", "splits": splits}
    off = TrackingConfig(enabled=False)
    cross_validate.run(CrossValidationConfig(folds=(0, 1)), inputs, {"cross_validation": place / "cv"}, tracking=off)
    assert read_json(place / "cv" / "tracking.json")["run"] is None
