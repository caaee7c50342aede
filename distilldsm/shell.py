"""What every command line shares: errors a person can act on, and exit codes. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from distilldsm.errors import UserError

_EXTRAS = {
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
    "hydra": "pipeline",
    "omegaconf": "pipeline",
    "dvc": "pipeline",
    "pydicom": "dicom",
    "highdicom": "dicom",
}
"""Package to the optional dependency group that brings it."""


def run_shell(run: Callable[[], None]) -> int:
    """Run a command; print what the user must mend to stderr and return the exit code.

    0 is success only; 1 data or environment, 2 usage or parameters, 130 interrupted. Everything that is not the
    user's to mend keeps its traceback. DISTILLDSM_DEBUG=1 shows tracebacks of operating system errors too.
    """
    try:
        run()
        # A closed pipe shows when the buffer is written, which would otherwise be after the exit code is decided.
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS or os.environ.get("DISTILLDSM_DEBUG"):
            raise
        print(f"error: this command needs the package '{package}', which is not installed", file=sys.stderr)
        print(f"  mend: in the repository, pip install '.[{_EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except OSError as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0
