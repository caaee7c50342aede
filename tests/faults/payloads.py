"""Files that mean harm: each would touch a canary if anything carried it out."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.hashes import MANIFEST
from distilldsm.models.package import METADATA


class Canary:
    """A file that must never appear."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def sings(self) -> bool:
        return self.path.exists()

    def evil(self) -> Any:
        """An object whose unpickling touches the file."""
        return _Evil(self.path)

    def pickled(self, kind: str = "pickle") -> bytes:
        """As pickle, or as torch saves it (a zip, or its format of old)."""
        if kind == "pickle":
            return pickle.dumps(self.evil())
        stream = io.BytesIO()
        torch.save({"weights": self.evil()}, stream, _use_new_zipfile_serialization=kind == "torch")
        return stream.getvalue()

    def array(self) -> bytes:
        """A .npy file of objects."""
        stream = io.BytesIO()
        np.save(stream, np.array([self.evil()], dtype=object), allow_pickle=True)
        return stream.getvalue()

    def expression(self) -> str:
        """As a MONAI bundle's configuration would say it."""
        return f"$__import__('pathlib').Path({str(self.path)!r}).touch()"

    def yaml(self) -> str:
        """A YAML value whose construction touches the file."""
        return f"!!python/object/apply:os.mkdir [{str(self.path)!r}]"


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


KINDS = ("pickle", "torch", "torch-legacy")


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    found = Canary(tmp_path / "canary")
    yield found
    assert not found.sings, "what was planted has run"


def rehash(model: Path) -> None:
    """Make an exported model's metadata fit its files, as whoever changed them would do."""
    metadata = read_json(model / METADATA)
    metadata["files"] = {name: sha256_file(model / name) for name in metadata["files"]}
    write_json(model / METADATA, metadata)
    (model / MANIFEST).unlink(missing_ok=True)


def told(text: str, *words: str) -> None:
    """An error message says what is wrong, in the form of all errors, and names `words`."""
    assert "error: " in text, text
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, (word, text)
