"""The schedule of the learning rate. No other module sets it."""

from __future__ import annotations

import math

FINAL_SHARE = 1e-3
"""A decaying schedule ends at this share of the peak rate."""
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 10
FEW_STEPS = 500
"""Fewer steps cause a warning. The shortest trainings on real scans in docs/recipe.md have 828 steps (hippocampus, 12
epochs of 69) and 975 steps (ACDC, 25 epochs of 39; Dice .8919, and .9162 with 6,630 steps and other patches)."""


def learning_rate_at(step: int, *, total_steps: int, peak: float, schedule: str, warmup_fraction: float) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    one_cycle: cosine from peak/25 up over the warm-up, then cosine down (Smith and Topin, 2018); cosine: linear
    warm-up, then cosine down; poly: peak * (1 - step/total)^0.9 (as in nnU-Net); constant and plateau: peak.
    """
    if schedule in ("constant", "plateau"):
        return peak
    if schedule == "poly":
        return peak * max(1 - step / max(total_steps, 1), 0.0) ** 0.9
    warmup = int(total_steps * warmup_fraction)
    if step < warmup:
        share = (step + 1) / warmup
        if schedule == "cosine":
            return peak * share
        low = peak / 25
        return low + (peak - low) * 0.5 * (1 - math.cos(math.pi * share))
    progress = (step - warmup) / max(total_steps - warmup - 1, 1)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def remark_on_few_steps(*, epochs: int, steps_per_epoch: int, cases: int, batch_size: int) -> str | None:
    """A warning with the settings for FEW_STEPS optimizer steps; None if the training has at least as many."""
    total = epochs * steps_per_epoch
    if total >= FEW_STEPS:
        return None
    longer = -(-FEW_STEPS // steps_per_epoch)
    denser = -(-(-(-FEW_STEPS // epochs) * batch_size) // cases)
    return (
        f"train: {total} optimizer steps in all are few for real scans. For {FEW_STEPS} or more, set "
        f"train.epochs={longer} or train.samples_per_case={denser}"
    )


class Plateau:
    """Halves the rate if the training loss has not improved for PLATEAU_PATIENCE epochs. Holds plain numbers only."""

    def __init__(self) -> None:
        self.best = math.inf
        self.waited = 0
        self.factor = 1.0

    def update(self, loss: float) -> None:
        if loss < self.best * (1 - 1e-4):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > PLATEAU_PATIENCE:
            self.factor, self.waited = self.factor * PLATEAU_FACTOR, 0

    def state(self) -> dict[str, float]:
        return {"best": min(self.best, 1e30), "waited": self.waited, "factor": self.factor}

    def load(self, state: dict[str, float]) -> None:
        self.best, self.waited, self.factor = state["best"], int(state["waited"]), state["factor"]
