"""What every command line shares: errors a person can act on, and exit codes. Imports nothing heavy."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilldsm.core.errors import UserError
from distilldsm.core.interruption import describe
from distilldsm.core.progress import close_bars

EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "mlflow": "train",
    "surface_distance": "train",
    "matplotlib": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "great_expectations": "data",
    "nilearn": "data",
    "pandas": "data",
    "requests": "data",
    "ruamel": "pipeline",
    "dvc": "pipeline",
    "pydicom": "dicom",
    "highdicom": "dicom",
}
"""Package to the optional dependency group that brings it."""

_FULL, _REFUSED = "free space, then run the same command again", "use a place that you may read and write"
MENDS = {
    errno.ENOENT: "make it, or correct the path",
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EROFS: _REFUSED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
}
"""Of errors of the operating system that no command tells better."""


def interrupt(number: int, frame: object) -> None:
    """SIGTERM ends like Ctrl-C, so that what was started is cleaned up."""
    raise KeyboardInterrupt


@contextmanager
def handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Other signal handlers for a while; only the main thread can have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_shell(run: Callable[[], int | None]) -> int:
    """Run a command; print what the user must fix to stderr and return the exit code, the command's own if it has one.

    0 is success only; 1 data or environment, 2 usage or parameters, 130 interrupted. Everything that is not the
    user's to fix keeps its traceback. DISTILLDSM_DEBUG=1 shows tracebacks of operating system errors too. SIGTERM
    interrupts like Ctrl-C: it is what a pod that is deleted gets, and a job of a batch system. An interrupt tells
    what is kept and the command that goes on, see `interruption`.
    """
    try:
        try:
            with handled({signal.SIGTERM: interrupt}):
                code = run() or 0
        finally:
            close_bars()
        # A closed pipe shows when the buffer is written, which would otherwise be after the exit code is decided.
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(describe(error), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or os.environ.get("DISTILLDSM_DEBUG"):
            raise
        print(f"error: this command needs the package '{package}', which is not installed", file=sys.stderr)
        print(f"  hint: in the repository, pip install '.[{EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except OSError as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        print(f"error: {_of_system(error)}", file=sys.stderr)
        return 1
    return code


def _of_system(error: OSError) -> UserError:
    """An error of the operating system as one a person can act on; of a temporary or lock file, what it stands for."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if path is not None and (
        hidden := re.fullmatch(r"\.(.+?)\.(\d+\.tmp[.\w]*|lock|partial|partial\.json)", path.name)
    ):
        path = path.with_name(hidden.group(1))
    return UserError(error.strerror or str(error), where=path, hint=MENDS.get(error.errno or 0))
