"""Samples the machine's load while a training runs: one JSON object per line of `system.jsonl`, beside its record."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from distilldsm.tracking.contents import lines_of
from distilldsm.tracking.record import SYSTEM


class SystemSampler:
    """Measures the machine's load and the memory of the training and its children. Uses MLflow's metric names."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._psutil, self._pid = psutil, pid
        psutil.cpu_percent()  # the first call only starts the measurement
        self._gpu = None
        with contextlib.suppress(Exception):  # no GPU, or its library is not installed
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self._gpu = GPUMonitor()

    def sample(self) -> dict[str, float]:
        """One measurement, in percent and megabytes (10^6 bytes).

        Raises:
            psutil.Error: the tracked process has ended.
        """
        memory = self._psutil.virtual_memory()
        process = self._psutil.Process(self._pid)
        family = process.memory_info().rss
        for child in process.children(recursive=True):
            with contextlib.suppress(self._psutil.Error):
                if child.pid != os.getpid():
                    family += child.memory_info().rss
        values = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_megabytes": family / 1e6,
        }
        if self._gpu is not None:
            with contextlib.suppress(Exception):
                self._gpu.collect_metrics()
                values |= self._gpu.aggregate_metrics()
                self._gpu.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}


def sample_until(
    finish: threading.Event, directory: Path, sampler: SystemSampler, interval_s: float, started_ms: int
) -> None:
    """Append a sample every `interval_s` seconds. The steps are seconds since the run first started.

    Each step is above the last one, also if the clock goes back: MLflow would take an equal step for the same sample.

    Raises:
        Exception: the process has ended, or the file cannot be written.
    """
    path = directory / SYSTEM
    if path.is_file() and not path.read_bytes().endswith(b"\n"):  # a killed process may have left half a line
        with open(path, "a", encoding="utf-8") as stream:
            stream.write("\n")
    step = max((int(row["step"]) for row in lines_of(path)), default=-1)
    while not finish.wait(interval_s):
        time_ms = time.time_ns() // 1_000_000
        step = max((time_ms - started_ms) // 1000, step + 1)
        row = {"time_ms": time_ms, "step": step, "values": sampler.sample()}
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
