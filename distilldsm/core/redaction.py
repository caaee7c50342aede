"""Removes passwords from text before it is printed, logged or written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

HIDDEN = "***"
_SECRET_VARIABLE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_?KEY|API_?KEY|CREDENTIAL|COOKIE|SIGNATURE", re.I)
_NO_SECRET_VARIABLE = re.compile(r"_(PATH|FILE|DIR|URI|URL|ENDPOINT)$", re.I)
_SECRET_KEY = re.compile(
    r"sig$|signature|token|secret|passw|pwd|auth$|authorization|credential|(^|[-_])key$|api_?key|access_?key", re.I
)
_USER_INFO = re.compile(r"://[^/@\s'\"]*@")
_QUERY_VALUE = re.compile(r"([?&;])([^=&;?\s'\"]+)=([^&;\s'\")]+)")
_SHORTEST = 6
"""Shorter values are not hidden: otherwise every `true` or `1` in a text would be."""


def public_address(url: str) -> str:
    """The address without user, password, query and fragment: they may hold secrets (signed addresses)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def secret_in_address(text: str) -> str | None:
    """The secret part of an address: `user` (user or password), or the name of a query field; None without a secret."""
    try:
        parts = urlsplit(text)
    except ValueError:  # e.g. a bracket that is not closed
        return "user" if _USER_INFO.search(text) else None
    if not parts.scheme or "@" in parts.netloc:
        return "user" if "@" in parts.netloc else None
    return next((key for key, value in parse_qsl(parts.query) if value and _SECRET_KEY.search(key)), None)


def is_secret_name(variable: str) -> bool:
    """Whether the name of an environment variable suggests that it holds a secret."""
    return bool(_SECRET_VARIABLE.search(variable)) and not _NO_SECRET_VARIABLE.search(variable)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets: those in addresses, and the values of variables that `is_secret_name` finds.

    Args:
        environment: variables; by default those of this process.
    """
    text = _USER_INFO.sub("://", text)
    text = _QUERY_VALUE.sub(
        lambda found: f"{found[1]}{found[2]}={HIDDEN if _SECRET_KEY.search(found[2]) else found[3]}", text
    )
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST and is_secret_name(name):
            for form in {value, quote(value, safe="")}:
                text = text.replace(form, HIDDEN)
    return text
