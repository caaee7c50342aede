"""Errors meant for the person at the keyboard: what was seen, what is allowed, how to fix it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from distilldsm.core.redaction import redact


class UserError(Exception):
    """Something the user gave (data, file, environment) cannot be used.

    The message always tells the place, the value seen, the rule it broke and the hint, each where known; never a
    password of the environment or of an address.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: str | os.PathLike[str] | None = None,
        seen: object = None,
        rule: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.where = None if where is None else os.fspath(where)
        self.seen = seen
        self.rule = rule
        self.hint = hint
        parts = [f"{self.where}: {problem}" if self.where else problem]
        if seen is not None:
            parts.append(f"  seen: {seen}")
        if rule:
            parts.append(f"  rule: {rule}")
        if hint:
            parts.append(f"  hint: {hint}")
        super().__init__(redact("\n".join(parts)))


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """A hint at the known name that comes closest, in any case; None where none is as close as `cutoff`, 0 to 1."""
    import difflib

    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f"did you mean '{by_lower[close[0]]}'?" if close else None


class ConfigError(UserError):
    """A parameter is unknown, has the wrong type or an impossible value (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """A data set, volume or archive breaks a rule (exit code 1)."""
