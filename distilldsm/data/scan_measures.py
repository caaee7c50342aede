"""Measures of one scan, computed in the same way for training data and new scans. The scan is read slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.data.dataset import Channel
from distilldsm.io import Channel as StoredChannel
from distilldsm.io import Scan
from distilldsm.io.orientation import Affine, ras_orientation

QUANTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)
SAMPLES = 1_000_000
"""Largest number of voxels of a channel for the quantiles. Means use all voxels."""
QUICK_VOXELS, QUICK_SLICES = 4_000_000, 16
"""Voxels of a channel, and slices at least, that a quick measurement reads."""

Plane = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class ChannelMeasures:
    """Measures of one channel. For CT they use all voxels, else the voxels that are not 0 (as in normalisation)."""

    quantiles: tuple[float, ...]
    """Intensities at QUANTILES."""
    mean: float
    sd: float
    centre: float
    """Mean of the inner box (half of each axis) minus mean of the rest, in sd. Inverted contrast changes its sign."""
    roughness: float
    """Mean absolute difference of neighbours, mean over the axes, in sd. It depends on noise and sharpness."""


@dataclass(frozen=True, kw_only=True)
class LabelMeasures:
    """Measures of one structure."""

    volume_ml: float
    means: tuple[float, ...] | None
    """Mean intensity per channel; None if the structure is absent."""


@dataclass(frozen=True, kw_only=True)
class ScanMeasures:
    """Measures of one scan. Axes are in RAS order (x, y, z)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    """Directions of the stored axes, e.g. LPS."""
    nonzero_fraction: float
    """Share of voxels that are not 0, smallest over the channels."""
    channels: tuple[ChannelMeasures, ...]
    labels: Mapping[str, LabelMeasures] = field(default_factory=dict)
    """Empty without a mask."""


@dataclass(frozen=True, kw_only=True)
class MeasuredChannel:
    """The result of `measure_channel`."""

    measures: ChannelMeasures
    nonzero_fraction: float
    label_means: tuple[float | None, ...]
    """Mean intensity by class index; empty without classes."""


def measure_scan(
    scan: Scan,
    channels: Sequence[Channel],
    class_names: Sequence[str] = (),
    classes: npt.NDArray[np.integer] | None = None,
    *,
    quick: bool = False,
) -> ScanMeasures:
    """Measure a scan, and its structures if `classes` is given: (X, Y, Z) on its grid, indices into `class_names`.

    quick: measure only some pairs of neighbouring slices of a large scan.
    """
    names = class_names if classes is not None else ()
    found = []
    for channel, stored in zip(channels, scan.channels, strict=True):

        def read(k: int, stored: StoredChannel = stored) -> Plane:
            return stored.values(stored.raw[..., k])

        whole = channel.modality == "CT"
        found.append(
            measure_channel(read, scan.shape, whole=whole, classes=classes, class_count=len(names), quick=quick)
        )
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    labels = {}
    for k, name in enumerate(names[1:], start=1):
        means = [one.label_means[k] for one in found]
        present = tuple(mean for mean in means if mean is not None)
        labels[name] = LabelMeasures(
            volume_ml=float(np.count_nonzero(classes == k)) * voxel_ml,
            means=present if len(present) == len(means) else None,
        )
    return ScanMeasures(
        shape=in_ras_order(scan.shape, scan.affine),
        spacing_mm=in_ras_order(scan.spacing_mm, scan.affine),
        orientation="".join(nib.aff2axcodes(scan.affine)),
        nonzero_fraction=min(one.nonzero_fraction for one in found),
        channels=tuple(one.measures for one in found),
        labels=labels,
    )


def in_ras_order(values: Sequence, affine: Affine) -> tuple:
    """Sort values of the three array axes into the order of the scanner's axes x, y, z."""
    order = np.argsort(ras_orientation(affine)[:, 0])
    return tuple(values[int(k)] for k in order)


