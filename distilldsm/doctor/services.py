"""Checks of MLflow's store, and of the records that wait for it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from distilldsm.core.shell import EXTRAS
from distilldsm.doctor.checks import Finding, clean, in_child


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def mends_missing(name: str, error: ModuleNotFoundError) -> Finding:
    """A check that found a package missing."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    hint = f"pip install '.[{extra}]' in the repository" if extra else None
    return Finding(name=name, status="fail", seen=f"the package '{package}' is not installed", hint=hint)


def check_mlflow(limit_s: float) -> list[Finding]:
    """Whether a run can be written to the store and read back; see `distilldsm.doctor.tracking_probe`."""
    from distilldsm.tracking import default_uri, sqlite_path

    name, uri = "mlflow", default_uri()
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        # A probe would make it, with all its tables.
        folder = database.parent
        if folder.is_dir() and os.access(folder, os.W_OK):
            return [Finding(name=name, status="ok", seen=f"{database}: not there yet, the first training makes it")]
        hint = "make the folder, or set MLFLOW_TRACKING_URI to another place"
        return [Finding(name=name, status="fail", seen=f"{folder}: is no folder that can be written", hint=hint)]
    if not is_installed("mlflow"):
        return [Finding(name=name, status="skip", seen="not installed (the optional group 'train')")]
    environment = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, int(limit_s / 3))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    return in_child(name, "distilldsm.doctor.tracking_probe:check", limit_s, environment)


def check_journal(limit_s: float) -> list[Finding]:
    """Records that earlier runs could not deliver, and those that the store refused."""
    from distilldsm.tracking import tracking_directory
    from distilldsm.tracking.journal import REJECTED, State, pending

    name, root = "mlflow journal", tracking_directory()
    waiting, refused, reasons = 0, [], []
    for directory in sorted(path for path in root.glob("*") if path.is_dir()):
        left = pending(directory)
        waiting += left
        if left and (reason := State.load(directory).last_error):
            reasons.append(reason)
        if (directory / REJECTED).is_file():
            refused.append(directory / REJECTED)
    found = []
    if waiting:
        why = f" ({clean(reasons[-1], 150)})" if reasons else ""
        found.append(
            Finding(
                name=name,
                status="warn",
                seen=f"{waiting} records in {root} have not been delivered{why}",
                hint="they are sent by the next stage that runs here; now: "
                "python -c 'from distilldsm.tracking import replay_journals; print(replay_journals())'",
            )
        )
    if refused:
        hint = f"look at the reasons in {_several(refused)}; remove what is settled"
        found.append(
            Finding(name=name, status="warn", seen=f"the store refused records of {len(refused)} runs", hint=hint)
        )
    return found or [Finding(name=name, status="ok", seen=f"nothing waits in {root}")]


def _several(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
