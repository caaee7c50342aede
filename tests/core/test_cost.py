"""What is measured is this process's own, and the most of all processes that took part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from distilldsm.core import cost


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
