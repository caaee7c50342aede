"""What every stage shares: outputs that are whole or absent, manifests, hashes, locks."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import UserError
from distilldsm.core.files import FULL_DISK, read_json, replace_directory, sha256_file, sha256_json, write_json, writes

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
EXECUTION_PARAMETERS = frozenset({"workers", "device", "compile", "checkpoint_minutes", "memory_gb"})
"""Parameters of any stage that say where and how it computes, not what: work begun with others goes on."""
_FULL_BYTES = 64 << 10
"""With so little space left, an error counts as one of a full disk."""
_FINISH_S = 60.0
"""How long to wait for another process that puts the same output in its place."""
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
    from distilldsm.core.progress import progress

    tracked = progress(files, total=len(files), title=f"hash {root.name}", unit="file", brief=True)
    return {file.relative_to(root).as_posix(): sha256_file(file) for file in tracked}


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a result, those that are installed."""
    import importlib.metadata

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
    code: Sequence[str] = (),
    resumable: bool = False,
    kept: Callable[[Path], str] | None = None,
    until_done: Sequence[str] = (),
) -> Iterator[Path]:
    """Yield a sibling work directory that becomes `path` when the block ends without an error.

    The manifest (schema version, stage, config, hashes of inputs, code and files, package versions, and what `extra`
    adds) is written at the end. With `resumable`, an interrupted block leaves its work directory, and the next
    call with the same stage, config (EXECUTION_PARAMETERS apart), inputs and code yields it again with what is in it;
    otherwise it starts empty, and a line on stderr says so. A lock keeps a second process from the same output.

    Args:
        code: files and folders of this package that shape the output.
        kept: says of the work directory how much is done, for a person who interrupts it.
        until_done: files of the work directory that only serve to go on with it: they do not become part of the output,
            and are there until all the rest is written.

    Raises:
        UserError: another process writes the same output, it cannot be written, the disk is full, or an input is
            another at the end than it was at the start.
    """
    from distilldsm.core.interruption import notes_of
    from distilldsm.core.mapping import to_mapping

    path = Path(path)
    work = _work(path)
    with writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, timeout_s=0)
    if lock is None:
        raise UserError(
            "another process is writing this output", where=path, hint="wait for it, or stop it, then run again"
        )
    try:
        key = _key(stage, config, inputs, extra, code)
        input_hashes = key["inputs"]
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
                **key["extra"],
                "inputs": input_hashes,
                "code": key["code"],
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
        _put_in_place(work, path)
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
    from distilldsm.core.mapping import to_mapping

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
    code: Sequence[str] = (),
) -> bool:
    """Whether `output_directory`, called with the same arguments, has made what lies in `path`.

    EXECUTION_PARAMETERS may differ. A work directory that is complete, because its process was killed just before the
    end, is put in its place first.

    Raises:
        UserError: an input is missing, or the manifest cannot be read.
    """
    path = Path(path)
    work = _work(path)
    if not ((path / MANIFEST).is_file() or (work / MANIFEST).is_file()):
        return False
    key = _key(stage, config, inputs, extra, code)
    _finish(work, path, key)
    return _made_with(path, key) and all((path / name).is_file() for name in read_json(path / MANIFEST)["files"])


def _key(
    stage: str,
    config: Any,
    inputs: Mapping[str, str | os.PathLike[str]],
    extra: Mapping[str, Any] | None,
    code: Sequence[str],
) -> dict[str, Any]:
    """What decides an output."""
    return {
        "stage": stage,
        "config": result_config(config),
        "inputs": {name: content_hash(path) for name, path in inputs.items()},
        "extra": dict(extra or {}),
        "code": code_hash(tuple(code)),
    }


@cache
def code_hash(paths: tuple[str, ...]) -> str:
    """SHA-256 of files and folders of this package, by their paths below it; bytecode is left out."""
    package = Path(__file__).parents[1]
    files = sorted(file for path in paths for file in (package / path, *(package / path).rglob("*")) if file.is_file())
    return sha256_json(
        {f.relative_to(package).as_posix(): sha256_file(f) for f in files if f.parent.name != "__pycache__"}
    )


def _made_with(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether the manifest in `path` has this key."""
    if not (path / MANIFEST).is_file():
        return False
    made = read_json(path / MANIFEST)
    made["config"] = result_config(made.get("config", {}))
    wanted = {**{name: value for name, value in key.items() if name != "extra"}, **key["extra"]}
    return all(made.get(name) == value for name, value in wanted.items())


def _finish(work: Path, path: Path, key: Mapping[str, Any]) -> None:
    """Put a complete work directory in its place."""
    if not (work / MANIFEST).is_file():
        return
    lock = _locked(path, timeout_s=_FINISH_S)  # who has it is at the same step: a process of the same training
    if lock is None:
        return
    try:
        files = read_json(work / MANIFEST)["files"] if _made_with(work, key) else {}
        if files and all((work / n).is_file() and sha256_file(work / n) == digest for n, digest in files.items()):
            _put_in_place(work, path)
    finally:
        lock.release()


def _put_in_place(work: Path, path: Path) -> None:
    """The end of all work: the manifest is written. What it does not name only served to go on after an interrupt.

    A process that is killed in here leaves either the output or a complete work directory, see `is_current`.
    """
    files = read_json(work / MANIFEST)["files"]
    for file in [file for file in work.rglob("*") if file.is_file()]:
        if file != work / MANIFEST and file.relative_to(work).as_posix() not in files:
            file.unlink()
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
    """The lock of an output, held; None where another process holds it for longer than the timeout."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return None
    return lock


def _stamp(work: Path) -> Path:
    """Says what a work directory is the work of. It lies beside it, for what lies in it becomes the output."""
    return work.with_name(f"{work.name}.json")


def _prepare(work: Path, key: str, resumable: bool) -> None:
    stamp = _stamp(work)
    if work.exists():
        same = resumable and stamp.is_file() and read_json(stamp).get("key") == key
        if not same:
            if resumable and stamp.is_file():
                print(f"{work}: begun with other parameters, inputs or code, starts anew", file=sys.stderr)
            shutil.rmtree(work)
    write_json(stamp, {"key": key})
    work.mkdir(exist_ok=True)
    (work / MANIFEST).unlink(missing_ok=True)  # of an end that was not whole
