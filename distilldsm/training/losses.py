"""Losses on logits (B, K, D, H, W) and targets.

A target is the class of each voxel (B, D, H, W), or the share of each class but the background in it, where voxels were
resampled: (B, classes - 1, D, H, W).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice_loss(
    logits: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    *,
    regions: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """1 minus the mean soft Dice of the foreground classes. Each Dice covers all voxels of the batch.

    Milletari et al., "V-Net", 3DV 2016, with plain sums in the denominator (Drozdzal et al., 2016):
    dice_k = (2 sum p_k g_k + s) / (sum p_k + sum g_k + s). The sums cover the batch, so the loss is also defined for
    a class that a single patch does not contain. For shares the product becomes min(p_k, g_k), which is the same for 0
    and 1, because the loss is then lowest where p equals g (Wang et al., "Dice Semimetric Losses", MICCAI 2023).

    Args:
        regions: (K, classes) membership. The K channels are then regions with sigmoids, and all of them count.
        over_processes: a differentiable sum over the processes with a share of the batch.
    """
    if regions is None:
        probabilities = logits.float().softmax(dim=1)
        truth = class_shares(target, logits.shape[1])
    else:
        probabilities, truth = logits.float().sigmoid(), region_targets(target, regions)
    axes = (0, 2, 3, 4)
    overlap = torch.minimum(probabilities, truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    if over_processes is not None:
        overlap, total = over_processes(torch.stack((overlap, total)))
    dice = (2 * overlap + smooth) / (total + smooth)
    return 1 - (dice[1:] if regions is None else dice).mean()


def class_shares(target: Tensor, classes: int) -> Tensor:
    """The share of every class (B, classes, D, H, W), float32."""
    if target.ndim == 5:
        background = (1 - target.sum(dim=1, keepdim=True)).clamp_min(0)  # rounded shares may add up to 1.002
        return torch.cat((background, target), dim=1)
    return F.one_hot(target, classes).movedim(-1, 1).float()


def region_targets(target: Tensor, regions: Tensor) -> Tensor:
    """The share of every region (B, K, D, H, W): 1 where the class of the voxel belongs to the region."""
    regions = regions.to(target.device, torch.float32)
    if target.ndim == 5:
        return torch.einsum("kc,bcdhw->bkdhw", regions[:, 1:], target).clamp_max(1)
    return regions[:, target].transpose(0, 1)


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float,
    cross_entropy_weight: float,
    regions: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weighted sum of soft Dice loss and cross-entropy (binary for regions), a float32 scalar."""
    loss = torch.zeros((), device=logits.device)
    if dice_weight:
        loss = loss + dice_weight * soft_dice_loss(logits, target, regions=regions, over_processes=over_processes)
    if cross_entropy_weight:
        if regions is None:
            entropy = F.cross_entropy(
                logits.float(), target if target.ndim == 4 else class_shares(target, logits.shape[1])
            )
        else:
            entropy = F.binary_cross_entropy_with_logits(logits.float(), region_targets(target, regions))
        loss = loss + cross_entropy_weight * entropy
    return loss
