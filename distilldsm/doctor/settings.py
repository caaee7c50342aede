"""Checks of the user's settings: params.yaml and the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from distilldsm.core.errors import did_you_mean
from distilldsm.core.progress import VARIABLE, Mode
from distilldsm.doctor.checks import Finding

PREFIX = "DISTILLDSM_"
VARIABLES: Mapping[str, str] = {
    "DISTILLDSM_BUILDER": "code that model files may name, see SECURITY.md",
    "DISTILLDSM_DEBUG": "1: tracebacks of operating system errors",
    "DISTILLDSM_DOWNLOAD_PASSWORD": "for the data server",
    "DISTILLDSM_DOWNLOAD_SIGNATURE": "query string of a signed address",
    "DISTILLDSM_DOWNLOAD_TOKEN": "for the data server",
    "DISTILLDSM_DOWNLOAD_USERNAME": "for the data server",
    "DISTILLDSM_PIPELINE_VERSION": "set by the Kubeflow pipeline",
    VARIABLE: "bar, plain or off",
    "DISTILLDSM_PROFILE": "profile of conf/cluster.yaml, set by the Kubeflow pipeline",
    "DISTILLDSM_RESUME": "command that continues after an interruption; set by commands that start stages",
    "DISTILLDSM_MODELS": "folder of the models that `distilldsm models pull` fetches",
    "DISTILLDSM_MASKS": "folder that a model server writes",
    "DISTILLDSM_SCANS": "folder that a model server reads",
    "DISTILLDSM_SCHEDULE": "recurring run of Kubeflow, set by `pipeline submit --cron`",
    "DISTILLDSM_TEST_CACHE": "where the tests keep base images",
    "DISTILLDSM_VERSION": "version of the images in docker/compose.yaml",
    "DISTILLDSM_WORK_DIR": "volume for unfinished work, set by the Kubeflow pipeline",
}
"""Every variable that the code reads, and what it is for."""


def check_params(limit_s: float) -> list[Finding]:
    """Check params.yaml."""
    from distilldsm.config import load_params

    name, path = "params.yaml", Path("params.yaml")
    if not path.is_file():
        hint = "run the command in the repository; distilldsm compose writes a params.yaml"
        return [Finding(name=name, status="warn", seen=f"{path.absolute()}: does not exist", hint=hint)]
    params = load_params(path)
    seen = f"valid: {params.download.source}, {params.train.model.name}, {params.train.epochs or 'planned'} epochs"
    return [Finding(name=name, status="ok", seen=seen)]


def check_environment(limit_s: float) -> list[Finding]:
    """Check that all DISTILLDSM_ variables are known: a mistyped one has no effect. Values are not shown."""
    name = "environment"
    variables = sorted(variable for variable in os.environ if variable.startswith(PREFIX))
    findings = []
    for variable in variables:
        if variable not in VARIABLES:
            # A high cutoff: the prefix that all names share makes any of them look close.
            hint = did_you_mean(variable, VARIABLES, cutoff=0.85) or f"known are {', '.join(VARIABLES)}"
            findings.append(Finding(name=name, status="warn", seen=f"{variable} has no effect", hint=hint))
    allowed = Mode.__args__  # type: ignore[attr-defined]
    if os.environ.get(VARIABLE, allowed[0]) not in ("", *allowed):
        hint = f"set it to {', '.join(allowed)}"
        findings.append(Finding(name=name, status="warn", seen=f"{VARIABLE} has an unknown value", hint=hint))
    folder = os.environ.get("DISTILLDSM_SCANS")
    if folder and not Path(folder).is_dir():
        hint = "create it, or set another folder"
        findings.append(Finding(name=name, status="warn", seen="DISTILLDSM_SCANS: no such folder", hint=hint))
    return findings or [Finding(name=name, status="ok", seen=", ".join(variables) or f"no {PREFIX} variable is set")]
