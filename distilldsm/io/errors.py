"""Errors of readers about files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distilldsm.core.errors import DataError

Refuse = Callable[[DataError], object]
"""Called with each error in a scan that could still be read. Readers raise the error, validation collects it."""
MAX_SURPLUS = 1_000_000
"""Largest number of bytes after the last voxel."""


def raise_error(error: DataError) -> None:
    """Refuse by raising."""
    raise error


def first_line(error: BaseException) -> str:
    """The first line of an exception, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def damaged(path: Path, error: BaseException) -> DataError:
    """The error to raise for an unreadable file: the system refuses to read it, or its bytes are damaged.

    Args:
        error: exception from reading the file. Libraries often hide the system's error behind their own.
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
        hint="get permission to read it (the owner can run chmod u+r)"
        if isinstance(error, PermissionError)
        else "check the disk or the network that holds it",
    )


def check_surplus(path: Path, surplus_bytes: int, declared: str) -> None:
    """Refuse a file with more than MAX_SURPLUS bytes after the last voxel that its header declares.

    Args:
        declared: what the header says of the voxels.

    Raises:
        DataError: there are more.
    """
    if surplus_bytes > MAX_SURPLUS:
        raise DataError(
            "has too many bytes after its last voxel",
            where=path,
            seen=f"more than {MAX_SURPLUS} bytes",
            rule=f"{declared}; then at most {MAX_SURPLUS} bytes",
            hint="correct the shape and type of the voxels in the header, or export the file again",
        )
