"""`distilldsm predict`: from scans to masks in the scans' own geometry. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.interruption import explains_interrupt
from distilldsm.core.progress import beside_the_bar, progress
from distilldsm.core.text import one_line

if TYPE_CHECKING:
    from distilldsm.inference.job import Job, Settings
    from distilldsm.inference.loading import Runtime
    from distilldsm.inference.predict import Predictor
    from distilldsm.io.scan import Scan, Skipped

ENGINES: Mapping[Runtime, str] = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
"""Maps each engine to the package that it needs; the preferred engine comes first."""


DESCRIPTION = "Segment scans; each mask is on its scan's own grid. Research software, not a medical device."
EPILOG = "exit codes: 0 all scans are done, 1 a scan could not be predicted, 2 usage. See docs/predict.md."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model_dir",
        metavar="MODEL",
        help="what the export stage wrote, e.g. export/fold0, or a name of `distilldsm models`",
    )
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="NIfTI scans, folders of NIfTI scans, folders of DICOM series, or folders of such folders; for several "
        "channels CASE_0000.nii.gz and so on, a 4-D file, or the files of one scan in the model's order",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="a file for one scan, a directory for several scans"
    )
    parser.add_argument(
        "--format",
        choices=("nifti", "seg"),
        help="format of the masks: nifti, or seg (DICOM SEG, the default for DICOM input)",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write NAME_probabilities.nii.gz: (X, Y, Z, classes), uint8 scaled to 0..1",
    )
    parser.add_argument(
        "--volumes", metavar="FILE", help="write the volume of each label and region in ml, to a .json or .csv file"
    )
    parser.add_argument(
        "--ensemble",
        metavar="MODEL",
        action="append",
        default=[],
        help="a further model, e.g. another fold; repeatable; the outputs of all models are averaged",
    )
    parser.add_argument(
        "--mirror",
        metavar="AXES",
        help="also average over mirrored views: 'trained' for the axes that were flipped in training, or "
        "some of depth,height,width; takes 2^axes times as long",
    )
    parser.add_argument(
        "--postprocess",
        action="store_true",
        help="keep only the largest connected component of those labels that this improved on the held-out cases",
    )
    parser.add_argument(
        "--engine", choices=tuple(ENGINES), help="software that runs the network (default: the first that is installed)"
    )
    parser.add_argument(
        "--precision",
        choices=("f32", "auto", "int8"),
        default="f32",
        help="precision of OpenVINO: f32 (default); auto: bf16 if the CPU supports it, some voxels may differ; int8: "
        "the quantised model, if the export shipped it",
    )
    parser.add_argument(
        "--max-memory",
        metavar="GB",
        type=float,
        help="memory limit (default: 3, or half of the available memory if that is less)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse scans that are unlike the training data (default: a remark)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON report")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a scan failed; with several scans, the others are done first.
    """
    from distilldsm.core.machine import budget_bytes
    from distilldsm.inference.job import Settings
    from distilldsm.inference.loading import load_exported
    from distilldsm.inference.probabilities import parse_mirror
    from distilldsm.io.output import write_volumes
    from distilldsm.models.catalogue import model_directory

    memory = None if args.max_memory is None else budget_bytes(args.max_memory)
    engine: Runtime = args.engine or _installed_engine()
    predictor = load_exported(
        Path(args.model_dir),
        runtime=engine,
        precision=args.precision,
        fixed_size=True,
        ensemble=[Path(folder) for folder in args.ensemble],
        mirror=parse_mirror(args.mirror),
        postprocess=args.postprocess,
    )
    _remark(predictor, args)
    jobs, many, skipped = _plan_jobs(args, [channel.name for channel in predictor.plan.channels])
    made = many and not Path(args.output).exists()
    if made:
        Path(args.output).mkdir()
    settings = Settings(
        precision=args.precision,
        memory=memory,
        probabilities=args.probabilities,
        alone=not many,
        unlike=_comparison(model_directory(args.model_dir), args.strict),
        strict=args.strict,
    )
    done, failures = _run_jobs(jobs, predictor, settings, None if args.json else engine)
    if made and not done:
        with suppress(OSError):
            Path(args.output).rmdir()
    if args.volumes and done:
        write_volumes(Path(args.volumes), {row["scan"]: row["volume_ml"] for row in done})
    if args.json:
        rows = {
            "scans": done,
            "failures": [_failure(job, error) for job, error in failures],
            "skipped": [{"path": str(one.path), "reason": one.reason} for one in skipped],
        }
        print(json.dumps({**_described(predictor, args, engine), **rows}, indent=2))
    if failures and not many:
        raise failures[0][1]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} scans could not be predicted",
            seen=", ".join(job.input.name for job, _ in failures),
            hint="see the errors above; the other scans are done",
        )


def _comparison(model: Path, strict: bool) -> Callable[[Scan], Mapping[str, Mapping[str, float]]] | None:
    """Lists in what a scan is unlike the training data. None if the model holds no record of enough training cases."""
    from distilldsm.drift.run import TrainingCases

    try:
        return TrainingCases(model).unlike
    except DataError:
        if strict:
            raise
        return None


