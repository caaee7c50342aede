"""The parameters of every stage: one frozen dataclass per section of `params.yaml`.

Each field is documented under it, with its unit; checks across fields stand in `__post_init__`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from distilldsm.config.export import ExportConfig
from distilldsm.config.export import Int8Config as Int8Config  # for users of this module
from distilldsm.config.train import AugmentConfig as AugmentConfig
from distilldsm.config.train import MirrorAxis as MirrorAxis
from distilldsm.config.train import ModelConfig as ModelConfig
from distilldsm.config.train import TrainConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import RULE, from_mapping, load_yaml, require, set_values
from distilldsm.core.redaction import public_address, secret_in_address

Modality = Literal["MRI", "CT", "PET", "US", "other"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The embedded sample cohort, drawn from the MNI152 template of nilearn's wheel."""

    subjects: int = 24
    """Number of synthetic subjects."""
    seed: int = 0
    """Seed of every random draw."""

    def __post_init__(self) -> None:
        require(self.subjects >= 5, "subjects", self.subjects, "at least 5, one per fold")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class PatternConfig:
    """A folder layout of one's own, told by file name patterns relative to the data set's root."""

    images: tuple[str, ...]
    """One pattern per channel; `{case}` stands for the case id, `*` for anything,
    e.g. `*/{case}/flair.nii.gz`."""
    label: str
    """Pattern of the label file, with the same `{case}`."""
    channels: Mapping[str, Modality]
    """Channel name to modality, in the order of `images`."""
    labels: Mapping[str, int]
    """Label name to value in the files; must hold `background: 0`."""

    def __post_init__(self) -> None:
        for pattern in (*self.images, self.label):
            require("{case}" in pattern, "images/label", pattern, "each pattern holds {case}")
        require(
            len(self.images) == len(self.channels) > 0,
            "channels",
            dict(self.channels),
            f"as many as image patterns ({len(self.images)}), at least one",
        )
        require(self.labels.get("background") == 0, "labels", dict(self.labels), "must hold 'background: 0'")
        require(
            len(set(self.labels.values())) == len(self.labels) >= 2
            and all(0 <= v <= 255 for v in self.labels.values()),
            "labels",
            dict(self.labels),
            "distinct values from 0 to 255, one at least besides background",
        )


