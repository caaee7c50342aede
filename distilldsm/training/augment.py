"""Random changes of training patches, on the patches' device. All random numbers come from the caller's generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distilldsm.config import AugmentConfig
from distilldsm.data.targets import SHARES_LIMIT

CONTROL_POINTS = 5
_AXES = {"depth": -3, "height": -2, "width": -1}


class Draws:
    """Random numbers for one process's share of a batch: the same that a single process draws for these samples.

    Samples `rank`, `rank + world`, ... of a batch belong to this process. Every process draws for the whole batch and
    keeps its share. White noise needs one number per voxel, so each process draws it for its own samples only.

    Args:
        generator: a CPU generator with the same state in all processes.
        noise: a CPU generator with a different state in each process; None: `generator`.
    """

    def __init__(
        self, generator: torch.Generator, rank: int = 0, world: int = 1, noise: torch.Generator | None = None
    ) -> None:
        self._generator, self._noise = generator, noise or generator
        self.rank, self.world = rank, world

    def rand(self, batch: int, *shape: int) -> Tensor:
        """(batch, *shape), uniform in [0, 1)."""
        return torch.rand(batch * self.world, *shape, generator=self._generator)[self.rank :: self.world]

    def randn(self, batch: int, *shape: int) -> Tensor:
        """(batch, *shape), normal."""
        return torch.randn(batch * self.world, *shape, generator=self._generator)[self.rank :: self.world]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """White noise: normal numbers of this shape."""
        return torch.randn(tuple(shape), generator=self._noise)


def _draws(generator: torch.Generator | Draws) -> Draws:
    return generator if isinstance(generator, Draws) else Draws(generator)


def changes_nothing(config: AugmentConfig) -> bool:
    """Whether `augment` changes nothing except the crop."""
    shares = (
        config.spatial_probability,
        config.elastic_probability,
        config.intensity_probability,
        config.low_resolution_probability,
    )
    return not any(shares) and not config.mirror_axes


def augment(
    images: Tensor,
    labels: Tensor,
    size: Sequence[int],
    config: AugmentConfig,
    *,
    classes: int,
    spacing_mm: Sequence[float],
    coarse_slices: bool,
    generator: torch.Generator | Draws,
) -> tuple[Tensor, Tensor]:
    """Rotate, scale, bend, mirror and change the intensities of a batch.

    Args:
        images: (B, C, D', H', W') float; labels: (B, D', H', W') integer, or (B, K - 1, D', H', W') uint8, 255 times
            the shares of the classes; larger than `size` by a margin.
        size: (D, H, W) of the crop around the middle.
        spacing_mm: (D, H, W) voxel size, because rotations are in mm, not in voxels.
        coarse_slices: from the plan. Then slices are not tilted unless the config sets `tilt_deg`, and not coarsened.
        generator: a CPU generator; the same state gives the same result. `Draws` if the batch is a process's share.

    Returns:
        images (B, C, D, H, W) float32 and labels (B, D, H, W) int64, or shares (B, K - 1, D, H, W) float32.
    """
    draws = _draws(generator)
    matrices = _draw_matrices(len(images), config, coarse_slices, spacing_mm, draws).to(images.device)
    grid = _sampling_grid(matrices, images.shape[2:], size)
    if config.elastic_probability:
        grid += _bend(len(images), config, spacing_mm, images.shape[2:], size, draws).to(grid.device)
    images = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    if labels.ndim == 5:
        labels = F.grid_sample(labels / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    elif classes <= SHARES_LIMIT:  # smooth borders
        maps = F.one_hot(labels.long(), classes).movedim(-1, 1)[:, 1:].float()
        warped = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        labels = likeliest(warped)
    else:
        nearest = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=True)
        labels = nearest[:, 0].long()
    for axis in config.mirror_axes:
        flip = draws.rand(len(images)) < 0.5
        for k in torch.nonzero(flip).flatten().tolist():
            images[k] = images[k].flip(_AXES[axis])
            labels[k] = labels[k].flip(_AXES[axis])
    # Before the white noise, because a single process draws that from the same generator.
    drawn = draws.rand(*images.shape[:2], 2) if config.low_resolution_probability else None
    images = change_intensities(images, config.intensity_probability, draws)
    if drawn is not None:
        images = coarsen(images, config.low_resolution_probability, drawn, coarse_slices=coarse_slices)
    return images, labels


def likeliest(maps: Tensor) -> Tensor:
    """Labels from class maps. The background has no map: its share is 1 minus the sum of the others.

    Args:
        maps: (B, K, ...) shares of the classes 1 to K. Where all are 0, also beyond the volume, is background.

    Returns:
        (B, ...) int64, 0 to K; if shares are equal, the smaller label.
    """
    # On a CPU, argmax over the second dimension takes six times as long: 70 ms per step of 4 x 9 x 128 x 128 voxels.
    best = 1 - maps.sum(dim=1)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for label, of_class in enumerate(maps.unbind(1), start=1):
        labels.masked_fill_(of_class > best, label)
        best = torch.maximum(best, of_class)
    return labels


def centre_crop(images: Tensor, labels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The middle (D, H, W) of a batch without other changes, like `augment` with all probabilities 0."""
    d, h, w = (slice(_offset(n, s), _offset(n, s) + s) for n, s in zip(images.shape[2:], size, strict=True))
    cropped = labels[..., d, h, w]
    return images[..., d, h, w].float(), cropped / 255 if labels.ndim == 5 else cropped.long()


def _offset(grown: int, size: int) -> int:
    # The centre voxel is n // 2 before and after, for odd and even sizes.
    return grown // 2 - size // 2


def _draw_matrices(
    batch: int, config: AugmentConfig, coarse_slices: bool, spacing_mm: Sequence[float], draws: Draws
) -> Tensor:
    """(B, 3, 3) matrices that map output voxel offsets to input voxel offsets, in the order (D, H, W)."""

    def uniform(limit: float) -> Tensor:
        return (draws.rand(batch) * 2 - 1) * limit

    about_depth = uniform(math.radians(config.largest_rotation(coarse_slices=coarse_slices)))
    tilt = math.radians(config.largest_tilt(coarse_slices=coarse_slices))
    about_height, about_width = uniform(tilt), uniform(tilt)
    scale = 1 + uniform(config.scale)
    keep = draws.rand(batch) >= config.spatial_probability
    rotation = _rotation(about_depth, 1, 2) @ _rotation(about_height, 0, 2) @ _rotation(about_width, 0, 1)
    spacing = torch.tensor(list(spacing_mm), dtype=torch.float32)
    matrices = torch.diag(1 / spacing) @ rotation @ torch.diag(spacing) / scale[:, None, None]
    matrices[keep] = torch.eye(3)
    return matrices


def _rotation(angle: Tensor, a: int, b: int) -> Tensor:
    """(B, 3, 3) rotations in the plane of axes a and b."""
    matrix = torch.eye(3).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = angle.cos()
    matrix[:, a, b], matrix[:, b, a] = -angle.sin(), angle.sin()
    return matrix


def _sampling_grid(matrices: Tensor, grown: Sequence[int], size: Sequence[int]) -> Tensor:
    """(B, D, H, W, 3) grid for grid_sample (align_corners), last axis (W, H, D) from -1 to 1 over the input."""
    device = matrices.device
    offsets = torch.stack(
        torch.meshgrid(*[torch.arange(s, device=device, dtype=torch.float32) - s // 2 for s in size], indexing="ij"),
        dim=-1,
    )
    moved = torch.einsum("bij,dhwj->bdhwi", matrices, offsets)
    centre = torch.tensor([n // 2 for n in grown], device=device, dtype=torch.float32)
    extent = torch.tensor([max(n - 1, 1) for n in grown], device=device, dtype=torch.float32)
    return ((moved + centre) / extent * 2 - 1).flip(-1)


def _bend(
    batch: int,
    config: AugmentConfig,
    spacing_mm: Sequence[float],
    grown: Sequence[int],
    size: Sequence[int],
    draws: Draws,
) -> Tensor:
    """(B, D, H, W, 3) displacements for the sampling grid, interpolated from random ones at CONTROL_POINTS^3 points."""
    drawn = draws.randn(batch, 3, *(CONTROL_POINTS,) * 3) * config.elastic_mm
    drawn *= (draws.rand(batch, 1, 1, 1, 1) < config.elastic_probability).float()
    # Convert mm along (D, H, W) to the grid's unit: the whole input is two units long.
    unit = [2 / (max(n - 1, 1) * mm) for n, mm in zip(grown, spacing_mm, strict=True)]
    drawn *= torch.tensor(unit)[None, :, None, None, None]
    smooth = F.interpolate(drawn, size=tuple(size), mode="trilinear", align_corners=True)
    return smooth.movedim(1, -1).flip(-1)


def coarsen(images: Tensor, probability: float, drawn: Tensor, *, coarse_slices: bool) -> Tensor:
    """Simulate a coarser scan: sample images at 1/2 to 1 of their resolution, then interpolate back linearly.

    images: (B, C, D, H, W); drawn: (B, C, 2), uniform in [0, 1): the first decides whether, the second how much. With
    coarse slices (see the plan), only the plane is coarsened.
    """
    out = images.clone()
    for b in range(images.shape[0]):
        for c in range(images.shape[1]):
            chosen, share = drawn[b, c].tolist()
            if chosen >= probability:
                continue
            factor = 0.5 + 0.5 * share
            sizes = images.shape[2:]
            small = [max(round(n * factor), 1) for n in sizes]
            if coarse_slices:
                small[0] = sizes[0]
            low = F.interpolate(images[b : b + 1, c : c + 1], size=small, mode="nearest-exact")
            out[b, c] = F.interpolate(low, size=sizes, mode="trilinear", align_corners=False)[0, 0]
    return out


def change_intensities(images: Tensor, probability: float, generator: torch.Generator | Draws) -> Tensor:
    """Change contrast, brightness and gamma, blur in plane, add noise; each for random samples and channels.

    images: (B, C, D, H, W), normalised intensities; their mean need not be 0. Returns a new tensor.
    """
    if probability == 0:
        return images
    batch, channels = images.shape[:2]
    draws = _draws(generator)

    def factor(low: float, high: float, neutral: float) -> Tensor:
        drawn = low + (high - low) * draws.rand(batch, channels)
        apply = draws.rand(batch, 1) < probability
        return torch.where(apply, drawn, torch.tensor(neutral)).to(images.device)[:, :, None, None, None]

    mean = images.mean(dim=(2, 3, 4), keepdim=True)
    images = (images - mean) * factor(0.75, 1.3, 1.0) + mean + factor(-0.2, 0.2, 0.0)
    low = images.amin(dim=(2, 3, 4), keepdim=True)
    extent = (images.amax(dim=(2, 3, 4), keepdim=True) - low).clamp_min(1e-6)
    images = ((images - low) / extent).clamp(0, 1) ** factor(0.7, 1.5, 1.0) * extent + low
    images = _blur_some(images, probability / 2, draws)
    deviation = factor(0.0, 0.15, 0.0)
    noise = draws.noise(images.shape).to(images.device)
    return images + noise * deviation


def _blur_some(images: Tensor, probability: float, draws: Draws) -> Tensor:
    chosen = draws.rand(len(images)) < probability
    sigmas = 0.5 + 0.7 * draws.rand(len(images))
    out = images
    for k in torch.nonzero(chosen).flatten().tolist():
        if out is images:
            out = images.clone()
        taps = torch.arange(-3, 4, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (taps / sigmas[k]) ** 2)
        kernel = (kernel / kernel.sum()).to(images.device)
        channels = images.shape[1]
        x = images[k].transpose(0, 1)  # (D, C, H, W): slices as a batch
        x = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="replicate"), kernel.expand(channels, 1, 1, 7), groups=channels)
        x = F.conv2d(
            F.pad(x, (0, 0, 3, 3), mode="replicate"), kernel[:, None].expand(channels, 1, 7, 1), groups=channels
        )
        out[k] = x.transpose(0, 1)
    return out
