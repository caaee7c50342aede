"""Publishes outputs in a process of its own: finished ones, or one that grows while a training runs.

A process rather than a thread: importing MLflow takes seconds of the interpreter's lock, and a hanging connection
cannot be stopped from outside. It ends with the stage that started it.

    python -m distilldsm.tracking.follower DIR... --parent PID [--follow] [--system SECONDS]

Its standard input is a pipe held by the stage: a line means "finish", its end that the stage is gone. On standard
output it says what each attempt came to, a JSON object a line.
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
from distilldsm.tracking.record import FILE, SYSTEM, load
from distilldsm.tracking.system import SystemSampler, sample_until

POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LAST_ATTEMPTS = 2
_ORPHAN_S = 20.0
"""How long it outlives a stage that was killed, to send what there is."""


class Follower:
    """Publishes one growing output until its stage is done or gone."""

    def __init__(self, directory: Path, parent: int, say: Callable[[Outcome], None], *, system_s: float = 0) -> None:
        self.directory, self.parent, self.say, self.system_s = directory, parent, say, system_s
        self.publisher = Publisher(directory)
        self.finish = threading.Event()
        """Set when nothing more will be written."""
        self.orphaned = False
        """The stage ended without saying so."""

    def listen(self, stream: int) -> None:
        """Wait for the stage's last word on the file descriptor `stream`; runs in a thread of its own."""
        try:
            word = os.read(stream, 16)
        except OSError:
            word = b""
        self.orphaned = not word
        self.finish.set()

    def run(self) -> None:
        """Publish whatever has come; after the finish only a few attempts are made."""
        sampling = self._start_sampling()
        pause, due, seen, last_attempts, others_done = _FIRST_PAUSE_S, 0.0, None, 0, False
        while True:
            finishing = self._finishing()
            if finishing and sampling is not None:
                sampling.join(timeout=5)
            state = _state(self.directory)
            if finishing or (state != seen and time.monotonic() >= due):
                outcome = self.publisher.publish(is_abandoned=self.orphaned)
                self.say(outcome)
                if outcome.problems:
                    due, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S)
                else:
                    seen, pause = state, _FIRST_PAUSE_S
                last_attempts += finishing
                if finishing and (not outcome.problems or last_attempts >= _LAST_ATTEMPTS):
                    return
                if not (outcome.problems or others_done or finishing):
                    others_done = True
                    self._publish_others()
            self.finish.wait(POLL_S)

    def _publish_others(self) -> None:
        others = [one for one in known_outputs() if one.resolve() != self.directory.resolve()]
        for outcome in publish_all(others):
            self.say(outcome)
            if self._finishing():
                return

    def _finishing(self) -> bool:
        if not self.finish.is_set() and os.getppid() != self.parent:
            # A child that the stage left behind may hold the pipe open.
            self.orphaned = True
            self.finish.set()
        if self.orphaned:
            _leave_in(_ORPHAN_S)
        return self.finish.is_set()

    def _start_sampling(self) -> threading.Thread | None:
        record = load(self.directory)
        if self.system_s <= 0 or record is None or record.run is None:
            return None
        started_ms = record.run.started_ms
        try:
            # Here and not in the thread: two threads importing the same packages at once is asking for trouble.
            sampler = SystemSampler(self.parent)
        except Exception:
            return None

        def sample() -> None:
            with contextlib.suppress(Exception):  # the rest goes on
                sample_until(self.finish, self.directory, sampler, self.system_s, started_ms)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        return thread


def _state(directory: Path) -> tuple[tuple[int, int] | None, ...]:
    """What tells whether one of the growing files has changed."""
    found: list[tuple[int, int] | None] = []
    for name in (FILE, "history.json", SYSTEM):
        try:
            status = (directory / name).stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def _leave_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _say(outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # the stage is gone
        print(json.dumps(to_mapping(outcome)), flush=True)


def main(argv: Sequence[str] | None = None, *, stream: int = 0) -> int:
    """Publish, until the process at the other end of `stream` (standard input) is done."""
    parser = argparse.ArgumentParser(prog="distilldsm.tracking.follower", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--follow", action="store_true", help="the first directory grows")
    parser.add_argument("--system", type=float, default=0.0, help="seconds between two samples of the machine's load")
    args = parser.parse_args(argv)
    logging.disable()  # MLflow's own words: what matters is in the outcomes
    if args.follow:
        follower = Follower(args.directories[0], args.parent, _say, system_s=args.system)
        threading.Thread(target=follower.listen, args=(stream,), daemon=True).start()
        follower.run()
        return 0
    threading.Thread(target=_end_with, args=(stream,), daemon=True).start()
    others = [one for one in known_outputs() if one.resolve() not in {path.resolve() for path in args.directories}]
    for outcome in publish_all([*args.directories, *others]):
        _say(outcome)
    return 0


def _end_with(stream: int) -> None:
    os.read(stream, 16)
    _leave_in(0)


if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)  # the training has the right of way
    sys.exit(main())
