"""Public data sets by name: where they lie, how their archives are checked, whose they are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from distilldsm.errors import ConfigError

_HOSTS = (
    "https://msd-for-monai.s3-us-west-2.amazonaws.com",
    "https://msd-for-monai.s3.us-west-2.amazonaws.com",
    "https://s3-us-west-2.amazonaws.com/msd-for-monai",
)
"""The bucket of the Medical Segmentation Decathlon on AWS Open Data, by its three forms of address."""

MSD_REFERENCE = (
    "Medical Segmentation Decathlon, medicaldecathlon.com; Antonelli et al., Nature Communications 13, 4128 (2022)"
)


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """An archive that can be downloaded."""

    urls: tuple[str, ...]
    """The official address first, then mirrors."""
    md5: str
    licence: str
    reference: str


_MSD_MD5 = {
    "Task01_BrainTumour": "240a19d752f0d9e9101544901065d872",
    "Task02_Heart": "06ee59366e1e5124267b774dbd654057",
    "Task03_Liver": "a90ec6c4aa7f6a3d087205e23d4e6397",
    "Task04_Hippocampus": "9d24dba78a72977dbd1d2e110310f31b",
    "Task05_Prostate": "35138f08b1efaef89d7424d2bcc928db",
    "Task06_Lung": "8afd997733c7fc0432f71255ba4e52dc",
    "Task07_Pancreas": "4f7080cfca169fa8066d17ce6eb061e4",
    "Task08_HepaticVessel": "641d79e80ec66453921d997fbf12a29c",
    "Task09_Spleen": "410d4a301da4e5b2f6f86ec3ddba524e",
    "Task10_Colon": "bad7a188931dc2f6acf72b08eb6202d0",
}
"""The checksums MONAI publishes with its DecathlonDataset."""

CATALOG: Mapping[str, CatalogEntry] = {
    f"msd:{task}": CatalogEntry(
        urls=tuple(f"{host}/{task}.tar" for host in _HOSTS),
        md5=md5,
        licence="CC-BY-SA 4.0",
        reference=MSD_REFERENCE,
    )
    for task, md5 in _MSD_MD5.items()
}


def lookup(source: str) -> CatalogEntry:
    """The entry of a `msd:` name.

    Raises:
        ConfigError: no such data set; names the nearest one.
    """
    if source in CATALOG:
        return CATALOG[source]
    close = difflib.get_close_matches(source, CATALOG, n=1, cutoff=0.3)
    raise ConfigError(
        "no such data set",
        where="download.source",
        seen=repr(source),
        rule="one of " + ", ".join(CATALOG),
        mend=f"did you mean '{close[0]}'?" if close else None,
    )
