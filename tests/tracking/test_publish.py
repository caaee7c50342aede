"""What MLflow holds of outputs: everything, once, in order, whatever fails in between. A real store throughout."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilldsm.cli.main import main
from distilldsm.config import TrackingConfig
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import file_hashes
from distilldsm.tracking import describe, key_in_pipeline
from distilldsm.tracking.publish import Publisher, known_outputs, publish, publish_all
from distilldsm.tracking.store import Store
from tests.tracking.store import (
    ABSENT,
    CONFIG,
    add_epochs,
    all_runs,
    evaluated,
    export_model,
    history,
    publish_known,
    run_of,
    the_run,
    trained,
    training,
)


def error(code: str) -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return MlflowException("as told", ErrorCode.Value(code))


def fail(monkeypatch: Any, client: Any, name: str, when: Any, failure: Exception) -> list[Any]:
    """Make MLflow's client fail in method `name` where `when(call number, arguments)`; returns the calls."""
    sound, calls = getattr(type(client), name), []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if when(len(calls), (*args, *kwargs.values())):
            raise failure
        return sound(self, *args, **kwargs)

    monkeypatch.setattr(type(client), name, call)
    return calls


def test_everything_a_training_says_is_in_the_store_and_nothing_is_written_into_it(place, client, no_sender):
    (place / "plan.json").write_text("{}")
    params = {
        "train": {"epochs": 3, "options": {"alpha": 0.5}},
        "long": "x" * 9000,
        "many": {f"p{i}": i for i in range(200)},
    }
    data = {"name": "Hippocampus", "digest": "ab" * 32, "source": "https://u:p@host/x.tar", "profile": {"cases": 260}}
    work = place / "models/fold0"
    with training(work, params=params, dataset=data, files={"plan": [place / "plan.json", place / "none"]}):
        add_epochs(work, 1.0, 0.5, 0.25)
    before = file_hashes(place / "models")
    assert not (place / "mlartifacts").exists()
    outcome = publish(work)
    assert (outcome.is_complete, outcome.problems, outcome.notes) == (True, (), ())
    assert file_hashes(place / "models") == before
    stored = the_run(client)
    assert outcome.run_id == stored.info.run_id
    assert client.get_experiment(stored.info.experiment_id).name == "distilldsm"
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "fold0")
    assert stored.data.params.items() >= {"train.options.alpha": "0.5", "train.epochs": "3", "many.p199": "199"}.items()
    assert len(stored.data.params["long"]) <= 6000
    assert history(client, "train_loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert history(client, "val_dice_core") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert set(stored.data.metrics) == {"train_loss", "val_dice_core"}
    assert client.get_metric_history(stored.info.run_id, "train_loss")[0].timestamp == 1700000001000
    assert stored.data.tags.items() >= {"fold": "0", "distilldsm.run_key": run_of(work)["key"]}.items()
    (found,) = stored.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("Hippocampus", ("ab" * 32)[:36])
    assert json.loads(found.dataset.profile) == {"cases": 260, "digest": "ab" * 32}
    assert json.loads(found.dataset.source) == {"uri": "https://host/x.tar"}
    fetched = Path(client.download_artifacts(stored.info.run_id, "", str(place)))
    assert (fetched / "plan" / "plan.json").read_text() == "{}"
    assert (fetched / "checkpoints" / "best.bin").read_bytes() == b"weights"
    assert stored.info.artifact_uri.startswith((place / "mlartifacts").as_uri())


def test_an_evaluation_adds_to_the_trainings_run(place, client, no_sender):
    model = trained(place / "models/fold0")
    result = evaluated(place / "evaluation/fold0", model, test_dice_mean=0.9, odd=math.nan)
    publish_known()
    stored = the_run(client)
    assert stored.data.metrics["test_dice_mean"] == 0.9
    assert math.isnan(stored.data.metrics["odd"])
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "fold0")
    fetched = Path(client.download_artifacts(stored.info.run_id, "evaluation", str(place / "..")))
    table = json.loads((fetched / "cases.json").read_text())
    assert table == {"columns": ["case", "dice", "hd95_mm"], "data": [["a", 0.9, None], ["b", None, 2]]}
    assert json.loads(stored.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "evaluation/cases.json", "type": "table"}
    ]
    assert (fetched / "figures/a.png").read_bytes() == b"\x89PNG"
    # Evaluated again, the newer numbers are the run's; files of the same size are sent again.
    evaluated(result, model, test_dice_mean=0.8)
    (result / "figures/a.png").write_bytes(b"\x89png")
    describe(
        CONFIG,
        result,
        run_of=model,
        metrics={"test_dice_mean": 0.8},
        files={"evaluation/figures": [result / "figures"]},
    )
    publish_known()
    stored = the_run(client)
    assert stored.data.metrics["test_dice_mean"] == 0.8
    path = client.download_artifacts(stored.info.run_id, "evaluation/figures/a.png", str(place / "models"))
    assert Path(path).read_bytes() == b"\x89png"


