"""Checks of what the user has set: params.yaml, and the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from distilldsm.core.errors import did_you_mean
from distilldsm.core.progress import VARIABLE, Mode
from distilldsm.doctor.checks import Finding

PREFIX = "DISTILLDSM_"
VARIABLES: Mapping[str, str] = {
    "DISTILLDSM_BUILDER": "code that files of models may name, see SECURITY.md",
    "DISTILLDSM_DEBUG": "1: tracebacks of operating system errors",
    "DISTILLDSM_DOWNLOAD_PASSWORD": "of the server that data comes from",
    "DISTILLDSM_DOWNLOAD_SIGNATURE": "query of a signed address",
    "DISTILLDSM_DOWNLOAD_TOKEN": "of the server that data comes from",
    "DISTILLDSM_DOWNLOAD_USERNAME": "of the server that data comes from",
    "DISTILLDSM_PIPELINE_VERSION": "set by the Kubeflow pipeline",
    VARIABLE: "bar, plain or off",
    "DISTILLDSM_RESUME": "set by commands that start others",
    "DISTILLDSM_SCANS": "folder that a model server reads and writes",
    "DISTILLDSM_TEST_CACHE": "where the tests keep base images",
    "DISTILLDSM_VERSION": "of the images, for docker/compose.yaml",
    "DISTILLDSM_WORK_DIR": "volume for unfinished work, set by the Kubeflow pipeline",
}
"""All that are read anywhere."""


def check_params(limit_s: float) -> list[Finding]:
    """Whether params.yaml is valid."""
    from distilldsm.config import load_params

    name, path = "params.yaml", Path("params.yaml")
    if not path.is_file():
        hint = "run it in the repository; distilldsm compose writes one"
        return [Finding(name=name, status="warn", seen=f"{path.absolute()}: not there", hint=hint)]
    params = load_params(path)
    seen = f"valid: {params.download.source}, {params.train.model.name}, {params.train.epochs} epochs"
    return [Finding(name=name, status="ok", seen=seen)]


def check_environment(limit_s: float) -> list[Finding]:
    """Whether all DISTILLDSM_ variables are known: a mistyped one is silently without effect. Values are not told."""
    name = "environment"
    given = sorted(variable for variable in os.environ if variable.startswith(PREFIX))
    found = []
    for variable in given:
        if variable not in VARIABLES:
            # The prefix is what all have in common: it makes any name look close.
            hint = did_you_mean(variable, VARIABLES, cutoff=0.85) or f"known are {', '.join(VARIABLES)}"
            found.append(Finding(name=name, status="warn", seen=f"{variable} has no effect", hint=hint))
    allowed = Mode.__args__  # type: ignore[attr-defined]
    if os.environ.get(VARIABLE, allowed[0]) not in ("", *allowed):
        hint = f"set it to {', '.join(allowed)}"
        found.append(Finding(name=name, status="warn", seen=f"{VARIABLE} is none of its values", hint=hint))
    folder = os.environ.get("DISTILLDSM_SCANS")
    if folder and not Path(folder).is_dir():
        hint = "make it, or name another"
        found.append(Finding(name=name, status="warn", seen="DISTILLDSM_SCANS names no folder", hint=hint))
    return found or [Finding(name=name, status="ok", seen=", ".join(given) or f"no {PREFIX} variable is set")]
