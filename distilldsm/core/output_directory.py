"""What every stage shares: outputs that are whole or absent, manifests, hashes, locks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distilldsm.core.errors import UserError
from distilldsm.core.files import FULL_DISK, read_json, replace_directory, sha256_file, sha256_json, write_json, writes
from distilldsm.core.interruption import notes_of
from distilldsm.core.mapping import to_mapping
from distilldsm.core.progress import progress

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
EXECUTION_PARAMETERS = frozenset({"workers", "device", "compile", "checkpoint_minutes", "memory_gb"})
"""Parameters of any stage that say where and how it computes, not what: work begun with others goes on."""
_FULL_BYTES = 64 << 10
"""An error with so little space left is taken for one of the full disk."""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp[.\w]*")
"""Names of `whole_file`."""
_PACKAGES = ("numpy", "scipy", "nibabel", "torch", "onnxruntime", "openvino", "mlflow", "great_expectations")


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hash that names a stage's input: a file's SHA-256, or for a directory that of its manifest's file hashes."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError("is missing", where=path, hint="run the stage that writes it (dvc repro)")
    manifest = path / MANIFEST
    if manifest.is_file():
        return sha256_json(read_json(manifest)["files"])
    return sha256_json(file_hashes(path))


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, by relative POSIX path, without the manifest."""
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and file != root / MANIFEST]
    tracked = progress(files, total=len(files), title=f"hash {root.name}", unit="file", brief=True)
    return {file.relative_to(root).as_posix(): sha256_file(file) for file in tracked}


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a result, those that are installed."""
    found = {}
    for name in ("distilldsm", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def output_directory(
    path: str | os.PathLike[str],
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None = None,
    resumable: bool = False,
    kept: Callable[[Path], str] | None = None,
    until_done: Sequence[str] = (),
) -> Iterator[Path]:
    """Yield a sibling work directory that becomes `path` when the block ends without an error.

    The manifest (schema version, stage, config, input hashes, file hashes, package versions, and what `extra`
    adds) is written at the end. With `resumable`, an interrupted block leaves its work directory, and the next
    call with the same stage, config (EXECUTION_PARAMETERS apart) and inputs yields it again with what is in it;
    otherwise it starts empty, and a line on stderr says so. A lock keeps a second process from the same output.

    Args:
        kept: says of the work directory how much is done, for a person who interrupts it.
        until_done: files of the work directory that only serve to go on with it: they do not become part of the output,
            and are there until all the rest is written.

    Raises:
        UserError: another process writes the same output, it cannot be written, the disk is full, or an input is
            another at the end than it was at the start.
    """
    path = Path(path)
    work = path.with_name(f".{path.name}.partial")
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            raise UserError(
                "another process is writing this output", where=path, hint="wait for it, or stop it, then run again"
            ) from None
    try:
        input_hashes = {name: content_hash(p) for name, p in inputs.items()}
        key = {"stage": stage, "config": result_config(config), "inputs": input_hashes, "extra": dict(extra or {})}
        _prepare(work, sha256_json(key), resumable)
        try:
            yield work
            _check_unchanged(stage, inputs, input_hashes)
            _drop_unfinished(work)
            files = file_hashes(work)
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "stage": stage,
                "config": to_mapping(config),
                **(extra or {}),
                "inputs": input_hashes,
                "packages": package_versions(),
                "files": {name: digest for name, digest in files.items() if name not in until_done},
            }
            write_json(work / MANIFEST, manifest)
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
        for name in until_done:
            (work / name).unlink(missing_ok=True)
        replace_directory(work, path)
        _stamp(work).unlink()
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
    """Remove what processes that were killed while they wrote here have left: it is part of no output."""
    for path in work.rglob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _check_unchanged(stage: str, inputs: Mapping[str, str | os.PathLike[str]], hashes: Mapping[str, str]) -> None:
    """A stage opens its inputs as it goes: one that was replaced meanwhile makes a mixture of both."""
    for name, path in inputs.items():
        if content_hash(path) != hashes[name]:
            raise UserError(
                f"was replaced while {stage} was reading it",
                where=Path(path),
                seen="other contents than at the start",
                rule="one state of the data for one output",
                hint="run the same command again, and no stage that writes there beside it",
            )


def result_config(config: Any) -> dict[str, Any]:
    """A stage's config as a mapping, without EXECUTION_PARAMETERS."""
    return {name: value for name, value in to_mapping(config).items() if name not in EXECUTION_PARAMETERS}


def _kept(work: Path, kept: Callable[[Path], str] | None) -> str:
    try:
        return kept(work) if kept else "what is done is kept"
    except Exception:  # whatever the count: the interrupt is what counts
        return "what is done is kept"


def is_current(
    path: str | os.PathLike[str],
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None = None,
) -> bool:
    """Whether `output_directory`, called with the same arguments, has made what lies in `path`.

    EXECUTION_PARAMETERS may differ.

    Raises:
        UserError: an input is missing, or the manifest cannot be read.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        return False
    made = read_json(path / MANIFEST)
    made["config"] = result_config(made.get("config", {}))
    wanted = {
        "stage": stage,
        "config": result_config(config),
        "inputs": {name: content_hash(p) for name, p in inputs.items()},
        **(extra or {}),
    }
    same = all(made.get(name) == value for name, value in wanted.items())
    return same and all((path / name).is_file() for name in made["files"])


def _disk_is_full(error: Exception, work: Path) -> bool:
    """Whether an error comes from a full disk: NumPy, safetensors and OpenVINO each tell it in another way."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    text = str(error)
    if "No space left" in text or re.search(r"\d requested and \d+ written", text):
        return True
    return shutil.disk_usage(work).free < _FULL_BYTES


def _stamp(work: Path) -> Path:
    """Says what a work directory is the work of. It lies beside it, for what lies in it becomes the output."""
    return work.with_name(f"{work.name}.json")


def _prepare(work: Path, key: str, resumable: bool) -> None:
    stamp = _stamp(work)
    if work.exists():
        same = resumable and stamp.is_file() and read_json(stamp).get("key") == key
        if not same:
            if resumable and stamp.is_file():
                print(f"{work}: begun with other parameters or inputs, starts anew", file=sys.stderr)
            shutil.rmtree(work)
    write_json(stamp, {"key": key})
    work.mkdir(exist_ok=True)
