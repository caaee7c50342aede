"""Figures of an evaluation. Colours are told apart by colour-blind readers (Okabe and Ito), axes carry units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilldsm.evaluation.statistics import agreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def label_colour(number: int) -> str:
    """Of the label that is the `number`-th (from 0) besides background; the same in every figure and in the viewer."""
    return COLOURS[(number + 1) % len(COLOURS)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version in it: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def dice_boxes(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Box plots of Dice and of HD95 per label, with every case as a point."""
    figure, axes = new_figure(2, size=(4.4 + 1.4 * len(labels), 4.2))
    rng = np.random.default_rng(0)
    for axis, (metric, name) in zip(axes[0], (("dice", "Dice"), ("hd95_mm", "HD95 (mm)")), strict=True):
        values = [[row[metric] for row in rows if row["label"] == label] for label in labels]
        axis.boxplot(values, showfliers=False, widths=0.5, medianprops={"color": "black"})
        for k, points in enumerate(values):
            jitter = rng.uniform(-0.14, 0.14, len(points))
            axis.scatter(k + 1 + jitter, points, s=14, alpha=0.6, color=label_colour(k), linewidths=0)
        axis.set_xticks(range(1, len(labels) + 1), labels, rotation=20 if len(labels) > 3 else 0)
        axis.set_ylabel(name)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{len(values[0]) if values else 0} held-out cases", fontsize=11)
    return figure


def dice_panels(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Box plots of Dice, a panel per label, a box per training with every case as a point: {label: {name: values}}."""
    figure, axes = new_figure(len(panels), size=(3.4 * len(panels) + 1, 4.2))
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
    """Training loss, Dice of the held-out volumes where it was measured, and learning rate, over epochs."""
    figure, axes = new_figure(3, size=(12, 3.6))
    left, middle, right = axes[0]
    epochs = [h["epoch"] for h in history]
    left.plot(epochs, [h["train_loss"] for h in history], color=COLOURS[0])
    left.set_ylabel("training loss")
    scored = [h for h in history if "val_dice" in h]
    for k, label in enumerate(scored[-1]["val_dice"] if scored else ()):
        middle.plot(
            [h["epoch"] for h in scored],
            [h["val_dice"][label] for h in scored],
            marker="o",
            markersize=4,
            color=label_colour(k),
            label=label,
        )
    middle.set_ylabel("Dice of held-out volumes (network space)")
    if scored:
        middle.legend()
    right.plot(epochs, [h.get("learning_rate", float("nan")) for h in history], color="black")
    right.set_ylabel("learning rate")
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    return figure


def volume_agreement(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """Volumes of every case and label, ml: predicted by true, their difference (Bland and Altman, 1986), Dice."""
    figure, axes = new_figure(3, size=(13.5, 4.4))
    pairs, difference, score = axes[0]
    highest = 0.0
    for k, label in enumerate(labels):
        of_label = [row for row in rows if row["label"] == label]
        truth = np.array([row["volume_truth_ml"] for row in of_label])
        predicted = np.array([row["volume_predicted_ml"] for row in of_label])
        highest = max([highest, *truth, *predicted])
        look: dict[str, Any] = {"s": 16, "alpha": 0.7, "color": label_colour(k), "linewidths": 0}
        pairs.scatter(truth, predicted, label=label, **look)
        difference.scatter((truth + predicted) / 2, predicted - truth, **look)
        score.scatter(truth, [row["dice"] for row in of_label], **look)
        agrees = agreement(truth.tolist(), predicted.tolist())
        if agrees is not None:
            difference.axhline(agrees.bias, color=label_colour(k), linewidth=1.2)
            for limit in (agrees.low, agrees.high):
                difference.axhline(limit, color=label_colour(k), linewidth=1, linestyle="dashed")
    pairs.plot([0, highest], [0, highest], color="grey", linewidth=1, zorder=0)
    difference.axhline(0, color="grey", linewidth=1, zorder=0)
    for axis, x, y in (
        (pairs, "true volume (ml)", "predicted volume (ml)"),
        (difference, "mean of true and predicted volume (ml)", "predicted minus true (ml)"),
        (score, "true volume (ml)", "Dice"),
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    pairs.legend()
    difference.set_title("bias, and 95 % limits of agreement (dashed)", fontsize=10)
    return figure
