"""Cost of a training and of its predictions: seconds, memory, and the machine on which they were measured."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilldsm.core.files import read_json, write_json
from distilldsm.core.machine import cpu_name, peak_memory_gb

COST = "cost.json"
"""File in a model directory: the cost of the training."""
TIMING = "timing.json"
"""File in an evaluation directory: the cost of the predictions, and the model's `cost.json`."""


def peak_gpu_memory_gb() -> float | None:
    """Largest memory that torch has allocated on this process's GPU, 10^9 bytes; None if torch has not used a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_allocated() / 1e9)


def machine(device: str | None = None) -> dict[str, Any]:
    """The device (`cpu` or `cuda`; the GPU by default if there is one), its name, torch's threads and version."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _peaks(*others: Mapping[str, Any]) -> dict[str, float | None]:
    """For each kind of memory, the largest peak of this process and of the measurements in `others`."""
    peaks: dict[str, float | None] = {}
    for key, own in (("peak_memory_gb", peak_memory_gb()), ("peak_gpu_memory_gb", peak_gpu_memory_gb())):
        known = [value for value in (own, *(other.get(key) for other in others)) if value is not None]
        peaks[key] = round(max(known), 3) if known else None
    return peaks


class TrainingCost:
    """Keeps `cost.json` of a training up to date, also when the training is resumed in another process.

    Args:
        work: the training's work directory.
        facts: values that do not change: parameters, device, precision ...
    """

    def __init__(self, work: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._facts = work / COST, dict(facts)
        self._before: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the cost of the epochs in `history`. The seconds count training, without validation."""
        seconds = [float(record["seconds"]) for record in history]
        cost = {
            "schema_version": 1,
            **self._facts,
            "epochs": len(seconds),
            "seconds_per_epoch": round(statistics.median(seconds), 3) if seconds else None,
            "seconds": round(sum(seconds), 1),
            **_peaks(self._before),
            "starts": int(self._before.get("starts", 0)) + 1,
        }
        write_json(self._path, cost)


def training_cost(model: Path) -> dict[str, Any]:
    """The content of `cost.json` in a model directory.

    Raises:
        UserError: the directory holds no finished model.
    """
    return dict(read_json(model / COST))


def ensemble_cost(models: Sequence[Path]) -> dict[str, Any]:
    """Cost of the trainings of several model directories, with the keys of `training_cost`.

    Sizes, operations, seconds and epochs are added. Seconds per epoch and memory are the largest value. Any other key
    (the device ...) stays only if all models have the same value.

    Raises:
        UserError: a directory holds no model.
    """
    each = [training_cost(model) for model in models]
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in each for key in one):
        values = [one.get(key) for one in each]
        if key in ("parameters", "macs_per_voxel", "seconds", "epochs", "starts"):
            combined[key] = None if None in values else sum(values)
        elif key in ("seconds_per_epoch", "peak_memory_gb", "peak_gpu_memory_gb"):
            combined[key] = max((value for value in values if value is not None), default=None)
        elif all(value == values[0] for value in values):
            combined[key] = values[0]
    return combined


@contextmanager
def measured(path: Path) -> Iterator[None]:
    """Measure the block; write its seconds, and the process's peak memory so far, to `path`."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"seconds": round(seconds, 4), **_peaks()})


def prediction_cost(folder: Path) -> dict[str, Any]:
    """Sum up what `measured` wrote for each case into `folder`.

    Returns:
        median (`seconds_per_volume`) and sum of the seconds, the seconds of each case, peak memory, and the machine.
    """
    cases = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    seconds = {case: one["seconds"] for case, one in cases.items()}
    return {
        "schema_version": 1,
        **machine(),
        "seconds_per_volume": round(statistics.median(seconds.values()), 4) if seconds else None,
        "seconds": round(sum(seconds.values()), 3),
        **_peaks(*cases.values()),
        "cases": seconds,
    }
