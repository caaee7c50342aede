"""From a scan's grid to the network's and back: orientation, crop, resampling, each recorded and undone exactly.

Network space is (C, D, H, W): the axes are RAS directions ordered (depth, height, width), at the plan's spacing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.fingerprint import nonzero_box
from distilldsm.data.plan import Normalisation, Plan, resampled_shape
from distilldsm.data.resampling import CubicSlices
from distilldsm.data.targets import Targets
from distilldsm.io import Scan, Volume, read_scan
from distilldsm.io.orientation import ras_orientation, reorient, spacing_along

Float32 = npt.NDArray[np.float32]
CONSTANT = 1e-6
"""Voxels whose sd is this share of their mean differ by float32's rounding only."""
MAX_SCALE = 20.0
"""Largest factor, per axis, between the scan's spacing and the model's."""


@dataclass(frozen=True, kw_only=True)
class GeometryRecord:
    """What was done to a scan, so that it can be undone."""

    affine: tuple[tuple[float, ...], ...]
    """(4, 4) of the file."""
    shape: tuple[int, int, int]
    """(X, Y, Z) of the file."""
    axis_order: tuple[int, int, int]
    """RAS axes in the order (depth, height, width)."""
    crop_start: tuple[int, int, int]
    """First voxel kept, (D, H, W) after reorientation."""
    crop_stop: tuple[int, int, int]
    """One past the last voxel kept."""
    resampled: tuple[int, int, int]
    """(D, H, W) after resampling: the network array's shape."""
    coarse_slices: bool


def undo_reorient(array: npt.NDArray, affine: npt.NDArray[np.float64], axis_order: Sequence[int]) -> npt.NDArray:
    """The exact inverse of `reorient`."""
    ras = array.transpose(0, *(int(k) + 1 for k in np.argsort(axis_order)))
    to_ras = ras_orientation(affine)
    back = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), to_ras)
    return np.moveaxis(nib.orientations.apply_orientation(np.moveaxis(ras, 0, -1), back), -1, 0)


def normalise(image: Float32, normalisation: Sequence[Normalisation]) -> Float32:
    """Normalise each channel of (C, D, H, W) as the plan says; returns a new float32 array."""
    out = np.empty_like(image, dtype=np.float32)
    for k, rule in enumerate(normalisation):
        apply = Normaliser(rule, image[k])
        for index, plane in enumerate(image[k]):
            out[k, index] = apply(plane)
    return out


class Normaliser:
    """A channel's normalisation as a function of a piece of it.

    Args:
        rule: what the plan says.
        planes: the channel's slices, gone through twice for a z-score. Sums are taken slice by slice, so that it does
            not matter whether the volume is in memory.
    """

    def __init__(self, rule: Normalisation, planes: Iterable[npt.NDArray]) -> None:
        self.rule = rule
        self.mean, self.sd = 0.0, 1.0
        if rule.scheme in ("zscore", "zscore_foreground"):
            self.mean, self.sd = _mean_and_sd(planes)

    def __call__(self, piece: npt.NDArray) -> Float32:
        rule, channel = self.rule, piece.astype(np.float64)
        if rule.scheme == "none":
            return channel.astype(np.float32)
        if rule.scheme == "ct":
            return ((np.clip(channel, rule.low, rule.high) - rule.mean) / rule.sd).astype(np.float32)
        scaled = (channel - self.mean) / self.sd
        if rule.scheme == "zscore_foreground":
            scaled = np.where(channel != 0, scaled, 0.0)
        return scaled.astype(np.float32)


def _mean_and_sd(planes: Iterable[npt.NDArray]) -> tuple[float, float]:
    """Of the voxels that are not zero; 0 and 1 where there are none. `planes` is iterated twice.

    Where they are all the same, as of a mask, the sd is their size: voxels that are zero are then one sd away.
    """

    def nonzero() -> Iterable[npt.NDArray[np.float64]]:
        for plane in planes:
            values = np.ascontiguousarray(plane)
            yield values[values != 0].astype(np.float64)

    count, sums = 0, []
    for values in nonzero():
        count += values.size
        sums.append(float(values.sum()))
    if not count:
        return 0.0, 1.0
    mean = math.fsum(sums) / count
    sd = math.sqrt(math.fsum(float(((values - mean) ** 2).sum()) for values in nonzero()) / count)
    return mean, sd if sd > CONSTANT * abs(mean) else abs(mean)


def resample(array: Float32, shape: Sequence[int], *, order: int, coarse_slices: bool) -> Float32:
    """Resample (C, D, H, W) to `shape`, the field of view kept (voxel edges aligned).

    Args:
        array: (C, D, H, W).
        shape: new (D, H, W).
        order: spline order (1 linear, 3 cubic).
        coarse_slices: along the depth linear at most, as splines overshoot between distant slices.
    """
    if order == 3:
        slices = CubicSlices(lambda k: array[:, k], array.shape[1:], tuple(shape), coarse_slices=coarse_slices)
        return np.ascontiguousarray(np.stack([slices(k) for k in range(shape[0])], axis=1))
    from scipy import ndimage

    out = array
    steps = (((1, 2), order), ((0,), min(order, 1))) if coarse_slices else (((0, 1, 2), order),)
    for axes, degree in steps:
        target = list(out.shape[1:])
        for axis in axes:
            target[axis] = int(shape[axis])
        if tuple(target) == out.shape[1:]:
            continue
        factors = [new / old for new, old in zip(target, out.shape[1:], strict=True)]
        out = np.stack(
            [
                ndimage.zoom(channel, factors, order=degree, mode="nearest", grid_mode=True, output=np.float32)
                for channel in out
            ]
        )
    return np.ascontiguousarray(out, dtype=np.float32)


