"""`distilldsm predict`: scans in, masks in the scans' own geometry out. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from distilldsm.inference.inputs import Format, Input
    from distilldsm.inference.memory import Pieces
    from distilldsm.inference.predict import Predictor, Runtime
    from distilldsm.inference.scan import Scan
    from distilldsm.inference.streaming import NetworkImage, Piece

ENGINES: Mapping[Runtime, str] = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
"""Engine to the package it needs, in the order of preference."""


def add_predict(commands: Any) -> None:
    """Add the sub-command to a parser's sub-commands."""
    predict = commands.add_parser(
        "predict",
        help="scans to masks, on each scan's own grid",
        description="Scans to masks, on each scan's own grid. Research software, not a medical device.",
        epilog="exit codes: 0 all done, 1 some scan could not be predicted, 2 usage. docs/predict.md tells more.",
    )
    predict.add_argument("model_dir", metavar="MODEL", help="what the export stage wrote, e.g. export/fold0")
    predict.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="NIfTI scans, folders of them, DICOM series folders, or folders of such folders; for several channels "
        "CASE_0000.nii.gz and so on, a 4-D file, or one scan's files in the model's order",
    )
    predict.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="a file for one scan, a directory for several"
    )
    predict.add_argument(
        "--format",
        choices=("nifti", "seg"),
        help="of the masks: nifti, or seg (DICOM SEG, the default for DICOM input)",
    )
    predict.add_argument(
        "--probabilities",
        action="store_true",
        help="also write NAME_probabilities.nii.gz: (X, Y, Z, classes), uint8 scaled to 0..1",
    )
    predict.add_argument("--volumes", metavar="FILE", help="write the volume of each label, ml: .json or .csv")
    predict.add_argument(
        "--engine", choices=tuple(ENGINES), help="runs the network (default: openvino, else onnx, else torch)"
    )
    predict.add_argument(
        "--precision",
        choices=("f32", "auto", "int8"),
        default="f32",
        help="of OpenVINO: f32 (default); auto: bf16 where the CPU has it, some voxels may differ; int8: the quantised "
        "model, where the export found it worth while",
    )
    predict.add_argument(
        "--max-memory",
        metavar="GB",
        type=float,
        help="memory to stay within (default: 3, or half of what is available where that is less)",
    )
    predict.add_argument("--json", action="store_true", help="print a JSON report")


@dataclass(frozen=True)
class _Job:
    """One scan and where its results go."""

    input: Input
    output: Path
    format: Format

    @property
    def probabilities(self) -> Path:
        from distilldsm.inference.inputs import stem

        return self.output.with_name(f"{stem(self.output).removesuffix('.dcm')}_probabilities.nii.gz")


