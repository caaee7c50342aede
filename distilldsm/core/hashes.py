"""Hashes of inputs and outputs: of files, of directories, of this package's code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json, sha256_file, sha256_json, sync, write_json

MANIFEST = "manifest.json"
PIECES = ".pieces"
"""Folder of a work directory with the SHA-256 of the files of each finished piece. It is not part of the output."""
State = list[int]
"""Size, modification time, change time (ns) and inode of a file: equal values mean an unchanged file."""
_THREADS = 16
_PACKAGES = ("numpy", "scipy", "nibabel", "torch", "onnxruntime", "openvino", "mlflow", "great_expectations")


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hash of a stage's input: the SHA-256 of a file; for a directory, the hash of its files' hashes.

    Of a stage's output only the files count that its manifest names.

    Raises:
        UserError: the input is missing, or its manifest is damaged.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError("is missing", where=path, hint="run the stage that writes it (dvc repro)")
    if (path / MANIFEST).is_file():
        return sha256_json(current_hashes(path, files_of(path)))
    return sha256_json(file_hashes(path))


def file_hashes(root: Path) -> dict[str, str]:
    """Relative POSIX path to SHA-256 of every file below `root` but the manifest."""
    return {name: digest for name, (_, digest) in hashed_files(root, names_below(root)).items()}


def names_below(root: Path) -> list[str]:
    """Files below `root`, as relative POSIX paths, but the manifest and what belongs to pieces."""
    files = (file.relative_to(root) for file in sorted(root.rglob("*")) if file.is_file())
    return [file.as_posix() for file in files if file != Path(MANIFEST) and file.parts[0] != PIECES]


def state_of(path: Path) -> State | None:
    """The state of a file or folder; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def hashed_files(root: Path, names: Sequence[str], *, synced: bool = False) -> dict[str, tuple[State | None, str]]:
    """State and SHA-256 of files. The state is None if the file changed meanwhile.

    Args:
        synced: also wait until the disk holds each file. Threads wait together: many small files cost one write.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and `--help` imports this module

    from distilldsm.core.progress import progress

    def one(name: str) -> tuple[State | None, str]:
        before, digest = state_of(root / name), sha256_file(root / name)
        if synced:
            sync(root / name)
        return (before if before == state_of(root / name) else None), digest

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(one, names)
        title = f"hash {root.name}"
        return dict(zip(names, progress(found, total=len(names), title=title, unit="file", brief=True), strict=True))


def _record(root: Path) -> Path:
    """File with state and SHA-256 of each file of an output. It lies beside the output, which DVC hashes."""
    return root.with_name(f".{root.name}.hashes.json")


def current_hashes(root: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of an output; missing ones are left out. A file is read only if its state is another one."""
    known = read_if_whole(_record(root))
    states = {name: state for name in names if (state := state_of(root / name)) is not None}
    new = [name for name, state in states.items() if known.get(name, [None])[0] != state]
    hashed = hashed_files(root, new)
    if hashed:
        remember(root, {**{name: known[name] for name in states if name in known}, **hashed})
    return {name: hashed[name][1] if name in hashed else known[name][1] for name in states}


def remember(root: Path, hashed: Mapping[str, Sequence[Any]]) -> None:
    with suppress(OSError, UserError):  # a folder that cannot be written: the files are read again next time
        write_json(_record(root), {name: entry for name, entry in hashed.items() if entry[0] is not None})


def keep(path: Path, *, noted: bool = True) -> None:
    """Wait until the disk holds a file that later runs use again.

    Args:
        noted: note its SHA-256 beside it, because nothing else tells whether it is damaged.
    """
    sync(path)
    sync(path.parent)
    if noted:
        remember(path, {path.name: [state_of(path), sha256_file(path)]})


def is_as_kept(path: Path) -> bool:
    """Whether a file is there and as `keep` saw it. A file that `keep` has not seen counts as unchanged."""
    if not path.is_file():
        return False
    known = read_if_whole(_record(path)).get(path.name)
    return known is None or known[0] == state_of(path) or known[1] == sha256_file(path)


def read_if_whole(path: Path) -> dict[str, Any]:
    """A JSON mapping that a power cut may have damaged; empty if it is missing or unreadable."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def files_of(directory: Path) -> dict[str, str]:
    """The files that a manifest names.

    Raises:
        UserError: the manifest is damaged.
    """
    found = read_json(directory / MANIFEST)
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        hint = "run the stage that writes it (dvc repro)"
        raise UserError("is not a manifest", where=directory / MANIFEST, hint=hint)
    return found["files"]


def is_finished(work: Path, piece: str) -> bool:
    """Whether a piece of resumable work was finished, and its files are still as they were then."""
    files = read_if_whole(work / PIECES / f"{piece}.json")
    return bool(files) and all((work / name).is_file() and sha256_file(work / name) == files[name] for name in files)


def finish(work: Path, piece: str, *files: Path) -> None:
    """Note that a piece of resumable work is finished. `files` in `work` belong to it."""
    record = work / PIECES / f"{piece}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {file.relative_to(work).as_posix(): sha256_file(file) for file in files})


def package_versions(names: Sequence[str] = ("distilldsm", *_PACKAGES)) -> dict[str, str]:
    """Versions of the installed packages that can change a result."""
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_hash(paths: tuple[str, ...]) -> str:
    """SHA-256 of files and folders of this package, with paths relative to it. Bytecode is left out."""
    package = Path(__file__).parents[1]
    files = sorted(file for path in paths for file in (package / path, *(package / path).rglob("*")) if file.is_file())
    return sha256_json(
        {f.relative_to(package).as_posix(): sha256_file(f) for f in files if f.parent.name != "__pycache__"}
    )
