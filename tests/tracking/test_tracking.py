"""Runs as the stages see them, against a real MLflow store."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distilldsm import tracking
from distilldsm.config import TrackingConfig
from distilldsm.tracking import attach, default_uri, replay_journals, start_run
from tests.tracking.store import history, journal_text, onnx_model, run_file, the_run

CONFIG = TrackingConfig()


def test_everything_a_training_logs_is_in_the_store(place, client, no_worker):
    (place / "plan.json").write_text("{}")
    (place / "figures").mkdir()
    (place / "figures" / "a.txt").write_text("a")
    with start_run(CONFIG, directory=place / "work", name="distill_dsm-fold0", tags={"fold": "0"}) as run:
        run.log_params({"train": {"epochs": 2, "model": {"options": {"alpha": 0.5}}}, "long": "x" * 9000})
        for epoch in (1, 2, 3):
            run.log_metrics({"train_loss": 1 / epoch, "val dice (%)": math.nan}, step=epoch)
        run.log_metrics({"seconds": np.float32(2.5), "inf": math.inf})
        run.set_tags({"note": "hello"})
        run.log_dataset("Hippocampus", "ab" * 32, "https://u:p@host/x.tar", profile={"cases": 260})
        run.log_artifact(place / "plan.json", "plan")
        run.log_artifacts(place / "figures", "figures")
        (place / "plan.json").write_text("changed later")
        run.log_table([{"case": "a", "dice": 0.9}, {"case": "b", "dice": math.nan, "hd95_mm": 2.0}], "eval/cases.json")
    assert not (place / "mlartifacts").exists(), "nothing but the journal was touched"
    result = replay_journals()
    assert (result.left, result.rejected, result.error) == (0, 0, None)

    stored = the_run(client)
    assert client.get_experiment(stored.info.experiment_id).name == "distilldsm"
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "distill_dsm-fold0")
    assert stored.data.params["train.model.options.alpha"] == "0.5"
    assert stored.data.params["train.epochs"] == "2"
    assert len(stored.data.params["long"]) <= 6000
    assert history(client, "train_loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert math.isnan(history(client, "val dice ___")[0][1])
    assert stored.data.metrics["seconds"] == 2.5
    assert stored.data.tags["fold"] == "0"
    assert stored.data.tags["note"] == "hello"
    assert stored.data.tags["distilldsm.run_key"] == run.run_key
    data = stored.inputs.dataset_inputs[0]
    assert (data.dataset.name, data.dataset.digest) == ("Hippocampus", ("ab" * 32)[:36])
    assert json.loads(data.dataset.profile) == {"cases": 260, "digest": "ab" * 32}
    assert json.loads(data.dataset.source) == {"uri": "https://host/x.tar"}
    assert {t.key: t.value for t in data.tags} == {"mlflow.data.context": "training"}
    fetched = Path(client.download_artifacts(stored.info.run_id, "", str(place)))
    assert (fetched / "plan" / "plan.json").read_text() == "{}"
    assert (fetched / "figures" / "a.txt").read_text() == "a"
    table = json.loads((fetched / "eval" / "cases.json").read_text())
    assert table["columns"] == ["case", "dice", "hd95_mm"]
    assert table["data"] == [["a", 0.9, None], ["b", None, 2.0]]
    assert "eval/cases.json" in stored.data.tags["mlflow.loggedArtifacts"]
    assert stored.info.artifact_uri.startswith((place / "mlartifacts").as_uri())
    assert run.run_id == stored.info.run_id


def test_figures_are_drawn_at_once(place, client, run):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "figures/curve.png")
    replay_journals()
    path = client.download_artifacts(the_run(client).info.run_id, "figures/curve.png", str(place))
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_sending_twice_changes_nothing(place, client, no_worker):
    """As after a crash between a record's arrival and its acknowledgement."""
    model = onnx_model(place / "exported")
    with start_run(CONFIG, directory=place / "work", name="n") as run:
        run.log_params({"a": 1, "b": 2})
        run.log_dataset("d", "1", "s")
        run.log_table([{"a": 1}], "t.json")
        run.log_exported_model(model, registered_name="m")
        run.log_metrics({"loss": 1.0}, step=1)
    journal = place / "tracking" / run.run_key
    kept = {path: path.read_bytes() for path in journal.rglob("*") if path.is_file()}
    for _ in range(2):
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (journal / "state.json").unlink(missing_ok=True)
        result = replay_journals()
        assert (result.rejected, result.left, result.error) == (0, 0, None)
    stored = the_run(client)
    assert history(client, "loss") == [(1, 1.0)]
    assert len(stored.inputs.dataset_inputs) == 1
    assert len(json.loads(stored.data.tags["mlflow.loggedArtifacts"])) == 1
    assert len(client.search_model_versions("name = 'm'")) == 1
    assert len(client.search_logged_models([stored.info.experiment_id])) == 1


