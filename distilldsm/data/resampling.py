"""Resampling slice by slice along the depth: a slice costs the same memory however deep the volume is.

Every slice is computed on its own from the input slices it needs, in an order of operations that does not depend on
what else is computed. A volume resampled in pieces is therefore, bit for bit, the volume resampled at once. Voxel edges
are aligned: the field of view stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ReadSlice = Callable[[int], Float32]
"""From a slice's number along the depth to (C, H, W)."""

SPLINE_REACH = 16
"""Slices to each side that take part in a cubic spline's coefficient; what is left out weighs less than 1e-9."""
_POLE = math.sqrt(3) - 2


def coordinate(index: int, old: int, new: int) -> float:
    """Where the centre of output sample `index` of `new` lies among `old` input samples."""
    return (index + 0.5) * (old / new) - 0.5


def linear_weights(index: int, old: int, new: int) -> tuple[int, int, float, float]:
    """Two input samples and their weights, the volume continued by its edge samples (as scipy's `nearest`)."""
    position = coordinate(index, old, new)
    first = math.floor(position)
    fraction = position - first
    return max(first, 0), min(first + 1, old - 1), 1.0 - fraction, fraction


def cubic_weights(index: int, old: int, new: int) -> tuple[npt.NDArray[np.intp], Float64]:
    """Input samples and their weights for one output sample of an interpolating cubic B-spline.

    The recursive prefilter of the usual implementation is written out as a sum over `SPLINE_REACH` neighbours: a sum
    that ends needs no other slices of the volume (Unser, Aldroubi, Eden, B-spline signal processing, 1993).
    """
    position = coordinate(index, old, new)
    first = math.floor(position)
    x = position - first
    basis = ((1 - x) ** 3 / 6, 2 / 3 - x**2 + x**3 / 2, 2 / 3 - (1 - x) ** 2 + (1 - x) ** 3 / 2, x**3 / 6)
    offsets = np.arange(-SPLINE_REACH, SPLINE_REACH + 1)
    kernel = _POLE ** np.abs(offsets)
    weights = np.zeros(2 * SPLINE_REACH + 4)
    for m, weight in enumerate(basis):
        weights[m : m + len(kernel)] += weight * kernel
    samples = np.clip(first - 1 - SPLINE_REACH + np.arange(len(weights)), 0, old - 1)
    unique, inverse = np.unique(samples, return_inverse=True)
    summed = np.bincount(inverse, weights)
    return unique, summed / summed.sum()


def zoom_plane(image: npt.NDArray[np.floating], shape: Sequence[int], order: int) -> Float32:
    """Resample (C, H, W) in plane by splines of that order."""
    if image.shape[1:] == tuple(shape):
        return np.asarray(image, dtype=np.float32)
    from scipy import ndimage

    factors = [new / old for new, old in zip(shape, image.shape[1:], strict=True)]
    return np.stack(
        [
            ndimage.zoom(plane, factors, order=order, mode="nearest", grid_mode=True, output=np.float32)
            for plane in image
        ]
    )


class _Window:
    """Remembers the slices around the one being computed, so that each is read once."""

    def __init__(self, read: Callable[[int], Float32]) -> None:
        self._read = read
        self._kept: dict[int, Float32] = {}

    def __call__(self, index: int) -> Float32:
        found = self._kept.get(index)
        if found is None:
            found = self._kept[index] = self._read(index)
        return found

    def forget_before(self, index: int) -> None:
        for old in [k for k in self._kept if k < index]:
            del self._kept[old]


class CubicSlices:
    """Slices of an image on a new grid, cubic splines; asked for in ascending order, each input slice is read once.

    Args:
        read: input slice k as (C, H, W) float32.
        old: (D, H, W) of the input.
        new: (D, H, W) of the output.
        coarse_slices: linear along the depth, after the planes were resampled, as splines overshoot between distant
            slices.
    """

    def __init__(self, read: ReadSlice, old: Sequence[int], new: Sequence[int], *, coarse_slices: bool) -> None:
        self.old, self.new, self.coarse = tuple(old), tuple(new), coarse_slices
        self._source = _Window((lambda k: zoom_plane(read(k), self.new[1:], 3)) if coarse_slices else read)

    def __call__(self, index: int) -> Float32:
        """Output slice `index`, (C, H, W)."""
        depth, new_depth = self.old[0], self.new[0]
        if depth == new_depth:
            self._source.forget_before(index)
            plane = self._source(index)
            return plane if self.coarse else zoom_plane(plane, self.new[1:], 3)
        if self.coarse:
            first, second, a, b = linear_weights(index, depth, new_depth)
            self._source.forget_before(first)
            return (self._source(first).astype(np.float64) * a + self._source(second).astype(np.float64) * b).astype(
                np.float32
            )
        samples, weights = cubic_weights(index, depth, new_depth)
        self._source.forget_before(int(samples[0]))
        total: Float64 | None = None
        for sample, weight in zip(samples.tolist(), weights.tolist(), strict=True):
            term = self._source(sample).astype(np.float64)
            term *= weight
            if total is None:
                total = term
            else:
                total += term
        assert total is not None
        return zoom_plane(total, self.new[1:], 3)


class LinearSlices:
    """Slices of an image on a new grid by linear interpolation, in scipy's own order of operations.

    Bit for bit what `ndimage.zoom(order=1, mode="nearest", grid_mode=True)` gives for the whole volume: in one step,
    or with `coarse_slices` first in plane and then along the depth.
    """

    def __init__(self, read: ReadSlice, old: Sequence[int], new: Sequence[int], *, coarse_slices: bool) -> None:
        self.old, self.new = tuple(old), tuple(new)
        # Where the planes stay or the depth does, one step and two steps are the same.
        self.separate = coarse_slices or self.old[0] == self.new[0] or self.old[1:] == self.new[1:]
        self._source = _Window((lambda k: zoom_plane(read(k), self.new[1:], 1)) if self.separate else read)
        self._rows = [linear_weights(k, self.old[1], self.new[1]) for k in range(self.new[1])]
        self._columns = [linear_weights(k, self.old[2], self.new[2]) for k in range(self.new[2])]

    def last_needed(self, index: int) -> int:
        """The deepest input slice that output slice `index` needs."""
        if self.old[0] == self.new[0]:
            return index
        return linear_weights(index, self.old[0], self.new[0])[1]

    def first_needed(self, index: int) -> int:
        """The first input slice that output slice `index` needs."""
        if self.old[0] == self.new[0]:
            return index
        return linear_weights(index, self.old[0], self.new[0])[0]

    def __call__(self, index: int) -> Float32:
        """Output slice `index`, (C, H, W)."""
        if self.old[0] == self.new[0]:
            self._source.forget_before(index)
            return self._source(index)
        first, second, a, b = linear_weights(index, self.old[0], self.new[0])
        self._source.forget_before(first)
        if self.separate:
            return (self._source(first).astype(np.float64) * a + self._source(second).astype(np.float64) * b).astype(
                np.float32
            )
        out = np.zeros((self._source(first).shape[0], *self.new[1:]), dtype=np.float64)
        rows = [np.array(side) for side in zip(*self._rows, strict=True)]
        columns = [np.array(side) for side in zip(*self._columns, strict=True)]
        # Eight corners, the last axis fastest, each value times its weights in the order of the axes.
        for sample, weight in ((first, a), (second, b)):
            slab = self._source(sample).astype(np.float64) * weight
            for side in (0, 1):
                lines = slab[:, rows[side]] * rows[side + 2][:, None]
                for other in (0, 1):
                    out += lines[:, :, columns[other]] * columns[other + 2]
        return out.astype(np.float32)