def test_an_evaluation_that_arrives_first_makes_the_run_and_the_training_names_it(place, client, no_sender):
    model = trained(place / "models/net-fold0")
    evaluated(place / "evaluation/fold0", model, test_dice_mean=0.9)
    publish(place / "evaluation/fold0")
    assert the_run(client).info.status == "RUNNING"
    publish_known()
    stored = the_run(client)
    assert stored.data.metrics == {"train_loss": 1.0, "val_dice_core": 0.5, "test_dice_mean": 0.9}
    assert (stored.info.status, stored.data.tags["fold"]) == ("FINISHED", "0")
    assert "distilldsm.placeholder" not in stored.data.tags


def test_what_is_published_costs_one_request_more_and_changes_nothing(place, client, no_sender, monkeypatch):
    model = trained(place / "models/fold0", 1.0, 0.5)
    evaluated(place / "evaluation/fold0", model, test_dice_mean=0.9)
    export_model(place / "export/fold0")
    describe(CONFIG, place / "export/fold0", run_of=model, model={"registered_name": "m"})
    publish_known()
    before = the_run(client).to_dictionary()
    asked = [
        fail(monkeypatch, client, name, lambda *_: True, error("INTERNAL_ERROR")) for name in ("log_batch", "set_tag")
    ]
    assert all(one.is_complete for one in publish_known())
    assert asked == [[], []]
    assert the_run(client).to_dictionary() == before
    # As after a crash between the last record's arrival and the tag that says so.
    monkeypatch.undo()
    os.chdir(place)
    for tag in [tag for tag in the_run(client).data.tags if tag.startswith("distilldsm.published")]:
        client.delete_tag(the_run(client).info.run_id, tag)
    publish_known()
    stored = the_run(client)
    assert history(client, "train_loss") == [(1, 1.0), (2, 0.5)]
    assert history(client, "test_dice_mean") == [(0, 0.9)]
    assert len(client.search_model_versions("name = 'm'")) == 1
    assert len(client.search_logged_models([stored.info.experiment_id])) == 1


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outages=st.lists(st.integers(0, 12), max_size=4))
def test_once_and_in_order_however_often_the_store_goes_away(place, empty_store, no_sender, outages):
    """An outage after so many writes of an attempt; then the store is away for the rest of it."""
    shutil.rmtree(place / "models", ignore_errors=True)
    shutil.copyfile(empty_store, place / "mlflow.db")
    work = trained(place / "models/fold0", 3.0, 2.0, 1.0)
    store = Store(f"sqlite:///{place}/mlflow.db")
    sound = store.client

    class Failing:
        tracking_uri = sound.tracking_uri
        left = 0

        def __getattr__(self, name: str) -> Any:
            if name.startswith(("log_", "set_", "create_", "update_")) or self.left <= 0:
                self.left -= 1
            if self.left < 0:
                raise ConnectionError("away")
            return getattr(sound, name)

    store.client = Failing()
    for writes in [*outages, 10**6]:
        store.client.left = writes
        outcome = Publisher(work, stores=lambda _: store).publish()
    assert (outcome.is_complete, outcome.problems) == (True, ())
    assert history(sound, "train_loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert the_run(sound).info.status == "FINISHED"
    assert [f.path for f in sound.list_artifacts(the_run(sound).info.run_id, "checkpoints")] == ["checkpoints/best.bin"]


def test_a_growing_training_is_published_as_it_grows(place, client, no_sender):
    work = place / "models/.fold0.partial"
    with training(work):
        publisher = Publisher(work)
        assert not publisher.publish().is_complete
        (left_to_it,) = publish_all([work])
        assert "its training is at work" in left_to_it.notes[0]
        assert the_run(client).info.status == "RUNNING"
        for number in (1, 2):
            add_epochs(work, 1 / number)
            publisher.publish()
            assert [step for step, _ in history(client, "train_loss")] == list(range(1, number + 1))
    assert publisher.publish().is_complete
    assert the_run(client).info.status == "FINISHED"


def test_a_resumed_training_goes_on_in_its_run_and_repeats_no_epoch(place, client, no_sender, monkeypatch):
    work = place / "models/.fold0.partial"
    with pytest.raises(KeyboardInterrupt), training(work):
        add_epochs(work, 3.0, 2.0)
        raise KeyboardInterrupt
    publish(work)
    assert the_run(client).info.status == "KILLED"
    write_json(work / "history.json", read_json(work / "history.json")[:1])  # the checkpoint was older
    with training(work, params={"a": 2, "b": 3}):
        publish(work)
        assert the_run(client).info.status == "RUNNING"
        add_epochs(work, 2.0, 1.0)
    publish(work)
    stored = the_run(client)
    assert stored.info.status == "FINISHED"
    assert history(client, "train_loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert stored.data.params == {"a": "1", "b": "3"}, "MLflow lets no run change its parameters"
    assert stored.data.tags["resumed.a"] == "2"
    # In another experiment it is another run.
    trained(work, 1.0, config=TrackingConfig(experiment="other/one"))
    publish(work)
    other = client.get_experiment_by_name("other/one")
    assert len(client.search_runs([other.experiment_id])) == 1
    assert other.artifact_location.endswith("mlartifacts/other_one")


def test_how_a_training_ended(place, client, no_sender):
    with pytest.raises(RuntimeError), training(place / "models/fold0"):
        raise RuntimeError("loss is not finite")
    publish_known()
    assert the_run(client).info.status == "FAILED"
    dead = read_json(place / "models/fold0/tracking.json") | {"status": "RUNNING", "process": 2**22 + 1}
    write_json(place / "models/fold0/tracking.json", dead | {"host": socket.gethostname()})
    outcome = publish(place / "models/fold0")
    assert (the_run(client).info.status, outcome.is_complete, outcome.problems) == ("KILLED", False, ())
    write_json(place / "models/fold0/tracking.json", dead | {"host": "elsewhere"})
    publish(place / "models/fold0")
    assert the_run(client).info.status == "RUNNING", "of another machine's processes nothing is known"


def test_the_lock_of_an_output_tells_whether_its_training_is_at_work(place, client, no_sender):
    """A process with the recorded number may be another one, and a living one may have no number here."""
    work = place / "models/.fold0.partial"
    with training(work):
        record = read_json(work / "tracking.json")
        with FileLock(place / "models/.fold0.lock"):
            write_json(work / "tracking.json", record | {"process": 2**22 + 1})
            assert Publisher(work).is_followed
            publish(work)
            assert the_run(client).info.status == "RUNNING"
        write_json(work / "tracking.json", record | {"process": os.getpid()})
        assert not Publisher(work).is_followed
        publish(work)
        assert the_run(client).info.status == "KILLED"


@pytest.mark.parametrize("method", ["log_artifact", "create_run", "set_terminated", "log_batch"])
def test_what_a_store_rejects_is_left_for_the_next_publish(place, client, no_sender, monkeypatch, method):
    model = trained(place / "models/fold0")
    with monkeypatch.context() as patch:
        if method == "create_run":
            nameless = SimpleNamespace(info=SimpleNamespace(run_id=""))
            patch.setattr(type(client), method, lambda *_, **__: nameless)
        else:
            fail(patch, client, method, lambda *_: True, OSError(errno.ENOSPC, "No space left on device"))
        outcome = publish(model)
        assert (outcome.is_complete, len(outcome.problems) > 0) == (False, True)
        assert not Publisher(model).is_published()
    publish_known()
    assert the_run(client).info.status == "FINISHED"
    assert history(client, "train_loss") == [(1, 1.0)]


def test_another_store_is_not_asked_for_the_recorded_ids(place, client, no_sender, monkeypatch):
    """A server with permissions answers 403 for an id that it does not know."""
    model = trained(place / "models/fold0")
    record = read_json(model / "tracking.json")
    record["run"] |= {"id": "elsewhere", "experiment_id": "77"}
    write_json(model / "tracking.json", record)
    fail(monkeypatch, client, "get_run", lambda _, said: "elsewhere" in said, error("PERMISSION_DENIED"))
    there = f"sqlite:///{place}/mlflow.db"
    assert not Publisher(model, to=there).is_published()
    assert publish(model, to=there).problems == ()
    assert Publisher(model, to=there).is_published()


def test_a_file_that_the_store_has_cut_is_sent_again(place, client, no_sender, monkeypatch, tmp_path):
    model, sound = trained(place / "models/fold0"), type(client).log_artifact

    def cut(self: Any, run_id: str, path: str, to: str) -> None:
        short = tmp_path / Path(path).name
        short.write_bytes(Path(path).read_bytes()[:-1])
        sound(self, run_id, str(short), to)

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "log_artifact", cut)
        outcome = publish(model)
    assert not outcome.is_complete
    assert re.search(r"checkpoints/\S+ did not arrive(.|\n)*bytes", outcome.problems[0])
    assert publish(model).is_complete
    [stored] = client.list_artifacts(outcome.run_id, "checkpoints")
    assert stored.file_size == (model / Path(stored.path).name).stat().st_size


def test_a_clock_that_goes_back_loses_nothing(place, client, no_sender, monkeypatch):
    model = trained(place / "models/fold0")
    for value in (0.5, 0.6):
        evaluated(place / "evaluation/fold0", model, test_dice_mean=value)
        publish_known()
        assert the_run(client).data.metrics["test_dice_mean"] == value
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda now=now: now - 10**12)
    assert [value for _, value in history(client, "test_dice_mean")] == [0.5, 0.6]


