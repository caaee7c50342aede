"""Runs checks: all at once, each with a limit of time, and none can bring down the others."""

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
"""For what a check does; importing what it needs comes on top, for that tells nothing about a service."""
LOADING_S = 45.0
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; texts hold no secrets."""

    name: str
    status: Status
    seen: str
    hint: str | None = None
    """For what is not ok."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something to look at; may have several findings."""

    name: str
    about: str
    run: Callable[[float], Sequence[Finding]]
    """Gets the limit of time, seconds."""
    loads: bool = False
    """Imports something (numpy on a busy machine takes seconds), or see `in_child`: gets more time for that."""


def clean(text: object, length: int = 300) -> str:
    """A text of others as one line without secrets, not endless."""
    words = " ".join(redact(str(text)).split())
    return words if len(words) <= length else f"{words[:length]} ..."


def failure(name: str, error: BaseException) -> Finding:
    """What went wrong as a finding. An error that is not meant for the user is the check's own fault."""
    if not isinstance(error, UserError):
        return Finding(name=name, status="fail", seen=clean(f"the check broke: {type(error).__name__}: {error}"))
    where = f"{error.where}: " if error.where else ""
    told = [f"{where}{error.problem}", "" if error.seen is None else f"seen: {error.seen}", error.rule or ""]
    hint = clean(error.hint) if error.hint else None
    return Finding(name=name, status="fail", seen=clean("; ".join(filter(None, told))), hint=hint)


def run_checks(checks: Sequence[Check], limit_s: float = LIMIT_S) -> list[Finding]:
    """The findings, in the order of the checks. Ends for certain, whatever a check waits for."""
    found: dict[str, list[Finding]] = {}

    def run(check: Check) -> None:
        try:
            found[check.name] = list(check.run(limit_s))
        except BaseException as error:  # even SystemExit of a library ends nothing but its check
            found[check.name] = [failure(check.name, error)]

    threads = [threading.Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    findings: list[Finding] = []
    for check, thread in zip(checks, threads, strict=True):
        patience_s = deadline - time.monotonic() + (LOADING_S + 2 * _LAST_WORDS_S if check.loads else 0.0)
        thread.join(max(patience_s, 0.0))
        findings += found.get(check.name) or [no_answer(check.name, limit_s)]
    return findings


def no_answer(name: str, limit_s: float) -> Finding:
    return Finding(name=name, status="fail", seen=f"no answer within {limit_s:g} s", hint="--timeout gives it longer")


def in_child(name: str, function: str, limit_s: float, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Run a check in a process of its own, for what is heavy to import, or may hang where nothing stops it.

    Args:
        function: `package.module:function`, called with the limit of time, seconds.
        environment: added to this process's own.
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
        told = f"the check's process ended with {process.returncode}, its last words: {last}"
        return [Finding(name=name, status="fail", seen=clean(told))]


@contextlib.contextmanager
def leaving_no_folder(path: Path) -> Iterator[None]:
    """Remove afterwards, where it is empty, the folder and those above it that are not there yet."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for one in missing:
                one.rmdir()


def _end(process: subprocess.Popen[str]) -> None:
    """A word first, so that a probe can be taken back; then the end, with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_LAST_WORDS_S)
