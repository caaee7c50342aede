"""Section `download` of `params.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import Natural, Range, require
from distilldsm.core.redaction import public_address, secret_in_address

Modality = Literal["MRI", "CT", "PET", "US", "other"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The synthetic sample data set, made from the MNI152 template in the nilearn package."""

    subjects: Annotated[int, Range(5)] = 24
    """Number of synthetic subjects, at least one per fold."""
    seed: Natural = 0
    """Seed of every random draw."""


@dataclass(frozen=True, kw_only=True)
class PatternConfig:
    """Your own folder layout, described by file name patterns relative to the data set's root."""

    images: tuple[str, ...]
    """One pattern per channel. `{case}` stands for the case id, `*` for anything, e.g. `*/{case}/flair.nii.gz`."""
    label: str
    """Pattern of the label file, with the same `{case}`."""
    channels: Mapping[str, Modality]
    """Channel name to modality, in the order of `images`."""
    labels: Mapping[str, int]
    """Label name to value in the files, with `background: 0`. Values are distinct, from 0 to 255."""

    def __post_init__(self) -> None:
        for pattern in (*self.images, self.label):
            require("{case}" in pattern, "images/label", pattern, "each pattern holds {case}")
        require(
            len(self.images) == len(self.channels) > 0,
            "channels",
            dict(self.channels),
            f"one per image pattern ({len(self.images)}), at least one",
        )
        require(self.labels.get("background") == 0, "labels", dict(self.labels), "must hold 'background: 0'")
        values = set(self.labels.values())
        require(
            len(values) == len(self.labels) >= 2 and min(values) >= 0 and max(values) <= 255,
            "labels",
            dict(self.labels),
            "distinct values from 0 to 255, at least one besides background",
        )


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Where labelled volumes come from."""

    source: str = "sample"
    """`sample`, `msd:Task04_Hippocampus`, or the path or address of an archive or folder. `sample` needs no download;
    an MSD task is downloaded. An address begins with http(s):// or file://."""
    layout: Literal["auto", "msd", "nnunet", "brats2020", "pattern"] = "auto"
    """Folder layout. `auto` detects msd, nnunet and brats2020; `pattern` uses `download.pattern`."""
    name: str | None = None
    """Name of the data set in reports. null: the name in its dataset.json, else the file's name."""
    sha256: str | None = None
    """Expected SHA-256 of the archive, hex. A mismatch stops the stage. MSD tasks are checked by known MD5 sums."""
    mirrors: tuple[str, ...] = ()
    """Further addresses of the same archive, tried in order when the first fails."""
    archive_dir: str = "data/archives"
    """Folder where downloaded archives are kept for the next run."""
    patient_pattern: str | None = None
    """Regular expression for the case id. Its first group is the patient, e.g. `(patient\\d+)_frame\\d+`. null: every
    case is another patient."""
    pattern: PatternConfig | None = None
    """For `layout: pattern` only."""
    licence: str | None = None
    """Licence of the data. null: the licence in its dataset.json."""
    reference: str | None = None
    """Who made the data. null: the reference in its dataset.json."""
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    """Channel name to modality, if the data set does not say it or is wrong."""
    sample: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
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
            found = re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256)
            require(found is not None, "sha256", self.sha256, "64 hexadecimal digits")
        if self.patient_pattern is not None:
            try:
                groups = re.compile(self.patient_pattern).groups
            except re.error as error:
                raise ConfigError(
                    "'patient_pattern' is not a regular expression", seen=f"{self.patient_pattern!r}: {error}"
                ) from None
            require(groups >= 1, "patient_pattern", self.patient_pattern, "must hold one (group): the patient")


def _refuse_secret(key: str, address: str) -> None:
    """Refuse passwords: parameters are written to manifests, dvc.lock, MLflow and the compiled pipeline."""
    found = secret_in_address(address)
    if found is not None:
        raise ConfigError(
            f"'{key}' holds a secret",
            seen=f"{'a user or password' if found == 'user' else found} in {public_address(address)}",
            rule="no user, password, token or signature in an address: parameters are written to many files",
            hint="put it in the environment: DISTILLDSM_DOWNLOAD_USERNAME and DISTILLDSM_DOWNLOAD_PASSWORD, "
            "DISTILLDSM_DOWNLOAD_TOKEN, or DISTILLDSM_DOWNLOAD_SIGNATURE (a signed address' query)",
        )
