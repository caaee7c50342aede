"""Transforms a scan to the network's grid and back: orientation, crop, resampling. Each step is recorded and undone.

Network space is (C, D, H, W): RAS directions in the order (depth, height, width), at the plan's spacing. Both
directions work slice by slice, so memory does not grow with the depth. Whole volumes use the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.core.errors import DataError
from distilldsm.data.plan import Normalisation, Plan, resampled_shape
from distilldsm.data.resampling import ResampledSlices
from distilldsm.io import Scan
from distilldsm.io.orientation import reorient, spacing_along

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
Size = tuple[int, int, int]
CONSTANT = 1e-6
"""Voxels with an sd below this share of their mean are equal up to float32 rounding."""
MAX_SCALE = 20.0
"""Largest factor, per axis, between the scan's spacing and the model's."""


@dataclass(frozen=True, kw_only=True)
class GeometryRecord:
    """The steps that brought a scan into network space, recorded to undo them."""

    affine: tuple[tuple[float, ...], ...]
    """(4, 4), affine of the file."""
    shape: tuple[int, int, int]
    """(X, Y, Z), shape of the file."""
    axis_order: tuple[int, int, int]
    """RAS axes in the order (depth, height, width)."""
    crop_start: tuple[int, int, int]
    """First voxel of the crop box, (D, H, W) after reorientation."""
    crop_stop: tuple[int, int, int]
    """One past the last voxel of the crop box."""
    resampled: tuple[int, int, int]
    """(D, H, W) after resampling: the network array's shape."""
    coarse_slices: bool

    @property
    def cropped(self) -> Size:
        """(D, H, W), size of the crop box."""
        d, h, w = (b - a for a, b in zip(self.crop_start, self.crop_stop, strict=True))
        return d, h, w


class NetworkImage:
    """A scan in network space, (C, D, H, W), slice by slice.

    Raises (when made):
        DataError: an axis without a direction.
    """

    def __init__(self, scan: Scan, plan: Plan) -> None:
        views, read = scan.planes(plan.axis_order)
        channels, shape = range(len(views)), views[0].shape
        start, stop = (0, 0, 0), shape
        empty = background_of(scan)
        if plan.crop_to_nonzero:
            nonzero = (np.any([read(c, k) != empty[c] for c in channels], axis=0) for k in range(shape[0]))
            start, stop = nonzero_box(nonzero, shape)
        self.record: GeometryRecord = make_record(scan.affine, scan.shape, start, stop, plan)
        self.channels = len(views)
        rows, columns = slice(start[1], stop[1]), slice(start[2], stop[2])

        class Planes:
            """The cropped slices of one channel. They are read twice, for its mean and sd."""

            def __init__(self, channel: int) -> None:
                self.channel = channel

            def __iter__(self) -> Iterator[npt.NDArray]:
                return (read(self.channel, k)[rows, columns] for k in range(start[0], stop[0]))

        rules = [Normaliser(rule, Planes(c), empty[c]) for c, rule in enumerate(plan.normalisation)]

        def normalised(k: int) -> Float32:
            return np.stack([rule(read(c, start[0] + k)[rows, columns]) for c, rule in enumerate(rules)])

        self._slices = ResampledSlices(
            normalised, self.record.cropped, self.record.resampled, order=3, coarse_slices=plan.coarse_slices
        )
        self._kept: dict[int, Float32] = {}

    @property
    def shape(self) -> Size:
        """(D, H, W)."""
        return self.record.resampled

    def slices(self, low: int, high: int) -> Iterator[Float32]:
        """Slices [low, high), each (C, H, W). If `low` ascends from call to call, each slice is computed once."""
        for k in [k for k in self._kept if k < low]:
            del self._kept[k]
        for k in range(low, high):
            if k not in self._kept:
                self._kept[k] = self._slices(k)
            yield self._kept[k]


def to_network_space(scan: Scan, plan: Plan) -> tuple[Float32, GeometryRecord]:
    """Reorient, crop, normalise and resample a scan.

    Returns:
        The network's input (C, D, H, W) float32, not padded, and the record that undoes it.
    """
    image = NetworkImage(scan, plan)
    array = np.empty((image.channels, *image.shape), dtype=np.float32)
    for k in range(image.shape[0]):
        array[:, k] = next(image.slices(k, k + 1))
    return array, image.record


