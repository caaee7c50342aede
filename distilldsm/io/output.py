"""Writes files completely or not at all; errors name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import UserError
from distilldsm.core.files import whole_file
from distilldsm.core.text import csv_cell

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an error.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    try:
        with whole_file(path, suffix) as temporary:
            yield temporary
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                "no space left to write",
                where=path,
                seen=error.strerror,
                rule="the incomplete file was deleted",
                hint="free space or choose another place, then run the same command again",
            ) from None
        raise UserError("cannot be written", where=path, seen=error.strerror or str(error)) from None


@contextmanager
def scratch_array(path: Path, shape: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a uint8 array of zeros in a temporary file beside `path`, because it may be larger than the memory.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.scratch")
    size = int(np.prod(shape, dtype=object))
    try:
        try:
            with open(temporary, "xb") as stream:
                # Reserve the space now: if the disk fills up while a memory map is written, the process is killed.
                os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                "no space left to write" if error.errno in _FULL else "cannot be written",
                where=temporary.parent,
                seen=error.strerror,
                rule=f"{size / 1e9:.2f} GB for the probabilities",
            ) from None
        yield np.memmap(temporary, dtype=np.uint8, mode="r+", shape=tuple(shape), order="F")
    finally:
        temporary.unlink(missing_ok=True)


def write_volumes(path: Path, volumes_ml: Mapping[str, Mapping[str, float]]) -> None:
    """Write the volume (ml) of each label and region: .csv (a row per scan and label), .json ({scan: {label: ml}})."""
    if path.suffix == ".csv":
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["scan", "label", "volume_ml"])
        for scan, labels in volumes_ml.items():
            writer.writerows([csv_cell(scan), csv_cell(label), f"{ml:.6g}"] for label, ml in labels.items())
        content = text.getvalue()
    else:
        import json

        content = json.dumps({scan: dict(labels) for scan, labels in volumes_ml.items()}, indent=2) + "\n"
    with replacing(path) as temporary:
        # A file name of a scan need not be UTF-8.
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
