"""Checks that run in a process of their own, for the tests."""

from __future__ import annotations

import os
import sys
import time

from distilldsm.doctor.checks import Finding


def fine(limit_s: float) -> list[Finding]:
    print("a library says hello")
    return [Finding(name="fine", status="warn", seen=f"{os.environ['PLANTED']}, {limit_s:g} s", hint="nothing")]


def hangs(limit_s: float) -> list[Finding]:
    time.sleep(60)
    return []


def dies(limit_s: float) -> list[Finding]:
    print("about to crash at https://anna:geheim99@host/x", file=sys.stderr, flush=True)
    os._exit(7)


def breaks(limit_s: float) -> list[Finding]:
    raise SystemExit("a library ends the process")
