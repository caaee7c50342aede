"""Tracking where something fails: disk, server, worker or the training itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distilldsm import tracking
from distilldsm.config import TrackingConfig
from distilldsm.tracking import default_uri, replay_journals, start_run
from distilldsm.tracking.journal import pending
from tests.tracking.store import history, journal_text, onnx_model, run_file, the_run

CONFIG = TrackingConfig()
ABSENT = "http://127.0.0.1:9"


def test_a_full_disk_or_bad_input_never_stops_the_work(place, run, caplog, monkeypatch):
    run.log_artifact(place / "missing.txt")
    run.log_metrics({"a": "not a number"})
    run.log_figure("no figure", "x.png")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.JournalWriter, "append", full)
    run.log_metrics({"a": 1.0})
    run.close()
    assert caplog.text.count("WARNING") >= 5
    assert "No space left" in caplog.text


def test_a_journal_that_cannot_be_made_means_no_tracking(place, monkeypatch, caplog):
    (place / "tracking").write_text("in the way")
    with start_run(CONFIG, directory=place / "work", name="n") as run:
        run.log_metrics({"a": 1.0}, step=1)
    assert run.run_key is None
    assert "opening the journal" in caplog.text
    assert not (place / "work" / "mlflow_run.json").exists()


def test_an_absent_server_costs_no_time_and_its_records_are_sent_later(place, client, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ABSENT)
    with start_run(CONFIG, directory=place / "work", name="n") as run:
        for step in range(500):
            run.log_metrics({"loss": float(step)}, step=step)
        worker = run._worker
    assert worker.poll() is not None
    assert "are kept in" in caplog.text
    assert "127.0.0.1" in caplog.text, "the reason is told"
    journal = place / "tracking" / run.run_key
    assert pending(journal) >= 501
    assert run_file(place / "work")["run_id"] is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result = replay_journals(tracking_uri=default_uri())
    assert (result.left, result.rejected) == (0, 0)
    assert history(client, "loss") == [(step, float(step)) for step in range(500)]
    assert replay_journals(tracking_uri=default_uri()).sent == 0
    assert history(client, "loss") == [(step, float(step)) for step in range(500)]


KILLED = """
import os, signal, sys
from pathlib import Path
from distilldsm.config import TrackingConfig
from distilldsm.tracking import start_run
run = start_run(TrackingConfig(), directory=Path("work"), name="n")
for step in range(50):
    run.log_metrics({"loss": float(step)}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_records_of_a_killed_training_arrive_and_its_resumption_goes_on(place, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    root = str(Path(tracking.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=place, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not client.search_runs(["0", "1"], "attributes.status = 'KILLED'"):  # its worker outlives it
        assert time.monotonic() < deadline, journal_text(place)
        time.sleep(0.2)
    assert history(client, "loss") == [(step, float(step)) for step in range(50)]
    with start_run(CONFIG, directory=place / "work", name="n") as run:
        run.log_metrics({"loss": 50.0}, step=50)
    stored = the_run(client)
    assert history(client, "loss") == [(step, float(step)) for step in range(51)]
    assert stored.info.status == "FINISHED"
    assert run_file(place / "work")["run_id"] == stored.info.run_id
    assert run.run_id == stored.info.run_id
    assert not re.findall(r"\.jsonl", " ".join(path.name for path in (place / "tracking" / run.run_key).iterdir()))


def test_a_worker_that_hangs_is_not_waited_for(place, monkeypatch, caplog):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(sleeper, stdin=subprocess.PIPE)
    monkeypatch.setattr(tracking, "_start_worker", lambda *_, **__: process)
    run = start_run(CONFIG, directory=place / "work", name="n")
    run.log_metrics({"a": 1.0}, step=1)
    run.close(timeout=0.1)
    run.close()
    run.log_metrics({"a": 1.0}, step=2)
    assert process.poll() is not None
    assert "2 records are kept" in caplog.text


@pytest.mark.slow
def test_a_server_that_comes_up_late_gets_everything(place, empty_store, no_worker, monkeypatch):
    import shutil
    import socket

    from mlflow import MlflowClient

    model = onnx_model(place / "exported")
    shutil.copyfile(empty_store, place / "server.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with start_run(CONFIG, directory=place / "work", name="n", tags={"fold": "0"}) as run:
        run.log_metrics({"loss": 0.5}, step=1)
        run.log_table([{"case": "a"}], "cases.json")
        run.log_exported_model(model, registered_name="m")
    assert replay_journals().left == 4
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///server.db"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--artifacts-destination", str(place / "kept"), "--workers", "1"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while replay_journals().left:
            assert time.monotonic() < deadline, "the server never took them"
            time.sleep(0.5)
        client = MlflowClient(tracking_uri=uri)
        stored = the_run(client)
        assert (stored.info.status, stored.data.tags["fold"]) == ("FINISHED", "0")
        assert history(client, "loss") == [(1, 0.5)]
        assert [f.path for f in client.list_artifacts(stored.info.run_id)] == ["cases.json"]
        assert client.get_model_version_by_alias("m", "challenger").run_id == stored.info.run_id
        assert list((place / "kept").rglob("model.onnx"))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
