"""`distilldsm budget`: measure this machine, and turn a time into a value of `train.budget`."""

from __future__ import annotations

import argparse

from distilldsm.core.assignments import add_parameters

EPILOG = "Freeze the number for all folds: distilldsm compose --keep train.budget=NUMBER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("time", metavar="TIME", help='time of one training, e.g. "60 min", "2 h"')
    add_parameters(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for (default: %(default)g)")


def run(args: argparse.Namespace) -> None:
    """Print the number of voxels that a training with these parameters sees in the time."""
    from pathlib import Path

    from distilldsm.config import Params, load_params
    from distilldsm.config.presets import set_values
    from distilldsm.core.mapping import from_mapping
    from distilldsm.core.progress import seconds_of

    seconds = seconds_of(args.time, where="TIME")
    values = set_values({}, args.set)
    params = load_params(args.params, args.set) if Path(args.params).is_file() else from_mapping(Params, values)
    from distilldsm.core.cost import machine
    from distilldsm.training.speed import voxels_in

    voxels = voxels_in(params.train, seconds, measured_s=args.seconds)
    about = machine()
    print(f"{params.train.model.name} on {about['device_name']}, {about['threads']} threads: {voxels / seconds:.3g}/s")
    print(f"train.budget={voxels:.2g}")