def _run_jobs(
    jobs: Sequence[Job], predictor: Predictor, settings: Settings, engine: Runtime | None
) -> tuple[list[dict[str, Any]], list[tuple[Job, UserError]]]:
    """What the report says of each scan that is done, and the errors of the others.

    engine: for a line about each scan; None prints none.
    """
    from distilldsm.inference.job import run_job

    many = not settings.alone
    done: list[dict[str, Any]] = []
    failures: list[tuple[Job, UserError]] = []
    with explains_interrupt(lambda: f"predict: {len(done)} of {len(jobs)} scans are done; a new run does them again"):
        for job in progress(jobs, total=len(jobs), title="predict", unit="scan") if many else jobs:
            try:
                done.append(run_job(job, predictor, settings))
                if engine is not None:
                    with beside_the_bar():
                        _print_line(done[-1], engine)
            except UserError as error:
                failures.append((job, error))
                if many:
                    with beside_the_bar():
                        print(f"error: {error}", file=sys.stderr)
    return done, failures


def _described(predictor: Predictor, args: argparse.Namespace, engine: Runtime) -> dict[str, Any]:
    """What the report says of the model."""
    regions = {region.name: region.values for region in predictor.plan.regions}
    return {
        "model": str(args.model_dir),
        "ensemble": args.ensemble,
        "engine": engine,
        "mirror": [list(member.mirror_axes) for member in predictor.network.members],
        "labels": dict(zip(predictor.plan.class_names, predictor.plan.class_values, strict=True)),
        **({"regions": regions} if regions else {}),
        "keep_largest": list(predictor.keep_largest),
    }


def _remark(predictor: Predictor, args: argparse.Namespace) -> None:
    """Warn of options that may not do what the user expects."""
    from distilldsm.data.targets import LARGEST_NOT_TRIED

    for folder, metadata, member in zip(
        (args.model_dir, *args.ensemble), predictor.models, predictor.network.members, strict=True
    ):
        unseen = [axis for axis in member.mirror_axes if axis not in metadata.network.mirror_axes]
        if unseen:
            print(f"{folder}: was not trained with flips along {', '.join(unseen)}", file=sys.stderr)
    if args.postprocess and not predictor.keep_largest:
        tried = predictor.plan.targets.largest
        why = "it brought no improvement on the held-out cases" if tried else LARGEST_NOT_TRIED
        print(f"--postprocess changes nothing: {why}", file=sys.stderr)


def _installed_engine() -> Runtime:
    from importlib.util import find_spec

    for engine, package in ENGINES.items():
        if find_spec(package) is not None:
            return engine
    raise UserError("no engine is installed", rule=" or ".join(ENGINES.values()), hint="pip install openvino")


def _plan_jobs(args: argparse.Namespace, names: list[str]) -> tuple[list[Job], bool, list[Skipped]]:
    """Plan the work, and refuse everything that can be refused before a scan is read."""
    from distilldsm.inference.job import Job
    from distilldsm.io.inputs import check_output, find_inputs, listed, output_path, refuse_input

    output = Path(args.output)
    paths = [Path(path) for path in args.inputs]
    scans, many, skipped = find_inputs(paths, len(names), names)
    if many and output.name.endswith((".nii", ".nii.gz", ".dcm")) and not output.is_dir():
        if len(scans) > 1:
            raise ConfigError(
                f"is a file name, but there are {len(scans)} scans",
                where=output,
                seen=listed([one.name for one in scans]),
                hint="give a directory",
            )
        many = False  # a folder of one scan
    parent = output if many and output.exists() else output.parent
    if not parent.is_dir():
        raise ConfigError(
            "is not a directory" if parent.exists() else "the directory of the output does not exist",
            where=parent,
            rule="a directory for several scans" if many else None,
            hint="give a directory" if parent.exists() else "make it first",
        )
    if many and any(path.is_dir() and output.resolve() == path.resolve() for path in paths):
        raise ConfigError("is the folder of the scans", where=output, hint="name another directory for the masks")
    every = [*paths, *(path for one in scans for path in one.paths)]
    jobs = []
    for one in scans:
        path, kind = output_path(one, output, many, args.format)
        job = Job(one, path, kind)
        check_output(one, path, kind, every)
        if args.probabilities:
            refuse_input(job.probabilities, every, "is an input")
        jobs.append(job)
    masks = {job.output for job in jobs}
    overwritten = next((job for job in jobs if args.probabilities and job.probabilities in masks), None)
    if overwritten is not None:
        raise ConfigError(
            "is the name of a mask and of probabilities",
            where=overwritten.probabilities,
            seen=str(overwritten.input.paths[0]),
            rule="one output file per name",
            hint="predict the scans one by one, or rename one",
        )
    if args.volumes:
        volumes = Path(args.volumes)
        if volumes.suffix not in (".json", ".csv") or not volumes.parent.is_dir():
            raise ConfigError(
                "cannot hold the volumes", where=volumes, rule="a .json or .csv file in an existing directory"
            )
        refuse_input(volumes, every, "is an input")
        if not os.access(volumes if volumes.exists() else volumes.parent, os.W_OK):
            raise UserError("cannot be written", where=volumes, hint="name a file that you may write")
    return jobs, many, skipped


def _failure(job: Job, error: UserError) -> dict[str, Any]:
    said = {name: getattr(error, name) for name in ("where", "problem", "seen", "rule", "hint")}
    return {"scan": job.input.name, **said, "seen": None if error.seen is None else str(error.seen)}


def _print_line(row: dict[str, Any], engine: str) -> None:
    volumes = ", ".join(f"{name} {ml:.3g} ml" for name, ml in row["volume_ml"].items())
    print(f"{one_line(row['mask'])}: {volumes} ({sum(row['seconds'].values()):.1f} s, {engine})")