def to_network_space(volume: Volume, plan: Plan) -> tuple[Float32, GeometryRecord]:
    """Reorient, crop, normalise and resample a scan.

    Returns:
        The network's input (C, D, H, W) float32, not padded, and the record that undoes it.
    """
    array = reorient(volume.data, volume.affine, plan.axis_order)
    start, stop = nonzero_box(array) if plan.crop_to_nonzero else ((0, 0, 0), array.shape[1:])
    record = make_record(volume.affine, volume.shape, start, stop, plan)
    array = array[:, start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]]
    array = normalise(array, plan.normalisation)
    return resample(array, record.resampled, order=3, coarse_slices=plan.coarse_slices), record


def make_record(
    affine: npt.NDArray[np.float64],
    shape: tuple[int, int, int],
    start: Sequence[int],
    stop: Sequence[int],
    plan: Plan,
) -> GeometryRecord:
    """What bringing a scan into network space means: its geometry, the box that is kept, the new size."""
    cropped = [int(b) - int(a) for a, b in zip(start, stop, strict=True)]
    return GeometryRecord(
        affine=tuple(tuple(float(v) for v in row) for row in affine),
        shape=shape,
        axis_order=plan.axis_order,
        crop_start=(int(start[0]), int(start[1]), int(start[2])),
        crop_stop=(int(stop[0]), int(stop[1]), int(stop[2])),
        resampled=resampled_shape(cropped, spacing_along(affine, plan.axis_order), plan.target_spacing_mm),
        coarse_slices=plan.coarse_slices,
    )


def label_to_network_space(
    classes: npt.NDArray[np.uint8], record: GeometryRecord, class_count: int
) -> npt.NDArray[np.uint8]:
    """Classes (X, Y, Z) in the scan's grid to (D, H, W) in the network's.

    Each class is resampled linearly as a map of its own and the largest wins: no label value is made up between two
    others, and boundaries stay smooth.
    """
    array = reorient(classes[None], np.array(record.affine), record.axis_order)
    (d0, h0, w0), (d1, h1, w1) = record.crop_start, record.crop_stop
    array = array[:, d0:d1, h0:h1, w0:w1]
    if array.shape[1:] == record.resampled:
        return np.ascontiguousarray(array[0])
    label = np.zeros(record.resampled, dtype=np.uint8)
    best = np.full(record.resampled, -1, dtype=np.float32)
    for k in range(class_count):  # one map at a time: a data set may have a hundred classes
        of_class = (array == k).astype(np.float32)
        of_class = resample(of_class, record.resampled, order=1, coarse_slices=record.coarse_slices)[0]
        label[of_class > best] = k
        np.maximum(best, of_class, out=best)
    return label


def scores_to_scan(scores: Float32, record: GeometryRecord, targets: Targets) -> npt.NDArray[np.uint8]:
    """Scores (K, D, H, W) in network space to classes (X, Y, Z) in the scan's grid.

    Scores are resampled linearly, then `targets` decides; what was cropped away is background.
    """
    cropped = tuple(b - a for a, b in zip(record.crop_start, record.crop_stop, strict=True))
    if scores.shape[1:] != record.resampled:
        raise ValueError(f"scores {scores.shape[1:]} do not fit the record {record.resampled}")
    classes = np.zeros((1, *_reoriented_shape(record)), dtype=np.uint8)
    (d0, h0, w0), (d1, h1, w1) = record.crop_start, record.crop_stop
    restored = resample(scores, cropped, order=1, coarse_slices=record.coarse_slices)
    classes[0, d0:d1, h0:h1, w0:w1] = targets.classes(restored)
    return np.ascontiguousarray(undo_reorient(classes, np.array(record.affine), record.axis_order)[0])


def _reoriented_shape(record: GeometryRecord) -> tuple[int, ...]:
    orientation = ras_orientation(np.array(record.affine))
    ras = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        ras[int(target)] = record.shape[axis]
    return tuple(ras[k] for k in record.axis_order)


def check_scale(scan: Scan, plan: Plan) -> None:
    """Refuse a scan whose spacing has nothing to do with what the model was trained on.

    Raises:
        DataError: a factor beyond MAX_SCALE along an axis.
    """
    spacing_mm = spacing_along(scan.affine, plan.axis_order)
    for seen, target in zip(spacing_mm, plan.target_spacing_mm, strict=True):
        if not 1 / MAX_SCALE <= seen / target <= MAX_SCALE:
            raise DataError(
                "has voxels of another order of size than the model was trained on",
                where=scan.path,
                seen=f"{' x '.join(f'{v:g}' for v in spacing_mm)} mm (depth, height, width)",
                rule=f"{' x '.join(f'{v:g}' for v in plan.target_spacing_mm)} mm, at most {MAX_SCALE:g} times finer "
                "or coarser",
                hint="check the voxel size and the unit in the header",
            )


def read_scan_for(plan: Plan, paths: Sequence[Path]) -> Scan:
    """One scan of the plan's channels, as `distilldsm predict` takes it.

    Raises:
        DataError: see `read_scan` and `check_scale`.
    """
    scan = read_scan(paths, len(plan.channels), names=[channel.name for channel in plan.channels])
    check_scale(scan, plan)
    return scan
