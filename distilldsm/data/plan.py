"""The plan: the decisions made from the fingerprint, in a versioned file that a person may read and edit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.mapping import from_mapping
from distilldsm.data.dataset import Channel, DatasetIndex
from distilldsm.data.targets import Region, Targets, regions_from_labels

if TYPE_CHECKING:  # this module reads scans, which training does not need
    from distilldsm.data.fingerprint import CaseFingerprint

AXES = ("x", "y", "z")
IN_PLANE_STRIDE = 16
ANISOTROPY_THRESHOLD = 3.0
"""Slices are coarse if depth spacing is at least this many times the in-plane spacing."""
VOXELS_PER_STEP = 400_000
TRAINING_BYTES_PER_VOXEL = 1_300
"""Measured on the paper-size network, bf16: activations and gradients per voxel of a batch."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How a channel's intensities are made comparable. It is applied before resampling."""

    scheme: Literal["zscore", "zscore_foreground", "ct", "none"]
    """`zscore`: z-score with mean and sd of the case's non-zero voxels. `zscore_foreground`: the same, but zero voxels
    stay zero (skull-stripped data). `ct`: clip to [low, high] HU, then z-score with the data set's mean and sd."""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    sd: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that training and prediction must agree on."""

    schema_version: int = 1
    name: str
    channels: tuple[Channel, ...]
    normalisation: tuple[Normalisation, ...]
    class_names: tuple[str, ...]
    class_values: tuple[int, ...]
    """The network's class k is written into masks as class_values[k]."""
    regions: tuple[Region, ...] = ()
    """The regions that the output channels stand for, in the order in which masks are written. Empty: classes."""
    depth_axis: Literal["x", "y", "z"]
    """Scanner axis (RAS) that becomes D of (C, D, H, W)."""
    target_spacing_mm: tuple[float, float, float]
    """(depth, height, width)."""
    crop_to_nonzero: bool
    coarse_slices: bool
    """True: resampling along the depth axis is linear, not cubic, because slices are too far apart for splines."""
    patch_size: tuple[int, int, int]
    """(depth, height, width) of a training patch, in voxels."""
    batch_size: int
    median_shape: tuple[int, int, int]
    """(depth, height, width) after cropping and resampling."""
    training_memory_gb: float
    """Rough estimate for one optimizer step of the paper-size network."""
    reasons: Mapping[str, str]
    """Value to the reason for it, for readers of the plan."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown plan version", seen=self.schema_version, rule="1")
        if not (len(self.channels) == len(self.normalisation) >= 1):
            raise ConfigError("'normalisation' needs one entry per channel", seen=len(self.normalisation))
        if not (len(self.class_names) == len(self.class_values) >= 2 and self.class_values[0] == 0):
            raise ConfigError("'class_values' must start with 0, one per class", seen=self.class_values)
        if min(self.target_spacing_mm) <= 0 or min(self.patch_size) < 1 or self.batch_size < 1:
            raise ConfigError("spacing, patch and batch sizes must be positive")
        _ = self.targets  # regions must fit the labels

    @property
    def targets(self) -> Targets:
        """What the network's output channels stand for."""
        return Targets(self.class_names, self.class_values, self.regions)

    @property
    def depth_index(self) -> int:
        """Position of the depth axis among x, y, z."""
        return AXES.index(self.depth_axis)

    @property
    def axis_order(self) -> tuple[int, int, int]:
        """RAS axes in the order (depth, height, width)."""
        rest = [k for k in range(3) if k != self.depth_index]
        return (self.depth_index, rest[0], rest[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        return from_mapping(cls, read_json(path), where=os.fspath(path))


def make_plan(index: DatasetIndex, cases: Sequence[CaseFingerprint], config: PreprocessConfig) -> Plan:
    """Make the plan from the cases' fingerprints. Values that the config sets are used unchanged."""
    reasons: dict[str, str] = {}
    spacings = np.array([c.spacing_mm for c in cases])

    if config.target_spacing_mm is not None:
        spacing = np.array(config.target_spacing_mm)
        reasons["target_spacing_mm"] = "set in preprocess.target_spacing_mm"
    else:
        spacing = np.median(spacings, axis=0)
        reasons["target_spacing_mm"] = "median of the data set"

    target = (spacing[0], spacing[1], spacing[2])
    kept = [c.nonzero_shape if config.crop_to_nonzero else c.shape for c in cases]
    resampled = np.array([resampled_shape(n, c.spacing_mm, target) for n, c in zip(kept, cases, strict=True)])
    median = np.median(resampled, axis=0)
    depth, reasons["depth_axis"] = _depth_axis(config, spacing, median)
    order = [depth, *(k for k in range(3) if k != depth)]
    median_shape = tuple(int(v) for v in np.rint(median[order]))
    spacing_dhw = [round(float(v), 6) for v in spacing[order]]

    coarse = spacing_dhw[0] / max(spacing_dhw[1:]) >= ANISOTROPY_THRESHOLD
    reasons["coarse_slices"] = (
        f"depth spacing is {spacing_dhw[0] / max(spacing_dhw[1:]):.2g} times the in-plane spacing; "
        f"coarse from {ANISOTROPY_THRESHOLD:g} on"
    )

    if config.patch_size is not None:
        patch = config.patch_size
        reasons["patch_size"] = "set in preprocess.patch_size"
    else:
        patch = choose_patch(median_shape, config.max_patch_voxels)
        reasons["patch_size"] = (
            f"median shape, in plane a multiple of {IN_PLANE_STRIDE}, at most {config.max_patch_voxels} voxels"
        )
    batch = int(np.clip(round(VOXELS_PER_STEP / np.prod(patch)), 2, 8))
    reasons["batch_size"] = f"about {VOXELS_PER_STEP} voxels per step, from 2 to 8 patches"
    normalisation = tuple(
        _normalisation(k, channel, cases, config, reasons) for k, channel in enumerate(index.channels)
    )
    regions = regions_of(index, config)
    if regions:
        reasons["regions"] = "the data set's" if config.regions is None else "set in preprocess.regions"
    return Plan(
        name=index.name,
        channels=index.channels,
        normalisation=normalisation,
        class_names=index.class_names,
        class_values=index.class_values,
        regions=regions,
        depth_axis=AXES[depth],  # type: ignore[arg-type]
        target_spacing_mm=(spacing_dhw[0], spacing_dhw[1], spacing_dhw[2]),
        crop_to_nonzero=config.crop_to_nonzero,
        coarse_slices=bool(coarse),
        patch_size=patch,
        batch_size=batch,
        median_shape=median_shape,  # type: ignore[arg-type]
        training_memory_gb=round(float(np.prod(patch)) * batch * TRAINING_BYTES_PER_VOXEL / 1e9 + 0.4, 2),
        reasons=reasons,
    )


def _depth_axis(config: PreprocessConfig, spacing: np.ndarray, median: np.ndarray) -> tuple[int, str]:
    """Index of the depth axis among x, y, z, and the reason; from spacing (mm) and extent (voxels) in that order."""
    if config.depth_axis != "auto":
        return AXES.index(config.depth_axis), "set in preprocess.depth_axis"
    if spacing.max() / spacing.min() > 1.25:
        depth = int(np.argmax(spacing))
        return depth, f"coarsest spacing ({spacing[depth]:.3g} mm)"
    depth = int(np.argmin(median))
    return depth, f"spacing is about the same everywhere; smallest extent ({median[depth]:.0f})"


def regions_of(index: DatasetIndex, config: PreprocessConfig) -> tuple[Region, ...]:
    """The regions to segment instead of the labels, see `preprocess.regions`; empty: none.

    Raises:
        ConfigError: a region names an unknown label, or a mask cannot show it.
    """
    if config.regions is None or (config.regions == "labels" and index.regions):
        return index.regions
    each = {name: (name,) for name, value in index.labels.items() if value}
    return regions_from_labels(each if config.regions == "labels" else config.regions, index.labels)


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]
) -> tuple[int, int, int]:
    """Shape after resampling. The field of view stays the same, up to whole voxels."""
    x, y, z = (max(1, round(n * old / new)) for n, old, new in zip(shape, spacing_mm, target_mm, strict=True))
    return x, y, z


