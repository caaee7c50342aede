"""Errors meant for the person at the keyboard: what was seen, what is allowed, how to fix it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Self

from distilldsm.core.redaction import redact
from distilldsm.core.text import one_line, printable

_INNER_LINE = re.compile(r"\n(?! {4})")


class UserError(Exception):
    """Something from the user (data, file, environment) cannot be used.

    The message names the place, the value seen, the rule it breaks and a hint, where these are known. It never shows
    a password from the environment or from an address. No part of it can look like a line of another message.
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
        parts = [f"{one_line(self.where)}: {problem}" if self.where else problem]
        if seen is not None:
            parts.append(f"  seen: {seen}")
        if rule:
            parts.append(f"  rule: {rule}")
        if hint:
            parts.append(f"  hint: {hint}")
        super().__init__(redact("\n".join(_INNER_LINE.sub("\n    ", printable(part)) for part in parts)))

    def at(self, where: str | os.PathLike[str]) -> Self:
        """The same error at a place; unchanged if it has a place already."""
        if self.where is not None:
            return self
        return type(self)(self.problem, where=where, seen=self.seen, rule=self.rule, hint=self.hint)


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """A hint with the closest known name, upper or lower case; None if no name reaches similarity `cutoff`, 0 to 1."""
    import difflib

    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f"did you mean '{by_lower[close[0]]}'?" if close else None


class ConfigError(UserError):
    """A parameter is unknown, has the wrong type or an impossible value (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """A data set, volume or archive breaks a rule (exit code 1)."""
