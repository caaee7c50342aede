"""Unpacks tar and zip archives that may be untrusted. Nothing is written outside the target."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from distilldsm.core.errors import DataError
from distilldsm.core.machine import check_space
from distilldsm.core.progress import meter

MAX_RATIO = 200
"""Largest ratio of unpacked to packed size. Medical volumes reach 20; a larger ratio is a decompression bomb."""
RATIO_FREE_BYTES = 100_000_000
"""Below this unpacked size the ratio is not checked, because small label maps compress very well."""
MAX_MEMBERS = 1_000_000
"""Largest number of files in one archive: a disk can run out of inodes before it runs out of space."""
MIN_MEMBERS, MIN_BYTES_PER_MEMBER = 10_000, 10
"""A tar may have this many header blocks, and one more for every so many bytes of the packed archive."""
MAX_HEADER_BYTES, MAX_EXTENDED_BYTES = 1_000_000, 100_000_000
"""Largest extended header of a tar (a long name, attributes), and of all such headers together."""
_JUNK = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""Exceptions that the readers raise for bytes that are not an archive."""
_CHUNK = 1 << 20
_MAX_WRAPPING = 8


@dataclass(frozen=True)
class Member:
    """One regular file of an archive."""

    path: PurePosixPath
    size: int
    handle: Any


