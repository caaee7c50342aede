"""Packs the many small files of a data step: KFP moves files one after the other, and each costs a request."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

ARCHIVE = "files.tar.gz"
"""File in an artifact: all its subfolders. The files beside it stay readable in the bucket."""
FEW_FILES = 32
"""An output with at most so many files in its subfolders is not packed."""
_LEVEL = 1
"""Of gzip. It makes preprocessed volumes three times smaller; higher levels are slow and gain little."""


def pack(output: Path) -> None:
    """Replace the subfolders of an output by one archive, if they hold many files."""
    folders = sorted(path for path in output.iterdir() if path.is_dir())
    if sum(path.is_file() for folder in folders for path in folder.rglob("*")) <= FEW_FILES:
        return
    with tarfile.open(output / ARCHIVE, "w:gz", compresslevel=_LEVEL, dereference=True) as archive:
        for folder in folders:
            archive.add(folder, folder.name)
    for folder in folders:
        shutil.rmtree(folder)


def unpacked(artifact: Path, below: str, folder: Path) -> Path:
    """The path `below` of an artifact. A packed artifact is first unpacked into `folder`, which does not exist yet.

    The artifact stays as it is: other steps may read the same copy.
    """
    if not (artifact / ARCHIVE).is_file() or (below and (artifact / below).exists()):
        return artifact / below
    shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns(ARCHIVE))
    with tarfile.open(artifact / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / below
