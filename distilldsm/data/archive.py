"""Unpacking tar and zip archives that may come from anywhere: nothing is written outside the target."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from distilldsm.errors import DataError

MAX_RATIO = 200
"""Unpacked to packed size: medical volumes reach 20 at most; more is taken for a decompression bomb."""
RATIO_FREE_BYTES = 100_000_000
"""Below this unpacked size the ratio is not looked at (small label maps compress very well)."""
_JUNK = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One regular file of an archive."""

    path: PurePosixPath
    size: int
    handle: object


def extract(archive: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into `target`.

    All members are looked at before the first is written. macOS and Windows litter (`._*`, `__MACOSX`, `.DS_Store`) is
    skipped; owner, permissions and times of the archive are not taken over.

    Raises:
        DataError: not an archive, truncated, a member that would land outside, a link or device, a decompression bomb,
            or not enough space.
    """
    archive, target = Path(archive), Path(target)
    with _opened(archive) as (members, read):
        files = list(members)
        if not files:
            raise DataError("holds no files", where=archive)
        _check_size(archive, target, sum(m.size for m in files))
        for member in files:
            destination = target.joinpath(*member.path.parts)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with read(member) as source, open(destination, "wb") as sink:
                _copy_exactly(source, sink, member, archive)
    return target


def find_root(folder: Path, marker: str = "dataset.json") -> Path:
    """The folder that holds `marker`: this one, or the only one inside it (archives wrap data sets so)."""
    if (folder / marker).exists():
        return folder
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith((".", "__"))]
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return find_root(inside[0], marker) if len(inside) == 1 and not files else folder


@contextmanager
def _opened(archive: Path) -> Iterator:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                yield _zip_members(packed, archive), lambda member: packed.open(member.handle)
        else:
            with tarfile.open(archive) as packed:
                yield _tar_members(packed, archive), lambda member: packed.extractfile(member.handle)
    except FileNotFoundError as error:
        if error.filename and Path(error.filename) == archive:
            raise DataError("file not found", where=archive) from None
        raise
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(
            "is no readable archive, or is truncated",
            where=archive,
            seen=f"{type(error).__name__}: {error}",
            rule="tar (also gz, bz2, xz) or zip",
            mend="download or copy it again",
        ) from None


def _tar_members(packed: tarfile.TarFile, archive: Path) -> Iterator[Member]:
    for info in packed:
        path = _safe_path(info.name, archive)
        if path is None or info.isdir():
            continue
        if not info.isreg():
            kind = "link" if info.issym() or info.islnk() else "device or special file"
            raise DataError(f"holds a {kind}", where=archive, seen=info.name, rule="plain files and folders only")
        yield Member(path, info.size, info)


def _zip_members(packed: zipfile.ZipFile, archive: Path) -> Iterator[Member]:
    for info in packed.infolist():
        path = _safe_path(info.filename, archive)
        if path is None or info.is_dir():
            continue
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise DataError("holds a link or special file", where=archive, seen=info.filename, rule="plain files only")
        if info.flag_bits & 1:
            raise DataError(
                "is encrypted", where=archive, seen=info.filename, mend="unpack it yourself, name the folder"
            )
        yield Member(path, info.file_size, info)


def _safe_path(name: str, archive: Path) -> PurePosixPath | None:
    """The member's path, None for litter; raises for one that would land outside the target."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or (path.parts and path.parts[0].endswith(":")):
        raise DataError(
            "holds a member that would be written outside its folder",
            where=archive,
            seen=name,
            rule="relative names without '..'",
            mend="get the archive from a source you trust",
        )
    if any(part in _JUNK or part.startswith("._") for part in path.parts):
        return None
    return path


def _check_size(archive: Path, target: Path, unpacked: int) -> None:
    packed = archive.stat().st_size
    if unpacked > RATIO_FREE_BYTES and unpacked > packed * MAX_RATIO:
        raise DataError(
            "would grow suspiciously (decompression bomb?)",
            where=archive,
            seen=f"{packed:,} to {unpacked:,} bytes",
            rule=f"at most {MAX_RATIO} times",
            mend="unpack it yourself and name the folder",
        )
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if unpacked > free:
        raise DataError(
            "not enough space to unpack", where=target, seen=f"{free:,} bytes free", rule=f"{unpacked:,} needed"
        )


def _copy_exactly(source: IO[bytes], sink: IO[bytes], member: Member, archive: Path) -> None:
    """Copy a member, never more than its declared size: a lying header cannot fill the disk."""
    left = member.size
    while left > 0:
        chunk = source.read(min(_CHUNK, left))
        if not chunk:
            raise DataError("is truncated", where=archive, seen=str(member.path), mend="download or copy it again")
        sink.write(chunk)
        left -= len(chunk)
    if source.read(1):
        raise DataError("holds more than it declares", where=archive, seen=str(member.path))
