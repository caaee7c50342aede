"""The reference of all parameters, read from the dataclasses and the texts under their fields."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distilldsm.config import Params
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import to_mapping


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One key of `params.yaml`."""

    key: str
    """With its section, e.g. `train.epochs`."""
    kind: str
    """Its type, as in the source."""
    default: str
    """As JSON; empty where a value must be given."""
    text: str
    """What it is, with its unit."""


def parameters(cls: type = Params, prefix: str = "") -> Iterator[Parameter]:
    """All parameters of a dataclass and of those in it, in their order."""
    hints = typing.get_type_hints(cls)
    texts = _field_texts(cls)
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        section = _dataclass_of(hints[field.name])
        kind, text = texts[field.name]
        if section is None or not _is_section(hints[field.name]):
            yield Parameter(key=key, kind=kind, default=_default(field), text=text)
        if section is not None:
            yield from parameters(section, f"{key}.")


def matching(wanted: Sequence[str]) -> list[Parameter]:
    """The parameters that `wanted` names, by key or section; all where it names none.

    Raises:
        ConfigError: there is no such parameter or section.
    """
    known = list(parameters())
    for name in wanted:
        if not any(_below(p.key, name) for p in known):
            sections = {p.key.rpartition(".")[0] for p in known} | {p.key for p in known}
            last = [key for key in sections if key.rpartition(".")[2] == name.rpartition(".")[2]]
            close = last or difflib.get_close_matches(name, sections, n=3)
            raise ConfigError(
                "no such parameter or section",
                where="distilldsm params",
                seen=name,
                hint=f"did you mean {' or '.join(sorted(close))}?" if close else "see distilldsm params",
            )
    return [p for p in known if not wanted or any(_below(p.key, name) for name in wanted)]


def as_text(found: Sequence[Parameter]) -> str:
    """For the terminal: a parameter a paragraph."""
    return "\n".join(
        f"{p.key}: {p.kind}{f' = {p.default}' if p.default else ''}\n"
        + textwrap.fill(p.text, 100, initial_indent="    ", subsequent_indent="    ")
        for p in found
    )


def as_markdown(found: Sequence[Parameter]) -> str:
    """A table a section."""
    lines = ["# Parameters", "", "The keys of `params.yaml`. Presets in `conf/` change the defaults."]
    section = None
    for p in found:
        top = p.key.partition(".")[0]
        if top != section:
            section = top
            lines += ["", f"## {section}", "", "| key | type | default | |", "|---|---|---|---|"]
        cells = (f"`{p.key}`", f"`{p.kind}`", f"`{p.default}`" if p.default else "", p.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _field_texts(cls: type) -> dict[str, tuple[str, str]]:
    """Field to its type as written, and the text that stands under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for number, node in enumerate(body.body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        following = body.body[number + 1] if number + 1 < len(body.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        found[node.target.id] = ast.unparse(node.annotation), text
    return found


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass that a type is, or may be."""
    for choice in (hint, *typing.get_args(hint)):
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice
    return None


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(to_mapping(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(to_mapping(field.default_factory()))
    return ""
