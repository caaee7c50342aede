"""Section `evaluate` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilldsm.core.mapping import Natural, Positive


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores on whole volumes in the scan's own geometry."""

    checkpoint: Literal["last", "best"] = "last"
    """Which weights. `last` chooses nothing on the held-out cases; `best` was chosen on them, so its score is
    optimistic."""
    mirror: bool = False
    """Average predictions over flips of the axes in train.augment.mirror_axes. Takes 2^axes times as long."""
    nsd_tolerance_mm: Positive = 1.0
    """Tolerance of the normalised surface Dice, mm."""
    save_masks: bool = True
    """Keep the predicted masks (NIfTI)."""
    workers: Natural = 0
    """Processes for the metrics. 0 takes one per core."""
