"""The stage's side of publishing: starts the publishing process (`follower`), waits, and reports what was not sent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilldsm.config import TrackingConfig
from distilldsm.core.files import write_json
from distilldsm.core.shell import environment_of_modules
from distilldsm.tracking.addresses import default_uri, keeps_nothing, live_uri, redact_uri, sqlite_path
from distilldsm.tracking.record import FILE, Status, describe, final_path, forgiving, is_tracked, load, logger

SYSTEM_METRICS_S = 10.0
SERVER_TIMEOUT_S, LOCAL_TIMEOUT_S = 20.0, 60.0
"""A local store may be slow, but it is always there."""


class Sender:
    """The process that publishes `directories`. With `follow` it publishes the first one while a training writes it."""

    def __init__(self, directories: Sequence[Path], *, follow: bool = False) -> None:
        self.directories = list(directories)
        self.outcomes: dict[str, dict[str, Any]] = {}
        """Directory to the fields of the `publish.Outcome` of its last attempt."""
        self._is_reported = not follow
        arguments = [*map(str, directories), "--parent", str(os.getpid())]
        if follow:
            arguments += ["--follow", "--system", str(_interval_s())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distilldsm.tracking.follower", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment_of_modules(), "MLFLOW_TRACKING_URI": default_uri(), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C must not stop it before the last records are sent
        )
        self._reader = threading.Thread(target=self._read, name="mlflow", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                outcome = json.loads(line)
                self.outcomes[outcome["directory"]] = outcome
                if not self._is_reported:
                    # The user learns of a wrong password at the start of a training, not at its end.
                    self._is_reported = True
                    if outcome["problems"]:
                        logger.warning("MLflow: %s; the work goes on, nothing is lost", outcome["problems"][0])

    def wait(self, timeout_s: float, *, finish: bool = False) -> None:
        """Wait for the process, and kill it after `timeout_s` seconds. The output still holds everything unsent.

        Args:
            finish: first tell the process that the stage will write nothing more.
        """
        try:
            if finish and self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    # A message, not only the end of the pipe: forked children may keep the pipe open.
                    self._process.stdin.write("finish\n")
                    self._process.stdin.flush()
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(timeout=1)
            with contextlib.suppress(OSError):
                if self._process.stdin is not None:
                    self._process.stdin.close()

    def report(self) -> None:
        """Log one line for each reason why something is not in MLflow yet, with the command that sends it."""
        reasons: dict[str, list[str]] = {}
        for directory in dict.fromkeys([*map(str, self.directories), *self.outcomes]):
            outcome = self.outcomes.get(directory, {"problems": ["the store did not take it in time"]})
            if not outcome["problems"] and not outcome["is_complete"] and _is_finished(Path(directory)):
                outcome = {**outcome, "problems": ["the store did not take all of it in time"]}
            if outcome["problems"]:
                more = len(outcome["problems"]) - 1
                reason = outcome["problems"][0] + (f", and {more} more" if more else "")
                reasons.setdefault(reason, []).append(str(final_path(Path(directory))))
            for note in outcome.get("notes", ()) if Path(directory) in self.directories else ():
                logger.warning("MLflow: %s is published without a part: %s", str(final_path(Path(directory))), note)
        for reason, names in reasons.items():
            logger.warning(
                "MLflow: not all of %s is published (%s); the next stage sends it, or: distilldsm publish %s",
                ", ".join(names),
                reason,
                " ".join(names),
            )


def send(*directories: Path) -> None:
    """Publish finished outputs, and what was not sent of other outputs in the current directory. Never raises.

    Waits at most 20 s for a server and 60 s for a local file. Prints the result of registering a model, and reports
    what was not sent.
    """
    with forgiving("publishing"):
        tracked = [path for path in directories if (path / FILE).is_file() and _has_run(path)]
        if not tracked:
            return
        sender = start(tracked)
        if sender is None:
            return
        sender.wait(_timeout_s(tracked[0]))
        for directory in tracked:
            line = sender.outcomes.get(str(directory), {}).get("registration")
            if line:
                print(line, flush=True)
        sender.report()


def start(directories: Sequence[Path], *, follow: bool = False) -> Sender | None:
    """Start the publishing process."""
    return Sender(directories, follow=follow)


@contextlib.contextmanager
def followed(
    config: TrackingConfig | None, directory: Path, *, at_end: Mapping[str, Sequence[Path]], **described: Any
) -> Iterator[None]:
    """Publish an output while the block writes it. The run ends as FINISHED, FAILED or (after an interrupt) KILLED.

    Args:
        directory: the stage's work directory.
        at_end: MLflow's folders to files that exist only when the block has finished.
        described: further arguments of `describe`.
    """
    is_on = is_tracked(config)
    sender: Sender | None = None
    if is_on:
        describe(config, directory, status="RUNNING", **described)
        with forgiving("showing the store"):
            _announce(directory)
        with forgiving("starting to publish"):
            sender = start([directory], follow=True)
    status: Status = "KILLED"  # SystemExit is how a SIGTERM handler ends a stage
    try:
        yield
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if is_on:
            files = {**described.get("files", {}), **at_end}
            describe(config, directory, status=status, **{**described, "files": files})
            with forgiving("publishing"):
                if sender is not None:
                    _finish(sender, directory)


def _announce(directory: Path) -> None:
    """Print where the results go. Warn if the address keeps nothing."""
    record = load(directory)
    if record is None or record.run is None:
        return
    uri = live_uri(record.run.tracking_uri, directory)
    print(
        f"MLflow: run '{record.run.name}' of experiment '{record.run.experiment}' in {redact_uri(uri)}",
        file=sys.stderr,
        flush=True,
    )
    if keeps_nothing(uri):
        logger.warning("MLflow: %s is a store in memory: it keeps nothing; set MLFLOW_TRACKING_URI", redact_uri(uri))


def _finish(sender: Sender, directory: Path) -> None:
    sender.wait(_timeout_s(directory), finish=True)
    record = load(directory)
    run_id = sender.outcomes.get(str(directory), {}).get("run_id")
    if run_id is not None and record is not None and record.run is not None:
        write_json(directory / FILE, replace(record, run=replace(record.run, id=run_id)))
    sender.report()


def _interval_s() -> float:
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        return 0.0
    return float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SYSTEM_METRICS_S)


def _timeout_s(directory: Path) -> float:
    record = load(directory)
    uri = "" if record is None or record.run is None else live_uri(record.run.tracking_uri, directory)
    return LOCAL_TIMEOUT_S if sqlite_path(uri) is not None else SERVER_TIMEOUT_S


def _has_run(directory: Path) -> bool:
    record = load(directory)
    return record is not None and record.run is not None


def _is_finished(directory: Path) -> bool:
    record = load(directory)
    return record is not None and record.status in ("FINISHED", "FAILED")
