"""Delivers journals to MLflow, in a process of its own beside the one that is tracked.

A process rather than a thread: importing MLflow takes seconds of the interpreter's lock, a hanging connection cannot
be stopped from outside, and records should still be sent when the tracked process has been killed.

    python -m distilldsm.tracking.worker RUN_DIRECTORY --parent PID [--watch] [--system SECONDS]

Its standard input is a pipe held by the tracked process: a line means "finish", its end that the process is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from distilldsm.core.redaction import redact
from distilldsm.tracking.delivery import Delivery, SinkFactory, clean, drain, replay_all
from distilldsm.tracking.journal import JournalWriter, Record, head, read_entries, segments, writer_identity
from distilldsm.tracking.sink import Sink, prepare_environment

POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LAST_ATTEMPTS = 3

logger = logging.getLogger("distilldsm.tracking")


class SystemSampler:
    """Load of the machine and memory of the tracked process and its children, under MLflow's own metric names."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._psutil, self._pid = psutil, pid
        psutil.cpu_percent()  # the first call only sets the starting point
        self._gpu = None
        with contextlib.suppress(Exception):  # no GPU, or no library to ask it
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self._gpu = GPUMonitor()

    def sample(self) -> dict[str, float]:
        """One reading: percent, and megabytes of 10^6 bytes.

        Raises:
            psutil.Error: the tracked process is gone.
        """
        memory = self._psutil.virtual_memory()
        process = self._psutil.Process(self._pid)
        family = process.memory_info().rss
        for child in process.children(recursive=True):
            with contextlib.suppress(self._psutil.Error):
                if child.pid != os.getpid():
                    family += child.memory_info().rss
        values = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_megabytes": family / 1e6,
        }
        if self._gpu is not None:
            with contextlib.suppress(Exception):
                self._gpu.collect_metrics()
                values |= self._gpu.aggregate_metrics()
                self._gpu.clear_metrics()
        return {f"system/{key}": round(float(value), 1) for key, value in values.items()}


class Worker:
    """Watches one run's journal until the tracked process is done or gone."""

    def __init__(self, directory: Path, parent: int, system_s: float = 0, *, sinks: SinkFactory = Sink) -> None:
        self.directory, self.parent, self.system_s = directory, parent, system_s
        self._sinks = functools.lru_cache(maxsize=2)(sinks)  # opening a store takes a while
        self.finish = threading.Event()
        """Set when nothing more will be written."""
        self.orphaned = False
        """The tracked process ended without saying so."""
        self._writer: JournalWriter | None = None

    def listen(self, stream: int) -> None:
        """Wait for the tracked process' last word on the file descriptor `stream`; runs in a thread of its own."""
        try:
            word = os.read(stream, 16)
        except OSError:
            word = b""
        self.orphaned = not word
        self.finish.set()

    def run(self) -> Delivery:
        """Deliver until finished; afterwards only a few attempts are made."""
        sampling = self._start_sampling() if self.system_s > 0 else None
        pause, due, seen, last_attempts, others_done = _FIRST_PAUSE_S, 0.0, -1, 0, False
        while True:
            finishing = self._finishing()
            if finishing:
                if sampling is not None:
                    sampling.join(timeout=5)
                self._last_words()
            size = _size(self.directory)
            if finishing or (size != seen and time.monotonic() >= due):
                result = drain(self.directory, sinks=self._sinks, watched=self.parent)
                if result.error:
                    logger.warning("not delivered: %s", result.error)
                    due, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S)
                elif not result.left:
                    seen, pause = size, _FIRST_PAUSE_S
                    if not others_done:
                        others_done = True
                        replay_all(self.directory.parent, skip=self.directory, sinks=self._sinks)
                if finishing:
                    last_attempts += 1
                    if not result.left or last_attempts >= _LAST_ATTEMPTS:
                        return result
                    time.sleep(POLL_S)
            self.finish.wait(POLL_S)

    def _finishing(self) -> bool:
        if not self.finish.is_set() and os.getppid() != self.parent:
            # A child that the tracked process left behind may hold the pipe open.
            self.orphaned = True
            self.finish.set()
        return self.finish.is_set()

    def _open_writer(self) -> JournalWriter | None:
        opened = head(self.directory)
        if self._writer is None and opened is not None:
            with contextlib.suppress(OSError):
                self._writer = JournalWriter(self.directory)
                self._writer.append("open", **_again(opened))
        return self._writer

    def _start_sampling(self) -> threading.Thread | None:
        try:
            # Here and not in the thread: two threads importing the same packages at once is asking for trouble.
            sampler = SystemSampler(self.parent)
        except Exception as error:
            logger.warning("no system metrics: %s", clean(error))
            return None
        thread = threading.Thread(target=self._sample, args=(sampler,), daemon=True)
        thread.start()
        return thread

    def _sample(self, sampler: SystemSampler) -> None:
        opened = head(self.directory)
        started = time.time() if opened is None else opened["started_ms"] / 1000
        try:
            while not self.finish.wait(self.system_s):
                values = sampler.sample()
                writer = self._open_writer()
                if writer is not None:
                    # Seconds since the first start of the run: they count on across a resumption.
                    writer.append("metrics", values=values, step=int(time.time() - started))
        except Exception as error:
            logger.warning("system metrics end here: %s", clean(error))

    def _last_words(self) -> None:
        """Mark the run as killed where its process vanished, unless another process has taken it up since."""
        if self.orphaned and not _ended_or_resumed(self.directory, self.parent):
            writer = self._open_writer()
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.append("end", status="KILLED")
        self.orphaned = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _size(directory: Path) -> int:
    total = 0
    for segment in segments(directory):
        with contextlib.suppress(FileNotFoundError):  # another process has just delivered and removed it
            total += segment.stat().st_size
    return total


def _again(opened: Record) -> Record:
    return {k: v for k, v in opened.items() if k not in ("op", "time_ms")} | {"role": "system"} | writer_identity()


def _ended_or_resumed(directory: Path, parent: int) -> bool:
    """Whether the training of process `parent` has said how it ended, or is no longer the latest one.

    No segment of it left means that it was closed: an unclosed one is kept as long as its process is watched.
    """
    training = []
    for segment in segments(directory):
        records = [entry.record for entry in read_entries(segment) if entry.record is not None]
        if records and records[0].get("role") == "train":
            training.append((records[0].get("pid"), {record["op"] for record in records}))
    return not training or training[-1][0] != parent or bool({"end", "close"} & training[-1][1])


class _Redacted(logging.Formatter):
    """MLflow and what it calls may quote an address with its password; tracebacks may too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def main(argv: Sequence[str] | None = None, *, stream: int = 0) -> int:
    """Deliver one journal until the process at the other end of `stream` (standard input) is done."""
    parser = argparse.ArgumentParser(prog="distilldsm.tracking.worker", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--system", type=float, default=0.0, help="seconds between two samples of the machine's load")
    args = parser.parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacted("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    prepare_environment()
    worker = Worker(args.directory, args.parent, args.system)
    threading.Thread(target=worker.listen, args=(stream,), daemon=True).start()
    result = worker.run()
    return 1 if result.error else 0


if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # the training has the right of way
    sys.exit(main())
