"""The process that publishes outputs: finished ones, or the growing output of a running training.

It is a process, not a thread: importing MLflow would block the stage's interpreter for seconds, and a hanging
connection in a thread cannot be stopped. The process ends with the stage that started it.

    python -m distilldsm.tracking.follower DIR... --parent PID [--follow] [--system SECONDS]

Its standard input is a pipe from the stage. A line means "finish"; the end of the pipe means that the stage has died.
It prints the `Outcome` of each attempt, one JSON object per line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distilldsm.core.mapping import to_mapping
from distilldsm.tracking.publish import Outcome, Publisher, known_outputs, publish_all
from distilldsm.tracking.record import FILE, SYSTEM, final_path, load
from distilldsm.tracking.system import SystemSampler, sample_until

POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LAST_ATTEMPTS = 2
_ORPHAN_S = 20.0
"""If the stage was killed, the process has this long to send the rest."""


class Follower:
    """Publishes one growing output until its stage has finished or died."""

    def __init__(self, directory: Path, parent: int, report: Callable[[Outcome], None], *, system_s: float = 0) -> None:
        self.directory, self.parent, self.report, self.system_s = directory, parent, report, system_s
        self.publisher = Publisher(directory)
        self.finish = threading.Event()
        """Set when the stage will write nothing more."""
        self.orphaned = False
        """The stage ended without sending "finish"."""

    def listen(self, stream: int) -> None:
        """Wait for "finish" from the stage on the file descriptor `stream`. Runs in its own thread."""
        try:
            message = os.read(stream, 16)
        except OSError:
            message = b""
        self.orphaned = not message
        self.finish.set()

    def run(self) -> None:
        """Publish each change of the output. When the stage has finished, make only a few last attempts."""
        sampling = self._start_sampling()
        pause, due, seen, last_attempts, others_done = _FIRST_PAUSE_S, 0.0, None, 0, False
        while True:
            finishing = self._finishing()
            if finishing and sampling is not None:
                sampling.join(timeout=5)
            state = _state(self.directory)
            if finishing or (state != seen and time.monotonic() >= due):
                outcome = self.publisher.publish(is_abandoned=self.orphaned)
                self.report(outcome)
                if outcome.problems:
                    due, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S)
                else:
                    seen, pause = state, _FIRST_PAUSE_S
                last_attempts += finishing
                if not (outcome.problems or others_done):
                    others_done = True
                    self._publish_others()
                if finishing and (not outcome.problems or last_attempts >= _LAST_ATTEMPTS):
                    return
            self.finish.wait(POLL_S)

    def _publish_others(self) -> None:
        """Publish other outputs until the stage finishes. The first is the one that this output will replace."""
        others = {one.resolve(): one for one in (final_path(self.directory), *known_outputs())}
        others.pop(self.directory.resolve(), None)
        for outcome in publish_all(others.values()):
            self.report(outcome)
            if self._finishing():
                return

    def _finishing(self) -> bool:
        if not self.finish.is_set() and os.getppid() != self.parent:
            # The pipe may still be open: a child process of the stage can hold it.
            self.orphaned = True
            self.finish.set()
        if self.orphaned:
            _exit_after(_ORPHAN_S)
        return self.finish.is_set()

    def _start_sampling(self) -> threading.Thread | None:
        record = load(self.directory)
        if self.system_s <= 0 or record is None or record.run is None:
            return None
        started_ms = record.run.started_ms
        try:
            # Not in the thread: two threads that import the same packages at once can fail.
            sampler = SystemSampler(self.parent)
        except Exception:
            return None

        def sample() -> None:
            with contextlib.suppress(Exception):  # publishing continues without samples
                sample_until(self.finish, self.directory, sampler, self.system_s, started_ms)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        return thread


def _state(directory: Path) -> tuple[tuple[int, int] | None, ...]:
    """Size and modification time of each growing file; None for a missing file."""
    state: list[tuple[int, int] | None] = []
    for name in (FILE, "history.json", SYSTEM):
        try:
            status = (directory / name).stat()
            state.append((status.st_size, status.st_mtime_ns))
        except OSError:
            state.append(None)
    return tuple(state)


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _print(outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # the stage has died
        print(json.dumps(to_mapping(outcome)), flush=True)


def main(argv: Sequence[str] | None = None, *, stream: int = 0) -> int:
    """Publish until the process at the other end of `stream` (standard input) has finished."""
    parser = argparse.ArgumentParser(prog="distilldsm.tracking.follower", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--follow", action="store_true", help="the first directory grows")
    parser.add_argument("--system", type=float, default=0.0, help="seconds between two samples of the machine's load")
    args = parser.parse_args(argv)
    logging.disable()  # MLflow's own messages; the outcomes hold what matters
    if args.follow:
        follower = Follower(args.directories[0], args.parent, _print, system_s=args.system)
        threading.Thread(target=follower.listen, args=(stream,), daemon=True).start()
        follower.run()
        return 0
    threading.Thread(target=_end_with, args=(stream,), daemon=True).start()
    others = [one for one in known_outputs() if one.resolve() not in {path.resolve() for path in args.directories}]
    for outcome in publish_all([*args.directories, *others]):
        _print(outcome)
    return 0


def _end_with(stream: int) -> None:
    """Exit when the process at the other end of the pipe ends."""
    os.read(stream, 16)
    _exit_after(0)


if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)  # the training has priority
    sys.exit(main())
