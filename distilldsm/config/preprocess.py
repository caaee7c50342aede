"""Section `preprocess` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from distilldsm.core.mapping import Count, Natural, Positive, Range, Rule

Regions = Annotated[
    Literal["labels"] | Mapping[str, tuple[str, ...]], Rule("labels, or names of labels, e.g. {a: [organ, lesion]}")
]


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """From raw volumes to arrays for training: geometry, normalisation, splits."""

    depth_axis: Literal["auto", "x", "y", "z"] = "auto"
    """Scanner axis (RAS) along which slices exchange features. `auto`: the axis of coarse slices, or a long axis of the
    foreground; else the axis with the coarsest spacing; of equal ones, the axis with the smallest extent."""
    target_spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Spacing (x, y, z) to resample to, mm. null: the median of the data set; coarser if `train.budget` is too small
    for it."""
    crop_to_nonzero: bool = True
    """Remove the outer margin where every channel holds one value: that of the corners, or zero."""
    normalisation: Literal["auto", "zscore", "zscore_foreground", "ct", "none"] = "auto"
    """How intensities are scaled. `auto`: CT is clipped to the foreground's 0.5 and 99.5 percentiles (HU) and
    standardised by the data set's mean and sd; everything else is z-scored per case."""
    regions: Regions | None = None
    """Overlapping regions to segment instead of the labels, e.g. {TC: [core, enhancing]}. Each region lists its labels
    and gets a sigmoid. A mask shows a region as its one label that is in no smaller region. null: the regions of the
    data set (BraTS 2020, nnU-Net with regions); {}: none; labels: those of the data set, else each label by itself."""
    max_patch_voxels: Annotated[int, Range(4096)] = 655_360
    """Largest number of voxels in a training patch. It limits the memory."""
    patch_size: tuple[Count, Count, Count] | None = None
    """Training patch (depth, height, width), voxels. null: the plan decides."""
    plan: str | None = None
    """Path of a plan.json to use unchanged, instead of making a new one."""
    folds: Annotated[int, Range(2)] = 5
    """Number of cross-validation folds, split by patient."""
    split_seed: Natural = 0
    """Seed of the split."""
    splits: str | None = None
    """Path of a file with your own folds, instead of `folds` and `split_seed`. nnU-Net's splits_final.json, or a
    splits.json."""
    workers: Natural = 0
    """Processes. 0: one per core, within the memory budget."""
    memory_gb: Positive = 2.5
    """Memory that all workers together may use, GB."""
