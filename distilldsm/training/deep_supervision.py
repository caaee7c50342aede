"""Additional losses on the decoder's lower levels (Lee et al., "Deeply-supervised nets", AISTATS 2015).

The heads exist in training only. The averaged, saved and exported network does not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilldsm.models.base import SegmentationNetwork


class DeeplySupervised(nn.Module):
    """A network with a 1x1x1 convolution as head on each of the `levels` decoder levels below the last.

    Its output is a list: logits of the network, then logits of the heads from the finest level to the coarsest. A
    network without `decoder_widths` gets no heads.
    """

    def __init__(self, network: SegmentationNetwork, levels: int) -> None:
        super().__init__()
        self.network = network
        below = network.decoder_widths[-2::-1][:levels]
        self.heads = nn.ModuleList(nn.Conv3d(width, network.out_channels, kernel_size=1) for width in below)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, D, H, W) to a list of (B, K, d, h, w)."""
        features: list[Tensor] = []
        logits = self.network(x, features)
        return [logits, *(head(f) for head, f in zip(self.heads, features[-2::-1], strict=False))]


def supervised_loss(
    outputs: Tensor | Sequence[Tensor], labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`loss` of the logits; with several levels the weighted mean, each level with half the weight of the level above.

    labels: (B, D, H, W) classes or (B, K - 1, D, H, W) shares at full resolution; lower levels use the nearest voxel.
    """
    if isinstance(outputs, Tensor):
        return loss(outputs, labels)
    total, weights = torch.zeros((), device=labels.device), 0.0
    for level, logits in enumerate(outputs):
        size = logits.shape[2:]
        truth = labels
        if size != labels.shape[-3:]:
            maps = labels.float().reshape(len(labels), -1, *labels.shape[-3:])
            near = F.interpolate(maps, size=size, mode="nearest-exact")
            truth = near if labels.ndim == 5 else near[:, 0].long()
        total = total + 0.5**level * loss(logits, truth)
        weights += 0.5**level
    return total / weights
