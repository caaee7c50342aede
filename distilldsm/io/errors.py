"""What readers say of a file that they cannot use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distilldsm.core.errors import DataError

Refuse = Callable[[DataError], object]
"""Called with each finding that spoils a scan though it can be read. Readers raise it, validation collects."""


def raise_error(error: DataError) -> None:
    """Refuse by raising."""
    raise error


def first_line(error: BaseException) -> str:
    """An exception in at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def damaged(path: Path, error: BaseException) -> DataError:
    """The error to raise for a file whose bytes cannot be read: the system refuses them, or they are damaged.

    Args:
        error: what reading it raised; libraries hide the system's answer behind answers of their own.
    """
    if not (isinstance(error, OSError) and error.errno is not None):  # gzip's and nibabel's own carry no number
        try:
            with open(path, "rb") as stream:
                stream.read(1)
        except OSError as refused:
            error = refused
        else:
            return DataError(
                "is truncated or damaged", where=path, seen=first_line(error), hint="copy or export the file again"
            )
    return DataError(
        "cannot be read",
        where=path,
        seen=first_line(error),
        hint="get the right to read it (its owner: chmod u+r)"
        if isinstance(error, PermissionError)
        else "look after the disk or the network it lies on",
    )
