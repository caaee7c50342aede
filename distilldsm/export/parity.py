"""Compare the exported models with the network, on real volumes (on a part of large volumes)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json
from distilldsm.core.mapping import to_mapping
from distilldsm.core.progress import progress
from distilldsm.data.targets import Targets
from distilldsm.inference.engines import Engine
from distilldsm.inference.probabilities import WHOLE, Box
from distilldsm.inference.windows import Float32, predict_logits
from distilldsm.models.package import Int8Report
from distilldsm.training.patches import open_array

NETWORK = "torch"
"""Name of the network itself among the runtimes."""
EXACT = ("onnx", "openvino")
"""Runtimes that must give the network's labels. The others are faster, and some labels may differ."""
MAX_VOXELS = 4_000_000
"""Of a larger volume only a part is compared. A whole CT would take minutes and gigabytes in each runtime."""

Remembered = dict[tuple[str, tuple[int, ...]], tuple[Float32, float]]
"""Case and shape to the network's logits and the seconds of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class CaseParity:
    """Comparison of one runtime with the network on one case, on the network's grid."""

    case: str
    runtime: str
    shape: tuple[int, int, int]
    """(D, H, W)."""
    max_logit_difference: float
    differing_voxels: int
    """Number of voxels with another label (largest logit)."""
    voxel_difference: float
    """The same as a fraction of all voxels."""
    dice_network: Mapping[str, float]
    """Dice of each label against the truth."""
    dice_runtime: Mapping[str, float]
    seconds: float
    """Time of one pass over the volume."""
    seconds_network: float

    @property
    def dice_difference(self) -> dict[str, float]:
        """Runtime minus network, per label."""
        return {label: self.dice_runtime[label] - value for label, value in self.dice_network.items()}


def choose_cases(preprocessed: Path, case_ids: Sequence[str], count: int) -> list[str]:
    """Choose `count` cases spread evenly from the smallest to the largest volume. Different sizes come first.

    The sizes come from the cases' geometry records. Equal sizes are ordered by case id, so the choice is repeatable.
    """
    sizes = {
        case: tuple(read_json(preprocessed / "cases" / f"{case}.json")["geometry"]["resampled"]) for case in case_ids
    }
    ordered = sorted(case_ids, key=lambda case: (math.prod(sizes[case]), sizes[case], case))
    one_each = list({sizes[case]: case for case in reversed(ordered)}.values())[::-1]
    if len(one_each) >= count:
        return _spread(one_each, count)
    others = [case for case in ordered if case not in set(one_each)]
    return sorted([*one_each, *_spread(others, count - len(one_each))], key=ordered.index)


