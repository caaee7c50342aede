"""Overlays: the slices shown are those where truth and prediction differ most, and they are named rightly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.report.figures import save_figure
from distilldsm.report.overlays import densest_error, overlay


def boxes(*corners: tuple[int, int, int], size: int = 4, shape=(30, 32, 34)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    for x, y, z in corners:
        mask[x : x + size, y : y + size, z : z + size] = 1
    return mask


def test_a_cluster_of_errors_wins_over_many_single_ones():
    truth = boxes((10, 10, 10), size=10)
    prediction = truth.copy()
    prediction[10:20:3, 10, 10] = 0  # lone voxels at the surface
    prediction |= boxes((2, 24, 25))
    x, y, z = densest_error(truth, prediction, (2.0, 2.0, 2.0))
    assert 2 <= x < 6
    assert 24 <= y < 28
    assert 25 <= z < 29
    assert truth[x, y, z] != prediction[x, y, z]


def test_without_errors_the_middle_is_shown():
    truth = boxes((10, 4, 20), size=5)
    assert densest_error(truth, truth, (1.0, 1.0, 1.0)) == (12, 6, 22)
    empty = np.zeros((8, 9, 10), dtype=np.uint8)
    assert densest_error(empty, empty, (1.0, 1.0, 1.0)) == (4, 4, 5)


def texts(figure) -> list[list[str]]:
    return [[axis.get_title(), *(text.get_text() for text in axis.texts)] for axis in figure.axes]


@pytest.mark.parametrize("turned", [False, True])
def test_places_are_the_scanners_whatever_the_files_axes(turned):
    truth = boxes((10, 12, 14), shape=(24, 26, 28))
    prediction = np.zeros_like(truth)
    prediction[10, 12, 14] = 1
    truth[10, 12, 14] = 1
    truth[11:14, 12:16, 14:18] = 0
    truth[10, 12:16, 14:18] = 0
    truth[10, 12, 14] = 0  # the only error
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = -5, -6, -7
    image = np.random.default_rng(0).normal(size=truth.shape)
    if turned:  # the same scan, stored from right to left and with two axes swapped
        image, truth, prediction = (np.swapaxes(a[::-1], 0, 2) for a in (image, truth, prediction))
        flip = np.eye(4)
        flip[0, 0], flip[0, 3] = -1, truth.shape[2] - 1
        affine = (affine @ flip)[:, [2, 1, 0, 3]]
    figure = overlay(image, truth, prediction, affine=affine, labels={"background": 0, "one": 1})
    titles = [axis[0] for axis in texts(figure)]
    assert titles == [
        "sagittal, x = 5.0 mm (slice 11 of 24)",
        "coronal, y = 18.0 mm (slice 13 of 26)",
        "axial, z = 35.0 mm (slice 15 of 28)",
    ]
    # Left and lower edge first.
    assert [axis[1:5] for axis in texts(figure)] == [["P", "A", "I", "S"], ["L", "R", "I", "S"], ["L", "R", "P", "A"]]
    assert all(axis[5].endswith(" mm") for axis in texts(figure))


def test_the_bright_side_is_where_the_letters_say(tmp_path: Path):
    image = np.zeros((20, 20, 20))
    image[10:] = 1  # the patient's right
    figure = overlay(image, image * 0, image * 0, affine=np.eye(4), labels={"background": 0})
    shown = figure.axes[2].images[0].get_array()
    assert shown[:, :10].max() == 0
    assert shown[:, 10:].min() == 1
    save_figure(figure, tmp_path / "x.png")


def test_scale_bars_have_their_length():
    truth = boxes((10, 10, 10))
    figure = overlay(
        np.random.default_rng(0).normal(size=truth.shape),
        truth,
        truth * 0,
        affine=np.diag([2.0, 2.0, 2.0, 1.0]),
        labels={"one": 1},
    )
    for axis in figure.axes:
        bar = next(line for line in axis.lines if line.get_linewidth() == 2.5)
        low, high = bar.get_xdata()
        assert f"{high - low:g} mm" in [text.get_text() for text in axis.texts]
        left, right = axis.images[0].get_extent()[:2]
        assert 0.1 * (right - left) < high - low <= (right - left) / 3


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(0, 7)] * 3), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_the_captions_tell_the_place_of_the_error(place, order, flips):
    """One wrong voxel: whatever the orientation of the array, the three slices go through its place in the scanner."""
    affine = np.zeros((4, 4))
    for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
        affine[world, axis] = (axis + 1.0) * (-1 if flip else 1)
    affine[:3, 3], affine[3, 3] = (10.0, -20.0, 30.0), 1
    truth = np.zeros((8, 8, 8), dtype=np.uint8)
    prediction = truth.copy()
    prediction[place] = 1
    image = np.random.default_rng(0).normal(size=truth.shape)
    figure = overlay(image, truth, prediction, affine=affine, labels={"background": 0, "one": 1})
    told = [
        float(re.search(r"= (\S+) mm", axis.get_title()).group(1).replace("\N{MINUS SIGN}", "-"))
        for axis in figure.axes
    ]
    assert told == pytest.approx(affine[:3, :3] @ place + affine[:3, 3], abs=0.06)
