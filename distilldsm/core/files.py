"""Writes files completely or not at all; reads and writes JSON, hashes files, replaces folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from distilldsm.core.errors import ConfigError, DataError, UserError

T = TypeVar("T")

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hex."""
    import hashlib

    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces), hex."""
    import hashlib

    from distilldsm.core.mapping import to_mapping

    text = json.dumps(to_mapping(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def whole_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an error.

    A process that is killed leaves the temporary file behind; `output_directory` removes it from its output.

    Args:
        suffix: ending of the temporary name, for a writer that derives the format from the name.
    """
    # Not the process id: two containers on one folder may have the same.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp{suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the folder may be gone; report the original write error
            temporary.unlink(missing_ok=True)


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """Put around code that writes `path` through a temporary or lock file: errors then name `path` itself.

    Raises:
        OSError: the disk is full; `output_directory` and the shell report it.
        UserError: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise OSError(error.errno, error.strerror, str(path)) from error
        hint = "make its folder first" if error.errno == errno.ENOENT else "name a place that you may write to"
        raise UserError("cannot be written", where=path, seen=error.strerror or str(error), hint=hint) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file. Readers see either the old file or the complete new one.

    Raises:
        OSError, UserError: as `writes`.
    """
    with writes(path), whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file. Readers see either the old file or the complete new one.

    Raises:
        OSError, UserError: as `writes`.
    """
    from distilldsm.core.mapping import to_mapping

    write_text(Path(path), json.dumps(to_mapping(value), indent=2, allow_nan=False) + "\n")


def read_record(cls: type[T], path: str | os.PathLike[str], *, hint: str) -> T:
    """Read a JSON file that holds the dataclass `cls`.

    Args:
        hint: what the user should do if the file is damaged.

    Raises:
        UserError: the file is missing, is not valid JSON or holds something else.
    """
    from distilldsm.core.mapping import from_mapping

    try:
        return from_mapping(cls, read_json(path), where=os.fspath(path))
    except ConfigError as error:  # a stage wrote this file, so the error is not in the user's parameters
        raise DataError(error.problem, where=error.where, seen=error.seen, rule=error.rule, hint=hint) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("is missing", where=path, hint="run the stage that writes it (dvc repro)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            "cannot be read as JSON",
            where=path,
            seen=str(error),
            hint="copy it again, or run the stage that writes it (dvc repro)",
        ) from None


def sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(source: Path, target: Path) -> None:
    """Move `source` to `target` and replace what is there. `target` is never a mixture of both.

    After a power cut, there is `target`, or `source` and the old target as `.NAME.old`. The files in `source` must be
    on the disk already, see `sync`.
    """
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
