"""Merges defaults, `params.yaml`, presets in `conf/` and `KEY=VALUE`, with one function."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.config.networks import MODELS
from distilldsm.config.params import Params
from distilldsm.core.assignments import read_assignment
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import field_types, from_mapping, load_yaml, to_mapping

DEFAULTS = {"dataset": "sample", "model": "distill_dsm"}
"""Group to the preset that applies if the command line names none of the group. The groups apply in this order."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """The values that one file or one assignment sets. A later overlay replaces the values of an earlier one."""

    name: str
    """Path of the file; empty for the command line."""
    values: Mapping[str, Any]


def load_params(path: str | os.PathLike[str] = "params.yaml", assignments: Iterable[str] = ()) -> Params:
    """Read `params.yaml`, apply assignments such as `train.epochs=3`, and check the result.

    Raises:
        ConfigError: a value is not allowed. Names the file, the section and key, the value and the rule.
    """
    hint = "run this where params.yaml is, write one with `distilldsm compose`, or name another with --params"
    return from_mapping(Params, set_values(load_yaml(path, hint=hint), assignments), where=os.fspath(path))


def merge(base: dict[str, Any], overlay: Mapping[str, Any], section: Any = Params) -> None:
    """Put the values of `overlay` over those of `base`, in place.

    Sections are merged key by key. Other mappings are replaced as a whole: the options of one network do not fit
    another.

    Args:
        section: the dataclass that describes `base`.
    """
    types = field_types(section) if dataclasses.is_dataclass(section) else {}
    for key, value in overlay.items():
        inner = types.get(key)
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value, inner)
        else:
            base[key] = copy.deepcopy(value)


def assign(values: dict[str, Any], assignment: str, *, where: str) -> Overlay:
    """Apply one `section.key=value` to `values`, see `read_assignment` and `merge`.

    Raises:
        ConfigError: it is not an assignment, or `section` is not a mapping.
    """
    keys, value = read_assignment(assignment, where=where)
    inner, section = values, Params
    for key in keys[:-1]:
        if inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]
        if not isinstance(inner, dict):
            raise ConfigError(f"'{key}' holds no parameters", where=where, seen=assignment)
        section = field_types(section).get(key, type) if dataclasses.is_dataclass(section) else type
    merge(inner, {keys[-1]: value}, section)
    for key in reversed(keys):
        value = {key: value}
    return Overlay(name="", values=value)


def set_values(values: Mapping[str, Any], assignments: Iterable[str], *, where: str = "--set") -> dict[str, Any]:
    """A copy of nested `values` with the assignments applied.

    Raises:
        ConfigError: see `assign`.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    for assignment in assignments:
        assign(changed, assignment, where=where)
    return changed


def compose(conf: Path, overrides: Sequence[str], *, kept: Overlay | None = None) -> dict[str, Any]:
    """Put presets and assignments over the defaults, or over `kept`, and check the values.

    Args:
        conf: the folder of the presets; it has one folder per group.
        overrides: `GROUP=NAME`, `GROUP=[NAME,NAME]` and `KEY=VALUE`.

    Raises:
        ConfigError: a preset or value cannot be used; names the file or the assignment.
    """
    presets, assignments = _split_overrides(conf, overrides)
    if kept is None:
        presets = {**{group: [name] for group, name in DEFAULTS.items()}, **presets}
        kept = Overlay(name="", values=to_mapping(Params()))
    values: dict[str, Any] = copy.deepcopy(dict(kept.values))
    order = list(DEFAULTS)
    groups = sorted(presets, key=lambda group: order.index(group) if group in order else len(order))
    overlays = [kept, *(preset(conf, group, name) for group in groups for name in presets[group])]
    for overlay in overlays[1:]:
        merge(values, overlay.values)
    overlays += [assign(values, assignment, where="compose") for assignment in assignments]
    try:
        from_mapping(Params, values)
    except ConfigError as error:
        raise _with_file(error, overlays) from None
    return values


def preset(conf: Path, group: str, name: str) -> Overlay:
    """A preset: the file `conf/GROUP/NAME.yaml`, or the network of that name with its default options.

    Raises:
        ConfigError: the preset does not exist, or it refers to other values.
    """
    path = conf / group / f"{name}.yaml"
    if path.is_file():
        values = load_yaml(path)
        _refuse_references(values, path)
        return Overlay(name=str(path), values=values)
    names = {file.stem for file in (conf / group).glob("*.yaml")}
    if group == "model":
        if name in MODELS:
            network = {"name": name, "options": to_mapping(MODELS[name].options)}
            return Overlay(name="", values={"train": {"model": network}})
        names |= set(MODELS)
    raise ConfigError("no such preset", where=conf / group, seen=name, rule=", ".join(sorted(names)))


def _split_overrides(conf: Path, overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split `overrides` into preset names by group, and assignments."""
    if not any(conf.glob("*/*.yaml")):
        raise ConfigError("holds no presets", where=conf, hint="run this where conf/ is, or give --conf")
    presets, assignments = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        sign, bare = key[:1], key.lstrip("+~")
        if sign in ("+", "~"):
            raise ConfigError(
                f"a parameter is set without '{sign}'",
                where="compose",
                seen=override,
                rule="KEY=VALUE",
                hint=f"{bare}={value or 'VALUE'}" if sign == "+" else "leave it out, or set another value",
            )
        if re.fullmatch(r"\w[\w-]*", key) and (key in DEFAULTS or (conf / key).is_dir()):
            presets[key] = [name.strip() for name in value.strip("[]").split(",")]
        else:
            _refuse_references(override, "compose")
            assignments.append(override)
    return presets, assignments


def _refuse_references(value: Any, where: str | Path) -> None:
    """Refuse `${...}`: it could copy an environment variable, such as a password, into params.yaml."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _refuse_references(inner, where)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(
            "a value refers to another one, or to the environment",
            where=where,
            seen=value,
            rule="no ${...}: the values in params.yaml are written to many files",
            hint="write the value itself; keep secrets in the environment",
        )


def _with_file(error: ConfigError, overlays: Sequence[Overlay]) -> ConfigError:
    """The same error; its place begins with the file that set the wrong value."""
    section = (error.where or "").lstrip(".")
    named = re.match(r"(?:unknown )?(?:parameter )?'([\w.]+)'", error.problem)
    key = ".".join(filter(None, [section, named.group(1) if named else ""]))
    keys = re.sub(r"\[\d+\]", "", key).split(".")
    file, known = next(
        (overlay.name, length)
        for length in range(len(keys), -1, -1)
        for overlay in reversed(overlays)
        if _sets(overlay.values, keys[:length])
    )
    where = ": ".join(filter(None, [file, key if known == len(keys) else section])) or "compose"
    return ConfigError(error.problem, where=where, seen=error.seen, rule=error.rule, hint=error.hint)


def _sets(values: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not (isinstance(values, Mapping) and key in values):
            return False
        values = values[key]
    return True
