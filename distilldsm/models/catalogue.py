"""Trained models by name: which there are, where they lie on this machine, and how they are fetched.

A model's name stands for its directory in `predict`, `info` and `load_model`. Models that ship with the package lie in
`distilldsm/pretrained/NAME`; others are fetched once, by `distilldsm models pull`. Nothing is fetched by itself.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distilldsm.core.errors import ConfigError, DataError, did_you_mean
from distilldsm.core.files import read_record, replace_directory
from distilldsm.core.redaction import public_address
from distilldsm.models.package import METADATA, verify

CATALOGUE = Path(__file__).with_name("catalogue.json")
SHIPPED = Path(__file__).parents[1] / "pretrained"
FOLDER_VARIABLE = "DISTILLDSM_MODELS"
"""Environment variable: the folder of the fetched models."""
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A model that can be fetched."""

    title: str
    input: str
    """What a scan must show, e.g. a crop around one hippocampus."""
    licence: str
    reference: str
    card: str
    """Address of the model card."""
    address: str | None = None
    """Address of the archive (tar or zip) of the exported model; null: it ships with the package."""
    mirrors: tuple[str, ...] = ()
    """Further addresses of the same archive, tried in order when the first fails."""
    sha256: str | None = None
    """SHA-256 of the archive, hex; needed with an address."""

    def __post_init__(self) -> None:
        if self.address is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256 or ""):
            raise ConfigError("'sha256' has an impossible value", seen=repr(self.sha256), rule="64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The contents of a catalogue file."""

    schema_version: int = 1
    models: Mapping[str, CatalogueEntry]

    @classmethod
    def load(cls, path: Path = CATALOGUE) -> Catalogue:
        """Read a catalogue; raises DataError if it is missing or damaged."""
        return read_record(cls, path, hint="correct the catalogue, or leave --catalogue out")


def models_folder() -> Path:
    """The folder of the fetched models."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get(FOLDER_VARIABLE) or f"{data}/distilldsm/models").expanduser()


def installed() -> dict[str, Path]:
    """Name to directory of the models on this machine: shipped with the package, or fetched."""
    found: dict[str, Path] = {}
    for folder in (models_folder(), SHIPPED):
        found |= {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{METADATA}"))}
    return found


def model_directory(model: str | os.PathLike[str]) -> Path:
    """The directory of a model: the path itself if it exists, else that of the model with this name.

    Raises:
        DataError: there is neither; the hint says how to get a model of the catalogue.
    """
    path, name = Path(model), os.fspath(model)
    if path.exists() or not NAME.fullmatch(name):
        return path
    here = installed()
    if name in here:
        return here[name]
    known = Catalogue.load().models
    if name in known:
        hint: str | None = f"distilldsm models pull {name}"
    else:
        hint = (
            did_you_mean(name, {*here, *known}) or "give the directory that the export stage wrote, e.g. export/fold0"
        )
    raise DataError("is not an exported model", where=name, seen="no such directory, and no such model here", hint=hint)


def pull(model: str, *, sha256: str | None = None, catalogue: Path = CATALOGUE) -> Path:
    """Fetch a model, check it and put it into the folder of models. A model with this name is replaced.

    Args:
        model: name in the catalogue; or the address or path of an archive, whose name then is the model's.
        sha256: expected SHA-256 of an archive that is not in the catalogue, hex.

    Raises:
        ConfigError: the model is not in the catalogue.
        DataError: it cannot be fetched, has another checksum, or is not an exported model.
    """
    from distilldsm.data.archive import extract, find_root
    from distilldsm.data.download import Credentials, fetch

    name, addresses, expected = _source(model, sha256, catalogue)
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    credentials = Credentials.from_environment(addresses[0])
    archive = fetch(addresses, folder / f".{name}.archive", sha256=expected, credentials=credentials)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacked-") as scratch:
            root = find_root(extract(archive, scratch), METADATA)
            verify(root)
            # Renamed as a whole: the new model is complete or is not there.
            replace_directory(root, folder / name)
    finally:
        archive.unlink(missing_ok=True)
    return folder / name


def _source(model: str, sha256: str | None, catalogue: Path) -> tuple[str, tuple[str, ...], str | None]:
    """Name, addresses and checksum of a model."""
    from distilldsm.data.download import is_url

    known = Catalogue.load(catalogue).models
    entry = known.get(model)
    if entry is not None and entry.address is not None:
        return model, (entry.address, *entry.mirrors), entry.sha256
    if entry is not None:
        raise ConfigError("ships with the package; there is nothing to fetch", where=model)
    if is_url(model) or Path(model).is_file():
        path = public_address(model) if is_url(model) else model
        stem = re.sub(r"(\.tar)?\.\w+$", "", path.rstrip("/").rpartition("/")[2]).lower()
        if not NAME.fullmatch(stem):
            raise ConfigError("gives the model no name", where=path, rule="ends with letters, digits, '_', '.', '-'")
        return stem, (model,), sha256
    raise ConfigError(
        "is not in the catalogue",
        where=model,
        rule=f"one of {', '.join(known) or '(none yet)'}, or the address of an archive",
        hint=did_you_mean(model, known),
    )
