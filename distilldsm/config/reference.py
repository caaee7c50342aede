"""Shows every parameter to people and editors: as a table, a JSON schema and a commented `params.yaml`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilldsm.config.networks import MODELS
from distilldsm.config.params import Params
from distilldsm.core.errors import ConfigError, did_you_mean
from distilldsm.core.mapping import Range, field_types, to_mapping

_COMMENT_COLUMN, _WIDTH = 34, 120


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key of `params.yaml`."""

    key: str
    """Key with its section, e.g. `train.epochs`."""
    kind: str
    """Type of the value."""
    default: str
    """Default as JSON; empty if the user must give a value."""
    text: str
    """What the parameter means, with unit and range."""


def parameters(cls: Any = Params, prefix: str = "") -> Iterator[Parameter]:
    """All parameters of a dataclass and of its inner dataclasses, in order."""
    plain, texts = typing.get_type_hints(cls), field_texts(cls)
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}{field.name}", plain[field.name]
        if not dataclasses.is_dataclass(kind):
            words = re.sub(r"\b(typing|collections\.abc|distilldsm(\.\w+)*)\.", "", inspect.formatannotation(kind))
            words = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", words)
            limits = sorted({str(one) for one in _ranges(field_types(cls)[field.name])})
            text = " ".join([texts[field.name], *(f"Range: {limit}." for limit in limits)])
            yield Parameter(key=key, kind=words, default=_default(field), text=text)
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                yield from parameters(inner, f"{key}.")


def matching(wanted: Sequence[str]) -> list[Parameter]:
    """The parameters that `wanted` names, by key or section. If `wanted` is empty: all.

    Raises:
        ConfigError: a parameter or section does not exist.
    """
    known = list(parameters())
    for name in wanted:
        if not any(_below(p.key, name) for p in known):
            sections = {p.key.rpartition(".")[0] for p in known} | {p.key for p in known}
            last = [key for key in sections if key.rpartition(".")[2] == name.rpartition(".")[2]]
            raise ConfigError(
                "no such parameter or section",
                where="distilldsm params",
                seen=name,
                hint=(f"did you mean {' or '.join(sorted(last))}?" if last else did_you_mean(name, sections))
                or "see distilldsm params",
            )
    return [p for p in known if not wanted or any(_below(p.key, name) for name in wanted)]


def as_text(shown: Sequence[Parameter]) -> str:
    """Text for the terminal: one paragraph per parameter."""
    return "\n".join(
        f"{p.key}: {p.kind}{f' = {p.default}' if p.default else ''}\n"
        + textwrap.fill(p.text, 100, initial_indent="    ", subsequent_indent="    ")
        for p in shown
    )


def as_markdown(shown: Sequence[Parameter]) -> str:
    """Markdown text: one table per section."""
    lines = ["# Parameters", "", "The keys of `params.yaml`. Presets in `conf/` change the defaults."]
    section = None
    for p in shown:
        top = p.key.partition(".")[0]
        if top != section:
            section = top
            lines += ["", f"## {section}", "", "| key | type | default | |", "|---|---|---|---|"]
        cells = (f"`{p.key}`", f"`{p.kind}`", f"`{p.default}`" if p.default else "", p.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_yaml(values: Mapping[str, Any], cls: Any = Params, indent: str = "") -> str:
    """`params.yaml`: one line per parameter, with its text as a comment. A long text is cut to its first sentence.

    Args:
        values: the value of every field of `cls`.
    """
    lines, hints, texts = [], typing.get_type_hints(cls), field_texts(cls)
    for field in dataclasses.fields(cls):
        kind, value = hints[field.name], values[field.name]
        section = dataclasses.is_dataclass(kind)
        text = (kind.__doc__ or "") if section else texts[field.name]
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        first = re.split(r"(?<!e\.g)\.(?:\s|$)|; ", text, maxsplit=1)[0]
        line = f"{indent}{field.name}:{'' if section else ' ' + flow_yaml(value)}"
        for words in (text.removesuffix("."), first):
            comment = f"# {words}{' (' + ' | '.join(choices) + ')' if choices else ''}"
            if max(len(line) + 2, _COMMENT_COLUMN) + len(comment) <= _WIDTH:
                lines.append(f"{line:{_COMMENT_COLUMN - 2}}  {comment}")
                break
        else:
            lines += [f"{indent}{comment}", line]
        if section:
            lines.append(as_yaml(value, kind, f"{indent}  ").rstrip("\n"))
    return "\n".join(lines) + "\n"


def flow_yaml(value: Any) -> str:
    """A value as YAML on one line, e.g. `{a: [1, 2]}`."""
    import yaml

    if isinstance(value, float) and abs(value) >= 1e6 and float(f"{value:.1e}") == value:
        return f"{value:.1e}"  # 2.0e+09; PyYAML writes every zero
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("...\n").rstrip("\n")


def json_schema() -> dict[str, Any]:
    """JSON schema of `params.yaml` and of the presets. Editors use it to complete and check these files."""
    schema = _schema(Params)
    options = {"enum": list(MODELS)}
    schema["properties"]["train"]["properties"]["model"]["properties"]["name"] |= options
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "distilldsm: params.yaml", **schema}


def _schema(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    if origin is typing.Annotated:
        return _schema(args[0]) | _limits(args[1])
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(one) for one in args]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _schema(args[0])}
    if origin is tuple:
        return {
            "type": "array",
            "items": [_schema(one) for one in args],
            "minItems": len(args),
            "additionalItems": False,
        }
    if origin is not None:
        return {"type": "object", "additionalProperties": _schema(args[1])}
    # YAML 1.1 reads 1e-3 (no dot) as text; our converter accepts it as a number.
    number = {"type": ["number", "string"], "pattern": r"^[-+]?[\d.]+([eE][-+]?\d+)?$"}
    scalars: dict[Any, dict[str, Any]] = {bool: {"type": "boolean"}, int: {"type": "integer"}, float: number}
    return scalars.get(hint, {"type": "string" if hint is str else "null"})


def _object(cls: Any) -> dict[str, Any]:
    texts, properties = field_texts(cls), {}
    for field in dataclasses.fields(cls):
        properties[field.name] = {**_schema(field_types(cls)[field.name])}
        if texts[field.name]:
            properties[field.name]["description"] = texts[field.name]
        if default := _default(field):
            properties[field.name]["default"] = json.loads(default)
    required = [name for name, one in properties.items() if "default" not in one]
    return {
        "type": "object",
        "description": cls.__doc__,
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _limits(note: object) -> dict[str, float]:
    if not isinstance(note, Range):
        return {}
    names = {
        "exclusiveMinimum" if note.above else "minimum": note.low,
        "exclusiveMaximum" if note.below else "maximum": note.high,
    }
    return {name: limit for name, limit in names.items() if abs(limit) != float("inf")}


def _ranges(hint: Any) -> Iterator[Range]:
    yield from (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Range))
    for inner in typing.get_args(hint):
        yield from _ranges(inner)


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


@functools.cache
def field_texts(cls: Any) -> dict[str, str]:
    """Field name to the text under the field; empty for a section."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[node.target.id] = " ".join(str(following.value.value).split()) if described else ""  # type: ignore
    return texts


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(to_mapping(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(to_mapping(field.default_factory()))
    return ""
