"""Runs all checks at once. Each has a time limit, and a check that fails does not disturb the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distilldsm.core.errors import UserError
from distilldsm.core.redaction import redact
from distilldsm.core.shell import environment_of_modules

Status = Literal["ok", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = get_args(Status)
LIMIT_S = 10.0
"""Time limit of a check, in seconds. Imports are not counted: their duration says nothing about a service."""
LOADING_S = 45.0
"""Additional time for imports, in seconds."""
_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. Its texts contain no secrets."""

    name: str
    status: Status
    seen: str
    hint: str | None = None
    """How to fix it; shown if the status is not ok."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check. It may return several findings."""

    name: str
    about: str
    run: Callable[[float], Sequence[Finding]]
    """Called with the time limit, in seconds."""
    loads: bool = False
    """The check gets more time: it imports a large package (numpy takes seconds on a busy CPU) or uses `in_child`."""


def clean(text: object, length: int = 300) -> str:
    """A text from another program on one line, without secrets, cut after `length` characters."""
    words = " ".join(redact(str(text)).split())
    return words if len(words) <= length else f"{words[:length]} ..."


def failure(name: str, error: BaseException) -> Finding:
    """An error as a finding. Any error other than a UserError is a fault of the check itself."""
    if not isinstance(error, UserError):
        return Finding(name=name, status="fail", seen=clean(f"the check broke: {type(error).__name__}: {error}"))
    where = f"{error.where}: " if error.where else ""
    parts = [f"{where}{error.problem}", "" if error.seen is None else f"seen: {error.seen}", error.rule or ""]
    hint = clean(error.hint) if error.hint else None
    return Finding(name=name, status="fail", seen=clean("; ".join(filter(None, parts))), hint=hint)


def run_checks(checks: Sequence[Check], limit_s: float = LIMIT_S) -> list[Finding]:
    """The findings, in the order of the checks. This always ends: a check that hangs is reported as "no answer"."""
    findings_of: dict[str, list[Finding]] = {}

    def run(check: Check) -> None:
        try:
            findings_of[check.name] = list(check.run(limit_s))
        except BaseException as error:  # a library's SystemExit, too, must end only this check
            findings_of[check.name] = [failure(check.name, error)]

    threads = [threading.Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    findings: list[Finding] = []
    for check, thread in zip(checks, threads, strict=True):
        patience_s = deadline - time.monotonic() + (LOADING_S + 2 * _GRACE_S if check.loads else 0.0)
        thread.join(max(patience_s, 0.0))
        findings += findings_of.get(check.name) or [no_answer(check.name, limit_s)]
    return findings


def no_answer(name: str, limit_s: float) -> Finding:
    return Finding(name=name, status="fail", seen=f"no answer within {limit_s:g} s", hint="--timeout gives more time")


def in_child(name: str, function: str, limit_s: float, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Run a check in its own process: its packages load slowly, or it may hang in code that cannot be interrupted.

    Args:
        function: `package.module:function`, called with the time limit in seconds.
        environment: variables added to those of this process.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "distilldsm.doctor.child", name, function, str(limit_s)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**environment_of_modules(), **(environment or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s + LOADING_S)
    except subprocess.TimeoutExpired:
        return [no_answer(name, limit_s)]
    finally:
        if process.poll() is None:
            _end(process)
    try:
        return [Finding(**row) for row in json.loads(out.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        last = (err.strip().splitlines() or ["nothing"])[-1]
        seen = f"the check's process ended with exit code {process.returncode}; its last line: {last}"
        return [Finding(name=name, status="fail", seen=clean(seen))]


@contextlib.contextmanager
def leaving_no_folder(path: Path) -> Iterator[None]:
    """Afterwards remove the folder and its parents, if they did not exist before and are empty."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for one in missing:
                one.rmdir()


def _end(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM first, so that the check can delete its probe, then SIGKILL; both also to its child processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_S)
