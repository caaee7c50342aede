"""Files, models, races and settings of publishing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distilldsm.core.files import read_json, write_json
from distilldsm.tracking import describe
from distilldsm.tracking.publish import publish
from distilldsm.tracking.store import patience, prepare_environment
from tests.tracking.store import (
    CONFIG,
    all_runs,
    export_model,
    publish_known,
    trained,
)


def test_a_file_that_is_gone_or_another_is_not_sent(place, client, no_sender):
    """Whatever a record says, no file is sent but the one that its stage has seen."""
    model = trained(place / "models/fold0")
    secret = place / "secret.txt"
    secret.write_text("mine")
    record = read_json(model / "tracking.json")
    record["files"] += [
        {"path": path, "to": "x", "sha256": "0" * 64} for path in ("../../secret.txt", str(secret), "..", "no")
    ]
    write_json(model / "tracking.json", record)
    outcome = publish(model)
    assert outcome.is_complete
    assert len(outcome.notes) == 4
    assert [f.path for f in client.list_artifacts(outcome.run_id)] == ["checkpoints"]


def test_another_process_may_create_the_experiment_first(place, client, no_sender, monkeypatch):
    find = type(client).get_experiment_by_name
    answers = iter([lambda *_: None, lambda *_: None, find])
    monkeypatch.setattr(type(client), "get_experiment_by_name", lambda *a: next(answers, find)(*a))
    client.create_experiment("distilldsm")
    trained(place / "models/fold0")
    publish_known()
    assert len(all_runs(client)) == 1


def test_files_are_given_more_time_than_calls_and_the_users_own_settings_stay(monkeypatch):
    for mine, expected in ((None, "600"), ("77", "77")):
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        if mine:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", mine)
        prepare_environment()
        with patience():
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == expected
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == (mine or "10")


def test_where_the_flavour_cannot_be_written_the_files_are_kept(place, client, no_sender, monkeypatch):
    describe(CONFIG, export_model(place / "export/fold0"), name="n", model={"registered_name": "m"})
    monkeypatch.setitem(sys.modules, "mlflow.pyfunc", None)
    outcome = publish(place / "export/fold0")
    assert "mlflow.pyfunc is not installed" in outcome.notes[0]
    files = [f.path for f in client.list_artifacts(outcome.run_id, "exported_model")]
    assert "exported_model/metadata.json" in files


RACER = """
import sys
from pathlib import Path
from distilldsm.tracking.publish import publish
outcome = publish(Path(sys.argv[1]))
assert outcome.is_complete, outcome
print(outcome.run_id)
"""


@pytest.mark.slow
def test_processes_may_publish_into_a_new_store_at_once(place, no_sender, monkeypatch):
    """Two of them the same output: one run each, in one experiment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/sub/mlflow.db")
    places = [trained(place / f"models/fold{n}") for n in (0, 0, 1)]
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(one)], stdout=subprocess.PIPE, text=True) for one in places
    ]
    runs = [racer.communicate(timeout=240)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert (runs[0] == runs[1], runs[0] == runs[2]) == (True, False)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/sub/mlflow.db")
    assert {run.info.run_id for run in all_runs(client)} == set(runs)