def predict(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: a scan failed; in a run over several the others are done first.
    """
    with _clean_up_when_terminated():
        _predict(args)


def _predict(args: argparse.Namespace) -> None:
    from distilldsm.inference.memory import budget_bytes
    from distilldsm.inference.predict import Predictor

    budget = budget_bytes(args.max_memory)
    engine: Runtime = args.engine or _installed_engine()
    predictor = Predictor.from_export(Path(args.model_dir), runtime=engine, precision=args.precision, fixed_size=True)
    jobs, many = _plan_jobs(args, [channel.name for channel in predictor.plan.channels])
    done: list[dict[str, Any]] = []
    failures: list[tuple[_Job, UserError]] = []
    for job in _tracked(jobs) if many else jobs:
        try:
            done.append(_predict_one(job, predictor, args, engine, budget, alone=not many))
            if not args.json:
                _print_line(done[-1], engine)
        except UserError as error:
            failures.append((job, error))
            if many:
                print(f"error: {error}", file=sys.stderr)
    if args.volumes and done:
        from distilldsm.inference.output import write_volumes

        write_volumes(Path(args.volumes), {row["scan"]: row["volume_ml"] for row in done})
    if args.json:
        plan = predictor.plan
        report = {
            "model": str(args.model_dir),
            "engine": engine,
            "labels": dict(zip(plan.class_names, plan.class_values, strict=True)),
            "scans": done,
            "failures": [_failure(job, error) for job, error in failures],
        }
        print(json.dumps(report, indent=2))
    if failures and not many:
        raise failures[0][1]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} scans could not be predicted",
            seen=", ".join(job.input.name for job, _ in failures),
            mend="see the errors above; the others are done",
        )


@contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """SIGTERM as an exception, so that temporary files go."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _installed_engine() -> Runtime:
    from importlib.util import find_spec

    for engine, package in ENGINES.items():
        if find_spec(package) is not None:
            return engine
    raise UserError("no engine is installed", rule=" or ".join(ENGINES.values()), mend="pip install openvino")


def _plan_jobs(args: argparse.Namespace, names: list[str]) -> tuple[list[_Job], bool]:
    """Everything that can be refused before any scan is read."""
    from distilldsm.inference.inputs import check_output, find_inputs, output_path, refuse_input

    output = Path(args.output)
    given = [Path(path) for path in args.inputs]
    found, many = find_inputs(given, len(names), names)
    parent = output if many and output.exists() else output.parent
    if not parent.is_dir():
        raise ConfigError(
            "is no directory" if parent.exists() else "the directory of the output does not exist",
            where=parent,
            rule="a directory for several scans" if many else None,
            mend="give a directory" if parent.exists() else "make it first",
        )
    if many and any(path.is_dir() and output.resolve() == path.resolve() for path in given):
        raise ConfigError("is the folder of the scans", where=output, mend="give the masks a directory of their own")
    every = [*given, *(path for one in found for path in one.paths)]
    jobs = []
    for one in found:
        path, kind = output_path(one, output, many, args.format)
        job = _Job(one, path, kind)
        check_output(one, path, kind, every)
        if args.probabilities:
            refuse_input(job.probabilities, every, "is an input")
        jobs.append(job)
    if args.volumes:
        volumes = Path(args.volumes)
        if volumes.suffix not in (".json", ".csv") or not volumes.parent.is_dir():
            raise ConfigError(
                "cannot hold the volumes", where=volumes, rule="a .json or .csv file in an existing directory"
            )
        refuse_input(volumes, every, "is an input")
    if many and not output.exists():
        output.mkdir()
    return jobs, many


def _tracked(jobs: Sequence[_Job]) -> Iterator[_Job]:
    from distilldsm.progress import progress

    return progress(jobs, total=len(jobs), title="predict", unit="scan")


def _predict_one(
    job: _Job, predictor: Predictor, args: argparse.Namespace, engine: str, budget: int, *, alone: bool
) -> dict[str, Any]:
    """Read, predict, write; what the report says about it.

    Raises:
        UserError: anything that is wrong with this scan, or with where it goes.
    """
    import numpy as np

    from distilldsm.data.geometry import spacing_along
    from distilldsm.inference.output import scratch_array, write_nifti
    from distilldsm.inference.report import Stopwatch, peak_memory_mb
    from distilldsm.inference.scan import check_scale
    from distilldsm.inference.streaming import NetworkImage, depth_windows, predict_scan

    plan, geometry, clock = predictor.plan, predictor.geometry, Stopwatch()
    try:
        with clock("read"):
            scan = job.input.read(len(plan.channels), budget)
        check_scale(scan, spacing_along(scan.affine, plan.axis_order), plan.target_spacing_mm)
        with clock("preprocess"):
            image = NetworkImage(scan, plan)
        pieces = _plan_memory(job, scan, image, predictor, args, engine, budget)
        padded = -(-image.shape[0] // geometry.stride[0]) * geometry.stride[0]
        windows = len(depth_windows(padded, pieces.window, geometry.depth_halo, geometry.stride[0]))
        _announce(job, pieces, windows, budget)

        def track(stream: Iterator[Piece]) -> Iterator[Piece]:
            if not (alone and windows > 1):
                return stream
            from distilldsm.progress import progress

            return progress(stream, total=windows, title=job.input.name, unit="piece")

        mask = np.zeros(scan.shape, dtype=np.uint8, order="F")
        with ExitStack() as stack:
            maps = None
            if args.probabilities:
                shape = (*scan.shape, plan.targets.channels)
                maps = stack.enter_context(scratch_array(job.probabilities, shape))
            counts = predict_scan(
                predictor.engine,
                image,
                plan,
                mask,
                stride=geometry.stride,
                depth_halo=geometry.depth_halo,
                window=pieces.window,
                tile=pieces.tile,
                probabilities=maps,
                clock=clock,
                track=track,
            )
            with clock("write"):
                if maps is not None:
                    write_nifti(job.probabilities, maps, scan, slope=1 / 255)
                try:
                    _write_mask(job, mask, scan, predictor)
                except BaseException:
                    if maps is not None:
                        job.probabilities.unlink(missing_ok=True)
                    raise
    except UserError as error:
        if error.where is None:
            error = _located(error, job.input.paths[0])
        raise error from None
    except MemoryError:
        raise DataError(
            "needs more memory than there is", where=job.input.paths[0], mend="lower --max-memory, or free memory"
        ) from None
    except OSError as error:
        raise UserError(
            "cannot be read or written", where=error.filename or job.input.paths[0], seen=error.strerror or str(error)
        ) from None
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    return {
        "scan": job.input.name,
        "inputs": [str(path) for path in job.input.paths],
        "mask": str(job.output),
        "format": job.format,
        **({"probabilities": str(job.probabilities)} if args.probabilities else {}),
        "shape": list(scan.shape),
        "spacing_mm": [round(v, 6) for v in scan.spacing_mm],
        "volume_ml": {
            name: round(int(count) * voxel_ml, 4)
            for name, value, count in zip(plan.class_names, plan.class_values, counts, strict=True)
            if value != 0
        },
        "exact": pieces.exact,
        "pieces": windows,
        "estimated_memory_mb": round(pieces.estimate_bytes / 1e6, 1),
        "peak_memory_mb": peak_memory_mb(),
        "seconds": clock.rounded(),
    }


def _plan_memory(
    job: _Job,
    scan: Scan,
    image: NetworkImage,
    predictor: Predictor,
    args: argparse.Namespace,
    engine: str,
    budget: int,
) -> Pieces:
    from distilldsm.inference.memory import DEFAULT_PIECE_VOXELS, activation_bytes, plan_pieces

    assert predictor.metadata is not None
    network, stride = predictor.metadata.network, predictor.geometry.stride
    channels, classes = len(predictor.plan.channels), predictor.plan.targets.channels
    kind = "openvino-auto" if engine == "openvino" and args.precision != "f32" else engine
    voxels = int(scan.channels[0].raw.size)
    plane = image.cropped[1] * image.cropped[2]
    held = scan.nbytes + voxels * (5 if job.format == "seg" else 1) + plane * (160 * channels + 40 * classes)
    return plan_pieces(
        [-(-n // s) * s for n, s in zip(image.shape, stride, strict=True)],
        stride=stride,
        depth_halo=predictor.geometry.depth_halo,
        per_voxel=activation_bytes(network.name, network.options, kind),
        channels=channels,
        classes=classes,
        held_bytes=held,
        budget=budget,
        where=job.input.paths[0],
        limit_voxels=DEFAULT_PIECE_VOXELS if args.max_memory is None else None,
        engine=engine,
    )


def _announce(job: _Job, pieces: Pieces, windows: int, budget: int) -> None:
    size = f"about {pieces.estimate_bytes / 1e9:.1f} of {budget / 1e9:.1f} GB"
    how = "in one piece" if windows == 1 else f"in {windows} pieces of {pieces.window} slices"
    print(f"{job.input.name}: {size}, {how}", file=sys.stderr)
    if pieces.tile is not None:
        print(
            f"{job.input.name}: whole slices do not fit, so tiles of {pieces.tile[0]} x {pieces.tile[1]} are blended: "
            "labels may differ from those of whole slices; a larger --max-memory avoids that",
            file=sys.stderr,
        )


def _write_mask(job: _Job, mask: Any, scan: Scan, predictor: Predictor) -> None:
    if job.format == "nifti":
        from distilldsm.inference.output import write_nifti

        write_nifti(job.output, mask, scan)
        return
    from distilldsm.inference.dicom import write_segmentation
    from distilldsm.inference.output import replacing

    assert predictor.metadata is not None
    labels = dict(zip(predictor.plan.class_names, predictor.plan.class_values, strict=True))
    with replacing(job.output) as temporary:
        write_segmentation(temporary, mask, scan.source, labels, model=predictor.metadata.name)


def _located(error: UserError, path: Path) -> UserError:
    return type(error)(error.problem, where=path, seen=error.seen, rule=error.rule, mend=error.mend)


def _failure(job: _Job, error: UserError) -> dict[str, Any]:
    return {
        "scan": job.input.name,
        "where": error.where,
        "problem": error.problem,
        "seen": None if error.seen is None else str(error.seen),
        "rule": error.rule,
        "mend": error.mend,
    }


def _print_line(row: dict[str, Any], engine: str) -> None:
    found = ", ".join(f"{name} {ml:.3g} ml" for name, ml in row["volume_ml"].items())
    print(f"{row['mask']}: {found} ({sum(row['seconds'].values()):.1f} s, {engine})")
