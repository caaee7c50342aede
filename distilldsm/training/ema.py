"""Exponential moving average of a network's weights and BatchNorm statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn

from distilldsm.models.base import SegmentationNetwork


class WeightAverage:
    """Keeps an averaged copy of a network: average = decay * average + (1 - decay) * current, once per step.

    In the first steps the decay is (1 + step) / (10 + step), so the initial weights soon lose their influence.
    """

    def __init__(self, network: SegmentationNetwork, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network)
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step)) if self.decay else 0.0
        averages, currents = [], []
        for average, current in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1 - decay)
