"""`distilldsm compose`: presets and single values to a checked params.yaml. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.core.assignments import read_assignment
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import load_yaml, mapping_at
from distilldsm.core.shipped import shipped

FREE_FORM = ("options", "modalities", "bounds", "sample", "regions", "pattern")
"""Mappings that a preset replaces as a whole: the options of one network mean nothing to another."""
NAMED_FREELY = ("modalities", "bounds", "regions", "pattern")
"""Mappings that an assignment replaces as a whole: the names in them are the user's own."""
WRITTEN_BY = "# Written by: "


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one place sets; later layers win."""

    name: str
    """The file, as the user would name it; empty for the command line."""
    values: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="e.g. dataset=hippocampus train.epochs=5")
    parser.add_argument("-o", "--output", default="params.yaml", help="file to write, - for stdout (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="change what the file holds instead of the defaults")
    parser.add_argument("--conf", default="conf", help="directory of the presets (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Presets and values on the defaults, or on what `params.yaml` holds; what comes out is checked, then written.

    Raises:
        ConfigError: a preset or a value cannot be used; names the file or the assignment.
        UserError: the file cannot be written.
    """
    from distilldsm.config import Params
    from distilldsm.core.files import write_text
    from distilldsm.core.mapping import from_mapping

    conf = shipped(args.conf)
    if not (conf / "config.yaml").is_file():
        raise ConfigError("holds no config.yaml", where=args.conf, hint="run this where conf/ is, or give --conf")
    presets, assignments = _parted(conf, args.overrides)
    if args.keep:
        hint = "leave --keep out, or run this where params.yaml lies"
        layers = [Layer(name=args.output, values=load_yaml(args.output, hint=hint))]
        layers += [_preset(conf, group, name) for group, names in presets for name in names]
        values: dict[str, Any] = copy.deepcopy(dict(layers[0].values))
        for layer in layers[1:]:
            _merge(values, layer.values)
    else:
        layers, values = _layers(conf, dict(presets)), _composed(conf, dict(presets))
    for assignment in assignments:
        layers.append(_assign(values, assignment))
    try:
        from_mapping(Params, values)
    except ConfigError as error:
        raise _named(error, layers) from None
    text = _yaml(values)
    if args.output == "-":
        print(text, end="")
        return
    write_text(Path(args.output), f"{_head(args)}{text}")
    print(f"{args.output}: {shlex.join(args.overrides) or 'the defaults'}")
    named = {override.partition("=")[0] for override in args.overrides}
    if "download.source" in named and not args.keep and "dataset" not in named:
        print("The training is the sample's; for data of your own: dataset=custom", file=sys.stderr)


def _parted(conf: Path, overrides: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """(group, names) of the presets, and the assignments, each as they were given."""
    presets, assignments = [], []
    for override in overrides:
        key, _, value = override.partition("=")
        sign, bare = key[:1], key.lstrip("+~")
        if sign in ("+", "~"):
            raise ConfigError(
                f"a parameter is set without '{sign}'",
                where="compose",
                seen=override,
                rule="KEY=VALUE",
                hint=f"{bare}={value or 'VALUE'}" if sign == "+" else "leave it out, or set it to another value",
            )
        if re.fullmatch(r"\w[\w-]*", key) and (conf / key).is_dir():
            presets.append((key, [name.strip() for name in value.strip("[]").split(",")]))
        else:
            assignments.append(override)
    return presets, assignments


def _layers(conf: Path, presets: Mapping[str, Sequence[str]]) -> list[Layer]:
    """What Hydra composes, file by file, to tell which of them holds a mistake."""
    base = dict(load_yaml(conf / "config.yaml"))
    defaults = [entry for entry in base.pop("defaults", None) or () if isinstance(entry, Mapping)]
    chosen = {str(group): [str(name)] for entry in defaults for group, name in entry.items() if name is not None}
    files = [(group, name) for group, names in {**chosen, **presets}.items() for name in names]
    return [
        Layer(name=str(conf / "config.yaml"), values=base),
        *(_preset(conf, group, name) for group, name in files if (conf / group).is_dir()),
    ]


def _preset(conf: Path, group: str, name: str) -> Layer:
    path = conf / group / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (conf / group).glob("*.yaml")))
        raise ConfigError("no such preset", where=conf / group, seen=name, rule=known)
    values = load_yaml(path)
    text = path.read_text(encoding="utf-8")
    if not re.match(r"\s*#\s*@package +\S+[ \t]*(\n|$)", text):  # where Hydra looks for it: before other comments
        raise ConfigError(
            "lacks its first line `# @package _global_`",
            where=path,
            seen=next(iter(text.splitlines()), "an empty file"),
            rule=f"without it its keys would lie below '{group}'",
            hint="put that line at the top",
        )
    return Layer(name=str(path), values=values)