class ScanMask:
    """Converts class probabilities, slice after slice, to labels on the scan's own grid.

    Probabilities are resampled linearly; then the plan's targets choose the class. Voxels outside the crop box are
    background.

    Args:
        probabilities: optional array (X, Y, Z, K) of zeros to fill: uint8 with round(255 p), or float32.

    Attributes:
        mask: (X, Y, Z) label values.
        counts: number of voxels per class.
    """

    def __init__(self, record: GeometryRecord, plan: Plan, probabilities: npt.NDArray | None = None) -> None:
        self.record, self.targets = record, plan.targets
        affine = np.array(record.affine)
        self.mask = np.zeros(record.shape, dtype=np.uint8, order="F")
        self._out = reorient(self.mask[None], affine, record.axis_order)[0]
        self._values = np.array(plan.class_values, dtype=np.uint8)
        self.counts = np.zeros(len(self._values), dtype=np.int64)
        self.counts[0] = self.mask.size - math.prod(record.cropped)
        self._maps = None
        if probabilities is not None:
            self._whole = 255 if probabilities.dtype == np.uint8 else 1
            if not plan.regions:
                probabilities[..., 0] = self._whole  # outside the crop box is background
            self._maps = reorient(np.moveaxis(probabilities, -1, 0), affine, record.axis_order)
        self._kept: dict[int, Float32] = {}
        self._restored = ResampledSlices(
            self._kept.__getitem__, record.resampled, record.cropped, order=1, coarse_slices=record.coarse_slices
        )
        self._done = 0

    def add(self, first: int, planes: list[Float32]) -> None:
        """Add probabilities (K, H, W) of the slices `first`, `first` + 1 ... in ascending order; empties the list."""
        stop, depth = first + len(planes), self.record.cropped[0]
        self._kept.update(enumerate(planes, start=first))
        planes.clear()
        (d0, h0, w0), (_, h1, w1) = self.record.crop_start, self.record.crop_stop
        while self._done < depth and self._restored.needed(self._done).stop <= stop:
            plane, k = self._restored(self._done), d0 + self._done
            classes = self.targets.classes(plane)
            self.counts += np.bincount(classes.ravel(), minlength=len(self.counts))
            self._out[k, h0:h1, w0:w1] = self._values[classes]
            if self._maps is not None:
                self._maps[:, k, h0:h1, w0:w1] = np.rint(plane * 255) if self._whole == 255 else plane
            self._done += 1
            needed = self._restored.needed(self._done).start if self._done < depth else stop
            for old in [k for k in self._kept if k < needed]:
                del self._kept[old]


def mask_of(probabilities: Float32, record: GeometryRecord, plan: Plan) -> Uint8:
    """Convert probabilities (K, D, H, W) of a whole volume to label values (X, Y, Z), see `ScanMask`."""
    if probabilities.shape[1:] != record.resampled:
        raise ValueError(f"probabilities {probabilities.shape[1:]} do not fit the record {record.resampled}")
    restored = ScanMask(record, plan)
    restored.add(0, list(np.moveaxis(probabilities, 1, 0)))
    return restored.mask


def make_record(
    affine: npt.NDArray[np.float64], shape: Size, start: Sequence[int], stop: Sequence[int], plan: Plan
) -> GeometryRecord:
    """The record of a scan: its geometry, the crop box (`start`, `stop`) and the size after resampling."""
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
    classes: Uint8, record: GeometryRecord, class_count: int, *, shares: Uint8 | None = None
) -> Uint8:
    """Resample classes (X, Y, Z) on the scan's grid to (D, H, W) on the network's grid.

    Each class is resampled linearly as a separate map, and the class with the largest value wins: where voxels become
    larger, that is the class with the largest share. So no new label values appear between two others, and boundaries
    stay smooth. Of equal values, the smaller class wins.

    Args:
        shares: array (K - 1, D, H, W) to fill: 255 times the share of each class but the background in each voxel.
    """
    box = tuple(slice(a, b) for a, b in zip(record.crop_start, record.crop_stop, strict=True))
    array = reorient(classes[None], np.array(record.affine), record.axis_order)[0][box]
    if array.shape == record.resampled:
        if shares is not None:
            shares[:] = 255 * (array == np.arange(1, class_count)[:, None, None, None])
        return np.ascontiguousarray(array)
    label = np.zeros(record.resampled, dtype=np.uint8)
    best = np.full(record.resampled, -1, dtype=np.float32)
    for k in range(class_count):  # one map at a time: a data set may have a hundred classes
        of_class = (array == k)[None].astype(np.float32)
        slices = ResampledSlices(
            lambda n, of_class=of_class: of_class[:, n],  # type: ignore[misc]
            record.cropped,
            record.resampled,
            order=1,
            coarse_slices=record.coarse_slices,
        )
        for n in range(record.resampled[0]):
            plane = slices(n)[0]
            label[n][plane > best[n]] = k
            np.maximum(best[n], plane, out=best[n])
            if shares is not None and k:
                shares[k - 1, n] = np.rint(255 * plane)
    return label


