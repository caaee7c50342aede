"""Section `export` of `params.yaml`, see config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilldsm.core.mapping import require


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """The INT8 IR: made by post-training quantisation, shipped where it is worth it."""

    enabled: bool = True
    """Try INT8, and ship it where it is fast and accurate enough."""
    calibration_cases: int = 8
    """Training cases to calibrate with."""
    min_speedup: float = 1.3
    """How many times as fast as the IR at OpenVINO's own precision it has to be."""
    max_dice_loss: float = 0.002
    """Mean Dice over labels that it may lose on the held-out fold."""

    def __post_init__(self) -> None:
        require(self.calibration_cases >= 1, "int8.calibration_cases", self.calibration_cases, "at least 1")
        require(self.min_speedup > 0, "int8.min_speedup", self.min_speedup, "above 0")
        require(0 <= self.max_dice_loss <= 1, "int8.max_dice_loss", self.max_dice_loss, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """ONNX and OpenVINO IR, and how closely they must agree with the network."""

    checkpoint: Literal["last", "best"] = "last"
    """Which weights: the last average, or the best on the held-out cases (then their scores are optimistic)."""
    parity_cases: int = 3
    """Held-out cases on which the exported models are compared with the network."""
    max_voxel_difference: float = 1e-4
    """Largest fraction of voxels whose label may differ; above it the stage fails."""
    int8: Int8Config = field(default_factory=Int8Config)
    register_model: bool = True
    """Register the exported model in the MLflow model registry."""
    min_dice: float = 0.0
    """Lowest mean Dice over labels and folds with which Kubeflow exports and registers; 0: always."""
    gate_metric: Literal["dice", "nsd", "hd95_mm"] = "dice"
    """What a new model must be better in, on the same held-out cases, to take the alias `champion` from another."""
    gate_margin: float = 0.0
    """How much better: its mean difference per case must be above this, in the metric's unit (a fraction, or mm)."""
    gate_p: float | None = None
    """Largest p-value (one-sided Wilcoxon signed-rank test over the patients) with which it may; null: any."""

    def __post_init__(self) -> None:
        require(self.parity_cases >= 1, "parity_cases", self.parity_cases, "at least 1")
        require(0 <= self.max_voxel_difference <= 1, "max_voxel_difference", self.max_voxel_difference, "0 to 1")
        require(0 <= self.min_dice <= 1, "min_dice", self.min_dice, "0 to 1")
        require(0 <= self.gate_margin < float("inf"), "gate_margin", self.gate_margin, "0 or more")
        require(self.gate_p is None or 0 < self.gate_p <= 1, "gate_p", self.gate_p, "null, or above 0 and at most 1")
