"""Converts a mapping from YAML to frozen dataclasses. The checks are strict, and an error says what to correct."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from distilldsm.core.assignments import parse_yaml
from distilldsm.core.errors import ConfigError, did_you_mean
from distilldsm.core.shipped import shipped

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that are allowed for a field. It annotates the field's type: `Annotated[int, Range(1)]`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """`low` itself is not allowed."""
    below: bool = False
    """`high` itself is not allowed."""

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        low = f"above {self.low:g}, and" if self.above else f"from {self.low:g} to"
        high = f"below {self.high:g}" if self.below else f"{'at most ' if self.above else ''}{self.high:g}"
        return f"{low} {high}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Annotates a type with the rule that an error shows, where the type's own name says too little."""

    text: str
    pattern: str | None = None
    """Regular expression that the whole text must match."""


Count = typing.Annotated[int, Range(1)]
Natural = typing.Annotated[int, Range(0)]
Positive = typing.Annotated[float, Range(0, above=True)]
NotNegative = typing.Annotated[float, Range(0)]
Share = typing.Annotated[float, Range(0, 1)]


def load_yaml(path: str | os.PathLike[str], *, hint: str = "give an existing file") -> dict[str, Any]:
    """Read a YAML file that holds one mapping. A file of `conf/` may come from the package, see `shipped`.

    Args:
        hint: what the user should do if the file cannot be read.

    Raises:
        ConfigError: the file is missing, is not valid YAML, does not hold a mapping, or holds a key twice.
    """
    import yaml

    path = shipped(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("cannot be read", where=path, seen=error.strerror, hint=hint) from None
    except UnicodeDecodeError as error:
        raise ConfigError("is not a text file", where=path, seen=str(error), rule="UTF-8", hint=hint) from None
    try:
        loaded = parse_yaml(text, where=path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2001-99-99
        raise ConfigError(
            "is not valid YAML",
            where=path,
            seen=str(error).replace("\n", " ")[:500],
            rule="plain mappings, lists and values; tags such as !!python/object are never executed",
            hint="correct the file at that line",
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("must hold a mapping", where=path, seen=type(loaded).__name__)
    return loaded


def field_types(cls: Any) -> dict[str, Any]:
    """Field name to type of a dataclass, with annotations (`Range`, `Rule`)."""
    return _field_types(cls)


@functools.cache
def _field_types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def from_mapping(cls: type[T], values: object, *, where: str = "") -> T:
    """Build the dataclass `cls` from nested mappings and lists.

    A missing key gets the field's default.

    Raises:
        ConfigError: a key is unknown, or a value has a wrong type or is refused by `__post_init__`. The message starts
            with `where` (file and section) and names the key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("must be a mapping of parameters", where=where, seen=_show(values))
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = field_types(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"unknown parameter '{key}'",
                where=where,
                rule="allowed: " + ", ".join(fields),
                hint=did_you_mean(str(key), fields) or "remove it or correct its name",
            )
    built = {key: convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"parameter '{missing[0]}' is missing", where=where, hint=f"add '{missing[0]}: ...'")
    try:
        return cls(**built)
    except ConfigError as error:
        place = f"{where}.{error.where}" if error.where else where
        raise ConfigError(error.problem, where=place, seen=error.seen, rule=error.rule, hint=error.hint) from None


def require(condition: bool, key: str, seen: object, rule: str) -> None:
    """Raise ConfigError, naming the parameter, the value and the rule, unless the condition holds."""
    if not condition:
        raise ConfigError(f"'{key}' has an impossible value", seen=repr(seen), rule=rule)


def to_mapping(value: Any) -> Any:
    """The inverse of `from_mapping`: plain dicts, lists and scalars, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_mapping(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_mapping(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def flatten(values: Mapping[str, Any], prefix: str = "", *, separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one, with joined keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}{separator}", separator=separator)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _wrong(value: object, where: str, rule: str) -> ConfigError:
    return ConfigError("has the wrong type or value", where=where, seen=_show(value), rule=rule)


def convert(hint: Any, value: object, where: str) -> Any:
    """Convert `value` to the type `hint`: dataclass, Literal, union, tuple, mapping or scalar, annotated or not.

    Raises:
        ConfigError: the value does not fit the type; the error names `where`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert_annotated(args[0], args[1], value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            raise ConfigError(
                "is not an allowed value",
                where=where,
                seen=_show(value),
                rule="one of " + ", ".join(str(a) for a in args),
                hint=did_you_mean(str(value), map(str, args)),
            )
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise _wrong(value, where, "a mapping")
        for k, v in value.items():
            if args[0] is str and not isinstance(k, str):
                raise _not_a_name(args[1], k, v, where)
        return {convert(args[0], k, f"{where} key"): convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where=where)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, where)


def _convert_annotated(hint: Any, note: Range | Rule, value: object, where: str) -> Any:
    try:
        converted = convert(hint, value, where)
    except ConfigError as error:
        rule = note.text if isinstance(note, Rule) else error.rule
        raise ConfigError(error.problem, where=error.where, seen=error.seen, rule=rule, hint=error.hint) from None
    if isinstance(note, Range):
        if not note.holds(converted):
            raise ConfigError("has an impossible value", where=where, seen=repr(value), rule=str(note))
    elif note.pattern and isinstance(converted, str) and not re.fullmatch(note.pattern, converted):
        raise ConfigError("has an impossible value", where=where, seen=repr(value), rule=note.text)
    return converted


def _not_a_name(kind: Any, key: object, value: object, where: str) -> ConfigError:
    hint = "put the name in quotes"
    if isinstance(value, str):
        with contextlib.suppress(ConfigError):
            convert(kind, key, where)
            hint = f"did you mean '{value}: {key}'?"
    return ConfigError("a key is not a name", where=where, seen=_show(key), rule="NAME: VALUE", hint=hint)


def _convert_union(args: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    if len(choices) == 1:
        return convert(choices[0], value, where)
    for choice in choices:
        try:
            return convert(choice, value, where)
        except ConfigError:
            continue
    raise _wrong(value, where, "one of " + ", ".join(getattr(c, "__name__", str(c)) for c in choices))


def _convert_tuple(args: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(value, where, "a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise _wrong(value, where, f"a list of {len(args)} values")
    return tuple(convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _convert_scalar(hint: Any, value: object, where: str) -> Any:
    if hint is Any:
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(value, where, "true or false")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)  # KFP passes whole numbers inside lists as floats
        raise _wrong(value, where, "a whole number")
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 (no dot) as a string
            try:
                value = float(value)
            except ValueError:
                raise _wrong(value, where, "a number") from None
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        raise _wrong(value, where, "a finite number")
    if hint is str:
        if isinstance(value, str):
            return value
        raise _wrong(value, where, "text (put it in quotes)")
    raise TypeError(f"{where}: no conversion for {hint}")
