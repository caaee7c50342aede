"""Losses on logits (B, K, D, H, W) and class labels (B, D, H, W)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice_loss(
    logits: Tensor,
    labels: Tensor,
    smooth: float = 1.0,
    *,
    regions: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """1 minus the mean soft Dice of the foreground classes. Each Dice covers all voxels of the batch.

    Milletari et al., "V-Net", 3DV 2016, with plain sums in the denominator (Drozdzal et al., 2016):
    dice_k = (2 sum p_k g_k + s) / (sum p_k + sum g_k + s). The sums cover the batch, so the loss is also defined for
    a class that a single patch does not contain.

    Args:
        regions: (K, classes) membership. The K channels are then regions with sigmoids, and all of them count.
        over_processes: a differentiable sum over the processes with a share of the batch.
    """
    if regions is None:
        probabilities = logits.float().softmax(dim=1)
        truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    else:
        probabilities, truth = logits.float().sigmoid(), region_targets(labels, regions)
    axes = (0, 2, 3, 4)
    overlap = (probabilities * truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    if over_processes is not None:
        overlap, total = over_processes(torch.stack((overlap, total)))
    dice = (2 * overlap + smooth) / (total + smooth)
    return 1 - (dice[1:] if regions is None else dice).mean()


def region_targets(labels: Tensor, regions: Tensor) -> Tensor:
    """Zeros and ones (B, K, D, H, W): 1 where the class of the voxel belongs to the region."""
    return regions.to(labels.device, torch.float32)[:, labels].transpose(0, 1)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    dice_weight: float,
    cross_entropy_weight: float,
    regions: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weighted sum of soft Dice loss and cross-entropy (binary for regions), a float32 scalar."""
    loss = torch.zeros((), device=logits.device)
    if dice_weight:
        loss = loss + dice_weight * soft_dice_loss(logits, labels, regions=regions, over_processes=over_processes)
    if cross_entropy_weight:
        if regions is None:
            entropy = F.cross_entropy(logits.float(), labels)
        else:
            entropy = F.binary_cross_entropy_with_logits(logits.float(), region_targets(labels, regions))
        loss = loss + cross_entropy_weight * entropy
    return loss
