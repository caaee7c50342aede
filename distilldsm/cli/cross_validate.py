"""`distilldsm cross-validate`: train and evaluate every fold, and write one table of all folds."""

from __future__ import annotations

import argparse
from pathlib import Path

from distilldsm.core.assignments import add_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_parameters(parser)
    parser.add_argument("--folds", type=int, nargs="+", metavar="FOLD", help="default: all folds of the split")
    parser.add_argument(
        "--jobs", type=int, default=1, help="folds that run at a time; they share the cores (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for models/, evaluation/, cross_validation/, logs/",
    )
    parser.add_argument(
        "--ensemble",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="the --output folders of earlier calls: train nothing, and score the averaged output of their networks",
    )


def run(args: argparse.Namespace) -> None:
    """Run the folds."""
    from distilldsm.pipeline import all_folds

    all_folds.run(args.params, args.set, args.folds, args.jobs, args.output, args.ensemble)
