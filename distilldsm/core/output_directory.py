"""The output directory of a stage: complete or absent, with manifest, hashes and lock."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import UserError
from distilldsm.core.files import (
    FULL_DISK,
    replace_directory,
    sha256_file,
    sha256_json,
    sync,
    write_json,
    writes,
)
from distilldsm.core.hashes import (
    MANIFEST,
    PIECES,
    code_hash,
    content_hash,
    current_hashes,
    files_of,
    hashed_files,
    names_below,
    package_versions,
    read_if_whole,
    remember,
)

if TYPE_CHECKING:
    from filelock import FileLock

SCHEMA_VERSION = 1
EXECUTION_PARAMETERS = frozenset({"workers", "device", "compile", "checkpoint_minutes", "memory_gb"})
"""Parameters that say where and how a stage computes, but do not change its result. A stage continues work that was
begun with other values of them."""
_FULL_BYTES = 64 << 10
"""With less free space than this, any error counts as "the disk is full"."""
_TURN_S = 0.5
"""How long to wait for a process that only looks whether the output is being written, seconds."""
_FINISH_S = 60.0
"""How long to wait for another process that is renaming the same output, seconds."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp[.\w]*")
"""Temporary names that `whole_file` makes."""
_SHAPING = ("distilldsm", "numpy", "scipy", "nibabel", "torch")
"""Packages that shape the pieces of resumable work."""


@contextmanager
def output_directory(
    path: str | os.PathLike[str],
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None = None,
    code: Sequence[str] = (),
    resumable: bool = False,
    kept: Callable[[Path], str] | None = None,
    until_done: Sequence[str] = (),
) -> Iterator[Path]:
    """Yield a work directory beside `path`. It becomes `path` when the block ends without an error.

    The manifest is written at the end: schema version, stage, config, hashes of inputs, code and files, package
    versions, and the entries of `extra`. With `resumable`, an interrupted block leaves its work directory. The next
    call with the same stage, config (EXECUTION_PARAMETERS may differ), inputs, code and packages continues in it.
    With others it starts empty, and a line on stderr says so. Files and folders are on the disk before the rename, so
    a power cut leaves the old output or the new one. A lock stops a second process from writing the same output.

    Args:
        code: files and folders of this package that can change the output.
        kept: returns a message on how much work is done, shown to a person who interrupts the stage.
        until_done: files of the work directory that are needed only to resume. They are deleted after everything else
            is written, and are not part of the output.

    Raises:
        UserError: another process writes the same output, it cannot be written, the disk is full, or an input changed
            while the stage was running.
    """
    from distilldsm.core.interruption import notes_of
    from distilldsm.core.mapping import to_mapping

    path = Path(path)
    work = _work(path)
    with writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, timeout_s=_TURN_S)
    if lock is None:
        raise UserError(
            "another process is writing this output", where=path, hint="wait for it, or stop it, then run again"
        )
    try:
        key = _key(stage, config, inputs, extra, code)
        input_hashes = key["inputs"]
        _prepare(work, sha256_json({**key, "packages": package_versions(_SHAPING)}), resumable)
        try:
            yield work
            _check_unchanged(stage, inputs, input_hashes)
            _drop_unfinished(work)
            hashed = hashed_files(work, names_below(work), synced=True)
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "stage": stage,
                "config": to_mapping(config),
                **key["extra"],
                "inputs": input_hashes,
                "code": key["code"],
                "packages": package_versions(),
                "files": {name: digest for name, (_, digest) in hashed.items() if name not in until_done},
            }
            write_json(work / MANIFEST, manifest)
            sync(work / MANIFEST)
        except UserError:
            raise
        except Exception as error:
            if not _disk_is_full(error, work):
                raise
            raise UserError(
                "no space left on the device",
                where=path,
                seen=str(error),
                hint="free space, then run the same command again",
            ) from error
        _put_in_place(work, path)
        remember(path, {name: entry for name, entry in hashed.items() if name not in until_done})
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not (resumable and kept is None and notes_of(error)):
            error.add_note(f"{stage}: {_kept(work, kept) if resumable else f'{path} is as it was before'}")
        if not resumable:
            shutil.rmtree(work, ignore_errors=True)
            _stamp(work).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _drop_unfinished(work: Path) -> None:
    """Remove temporary files that killed processes left here. They do not belong to the output."""
    for path in work.rglob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _check_unchanged(stage: str, inputs: Mapping[str, str | os.PathLike[str]], hashes: Mapping[str, str]) -> None:
    """A stage opens its inputs one after another. If an input was replaced meanwhile, the output mixes old and new."""
    for name, path in inputs.items():
        if content_hash(path) != hashes[name]:
            raise UserError(
                f"was replaced while {stage} was reading it",
                where=Path(path),
                seen="contents changed since the start",
                rule="inputs stay the same while a stage runs",
                hint="run the same command again, and no stage that writes there at the same time",
            )


