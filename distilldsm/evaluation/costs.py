"""Time and memory of training and prediction, over the folds of a cross-validation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """One quantity of `timing.json`."""

    title: str
    form: str
    """Format of its numbers."""
    key: str
    """Its name in the file."""
    of_training: bool = True
    """Whether it is in the file's section `training`."""

    def text(self, value: float | None) -> str:
        """A value as text; a dash if it was not measured."""
        return "-" if value is None else format(value, self.form)


COSTS = {
    "parameters": Cost("parameters", ",", "parameters"),
    "macs_per_voxel": Cost("convolution MACs per voxel", ",.0f", "macs_per_voxel"),
    "seconds_per_epoch": Cost("seconds per epoch", ".2f", "seconds_per_epoch"),
    "training_seconds": Cost("seconds per training", ".0f", "seconds"),
    "training_gb": Cost("peak memory of training, GB", ".2f", "peak_memory_gb"),
    "training_gpu_gb": Cost("peak GPU memory of training, GB", ".2f", "peak_gpu_memory_gb"),
    "seconds_per_volume": Cost("seconds per volume", ".3f", "seconds_per_volume", of_training=False),
    "prediction_gb": Cost("peak memory of prediction, GB", ".2f", "peak_memory_gb", of_training=False),
    "prediction_gpu_gb": Cost("peak GPU memory of prediction, GB", ".2f", "peak_gpu_memory_gb", of_training=False),
}
"""Seconds are medians (of a training: the sum over its epochs). Memory (10^9 bytes) is the peak of the main process."""


def costs_of_fold(timing: Mapping[str, Any]) -> dict[str, Any]:
    """The costs of one fold by the names in `COSTS`, from its `timing.json`; None if the file does not have them."""
    training = timing.get("training", {})
    return {name: (training if cost.of_training else timing).get(cost.key) for name, cost in COSTS.items()}


def combine_costs(of_folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of the folds' seconds, and the maximum of everything else; None if no fold has a value."""
    combined: dict[str, Any] = {}
    for name in COSTS:
        values = [one[name] for one in of_folds if one.get(name) is not None]
        combine = statistics.median if "seconds" in name else max
        combined[name] = combine(values) if values else None
    return combined


def measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the costs with a value in at least one row."""
    return [name for name in COSTS if any(row[name] is not None for row in rows)]


def machines(timings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The machines of the folds' trainings and predictions, each listed once."""
    texts = [_machine(facts) for timing in timings for facts in (timing.get("training", {}), timing)]
    return list(dict.fromkeys(text for text in texts if text))


def _machine(facts: Mapping[str, Any]) -> str:
    if "device_name" not in facts:
        return ""
    threads = f"threads: {facts['threads']}" if facts.get("device") == "cpu" else str(facts.get("device"))
    precision = f", {facts['precision']}" if "precision" in facts else ""
    return f"{facts['device_name']}, {threads}{precision}, torch {facts['torch']}"
