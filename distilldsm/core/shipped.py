"""Finds files of `conf/` in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(path: str | os.PathLike[str]) -> Path:
    """The path itself if it exists. Otherwise, for a path below `conf`, the file in the installed package."""
    asked = Path(path)
    own = PACKAGE / asked
    return own if not asked.exists() and asked.parts[:1] == ("conf",) and own.exists() else asked