def test_one_bad_value_is_told_and_takes_no_other_along(place, client, no_sender, monkeypatch, capsys):
    trained(place / "models/fold0", params={f"p{i}": "x" * 501 if i == 5 else i for i in range(20)})

    def too_long(_: int, arguments: Any) -> bool:
        return any(len(getattr(one, "value", "")) > 500 for part in arguments if isinstance(part, list) for one in part
                   if type(one).__name__ == "Param")  # fmt: skip

    with monkeypatch.context() as patch:
        fail(patch, client, "log_batch", too_long, error("INVALID_PARAMETER_VALUE"))
        outcome = publish(place / "models/fold0")
        assert (outcome.is_complete, len(outcome.problems)) == (False, 1)
        assert "parameter p5" in outcome.problems[0]
        assert main(["publish"]) == 1
        said = capsys.readouterr()
        assert "parameter p5" in said.out
        assert "models/fold0: not everything could be published" in said.err.replace("error: ", "")
    assert len(the_run(client).data.params) == 19
    assert history(client, "train_loss") == [(1, 1.0)]
    assert main(["publish", "models"]) == 0
    assert len(the_run(client).data.params) == 20
    assert capsys.readouterr().out == "models/fold0: published\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("UNAUTHENTICATED", "let user 'ann' in.*MLFLOW_TRACKING_PASSWORD"),
        ("PERMISSION_DENIED", "let user 'ann' do this.*permission EDIT"),
        ("INTERNAL_ERROR", "as told"),
    ],
)
def test_a_denial_loses_nothing(place, client, no_sender, monkeypatch, code, words):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    trained(place / "models/fold0")
    with monkeypatch.context() as patch:
        fail(patch, client, "log_batch", lambda *_: True, error(code))
        outcome = publish(place / "models/fold0")
    assert not outcome.is_complete
    assert re.search(words, outcome.problems[0], re.DOTALL)
    publish_known()
    assert history(client, "train_loss") == [(1, 1.0)]


