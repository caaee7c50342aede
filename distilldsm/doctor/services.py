"""Checks of MLflow's store, and of the outputs that are not in it yet."""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from distilldsm.doctor.checks import Finding, in_child


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def check_mlflow(limit_s: float) -> list[Finding]:
    """Check that a run can be written to the store and read back; see `distilldsm.doctor.tracking_probe`."""
    from distilldsm.tracking import default_uri, sqlite_path

    name, uri = "mlflow", default_uri()
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        # A probe would create the database with all its tables.
        folder = database.parent
        if folder.is_dir() and os.access(folder, os.W_OK):
            return [Finding(name=name, status="ok", seen=f"{database}: the first training creates it")]
        hint = "create the folder, or set MLFLOW_TRACKING_URI to another place"
        return [Finding(name=name, status="fail", seen=f"{folder}: does not exist or is not writable", hint=hint)]
    if not is_installed("mlflow"):
        return [Finding(name=name, status="skip", seen="not installed (the optional group 'train')")]
    findings = in_child(name, "distilldsm.doctor.tracking_probe:check", limit_s, _environment(uri, limit_s))
    parts = urlsplit(uri)
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or os.environ.get("MLFLOW_TRACKING_TOKEN")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1") and password:
        hint = "give the server a certificate and use https://, unless nobody else can read this network"
        findings.append(Finding(name=name, status="warn", seen="the password is sent unencrypted", hint=hint))
    return findings


def check_outputs(limit_s: float) -> list[Finding]:
    """Find outputs that are not in MLflow yet; see `distilldsm.doctor.tracking_probe`."""
    from distilldsm.tracking import default_uri
    from distilldsm.tracking.publish import known_outputs

    name = "mlflow outputs"
    if not known_outputs():
        return [Finding(name=name, status="ok", seen="there are no outputs yet")]
    if not is_installed("mlflow"):
        return [Finding(name=name, status="skip", seen="not installed (the optional group 'train')")]
    environment = _environment(default_uri(), limit_s)
    return in_child(name, "distilldsm.doctor.tracking_probe:check_outputs", limit_s, environment)


def _environment(uri: str, limit_s: float) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, int(limit_s / 3))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