def _refuse_secret(key: str, address: str) -> None:
    """Parameters are written to manifests, dvc.lock, MLflow and the compiled pipeline: no place for a password."""
    found = secret_in_address(address)
    if found is not None:
        raise ConfigError(
            f"'{key}' holds a secret",
            seen=f"{'a user or password' if found == 'user' else found} in {public_address(address)}",
            rule="no user, password, token or signature in an address: parameters are written to many files",
            hint="put it in the environment: DISTILLDSM_DOWNLOAD_USERNAME and DISTILLDSM_DOWNLOAD_PASSWORD, "
            "DISTILLDSM_DOWNLOAD_TOKEN, or DISTILLDSM_DOWNLOAD_SIGNATURE (a signed address' query)",
        )


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Where labelled volumes come from."""

    source: str = "sample"
    """`sample` (embedded), `msd:Task04_Hippocampus` (downloaded), an http(s):// or file:// address of an archive,
    or the path of an archive or a folder."""
    layout: Literal["auto", "msd", "nnunet", "brats2020", "pattern"] = "auto"
    """How the files are laid out; `auto` recognises the first three."""
    name: str | None = None
    """Name of the data set in reports; by default what its dataset.json says, else the file's name."""
    sha256: str | None = None
    """Expected SHA-256 of the archive (hex); a mismatch stops the stage. MSD tasks carry MD5 sums of their own."""
    mirrors: tuple[str, ...] = ()
    """Further addresses of the same archive, tried in order when the first fails."""
    archive_dir: str = "data/archives"
    """Where downloaded archives are kept, so that another run need not fetch them again."""
    patient_pattern: str | None = None
    """Regular expression on the case id whose first group is the patient, e.g. `(patient\\d+)_frame\\d+`;
    by default every case is a patient of its own."""
    pattern: PatternConfig | None = None
    """For `layout: pattern` only."""
    licence: str | None = None
    """Licence of the data; by default what its dataset.json says."""
    reference: str | None = None
    """Who made the data; by default what its dataset.json says."""
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    """Channel name to modality, where the data set does not say or is wrong."""
    sample: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        import re

        require(bool(self.source.strip()), "source", self.source, "must be given: download.source=FOLDER")
        for key, address in (("source", self.source), *(("mirrors", mirror) for mirror in self.mirrors)):
            _refuse_secret(key, address)
        require(
            (self.layout == "pattern") == (self.pattern is not None),
            "pattern",
            self.pattern,
            "is given with, and only with, 'layout: pattern'",
        )
        if self.sha256 is not None:
            require(
                re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256) is not None,
                "sha256",
                self.sha256,
                "64 hexadecimal digits",
            )
        if self.patient_pattern is not None:
            try:
                groups = re.compile(self.patient_pattern).groups
            except re.error as error:
                raise ConfigError(
                    "'patient_pattern' is no regular expression",
                    seen=f"{self.patient_pattern!r}: {error}",
                ) from None
            require(groups >= 1, "patient_pattern", self.patient_pattern, "holds one (group): the patient")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What a case must fulfil before it is used."""

    on_invalid: Literal["fail", "exclude"] = "fail"
    """`fail`: any finding of severity error stops the pipeline; `exclude`: such cases are left out and listed."""
    suite: str = "conf/expectations.yaml"
    """The expectation suite: rules with severities and bounds that a person can read and extend."""
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Per-data-set bounds of a column of the case table, [low, high], null for open,
    e.g. `spacing_max_mm: [0.5, 3.0]`."""
    workers: int = 0
    """Processes; 0 takes one per core."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """From raw volumes to arrays for training: geometry, normalisation, splits."""

    depth_axis: Literal["auto", "x", "y", "z"] = "auto"
    """Scanner axis (RAS) along which slices exchange features; `auto`: the coarsest spacing,
    among equals the smallest extent."""
    target_spacing_mm: tuple[float, float, float] | None = None
    """Spacing (x, y, z) to resample to, mm; by default the median of the data set."""
    crop_to_nonzero: bool = True
    """Cut away the margin that is zero in every channel."""
    normalisation: Literal["auto", "zscore", "zscore_foreground", "ct", "none"] = "auto"
    """`auto`: CT is clipped to the foreground's 0.5 and 99.5 percentiles (HU) and standardised by the data set's
    mean and sd; everything else is z-scored per case."""
    regions: Literal["labels"] | Mapping[str, tuple[str, ...]] | None = field(
        default=None, metadata={RULE: "labels, or names of labels, e.g. {a: [organ, lesion]}"}
    )
    """Overlapping regions to segment instead of the labels, each with a sigmoid: name to label names, e.g.
    `TC: [necrotic_core, enhancing_tumour]`. A mask shows a region as the one label that no smaller region holds.
    null: the data set's own (BraTS 2020, nnU-Net with regions); {}: none; labels: the data set's own, else each label
    by itself."""
    max_patch_voxels: int = 655_360
    """Upper bound of a training patch, in voxels (memory)."""
    patch_size: tuple[int, int, int] | None = None
    """(depth, height, width) of a training patch; by default decided by the plan."""
    plan: str | None = None
    """Path of a plan.json to use as it is, instead of deciding a new one."""
    folds: int = 5
    """Number of cross-validation folds, split by patient."""
    split_seed: int = 0
    """Seed of the split."""
    splits: str | None = None
    """Path of folds of one's own instead of those two: nnU-Net's splits_final.json, or a splits.json."""
    workers: int = 0
    """Processes; 0 takes one per core, within the memory budget."""
    memory_gb: float = 2.5
    """Memory that all workers together may take, GB."""

    def __post_init__(self) -> None:
        require(self.folds >= 2, "folds", self.folds, "at least 2")
        require(self.split_seed >= 0, "split_seed", self.split_seed, "0 or more")
        if self.target_spacing_mm is not None:
            require(min(self.target_spacing_mm) > 0, "target_spacing_mm", self.target_spacing_mm, "above 0")
        if self.patch_size is not None:
            require(
                min(self.patch_size) >= 1 and self.patch_size[1] % 16 == 0 and self.patch_size[2] % 16 == 0,
                "patch_size",
                self.patch_size,
                "positive; height and width multiples of 16",
            )
        require(self.max_patch_voxels >= 4096, "max_patch_voxels", self.max_patch_voxels, "at least 4096")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores on whole volumes in the scan's own geometry."""

    checkpoint: Literal["last", "best"] = "last"
    """`last` chooses nothing on the held-out cases; `best` was chosen on them, so its score is optimistic."""
    mirror: bool = False
    """Average the scores over flips of the axes of `train.augment.mirror_axes`; takes 2^axes times as long."""
    nsd_tolerance_mm: float = 1.0
    """Tolerance of the normalised surface Dice, mm."""
    save_masks: bool = True
    """Keep the predicted masks (NIfTI)."""
    workers: int = 0
    """Processes for the metrics; 0 takes one per core."""

    def __post_init__(self) -> None:
        require(self.nsd_tolerance_mm > 0, "nsd_tolerance_mm", self.nsd_tolerance_mm, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. The address comes from MLFLOW_TRACKING_URI, else a SQLite file beside params.yaml."""

    enabled: bool = True
    """Record runs in MLflow (the store is MLFLOW_TRACKING_URI, by default `sqlite:///mlflow.db`)."""
    experiment: str = "distilldsm"
    """MLflow experiment of all runs."""
    run_name: str | None = None
    """By default the model and the fold."""


@dataclass(frozen=True, kw_only=True)
class CrossValidationConfig:
    """Which folds to run; how many there are is `preprocess.folds`, or what `preprocess.splits` holds."""

    folds: tuple[int, ...] = (0,)
    """The folds that are trained, scored and exported, from 0; several make a cross-validation."""

    def __post_init__(self) -> None:
        require(
            len(set(self.folds)) == len(self.folds) >= 1 and min(self.folds, default=0) >= 0,
            "folds",
            self.folds,
            "distinct fold numbers from 0",
        )


@dataclass(frozen=True, kw_only=True)
class Params:
    """All of `params.yaml`."""

    cv: CrossValidationConfig = CrossValidationConfig()
    download: DownloadConfig = DownloadConfig()
    validate: ValidateConfig = ValidateConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if self.preprocess.splits:  # how many folds it holds is known when it is read
            return
        require(
            max(self.cv.folds) < self.preprocess.folds,
            "cv.folds",
            self.cv.folds,
            f"below preprocess.folds ({self.preprocess.folds})",
        )
        require(
            self.download.source != "sample" or self.preprocess.folds <= self.download.sample.subjects,
            "preprocess.folds",
            self.preprocess.folds,
            f"at most download.sample.subjects ({self.download.sample.subjects})",
        )


def load_params(path: str | os.PathLike[str] = "params.yaml", assignments: Iterable[str] = ()) -> Params:
    """Read and check `params.yaml`, after assignments such as `train.epochs=3`.

    Raises:
        ConfigError: names the file, the section and key, the value and what is allowed.
    """
    hint = "run this where params.yaml lies, write one by `distilldsm compose`, or name another by --params"
    return from_mapping(Params, set_values(load_yaml(path, hint=hint), assignments), where=os.fspath(path))
