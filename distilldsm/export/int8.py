"""INT8 by NNCF's post-training quantisation. It is shipped only if it is clearly faster and as accurate.

NNCF calibrates and controls the accuracy on training volumes. The decision uses the held-out fold.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilldsm.config import Int8Config
from distilldsm.core.progress import meter, progress
from distilldsm.data.targets import Targets
from distilldsm.export.parity import choose_cases
from distilldsm.inference.engines import Engine, NetworkFacts, OpenVINOEngine, openvino_core
from distilldsm.inference.windows import MAX_VOXELS, predict_logits
from distilldsm.models.package import Int8Report
from distilldsm.training.patches import open_array

WINDOW_VOXELS = 1_000_000
"""Calibration reads at most this many voxels of a volume: a block of slices around its middle."""
TIMED_RUNS = 5
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
    network: NetworkFacts,
    targets: Targets,
) -> Int8Report:
    """Quantise an IR. `target` (.xml with its .bin) is kept only if the report says `shipped`.

    Args:
        source: the IR to quantise; the result is compared with it.
        preprocessed: the directory with `images/<case>.npy` (C, D, H, W) and `labels/<case>.npy` (D, H, W).
        network: stride and depth halo, see `NetworkFacts`.
        targets: classes or regions of the logits.
    """
    if not config.enabled:
        return Int8Report(shipped=False, reason="not asked for (export.int8.enabled)")
    if not training_cases or not held_out:
        return Int8Report(shipped=False, reason="needs training and held-out cases")
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
    largest = choose_cases(preprocessed, held_out, len(held_out))[-1]
    seconds = _seconds(source, target, network, _window(preprocessed, largest, network.stride, MAX_VOXELS)[0])
    speedup, speedup_f32 = seconds["auto"] / seconds["int8"], seconds["f32"] / seconds["int8"]
    words = (
        f"{speedup:.2f} times as fast as the IR at OpenVINO's own precision ({speedup_f32:.2f} times as fast as in "
        f"float32), and {abs(loss):.4f} {'less' if loss >= 0 else 'more'} mean Dice on {len(scored)} held-out cases"
    )
    shipped = speedup >= config.min_speedup and loss <= config.max_dice_loss
    if not shipped:
        words += f"; the limits are {config.min_speedup:g} times as fast and {config.max_dice_loss:g} less Dice"
        for path in (target, target.with_suffix(".bin")):
            path.unlink(missing_ok=True)
    return Int8Report(
        shipped=shipped,
        reason=words,
        speedup=round(speedup, 3),
        speedup_f32=round(speedup_f32, 3),
        dice_loss=round(loss, 6),
        cases=len(scored),
        calibration_cases=tuple(chosen),
    )


def scored_cases(preprocessed: Path, held_out: Sequence[str]) -> list[str]:
    """The cases that decide about INT8: all, or as many as `SCORED_VOXELS` allows, spread evenly over the sizes."""
    voxels = [open_array(preprocessed / "labels" / f"{case}.npy").size for case in held_out]
    fit = int(len(held_out) * SCORED_VOXELS / max(sum(voxels), 1))
    return choose_cases(preprocessed, held_out, min(max(fit, SCORED_CASES), len(held_out)))


def _window(
    preprocessed: Path, case: str, stride: Sequence[int], voxels: int = WINDOW_VOXELS
) -> tuple[Float32, npt.NDArray[np.integer]]:
    """Image (1, C, D, H, W) and labels (D, H, W) of slices around a volume's middle, padded to the stride."""
    image, labels = (open_array(preprocessed / kind / f"{case}.npy") for kind in ("images", "labels"))
    size = image.shape[1:]
    depth = max(voxels // (size[1] * size[2]), stride[0])
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


def _seconds(source: Path, target: Path, network: NetworkFacts, image: Float32) -> Mapping[str, float]:
    """Median seconds of interleaved runs. As in prediction, the network is compiled for the size of the image."""
    engines: dict[str, Callable[[Float32], Float32]] = {
        "f32": OpenVINOEngine(source, network, precision="f32", fixed_size=True),
        "auto": OpenVINOEngine(source, network, precision="auto", fixed_size=True),
        "int8": OpenVINOEngine(target, network, precision="auto", fixed_size=True),
    }
    found: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine(image)
    for _ in range(TIMED_RUNS):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(image)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}