def test_the_exported_model_is_registered_and_runs(place, client, run):
    pytest.importorskip("onnxruntime")
    model = onnx_model(place / "exported")
    (model / "fp16").mkdir()
    (model / "fp16" / "model.xml").write_text("<net/>")
    run.log_exported_model(model, registered_name="hippocampus", metadata={"labels": {"background": 0}})
    assert replay_journals().rejected == 0
    version = client.get_model_version_by_alias("hippocampus", "challenger")
    assert version.run_id == the_run(client).info.run_id

    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
    try:
        path = mlflow.artifacts.download_artifacts("models:/hippocampus@challenger", dst_path=str(place / "fetched"))
        loaded = mlflow.pyfunc.load_model("models:/hippocampus@challenger")
    finally:
        mlflow.set_tracking_uri(before)
    [logged] = client.search_logged_models([the_run(client).info.experiment_id])
    assert str(logged.status) == "READY"
    assert (Path(path) / "model.onnx").read_bytes() == (model / "model.onnx").read_bytes()
    assert (Path(path) / "metadata.json").read_text() == (model / "metadata.json").read_text()
    assert (Path(path) / "fp16" / "model.xml").exists()
    signature = loaded.metadata.signature
    assert signature.inputs.inputs[0].shape == (-1, 1, -1, -1, -1)
    assert signature.outputs.inputs[0].name == "logits"
    assert loaded.metadata.metadata == {"labels": {"background": 0}}
    assert loaded.metadata.run_id == version.run_id
    for size in ((1, 1, 3, 5, 7), (2, 1, 1, 16, 4)):
        scan = np.random.default_rng(0).normal(size=size).astype(np.float32)
        np.testing.assert_array_equal(loaded.predict({"input": scan})["logits"], np.maximum(scan, 0))


def test_a_model_that_is_not_there_is_a_warning(place, run, caplog):
    run.log_exported_model(place / "missing")
    assert "model.onnx" in caplog.text


def test_without_onnx_the_files_are_kept(place, client, run, monkeypatch):
    model = onnx_model(place / "exported")
    monkeypatch.setitem(sys.modules, "onnx", None)
    run.log_exported_model(model, registered_name="m")
    assert replay_journals().rejected == 0
    files = [f.path for f in client.list_artifacts(the_run(client).info.run_id, "exported_model")]
    assert "exported_model/model.onnx" in files


def test_evaluation_attaches_and_changes_neither_run_nor_directory(place, client, no_worker):
    with start_run(CONFIG, directory=place / "work", name="train") as training:
        training.log_metrics({"train_loss": 1.0}, step=1)
    replay_journals()
    (place / "work").rename(place / "fold0")
    before = (place / "fold0" / "mlflow_run.json").read_bytes()
    with attach(place / "fold0", CONFIG) as run:
        run.log_metrics({"test_dice_mean": 0.9})
    with pytest.raises(ZeroDivisionError), attach(place / "fold0", CONFIG):
        _ = 1 / 0
    replay_journals()
    stored = the_run(client)
    assert stored.data.metrics == {"train_loss": 1.0, "test_dice_mean": 0.9}
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "train")
    assert (place / "fold0" / "mlflow_run.json").read_bytes() == before


def test_attaching_elsewhere_finds_the_run_by_its_key(place, client, no_worker, monkeypatch, tmp_path_factory):
    """The training's process never learned the run's id, and its journal is on another machine."""
    with start_run(CONFIG, directory=place / "work", name="train") as training:
        training.log_metrics({"train_loss": 1.0}, step=1)
    assert run_file(place / "work")["run_id"] is None
    replay_journals()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with attach(place / "work", CONFIG) as run:
        run.log_metrics({"test_dice_mean": 0.9})
    replay_journals()
    assert the_run(client).data.metrics == {"train_loss": 1.0, "test_dice_mean": 0.9}


def test_a_deleted_run_is_followed_by_a_new_one(place, client, no_worker):
    with start_run(CONFIG, directory=place / "work", name="train"):
        pass
    replay_journals()
    client.delete_run(the_run(client).info.run_id)
    client.delete_experiment(client.get_experiment_by_name("distilldsm").experiment_id)
    with attach(place / "work", CONFIG) as run:
        run.log_metrics({"test_dice_mean": 0.9})
    assert replay_journals().rejected == 0
    assert "test_dice_mean" in {key for r in client.search_runs(["1"]) for key in r.data.metrics}


def test_a_resumed_training_goes_on_in_its_run(place, client, no_worker):
    with pytest.raises(KeyboardInterrupt), start_run(CONFIG, directory=place / "work", name="n") as first:
        first.log_params({"a": 1})
        first.log_metrics({"loss": 2.0}, step=1)
        raise KeyboardInterrupt
    replay_journals()
    assert the_run(client).info.status == "KILLED"
    second = start_run(CONFIG, directory=place / "work", name="n", tags={"note": "again"})
    second.log_params({"a": 1})
    second.log_metrics({"loss": 2.0}, step=1)  # the checkpoint was older than the record: the epoch is repeated
    second.log_metrics({"loss": 1.0}, step=2)
    replay_journals()
    assert the_run(client).info.status == "RUNNING"
    second.close()
    replay_journals()
    stored = the_run(client)
    assert (stored.info.status, stored.data.tags["note"]) == ("FINISHED", "again")
    assert history(client, "loss") == [(1, 2.0), (2, 1.0)]
    assert first.run_key == second.run_key