def measure_channel(
    read: Callable[[int], Plane],
    shape: tuple[int, int, int],
    *,
    whole: bool,
    classes: npt.NDArray[np.integer] | None = None,
    class_count: int = 0,
    quick: bool = False,
) -> MeasuredChannel:
    """Measure a channel in one pass.

    Args:
        read: returns slice k along the last stored axis, (X, Y).
        shape: (X, Y, Z) as stored.
        whole: True measures all voxels, False only those that are not 0.
        classes: (X, Y, Z) class indices below `class_count`.
        quick: see `measure_scan`.
    """
    step = _step(shape)
    slices = _slices(shape) if quick else list(range(shape[2]))
    box = [(n // 4, max(n - n // 4, n // 4 + 1)) for n in shape]
    inside, everything = _Moments(), _Moments()
    differences = [_Moments() for _ in range(3)]
    sums, counts = np.zeros(class_count), np.zeros(class_count)
    samples, nonzero = [], 0
    last: tuple[int, Plane, npt.NDArray[np.bool_]] | None = None
    for k in slices:
        plane = np.asarray(read(k), dtype=np.float64)
        filled = plane != 0
        nonzero += int(np.count_nonzero(filled))
        use = np.ones_like(filled) if whole else filled
        everything.add(plane[use])
        if box[2][0] <= k < box[2][1]:
            part = (slice(*box[0]), slice(*box[1]))
            inside.add(plane[part][use[part]])
        chosen = np.arange(k % step, plane.size, step)
        samples.append(plane.ravel()[chosen][use.ravel()[chosen]])
        differences[0].add(np.abs(np.diff(plane, axis=0))[use[1:] & use[:-1]])
        differences[1].add(np.abs(np.diff(plane, axis=1))[use[:, 1:] & use[:, :-1]])
        if last is not None and last[0] == k - 1:
            differences[2].add(np.abs(plane - last[1])[use & last[2]])
        last = k, plane, use
        if classes is not None:
            found = classes[..., k].ravel()
            sums += np.bincount(found, weights=plane.ravel(), minlength=class_count)
            counts += np.bincount(found, minlength=class_count)
    values = np.concatenate(samples)
    sd = everything.sd
    scale = sd if sd > 0 else 1.0
    outer = everything.count - inside.count
    rest = (everything.total - inside.total) / outer if outer else everything.mean
    rough = [d.mean for d in differences if d.count]
    return MeasuredChannel(
        measures=ChannelMeasures(
            quantiles=tuple(np.percentile(values, QUANTILES).tolist()) if values.size else (0.0,) * len(QUANTILES),
            mean=everything.mean,
            sd=sd,
            centre=(inside.mean - rest) / scale if inside.count else 0.0,
            roughness=float(np.mean(rough)) / scale if rough else 0.0,
        ),
        nonzero_fraction=nonzero / (shape[0] * shape[1] * len(slices)),
        label_means=tuple(float(s / c) if c else None for s, c in zip(sums, counts, strict=True)),
    )


def _slices(shape: tuple[int, int, int]) -> list[int]:
    """Pairs of neighbouring slices, evenly spread, with about QUICK_VOXELS voxels."""
    every = max(1, min(math.prod(shape) // QUICK_VOXELS, shape[2] // QUICK_SLICES))
    return [k for k in range(shape[2]) if k // 2 % every == every // 2]


def _step(shape: tuple[int, int, int]) -> int:
    """Sampling step, in voxels. Coprime to the line length, or only some columns would be sampled."""
    step = -(-math.prod(shape) // SAMPLES)
    while step > 1 and math.gcd(step, shape[1]) > 1:
        step += 1
    return step


class _Moments:
    """Count, mean and standard deviation of values that arrive in pieces, numerically stable (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        if not values.size:
            return
        mean = float(values.mean())
        delta, total = mean - self.mean, self.count + values.size
        self.squares += float(((values - mean) ** 2).sum()) + delta**2 * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total

    @property
    def total(self) -> float:
        return self.mean * self.count

    @property
    def sd(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0
