"""What one scan looks like, measured the same way on training data and on a new scan, read a slice at a time."""

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
"""Voxels of a channel that quantiles are taken from, at most; means are of all."""

Plane = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class ChannelMeasures:
    """One channel; for other modalities than CT over the voxels that are not 0, as its normalisation is."""

    quantiles: tuple[float, ...]
    """Intensities at QUANTILES."""
    mean: float
    sd: float
    centre: float
    """Mean of the middle half along each axis minus mean of the rest, in sd: changes its sign with the contrast."""
    roughness: float
    """Mean absolute difference of neighbours, mean over the axes, in sd: noise and sharpness."""


@dataclass(frozen=True, kw_only=True)
class LabelMeasures:
    """One structure."""

    volume_ml: float
    means: tuple[float, ...] | None
    """Mean intensity per channel; None where the structure is absent."""


@dataclass(frozen=True, kw_only=True)
class ScanMeasures:
    """One scan, its axes in RAS order (x, y, z)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    """Directions of the stored axes, e.g. LPS."""
    nonzero_fraction: float
    """Smallest over the channels."""
    channels: tuple[ChannelMeasures, ...]
    labels: Mapping[str, LabelMeasures] = field(default_factory=dict)
    """Empty without a mask."""


@dataclass(frozen=True, kw_only=True)
class MeasuredChannel:
    """What `measure_channel` found."""

    measures: ChannelMeasures
    nonzero_fraction: float
    label_means: tuple[float | None, ...]
    """By class index; empty without classes."""


def measure_scan(
    scan: Scan,
    channels: Sequence[Channel],
    class_names: Sequence[str] = (),
    classes: npt.NDArray[np.integer] | None = None,
) -> ScanMeasures:
    """Measure a scan, and with `classes` (X, Y, Z), indices into `class_names` on its grid, its structures."""
    names = class_names if classes is not None else ()
    found = []
    for channel, stored in zip(channels, scan.channels, strict=True):

        def read(k: int, stored: StoredChannel = stored) -> Plane:
            return stored.values(stored.raw[..., k])

        whole = channel.modality == "CT"
        found.append(measure_channel(read, scan.shape, whole=whole, classes=classes, class_count=len(names)))
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
    """Values along the three array axes, in the order of the scanner's axes x, y, z."""
    order = np.argsort(ras_orientation(affine)[:, 0])
    return tuple(values[int(k)] for k in order)


def measure_channel(
    read: Callable[[int], Plane],
    shape: tuple[int, int, int],
    *,
    whole: bool,
    classes: npt.NDArray[np.integer] | None = None,
    class_count: int = 0,
) -> MeasuredChannel:
    """Measure a channel in one pass.

    Args:
        read: slice k along the last stored axis, (X, Y).
        shape: (X, Y, Z) as stored.
        whole: measure all voxels, not only those that are not 0.
        classes: (X, Y, Z) class indices below `class_count`.
    """
    step = _step(shape)
    box = [(n // 4, max(n - n // 4, n // 4 + 1)) for n in shape]
    inside, everything = _Moments(), _Moments()
    differences = [_Moments() for _ in range(3)]
    sums, counts = np.zeros(class_count), np.zeros(class_count)
    samples, nonzero = [], 0
    last: tuple[Plane, npt.NDArray[np.bool_]] | None = None
    for k in range(shape[2]):
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
        if last is not None:
            differences[2].add(np.abs(plane - last[0])[use & last[1]])
        last = plane, use
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
        nonzero_fraction=nonzero / math.prod(shape),
        label_means=tuple(float(s / c) if c else None for s, c in zip(sums, counts, strict=True)),
    )


def _step(shape: tuple[int, int, int]) -> int:
    """Every how manieth voxel is a sample: no divisor of a line's length, which would take the same columns only."""
    step = -(-math.prod(shape) // SAMPLES)
    while step > 1 and math.gcd(step, shape[1]) > 1:
        step += 1
    return step


class _Moments:
    """Count, mean and standard deviation of pieces, without cancellation (Chan et al. 1983)."""

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
