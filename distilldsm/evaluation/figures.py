"""Figures of an evaluation. Colours are told apart by colour-blind readers (Okabe and Ito), axes carry units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
PLANES = ("sagittal", "coronal", "axial")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version in it: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def _new(columns: int = 1, rows: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def dice_boxes(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Box plot of Dice per label, with every case as a point."""
    figure, axes = _new()
    axis = axes[0, 0]
    values = [[row["dice"] for row in rows if row["label"] == label] for label in labels]
    axis.boxplot(values, showfliers=False, widths=0.5, medianprops={"color": "black"})
    rng = np.random.default_rng(0)
    for k, points in enumerate(values):
        jitter = rng.uniform(-0.14, 0.14, len(points))
        axis.scatter(k + 1 + jitter, points, s=14, alpha=0.6, color=COLOURS[k % len(COLOURS)], linewidths=0)
    axis.set_xticks(range(1, len(labels) + 1), labels)
    axis.set_ylabel("Dice")
    axis.set_title(f"Dice of {len(values[0]) if values else 0} held-out cases")
    axis.grid(axis="y", alpha=0.3)
    return figure


def dice_panels(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Box plots of Dice, a panel per label, a box per training with every case as a point: {label: {name: values}}."""
    figure, axes = _new(len(panels), size=(3.4 * len(panels) + 1, 4.2))
    rng = np.random.default_rng(0)
    for axis, (label, trainings) in zip(axes[0], panels.items(), strict=True):
        axis.boxplot(list(trainings.values()), showfliers=False, widths=0.5, medianprops={"color": "black"})
        for k, points in enumerate(trainings.values()):
            jitter = rng.uniform(-0.14, 0.14, len(points))
            axis.scatter(k + 1 + jitter, points, s=14, alpha=0.6, color=COLOURS[k % len(COLOURS)], linewidths=0)
        axis.set_xticks(range(1, len(trainings) + 1), list(trainings), rotation=20)
        axis.set_title(label)
        axis.set_ylabel("Dice")
        axis.grid(axis="y", alpha=0.3)
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, and Dice of the held-out volumes where it was measured, over epochs."""
    figure, axes = _new(2, size=(10, 3.8))
    left, right = axes[0]
    epochs = [h["epoch"] for h in history]
    left.plot(epochs, [h["train_loss"] for h in history], color=COLOURS[0])
    left.set_xlabel("epoch")
    left.set_ylabel("training loss")
    left.grid(alpha=0.3)
    scored = [h for h in history if "val_dice" in h]
    for k, label in enumerate(scored[-1]["val_dice"] if scored else ()):
        right.plot(
            [h["epoch"] for h in scored],
            [h["val_dice"][label] for h in scored],
            marker="o",
            markersize=4,
            color=COLOURS[k % len(COLOURS)],
            label=label,
        )
    right.set_xlabel("epoch")
    right.set_ylabel("Dice of held-out volumes (network space)")
    right.grid(alpha=0.3)
    if scored:
        right.legend()
    return figure


def volume_agreement(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Predicted against true volume of every case and label, ml."""
    figure, axes = _new(size=(5, 4.6))
    axis = axes[0, 0]
    highest = 0.0
    for k, label in enumerate(labels):
        truth = [row["volume_truth_ml"] for row in rows if row["label"] == label]
        predicted = [row["volume_predicted_ml"] for row in rows if row["label"] == label]
        highest = max([highest, *truth, *predicted])
        axis.scatter(truth, predicted, s=16, alpha=0.7, color=COLOURS[k % len(COLOURS)], label=label, linewidths=0)
    axis.plot([0, highest], [0, highest], color="grey", linewidth=1, zorder=0)
    axis.set_xlabel("true volume (ml)")
    axis.set_ylabel("predicted volume (ml)")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def overlay(
    image: npt.NDArray[np.floating],
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    *,
    spacing_mm: Sequence[float],
    labels: Mapping[str, int],
    title: str,
) -> Figure:
    """Three planes through the middle of the structures: truth as solid, prediction as dashed contours.

    Args:
        image, truth, prediction: (X, Y, Z) in RAS orientation.
        spacing_mm: (x, y, z).
    """
    from matplotlib.lines import Line2D

    figure, axes = _new(3, size=(12, 4.4))
    found = np.argwhere((truth > 0) | (prediction > 0))
    centre = np.median(found, axis=0).astype(int) if len(found) else np.array(image.shape) // 2
    low, high = np.percentile(image, [1, 99])
    for plane, axis in enumerate(axes[0]):
        a, b = (k for k in range(3) if k != plane)
        picture = np.take(image, centre[plane], axis=plane).T
        axis.imshow(picture, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=spacing_mm[b] / spacing_mm[a])
        for k, value in enumerate(v for v in labels.values() if v):
            colour = COLOURS[(k + 1) % len(COLOURS)]
            for mask, style, width in ((truth, "solid", 1.6), (prediction, "dashed", 1.2)):
                cut = (np.take(mask, centre[plane], axis=plane) == value).T
                if cut.any() and not cut.all():
                    axis.contour(cut, levels=[0.5], colors=[colour], linestyles=[style], linewidths=width)
        axis.set_title(f"{PLANES[plane]}, {centre[plane] * spacing_mm[plane]:.0f} mm", fontsize=10)
        axis.set_axis_off()
    handles = [
        Line2D([], [], color=COLOURS[(k + 1) % len(COLOURS)], label=name)
        for k, name in enumerate(name for name, v in labels.items() if v)
    ]
    handles += [
        Line2D([], [], color="grey", label="truth"),
        Line2D([], [], color="grey", linestyle="dashed", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
