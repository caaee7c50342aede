"""Resampling slice by slice along the depth. The memory for a slice does not depend on the depth of the volume.

Each slice is computed from the input slices that it needs, always with the same order of operations. So a volume
resampled in pieces equals, bit for bit, the volume resampled at once. Voxel edges are aligned, so the field of view
stays the same. Outside the volume, its edge voxels are repeated. Along an axis that becomes coarser, a Gaussian is
applied first: without it, details finer than the new voxels would become noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ReadSlice = Callable[[int], Float32]
"""Slice index along the depth to the slice (C, H, W)."""
Weights = tuple[Sequence[int], Sequence[float]]
"""Indices of input samples in ascending order, and their weights."""

SPLINE_REACH = 16
"""Number of slices on each side that contribute to a cubic spline's coefficient. The others weigh less than 1e-9."""
_POLE = math.sqrt(3) - 2


LEAST_SD = 0.2
"""A narrower Gaussian is left out: its weights for the neighbours are below 4e-6."""


def low_pass(old: int, new: int) -> npt.NDArray[np.float64]:
    """Weights (2 r + 1) of the Gaussian that is applied before an axis of `old` samples gets `new`; [1] if none is.

    Its width turns voxels of the old size into voxels of the new one: sd = sqrt(f^2 - 1) / 2.355 old samples, with f =
    old / new, if the point spread is a Gaussian as wide (at half maximum) as a voxel (Cardoso et al., MICCAI 2015).
    """
    sd = math.sqrt(max((old / new) ** 2 - 1, 0.0)) / (2 * math.sqrt(2 * math.log(2)))
    if sd < LEAST_SD:
        return np.ones(1)
    radius = math.ceil(4 * sd)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sd) ** 2)
    return weights / weights.sum()


def smoothed(weights: Weights, old: int, new: int) -> Weights:
    """The weights of input samples, if `weights` are those of samples after the low-pass."""
    kernel = low_pass(old, new)
    if len(kernel) == 1:
        return weights
    samples, factors = weights
    reach = np.arange(len(kernel)) - len(kernel) // 2
    summed = np.zeros(old)
    for sample, factor in zip(samples, factors, strict=True):
        np.add.at(summed, np.clip(sample + reach, 0, old - 1), factor * kernel)
    used = np.flatnonzero(summed)
    return used.tolist(), summed[used].tolist()


def _place(index: int, old: int, new: int) -> tuple[int, float]:
    """Position of output sample `index` (of `new`) among the `old` input samples: whole part and fraction."""
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

    The usual recursive prefilter needs the whole volume. Here it is a finite sum over `SPLINE_REACH` neighbours on each
    side (Unser, Aldroubi, Eden, B-spline signal processing, 1993).
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
    """Resample (C, H, W) in plane with splines of order `order`, after the low-pass."""
    if image.shape[1:] == tuple(shape):
        return np.asarray(image, dtype=np.float32)
    from scipy import ndimage

    for axis, (old, new) in enumerate(zip(image.shape[1:], shape, strict=True), start=1):
        if len(kernel := low_pass(old, new)) > 1:
            image = ndimage.correlate1d(image, kernel, axis=axis, mode="nearest")
    factors = [new / old for new, old in zip(shape, image.shape[1:], strict=True)]
    return np.stack(
        [
            ndimage.zoom(plane, factors, order=order, mode="nearest", grid_mode=True, output=np.float32)
            for plane in image
        ]
    )


class ResampledSlices:
    """Slices of an image on a new grid, by splines. If called in ascending order, it reads each input slice once.

    Args:
        read: input slice k as (C, H, W) float32.
        old: (D, H, W) of the input.
        new: (D, H, W) of the output.
        order: order of the splines, 1 (linear) or 3 (cubic).
        coarse_slices: linear along the depth, because splines overshoot between distant slices.
    """

    def __init__(
        self, read: ReadSlice, old: Sequence[int], new: Sequence[int], *, order: int, coarse_slices: bool
    ) -> None:
        self.old, self.new, self.order, self._read = tuple(old), tuple(new), order, read
        # If it is linear along the depth, planes are resampled first, each of them once.
        self._planes_first = coarse_slices or order == 1
        self._kept: dict[int, Float32] = {}

    def needed(self, index: int) -> range:
        """The range of input slices from which output slice `index` is computed."""
        samples, _ = self._weights(index)
        return range(samples[0], samples[-1] + 1)

    def _weights(self, index: int) -> Weights:
        weights = linear_weights if self._planes_first else cubic_weights
        return smoothed(weights(index, self.old[0], self.new[0]), self.old[0], self.new[0])

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
