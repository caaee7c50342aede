"""Section `evaluate` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilldsm.core.mapping import Natural, Positive


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on whole volumes, in the scan's own geometry."""

    checkpoint: Literal["last", "best"] = "last"
    """Which weights to use: `last`, or `best` on the held-out cases. Scores of `best` are optimistic, as it was chosen
    on the same cases."""
    mirror: bool = False
    """Average predictions over flips of the axes in train.augment.mirror_axes. Takes 2^axes times as long."""
    nsd_tolerance_mm: Positive = 1.0
    """Tolerance of the normalised surface Dice, mm."""
    save_masks: bool = True
    """Keep the predicted masks (NIfTI)."""
    workers: Natural = 0
    """Processes for the metrics. 0: one per core."""
