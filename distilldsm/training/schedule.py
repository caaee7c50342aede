"""The schedule of the learning rate. No other module sets it."""

from __future__ import annotations

import math

FINAL_SHARE = 1e-3
"""A decaying schedule ends at this share of the peak rate."""
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 10


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
