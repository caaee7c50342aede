"""Resampling slice by slice along the depth: a slice costs the same memory however deep the volume is.

Every slice is computed on its own from the input slices it needs, in an order of operations that does not depend on
what else is computed. A volume resampled in pieces is therefore, bit for bit, the volume resampled at once. Voxel edges
are aligned: the field of view stays. Beyond its ends a volume continues with its edge voxels.
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
Weights = tuple[Sequence[int], Sequence[float]]
"""Input samples in ascending order, and what each counts."""

SPLINE_REACH = 16
"""Slices to each side that take part in a cubic spline's coefficient; what is left out weighs less than 1e-9."""
_POLE = math.sqrt(3) - 2


def _place(index: int, old: int, new: int) -> tuple[int, float]:
    """Where the centre of output sample `index` of `new` lies among `old` input samples: whole part and fraction."""
    position = (index + 0.5) * (old / new) - 0.5
    first = math.floor(position)
    return first, position - first


def linear_weights(index: int, old: int, new: int) -> Weights:
    """Input samples and weights for output sample `index`, linear between two samples."""
    if old == new:
        return [index], [1.0]
    first, fraction = _place(index, old, new)
    low, high = max(first, 0), min(first + 1, old - 1)
    return ([low], [1.0]) if low == high else ([low, high], [1.0 - fraction, fraction])


def cubic_weights(index: int, old: int, new: int) -> Weights:
    """Input samples and weights for output sample `index` of an interpolating cubic B-spline.

    The recursive prefilter of the usual implementation is written out as a sum over `SPLINE_REACH` neighbours: a sum
    that ends needs no other slices of the volume (Unser, Aldroubi, Eden, B-spline signal processing, 1993).
    """
    if old == new:
        return [index], [1.0]
    first, x = _place(index, old, new)
    basis = ((1 - x) ** 3 / 6, 2 / 3 - x**2 + x**3 / 2, 2 / 3 - (1 - x) ** 2 + (1 - x) ** 3 / 2, x**3 / 6)
    kernel = _POLE ** np.abs(np.arange(-SPLINE_REACH, SPLINE_REACH + 1))
    weights = np.zeros(2 * SPLINE_REACH + 4)
    for m, weight in enumerate(basis):
        weights[m : m + len(kernel)] += weight * kernel
    samples = np.clip(first - 1 - SPLINE_REACH + np.arange(len(weights)), 0, old - 1)
    unique, inverse = np.unique(samples, return_inverse=True)
    summed = np.bincount(inverse, weights)
    return unique.tolist(), (summed / summed.sum()).tolist()


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


class ResampledSlices:
    """Slices of an image on a new grid by splines; asked for in ascending order, each input slice is read once.

    Args:
        read: input slice k as (C, H, W) float32.
        old: (D, H, W) of the input.
        new: (D, H, W) of the output.
        order: of the splines, 1 (linear) or 3 (cubic).
        coarse_slices: linear along the depth, as splines overshoot between distant slices.
    """

    def __init__(
        self, read: ReadSlice, old: Sequence[int], new: Sequence[int], *, order: int, coarse_slices: bool
    ) -> None:
        self.old, self.new, self.order, self._read = tuple(old), tuple(new), order, read
        # Linear along the depth, the planes are resampled first: each of them once.
        self._planes_first = coarse_slices or order == 1
        self._kept: dict[int, Float32] = {}

    def needed(self, index: int) -> range:
        """The input slices that output slice `index` is made of."""
        samples, _ = self._weights(index)
        return range(samples[0], samples[-1] + 1)

    def _weights(self, index: int) -> Weights:
        weights = linear_weights if self._planes_first else cubic_weights
        return weights(index, self.old[0], self.new[0])

    def _source(self, index: int) -> Float32:
        if index not in self._kept:
            plane = self._read(index)
            self._kept[index] = zoom_plane(plane, self.new[1:], self.order) if self._planes_first else plane
        return self._kept[index]

    def __call__(self, index: int) -> Float32:
        """Output slice `index`, (C, H, W)."""
        samples, weights = self._weights(index)
        for old in [k for k in self._kept if k < samples[0]]:
            del self._kept[old]
        if len(samples) == 1:
            total: npt.NDArray[np.floating] = self._source(samples[0])
        else:
            total = self._source(samples[0]).astype(np.float64)
            total *= weights[0]
            for sample, weight in zip(samples[1:], weights[1:], strict=True):
                term = self._source(sample).astype(np.float64)
                term *= weight
                total += term
        if self._planes_first:
            return np.asarray(total, dtype=np.float32)
        return zoom_plane(total, self.new[1:], self.order)
