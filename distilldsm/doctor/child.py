"""Runs one check in its own process: `python -m distilldsm.doctor.child NAME MODULE:FUNCTION SECONDS`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict

from distilldsm.core.shell import EXTRAS, how_to_install
from distilldsm.doctor.checks import Check, Finding, run_checks


def main() -> None:
    """Print the findings as the last line of stdout. The time limit starts after the imports."""
    name, function, limit = sys.argv[1:]
    module_name, _, attribute = function.partition(":")
    try:
        run = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        findings = [_missing(name, error)]
    else:
        findings = run_checks([Check(name=name, about="", run=run)], float(limit))
    print(f"\n{json.dumps([asdict(one) for one in findings])}", flush=True)
    os._exit(0)  # otherwise a thread that hangs in native code keeps the process alive


def _missing(name: str, error: ModuleNotFoundError) -> Finding:
    package = (error.name or "").partition(".")[0]
    hint = how_to_install(package) if package in EXTRAS else None
    return Finding(name=name, status="fail", seen=f"the package '{package}' is not installed", hint=hint)


if __name__ == "__main__":
    main()
