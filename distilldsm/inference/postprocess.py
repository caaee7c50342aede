"""Post-processing of masks: keep only the largest connected component of a label, or of several labels as one.

As in nnU-Net (Isensee et al., 2021), voxels are connected over faces, edges and corners (26 neighbours), and what is
removed becomes background.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

BYTES_PER_VOXEL = 7
"""Bytes of the search per voxel of the box around the labels: binary mask, component numbers, comparisons."""


def keep_largest(mask: npt.NDArray[np.uint8], values: Collection[int]) -> dict[int, int]:
    """Keep only the largest connected component of `values` (together) in a mask. Set the others to 0, in place.

    If several components have the largest size, the one with the first voxel stays. The order is that of the array's
    axes (the last axis runs fastest), not that of memory. (nnU-Net keeps all of them.)

    Args:
        mask: (X, Y, Z) label values.
        values: the value of a label, or the values of a region's labels; above 0.

    Returns:
        Value to its number of removed voxels; empty if no voxel was removed.
    """
    from scipy import ndimage

    box = _box(mask, values)
    if box is None:
        return {}
    part = mask[box]
    components, count = ndimage.label(np.ascontiguousarray(_any_of(part, values)), np.ones((3, 3, 3)), output=np.int32)
    if count < 2:
        return {}
    # Blocks of slices, because numpy would convert the whole box to 64-bit numbers for counting.
    sizes = np.zeros(count + 1, dtype=np.int64)
    step = 1 + count // components[0].size
    for start in range(0, len(components), step):
        sizes += np.bincount(components[start : start + step].ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = sizes == sizes.max()
    first = components.ravel()[largest[components].argmax()] if largest.sum() > 1 else sizes.argmax()
    removed = np.zeros(256, dtype=np.int64)
    for plane, numbers in zip(part, components, strict=True):
        others = (numbers != first) & (numbers != 0)
        removed += np.bincount(plane[others], minlength=256)
        plane[others] = 0
    return {int(value): int(removed[value]) for value in np.flatnonzero(removed)}


def _any_of(mask: npt.NDArray[np.uint8], values: Collection[int]) -> npt.NDArray[np.bool_]:
    """Where the mask has one of the values. (`np.isin` needs several times the memory.)"""
    selected = np.zeros(mask.shape, dtype=bool)
    for value in values:
        selected |= mask == value
    return selected


def _box(mask: npt.NDArray[np.uint8], values: Collection[int]) -> tuple[slice, ...] | None:
    """The smallest box around the labels' voxels; None if there are none. It allocates no array of the mask's size."""
    hits = [np.zeros(n, dtype=bool) for n in mask.shape]
    for z in range(mask.shape[2]):
        plane = _any_of(mask[:, :, z], values)
        hits[0] |= plane.any(axis=1)
        hits[1] |= plane.any(axis=0)
        hits[2][z] = plane.any()
    found = [np.flatnonzero(hit) for hit in hits]
    return tuple(slice(int(f[0]), int(f[-1]) + 1) for f in found) if found[0].size else None
