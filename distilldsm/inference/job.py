"""One scan of `distilldsm predict`: read, predicted in pieces within a budget, written, reported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.machine import peak_memory_gb
from distilldsm.core.progress import beside_the_bar, progress
from distilldsm.data.geometry import check_scale
from distilldsm.data.targets import Targets
from distilldsm.inference.memory import (
    DEFAULT_PIECE_VOXELS,
    MODEL_BYTES,
    Pieces,
    StreamCost,
    activation_bytes,
    plan_pieces,
    stream_cost,
)
from distilldsm.inference.postprocess import BYTES_PER_VOXEL, keep_largest
from distilldsm.inference.predict import Precision, Predictor, Runtime
from distilldsm.inference.report import Stopwatch
from distilldsm.inference.streaming import NetworkImage, Piece, depth_windows, predict_scan, stream_chunks
from distilldsm.io.formats import Format, stem, write_mask
from distilldsm.io.inputs import Input
from distilldsm.io.nifti import write_nifti
from distilldsm.io.output import scratch_array
from distilldsm.io.scan import Scan


@dataclass(frozen=True)
class Job:
    """One scan and where its results go."""

    input: Input
    output: Path
    format: Format

    @property
    def probabilities(self) -> Path:
        """Where its class probabilities go."""
        return self.output.with_name(f"{stem(self.output)}_probabilities.nii.gz")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all scans of a run share."""

    engine: Runtime
    precision: Precision
    budget: int
    """Memory for the whole process, bytes."""
    default_budget: bool
    """Nobody asked for it: pieces need be no larger than is worth while."""
    probabilities: bool
    alone: bool
    """The only scan: its pieces are what progress is shown of."""


def run_job(job: Job, predictor: Predictor, settings: Settings) -> dict[str, Any]:
    """Read, predict, write; returns what the report says about it.

    Raises:
        UserError: anything that is wrong with this scan, or with where it goes.
    """
    try:
        return _run(job, predictor, settings)
    except UserError as error:
        if error.where is None:
            error = _located(error, job.input.paths[0])
        raise error from None
    except MemoryError:
        raise DataError(
            "needs more memory than there is", where=job.input.paths[0], hint="lower --max-memory, or free memory"
        ) from None
    except OSError as error:
        raise UserError(
            "cannot be read or written", where=error.filename or job.input.paths[0], seen=error.strerror or str(error)
        ) from None


