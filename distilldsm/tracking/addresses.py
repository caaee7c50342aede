"""Addresses of MLflow stores: which one to use, and how to show it without secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from distilldsm.core.errors import ConfigError
from distilldsm.core.redaction import move_credentials, public_address, split_user

_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///` address; None for any other, and for a store in memory."""
    if not uri.startswith("sqlite:///") or keeps_nothing(uri):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def sqlite_uri(database: Path) -> str:
    """The address of an SQLite file. SQLAlchemy reads `%`, `?` and `#` in it as parts of an address."""
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def keeps_nothing(uri: str) -> bool:
    """Whether an address names a store in memory, which ends with the process."""
    is_in_memory = re.search(r":memory:|mode=memory", uri) is not None
    return uri.rstrip("/") == "sqlite:" or (uri.startswith("sqlite:") and is_in_memory)


def project() -> Path:
    """The folder of the project: where the default store lies.

    `dvc exp run --temp` and `--queue` work in a temporary copy below `.dvc/tmp`, and DVC_ROOT names the original.
    """
    here, root = Path.cwd(), Path(os.environ.get("DVC_ROOT") or "/").resolve()
    return root if here.is_relative_to(root / ".dvc" / "tmp") else here


def default_uri() -> str:
    """MLFLOW_TRACKING_URI (a relative SQLite path made absolute), else `mlflow.db` in the folder of the project.

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
    return sqlite_uri(project() / database) + (f"?{query}" if query else "")


def recorded(uri: str) -> str:
    """The address as an output records it: without secrets, and an SQLite file of the project relative to it.

    So a project that is moved or copied uses its own store.
    """
    database, folder = sqlite_path(uri), project()
    if database is None or folder == folder.parent or not database.is_relative_to(folder):
        return redact_uri(uri)
    return sqlite_uri(database.relative_to(folder))


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


def live_uri(address: str, directory: Path) -> str:
    """The address to connect to for the recorded address of an output. It may hold user and password.

    MLFLOW_TRACKING_URI is used if it names the same server. A relative SQLite file is one of this project, or for the
    output of another project the nearest one in the folders above it. If a recorded SQLite file no longer exists, the
    environment's SQLite address is used.
    """
    current = default_uri()
    database = sqlite_path(address)
    if database is None:
        return current if redact_uri(current) == address else address
    output = directory.absolute()
    folders = [project()] if output.is_relative_to(project()) else [*output.parents, project()]
    places = [one / database for one in folders]
    known = next((place for place in places if place.is_file()), None)
    if known is None and sqlite_path(current) is not None:
        return current
    return sqlite_uri(known or places[-1])


def uri_to_attach(address: str, directory: Path) -> str:
    """As `live_uri`, but always the environment's server: its host name may differ on the machine that trained."""
    current = default_uri()
    is_server = sqlite_path(address) is None and sqlite_path(current) is None
    return current if is_server else live_uri(address, directory)
