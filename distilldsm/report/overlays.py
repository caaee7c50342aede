"""Truth and prediction over the scan: three planes through one point, with directions, positions in mm and a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.io.orientation import spacing_of
from distilldsm.report.figures import label_colour, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANES = ("sagittal", "coronal", "axial")
AXES = "xyz"
LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
"""Letters at the low and the high end of each RAS axis."""
NEAR_MM = 10.0
"""Errors are counted in boxes of this size, so that a single wrong voxel does not decide which slice is shown."""
MARGIN_MM = 12.0
"""At least this margin is shown around the structures."""
ERROR_COLOUR = (0.94, 0.89, 0.26, 0.38)

Labels = npt.NDArray[np.integer]


def overlay(
    image: npt.NDArray[np.floating],
    truth: Labels,
    prediction: Labels,
    *,
    affine: npt.NDArray[np.float64],
    labels: Mapping[str, int],
) -> Figure:
    """Three planes through the point with most errors. Truth: solid contour; prediction: dashed; errors: yellow.

    Args:
        image, truth, prediction: (X, Y, Z), on the same grid, in any orientation.
        affine: (4, 4), voxel to scanner mm (RAS+).
        labels: name to value; background (0) may be among them.
    """
    image, truth, prediction, affine = _canonical(affine, image, truth, prediction)
    spacing_mm = spacing_of(affine)
    point = densest_error(truth, prediction, spacing_mm)
    window = _around(truth, prediction, spacing_mm)
    place_mm = affine[:3, :3] @ point + affine[:3, 3]
    shown = image[window]
    low, high = (float(value) for value in np.percentile(shown[np.isfinite(shown)], [1, 99]))
    foreground = {name: value for name, value in labels.items() if value}
    figure, axes = new_figure(3, size=(11, 4.3))
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for plane, axis in enumerate(axes[0]):
        masks = (truth[window], prediction[window])
        _draw_plane(axis, plane, shown, masks, list(foreground.values()), point, window, spacing_mm, (low, high))
        axis.set_title(
            f"{PLANES[plane]}, {AXES[plane]} = {_signed(place_mm[plane])} mm "
            f"(slice {point[plane] + 1} of {image.shape[plane]})",
            fontsize=10,
        )
    handles: list[Any] = [
        *(Line2D([], [], color=label_colour(k), label=plain(name)) for k, name in enumerate(foreground)),
        Line2D([], [], color="grey", label="truth"),
        Line2D([], [], color="grey", linestyle="dashed", label="prediction"),
        Patch(color=ERROR_COLOUR, label="they differ"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
    return figure


def _draw_plane(
    axis: Any,
    plane: int,
    shown: npt.NDArray[np.floating],
    masks: tuple[Labels, Labels],
    values: Sequence[int],
    point: tuple[int, int, int],
    window: tuple[slice, slice, slice],
    spacing_mm: Sequence[float],
    grey: tuple[float, float],
) -> None:
    """Draw one slice through `point`: the scan with the intensities `grey` from black to white, and both masks."""
    a, b = (k for k in range(3) if k != plane)

    def cut(array: npt.NDArray) -> npt.NDArray:
        return np.take(array, point[plane] - window[plane].start, axis=plane).T

    # In mm, so that all axes have the same scale. Voxel centres lie at integer multiples of the spacing.
    grid = [np.arange(window[k].start, window[k].stop) * spacing_mm[k] for k in (a, b)]
    extent = [(end - 0.5) * spacing_mm[k] for k in (a, b) for end in (window[k].start, window[k].stop)]
    axis.imshow(cut(shown), cmap="gray", vmin=grey[0], vmax=grey[1], origin="lower", extent=extent)
    truth, prediction = masks
    wrong = cut(truth != prediction)
    tint = np.zeros((*wrong.shape, 4))
    tint[wrong] = ERROR_COLOUR
    axis.imshow(tint, origin="lower", extent=extent, interpolation="nearest")
    for k, value in enumerate(values):
        for mask, style, width in ((truth, "solid", 1.7), (prediction, "dashed", 1.3)):
            inside = cut(mask == value)
            if inside.any() and not inside.all() and min(inside.shape) > 1:
                axis.contour(
                    *grid, inside, levels=[0.5], colors=[label_colour(k)], linestyles=[style], linewidths=width
                )
    for k, line in ((a, axis.axvline), (b, axis.axhline)):
        line(point[k] * spacing_mm[k], color="white", linewidth=0.6, alpha=0.45, linestyle="dotted")
    _letters(axis, a, b)
    _scale_bar(axis, extent)
    axis.set_axis_off()


def densest_error(truth: Labels, prediction: Labels, spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """The voxel with the most wrong labels within NEAR_MM of it.

    If there is no error: the middle of the structures. If there are no structures either: the middle of the volume.
    """
    from scipy import ndimage

    wrong = truth != prediction
    if not wrong.any():
        found = np.argwhere(truth > 0)
        centre = np.median(found, axis=0) if len(found) else np.array(truth.shape) // 2
        return int(centre[0]), int(centre[1]), int(centre[2])
    (box,) = ndimage.find_objects(wrong.astype(np.uint8))
    size = [max(1, round(NEAR_MM / step)) for step in spacing_mm]
    dense = ndimage.uniform_filter(wrong[box].astype(np.float32), size=size, mode="constant")
    # The middle of the box may have the right label. So the search covers wrong voxels only.
    best = np.unravel_index(int(np.argmax(np.where(wrong[box], dense, -1))), dense.shape)
    x, y, z = (int(k) + side.start for k, side in zip(best, box, strict=True))
    return x, y, z


def _canonical(affine: npt.NDArray[np.floating], *arrays: npt.NDArray) -> Any:
    """The arrays with axes reordered and flipped to be closest to RAS, and the matching affine."""
    orientation = nib.orientations.io_orientation(affine)
    turned = [np.ascontiguousarray(nib.orientations.apply_orientation(array, orientation)) for array in arrays]
    return *turned, affine @ nib.orientations.inv_ornt_aff(orientation, arrays[0].shape)


def _around(truth: Labels, prediction: Labels, spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """The box of the structures plus a margin of MARGIN_MM or a third of the box. No structures: the whole volume."""
    from scipy import ndimage

    boxes = ndimage.find_objects(((truth > 0) | (prediction > 0)).astype(np.uint8))
    if not boxes:
        return slice(0, truth.shape[0]), slice(0, truth.shape[1]), slice(0, truth.shape[2])
    sides = []
    for side, length, step in zip(boxes[0], truth.shape, spacing_mm, strict=True):
        margin = max(round(MARGIN_MM / step), (side.stop - side.start) // 3)
        sides.append(slice(max(0, side.start - margin), min(length, side.stop + margin)))
    return sides[0], sides[1], sides[2]


def _letters(axis: Any, a: int, b: int) -> None:
    style = {"transform": axis.transAxes, "color": "white", "fontsize": 9, "fontweight": "bold",
             "bbox": {"facecolor": "black", "alpha": 0.45, "pad": 1.2, "linewidth": 0}}  # fmt: skip
    axis.text(0.02, 0.5, LETTERS[a][0], ha="left", va="center", **style)
    axis.text(0.98, 0.5, LETTERS[a][1], ha="right", va="center", **style)
    axis.text(0.5, 0.02, LETTERS[b][0], ha="center", va="bottom", **style)
    axis.text(0.5, 0.98, LETTERS[b][1], ha="center", va="top", **style)


def _scale_bar(axis: Any, extent: Sequence[float]) -> None:
    """Draw a bar of 1, 2, 5 ... mm, at most a third of the width, in the lower left corner."""
    left, right, bottom, top = extent
    lengths = [base * 10**power for power in range(-3, 5) for base in (1, 2, 5)]
    length = max(one for one in lengths if one <= max((right - left) / 3, lengths[0]))
    x, y = left + 0.05 * (right - left), bottom + 0.06 * (top - bottom)
    axis.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    axis.text(x, y + 0.015 * (top - bottom), f"{length:g} mm", color="white", fontsize=8, va="bottom",
              bbox={"facecolor": "black", "alpha": 0.45, "pad": 0.8, "linewidth": 0})  # fmt: skip


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "\u2212")
