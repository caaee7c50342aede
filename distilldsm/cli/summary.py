"""`distilldsm summary`: show the scores of evaluated folds and of a cross-validation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json

TOGETHER = Path("cross_validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "directories", metavar="DIR", nargs="*", help="default: the folds of cv.folds and of cross-validate"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the table of each folder: scores per label of an evaluated fold, or over the folds of a cross-validation.

    Without folders, print the folds in `evaluation/` and the table over them. Folds that neither cv.folds nor the
    cross-validation holds are left over from earlier parameters: a line on stderr names them.

    Raises:
        DataError: there is no evaluated fold, or a folder holds no scores.
    """
    directories = [Path(d) for d in args.directories] or _evaluated()
    if not directories:
        raise DataError("no evaluated fold", where="evaluation", hint="run dvc repro, or name the directories")
    summaries = {str(directory): read_json(directory / "summary.json") for directory in directories}
    for directory, table in summaries.items():
        if not (isinstance(table, dict) and {"labels", "mean"} <= table.keys()):
            raise DataError("is not a summary of an evaluation", where=Path(directory) / "summary.json")
    if args.json:
        print(json.dumps(summaries, indent=2))
        return
    from distilldsm.evaluation import fold_table, tables

    of_folds = [table for table in summaries.values() if "folds" not in table]
    for directory, table in summaries.items():
        if "folds" not in table:
            print(tables.format_table(table, directory))
        elif len(table["folds"]) > 1 or args.directories:
            print(fold_table.format_table(table, directory))
    if len(of_folds) > 1 and len(of_folds) == len(summaries):
        print(_over_folds(of_folds))


def _evaluated() -> list[Path]:
    """The evaluated folds, and the cross-validation if it is of these."""
    from distilldsm.evaluation.trainings import folds_in

    return [*folds_in(Path("evaluation"), "summary.json"), *([TOGETHER] if _is_current(TOGETHER) else [])]


def _is_current(directory: Path) -> bool:
    """Whether there is a table over the folds, and no fold has been evaluated again or removed since."""
    from distilldsm.core.hashes import MANIFEST, content_hash

    if not (directory / "summary.json").is_file():
        return False
    inputs = read_json(directory / MANIFEST)["inputs"]
    folds = {fold: Path(f"evaluation/fold{fold}") for fold in read_json(directory / "summary.json")["folds"]}
    return all(path.is_dir() and inputs[f"evaluation{fold}"] == content_hash(path) for fold, path in folds.items())


def _over_folds(summaries: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation of the folds' mean Dice, for each label that all folds have."""
    from distilldsm.evaluation.metrics import METRICS
    from distilldsm.evaluation.statistics import spread
    from distilldsm.evaluation.tables import aligned, label_key

    dice = METRICS["dice"]
    lines = [("label", dice.heading, "sd")]
    for label in summaries[0]["labels"]:
        if all(label in one["labels"] for one in summaries):
            mean, sd, _ = spread([one["labels"][label]["dice"]["mean"] for one in summaries])
            lines.append((label_key(label), dice.text(mean), dice.text(sd)))
    return "\n".join([f"over {len(summaries)} folds", *aligned(lines)])
