"""Errors meant for the person at the keyboard: what was seen, what is allowed, how to fix it."""

from __future__ import annotations

import os

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


class ConfigError(UserError):
    """A parameter is unknown, has the wrong type or an impossible value (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """A data set, volume or archive breaks a rule (exit code 1)."""
