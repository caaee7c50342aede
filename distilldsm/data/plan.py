"""The plan: the decisions made from the fingerprint, in a versioned file that a person may read and edit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distilldsm.config import PreprocessConfig, TrainConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.mapping import from_mapping
from distilldsm.data import plan_rules as rules
from distilldsm.data.dataset import Channel, DatasetIndex
from distilldsm.data.targets import Region, Targets, regions_from_labels

if TYPE_CHECKING:  # this module reads scans, which training does not need
    from distilldsm.data.fingerprint import CaseFingerprint

AXES = ("x", "y", "z")
TRAINING_BYTES_PER_VOXEL = 1_300
"""Measured on the paper-size network, bf16: activations and gradients per voxel of a batch."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How a channel's intensities are made comparable. It is applied before resampling."""

    scheme: Literal["zscore", "zscore_foreground", "ct", "none"]
    """`zscore`: z-score with mean and sd of the case's voxels that are not background (0, or the value of all corners).
    `zscore_foreground`: the same, but background becomes zero (skull-stripped data). `ct`: clip to [low, high] HU, then
    z-score with the data set's mean and sd."""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    sd: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What training uses where the section `train` holds null."""

    budget: float = TrainConfig.budget
    """Voxels that a training sees: patches x voxels of a patch. Spacing, patch and length follow from it."""
    patches: int = 10_000
    """Patches of a training in all."""
    epochs: int = 50
    """Passes over the training cases. A fold with another number of cases, or with `train.samples_per_case`, gets the
    epochs that make up `patches`."""
    samples_per_case: int = 1
    foreground_oversampling: float = 0.33
    learning_rate: float = 0.004
    ema_decay: float = 0.98
    rotation_deg: float = 15.0
    keep_largest: tuple[str, ...] = ()
    """Labels that are one component in nearly all cases: post-processing keeps only their largest component."""


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
    training: TrainingPlan = TrainingPlan()
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


def make_plan(
    index: DatasetIndex,
    cases: Sequence[CaseFingerprint],
    config: PreprocessConfig,
    *,
    budget: float = TrainingPlan.budget,
    training_cases: int | None = None,
) -> Plan:
    """Make the plan from the cases' fingerprints. Values that the config sets are used unchanged.

    Args:
        budget: `train.budget`, voxels.
        training_cases: number of cases that a fold trains with; None: those of `preprocess.folds` folds.
    """
    reasons: dict[str, str] = {}
    count = training_cases or max(1, len(cases) * (config.folds - 1) // config.folds)
    kept = [c.nonzero_shape if config.crop_to_nonzero else c.shape for c in cases]
    spacing = np.array(config.target_spacing_mm or np.median([c.spacing_mm for c in cases], axis=0))
    extent_mm = np.median([np.multiply(n, c.spacing_mm) for n, c in zip(kept, cases, strict=True)], axis=0)
    box_mm = _box_mm(cases, extent_mm)
    if config.depth_axis != "auto":
        depth, reasons["depth_axis"] = AXES.index(config.depth_axis), "set in preprocess.depth_axis"
    else:
        shape = np.rint(extent_mm / spacing).astype(int).tolist()
        depth, reasons["depth_axis"] = rules.depth_axis(spacing, box_mm, shape)
    order = [depth, *(k for k in range(3) if k != depth)]
    coarse, reasons["coarse_slices"] = rules.is_coarse(spacing[order])
    grid = rules.Grid(
        spacing_mm=_three(spacing[order]),
        extent_mm=_three(extent_mm[order]),
        box_mm=_three(box_mm[order]),
        label_mm=_three(_smallest_label_mm(cases)[order]),
        coarse=coarse,
    )
    limit = rules.patch_limit(budget, count)
    if config.target_spacing_mm is not None:
        target, reasons["target_spacing_mm"] = grid.spacing_mm, "set in preprocess.target_spacing_mm"
    else:
        target, reasons["target_spacing_mm"] = rules.choose_spacing(grid, limit)
    in_order = [target[order.index(k)] for k in range(3)]
    resampled = [resampled_shape(n, c.spacing_mm, in_order) for n, c in zip(kept, cases, strict=True)]
    d, h, w = np.rint(np.median(resampled, axis=0)[order]).astype(int).tolist()
    median_shape, box = (d, h, w), grid.box(target)
    if config.patch_size is not None:
        patch, reasons["patch_size"] = config.patch_size, "set in preprocess.patch_size"
    else:
        patch, reasons["patch_size"] = rules.choose_patch(median_shape, box, min(limit, config.max_patch_voxels))
    batch, reasons["batch_size"] = rules.batch_size(patch)
    regions = regions_of(index, config)
    if regions:
        reasons["regions"] = "the data set's" if config.regions is None else "set in preprocess.regions"
    whole = all(p >= n for p, n in zip(patch, median_shape, strict=True))
    training, why = _training(cases, budget, patch, batch, count, whole=whole, coarse=coarse, labels=not regions)
    return Plan(
        name=index.name,
        channels=index.channels,
        normalisation=tuple(
            _normalisation(k, channel, cases, config, reasons) for k, channel in enumerate(index.channels)
        ),
        class_names=index.class_names,
        class_values=index.class_values,
        regions=regions,
        depth_axis=AXES[depth],  # type: ignore[arg-type]
        target_spacing_mm=target,
        crop_to_nonzero=config.crop_to_nonzero,
        coarse_slices=coarse,
        patch_size=patch,
        batch_size=batch,
        median_shape=median_shape,
        training_memory_gb=round(float(np.prod(patch)) * batch * TRAINING_BYTES_PER_VOXEL / 1e9 + 0.4, 2),
        training=training,
        reasons=reasons | why,
    )


def _three(values: np.ndarray) -> tuple[float, float, float]:
    d, h, w = (round(float(v), 6) for v in values)
    return d, h, w


def _box_mm(cases: Sequence[CaseFingerprint], extent_mm: np.ndarray) -> np.ndarray:
    """Size (x, y, z) of the foreground's box, 90th percentile over the labelled cases; of the scan if none is."""
    boxes = [np.multiply(c.foreground_shape, c.spacing_mm) for c in cases if c.has_foreground]
    return np.percentile(boxes, 90, axis=0) if boxes else extent_mm