def result_config(config: Any) -> dict[str, Any]:
    """A stage's config as a mapping, without EXECUTION_PARAMETERS."""
    from distilldsm.core.mapping import to_mapping

    return {name: value for name, value in to_mapping(config).items() if name not in EXECUTION_PARAMETERS}


def _kept(work: Path, kept: Callable[[Path], str] | None) -> str:
    try:
        return kept(work) if kept else "what is done is kept"
    except Exception:  # an error in the message must not hide the interrupt
        return "what is done is kept"


def is_current(
    path: str | os.PathLike[str],
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None = None,
    code: Sequence[str] = (),
) -> bool:
    """Whether `path` holds, unchanged, the output that `output_directory` would make with the same arguments.

    EXECUTION_PARAMETERS may differ. A file is unchanged if its size, times and inode are, else its SHA-256 decides.
    If a process was killed just before the end, its work directory is complete; it is
    renamed to `path` first.

    Raises:
        UserError: an input is missing, or its manifest is damaged.
    """
    path = Path(path)
    work = _work(path)
    if not ((path / MANIFEST).is_file() or (work / MANIFEST).is_file()):
        return False
    key = _key(stage, config, inputs, extra, code)
    _finish(work, path, key)
    return _made_with(path, key) and current_hashes(path, files_of(path)) == files_of(path)


def _key(
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None,
    code: Sequence[str],
) -> dict[str, Any]:
    """Everything that decides an output."""
    return {
        "stage": stage,
        "config": result_config(config),
        "inputs": {name: content_hash(path) for name, path in inputs.items()},
        "extra": dict(extra or {}),
        "code": code_hash(tuple(code)),
    }


def _made_with(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether the manifest in `path` has this key."""
    made = read_if_whole(path / MANIFEST)
    if not isinstance(made.get("files"), dict) or not isinstance(made.get("config"), dict):
        return False
    made["config"] = result_config(made["config"])
    wanted = {**{name: value for name, value in key.items() if name != "extra"}, **key["extra"]}
    return all(made.get(name) == value for name, value in wanted.items())


def _finish(work: Path, path: Path, key: Mapping[str, Any]) -> None:
    """Rename a complete work directory to the output."""
    if not (work / MANIFEST).is_file():
        return
    lock = _locked(path, timeout_s=_FINISH_S)  # another process of the same training may be at this step too
    if lock is None:
        return
    try:
        files = files_of(work) if _made_with(work, key) else {}
        if files and all((work / n).is_file() and sha256_file(work / n) == digest for n, digest in files.items()):
            _put_in_place(work, path)
    finally:
        lock.release()


def _put_in_place(work: Path, path: Path) -> None:
    """Delete the files that the manifest does not name (they were needed only to resume), then rename.

    A process that is killed in here leaves either the output or a complete work directory, see `is_current`.
    """
    files = files_of(work)
    shutil.rmtree(work / PIECES, ignore_errors=True)
    for file in [file for file in work.rglob("*") if file.is_file()]:
        if file != work / MANIFEST and file.relative_to(work).as_posix() not in files:
            file.unlink()
    for folder in (*(one for one in work.rglob("*") if one.is_dir()), work):
        sync(folder)
    replace_directory(work, path)
    _stamp(work).unlink(missing_ok=True)


def _disk_is_full(error: Exception, work: Path) -> bool:
    """Whether an error comes from a full disk: NumPy, safetensors and OpenVINO each report it differently."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    text = str(error)
    if "No space left" in text or re.search(r"\d requested and \d+ written", text):
        return True
    return shutil.disk_usage(work).free < _FULL_BYTES


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _locked(path: Path, timeout_s: float) -> FileLock | None:
    """The acquired lock of an output; None if another process holds it for longer than the timeout."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return None
    return lock


def is_being_written(path: Path) -> bool | None:
    """Whether a process is writing an output; None if there is no lock that tells it.

    The kernel frees the lock of a process that has ended, also of one in another container.
    """
    if not path.with_name(f".{path.name}.lock").is_file():
        return None
    lock = _locked(path, timeout_s=0)
    if lock is not None:
        lock.release()
    return lock is None


def _stamp(work: Path) -> Path:
    """File with the key of a work directory. It lies beside the directory, as all files inside become output."""
    return work.with_name(f"{work.name}.json")


def _prepare(work: Path, key: str, resumable: bool) -> None:
    stamp = _stamp(work)
    if work.exists():
        same = resumable and read_if_whole(stamp).get("key") == key
        if not same:
            if resumable and stamp.is_file():
                reason = "begun with other parameters, inputs, code or packages"
                print(f"{work}: {reason}; starting again", file=sys.stderr)
            shutil.rmtree(work)
    write_json(stamp, {"key": key})
    sync(stamp)
    work.mkdir(exist_ok=True)
    (work / MANIFEST).unlink(missing_ok=True)  # a process was killed while it finished
