"""What is measured is this process's own, and the most of all processes that took part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distilldsm.core import cost


def test_the_peak_grows_and_stays():
    before = cost.peak_memory_gb()
    block = np.ones(40_000_000)  # 0.32 GB
    during = cost.peak_memory_gb()
    del block
    assert during >= max(before, 0.32)
    assert cost.peak_memory_gb() >= during


def test_the_peak_stays_where_the_system_tells_less_later(monkeypatch):
    told = iter([90.087, 90.086, 90.1])
    monkeypatch.setattr(cost, "_seen", {})
    monkeypatch.setattr(cost, "_peak_told_gb", lambda: next(told))
    assert [cost.peak_memory_gb() for _ in range(3)] == [90.087, 90.087, 90.1]
    monkeypatch.setattr(cost, "_peak_told_gb", lambda: 1.0)
    monkeypatch.setattr(cost.os, "getpid", lambda: -1)  # another process does not inherit it
    assert cost.peak_memory_gb() == 1.0


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = np.ones(100_000_000)  # 0.8 GB
    code = "from distilldsm.core import cost; print(cost.peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.4
    del block


def test_a_gpu_counts_where_it_was_used(monkeypatch):
    cuda = SimpleNamespace(is_initialized=lambda: True, max_memory_allocated=lambda: 2_500_000_000)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert cost.peak_gpu_memory_gb() == 2.5
    cuda.is_initialized = lambda: False
    assert cost.peak_gpu_memory_gb() is None


def test_a_resumed_training_keeps_the_larger_peak(tmp_path: Path, monkeypatch):
    for peak, epochs in ((3.0, 2), (1.0, 3)):
        monkeypatch.setattr(cost, "peak_memory_gb", lambda peak=peak: peak)
        taken = cost.TrainingCost(tmp_path, {"parameters": 5})
        for done in range(1, epochs + 1):
            taken.write([{"seconds": 10.0 * (k + 1)} for k in range(done)])
    stored = json.loads((tmp_path / "cost.json").read_text())
    assert (stored["peak_memory_gb"], stored["starts"], stored["epochs"]) == (3.0, 2, 3)
    assert (stored["seconds_per_epoch"], stored["seconds"]) == (20.0, 60.0)