def extract(archive: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into `target`.

    All members are checked before the first is written. System files of macOS and Windows (`._*`, `__MACOSX`,
    `.DS_Store`) are skipped. Owners, permissions and times of the archive are not restored.

    Raises:
        DataError: the file is not an archive, is truncated, is a decompression bomb, holds a link, a special or sparse
            file, a negative size or a path outside the target; or the disk has not enough space.
    """
    archive, target = Path(archive), Path(target)
    with _opened(archive) as (members, read):
        files = _checked(members, archive)
        unpacked = sum(m.size for m in files)
        target.mkdir(parents=True, exist_ok=True)
        check_space(target, unpacked, hint="free space, then run the same command again")
        with meter(total=unpacked, title=f"unpack {archive.name}", unit="B", brief=True) as shown:
            for member in files:
                destination = target.joinpath(*member.path.parts)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with read(member) as source, open(destination, "wb") as sink:
                    _copy_exactly(source, sink, member, archive)
                shown.advance(member.size)
    return target


def wrapped(folder: Path) -> Iterator[Path]:
    """Yield the folder, then the only folder in it, and so on while there is nothing else (archives often wrap data
    sets in this way). System files and hidden files do not count."""
    for _ in range(_MAX_WRAPPING):  # a link may lead back to a folder that holds it
        yield folder
        inside = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.name not in _JUNK]
        if len(inside) != 1 or not inside[0].is_dir():
            return
        folder = inside[0]


def find_root(folder: Path, marker: str = "dataset.json") -> Path:
    """The folder that holds `marker`, among the folders of `wrapped`; the innermost of them if none holds it."""
    folders = list(wrapped(folder))
    return next((inner for inner in folders if (inner / marker).exists()), folders[-1])


def is_litter(path: PurePosixPath) -> bool:
    """Whether a file is a system file of macOS or Windows, which is not part of a data set."""
    return any(part in _JUNK or part.startswith("._") for part in path.parts)


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[Iterator[Member], Callable[[Member], IO[bytes]]]]:
    """Yield the archive's members, in stored order, and a function that opens one of them."""
    try:
        with open(archive, "rb") as raw:
            # Not zipfile.is_zipfile: it calls a tar file with a zip as its last member a zip file.
            is_zip = raw.read(2) == b"PK"
        if is_zip:
            with zipfile.ZipFile(archive) as packed_zip:
                yield _zip_members(packed_zip, archive), lambda member: packed_zip.open(member.handle)
        else:
            with _decompressed(archive) as plain:
                stream = _TarStream(plain, archive.stat().st_size)
                with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as packed:
                    yield _tar_members(packed, stream, archive), lambda member: _tar_file(packed, member)
    except FileNotFoundError as error:
        if error.filename and Path(error.filename) == archive:
            raise DataError("file not found", where=archive) from None
        raise
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk; errors of gzip and bz2 about bad bytes have no number
        if archive.name.endswith((".nii", ".nii.gz", ".dcm", ".json")):
            raise DataError(
                "is one file, not a data set",
                where=archive,
                rule="download.source: sample, msd:TASK, an address, an archive (tar, tar.gz/bz2/xz, zip) or a folder",
                hint="name the folder that holds scans and masks",
            ) from None
        raise DataError(
            "is not a readable archive, or is truncated",
            where=archive,
            seen=f"{type(error).__name__}: {error}".splitlines()[0],  # tarfile adds a line for each format it tried
            rule="tar (also gz, bz2, xz) or zip",
            hint="download or copy it again",
        ) from None


def _decompressed(archive: Path) -> IO[bytes]:
    """The archive as a stream, decompressed. Its first bytes tell how."""
    with open(archive, "rb") as stream:
        head = stream.read(6)
    kinds: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
    opened: IO[bytes] = next((kind for magic, kind in kinds if head.startswith(magic)), open)(archive, "rb")
    return opened


class _TarStream:
    """The stream of a tar. While headers are read, it refuses what no honest archive holds, before it is in memory."""

    def __init__(self, stream: IO[bytes], packed_bytes: int) -> None:
        self.stream = stream
        self.seek, self.tell = stream.seek, stream.tell
        self.reading_headers = True
        self._blocks = MIN_MEMBERS + packed_bytes // MIN_BYTES_PER_MEMBER
        self._extended = MAX_EXTENDED_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.reading_headers:
            self._blocks -= size >= tarfile.BLOCKSIZE
            self._extended -= size if size > tarfile.BLOCKSIZE else 0
            if size < 0 or size > MAX_HEADER_BYTES or self._extended < 0 or self._blocks < 0:
                raise tarfile.ReadError("its headers are too large or too many (decompression bomb?)")
        return self.stream.read(size)


def _checked(members: Iterator[Member], archive: Path) -> list[Member]:
    """Check the members one by one and return them. A bomb is noticed before the rest of it is decompressed."""
    packed = archive.stat().st_size
    files: dict[PurePosixPath, Member] = {}
    unpacked = 0
    for member in members:
        files[member.path] = member  # if a name is stored twice, the later one counts, as in tar
        unpacked += member.size
        if unpacked > max(RATIO_FREE_BYTES, packed * MAX_RATIO) or len(files) > MAX_MEMBERS:
            raise DataError(
                "would unpack to a suspicious size (decompression bomb?)",
                where=archive,
                seen=f"{packed:,} to {unpacked:,} bytes and more, in {len(files):,} files",
                rule=f"at most {MAX_RATIO} times and {MAX_MEMBERS:,} files",
                hint="unpack it yourself and name the folder",
            )
    if not files:
        raise DataError("holds no files", where=archive)
    for path in files:
        if both := next((parent for parent in path.parents if parent in files), None):
            raise DataError("holds a file and a folder of the same name", where=archive, seen=both)
    return list(files.values())


def _tar_members(packed: tarfile.TarFile, stream: _TarStream, archive: Path) -> Iterator[Member]:
    while (info := packed.next()) is not None:
        packed.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
        if info.size < 0:
            raise DataError("holds a member of negative size", where=archive, seen=f"{info.name}: {info.size} bytes")
        path = _safe_path(info.name, archive)
        if path is None or info.isdir():
            continue
        if not info.isreg() or info.issparse():
            kind = "link" if info.issym() or info.islnk() else "device, sparse or special file"
            raise DataError(f"holds a {kind}", where=archive, seen=info.name, rule="plain files and folders only")
        yield Member(path, info.size, info)
    stream.reading_headers = False
    # A tar that was cut between two members looks complete, but the zeros at the end of every tar are missing.
    if stream.tell() <= packed.offset:
        raise tarfile.ReadError("the end mark is missing")
    # Compressed streams have their checksum at the end; tarfile does not read that far.
    rest = 0
    while chunk := stream.read(_CHUNK):
        rest += len(chunk)
        if rest > RATIO_FREE_BYTES:
            raise tarfile.ReadError("data after the end mark")


def _tar_file(packed: tarfile.TarFile, member: Member) -> IO[bytes]:
    stream = packed.extractfile(member.handle)
    assert stream is not None  # only regular files are members
    return stream


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
                "is encrypted", where=archive, seen=info.filename, hint="unpack it yourself, name the folder"
            )
        yield Member(path, info.file_size, info)


def _safe_path(name: str, archive: Path) -> PurePosixPath | None:
    """The member's path, None for a system file; raises DataError for a path outside the target."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or (path.parts and path.parts[0].endswith(":")):
        raise DataError(
            "holds a member that would be written outside its folder",
            where=archive,
            seen=name,
            rule="relative names without '..'",
            hint="get the archive from a source you trust",
        )
    return None if is_litter(path) or not path.parts else path


def _copy_exactly(source: IO[bytes], sink: IO[bytes], member: Member, archive: Path) -> None:
    """Copy a member, but never more than its declared size: a wrong header must not fill the disk."""
    left = member.size
    while left > 0:
        chunk = source.read(min(_CHUNK, left))
        if not chunk:
            raise DataError("is truncated", where=archive, seen=str(member.path), hint="download or copy it again")
        sink.write(chunk)
        left -= len(chunk)
    if source.read(1):
        raise DataError("holds more than it declares", where=archive, seen=str(member.path))