def test_a_failed_training_is_marked(place, client, no_worker):
    with pytest.raises(RuntimeError), start_run(CONFIG, directory=place / "work", name="n"):
        raise RuntimeError("loss is not finite")
    replay_journals()
    assert the_run(client).info.status == "FAILED"


def test_a_run_named_by_its_id_is_taken_up(place, client, no_worker):
    made = client.create_run("0", run_name="mine")
    with start_run(CONFIG, directory=place / "work", name="n", run_id=made.info.run_id) as run:
        run.log_metrics({"loss": 1.0}, step=1)
    replay_journals()
    assert client.get_run(made.info.run_id).data.metrics == {"loss": 1.0}


def test_a_changed_parameter_is_refused_and_the_rest_kept(place, client, run, caplog):
    run.log_params({"a": 1, "b": 1})
    run.log_params({"a": 2, "c": 3})
    assert replay_journals().rejected == 1
    assert the_run(client).data.params == {"a": "1", "b": "1", "c": "3"}
    assert "does not let a run change" in caplog.text


def test_another_experiment_is_another_run(place, client, no_worker):
    start_run(CONFIG, directory=place / "work", name="n").close()
    start_run(TrackingConfig(experiment="other/one"), directory=place / "work", name="n").close()
    replay_journals()
    other = client.get_experiment_by_name("other/one")
    assert len(client.search_runs([other.experiment_id])) == 1
    assert other.artifact_location.endswith("mlartifacts/other_one")


@pytest.mark.parametrize("reason", ["disabled", "rank"])
def test_nothing_is_tracked_where_it_should_not_be(place, monkeypatch, reason):
    config = TrackingConfig(enabled=reason != "disabled")
    if reason == "rank":
        monkeypatch.setenv("RANK", "1")
    with start_run(config, directory=place / "work", name="n") as run:
        run.log_params({"a": 1})
        run.log_metrics({"a": 1}, step=0)
        run.set_tags({"a": "b"})
        run.log_dataset("n", "d", "s")
        run.log_table([{"a": 1}], "t.json")
        run.log_artifact(place / "work")
        run.log_figure(None, "f.png")
    assert run.run_id is None
    with attach(place / "work", config) as attached:
        attached.log_metrics({"a": 1})
    assert [path.name for path in place.rglob("*")] == ["work"]


def test_a_model_trained_without_tracking_has_no_run(place, no_worker):
    for text in (None, "{", "[]", json.dumps({"tracking_uri": "x"}), '{"run_key": "../../evil"}'):
        if text is not None:
            (place / "work" / "mlflow_run.json").write_text(text)
        with attach(place / "work", CONFIG) as run:
            run.log_metrics({"a": 1})
        assert run.run_key is None
    identity = {"tracking_uri": "x", "experiment": "e", "run_id": None, "run_key": "../../evil", "started_ms": 0}
    (place / "work" / "mlflow_run.json").write_text(json.dumps(identity))
    with attach(place / "work", CONFIG) as run:
        assert run.run_key is None


def test_no_secret_is_written(place, no_worker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9/base?token=secret")
    with start_run(CONFIG, directory=place / "work", name="n") as run:
        run.log_dataset("d", "1", "https://user:secret@host/x.tar")
    assert run_file(place / "work")["tracking_uri"] == "http://127.0.0.1:9/base"
    assert "secret" not in journal_text(place) + (place / "work" / "mlflow_run.json").read_text()


def test_where_the_store_is(place, monkeypatch):
    assert default_uri() == f"sqlite:///{place}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/x.db?timeout=5")
    assert default_uri() == f"sqlite:///{place}/sub/x.db?timeout=5"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert default_uri() == "http://host"


@pytest.mark.parametrize(
    ("recorded", "current", "expected"),
    [
        ("http://in-cluster:5000", "http://u:p@outside", "http://u:p@outside"),
        ("http://in-cluster:5000", None, "http://in-cluster:5000"),
        ("sqlite:////gone/mlflow.db", None, "sqlite:///{place}/mlflow.db"),
        ("sqlite:////gone/mlflow.db", "http://server", "sqlite:////gone/mlflow.db"),
        ("sqlite:///{place}/there.db", "http://server", "sqlite:///{place}/there.db"),
    ],
)
def test_where_an_attached_run_is_looked_for(place, monkeypatch, recorded, current, expected):
    (place / "there.db").touch()
    if current:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", current)
    assert tracking._uri_to_attach(recorded.format(place=place)) == expected.format(place=place)


def test_importing_it_does_not_import_mlflow_or_torch():
    code = "import sys, distilldsm.tracking as t; print(sorted({'mlflow', 'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