def test_an_absent_server_is_asked_once_and_another_store_takes_all(place, client, no_sender, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ABSENT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for fold in range(3):
        trained(place / f"models/fold{fold}", float(fold))
    first, *others = publish_all(known_outputs())
    assert first.is_away
    assert "does not answer" in first.problems[0]
    assert [(one.problems, one.directory.name) for one in others] == [
        (first.problems, "fold1"),
        (first.problems, "fold2"),
    ]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["publish", "models/fold0", "models/fold1", "--to", f"sqlite:///{place}/mlflow.db"]) == 0
    assert [run.info.run_name for run in all_runs(client)] == ["fold0", "fold1"]
    assert main(["publish", str(place / "mlartifacts")]) == 1
    assert "holds no output" in capsys.readouterr().err


def test_a_deleted_run_is_followed_by_a_new_one(place, client, no_sender):
    model = trained(place / "models/fold0")
    publish_known()
    client.delete_run(the_run(client).info.run_id)
    client.delete_experiment(client.get_experiment_by_name("distilldsm").experiment_id)
    evaluated(place / "evaluation/fold0", model, test_dice_mean=0.5)
    publish_known()
    (stored,) = all_runs(client, "metrics.test_dice_mean = 0.5")  # MLflow restores runs with their experiment
    assert stored.data.metrics["train_loss"] == 1.0


def test_a_pod_that_is_started_again_goes_on_in_the_same_run(place, client, no_sender, monkeypatch):
    """Without a work volume nothing of the first attempt is left but its run in MLflow, still RUNNING."""
    monkeypatch.setenv("KFP_RUN_ID", "k")
    key = key_in_pipeline("train", 0)
    (place / "pod1").mkdir()
    describe(CONFIG, place / "pod1", run_key=key, name="m", status="RUNNING", params={"a": 1}, tags={"fold": 0})
    publish(place / "pod1")
    trained(place / "pod2", 0.5, run_key=key)
    assert publish(place / "pod2").is_complete
    [run] = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert key_in_pipeline("train", 1) != key
    monkeypatch.setenv("KFP_RUN_ID", "another")
    assert key_in_pipeline("train", 0) != key
    monkeypatch.delenv("KFP_RUN_ID")
    assert key_in_pipeline("train", 0) is None