def _run(job: Job, predictor: Predictor, settings: Settings) -> dict[str, Any]:
    plan, geometry, clock = predictor.plan, predictor.geometry, Stopwatch()
    with clock("read"):
        scan = job.input.read(len(plan.channels), settings.budget, [channel.name for channel in plan.channels])
    check_scale(scan, plan)
    with clock("preprocess"):
        image = NetworkImage(scan, plan)
    pieces = _plan_memory(job, scan, image, predictor, settings)
    padded = -(-image.shape[0] // geometry.stride[0]) * geometry.stride[0]
    if pieces.streamed:
        windows = len(stream_chunks(padded, pieces.window, geometry.depth_halo or 0))
    else:
        windows = len(depth_windows(padded, pieces.window, geometry.depth_halo, geometry.stride[0]))
    _announce(job, pieces, windows, settings)

    def track(stream: Iterator[Piece]) -> Iterator[Piece]:
        if not (settings.alone and windows > 1):
            return stream
        return progress(stream, total=windows, title=job.input.name, unit="piece")

    mask = np.zeros(scan.shape, dtype=np.uint8, order="F")
    with ExitStack() as stack:
        maps = None
        if settings.probabilities:
            shape = (*scan.shape, plan.targets.channels)
            maps = stack.enter_context(scratch_array(job.probabilities, shape))
        counts = predict_scan(
            predictor.scorer,
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
            streamed=pieces.streamed,
        )
        with clock("restore"):
            if predictor.keep_largest:
                predictor.scorer.release()
            for values in predictor.keep_largest.values():
                for value, removed in keep_largest(mask, values).items():
                    counts[plan.class_values.index(value)] -= removed
                    counts[0] += removed
        with clock("write"):
            if maps is not None:
                write_nifti(job.probabilities, maps, scan, slope=1 / 255)
            try:
                labels = dict(zip(plan.class_names, plan.class_values, strict=True))
                model = "" if predictor.metadata is None else predictor.metadata.name
                write_mask(job.output, mask, scan, labels=labels, model=model)
            except BaseException:
                if maps is not None:
                    job.probabilities.unlink(missing_ok=True)
                raise
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    peak = peak_memory_gb()
    return {
        "scan": job.input.name,
        "inputs": [str(path) for path in job.input.paths],
        "mask": str(job.output),
        "format": job.format.mask_format,
        **({"probabilities": str(job.probabilities)} if settings.probabilities else {}),
        "shape": list(scan.shape),
        "spacing_mm": [round(v, 6) for v in scan.spacing_mm],
        "volume_ml": volumes_ml(plan.targets, counts.tolist(), voxel_ml),
        # In bf16 the runtime rounds a network and its stream in another order.
        "exact": pieces.exact and not (pieces.streamed and settings.precision != "f32"),
        "streamed": pieces.streamed,
        "pieces": windows,
        "estimated_memory_mb": round(pieces.estimate_bytes / 1e6, 1),
        "peak_memory_mb": None if peak is None else round(peak * 1000, 1),
        "seconds": clock.rounded(),
    }


def volumes_ml(targets: Targets, counts: Sequence[int], voxel_ml: float) -> dict[str, float]:
    """Volume of each label, ml, then of each region: of all its labels in the mask.

    counts: voxels of each class. A region that is called as a label of other voxels appears as `NAME (region)`.
    """
    voxels = dict(zip(targets.class_values, counts, strict=True))
    labels = dict(zip(targets.class_names, targets.class_values, strict=True))
    found = {name: round(voxels[value] * voxel_ml, 4) for name, value in labels.items() if value != 0}
    for region in targets.regions:
        other = region.name in labels and region.values != (labels[region.name],)
        name = f"{region.name} (region)" if other else region.name
        found[name] = round(sum(voxels[value] for value in region.values) * voxel_ml, 4)
    return found


def _plan_memory(job: Job, scan: Scan, image: NetworkImage, predictor: Predictor, settings: Settings) -> Pieces:
    networks, stride = [model.network for model in predictor.models], predictor.geometry.stride
    channels, classes = len(predictor.plan.channels), predictor.plan.targets.channels
    engine = settings.engine
    kind = "openvino-auto" if engine == "openvino" and settings.precision != "f32" else engine
    voxels = int(scan.channels[0].raw.size)
    plane = image.cropped[1] * image.cropped[2]
    held = (
        scan.nbytes + voxels * (5 if job.format.mask_format == "seg" else 1) + plane * (160 * channels + 40 * classes)
    )
    held += sum(MODEL_BYTES + 4 * network.parameters for network in networks[1:])
    padded = [-(-n // s) * s for n, s in zip(image.shape, stride, strict=True)]

    def stream() -> StreamCost | None:
        kept, network = predictor.stream_bytes(padded), networks[0]
        return None if kept is None else stream_cost(network.name, network.options, kind, kept, network.macs_per_voxel)

    return plan_pieces(
        padded,
        stride=stride,
        depth_halo=predictor.geometry.depth_halo,
        per_voxel=max(activation_bytes(n.name, n.options, kind, n.macs_per_voxel) for n in networks),
        channels=channels,
        classes=classes,
        held_bytes=held,
        budget=settings.budget,
        where=job.input.paths[0],
        limit_voxels=DEFAULT_PIECE_VOXELS if settings.default_budget else None,
        engine=engine,
        mirrored=predictor.scorer.mirrored,
        averaged=len(networks) > 1,
        after_bytes=BYTES_PER_VOXEL * voxels if predictor.keep_largest else 0,
        stream=stream,
    )


def _announce(job: Job, pieces: Pieces, windows: int, settings: Settings) -> None:
    size = f"about {pieces.estimate_bytes / 1e9:.1f} of {settings.budget / 1e9:.1f} GB"
    how = "in one piece" if windows == 1 else f"in {windows} pieces of {pieces.window} slices"
    if pieces.streamed:
        how = f"streamed, {pieces.window} slices at a time"
    with beside_the_bar():
        print(f"{job.input.name}: {size}, {how}", file=sys.stderr)
        if settings.precision == "int8" and windows > 1:
            print(
                f"{job.input.name}: INT8 is not streamed, and slices near the ends of a piece are computed again: "
                "--precision auto may be faster on a scan of this size",
                file=sys.stderr,
            )
        if pieces.tile is not None:
            print(
                f"{job.input.name}: whole slices do not fit, so tiles of {pieces.tile[0]} x {pieces.tile[1]} are "
                "blended: labels may differ from those of whole slices; a larger --max-memory avoids that",
                file=sys.stderr,
            )


def _located(error: UserError, path: Path) -> UserError:
    return type(error)(error.problem, where=path, seen=error.seen, rule=error.rule, hint=error.hint)
