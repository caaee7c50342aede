"""Keeps secrets out of addresses, and out of text that is printed, logged or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from urllib.parse import parse_qsl, quote, unquote

HIDDEN = "***"
_SECRET_VARIABLE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_?KEY|API_?KEY|CREDENTIAL|COOKIE|SIGNATURE", re.I)
_NO_SECRET_VARIABLE = re.compile(r"_(PATH|FILE|DIR|URI|URL|ENDPOINT)$", re.I)
_SECRET_KEY = re.compile(
    r"sig$|signature|token|secret|passw|pwd|auth$|authorization|credential|(^|[-_])key$|api_?key|access_?key", re.I
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ADDRESS = re.compile(_SCHEME.pattern + r"[^\s'\"<>]*")
_HOST = re.compile(r"(\[[^\]]*\]|[^:@]*)(:\d*)?")
_QUERY = re.compile(r"\?[^\s'\"<>?=&]+=[^\s'\"<>]*|(?<=url: )/[^\s'\"<>]*")
"""Queries without their address, as errors of requests show them: `... with url: /path?query`."""
_FIELD = re.compile(r"([?&;#])([^=&;#]*=)?[^&;#]+")
_HEADER = re.compile(r"((?:authorization|cookie)['\"]?\s*[:=]\s*['\"]?)[^'\"\n]+|(\bbearer\s+)[^\s'\",]+", re.I)
_SHORTEST = 6
"""Shorter values are not hidden: otherwise every `true` or `1` in a text would be."""
_VARIABLES_OF = {
    "http": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "https": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "postgresql": ("PGUSER", "PGPASSWORD"),
}
"""An address' scheme to the variables from which its client reads user and password."""


def split_user(address: str) -> tuple[str, str]:
    """The address without user and password, and the part `user:password` ("" if there is none), as written.

    A password may hold any character, percent-encoded or not: the part ends at the last @.
    """
    found = _SCHEME.match(address)
    if found is None:
        return address, ""
    scheme, rest = found[0], address[found.end() :]
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    host = _HOST.fullmatch(authority)
    if host is not None and host[2] is None:  # no @ before the path, and no colon that could begin a password
        return address, ""
    searched = rest if host is None else re.split(r"[?#]", rest, maxsplit=1)[0]  # a query may well hold an @
    end = searched.rfind("@")
    return (address, "") if end < 0 else (scheme + rest[end + 1 :], rest[:end])


def public_address(url: str) -> str:
    """The address without user, password, query and fragment: they may hold secrets (signed addresses)."""
    return re.split(r"[?#]", split_user(url)[0], maxsplit=1)[0]


def secret_in_address(text: str) -> str | None:
    """The secret part of an address: `user` (user or password), or the name of a query field; None without a secret."""
    address, user = split_user(text)
    if user:
        return "user"
    fields = parse_qsl("&".join(re.split(r"[?#]", address)[1:])) if _SCHEME.match(address) else []
    return next((key for key, value in fields if value and _SECRET_KEY.search(key)), None)


def move_credentials(environment: MutableMapping[str, str]) -> None:
    """Move user and password from MLflow's addresses to variables of their own. Libraries log and store addresses.

    Values that are set already are kept: MLflow prefers them, too.
    """
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        address, user = split_user(environment.get(name, "").strip())
        variables = _VARIABLES_OF.get(re.split(r"[+:]", address, maxsplit=1)[0].lower())
        if not user or variables is None:
            continue
        environment[name] = address
        for variable, value in zip(variables, user.split(":", 1), strict=False):
            environment.setdefault(variable, unquote(value))


def is_secret_name(variable: str) -> bool:
    """Whether the name of an environment variable suggests that it holds a secret."""
    return bool(_SECRET_VARIABLE.search(variable)) and not _NO_SECRET_VARIABLE.search(variable)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets.

    They are: users, passwords, query values and fragments of addresses, what follows `Authorization`, and the values
    of variables that `is_secret_name` finds.

    Args:
        environment: variables; by default those of this process.
    """
    for value in _secrets(os.environ if environment is None else environment):
        forms = {value, quote(value), quote(value, safe=""), unquote(value), repr(value)[1:-1]}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
    text = _ADDRESS.sub(lambda found: _hide_fields(split_user(found[0])[0]), text)
    text = _QUERY.sub(lambda found: _hide_fields(found[0]), text)
    return _HEADER.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", text)


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if "://" in value:
            user, _, password = split_user(value)[1].partition(":")
            value = password or user
        elif not is_secret_name(name):
            continue
        if len(value) >= _SHORTEST:
            yield value


def _hide_fields(address: str) -> str:
    return _FIELD.sub(lambda field: f"{field[1]}{field[2] or ''}{HIDDEN}", address)
