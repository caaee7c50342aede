"""Starts and ends the process that sends the records (`worker`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from distilldsm.tracking.journal import STATE, State

SYSTEM_METRICS_S = 10.0
_GLANCE_S = 0.5


def start_worker(directory: Path, uri: str, *, with_system: bool) -> subprocess.Popen[bytes]:
    """Start it; what it has to say goes to `worker.log` in the journal's directory."""
    interval = 0.0
    if with_system and os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0"):
        interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SYSTEM_METRICS_S)
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    module = "distilldsm.tracking.worker"
    with open(directory / "worker.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(directory), "--parent", str(os.getpid()), "--system", str(interval)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard must not take the last records along
        )


def stop_worker(worker: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Tell it that nothing follows, and wait for it; after `timeout_s` seconds it is killed."""
    with contextlib.suppress(OSError):
        if worker.stdin is not None:
            # A word, not only the end of the pipe: forked children may hold a copy of it open.
            worker.stdin.write(b"finish\n")
            worker.stdin.flush()
            worker.stdin.close()
    try:
        worker.wait(timeout_s)
    except subprocess.TimeoutExpired:
        worker.kill()  # what it was about to send is still in the journal
        worker.wait()


def report_first_attempt(
    directory: Path, worker: subprocess.Popen[bytes], tell: Callable[[str], None]
) -> threading.Event:
    """Call `tell` with the error if the first attempt to send fails, in a thread that ends with that attempt.

    A wrong password is then known at the start of a training, not at its end.

    Returns:
        An event that ends the waiting.
    """
    enough = threading.Event()
    before = _stamp(directory)  # of a run that goes on

    def wait() -> None:
        while not enough.wait(_GLANCE_S):
            gone = worker.poll() is not None
            if _stamp(directory) != before:
                if error := State.load(directory).last_error:
                    tell(error)
                return
            if gone:
                return

    threading.Thread(target=wait, name="first-attempt", daemon=True).start()
    return enough


def _stamp(directory: Path) -> tuple[int, int] | None:
    try:
        found = (directory / STATE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
