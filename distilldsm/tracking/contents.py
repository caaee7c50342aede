"""Readers for the files that publishing sends: metrics of an epoch, lines of samples, tables."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distilldsm.tracking.values import plain


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings, names joined: `{"val_dice": {"core": 0.5}}` becomes `val_dice_core`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{key}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per line. Incomplete lines, left by a killed process, are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and {"time_ms", "step", "values"} <= set(row):
                yield row


def table_of(path: Path) -> dict[str, Any]:
    """A CSV file in MLflow's table format: numbers and text; empty cells, NaN and infinities become null."""
    with open(path, newline="", encoding="utf-8") as stream:
        columns, *rows = csv.reader(stream)
    return {"columns": columns, "data": [[_cell(text) for text in row] for row in rows]}


def _cell(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return plain(kind(text))
    return text or None
