"""Addresses of MLflow stores: which one to use, and how to show it without secrets."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from distilldsm.core.errors import ConfigError
from distilldsm.core.redaction import move_credentials, public_address, split_user

_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///` address; None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def default_uri() -> str:
    """MLFLOW_TRACKING_URI (a relative SQLite path made absolute), else `mlflow.db` in the current directory.

    User and password are moved to variables of their own.

    Raises:
        ConfigError: the address holds a password for which its library has no variable.
    """
    move_credentials(os.environ)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    database = sqlite_path(uri)
    if database is None:
        if split_user(uri)[1]:
            hint = "use PostgreSQL (PGUSER, PGPASSWORD), an MLflow server, or a file of options (read_default_file)"
            raise ConfigError("the address holds a password", where="MLFLOW_TRACKING_URI", seen=uri, hint=hint)
        return uri
    query = uri.partition("?")[2]
    return f"sqlite:///{database.absolute()}" + (f"?{query}" if query else "")


def redact_uri(uri: str) -> str:
    """The address without what may be secret: user, password, query."""
    return uri.partition("?")[0] if sqlite_path(uri) is not None else public_address(uri)


def use(uri: str) -> str:
    """Make an address the default of this process; returns it without user and password."""
    if split_user(uri)[1]:
        for name in _CREDENTIALS:
            os.environ.pop(name, None)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return default_uri()


def refuse_foreign_credentials(uri: str) -> None:
    """MLflow sends the environment's password to every server. Only that of MLFLOW_TRACKING_URI may see it.

    Raises:
        ConfigError: there is a password, and the address names another server, e.g. the one of a copied model.
    """
    given = [name for name in _CREDENTIALS if os.environ.get(name)]
    parts, own = urlsplit(uri), urlsplit(default_uri())
    if given and parts.scheme in ("http", "https") and (parts.scheme, parts.netloc) != (own.scheme, own.netloc):
        raise ConfigError(
            "the password in the environment may be for another server",
            where=redact_uri(uri),
            seen=", ".join(given),
            rule="it is sent to the server of MLFLOW_TRACKING_URI only",
            hint=f"export MLFLOW_TRACKING_URI={redact_uri(uri)} if it is for this one",
        )


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