def _composed(conf: Path, presets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # Hydra gets the presets only: its grammar of values is another than that of params.yaml. In quotes, 501 is a name.
    overrides = [
        f"{group}='{names[0]}'" if len(names) == 1 else f"{group}={json.dumps(names)}"
        for group, names in presets.items()
    ]
    try:
        with hydra.initialize_config_dir(config_dir=str(conf.resolve()), version_base="1.3"):
            composed = hydra.compose(config_name="config", overrides=overrides)
            _refuse_environment(OmegaConf.to_container(composed), conf)
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            "cannot be composed",
            where=conf,
            seen=" ".join(lines)[:600],
            hint="correct the preset told; its keys are those of params.yaml",
        ) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _refuse_environment(value: Any, conf: Path) -> None:
    """No preset may bring a variable of the environment, such as a password, into params.yaml."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _refuse_environment(inner, conf)
    elif isinstance(value, str) and "oc.env" in value:
        raise ConfigError(
            "a preset reads the environment",
            where=conf,
            seen=value,
            rule="what params.yaml holds is written to many files",
            hint="write the value itself; secrets stay in the environment",
        )


def _merge(base: dict[str, Any], preset: Mapping[str, Any]) -> None:
    for key, value in preset.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict) and key not in FREE_FORM:
            _merge(base[key], value)
        else:
            base[key] = value


def _assign(values: dict[str, Any], assignment: str) -> Layer:
    """Carry out one assignment on `values`; a mapping changes what it names of the one that is there."""
    if "${" in assignment:
        raise ConfigError(
            "a value refers to another",
            where="compose",
            seen=assignment,
            rule="${...} is for presets",
            hint="give the value itself",
        )
    keys, value = read_assignment(assignment, where="compose")
    inner = mapping_at(values, keys[:-1], assignment, where="compose")
    there = inner.get(keys[-1])
    if isinstance(value, dict) and isinstance(there, dict) and value and keys[-1] not in NAMED_FREELY:
        _merge(there, value)
    else:
        inner[keys[-1]] = value
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    return Layer(name="", values=nested)


def _named(error: ConfigError, layers: Sequence[Layer]) -> ConfigError:
    """The error, with the file that set what it is about in front of the key."""
    section = (error.where or "").lstrip(".")
    named = re.match(r"(?:unknown )?(?:parameter )?'([\w.]+)'", error.problem)
    key = ".".join(filter(None, [section, named.group(1) if named else ""]))
    keys = re.sub(r"\[\d+\]", "", key).split(".")
    file, known = next(
        (layer.name, length)
        for length in range(len(keys), -1, -1)
        for layer in reversed(layers)
        if _sets(layer, keys[:length])
    )
    where = ": ".join(filter(None, [file, key if known == len(keys) else section])) or "compose"
    return ConfigError(error.problem, where=where, seen=error.seen, rule=error.rule, hint=error.hint)


def _sets(layer: Layer, keys: Sequence[str]) -> bool:
    inner: Any = layer.values
    for key in keys:
        if not (isinstance(inner, Mapping) and key in inner):
            return False
        inner = inner[key]
    return True


def _head(args: argparse.Namespace) -> str:
    """The commands that made the file, each in a line that a shell understands."""
    command = shlex.join(["distilldsm", "compose", *(["--keep"] if args.keep else []), *args.overrides])
    earlier = []
    if args.keep:
        for line in Path(args.output).read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            if line.startswith(WRITTEN_BY):
                earlier.append(line)
    # A line break within a value would end the comment.
    line = WRITTEN_BY + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in command)
    if earlier[-1:] != [line]:
        earlier.append(line)
    return "\n".join([*earlier, "# What each parameter means: distilldsm params", ""])


def _yaml(values: dict[str, Any]) -> str:
    """YAML with a line per parameter and lists in one line, as in the shipped params.yaml."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def in_one_line(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    Dumper.add_representer(list, in_one_line)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)
