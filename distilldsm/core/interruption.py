"""What an interrupted command tells: which part of its work is kept, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distilldsm.core.redaction import redact

RESUME_VARIABLE = "DISTILLDSM_RESUME"
"""Set by a command that starts others: what its user has to type to go on."""


@contextmanager
def explains_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """An interrupt that comes inside the block takes along a note of what is kept, for `run_shell` to tell."""
    try:
        yield
    except KeyboardInterrupt as error:
        with suppress(Exception):  # whatever the note: the interrupt is what counts
            error.add_note(kept())
        raise


def notes_of(error: BaseException) -> list[str]:
    """The notes of an interrupt, and of those before it: a second one may come while the first is being dealt with."""
    earlier = notes_of(error.__context__) if error.__context__ is not None else []
    return [*earlier, *getattr(error, "__notes__", ())]


def describe(error: KeyboardInterrupt) -> str:
    """What to tell of an interrupt: the notes, and how to go on."""
    notes = [f"  {note}" for note in dict.fromkeys(notes_of(error))]
    return redact("\n".join(["interrupted", *notes, f"  go on with: {command_again()}"]))


def command_again() -> str:
    """The command that goes on where this one stopped."""
    if given := os.environ.get(RESUME_VARIABLE):
        return given
    if os.environ.get("DVC_STAGE"):  # DVC sets it for the commands of its stages
        return "dvc repro"
    if os.environ.get("KFP_RUN_ID"):
        return "the same step (Kubernetes does so where it has retries), or a new run of the pipeline"
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        return "the same torchrun command"
    if Path(sys.argv[0]).name == "distilldsm":  # the installed command; orig_argv would name its file
        return shlex.join(["distilldsm", *sys.argv[1:]])
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
