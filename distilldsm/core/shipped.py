"""The files of `conf/`, in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(path: str | os.PathLike[str]) -> Path:
    """The path itself where it exists; else, of a path below `conf`, what the package brings."""
    asked = Path(path)
    own = PACKAGE / asked
    return own if not asked.exists() and asked.parts[:1] == ("conf",) and own.exists() else asked
