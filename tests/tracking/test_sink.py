"""The store's corner cases: races between processes, older servers, damaged records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from requests import HTTPError, Response

from distilldsm.tracking.denial import DeniedError
from distilldsm.tracking.registry import register
from distilldsm.tracking.sink import RefusedError, Sink, prepare_environment

OPENING = {"op": "open", "run_key": "k", "experiment": "e", "run_id": None, "role": "train", "name": "n", "tags": {}}
OPENING |= {"time_ms": 1}


@pytest.fixture
def sink(place: Path, client: Any) -> Sink:
    return Sink(f"sqlite:///{place}/mlflow.db")


def error(code: str) -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return MlflowException("as told", ErrorCode.Value(code))


def raising(code: str, times: int = 10**6, then: Any = None) -> Any:
    """A function that fails so many times, then calls `then`."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise error(code)
        return then(*args, **kwargs)

    return call


def test_another_process_may_create_the_experiment_first(sink, monkeypatch):
    find = sink._client.get_experiment_by_name
    answers = iter([lambda name: None, find])
    monkeypatch.setattr(sink._client, "get_experiment_by_name", lambda name: next(answers)(name))
    sink._client.create_experiment("e")
    assert sink.open_run(OPENING, None)


def test_an_experiment_that_can_be_neither_found_nor_made_is_told(sink, monkeypatch):
    monkeypatch.setattr(sink._client, "get_experiment_by_name", lambda name: None)
    monkeypatch.setattr(sink._client, "create_experiment", raising("RESOURCE_ALREADY_EXISTS"))
    with pytest.raises(RuntimeError, match="neither found nor created"):
        sink.open_run(OPENING, None)
    monkeypatch.setattr(sink._client, "create_experiment", raising("PERMISSION_DENIED"))
    with pytest.raises(Exception, match="as told"):
        sink.open_run(OPENING, None)


def test_a_store_that_fails_while_the_run_is_looked_for_gets_no_second_run(sink, monkeypatch):
    run_id = sink.open_run(OPENING, None)
    monkeypatch.setattr(sink._client, "get_run", raising("TEMPORARILY_UNAVAILABLE"))
    with pytest.raises(Exception, match="as told"):
        sink.open_run(OPENING, run_id)


def test_a_run_unknown_here_is_found_by_its_key_or_made(sink):
    first = sink.open_run(OPENING, None)
    assert sink.open_run(OPENING, "0" * 32) == first
    assert sink.open_run({**OPENING, "run_key": "other"}, "0" * 32) != first


def test_an_older_server_refuses_one_parameter_not_all(sink, monkeypatch, caplog):
    run_id = sink.open_run(OPENING, None)
    log_batch = sink._client.log_batch

    def strict(run_id: str, **what: Any) -> None:
        if any(len(param.value) > 500 for param in what["params"]):
            raise error("INVALID_PARAMETER_VALUE")
        log_batch(run_id, **what)

    monkeypatch.setattr(sink._client, "log_batch", strict)
    sink.apply([{"op": "params", "values": {"a": "1", "long": "x" * 501, "b": "2"}}], Path(), "i")
    assert sink._client.get_run(run_id).data.params == {"a": "1", "b": "2"}
    assert "'long'" in caplog.text
    monkeypatch.setattr(sink._client, "log_batch", raising("TEMPORARILY_UNAVAILABLE"))
    with pytest.raises(Exception, match="as told"):
        sink.apply([{"op": "params", "values": {"c": "1", "d": "2"}}], Path(), "i")


def test_many_parameters_and_metrics_go_in_batches(sink):
    run_id = sink.open_run(OPENING, None)
    sink.apply([{"op": "params", "values": {f"p{i}": str(i) for i in range(200)}}], Path(), "i")
    sink.apply([{"op": "tags", "values": {f"t{i}": str(i) for i in range(200)}}], Path(), "i")
    values = {f"m{i}": float(i) for i in range(1100)}
    sink.apply([{"op": "metrics", "values": values, "time_ms": 1, "step": 0}], Path(), "i")
    data = sink._client.get_run(run_id).data
    assert len(data.params) == 200
    assert {f"t{i}" for i in range(200)} <= set(data.tags)
    assert data.metrics == values


