"""An append-only journal of tracking records on the local disk, and what of it has been delivered.

One directory per tracked run:

    <stamp>-<pid>.jsonl   a segment: the records of one writing process, one JSON object a line
    spool/                copies of the files that records refer to, until they are delivered
    state.json            how far each segment has been delivered, and the run id the server gave
    rejected.jsonl        records the server will never take, with its reason
    worker.log            what the sending process had to say

Every writer owns its segment, so a torn last line (the process was killed while writing) is never followed by good
ones. Lines reach the operating system one by one: they survive the death of the process, not that of the machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distilldsm.core.files import write_json

STATE = "state.json"
SPOOL = "spool"
REJECTED = "rejected.jsonl"
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a segment."""

    record: Record | None
    """None where the line is no JSON object."""
    end: int
    """Offset of the byte after the line."""


@dataclass(kw_only=True)
class State:
    """What is known about the delivery of one run's journal."""

    tracking_uri: str | None = None
    """The store that `run_id` and `acknowledged` speak of; never with a password."""
    run_id: str | None = None
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Segment name to the offset, in bytes, up to which its records are delivered."""
    rejected: int = 0
    last_error: str | None = None

    @classmethod
    def load(cls, directory: Path) -> State:
        """The stored state; a fresh one where there is none or it cannot be read (records are then sent again)."""
        try:
            stored = json.loads((directory / STATE).read_text(encoding="utf-8"))
            return cls(
                tracking_uri=stored["tracking_uri"],
                run_id=stored["run_id"],
                acknowledged={str(k): int(v) for k, v in stored["acknowledged"].items()},
                rejected=int(stored["rejected"]),
                last_error=stored["last_error"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def save(self, directory: Path) -> None:
        write_json(directory / STATE, {"schema_version": 1, **vars(self)})


class JournalWriter:
    """Appends records to a segment of its own; safe to use from several threads.

    Raises:
        OSError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._lock = threading.Lock()
        self._torn = False
        self._spooled = 0
        while True:
            self.segment = f"{time.time_ns():020d}-{os.getpid()}.jsonl"
            try:
                self._file = os.open(
                    directory / self.segment, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666
                )
                break
            except FileExistsError:  # two writers of one process within the clock's resolution
                continue

    def append(self, op: str, **values: object) -> None:
        """Write one record, stamped with the time (ms since 1970).

        Raises:
            OSError: it could not be written (no space left); later records are not harmed.
        """
        record = {"op": op, "time_ms": time.time_ns() // 1_000_000, **values}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            data = b"\n" + line if self._torn else line
            self._torn = True
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError("the journal's disk took only part of a record")
            self._torn = False

    def spool(self, source: Path | None = None, *, name: str | None = None) -> tuple[Path, str]:
        """Copy a file or directory into the spool, for what happens to the original later must not matter.

        Without `source`, only the place for a file `name` is made.

        Returns:
            the path in the spool, and the same relative to the journal's directory (for the record).
        """
        with self._lock:
            self._spooled += 1
            number = self._spooled
        folder = self.directory / SPOOL / f"{Path(self.segment).stem}-{number:06d}"
        folder.mkdir(parents=True)
        target = folder / (name or (source.name if source else "file"))
        try:
            if source is not None and source.is_dir():
                shutil.copytree(source, target)
            elif source is not None:
                shutil.copyfile(source, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return target, target.relative_to(self.directory).as_posix()

    def close(self) -> None:
        """Say that nothing follows, and release the file."""
        with contextlib.suppress(OSError):
            self.append("close")
        os.close(self._file)


def writer_identity() -> dict[str, object]:
    """Who writes: for the first record of a segment, so that others can tell whether the writer still lives."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def encode_number(value: float) -> float | str:
    """A float for strict JSON: NaN and the infinities become text, which `float` reads back."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def segments(directory: Path) -> list[Path]:
    """The segments of a journal, oldest first."""
    return sorted(path for path in directory.glob("*-*.jsonl") if path.name != REJECTED)


def read_entries(segment: Path, offset: int = 0) -> Iterator[Entry]:
    """The whole lines of a segment from byte `offset` on; a last line without its end is left for later."""
    with open(segment, "rb") as stream:
        stream.seek(offset)
        for line in stream:
            offset += len(line)
            if not line.endswith(b"\n"):
                return
            if line.isspace():  # what a writer puts after a line that failed
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # of JSON and of UTF-8
                record = None
            yield Entry(record=record if isinstance(record, dict) and "op" in record else None, end=offset)


def head(directory: Path) -> Record | None:
    """The first `open` record of a journal: which run it is about."""
    for segment in segments(directory):
        for entry in read_entries(segment):
            if entry.record is not None and entry.record["op"] == "open":
                return entry.record
    return None


def pending(directory: Path) -> int:
    """How many records have not been delivered yet."""
    acknowledged = State.load(directory).acknowledged
    count = 0
    for segment in segments(directory):
        with contextlib.suppress(FileNotFoundError):  # another process has just delivered and removed it
            count += sum(
                entry.record is None or entry.record["op"] not in ("open", "close")
                for entry in read_entries(segment, acknowledged.get(segment.name, 0))
            )
    return count


def spooled(directory: Path, record: Record) -> Path:
    """The copy in the spool that a record speaks of; whatever a journal says, no other file is sent or deleted.

    Raises:
        ValueError: the record names a place outside the spool, or the spool itself.
    """
    root = (directory / SPOOL).resolve()
    path = (directory / str(record["path"])).resolve()
    if len(path.parts) < len(root.parts) + 2 or not path.is_relative_to(root):
        raise ValueError(f"it names a file outside the spool: {record['path']}")
    return path


def reject(directory: Path, record: Mapping[str, Any] | None, reason: str) -> None:
    """Keep a record that cannot be delivered where a person can find it."""
    with open(directory / REJECTED, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"reason": reason, "record": record}) + "\n")


def remove_if_delivered(segment: Path, state: State, *, watched: int | None = None) -> None:
    """Delete a segment that is wholly delivered and whose writer is done, or dead and not the process `watched`."""
    done = False
    first: Record | None = None
    for entry in read_entries(segment):
        first = first or entry.record
        done = entry.record is not None and entry.record["op"] == "close"
        if entry.end > state.acknowledged.get(segment.name, 0):
            return
    if done or (first is not None and first.get("pid") != watched and _is_dead(first)):
        segment.unlink(missing_ok=True)
        state.acknowledged.pop(segment.name, None)
        with contextlib.suppress(OSError):
            (segment.parent / SPOOL).rmdir()  # succeeds only when empty


def _is_dead(opened: Record) -> bool:
    if opened.get("host") != socket.gethostname() or not isinstance(opened.get("pid"), int):
        return False
    try:
        os.kill(opened["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def delivery_lock(directory: Path, timeout_s: float = 0) -> Iterator[bool]:
    """Yield whether this process alone may deliver the journal now; ends with the process that holds it."""
    lock = FileLock(directory / ".delivery.lock")
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
