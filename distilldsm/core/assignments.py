"""Read YAML from a file or from `train.epochs=3`. A key may stand once only, and no tag is executed."""

from __future__ import annotations

import argparse
import math
import os
import re
from functools import cache
from typing import Any

from distilldsm.core.errors import ConfigError

MAX_YAML_BYTES = 10_000_000
"""Largest YAML document, with its aliases replaced by what they stand for."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_AMBIGUOUS = re.compile(r"[-+]?(0[0-7_]+|0b.*|.*[:_].*)")
"""Numbers of YAML 1.1 that are another number, or a text, in YAML 1.2, which DVC reads."""


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Add `--params` and `--set` of a command that reads params.yaml."""
    parser.add_argument("--params", default="params.yaml", help="the parameters (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")


def parse_yaml(text: str, *, where: str | os.PathLike[str], loader: Any = None) -> Any:
    """Plain mappings, lists and values of a YAML document.

    Args:
        where: the place that an error names.
        loader: a loader class of PyYAML; the safe one by default.

    Raises:
        ConfigError: a mapping holds a key twice. PyYAML would silently use the last one; DVC refuses such a file. Or
            a number has a form that YAML 1.1 and 1.2 read differently: PyYAML reads 010 as 8 and 1:30 as 90. Or the
            document is larger than MAX_YAML_BYTES, as text or with its aliases replaced by what they stand for.
        yaml.YAMLError, ValueError, RecursionError: raised by PyYAML.
    """
    import yaml

    _refuse_large(len(text), where)
    reader = (loader or yaml.SafeLoader)(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _refuse_large(_expanded_bytes(node, {}), where)
        _refuse_ambiguous(node, where)
        return reader.construct_document(node)
    finally:
        reader.dispose()


def _refuse_large(size: float, where: str | os.PathLike[str]) -> None:
    if size > MAX_YAML_BYTES:
        raise ConfigError(
            "is too large, or its aliases stand for too much",
            where=where,
            seen=f"{size:.3g} bytes",
            rule=f"at most {MAX_YAML_BYTES:,} bytes, with every alias replaced by what it stands for",
        )


def _expanded_bytes(node: Any, known: dict[int, float]) -> float:
    """The size of a node with its aliases replaced, bytes; infinite if a node holds itself.

    Args:
        known: sizes by the id of the node. Each node is visited once, so the time does not grow with the expansion.
    """
    if isinstance(node.value, str):
        return len(node.value) + 1.0
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: a node that is met again meanwhile holds itself
        inner = (one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,)))
        known[id(node)] = 1.0 + sum(_expanded_bytes(one, known) for one in inner)
    return known[id(node)]


def _refuse_ambiguous(root: Any, where: str | os.PathLike[str]) -> None:
    import yaml

    visited: set[int] = set()  # an alias leads to the same node again, even from inside that node
    todo = [(root, "")]
    while todo:
        node, path = todo.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += [(inner, f"{path}[{number}]") for number, inner in enumerate(node.value)]
        if node.tag in _NUMBERS and _AMBIGUOUS.fullmatch(node.value):
            raise ConfigError(
                "a number has a form that programs read differently",
                where=where,
                seen=": ".join(filter(None, (path, f"{node.value}, line {node.start_mark.line + 1}"))),
                rule="decimal digits, without a 0 in front, : or _",
                hint="write it in decimal digits, or in quotes if it is a text",
            )
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = f"{path}.{key.value}" if path else str(key.value)
            todo.append((value, name))
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                raise ConfigError(
                    "a key is given twice",
                    where=where,
                    seen=f"{name}, lines {lines[key.tag, key.value]} and {line}",
                    rule="each key once",
                    hint="keep one of them",
                )
            lines[key.tag, key.value] = line


def read_assignment(assignment: str, *, where: str) -> tuple[list[str], Any]:
    """Keys and value of `section.key=value`. The value is YAML. `{a:1}` needs no space; 1e-3 is a number.

    Raises:
        ConfigError: this is not an assignment, or the value is not valid YAML.
    """
    import yaml

    path, sign, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not (sign and all(keys)):
        raise ConfigError(
            "is not an assignment", where=where, seen=assignment[:500], rule="KEY=VALUE, e.g. train.epochs=3"
        )
    try:
        return keys, parse_yaml(text, where=f"{where}: {path}", loader=_value_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            "the value is not valid YAML",
            where=where,
            seen=assignment[:500],
            rule=" ".join(str(error).split())[:500],
            hint=f"put text in quotes inside the quotes of the shell: {path}='\"TEXT\"'",
        ) from None


@cache
def _value_loader() -> Any:
    """The safe loader for values that people type: no dates, mappings without spaces, powers of ten without a dot."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            node.value = [_split_pair(key, value) for key, value in node.value]
            return node

    def _split_pair(key: Any, value: Any) -> tuple[Any, Any]:
        """Split `a:1` inside {} into key and value. YAML reads it as a key without a value."""
        plain = isinstance(key, yaml.ScalarNode) and key.style is None and value.value == "" and value.style is None
        name, sign, text = key.value.partition(":") if plain else ("", "", "")
        if not (name and sign and text):
            return key, value
        spaced: Any = yaml.compose(f"{{{name}: {text}}}", Loader)
        ((new_key, new_value),) = spaced.value
        new_key.start_mark = key.start_mark
        return new_key, new_value

    date = "tag:yaml.org,2002:timestamp"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != date]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    power = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{power.pattern})$"), list("-+.0123456789"))
    return Loader
