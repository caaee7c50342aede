"""One check in a process of its own: `python -m distilldsm.doctor.child NAME MODULE:FUNCTION SECONDS`."""

from __future__ import annotations

import importlib
import os
import sys
import threading

from distilldsm.doctor.checks import Finding, as_json, failure, no_answer
from distilldsm.doctor.services import mends_missing


def main() -> None:
    """Print the findings as the last line of stdout. The limit of time begins when all is imported."""
    name, function, limit = sys.argv[1:]
    module_name, _, attribute = function.partition(":")
    found: list[Finding] = []
    try:
        run = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        _answer([mends_missing(name, error)])
        return

    def check() -> None:
        try:
            found.extend(run(float(limit)))
        except BaseException as error:
            found.append(failure(name, error))

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(float(limit))
    _answer(found or [no_answer(name, float(limit))])


def _answer(found: list[Finding]) -> None:
    print(f"\n{as_json(found)}", flush=True)
    os._exit(0)  # a thread that hangs in native code would keep the process


if __name__ == "__main__":
    main()
