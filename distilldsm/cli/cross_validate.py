"""`distilldsm cross-validate`: every fold is trained and evaluated, then they go into one table."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
    parser.add_argument("--folds", type=int, nargs="+", metavar="FOLD", help="default: all of the split")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time; they share the cores (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="holds models/, evaluation/, cross_validation/, logs/",
    )
    parser.add_argument(
        "--ensemble",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="--output of earlier calls: train nothing, score the mean of their networks",
    )


def run(args: argparse.Namespace) -> None:
    """Run the folds."""
    from distilldsm.pipeline import all_folds

    all_folds.run(args.params, args.set, args.folds, args.jobs, args.output, args.ensemble)
