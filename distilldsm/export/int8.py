"""INT8 by NNCF's post-training quantisation. It is shipped only if it is clearly faster and as accurate.

NNCF calibrates and controls the accuracy on training volumes. The decision uses the held-out fold: Dice on its volumes,
and the time of whole predictions, from a scan's file to a mask's file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.config import Int8Config
from distilldsm.core.files import read_json
from distilldsm.core.machine import vector_extensions
from distilldsm.core.mapping import from_mapping
from distilldsm.core.progress import meter, progress
from distilldsm.data.geometry import GeometryRecord
from distilldsm.data.plan import Plan
from distilldsm.data.targets import Targets
from distilldsm.export.gate import MIN_CASES
from distilldsm.export.parity import choose_cases
from distilldsm.inference.engines import Engine, OpenVINOEngine, openvino_core
from distilldsm.inference.predict import Predictor
from distilldsm.inference.probabilities import Ensemble, Member
from distilldsm.inference.windows import predict_logits
from distilldsm.io import read_scan, write_mask
from distilldsm.io.orientation import reorient
from distilldsm.models.package import Int8Report, NetworkInfo
from distilldsm.training.patches import open_array

WINDOW_VOXELS = 1_000_000
"""Calibration reads at most this many voxels of a volume: a block of slices around its middle."""
TIMED_SCANS = 3
TIMED_PAIRS, TIMED_S = 6, 300.0
"""At least so many pairs of predictions are timed. What is not clear after this time counts as not fast enough."""
_LEVEL = 0.99
SCORED_CASES, SCORED_VOXELS = 8, 250_000_000
"""Dice is compared on held-out cases with at most this many voxels together, but on at least eight cases."""

Float32 = npt.NDArray[np.float32]


def make_int8(
    source: Path,
    target: Path,
    preprocessed: Path,
    *,
    config: Int8Config,
    training_cases: Sequence[str],
    held_out: Sequence[str],
    network: NetworkInfo,
    plan: Plan,
) -> Int8Report:
    """Quantise an IR. `target` (.xml with its .bin) is kept only if the report says `shipped`.

    Args:
        source: the IR to quantise; the result is compared with it.
        preprocessed: the directory with `images/<case>.npy` (C, D, H, W), `labels/<case>.npy` (D, H, W) and
            `cases/<case>.json`.
    """
    if not config.enabled:
        return Int8Report(shipped=False, reason="not asked for (export.int8.enabled)")
    if not training_cases or len(held_out) < MIN_CASES:
        return Int8Report(shipped=False, reason=f"needs training cases and {MIN_CASES} held-out cases")
    targets = plan.targets
    chosen = choose_cases(preprocessed, training_cases, config.calibration_cases)
    windows = [_window(preprocessed, case, network.stride) for case in chosen]
    try:
        quantised = _quantise(source, windows, config.max_dice_loss, targets)
    except ImportError:
        return Int8Report(shipped=False, reason="NNCF is not installed (the optional group 'export')")
    except Exception as error:  # NNCF and OpenVINO raise errors of many kinds
        return Int8Report(shipped=False, reason=f"the quantisation failed: {' '.join(str(error).split())[:300]}")

    import openvino

    openvino.save_model(quantised, os.fspath(target), compress_to_fp16=False)
    exact = OpenVINOEngine(source, network, precision="f32")
    scored = scored_cases(preprocessed, held_out)
    loss = _dice_loss(exact, OpenVINOEngine(target, network, precision="auto"), preprocessed, scored, targets)
    extensions = ", ".join(vector_extensions() or ()) or "unknown vector extensions"
    words = f"{abs(loss):.4f} {'less' if loss >= 0 else 'more'} mean Dice on {len(scored)} held-out cases"
    ratios: list[float] = []
    shipped = loss <= config.max_dice_loss
    if shipped:
        cases = choose_cases(preprocessed, held_out, TIMED_SCANS)
        ratios = _time_ratios([source, target], network, plan, preprocessed, cases, config.min_speedup)
        low, high = _interval(ratios)
        words = (
            f"predict is {_mean(ratios):.2f} times as fast as at OpenVINO's own precision ({len(ratios)} pairs of "
            f"calls, 99 % interval {low:.2f} to {high:.2f}, on a CPU with {extensions}), and {words}"
        )
        shipped = low >= config.min_speedup
    if not shipped:
        words += f"; the limits are {config.min_speedup:g} times as fast and {config.max_dice_loss:g} less Dice"
        for path in (target, target.with_suffix(".bin")):
            path.unlink(missing_ok=True)
    return Int8Report(
        shipped=shipped,
        reason=words,
        speedup=round(_mean(ratios), 3) if ratios else None,
        pairs=len(ratios),
        instruction_set=extensions,
        dice_loss=round(loss, 6),
        cases=len(scored),
        calibration_cases=tuple(chosen),
    )


def scored_cases(preprocessed: Path, held_out: Sequence[str]) -> list[str]:
    """The cases that decide about INT8: all, or as many as `SCORED_VOXELS` allows, spread evenly over the sizes."""
    voxels = [open_array(preprocessed / "labels" / f"{case}.npy").size for case in held_out]
    fit = int(len(held_out) * SCORED_VOXELS / max(sum(voxels), 1))
    return choose_cases(preprocessed, held_out, min(max(fit, SCORED_CASES), len(held_out)))


def _window(preprocessed: Path, case: str, stride: Sequence[int]) -> tuple[Float32, npt.NDArray[np.integer]]:
    """Image (1, C, D, H, W) and labels (D, H, W) of slices around a volume's middle, padded to the stride."""
    image, labels = (open_array(preprocessed / kind / f"{case}.npy") for kind in ("images", "labels"))
    size = image.shape[1:]
    depth = max(WINDOW_VOXELS // (size[1] * size[2]), stride[0])
    low = max((size[0] - depth) // 2, 0)
    part = np.asarray(image[:, low : low + depth], dtype=np.float32)
    truth = np.asarray(labels[low : low + depth])
    pad = [(0, -n % s) for n, s in zip(part.shape[1:], stride, strict=True)]
    return np.pad(part, [(0, 0), *pad])[None], np.pad(truth, pad)


def _quantise(
    source: Path, windows: Sequence[tuple[Float32, npt.NDArray[np.integer]]], max_loss: float, targets: Targets
) -> Any:
    """The quantised model. Layers that lose accuracy on the calibration volumes are not quantised."""
    # The number of NNCF's passes is not known in advance.
    with meter(total=None, title="INT8 calibration", unit="volume") as shown, _quiet():
        import nncf

        from distilldsm.training.validation import structure_dice

        def validate(
            compiled: Any, items: Iterator[tuple[Float32, npt.NDArray[np.integer]]]
        ) -> tuple[float, list[float]]:
            scores = []
            for image, truth in items:
                result = compiled([image], share_inputs=False, share_outputs=False)
                scores.append(float(np.mean(structure_dice(targets.classes_of_logits(result[0][0]), truth, targets))))
                shown.advance()
            return float(np.mean(scores)), scores

        def image_of(item: tuple[Float32, Any]) -> Float32:
            shown.advance()
            return item[0]

        return nncf.quantize_with_accuracy_control(
            openvino_core().read_model(os.fspath(source)),
            nncf.Dataset(list(windows), image_of),
            nncf.Dataset(list(windows)),
            validation_fn=validate,
            max_drop=max_loss,
            drop_type=nncf.DropType.ABSOLUTE,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(windows),
            # CPUs without VNNI saturate sums of 8-bit products. Weights of 7 bits keep the sums in range everywhere.
            advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and messages out of the log. Its errors are still raised."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _dice_loss(
    exact: Engine,
    int8: Engine,
    preprocessed: Path,
    cases: Sequence[str],
    targets: Targets,
) -> float:
    from distilldsm.training.validation import structure_dice

    losses = []
    for case in progress(cases, total=len(cases), title="INT8 scores", unit="volume"):
        image = np.asarray(open_array(preprocessed / "images" / f"{case}.npy"), dtype=np.float32)
        truth = np.asarray(open_array(preprocessed / "labels" / f"{case}.npy"))

        def dice(engine: Engine, image: Float32 = image, truth: npt.NDArray[Any] = truth) -> float:
            logits = predict_logits(engine, image)
            return float(np.mean(structure_dice(targets.classes_of_logits(logits), truth, targets)))

        losses.append(dice(exact) - dice(int8))
    return float(np.mean(losses))


def _time_ratios(
    irs: Sequence[Path],
    network: NetworkInfo,
    plan: Plan,
    preprocessed: Path,
    cases: Sequence[str],
    min_speedup: float,
) -> list[float]:
    """Seconds of a prediction with the first IR over those with the second, for pairs of calls in changing order.

    A call reads a scan's file and writes a mask's file. It ends when the interval of the mean excludes `min_speedup`,
    or after `TIMED_S` seconds.
    """
    predictors = []
    for ir in irs:
        engine = OpenVINOEngine(ir, network, precision="auto", fixed_size=True)
        members = Ensemble([Member(engine)], activation=plan.targets.probabilities)
        predictors.append(Predictor(members, plan, described=[network]))
    ratios: list[float] = []
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        scans = [_scan_files(preprocessed, case, plan, Path(folder)) for case in cases]
        began, pair, is_clear, seconds = time.monotonic(), 0, False, {0: 0.0, 1: 0.0}
        # The first calls compile the networks and do not count.
        while len(ratios) < 1 or not (is_clear or time.monotonic() - began + sum(seconds.values()) > TIMED_S):
            scan = scans[pair % len(scans)]
            seconds = {k: _seconds(predictors[k], scan) for k in ((0, 1) if pair % 2 else (1, 0))}
            if pair >= len(scans):
                ratios.append(seconds[0] / seconds[1])
            low, high = _interval(ratios)
            is_clear = len(ratios) >= TIMED_PAIRS and not low <= min_speedup <= high
            pair += 1
    return ratios


def _seconds(predictor: Predictor, files: Sequence[Path]) -> float:
    start = time.perf_counter()
    scan = read_scan(files, len(files))
    write_mask(files[0].with_name("mask.nii.gz"), predictor.predict(scan).mask, scan)
    return time.perf_counter() - start


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(np.log(ratios).mean())


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean logarithm, at `_LEVEL`; everything for fewer than two ratios."""
    from scipy.stats import t

    if len(ratios) < 2:
        return 0.0, math.inf
    logs = np.log(ratios)
    half = float(t.ppf((1 + _LEVEL) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return _mean(ratios) / math.exp(half), _mean(ratios) * math.exp(half)


def _scan_files(preprocessed: Path, case: str, plan: Plan, folder: Path) -> list[Path]:
    """Write a case as scans of its original size, spacing and crop, a file per channel. Voxels are repeated."""
    described = read_json(preprocessed / "cases" / f"{case}.json")
    record = from_mapping(GeometryRecord, described["geometry"], where=case)
    image = open_array(preprocessed / "images" / f"{case}.npy")
    rows = [np.arange(n) * size // n for n, size in zip(record.cropped, image.shape[1:], strict=True)]
    box = tuple(slice(low, high) for low, high in zip(record.crop_start, record.crop_stop, strict=True))
    affine, files = np.array(record.affine), []
    for number, channel in enumerate(image):
        voxels = np.zeros((1, *record.shape), dtype=np.int16)
        values = np.asarray(channel, dtype=np.float32)[np.ix_(*rows)]
        reorient(voxels, affine, plan.axis_order)[0][box] = np.clip(100 * values, -30_000, 30_000)
        files.append(folder / f"{case}_{number:04d}.nii.gz")
        nib.save(nib.Nifti1Image(voxels[0], affine), files[-1])
    return files