def background_of(scan: Scan) -> tuple[float, ...]:
    """The value of each channel that stands for nothing: that of the volume's eight corners if they agree, else 0.

    So a margin of any one value around a scan changes neither its crop nor its normalisation.
    """
    values = []
    for channel in scan.channels:
        corners = channel.values(channel.raw[np.ix_(*[[0, -1]] * 3)])
        values.append(float(corners.flat[0]) if (corners == corners.flat[0]).all() else 0.0)
    return tuple(values)


def nonzero_box(planes: Iterable[npt.NDArray[np.bool_]], shape: Sequence[int]) -> tuple[Size, Size]:
    """Bounding box (start, stop) of the true voxels of a volume; the whole volume if there are none.

    Args:
        planes: slices along the first axis of a volume with shape `shape`.
    """
    hits = [np.zeros(n, dtype=bool) for n in shape]
    for k, plane in enumerate(planes):
        hits[0][k] = plane.any()
        hits[1] |= plane.any(axis=1)
        hits[2] |= plane.any(axis=0)
    start, stop = [], []
    for hit, size in zip(hits, shape, strict=True):
        found = np.flatnonzero(hit)
        start.append(int(found[0]) if found.size else 0)
        stop.append(int(found[-1]) + 1 if found.size else size)
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


class Normaliser:
    """The normalisation of a channel, as a function of any part of the channel.

    Args:
        rule: the normalisation in the plan.
        planes: the channel's slices; a z-score reads them twice. Sums are computed slice by slice, so the result is the
            same whether the volume is in memory or not.
        background: the value that a z-score leaves out, see `background_of`.
    """

    def __init__(self, rule: Normalisation, planes: Iterable[npt.NDArray], background: float = 0.0) -> None:
        self.rule, self.background = rule, background
        self.mean, self.sd = 0.0, 1.0
        if rule.scheme in ("zscore", "zscore_foreground"):
            self.mean, self.sd = _mean_and_sd(planes, background)

    def __call__(self, piece: npt.NDArray) -> Float32:
        rule, channel = self.rule, piece.astype(np.float64)
        if rule.scheme == "none":
            return channel.astype(np.float32)
        if rule.scheme == "ct":
            return ((np.clip(channel, rule.low, rule.high) - rule.mean) / rule.sd).astype(np.float32)
        scaled = (channel - self.mean) / self.sd
        if rule.scheme == "zscore_foreground":
            scaled = np.where(channel != self.background, scaled, 0.0)
        return scaled.astype(np.float32)


def _mean_and_sd(planes: Iterable[npt.NDArray], background: float) -> tuple[float, float]:
    """Mean and sd of the voxels that are not background; 0 and 1 if there are none. `planes` is iterated twice.

    If all these voxels are equal, as in a mask, the sd is their absolute value. Voxels of 0 are then one sd away.
    """

    def content() -> Iterable[npt.NDArray[np.float64]]:
        for plane in planes:
            values = np.ascontiguousarray(plane)
            yield values[values != background].astype(np.float64)

    count, sums = 0, []
    for values in content():
        count += values.size
        sums.append(float(values.sum()))
    if not count:
        return 0.0, 1.0
    mean = math.fsum(sums) / count
    sd = math.sqrt(math.fsum(float(((values - mean) ** 2).sum()) for values in content()) / count)
    return mean, sd if sd > CONSTANT * abs(mean) else abs(mean)


def check_scale(scan: Scan, plan: Plan) -> None:
    """Refuse a scan with a spacing that is very different from the model's spacing.

    Raises:
        DataError: along an axis, the spacings differ by a factor above MAX_SCALE.
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
