"""The message of an interrupted command: which part of its work is kept, and the command that continues it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distilldsm.core.redaction import redact

RESUME_VARIABLE = "DISTILLDSM_RESUME"
"""Environment variable, set by a command that starts other commands: what the user types to continue."""


@contextmanager
def explains_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Add a note of what is kept to an interrupt inside the block. `run_shell` prints the note."""
    try:
        yield
    except KeyboardInterrupt as error:
        with suppress(Exception):  # an error in the note must not hide the interrupt
            error.add_note(kept())
        raise


def notes_of(error: BaseException) -> list[str]:
    """The notes of an interrupt and of earlier ones: a second interrupt may come while the first is being handled."""
    earlier = notes_of(error.__context__) if error.__context__ is not None else []
    return [*earlier, *getattr(error, "__notes__", ())]


def describe(error: KeyboardInterrupt) -> str:
    """The message of an interrupt: its notes, and how to continue."""
    notes = [f"  {note}" for note in dict.fromkeys(notes_of(error))]
    return redact("\n".join(["interrupted", *notes, f"  continue with: {command_again()}"]))


def command_again() -> str:
    """The command that continues where this one stopped."""
    if command := os.environ.get(RESUME_VARIABLE):
        return command
    if os.environ.get("DVC_STAGE"):  # DVC sets it for the commands of its stages
        return "dvc repro"
    if os.environ.get("KFP_RUN_ID"):
        return "the same step (Kubernetes does so where it has retries), or a new run of the pipeline"
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        return "the same torchrun command"
    if Path(sys.argv[0]).name == "distilldsm":  # the installed command; orig_argv would name its file
        return shlex.join(["distilldsm", *sys.argv[1:]])
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
