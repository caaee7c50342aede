"""Brings journals to a store: in order, once, one process at a time, and as often as it takes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from distilldsm.core import redaction
from distilldsm.tracking.denial import DeniedError
from distilldsm.tracking.journal import (
    Entry,
    Record,
    State,
    delivery_lock,
    head,
    pending,
    read_entries,
    reject,
    remove_if_delivered,
    segments,
    spooled,
)
from distilldsm.tracking.sink import RefusedError, Sink

_FAILURES_BEFORE_REJECTION = 3
_METRIC_RECORDS_PER_GROUP = 200

logger = logging.getLogger("distilldsm.tracking")
SinkFactory = Callable[[str], Sink]


def redact(uri: str) -> str:
    """The address without what may be secret: user, password, query."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri.partition("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def live_uri(recorded: str) -> str:
    """The address to use for a recorded one: the environment's where it is the same but for the secrets."""
    current = os.environ.get("MLFLOW_TRACKING_URI", "")
    return current if current and redact(current) == recorded else recorded


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What one attempt to deliver a journal came to."""

    sent: int = 0
    left: int = 0
    rejected: int = 0
    error: str | None = None
    """Why records are left; None where none are, or where another process is at it."""


def drain(
    directory: Path,
    *,
    tracking_uri: str | None = None,
    sinks: SinkFactory = Sink,
    watched: int | None = None,
) -> Delivery:
    """Deliver what is pending in one run's journal, in order; stop at the first failure. Raises nothing of MLflow's.

    Args:
        tracking_uri: a store other than the one the journal was written for; it gets what is still in the journal.
        watched: process whose segments are kept although it is dead, until it is known how it ended.
    """
    with delivery_lock(directory) as mine:
        opened = head(directory)
        if not mine or opened is None:
            return Delivery(left=0 if opened is None else pending(directory))
        state = State.load(directory)
        state.last_error = None  # that of an earlier pass must not pass for this one's
        uri = tracking_uri or live_uri(opened["tracking_uri"])
        if state.tracking_uri != redact(uri):
            state = State(tracking_uri=redact(uri))
        run = _Drain(directory, state, sinks, uri)
        error = None
        try:
            for segment in segments(directory):
                run.deliver(segment)
                remove_if_delivered(segment, state, watched=watched)
        except Exception as failure:  # whatever it is, the record stays and tracking never stops the work
            error = clean(failure)
        state.last_error = error
        state.save(directory)
        return Delivery(sent=run.sent, left=pending(directory), rejected=run.rejected, error=error)


class _Drain:
    """One pass over a journal by the holder of its lock."""

    def __init__(self, directory: Path, state: State, sinks: SinkFactory, uri: str) -> None:
        self.directory, self.state, self.sent, self.rejected = directory, state, 0, 0
        self._sinks, self._uri = sinks, uri
        self._sink: Sink | None = None
        self._opened: Record | None = None

    def deliver(self, segment: Path) -> None:
        """Send a segment's pending records."""
        acknowledged = self.state.acknowledged.get(segment.name, 0)
        opening = next((e.record for e in read_entries(segment) if e.record and e.record["op"] == "open"), None)
        for group in _groups(read_entries(segment, acknowledged)):
            records = [entry.record for entry in group if entry.record is not None]
            if not records:
                self._reject(None, "the line is no record")
            elif opening is None:
                for record in records:
                    self._reject(record, "the segment does not say which run it is about")
            elif records[0]["op"] == "close":
                pass
            else:
                self._send(records, opening, f"{segment.stem}:{group[-1].end}")
            self.state.acknowledged[segment.name] = group[-1].end
            self.state.save(self.directory)
            for record in records:
                if "path" in record:
                    with contextlib.suppress(ValueError):  # what does not lie in the spool is not ours to delete
                        shutil.rmtree(spooled(self.directory, record).parent, ignore_errors=True)

    def _send(self, records: list[Record], opening: Record, identity: str) -> None:
        failures = 0
        while True:
            try:
                sink = self._open(opening, is_opening=records[0]["op"] == "open")
                if records[0]["op"] != "open":
                    sink.apply(records, self.directory, identity)
                    self.sent += len(records)
                return
            except DeniedError:
                raise  # the record is sound: it waits for another password, or for the right to write
            except RefusedError as error:
                if self._sink is None or not self._sink.reachable():
                    raise  # it was not the store that answered, but something before it
                if len(records) == 1:
                    self._reject(records[0], clean(error))
                else:  # one bad value must not take its neighbours along
                    for record in records:
                        self._send([record], opening, identity)
                return
            except Exception as error:
                failures += 1
                if self._sink is None or records[0]["op"] == "open" or not self._sink.reachable():
                    raise
                if failures >= _FAILURES_BEFORE_REJECTION:  # the store answers, but breaks on this record
                    self._reject(records[0], clean(error))
                    for record in records[1:]:
                        self._send([record], opening, identity)
                    return

    def _open(self, opening: Record, *, is_opening: bool) -> Sink:
        if self._sink is None:
            self._sink = self._sinks(self._uri)
        if self._opened != opening:
            # Records of a segment that was opened in an earlier pass only need the run, not another start of it.
            record = opening if is_opening else {**opening, "role": "again"}
            self.state.run_id = self._sink.open_run(record, self.state.run_id)
            self._opened = opening
            self.state.save(self.directory)
        return self._sink

    def _reject(self, record: Record | None, reason: str) -> None:
        self.rejected += 1
        self.state.rejected += 1
        logger.warning("a record was refused: %s", reason)
        reject(self.directory, record, reason)


def _groups(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Entries one by one, but neighbouring metrics together: one request for many."""
    group: list[Entry] = []
    for entry in entries:
        is_metrics = entry.record is not None and entry.record["op"] == "metrics"
        if group and (not is_metrics or len(group) >= _METRIC_RECORDS_PER_GROUP):
            yield group
            group = []
        if is_metrics:
            group.append(entry)
        else:
            yield [entry]
    if group:
        yield group


def clean(error: BaseException) -> str:
    """An error's text for state and log: one line, no passwords, not endless."""
    kind = "" if isinstance(error, DeniedError) else f"{type(error).__name__}: "
    return redaction.redact(" ".join(f"{kind}{error}".split()))[:600]


def replay_all(
    root: Path, *, tracking_uri: str | None = None, skip: Path | None = None, sinks: SinkFactory = Sink
) -> Delivery:
    """Deliver what is pending in every journal below `root`; a store that fails once is not asked again."""
    sent = left = rejected = 0
    errors: dict[str, str] = {}
    for directory in sorted(path for path in root.glob("*") if path.is_dir() and path != skip):
        opened = head(directory)
        if opened is None:
            continue
        uri = tracking_uri or str(opened["tracking_uri"])
        if uri in errors:
            result = Delivery(left=pending(directory))
        else:
            result = drain(directory, tracking_uri=tracking_uri, sinks=sinks)
        if result.error:
            errors[uri] = result.error
        sent, left, rejected = sent + result.sent, left + result.left, rejected + result.rejected
    return Delivery(sent=sent, left=left, rejected=rejected, error=next(iter(errors.values()), None))
