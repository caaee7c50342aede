"""The command line shell that every stage shares."""

from __future__ import annotations

from collections.abc import Callable

from distilldsm.core.shell import run_shell


def stage_main(run: Callable[[], None]) -> int:
    """Run a stage; print what the user must fix to stderr and return the exit code (0 only for success)."""
    return run_shell(run)
