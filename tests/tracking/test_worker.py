"""The sending process: when it stops, what it says about a process that vanished, what it samples."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from distilldsm.tracking import worker as worker_module
from distilldsm.tracking.journal import State, pending, read_entries, segments
from distilldsm.tracking.worker import SystemSampler, Worker
from tests.tracking.conftest import FakeSink
from tests.tracking.test_delivery import metrics, opened, steps

ME = os.getpid()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(worker_module, "POLL_S", 0.01)
    monkeypatch.setattr(worker_module, "_FIRST_PAUSE_S", 0.01)
    # In these tests the worker is no child of the tracked process.
    monkeypatch.setattr(worker_module.os, "getppid", lambda: ME)


def start(worker: Worker) -> threading.Thread:
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    return thread


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_it_sends_what_comes_and_ends_when_told(tmp_path, fake):
    writer = opened(tmp_path / "k")
    reading, writing = os.pipe()
    worker = Worker(tmp_path / "k", ME, sinks=lambda uri: fake)
    threading.Thread(target=worker.listen, args=(reading,), daemon=True).start()
    thread = start(worker)
    metrics(writer, range(2))
    wait_for(lambda: steps(fake) == [0, 1])
    metrics(writer, range(2, 4))
    writer.append("end", status="FINISHED")
    writer.close()
    os.write(writing, b"finish\n")
    thread.join(10)
    assert not thread.is_alive()
    assert steps(fake) == [0, 1, 2, 3]
    assert [r["status"] for r in fake.applied if r["op"] == "end"] == ["FINISHED"]
    assert not segments(tmp_path / "k")
    os.close(writing)
    os.close(reading)


def test_it_waits_for_a_store_that_comes_back(tmp_path, fake):
    fake.up = False
    metrics(opened(tmp_path / "k"), range(2))
    worker = Worker(tmp_path / "k", ME, sinks=lambda uri: fake)
    thread = start(worker)
    wait_for(lambda: "nobody at" in (State.load(tmp_path / "k").last_error or ""))
    fake.up = True
    wait_for(lambda: steps(fake) == [0, 1])
    worker.finish.set()
    thread.join(10)
    assert not thread.is_alive()


def test_at_the_end_it_gives_up_on_a_store_that_stays_away(tmp_path, fake):
    fake.up = False
    writer = opened(tmp_path / "k")
    metrics(writer, range(2))
    writer.close()
    worker = Worker(tmp_path / "k", ME, sinks=lambda uri: fake)
    worker.finish.set()
    result = worker.run()
    assert result.left == 2
    assert result.error
    assert pending(tmp_path / "k") == 2


def test_a_process_that_vanished_leaves_a_killed_run(tmp_path, fake, monkeypatch):
    metrics(opened(tmp_path / "k"), range(3))
    monkeypatch.setattr(worker_module.os, "getppid", lambda: 1)
    result = Worker(tmp_path / "k", ME, sinks=lambda uri: fake).run()
    assert result.left == 0
    assert [r["op"] for r in fake.applied] == ["metrics"] * 3 + ["end"]
    assert fake.applied[-1]["status"] == "KILLED"


def test_the_end_of_the_pipe_means_the_same(tmp_path, fake):
    metrics(opened(tmp_path / "k"), range(1))
    reading, writing = os.pipe()
    os.close(writing)
    worker = Worker(tmp_path / "k", ME, sinks=lambda uri: fake)
    worker.listen(reading)
    worker.run()
    assert fake.applied[-1]["status"] == "KILLED"
    os.close(reading)


@pytest.mark.parametrize("how", ["ended", "attached", "resumed"])
def test_no_run_is_called_killed_that_was_not(tmp_path, fake, how, monkeypatch):
    writer = opened(tmp_path / "k", role="attach" if how == "attached" else "train")
    if how == "ended":
        writer.append("end", status="FINISHED")
    if how == "resumed":
        monkeypatch.setattr("tests.tracking.test_delivery.writer_identity", lambda: {"pid": 1, "host": "elsewhere"})
        opened(tmp_path / "k")
    worker = Worker(tmp_path / "k", ME, sinks=lambda uri: fake)
    worker.orphaned = True
    worker.finish.set()
    worker.run()
    assert [r["status"] for r in fake.applied if r["op"] == "end"] == (["FINISHED"] if how == "ended" else [])


def test_other_runs_left_behind_are_sent_too(tmp_path, fake):
    metrics(opened(tmp_path / "old"), range(5))
    metrics(opened(tmp_path / "new"), range(2))
    worker = Worker(tmp_path / "new", ME, sinks=lambda uri: fake)
    thread = start(worker)
    wait_for(lambda: steps(fake) == [0, 1, 0, 1, 2, 3, 4])
    worker.finish.set()
    thread.join(10)


def test_system_metrics_are_records_like_others(tmp_path, fake):
    opened(tmp_path / "k")
    worker = Worker(tmp_path / "k", ME, 0.02, sinks=lambda uri: fake)
    thread = start(worker)
    wait_for(lambda: len(steps(fake)) >= 3)
    worker.finish.set()
    thread.join(10)
    assert not thread.is_alive()
    values = fake.applied[-1]["values"]
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert values["system/system_memory_usage_megabytes"] > values["system/process_memory_megabytes"] > 10
    assert steps(fake) == sorted(steps(fake))
    last = [e.record["op"] for s in segments(tmp_path / "k") for e in read_entries(s)]
    assert last == ["open"], "only the tracked process' own segment is left"


def test_memory_of_children_counts(monkeypatch):
    import psutil

    sampler = SystemSampler(ME)

    class Twin:
        pid = -1
        memory_info = staticmethod(lambda: type("M", (), {"rss": 5_000_000_000}))

    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])  # other tests' children aside
    alone = sampler.sample()["system/process_memory_megabytes"]
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [Twin])
    assert sampler.sample()["system/process_memory_megabytes"] == pytest.approx(alone + 5000, abs=200)


def test_a_gpu_is_sampled_where_there_is_one():
    sampler = SystemSampler(ME)

    class Gpu:
        cleared = False

        def collect_metrics(self) -> None:
            self.values = {"gpu_0_utilization_percentage": 40.0}

        def aggregate_metrics(self) -> dict[str, float]:
            return self.values

        def clear_metrics(self) -> None:
            self.cleared = True

    sampler._gpu = Gpu()
    assert sampler.sample()["system/gpu_0_utilization_percentage"] == 40.0
    assert sampler._gpu.cleared


def test_without_a_sampler_the_rest_goes_on(tmp_path, fake, monkeypatch):
    def broken(pid: int) -> None:
        raise ImportError("no psutil")

    monkeypatch.setattr(worker_module, "SystemSampler", broken)
    metrics(opened(tmp_path / "k"), range(1))
    worker = Worker(tmp_path / "k", ME, 0.01, sinks=lambda uri: fake)
    worker.finish.set()
    assert worker.run().left == 0


def test_sampling_ends_with_the_process_it_watches(tmp_path, fake, monkeypatch):
    def gone(self) -> dict[str, float]:
        raise ProcessLookupError("gone")

    monkeypatch.setattr(SystemSampler, "sample", gone)
    opened(tmp_path / "k")
    worker = Worker(tmp_path / "k", ME, 0.01, sinks=lambda uri: fake)
    thread = worker._start_sampling()
    thread.join(10)
    assert not thread.is_alive()


def test_the_command_line(tmp_path, monkeypatch):
    sink = FakeSink()
    monkeypatch.setattr(Worker.__init__, "__kwdefaults__", {"sinks": lambda uri: sink})
    directory: Path = tmp_path / "k"
    writer = opened(directory)
    metrics(writer, range(2))
    writer.close()
    reading, writing = os.pipe()
    os.write(writing, b"finish\n")
    assert worker_module.main([str(directory), "--parent", str(ME)], stream=reading) == 0
    assert steps(sink) == [0, 1]
    sink.up = False
    metrics(opened(directory), range(2))
    os.write(writing, b"finish\n")
    assert worker_module.main([str(directory), "--parent", str(ME)], stream=reading) == 1
    os.close(writing)
    os.close(reading)