def _smallest_label_mm(cases: Sequence[CaseFingerprint]) -> np.ndarray:
    """Size (x, y, z) of the smallest label: per axis, the least over the labels of its median over the cases."""
    sizes: dict[str, list[np.ndarray]] = {}
    for case in cases:
        for name, label in case.labels.items():
            sizes.setdefault(name, []).append(np.multiply(label.shape, case.spacing_mm))
    medians = [np.median(of_label, axis=0) for of_label in sizes.values()]
    return np.min(medians, axis=0) if medians else np.full(3, np.inf)


def _training(
    cases: Sequence[CaseFingerprint],
    budget: float,
    patch: tuple[int, int, int],
    batch: int,
    count: int,
    *,
    whole: bool,
    coarse: bool,
    labels: bool,
) -> tuple[TrainingPlan, dict[str, str]]:
    """What training uses by default, with the reasons; `count`: number of training cases."""
    why: dict[str, str] = {}
    patches, why["patches"] = rules.patches_to_see(budget, patch, count, whole=whole)
    epochs, samples = rules.epochs(patches, count)
    why["epochs"] = f"{patches:,} patches of {count} training cases, {samples} of each case an epoch"
    share, why["foreground_oversampling"] = rules.foreground_share(whole=whole)
    steps = epochs * max(1, count * samples // batch)
    decay, why["ema_decay"] = rules.ema_decay(steps)
    rotation, why["rotation_deg"] = rules.rotation_deg(coarse=coarse)
    single = rules.single_labels([{n: one.components for n, one in c.labels.items()} for c in cases]) if labels else ()
    if single:
        why["keep_largest"] = f"one component in {rules.ONE_COMPONENT:.0%} of the cases that hold it"
    why["learning_rate"] = "of one cycle; tried on hippocampus and ACDC"
    return TrainingPlan(
        budget=budget,
        patches=patches,
        epochs=epochs,
        samples_per_case=samples,
        foreground_oversampling=share,
        ema_decay=decay,
        rotation_deg=rotation,
        keep_largest=single,
    ), why


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
