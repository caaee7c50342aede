"""Section `export` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distilldsm.core.mapping import Count, NotNegative, Positive, Range, Share


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """The INT8 model, made by post-training quantisation. It is shipped if it is fast and accurate enough."""

    enabled: bool = True
    """Make an INT8 model. It is shipped if it is fast and accurate enough."""
    calibration_cases: Count = 8
    """Training cases to calibrate with."""
    min_speedup: Positive = 1.3
    """Least speed of whole `predict` calls, relative to the OpenVINO model in its normal precision."""
    max_dice_loss: Share = 0.002
    """Largest allowed loss of mean Dice (over labels) on the held-out fold."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """ONNX and OpenVINO IR, and how closely they must agree with the network."""

    checkpoint: Literal["last", "best"] = "last"
    """Which weights to use: `last`, or `best` on the held-out cases. Scores of `best` are optimistic."""
    parity_cases: Count = 3
    """Held-out cases on which the exported models are compared with the network."""
    max_voxel_difference: Share = 1e-4
    """Largest fraction of voxels with a different label. Above it the stage fails."""
    int8: Int8Config = Int8Config()
    register_model: bool = True
    """Register the exported model in the MLflow model registry."""
    min_dice: Share = 0.5
    """Least mean Dice of a champion, and of a model that Kubeflow exports. A local export below it is registered, but
    not as champion."""
    gate_metric: Literal["dice", "nsd", "hd95_mm"] = "dice"
    """Metric in which a new model must be better to become champion. Both models are compared on the same held-out
    cases; the old one has the alias `champion`."""
    gate_margin: NotNegative = 0.0
    """The mean difference per case must be above this margin. In the unit of the metric: a fraction, or mm."""
    gate_p: Annotated[float, Range(0, 1, above=True)] | None = None
    """Largest p-value for a new champion. The test is a one-sided Wilcoxon signed-rank test over the patients; null: no
    test."""
