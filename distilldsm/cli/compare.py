"""`distilldsm compare`: show several trainings side by side."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import sys
from functools import partial
from pathlib import Path

from distilldsm.core.errors import ConfigError

DESCRIPTION = (
    "Show means and standard deviations over cases and folds. A paired Wilcoxon test compares each training with the "
    "first one: one pair per patient, Holm-corrected, over the cases that all trainings were scored on."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "trainings",
        metavar="NAME=DIR[,DIR...]",
        nargs="+",
        help="a cross_validation, an evaluated fold, or a folder of them, e.g. distill=runs/distill/cross_validation",
    )
    parser.add_argument(
        "--postprocessed",
        action="store_true",
        help="use the scores after post-processing, which the other folds decide (cross-validations only)",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="also write comparison.csv, costs.csv, comparison.png")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a folder is not an evaluated fold, or the trainings share no case, or its true masks differ.
    """
    from distilldsm.evaluation import comparison
    from distilldsm.evaluation.tables import write_csv
    from distilldsm.evaluation.trainings import load_training

    named = [_named(text) for text in args.trainings]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigError("a name is used twice", seen=", ".join(names))
    if len(named) < 2:
        raise ConfigError("there is nothing to compare it with", seen=names[0], rule="two trainings or more")
    load = partial(load_training, postprocessed=args.postprocessed)
    trainings = [load(name, directories) for name, directories in named]
    rows, costs = comparison.compare(trainings), comparison.cost_rows(trainings)
    for line in comparison.unmatched(trainings):
        print(f"compare: {line}: not scored in all trainings", file=sys.stderr)
    for line in comparison.scored_differently(trainings):
        print(f"compare: {line}", file=sys.stderr)
    if args.output:
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        comparison.write_comparison(rows, output / "comparison.csv")
        write_csv(output / "costs.csv", costs)
        comparison.draw(trainings, output / "comparison.png")
    if args.json:
        print(json.dumps({"scores": [dataclasses.asdict(row) for row in rows], "costs": costs}, indent=2))
    else:
        print(comparison.format_comparison(rows))
        print(comparison.format_costs(costs))


def _named(text: str) -> tuple[str, list[Path]]:
    """Split NAME=DIR,DIR into the name and the folders; DIR may hold shell patterns."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ConfigError("does not name a training", seen=text, rule="NAME=DIR or NAME=DIR,DIR")
    folders = [Path(folder) for part in value.split(",") for folder in sorted(glob.glob(part)) or [part]]
    return name, folders
