"""The process that sends, as a stage sees it: it follows, it never slows or stops the work, and it leaves no orphan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from distilldsm.config import TrackingConfig
from distilldsm.core.files import read_json
from distilldsm.tracking import describe, followed, follower, identity_of, process, run_key_of, send, system
from distilldsm.tracking.follower import Follower
from distilldsm.tracking.publish import Outcome
from distilldsm.tracking.system import SystemSampler
from tests.tracking.store import (
    CONFIG,
    add_epochs,
    evaluated,
    export_model,
    history,
    run_of,
    the_run,
    trained,
    training,
)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_a_training_is_followed_and_the_next_stage_sends_what_is_missing(place, client, monkeypatch, caplog, capsys):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    children = set(psutil.Process().children())  # helpers of other tests, e.g. of multiprocessing
    with monkeypatch.context() as patch:
        patch.setattr(process, "start", lambda *_, **__: None)
        trained(place / "models/fold1", name="left")
    work = place / "models/.fold0.partial"
    with training(work):
        add_epochs(work, 1.0, 0.5)
        wait_for(lambda: len(client.search_runs(["0", "1"])) == 2)
    assert caplog.text == ""
    assert set(psutil.Process().children()) <= children
    stored = client.get_run(run_of(work)["id"])
    losses = client.get_metric_history(stored.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in losses] == [(1, 1.0), (2, 0.5)]
    assert stored.info.status == "FINISHED"
    assert 0 <= stored.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert stored.data.metrics["system/process_memory_megabytes"] > 10
    files = {path.name: path.read_bytes() for path in work.iterdir()}
    model = work.rename(place / "models/fold0")
    export = export_model(place / "export/fold0")
    describe(CONFIG, export, run_of=model, model={"registered_name": "m"})
    send(export, model)
    assert capsys.readouterr().out == "registered as m version 1, champion: there was no champion\n"
    assert {path.name: path.read_bytes() for path in model.iterdir()} == files
    assert client.get_model_version_by_alias("m", "champion").run_id == stored.info.run_id
    assert caplog.text == ""


def test_an_absent_server_costs_a_line_and_nothing_else(place, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted99@127.0.0.1:9/base?token=planted99")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    work = place / "models/.fold0.partial"
    with training(work):
        add_epochs(work, 1.0)
        wait_for(lambda: "the work goes on" in caplog.text)
    assert run_of(work)["id"] is None
    last = caplog.messages[-1]
    output = place / "models/fold0"
    assert last.startswith(f"MLflow: not all of {output} is published (http://127.0.0.1:9/base: the server does not")
    assert last.endswith(f"the next stage sends it, or: distilldsm publish {output}")
    assert "planted99" not in caplog.text + (work / "tracking.json").read_text()


KILLED = """
import os, signal, time
from pathlib import Path
from tests.tracking.store import add_epochs, training
with training(Path("models/.fold0.partial")):
    add_epochs(Path("models/.fold0.partial"), 1.0, 0.5)
    if os.fork() == 0:  # a worker that holds the pipe open
        time.sleep(60)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_sender_ends_with_a_killed_training_whose_run_is_called_killed(place, client):
    root = Path(process.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    stage = subprocess.Popen([sys.executable, "-c", KILLED], env=environment, stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    assert stage.stdout.readline() == "ready\n"
    children = psutil.Process(stage.pid).children()
    (sender,) = [child for child in children if "distilldsm.tracking.follower" in child.cmdline()]
    stage.kill()
    stage.wait()
    wait_for(lambda: not sender.is_running() or sender.status() == psutil.STATUS_ZOMBIE)
    for child in children:
        if child != sender:
            child.kill()
    assert the_run(client).info.status == "KILLED"
    assert history(client, "train_loss") == [(1, 1.0), (2, 0.5)]
    with training(place / "models/.fold0.partial"):
        add_epochs(place / "models/.fold0.partial", 0.25)
    assert the_run(client).info.status == "FINISHED"
    assert history(client, "train_loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_sender_that_hangs_is_not_waited_for(place, monkeypatch, caplog):
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    monkeypatch.setattr(process, "LOCAL_TIMEOUT_S", 0.1)
    trained(place / "models/fold0")
    assert caplog.messages[-1].startswith(
        f"MLflow: not all of {place}/models/fold0 is published (the store did not take it in time)"
    )
    monkeypatch.setattr(process.sys, "executable", "/gone")
    send(trained(place / "models/fold1"))
    assert "publishing failed: FileNotFoundError" in caplog.text


@pytest.mark.parametrize("reason", ["disabled", "rank", "none"])
def test_nothing_is_tracked_where_it_should_not_be(place, monkeypatch, reason):
    config = None if reason == "none" else TrackingConfig(enabled=reason != "disabled")
    if reason == "rank":
        monkeypatch.setenv("RANK", "1")
    with followed(config, place, name="n", at_end={}, params={"a": 1}):
        pass
    assert list(place.iterdir()) == []
    describe(config, place / ".", name="n", metrics={"a": 1})
    assert run_of(place) is None
    send(place)
    assert [path.name for path in place.iterdir()] == ["tracking.json"]


def test_what_cannot_be_described_never_stops_the_work(place, no_sender, monkeypatch, caplog):
    describe(CONFIG, place, name="n", metrics={"a": "not a number"})
    assert run_of(place) is None
    describe(CONFIG, place, name="n", model={"registered_name": "m"})
    assert "metadata.json is missing" in caplog.text
    (place / "file").touch()
    describe(CONFIG, place / "file", name="n")
    with training(place / "models/fold0"):
        (place / "models/fold0/best.bin").unlink()
    assert read_json(place / "models/fold0/tracking.json")["status"] == "FINISHED"
    assert caplog.text.count("WARNING") == 3


def test_a_damaged_record_names_no_run(place, no_sender):
    good = evaluated(place / "good", trained(place / "models/fold0"))
    assert run_key_of(good) == run_key_of(place / "models/fold0")
    text = (good / "tracking.json").read_text()
    deep = "[" * 100_000
    for damaged in ("{", "[]", deep, text.replace(run_key_of(good), "../../evil"), text.replace('"adds"', '"more"')):
        (good / "tracking.json").write_text(damaged)
        assert identity_of(good) is None
        describe(CONFIG, place, run_of=good, metrics={"a": 1.0})
        assert run_of(place) is None


def test_no_module_that_a_stage_imports_brings_mlflow_or_torch():
    code = "import sys, distilldsm.tracking as t; print(sorted({'mlflow', 'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "POLL_S", 0.01)
    monkeypatch.setattr(follower, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(follower.os, "getppid", os.getpid)


def test_the_follower_asks_again_until_a_store_comes_back_and_gives_up_at_the_end(place, pauses):
    said: list[Outcome] = []
    outcomes = [Outcome(directory=place, problems=("away",))] * 3 + [Outcome(directory=place)]
    asked: list[bool] = []

    def publish(*, is_abandoned: bool) -> Outcome:
        asked.append(is_abandoned)
        return outcomes[min(len(asked), len(outcomes)) - 1]

    one = Follower(place, os.getpid(), said.append)
    one.publisher = SimpleNamespace(publish=publish)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    wait_for(lambda: len(said) == 4)
    one.finish.set()
    thread.join(30)
    assert [bool(outcome.problems) for outcome in said] == [True, True, True, False, False]
    outcomes[-1] = outcomes[0]
    one.run()
    assert len(said) == 5 + follower._LAST_ATTEMPTS


def test_an_output_that_is_about_to_be_replaced_is_published_first(place, client, monkeypatch, pauses):
    with monkeypatch.context() as patch:
        patch.setattr(process, "start", lambda *_, **__: None)
        trained(place / "models/fold0", 1.0)
        trained(place / "models/.fold0.partial", 2.0)
    one = Follower(place / "models/.fold0.partial", os.getpid(), lambda _: None)
    one.finish.set()  # the training ended before anything else could be published
    one.run()
    runs = [run.info.run_id for run in client.search_runs(["0", "1"])]
    losses = [[m.value for m in client.get_metric_history(run, "train_loss")] for run in runs]
    assert sorted(losses) == [[1.0], [2.0]]


def test_memory_of_children_and_a_gpu_count(monkeypatch):
    sampler = SystemSampler(os.getpid())
    twin = SimpleNamespace(pid=-1, memory_info=lambda: SimpleNamespace(rss=5_000_000_000))
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])  # other tests' children aside
    alone = sampler.sample()["system/process_memory_megabytes"]
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [twin])
    values = {"gpu_0_utilization_percentage": 40.0}
    cleared: list[bool] = []
    sampler._gpu = SimpleNamespace(
        collect_metrics=lambda: None, aggregate_metrics=lambda: values, clear_metrics=lambda: cleared.append(True)
    )
    sample = sampler.sample()
    assert sample["system/process_memory_megabytes"] == pytest.approx(alone + 5000, abs=200)
    assert (sample["system/gpu_0_utilization_percentage"], cleared) == (40.0, [True])


def test_sampling_goes_on_after_half_a_line(place, monkeypatch):
    monkeypatch.setattr(SystemSampler, "sample", lambda self: {"system/a": 1.0})
    last = {"time_ms": 1, "step": 2**40, "values": {}}  # the clock has gone back since then
    (place / "system.jsonl").write_text(json.dumps(last) + '\n{"time_ms": 1, "st')
    waits = iter([False, False, True])
    system.sample_until(
        SimpleNamespace(wait=lambda _: next(waits)), place, SystemSampler(os.getpid()), 0.1, started_ms=0
    )
    _, _, *whole = (place / "system.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == [2**40 + 1, 2**40 + 2]
    assert all('"system/a": 1.0' in line for line in whole)
