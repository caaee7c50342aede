"""Section `export` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distilldsm.core.mapping import Count, NotNegative, Positive, Range, Share


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """The INT8 model, made by post-training quantisation and shipped where it is worth it."""

    enabled: bool = True
    """Try INT8, and ship it where it is fast and accurate enough."""
    calibration_cases: Count = 8
    """Training cases to calibrate with."""
    min_speedup: Positive = 1.3
    """How many times as fast as OpenVINO's own precision it has to be."""
    max_dice_loss: Share = 0.002
    """Mean Dice over labels that it may lose on the held-out fold."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """ONNX and OpenVINO IR, and how closely they must agree with the network."""

    checkpoint: Literal["last", "best"] = "last"
    """Which weights. `last`: the last average; `best`: the best on the held-out cases, whose scores are optimistic."""
    parity_cases: Count = 3
    """Held-out cases on which the exported models are compared with the network."""
    max_voxel_difference: Share = 1e-4
    """Largest fraction of voxels whose label may differ. Above it the stage fails."""
    int8: Int8Config = Int8Config()
    register_model: bool = True
    """Register the exported model in the MLflow model registry."""
    min_dice: Share = 0.0
    """Kubeflow exports and registers only from this mean Dice on. It is the mean over labels and folds; 0: always."""
    gate_metric: Literal["dice", "nsd", "hd95_mm"] = "dice"
    """What a new model must be better in to become champion. It is compared on the same held-out cases with the model
    that has the alias `champion`."""
    gate_margin: NotNegative = 0.0
    """How much better: its mean difference per case must be above this. In the metric's unit, a fraction or mm."""
    gate_p: Annotated[float, Range(0, 1, above=True)] | None = None
    """Largest p-value with which it becomes champion. Of a one-sided Wilcoxon signed-rank test over the patients;
    null: any."""