def choose_patch(median_shape: Sequence[int], max_voxels: int) -> tuple[int, int, int]:
    """Patch (D, H, W): the median shape, rounded up to the stride in plane, then shrunk to `max_voxels` or fewer.

    The depth shrinks first, down to 16 slices (more context than the network's depth reach of 8 to each side), then
    the larger in-plane side, then the depth again.
    """
    depth, height, width = (
        median_shape[0],
        *(-(-n // IN_PLANE_STRIDE) * IN_PLANE_STRIDE for n in median_shape[1:]),
    )
    while depth * height * width > max_voxels and depth > 16:
        depth -= 1
    while depth * height * width > max_voxels and max(height, width) > 4 * IN_PLANE_STRIDE:
        if height >= width:
            height -= IN_PLANE_STRIDE
        else:
            width -= IN_PLANE_STRIDE
    while depth * height * width > max_voxels and depth > 1:
        depth -= 1
    return depth, height, width


def _normalisation(
    k: int,
    channel: Channel,
    cases: Sequence[CaseFingerprint],
    config: PreprocessConfig,
    reasons: dict[str, str],
) -> Normalisation:
    scheme: Any = config.normalisation
    key = f"normalisation.{channel.name}"
    reasons[key] = "set in preprocess.normalisation"
    if scheme == "auto":
        nonzero = float(np.median([c.nonzero_fraction for c in cases]))
        if channel.modality == "CT":
            scheme, reasons[key] = "ct", "modality CT"
        elif nonzero < 0.75:
            scheme = "zscore_foreground"
            reasons[key] = f"modality {channel.modality}; {1 - nonzero:.0%} of the voxels are zero (masked data)"
        else:
            scheme, reasons[key] = "zscore", f"modality {channel.modality}"
    if scheme != "ct":
        return Normalisation(scheme=scheme)
    # Leave out cases without labels: their foreground is unknown, and their intensities include air.
    cases = [c for c in cases if c.has_foreground] or cases
    percentiles = np.median([c.foreground_percentiles[k] for c in cases], axis=0)
    mean = float(np.mean([c.foreground_mean[k] for c in cases]))
    # Variance of the pooled foreground: within the cases plus between their means.
    variance = np.mean([c.foreground_sd[k] ** 2 for c in cases]) + np.var([c.foreground_mean[k] for c in cases])
    return Normalisation(
        scheme="ct",
        low=float(percentiles[0]),
        high=float(percentiles[-1]),
        mean=mean,
        sd=max(float(np.sqrt(variance)), 1e-6),
    )
