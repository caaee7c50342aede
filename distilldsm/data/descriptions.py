"""Reads a data set's `dataset.json`: channels, labels, regions. Errors name the file and how to fix it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilldsm.config import Modality
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.data.dataset import Channel
from distilldsm.data.targets import Region


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark first
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "cannot be read as JSON", where=path, seen=str(error), hint="correct it, or get the data set again"
        ) from None
    if not isinstance(value, dict):
        raise DataError("must hold a JSON object", where=path, seen=type(value).__name__)
    return value


def need(description: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """The entry `key`: a dictionary or list (`kind`) that is not empty.

    Raises:
        DataError: the entry is missing, empty or of another type.
    """
    value = description.get(key)
    if not isinstance(value, kind) or not value:
        form = "an object" if kind is dict else "a list"
        raise DataError(
            f"'{key}' is missing or has the wrong form",
            where=path,
            seen=repr(value)[:100],
            rule=f"{form} with at least one entry",
            hint=f"add '{key}' as described for this format",
        )
    return value


def text(description: Mapping[str, Any], *keys: str) -> str | None:
    """The first of these entries that is not empty, as text."""
    return next((str(description[key]) for key in keys if description.get(key)), None)


def channels_of(numbered: Mapping[str, Any], path: Path, key: str) -> tuple[Channel, ...]:
    """Channels from {"0": "T2", "1": "ADC"}. If names are equal, their number is added."""
    if {str(number) for number in numbered} != {str(k) for k in range(len(numbered))}:
        raise DataError(
            f"'{key}' must number the channels from 0", where=path, seen=", ".join(map(str, numbered)) or "nothing"
        )
    names = [str(numbered[str(k)]) for k in range(len(numbered))]
    return tuple(
        Channel(name=name if names.count(name) == 1 else f"{name}_{k}", modality=modality_of(name))
        for k, name in enumerate(names)
    )


def labels_of(labels: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Name to value, from either {"0": "background"} or {"background": 0}, without nnU-Net's `ignore`.

    Raises:
        DataError: a name or value appears twice, a value is not a whole number from 0 to 255, or there is no label
            besides background.
    """
    values = _named(labels, path)
    zero = next((name for name, value in values.items() if value == 0), None)
    if zero is None:
        values = {"background": 0, **values}
    elif zero != "background":
        values["background"] = values.pop(zero)
    distinct = len(set(values.values())) == len(values) and all(0 <= v <= 255 for v in values.values())
    classes = {name: value for name, value in values.items() if name != "ignore"}
    if not distinct or len(classes) < 2:
        rule = "distinct values from 0 to 255, at least one besides background"
        raise DataError("'labels' are impossible", where=path, seen=values, rule=rule)
    return classes


def ignored_of(labels: Mapping[str, Any], path: Path) -> int | None:
    """The value of nnU-Net's label `ignore`; None if it is not declared.

    Raises:
        DataError: see `labels_of`.
    """
    return _named(labels, path).get("ignore") or None


def _named(labels: Mapping[str, Any], path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError("names several values for one label", where=path, seen=f"{key}: {value}")
        name, number = (value, key) if isinstance(value, str) and not value.isdigit() else (key, value)
        if not re.fullmatch(r"\d{1,9}", str(number)):
            raise DataError("'labels' must pair names and whole numbers", where=path, seen=f"{key}: {value}")
        if str(name) in found:
            raise DataError("a name appears twice in 'labels'", where=path, seen=name)
        found[str(name)] = int(number)
    return found


def modality_of(name: str) -> Modality:
    """Modality, guessed from a channel's name. It decides the normalisation."""
    lowered = name.lower()
    if re.search(r"\bct\b|^ct", lowered):
        return "CT"
    if re.search(r"pet", lowered):
        return "PET"
    if re.search(r"ultrasound|\bus\b", lowered):
        return "US"
    if re.search(r"mr|t1|t2|flair|adc|dwi", lowered):
        return "MRI"
    return "other"


def split_regions(
    labels: Mapping[str, Any], description: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], tuple[Region, ...]]:
    """Plain labels and regions from nnU-Net's `labels`. An entry with a list of values is a region.

    `regions_class_order` gives, for each region, the value that masks hold for it. A value without its own name is
    called `label_<value>`.

    Raises:
        DataError: a list holds something other than values above 0, or `regions_class_order` does not fit.
    """
    if not any(isinstance(value, list) for value in labels.values()):
        return dict(labels), ()
    unions = {
        name: tuple(value) if isinstance(value, list) else (value,)
        for name, value in labels.items()
        if name not in ("background", "ignore")
    }
    order = description.get("regions_class_order")
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for values in unions.values() for v in values)
    if not whole or not isinstance(order, list) or len(order) != len(unions):
        raise DataError(
            "'regions_class_order' does not fit the regions in 'labels'",
            where=path,
            seen=f"labels {dict(labels)}, regions_class_order {order}",
            rule="labels hold whole numbers above 0; the order holds one of them per region",
        )
    named = {values[0]: name for name, values in unions.items() if len(values) == 1}
    values = sorted({value for union in unions.values() for value in union})
    try:
        regions = tuple(
            Region(name=name, values=union, written_as=value)
            for (name, union), value in zip(unions.items(), order, strict=True)
        )
    except ConfigError as error:
        raise DataError(error.problem, where=path, seen=error.seen, rule=error.rule) from None
    plain = {named.get(value, f"label_{value}"): value for value in values}
    return {key: labels[key] for key in ("ignore",) if key in labels} | {"background": 0} | plain, regions
