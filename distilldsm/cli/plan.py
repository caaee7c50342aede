"""`distilldsm plan`: show the decisions that are made from a data set, and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from distilldsm.core.errors import DataError

if TYPE_CHECKING:
    from distilldsm.data.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directory", metavar="DIR", help="a preprocessed or model directory, or a downloaded data set")
    parser.add_argument("--params", default="params.yaml", help="for a data set without a plan (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Show a plan. For a data set without one, show the plan that preprocessing would make."""
    from distilldsm.core.mapping import to_mapping

    found = _find_plan(Path(args.directory), args.params)
    if args.json:
        print(json.dumps(to_mapping(found), indent=2))
        return

    def row(key: str, value: object, reason: str | None = None) -> None:
        print(f"{key:20}{value}" + (f"  ({reason})" if reason else ""))

    reasons = dict(found.reasons)
    row("data set", found.name)
    row("labels", ", ".join(f"{v} {n}" for n, v in zip(found.class_names, found.class_values, strict=True)))
    if found.regions:
        row("regions", found.targets.describe_regions())
    row("depth axis", found.depth_axis, reasons.get("depth_axis"))
    row("spacing", f"{_sizes(found.target_spacing_mm)} mm", reasons.get("target_spacing_mm"))
    row("coarse slices", "yes" if found.coarse_slices else "no", reasons.get("coarse_slices"))
    row("crop to non-zero", "yes" if found.crop_to_nonzero else "no")
    row("median shape", f"{_sizes(found.median_shape)} voxels")
    row("patch", f"{_sizes(found.patch_size)} voxels", reasons.get("patch_size"))
    row("batch", found.batch_size, reasons.get("batch_size"))
    row("training memory", f"about {found.training_memory_gb:g} GB")
    training = found.training
    row("budget", f"{training.budget:g} voxels")
    row("patches", f"{training.patches:,}", reasons.get("patches"))
    row("epochs", training.epochs, reasons.get("epochs"))
    row("foreground", training.foreground_oversampling, reasons.get("foreground_oversampling"))
    row("learning rate", training.learning_rate, reasons.get("learning_rate"))
    row("EMA decay", training.ema_decay, reasons.get("ema_decay"))
    row("rotation", f"{training.rotation_deg:g} degrees", reasons.get("rotation_deg"))
    row("largest component", ", ".join(training.keep_largest) or "none", reasons.get("keep_largest"))
    for channel, rule in zip(found.channels, found.normalisation, strict=True):
        row(f"{channel.name} ({channel.modality})", rule.scheme, reasons.get(f"normalisation.{channel.name}"))
    print("sizes and spacings are (depth, height, width)")


def _sizes(values: tuple[float, ...]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _find_plan(directory: Path, params: str) -> Plan:
    from distilldsm.data.dataset import INDEX, DatasetIndex
    from distilldsm.data.plan import Plan, make_plan

    if (directory / "plan.json").is_file():
        return Plan.load(directory / "plan.json")
    if not (directory / INDEX).is_file():
        raise DataError(
            "holds neither a plan nor a data set",
            where=directory,
            seen="no such directory" if not directory.is_dir() else None,
            rule=f"a directory with plan.json or {INDEX}",
            hint="give data/preprocessed, a model directory, or data/raw",
        )
    from distilldsm.config import Params, load_params
    from distilldsm.core.progress import progress
    from distilldsm.data.fingerprint import fingerprint_case

    loaded = load_params(params) if Path(params).is_file() else Params()
    config = loaded.preprocess
    if config.plan:
        return Plan.load(config.plan)
    index = DatasetIndex.load(directory)
    cases = progress(index.cases, total=len(index.cases), title="fingerprint", unit="case")
    return make_plan(
        index, [fingerprint_case(directory, case, index) for case in cases], config, budget=loaded.train.budget
    )
