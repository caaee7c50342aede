"""Measures an image's voxels, to distinguish a scan of a body from a mask, noise or fill values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from distilldsm.validation.case_row import CaseRow, Detail

Samples = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]

_BOX = 128
"""Edge length, voxels, of the central box in which neighbours are compared: large enough, and fast."""
_PAIRS = 200
"""Minimum number of neighbouring pairs for a correlation, and of voxels inside and outside the label."""
SAMPLES = 200_000
"""Largest number of voxels of a channel for the comparison with the label."""


def sampled(array: npt.NDArray) -> Samples:
    """At most about SAMPLES voxels of a volume, evenly spread. Volumes of one shape give the same positions."""
    step = -(-array.size // SAMPLES)
    while step > 1 and math.gcd(step, array.shape[0]) > 1:  # or only some lines would be sampled
        step += 1
    return array.ravel(order="F")[::step].copy()


def separation(channels: Sequence[Samples], inside: npt.NDArray[np.bool_]) -> float | None:
    """How well intensities tell the inside of the label from the outside: area under the ROC curve, 0.5 for noise.

    Args:
        channels: sampled intensities; the channel with the value furthest from 0.5 counts.
        inside: whether the same voxels are labelled.

    Returns:
        None if fewer than _PAIRS voxels are inside or outside, or a channel was sampled at other positions.
    """
    count = int(np.count_nonzero(inside))
    if min(count, inside.size - count) < _PAIRS or any(one.shape != inside.shape for one in channels):
        return None
    from scipy.stats import rankdata

    areas = [
        (float(rankdata(one)[inside].sum()) - count * (count + 1) / 2) / (count * (inside.size - count))
        for one in channels
        if np.isfinite(one).all()
    ]
    return max(areas, key=lambda area: abs(area - 0.5), default=None)


def measure_content(row: CaseRow, file: str, array: Float32, values: Float32, labels: Mapping[str, int]) -> None:
    """Measure one channel that has at least two different values.

    Args:
        file: the channel's file, relative to the data set's root.
        array: (X, Y, Z), or the shape of the file if it is another one.
        values: its finite voxels.
        labels: label name to value in the label files.
    """
    row.values.setdefault("label_like_channels", 0)
    low, high = float(values.min()), float(values.max())
    if row.worst("largest_intensity", max(abs(low), abs(high))):
        row.details["largest_intensity"] = [Detail(file=file, seen=f"voxels from {low:g} to {high:g}")]
    declared = sorted({0, *labels.values()})
    if low >= declared[0] and high <= declared[-1]:
        distinct = np.unique(values)
        if np.isin(distinct, declared).all():
            row.values["label_like_channels"] = int(row.values["label_like_channels"] or 0) + 1
            row.note("label_like_channels", file, "only the values " + " ".join(f"{v:g}" for v in distinct))
    correlation = neighbour_correlation(array)
    if correlation is not None and row.worst("neighbour_correlation", correlation, largest=False):
        seen = f"correlation of neighbouring voxels {correlation:.2f}"
        row.details["neighbour_correlation"] = [Detail(file=file, seen=seen)]


def neighbour_correlation(array: Float32) -> float | None:
    """Smallest correlation over the axes between voxels and their next neighbours. None if too few pairs can be used.

    Voxels of 0 are left out, because a blank background around noise would look smooth. The value is about 0 if the
    bytes of the voxels are in the wrong order. Images of bodies have 0.5 and more.
    """
    middle = tuple(slice(max(0, (n - _BOX) // 2), max(0, (n - _BOX) // 2) + _BOX) for n in array.shape)
    box = array[middle]
    correlations: list[float] = []
    for axis in range(box.ndim):
        before, after = np.moveaxis(box, axis, 0)[:-1], np.moveaxis(box, axis, 0)[1:]
        use = (before != 0) & (after != 0) & np.isfinite(before) & np.isfinite(after)
        if np.count_nonzero(use) < _PAIRS:
            continue
        a, b = before[use].astype(np.float64), after[use].astype(np.float64)
        a, b = a - a.mean(), b - b.mean()
        with np.errstate(all="ignore"):
            value = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        if np.isfinite(value):
            correlations.append(round(value, 4))
    return min(correlations, default=None)