def test_what_can_never_be_sent_is_refused(sink, tmp_path):
    sink.open_run(OPENING, None)
    with pytest.raises(RefusedError, match="unknown kind"):
        sink.apply([{"op": "new"}], tmp_path, "i")
    with pytest.raises(RefusedError, match="gone"):
        sink.apply([{"op": "artifact", "path": "spool/1/a", "to": None}], tmp_path, "i")
    sink._run_id = "0" * 32
    with pytest.raises(RefusedError):
        sink.apply([{"op": "end", "status": "FINISHED", "time_ms": 1}], tmp_path, "i")


def test_what_may_be_sent_later_is_not_refused(sink, tmp_path, monkeypatch):
    sink.open_run(OPENING, None)
    monkeypatch.setattr(sink._client, "set_terminated", raising("TEMPORARILY_UNAVAILABLE"))
    with pytest.raises(Exception, match="as told") as caught:
        sink.apply([{"op": "end", "status": "FINISHED", "time_ms": 1}], tmp_path, "i")
    assert not isinstance(caught.value, RefusedError)


def test_a_registry_that_is_away_is_asked_again():
    away = SimpleNamespace(create_registered_model=raising("TEMPORARILY_UNAVAILABLE"))
    with pytest.raises(Exception, match="as told"):
        register(away, {"registered_name": "m"}, run_id="r", model_id="id", identity="i", source=Path())


def test_whether_a_store_is_reachable(sink, monkeypatch):
    assert sink.reachable()
    monkeypatch.setattr(sink._client, "search_experiments", raising("INTERNAL_ERROR"))
    assert not sink.reachable()


def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    prepare_environment()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("UNAUTHENTICATED", "let user 'ann' in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("PERMISSION_DENIED", "let user 'ann' do this: ask who administers it for the permission EDIT"),
    ],
)
def test_a_denial_is_no_refusal(sink, monkeypatch, code, told):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    sink.open_run(OPENING, None)
    monkeypatch.setattr(sink._client, "log_batch", raising(code))
    with pytest.raises(DeniedError, match=told):
        sink.apply([{"op": "tags", "values": {"a": "b"}}], Path(), "s:1")
    monkeypatch.setattr(sink._client, "get_experiment_by_name", raising(code))
    with pytest.raises(DeniedError, match=told):
        sink.open_run(OPENING, None)


@pytest.mark.parametrize(("status", "kind"), [(401, DeniedError), (403, DeniedError), (500, HTTPError)])
def test_a_denied_file_is_known_by_its_status(sink, monkeypatch, tmp_path, status, kind):
    """Files go through the server without MLflow's own errors."""
    sink.open_run(OPENING, None)
    response = Response()
    response.status_code = status
    monkeypatch.setattr(sink, "_artifact", raising_error(HTTPError("as told", response=response)))
    (tmp_path / "spool/1").mkdir(parents=True)
    (tmp_path / "spool/1/a.txt").write_text("a")
    with pytest.raises(kind):
        sink.apply([{"op": "artifact", "path": "spool/1/a.txt", "to": None}], tmp_path, "s:1")


def raising_error(failure: Exception) -> Any:
    def call(*_: Any) -> None:
        raise failure

    return call


@pytest.mark.parametrize(("set_by_user", "while_sending"), [(None, "600"), ("77", "77")])
def test_files_are_given_more_time_than_calls(sink, monkeypatch, tmp_path, set_by_user, while_sending):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", set_by_user or "10")
    sink.open_run(OPENING, None)
    seen = []
    monkeypatch.setattr(sink._client, "log_artifact", lambda *_: seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
    sink._artifact(tmp_path / "model.bin", None)
    assert seen == [while_sending]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == (set_by_user or "10")


RACER = """
import sys
from distilldsm.tracking.sink import Sink
opening = {"run_key": sys.argv[2], "experiment": "e", "run_id": None, "role": "train", "name": "n", "tags": {}}
sink = Sink(sys.argv[1])
print(sink.open_run({**opening, "time_ms": 1}, None))
"""


@pytest.mark.slow
def test_processes_may_open_a_new_store_at_once(place):
    uri = f"sqlite:///{place}/sub/mlflow.db"
    command = [sys.executable, "-c", RACER, uri]
    racers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
    runs = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(set(runs)) == 3
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == set(runs)
