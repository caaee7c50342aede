"""One scan of `distilldsm predict`: read it, predict within a memory budget, write the mask, report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.machine import budget_bytes, peak_memory_gb
from distilldsm.core.progress import beside_the_bar, progress
from distilldsm.core.text import one_line
from distilldsm.inference.loading import Precision
from distilldsm.inference.predict import Observer, Prediction, Predictor
from distilldsm.inference.windows import Pieces, Slices
from distilldsm.io.errors import first_line
from distilldsm.io.formats import Format, stem, write_mask
from distilldsm.io.inputs import Input, listed
from distilldsm.io.nifti import write_nifti
from distilldsm.io.output import scratch_array
from distilldsm.io.scan import Scan

PHASES = ("read", "preprocess", "network", "restore", "write")


@dataclass(frozen=True)
class Job:
    """One scan and the paths of its results."""

    input: Input
    output: Path
    format: Format

    @property
    def probabilities(self) -> Path:
        """The path of its class probabilities."""
        return self.output.with_name(f"{stem(self.output)}_probabilities.nii.gz")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for all scans of a run."""

    precision: Precision
    memory: int | None
    """Memory limit of the process, bytes; None: the default, and pieces no larger than useful."""
    probabilities: bool
    alone: bool
    """The run has one scan only, so the progress bar counts its pieces."""
    unlike: Callable[[Scan], Mapping[str, Mapping[str, float]]] | None = None
    """The measures in which a scan lies outside the training cases: title to value, low and high."""
    strict: bool = False
    """Refuse scans that are unlike the training data."""

    @property
    def budget(self) -> int:
        """Memory limit of the process, bytes."""
        return budget_bytes(None) if self.memory is None else self.memory


class _Shown(Observer):
    """Measures the seconds of each phase, prints the planned memory and pieces, shows progress."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.job, self.settings = job, settings
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def planned(self, pieces: Pieces, count: int) -> None:
        size = f"about {pieces.estimate_bytes / 1e9:.1f} of {self.settings.budget / 1e9:.1f} GB"
        how = "in one piece" if count == 1 else f"in {count} pieces of {pieces.window} slices"
        if pieces.streamed:
            how = f"streamed, {pieces.window} slices at a time"
        remarks = [f"{size}, {how}"]
        if self.settings.precision == "int8" and count > 1:
            remarks.append(
                "INT8 cannot be streamed, so slices near the ends of a piece are computed twice: --precision auto may "
                "be faster on a scan of this size"
            )
        if pieces.tile is not None:
            remarks.append(
                f"whole slices do not fit, so tiles of {pieces.tile[0]} x {pieces.tile[1]} are blended: labels may "
                "differ from those of whole slices; a larger --max-memory avoids that"
            )
        self.say(*remarks)

    def say(self, *remarks: str) -> None:
        """Print remarks about this scan."""
        with beside_the_bar():
            for remark in remarks:
                print(f"{one_line(self.job.input.name)}: {remark}", file=sys.stderr)

    def follow(self, stream: Iterator[Slices], count: int) -> Iterator[Slices]:
        if not (self.settings.alone and count > 1):
            return stream
        return progress(stream, total=count, title=self.job.input.name, unit="piece")


def run_job(job: Job, predictor: Predictor, settings: Settings) -> dict[str, Any]:
    """Read, predict and write one scan; return its entry in the report.

    Raises:
        UserError: this scan cannot be read, predicted or written.
    """
    try:
        return _run(job, predictor, settings)
    except UserError as error:
        raise error.at(job.input.paths[0]) from None
    except MemoryError:
        raise DataError(
            "needs more memory than is available", where=job.input.paths[0], hint="lower --max-memory, or free memory"
        ) from None
    except OSError as error:
        raise UserError(
            "cannot be read or written", where=error.filename or job.input.paths[0], seen=error.strerror or str(error)
        ) from None
    except Exception as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        raise UserError(
            "failed unexpectedly",
            where=job.input.paths[0],
            seen=first_line(error),
            hint="DISTILLDSM_DEBUG=1 shows where; please report it",
        ) from error


def _run(job: Job, predictor: Predictor, settings: Settings) -> dict[str, Any]:
    plan, shown = predictor.plan, _Shown(job, settings)
    with shown.phase("read"):
        scan = job.input.read(len(plan.channels), settings.budget, [channel.name for channel in plan.channels])
        remarks = [*scan.remarks, *job.format.check_mask(scan, **_described(predictor))]
        unlike = None if settings.unlike is None else settings.unlike(scan)
    shown.say(*remarks, *_left_out(scan))
    if unlike:
        text = listed(
            [f"{name} {one['value']:g}, trained {one['low']:g} to {one['high']:g}" for name, one in unlike.items()]
        )
        if settings.strict:
            raise DataError(
                "is unlike the training data",
                where=scan.path,
                seen=text,
                rule="--strict",
                hint="look at the scan (distilldsm drift shows all measures); without --strict it is predicted",
            )
        shown.say(f"unlike the training data, check the mask by eye: {text}")
    with ExitStack() as stack:
        maps = None
        if settings.probabilities:
            shape = (*scan.shape, plan.targets.channels)
            maps = stack.enter_context(scratch_array(job.probabilities, shape))
        prediction = predictor.predict(
            scan,
            memory=settings.memory,
            held_bytes=4 * int(np.prod(scan.shape)) if job.format.mask_format == "seg" else 0,
            probabilities=maps,
            observer=shown,
        )
        with shown.phase("write"):
            _write(job, scan, predictor, prediction.mask, maps)
    peak = peak_memory_gb()
    return {
        "scan": job.input.name,
        "inputs": [str(path) for path in job.input.paths],
        "mask": str(job.output),
        "format": job.format.mask_format,
        **({"probabilities": str(job.probabilities)} if settings.probabilities else {}),
        "shape": list(scan.shape),
        "spacing_mm": [round(v, 6) for v in scan.spacing_mm],
        "remarks": remarks,
        "unlike_training": unlike,
        "skipped": [{"path": str(file.path), "reason": file.reason} for file in scan.skipped],
        **_facts(prediction),
        "peak_memory_mb": None if peak is None else round(peak * 1000, 1),
        "seconds": {name: round(seconds, 3) for name, seconds in shown.seconds.items()},
    }


def _left_out(scan: Scan) -> list[str]:
    """A line about the files of series folders that hold no slice."""
    files = [f"{file.path.name} ({file.reason})" for file in scan.skipped]
    return [f"left out: {listed(files)}"] if files else []


def _described(predictor: Predictor) -> dict[str, Any]:
    """What a mask tells of the model: label name to value, and the model's name."""
    labels = dict(zip(predictor.plan.class_names, predictor.plan.class_values, strict=True))
    return {"labels": labels, "model": "" if predictor.metadata is None else predictor.metadata.name}


def _facts(prediction: Prediction) -> dict[str, Any]:
    return {
        "volume_ml": dict(prediction.volumes_ml),
        "exact": prediction.exact,
        "streamed": prediction.pieces.streamed,
        "pieces": prediction.count,
        "estimated_memory_mb": round(prediction.pieces.estimate_bytes / 1e6, 1),
    }


def _write(
    job: Job, scan: Scan, predictor: Predictor, mask: npt.NDArray[np.uint8], maps: npt.NDArray[np.uint8] | None
) -> None:
    if maps is not None:
        write_nifti(job.probabilities, maps, scan, slope=1 / 255)
    try:
        write_mask(job.output, mask, scan, **_described(predictor))
    except BaseException:
        if maps is not None:
            job.probabilities.unlink(missing_ok=True)
        raise
