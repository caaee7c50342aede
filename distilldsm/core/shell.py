"""Error messages and exit codes of every command. Imports nothing heavy."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import UserError
from distilldsm.core.interruption import describe
from distilldsm.core.progress import close_bars
from distilldsm.core.text import escaped_output

if TYPE_CHECKING:
    import subprocess

EXTRAS = {
    **dict.fromkeys(("numpy", "scipy", "nibabel", "yaml", "filelock", "tqdm", "openvino", "packaging", "jinja2"), ""),
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
"""Package to the optional dependency group that installs it ("": it is always needed)."""

_FULL, _REFUSED = "free space, then run the same command again", "use a place that you may read and write"
SYSTEM_HINTS = {
    errno.ENOENT: "create it, or correct the path",
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EROFS: _REFUSED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
}
"""Error number of the operating system to the hint, for errors that no command explains better."""


def interrupt(number: int, frame: object) -> None:
    """End on SIGTERM as on Ctrl-C, with the same cleaning up."""
    _stopped.append(number)
    raise KeyboardInterrupt


_stopped: list[int] = []
"""The signals that `interrupt` has received."""


@contextmanager
def handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Use other signal handlers inside the block. Only the main thread can set them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def time_limit(seconds: float, error: UserError) -> Iterator[None]:
    """Raise `error` if the block takes longer. Without limit outside the main thread, and on Windows."""

    def too_slow(number: int, frame: object) -> None:
        raise error

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled({signal.SIGALRM: too_slow}):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def end_processes(processes: Sequence[subprocess.Popen], *, grace_s: float, patience_s: float = 0.0) -> None:
    """Interrupt processes that have not ended within `patience_s`, and kill those that then take longer than `grace_s`.

    Not by SIGINT, which a job in a shell's background ignores.
    """
    import subprocess

    for seconds, number in ((patience_s, signal.SIGTERM), (grace_s, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(number)


def environment_of_modules() -> dict[str, str]:
    """This process's environment, in which `python -m distilldsm.MODULE` finds this package from every folder."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_shell(run: Callable[[], int | None]) -> int:
    """Run a command; print errors that the user must fix to stderr. Returns the exit code, the command's own if any.

    0 is success only; 1 data or environment, 2 usage or parameters, 130 interrupted. An error that the user cannot fix
    keeps its traceback. DISTILLDSM_DEBUG=1 shows tracebacks of operating system errors too. SIGTERM, which Kubernetes
    and batch systems send, acts like Ctrl-C. After an interrupt, the message says what is kept and how to continue, see
    `interruption`. Characters that the terminal cannot show are written as escapes.
    """
    with escaped_output():
        return _run(run)


def _run(run: Callable[[], int | None]) -> int:
    _stopped.clear()
    stops = {signal.SIGTERM: interrupt}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        stops[signal.SIGINT] = interrupt
    try:
        try:
            with handled(stops):
                code = run() or 0
        except UserError:
            raise
        except Exception as error:
            # A package in C turns an interrupt of its import into an ImportError of its own.
            if _stopped:
                raise KeyboardInterrupt from error
            raise
        finally:
            close_bars()
        # A closed pipe is noticed only when the buffer is written. Write it before the exit code is decided.
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(describe(error), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has stopped reading. Text that is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or os.environ.get("DISTILLDSM_DEBUG"):
            raise
        missing = UserError(
            f"this command needs the package '{package}', which is not installed",
            seen=f"Python {sys.executable}",
            hint=f"{how_to_install(package)}; or activate the environment that has it",
        )
        print(f"error: {missing}", file=sys.stderr)
        return 1
    except OSError as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        print(f"error: {_of_system(error)}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        seen = ascii(error.object[max(0, error.start - 60) : error.end + 60])
        print(f"error: text cannot be written as {error.encoding}\n  seen: {seen}", file=sys.stderr)
        print("  hint: rename the file or folder with this name", file=sys.stderr)
        return 1
    return code


def how_to_install(package: str) -> str:
    """The command that installs a package of `EXTRAS`."""
    target = f"'.[{EXTRAS[package]}]'" if EXTRAS[package] else "."
    return f"in the repository, pip install {target}"


def _of_system(error: OSError) -> UserError:
    """Convert an error of the operating system. It names the user's file, not our temporary or lock file."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if path is not None and (
        hidden := re.fullmatch(r"\.(.+?)\.([0-9a-f]{12}\.tmp[.\w]*|lock|partial|partial\.json|hashes\.json)", path.name)
    ):
        path = path.with_name(hidden.group(1))
    return UserError(error.strerror or str(error), where=path, hint=SYSTEM_HINTS.get(error.errno or 0))
