"""Volumes for the viewer's tests: two labels in one axial plane, on a grid whose axes are not the scanner's."""

from __future__ import annotations

from functools import cache

import numpy as np

LABELS = {"background": 0, "shell": 3, "core": 7}
AFFINE = np.array(
    [
        [0.0, -1.5, 0.0, 40.0],
        [0.0, 0.0, 2.0, -30.0],
        [-1.0, 0.0, 0.0, 25.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""The first axis runs downwards, the second to the left, the third to the front; no size is that of another."""
SHAPE = (20, 30, 24)
SHELL = (slice(6, 13), slice(3, 12), slice(4, 11))
CORE = (slice(6, 13), slice(19, 26), slice(13, 20))


@cache
def image() -> np.ndarray:
    """(X, Y, Z) whole numbers from -100 to 100."""
    return np.random.default_rng(0).integers(-100, 101, SHAPE).astype(np.int16)


@cache
def truth() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[SHELL], mask[CORE] = LABELS["shell"], LABELS["core"]
    return mask


@cache
def prediction() -> np.ndarray:
    """The shell where it is, and no core."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[SHELL] = LABELS["shell"]
    return mask


def centre_mm(box: tuple[slice, ...]) -> np.ndarray:
    """Where the middle of a box lies, mm."""
    middle = [(part.start + part.stop - 1) / 2 for part in box]
    return AFFINE[:3, :3] @ middle + AFFINE[:3, 3]
