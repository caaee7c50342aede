"""Public data sets by name: addresses, checksums, channels, licence and reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distilldsm.config import Modality
from distilldsm.core.errors import ConfigError, did_you_mean

_HOSTS = (
    "https://msd-for-monai.s3-us-west-2.amazonaws.com",
    "https://msd-for-monai.s3.us-west-2.amazonaws.com",
    "https://s3-us-west-2.amazonaws.com/msd-for-monai",
)
"""The three addresses of the Medical Segmentation Decathlon's bucket on AWS Open Data."""

MSD_REFERENCE = (
    "Medical Segmentation Decathlon, medicaldecathlon.com; Antonelli et al., Nature Communications 13, 4128 (2022)"
)


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """An archive that can be downloaded."""

    urls: tuple[str, ...]
    """The official address first, then mirrors."""
    md5: str
    channels: Mapping[str, Modality]
    """Channel name to modality."""
    cases: int
    """Number of labelled cases."""
    licence: str
    reference: str


_MSD: Mapping[str, tuple[str, int, Mapping[str, Modality]]] = {
    "Task01_BrainTumour": (
        "240a19d752f0d9e9101544901065d872",
        484,
        {"FLAIR": "MRI", "T1w": "MRI", "t1gd": "MRI", "T2w": "MRI"},
    ),
    "Task02_Heart": ("06ee59366e1e5124267b774dbd654057", 20, {"MRI": "MRI"}),
    "Task03_Liver": ("a90ec6c4aa7f6a3d087205e23d4e6397", 131, {"CT": "CT"}),
    "Task04_Hippocampus": ("9d24dba78a72977dbd1d2e110310f31b", 260, {"MRI": "MRI"}),
    "Task05_Prostate": ("35138f08b1efaef89d7424d2bcc928db", 32, {"T2": "MRI", "ADC": "MRI"}),
    "Task06_Lung": ("8afd997733c7fc0432f71255ba4e52dc", 63, {"CT": "CT"}),
    "Task07_Pancreas": ("4f7080cfca169fa8066d17ce6eb061e4", 281, {"CT": "CT"}),
    "Task08_HepaticVessel": ("641d79e80ec66453921d997fbf12a29c", 303, {"CT": "CT"}),
    "Task09_Spleen": ("410d4a301da4e5b2f6f86ec3ddba524e", 41, {"CT": "CT"}),
    "Task10_Colon": ("bad7a188931dc2f6acf72b08eb6202d0", 126, {"CT": "CT"}),
}
"""MD5 checksum (as published in MONAI's DecathlonDataset), number of labelled cases, channels."""

CATALOG: Mapping[str, CatalogEntry] = {
    f"msd:{task}": CatalogEntry(
        urls=tuple(f"{host}/{task}.tar" for host in _HOSTS),
        md5=md5,
        channels=channels,
        cases=cases,
        licence="CC-BY-SA 4.0",
        reference=MSD_REFERENCE,
    )
    for task, (md5, cases, channels) in _MSD.items()
}


def lookup(source: str) -> CatalogEntry:
    """The entry for a name such as `msd:Task04_Hippocampus`.

    Raises:
        ConfigError: the data set is unknown; the hint names the most similar one.
    """
    if source in CATALOG:
        return CATALOG[source]
    raise ConfigError(
        "no such data set",
        where="download.source",
        seen=repr(source),
        rule="one of " + ", ".join(CATALOG),
        hint=did_you_mean(source, CATALOG, cutoff=0.3),
    )
