"""`distilldsm summary`: scores per label of evaluated folds, and over the folds where there are several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distilldsm.core.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directories", metavar="DIR", nargs="*", help="default: evaluation/fold*")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """The table of scores per label of evaluated folds, and over the folds where there are several."""
    from distilldsm.core.files import read_json
    from distilldsm.evaluation.tables import format_table

    directories = [Path(d) for d in args.directories] or sorted(
        path.parent for path in Path("evaluation").glob("fold*/summary.json")
    )
    if not directories:
        raise DataError("no evaluated fold", where="evaluation", hint="run dvc repro, or name the directories")
    found = {str(d): read_json(d / "summary.json") for d in directories}
    for directory, table in found.items():
        if not (isinstance(table, dict) and {"labels", "mean"} <= table.keys()):
            raise DataError("is no summary of an evaluation", where=Path(directory) / "summary.json")
    together = Path("cross_validation")
    summed_up = None if args.directories or not (together / "summary.json").is_file() else _summed_up(together)
    if args.json:
        print(json.dumps(found if summed_up is None else {**found, str(together): summed_up}, indent=2))
        return
    for directory, table in found.items():
        print(format_table(table, directory))
    if summed_up is not None and len(summed_up["folds"]) > 1:
        from distilldsm.evaluation.fold_table import format_table as format_folds

        print(format_folds(summed_up, str(together)))
    elif len(found) > 1:
        print(_over_folds(list(found.values())))


def _summed_up(directory: Path) -> dict[str, Any] | None:
    """The table over the folds; None where a fold was evaluated again, or is gone, since it was made."""
    from distilldsm.core.files import read_json
    from distilldsm.core.output_directory import MANIFEST, content_hash

    table = read_json(directory / "summary.json")
    inputs = read_json(directory / MANIFEST)["inputs"]
    folds = {fold: Path(f"evaluation/fold{fold}") for fold in table["folds"]}
    same = all(path.is_dir() and inputs[f"evaluation{fold}"] == content_hash(path) for fold, path in folds.items())
    return table if same else None


def _over_folds(tables: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation of the folds' mean Dice, per label that all folds have."""
    from distilldsm.evaluation.fold_table import number, spread

    labels = [label for label in tables[0]["labels"] if all(label in table["labels"] for table in tables)]
    width = max(len(label) for label in [*labels, "label"]) + 2
    lines = [f"over {len(tables)} folds", f"{'label':{width}}{'Dice':>8}{'sd':>8}"]
    for label in labels:
        mean, sd, _ = spread(table["labels"][label]["dice"]["mean"] for table in tables)
        lines.append(f"{label:{width}}{number(mean):>8}{number(sd):>8}")
    return "\n".join(lines)
