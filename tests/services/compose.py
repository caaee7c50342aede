"""docker/compose.yaml as an engine would see it, so that the tests start the very commands that it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker/compose.yaml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:-|:\?)(?P<word>[^}]*))?\}")


def interpolated(text: str, environment: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}` and `${NAME:?message}` replaced.

    Raises:
        KeyError: a variable that is asked for is not set, or empty.
    """

    def value(found: re.Match[str]) -> str:
        given = environment.get(found["name"], "")
        if given or found["kind"] == ":-":
            return given or found["word"]
        raise KeyError(f"{found['name']}: {found['word']}")

    return _VARIABLE.sub(value, text)


def services(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Name to definition; with `environment`, its variables are filled in."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        return interpolated(value, environment) if isinstance(value, str) and environment is not None else value

    return dict(filled(yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]))


def variables() -> dict[str, str | None]:
    """Every variable the file takes, with its default; None: it must be given."""
    found = _VARIABLE.finditer(FILE.read_text(encoding="utf-8"))
    return {one["name"]: one["word"] if one["kind"] == ":-" else None for one in found}
