"""`distilldsm compose`: write a checked params.yaml from presets and single values. Comments in it are kept."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilldsm.core.shipped import shipped

SCHEMA = "params.schema.json"
"""Its name in the folder of the presets."""
WRITTEN_BY = "# Written by: "
_HEAD = ("# yaml-language-server: ", WRITTEN_BY, "# What each parameter means: ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="e.g. dataset=hippocampus train.epochs=5")
    parser.add_argument("-o", "--output", default="params.yaml", help="file to write, - for stdout (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="start from the existing file instead of the defaults")
    parser.add_argument("--conf", default="conf", help="directory of the presets (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Apply presets and values to the defaults, or to an existing `params.yaml`; check the result, then write it.

    Raises:
        ConfigError: a preset or a value cannot be used; the error names the file or the assignment.
        UserError: the file cannot be written.
    """
    from distilldsm.config.presets import Overlay, compose
    from distilldsm.config.reference import as_yaml
    from distilldsm.core.errors import ConfigError
    from distilldsm.core.files import write_text
    from distilldsm.core.mapping import load_yaml

    path, kept = Path(args.output), None
    if args.keep:
        hint = "leave --keep out, or run this where params.yaml lies"
        kept = Overlay(name=args.output, values=load_yaml(path, hint=hint))
    values = compose(shipped(args.conf), args.overrides, kept=kept)
    if args.output == "-":
        print(as_yaml(values), end="")
        return
    try:
        held, lines = load_yaml(path), path.read_text(encoding="utf-8").splitlines()
    except ConfigError:  # there is no such file, or it is not valid YAML: there is nothing to keep
        held, lines = {}, []
    if kept or values.keys() <= held.keys():
        text = _changed("\n".join(line for line in lines if not line.startswith(_HEAD)) + "\n", held, values)
    else:
        text = as_yaml(values)
    earlier = [line for line in lines if line.startswith(WRITTEN_BY)] if args.keep else []
    write_text(path, _head(args, earlier) + text)
    print(f"{args.output}: {shlex.join(args.overrides) or 'the defaults'}")
    named = {override.partition("=")[0] for override in args.overrides}
    if "download.source" in named and not args.keep and "dataset" not in named:
        print("The training settings are those of the sample; for your own data add dataset=custom", file=sys.stderr)


def _head(args: argparse.Namespace, earlier: list[str]) -> str:
    """The first lines of the file: its schema, and the commands that made it, one per line, ready for a shell."""
    command = shlex.join(["distilldsm", "compose", *(["--keep"] if args.keep else []), *args.overrides])
    # A line break within a value would end the comment.
    line = WRITTEN_BY + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in command)
    schema = Path(os.path.relpath(shipped(args.conf) / SCHEMA, Path(args.output).parent)).as_posix()
    written = earlier if earlier[-1:] == [line] else [*earlier, line]
    return "\n".join([f"{_HEAD[0]}$schema={schema}", *written, f"{_HEAD[2]}distilldsm params", ""])


def _changed(text: str, held: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Change the YAML `text` from the values `held` to `values`; comments are kept."""
    import yaml as plain_yaml
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    editor = YAML()  # ruamel's round-trip loader: plain values and comments, no objects
    editor.preserve_quotes, editor.width = True, 10**9
    editor.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    changed = io.StringIO()
    try:
        root = editor.load(text)
        _update(editor, root, held, values)
        editor.dump(root, changed)
        if plain_yaml.safe_load(changed.getvalue()) == values:
            return changed.getvalue()
    except (YAMLError, AttributeError):  # the text is valid in YAML 1.1, but not in 1.2
        pass
    return plain_yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def _update(editor: Any, node: Any, held: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Change ruamel's mapping `node` from `held` to `values`; unchanged entries keep their form."""
    from distilldsm.config.reference import flow_yaml

    for key in held.keys() - values.keys():
        del node[key]
    for key, value in values.items():
        before = held.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and not node[key].fa.flow_style():
            _update(editor, node[key], before, value)
        elif key not in held or before != value:
            node[key] = editor.load(flow_yaml(value))