def _spread(ordered: Sequence[str], count: int) -> list[str]:
    if count == 1:
        return [ordered[len(ordered) // 2]] if ordered else []
    positions = np.linspace(0, len(ordered) - 1, min(count, len(ordered)))
    return [ordered[int(k)] for k in np.rint(positions)]


def compared_part(labels: npt.NDArray[np.integer], max_voxels: int = MAX_VOXELS) -> Box:
    """The part of a volume (D, H, W) that is compared: the whole volume, or slices around the middle of the structures.

    The slices are whole if 16 of them have at most `max_voxels`. Otherwise they are also cropped in plane.
    """
    if labels.size <= max_voxels:
        return WHOLE
    area = max(max_voxels // min(labels.shape[0], 16), 1)
    height, width = labels.shape[1:]
    if height * width > area:
        height = min(height, max(math.isqrt(area), area // width))
        width = min(width, area // height)
    size = (min(max(max_voxels // (height * width), 1), labels.shape[0]), height, width)
    inside = np.nonzero(labels)
    box = []
    for axis, (kept, whole) in enumerate(zip(size, labels.shape, strict=True)):
        middle = int(np.median(inside[axis])) if inside[0].size else whole // 2
        low = min(max(middle - kept // 2, 0), whole - kept)
        box.append(slice(low, low + kept))
    return (box[0], box[1], box[2])


def compare(
    network: Engine,
    runtimes: Mapping[str, Engine],
    preprocessed: Path,
    case_ids: Sequence[str],
    *,
    targets: Targets,
    sizes: int = 1,
    remembered: Remembered | None = None,
) -> list[CaseParity]:
    """Run the network and the runtimes on each case (on `compared_part` of large volumes) and compare them.

    Args:
        network: the reference.
        runtimes: name to engine.
        preprocessed: the directory with `images/<case>.npy` and `labels/<case>.npy`.
        targets: classes or regions of the logits.
        sizes: smallest number of different sizes. If the cases have fewer, the last case is compared again with
            slices, rows and columns cut off.
        remembered: cache of the network's logits; it is read and filled.

    Raises:
        DataError: logits of the network or of a runtime are not finite.
    """
    found: list[CaseParity] = []
    remembered = {} if remembered is None else remembered
    boxes = _boxes(preprocessed, case_ids, sizes)
    for case, box in progress(boxes, total=len(boxes), title="parity", unit="volume"):
        image = np.asarray(open_array(preprocessed / "images" / f"{case}.npy")[:, *box], dtype=np.float32)
        truth = np.asarray(open_array(preprocessed / "labels" / f"{case}.npy")[box])
        if (case, truth.shape) not in remembered:
            remembered[case, truth.shape] = _timed_logits(NETWORK, network, case, image)
        reference = remembered[case, truth.shape]
        for name, engine in runtimes.items():
            logits = _timed_logits(name, engine, case, image)
            found.append(_case_parity(case, name, reference, logits, truth, targets))
    return found


def _boxes(preprocessed: Path, case_ids: Sequence[str], sizes: int) -> list[tuple[str, Box]]:
    """The cases and the part of each that is compared, in at least `sizes` different sizes."""
    labels = {case: open_array(preprocessed / "labels" / f"{case}.npy") for case in case_ids}
    boxes = [(case, compared_part(volume)) for case, volume in labels.items()]
    case, last = boxes[-1]
    shapes = [labels[case][box].shape for case, box in boxes]
    for less in range(1, sizes - len(set(shapes)) + 1):
        size = [max(n - less * cut, 1) for n, cut in zip(shapes[-1], (1, 3, 5), strict=True)]
        z, y, x = (slice(s.start or 0, (s.start or 0) + n) for s, n in zip(last, size, strict=True))
        boxes.append((case, (z, y, x)))
    return boxes


def _timed_logits(name: str, engine: Engine, case: str, image: Float32) -> tuple[Float32, float]:
    """Logits of a case, and the seconds they took."""
    start = time.perf_counter()
    try:
        logits = predict_logits(engine, image)
    except UserError as error:
        raise error.at(f"case {case}, {name}") from None
    return logits, time.perf_counter() - start


def _case_parity(
    case: str,
    runtime: str,
    reference: tuple[Float32, float],
    found: tuple[Float32, float],
    truth: npt.NDArray[np.integer],
    targets: Targets,
) -> CaseParity:
    """Compare the logits of a runtime with those of the network; both come with their seconds."""
    from distilldsm.training.validation import structure_dice

    def dice(classes: npt.NDArray) -> dict[str, float]:
        return dict(zip(targets.structures, structure_dice(classes, truth, targets), strict=True))

    expected, classes = (targets.classes_of_logits(logits) for logits, _ in (reference, found))
    differing = int((classes != expected).sum())
    d, h, w = (int(n) for n in expected.shape)
    return CaseParity(
        case=case,
        runtime=runtime,
        shape=(d, h, w),
        max_logit_difference=float(np.abs(found[0] - reference[0]).max()),
        differing_voxels=differing,
        voxel_difference=differing / expected.size,
        dice_network=dice(expected),
        dice_runtime=dice(classes),
        seconds=found[1],
        seconds_network=reference[1],
    )


def beyond_limit(rows: Sequence[CaseParity], limit: float) -> list[CaseParity]:
    """The comparisons in which the fraction of differing voxels is above `limit`, worst first."""
    return sorted((r for r in rows if r.voxel_difference > limit), key=lambda r: -r.voxel_difference)


def require_parity(rows: Sequence[CaseParity], limit: float) -> None:
    """Raise UserError with runtime and case if the fraction of differing voxels is above `limit`."""
    beyond = beyond_limit(rows, limit)
    if beyond:
        worst = beyond[0]
        raise UserError(
            f"the exported model ({worst.runtime}) disagrees with the network",
            where=f"case {worst.case}",
            seen=f"{worst.differing_voxels} voxels differ, a fraction of {worst.voxel_difference:.3g}; "
            f"logits differ by up to {worst.max_logit_difference:.3g}",
            rule=f"a fraction of at most {limit:g} (export.max_voxel_difference)",
            hint="look at the logit differences: large ones mean an error in the export; small ones mean that the "
            "network is undecided in many voxels (train longer, or raise the limit)",
        )


def report(rows: Sequence[CaseParity], limit: float, openvino_weights: str, int8: Int8Report) -> dict[str, object]:
    """The contents of `parity.json`."""
    return {
        "schema_version": 1,
        "reference": "the PyTorch network in float32 on the CPU",
        "space": "network space (spacing of the plan), volumes of the held-out fold; from volumes with more than "
        f"{MAX_VOXELS:,} voxels only slices around the middle of the structures",
        "openvino_weights": openvino_weights,
        "max_voxel_difference_allowed": limit,
        "held_to_it": list(EXACT),
        "int8": to_mapping(int8),
        "summary": summary(rows),
        "cases": [{**asdict(row), "dice_difference": row.dice_difference} for row in rows],
    }


def summary(rows: Sequence[CaseParity]) -> dict[str, dict[str, float]]:
    """For each runtime the worst difference over all cases, and the speed on the largest volume."""
    out: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row.runtime for row in rows):
        own = [row for row in rows if row.runtime == name]
        largest = max(own, key=lambda row: np.prod(row.shape))
        mvoxels = float(np.prod(largest.shape)) / 1e6
        out[name] = {
            "max_logit_difference": max(row.max_logit_difference for row in own),
            "voxel_difference": max(row.voxel_difference for row in own),
            "dice_difference": max(abs(v) for row in own for v in row.dice_difference.values()),
            "seconds_per_mvoxel": largest.seconds / mvoxels,
            "seconds_per_mvoxel_network": largest.seconds_network / mvoxels,
        }
    return out
