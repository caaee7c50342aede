"""The command `distilldsm publish`: send output directories to MLflow."""

from __future__ import annotations

import argparse
from pathlib import Path

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.text import one_line

DESCRIPTION = "Send to MLflow what it does not hold yet of finished and unfinished outputs. Nothing is sent twice."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        type=Path,
        nargs="*",
        metavar="DIR",
        help="an output, or a folder of outputs (default: models, evaluation, export and cross_validation, "
        "here and in the folders below)",
    )
    parser.add_argument("--to", metavar="URI", help="address of another MLflow store than the outputs were made for")


def run(args: argparse.Namespace) -> None:
    """Publish outputs, and print a line for each.

    Raises:
        UserError: a folder holds no output, or MLflow did not accept something.
    """
    from distilldsm.tracking import FILE
    from distilldsm.tracking.addresses import use
    from distilldsm.tracking.publish import known_outputs, publish_all

    outputs = [] if args.directories else known_outputs()
    for directory in args.directories:
        below = sorted(path.parent for path in directory.rglob(FILE))
        if not below:
            raise DataError(
                "holds no output of a stage",
                where=directory,
                seen=f"no {FILE}",
                hint="name an output, e.g. models/fold0",
            )
        outputs += below
    if not outputs:
        print("there is no output to publish: run this where params.yaml is, or name the outputs")
    left = []
    for outcome in publish_all(outputs, to=args.to and use(args.to)):
        problems = "; ".join(outcome.problems)
        done = "published" if outcome.is_complete else "published so far; it is not finished"
        print(f"{one_line(outcome.directory)}: {problems or outcome.registration or done}")
        for note in outcome.notes:
            print(f"{one_line(outcome.directory)}: {note}")
        if problems:
            left.append(str(outcome.directory))
    if left:
        raise UserError(
            "not everything could be published",
            where=", ".join(left),
            hint="fix the problems in the lines above, then run the same command again",
        )
