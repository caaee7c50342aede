"""Three-plane pictures of a case: where truth and prediction agree and where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from distilldsm.evaluation.figures import label_colour, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANES = (
    ("sagittal", "x", ("P", "A", "I", "S")),
    ("coronal", "y", ("L", "R", "I", "S")),
    ("axial", "z", ("L", "R", "P", "A")),
)
"""Of the planes across x, y and z in RAS directions: name, axis, and what lies left, right, below and above."""
BARS_MM = (5, 10, 20, 50, 100)


def overlay(
    image: npt.NDArray[np.floating],
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    affine: npt.NDArray[np.floating],
    *,
    labels: Mapping[str, int],
    title: str,
    at_error: bool = False,
) -> Figure:
    """Three planes of a case: truth as solid, prediction as dashed contours; captions in scanner mm.

    Args:
        image, truth, prediction: (X, Y, Z) on one grid, in any orientation.
        affine: (4, 4), voxel to scanner mm (RAS+).
        labels: name to value; background is not drawn.
        at_error: show the slices in which most voxels differ, otherwise those through the middle of the structures.
    """
    from matplotlib.lines import Line2D

    to_ras = nib.orientations.io_orientation(affine)
    upright = affine @ nib.orientations.inv_ornt_aff(to_ras, image.shape)
    image, truth, prediction = (nib.orientations.apply_orientation(a, to_ras) for a in (image, truth, prediction))
    spacing_mm = np.linalg.norm(upright[:3, :3], axis=0)
    slices = shown_slices(truth, prediction, at_error=at_error)
    place_mm = upright[:3, :3] @ slices + upright[:3, 3]

    figure, axes = new_figure(3, size=(12, 4.6))
    low, high = np.percentile(image, [1, 99])
    drawn = [(number, value) for number, value in enumerate(v for v in labels.values() if v)]
    for plane, axis in enumerate(axes[0]):
        a, b = (k for k in range(3) if k != plane)
        picture = np.take(image, slices[plane], axis=plane).T
        axis.imshow(picture, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=spacing_mm[b] / spacing_mm[a])
        for number, value in drawn:
            for mask, style, width in ((truth, "solid", 1.6), (prediction, "dashed", 1.2)):
                cut = (np.take(mask, slices[plane], axis=plane) == value).T
                if cut.any() and not cut.all():
                    axis.contour(cut, levels=[0.5], colors=[label_colour(number)], linestyles=[style], linewidths=width)
        name, letter, sides = PLANES[plane]
        axis.set_title(f"{name}, {letter} = {place_mm[plane]:.0f} mm", fontsize=10)
        axis.set_axis_off()
        _annotate(axis, sides, picture.shape[1] * spacing_mm[a])
    handles = [
        Line2D([], [], color=label_colour(number), label=name)
        for number, name in enumerate(name for name, v in labels.items() if v)
    ]
    handles += [
        Line2D([], [], color="grey", label="truth"),
        Line2D([], [], color="grey", linestyle="dashed", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def shown_slices(
    truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], *, at_error: bool
) -> npt.NDArray[np.int64]:
    """One slice number along each axis: through the middle of the structures, or where most voxels differ."""
    wrong = truth != prediction
    if at_error and wrong.any():
        counts = (wrong.sum(axis=tuple(k for k in range(3) if k != axis)) for axis in range(3))
        return np.array([int(np.argmax(count)) for count in counts])
    found = np.argwhere((truth > 0) | (prediction > 0))
    return np.median(found, axis=0).astype(int) if len(found) else np.array(truth.shape) // 2


def _annotate(axis: Any, sides: Sequence[str], width_mm: float) -> None:
    """Letters of the directions at the borders, and a bar of a round length."""
    places = ((0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"), (0.5, 0.01, "center", "bottom"))
    for letter, (x, y, ha, va) in zip(sides, (*places, (0.5, 0.99, "center", "top")), strict=True):
        axis.text(x, y, letter, color="#E69F00", fontsize=9, ha=ha, va=va, transform=axis.transAxes)
    fitting = [length for length in BARS_MM if length <= width_mm / 3]
    if fitting:
        share = fitting[-1] / width_mm
        axis.plot([0.97 - share, 0.97], [0.04, 0.04], color="white", linewidth=2.5, transform=axis.transAxes)
        axis.text(0.97, 0.06, f"{fitting[-1]} mm", color="white", fontsize=8, ha="right", transform=axis.transAxes)
