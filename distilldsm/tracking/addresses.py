"""Addresses of MLflow stores: which one to use, and how to show it without secrets."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///` address; None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def default_uri() -> str:
    """MLFLOW_TRACKING_URI (a relative SQLite path made absolute), else `mlflow.db` in the current directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    database = sqlite_path(uri)
    if database is None:
        return uri
    query = uri.partition("?")[2]
    return f"sqlite:///{database.absolute()}" + (f"?{query}" if query else "")


def redact_uri(uri: str) -> str:
    """The address without what may be secret: user, password, query."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri.partition("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def live_uri(recorded: str) -> str:
    """The address to connect to for a recorded address, which holds no secrets.

    MLFLOW_TRACKING_URI is used if it names the same server: it may add user and password. If a recorded SQLite file no
    longer exists, it was probably moved, and the environment's SQLite address is used.
    """
    current = default_uri()
    database = sqlite_path(recorded)
    if database is not None:
        return recorded if database.is_file() or sqlite_path(current) is None else current
    return current if redact_uri(current) == recorded else recorded


def uri_to_attach(recorded: str) -> str:
    """As `live_uri`, but always the environment's server: its host name may differ on the machine that trained."""
    current = default_uri()
    is_server = sqlite_path(recorded) is None and sqlite_path(current) is None
    return current if is_server else live_uri(recorded)
