"""Figures of an evaluation. Colours are told apart by colour-blind readers (Okabe and Ito), axes carry units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LINES_FOR = 4
"""So many labels get lines of their own in the Bland-Altman plot; more would hide the points."""
LEGEND_FOR = 12

Rows = Sequence[Mapping[str, Any]]


def label_colour(k: int) -> str:
    """Of the k-th foreground label, from 0: in plots, overlays and the viewer the same."""
    return COLOURS[(k + 1) % len(COLOURS)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version in it: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (5.4, 3.7)) -> tuple[Figure, Any]:
    """A figure without pyplot's state, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def score_boxes(rows: Rows, labels: Sequence[str], metric: str, title: str) -> Figure:
    """Box plot of a score, a line per label, with every case as a point."""
    figure, axes = new_figure(size=(5.4, 1.5 + 0.55 * max(len(labels), 2)))
    axis = axes[0, 0]
    values = [_column(rows, label, metric) for label in labels]
    axis.boxplot(values, orientation="horizontal", showfliers=False, widths=0.55, medianprops={"color": "black"})
    rng = np.random.default_rng(0)
    for k, points in enumerate(values):
        jitter = rng.uniform(-0.16, 0.16, len(points))
        axis.scatter(points, k + 1 + jitter, s=16, alpha=0.65, color=label_colour(k), linewidths=0, zorder=3)
    axis.set_yticks(range(1, len(labels) + 1), [_plain(label) for label in labels])
    axis.invert_yaxis()
    axis.set_xlabel(title)
    axis.grid(axis="x", alpha=0.3)
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
        axis.set_xticks(range(1, len(trainings) + 1), [_plain(name) for name in trainings], rotation=20)
        axis.set_title(_plain(label))
        axis.set_ylabel("Dice")
        axis.grid(axis="y", alpha=0.3)
    return figure


def training_loss(history: Rows) -> Figure:
    """Training loss over epochs; on a logarithmic scale where it allows one."""
    figure, axis = _over_epochs("training loss")
    losses = [h["train_loss"] for h in history]
    axis.plot([h["epoch"] for h in history], losses, color=COLOURS[0], **_marks(history))
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        _plain_log(axis, "y")
    return figure


def learning_rate(history: Rows) -> Figure:
    """Learning rate over epochs."""
    figure, axis = _over_epochs("learning rate")
    known = [h for h in history if h.get("learning_rate") is not None]
    axis.plot([h["epoch"] for h in known], [h["learning_rate"] for h in known], color=COLOURS[0], **_marks(known))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set_ylim(bottom=0)
    return figure


def training_dice(history: Rows) -> Figure:
    """Dice of the held-out volumes over epochs, where it was measured."""
    figure, axis = _over_epochs("Dice of held-out volumes")
    scored = [h for h in history if "val_dice" in h]
    epochs = [h["epoch"] for h in scored]
    for k, label in enumerate(scored[-1]["val_dice"] if scored else ()):
        scores = [h["val_dice"].get(label) for h in scored]
        axis.plot(epochs, scores, marker="o", markersize=4, color=label_colour(k), label=_plain(label))
    _legend(axis)
    return figure


def volume_agreement(rows: Rows, labels: Sequence[str]) -> Figure:
    """Predicted against true volume of every case and label, ml."""
    figure, axes = new_figure()
    axis = axes[0, 0]
    _scatter(axis, rows, labels, lambda row: (row["volume_truth_ml"], row["volume_predicted_ml"]))
    volumes = [row[key] for row in rows for key in ("volume_truth_ml", "volume_predicted_ml")]
    low, high = min(volumes, default=0.0), max(volumes, default=1.0)
    if low > 0 and high > 20 * low:
        _plain_log(axis, "x")
        _plain_log(axis, "y")
    axis.plot([low, high], [low, high], color="grey", linewidth=1, zorder=0)
    axis.set_xlabel("true volume (ml)")
    axis.set_ylabel("predicted volume (ml)")
    _legend(axis)
    return figure


def volume_differences(rows: Rows, labels: Sequence[str], limits: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Bland-Altman plot: predicted minus true volume against their mean, ml, with bias and limits of agreement.

    Args:
        limits: label to lower limit, bias and upper limit, ml; labels that are missing get no lines.
    """
    figure, axes = new_figure()
    axis = axes[0, 0]

    def point(row: Mapping[str, Any]) -> tuple[float, float]:
        truth, predicted = row["volume_truth_ml"], row["volume_predicted_ml"]
        return (truth + predicted) / 2, predicted - truth

    _scatter(axis, rows, labels, point)
    axis.axhline(0, color="grey", linewidth=1, zorder=0)
    for k, label in enumerate(labels if len(labels) <= LINES_FOR else ()):
        if label not in limits:
            continue
        low, bias, high = limits[label]
        axis.axhline(bias, color=label_colour(k), linewidth=1.4)
        for limit in (low, high):
            axis.axhline(limit, color=label_colour(k), linewidth=1.1, linestyle="dashed")
    means = [point(row)[0] for row in rows]
    if means and min(means) > 0 and max(means) > 20 * min(means):
        _plain_log(axis, "x")
    axis.set_xlabel("mean of true and predicted volume (ml)")
    axis.set_ylabel("predicted minus true (ml)")
    _legend(axis)
    return figure


def dice_by_volume(rows: Rows, labels: Sequence[str]) -> Figure:
    """Dice against the true volume of the structure, ml."""
    figure, axes = new_figure()
    axis = axes[0, 0]
    _scatter(axis, rows, labels, lambda row: (row["volume_truth_ml"], row["dice"]))
    volumes = [row["volume_truth_ml"] for row in rows]
    if volumes and min(volumes) > 0 and max(volumes) > 20 * min(volumes):
        _plain_log(axis, "x")
    axis.set_xlabel("true volume (ml)")
    axis.set_ylabel("Dice")
    _legend(axis)
    return figure


def _column(rows: Rows, label: str, metric: str) -> list[float]:
    return [row[metric] for row in rows if row["label"] == label and row[metric] is not None]


def _scatter(
    axis: Any, rows: Rows, labels: Sequence[str], point: Callable[[Mapping[str, Any]], tuple[float, float]]
) -> None:
    for k, label in enumerate(labels):
        points = [point(row) for row in rows if row["label"] == label]
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.scatter(x, y, s=18, alpha=0.7, color=label_colour(k), label=_plain(label), linewidths=0, zorder=3)
    axis.grid(alpha=0.3)


def _over_epochs(quantity: str) -> tuple[Figure, Any]:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    axis = axes[0, 0]
    axis.set_xlabel("epoch")
    axis.set_ylabel(quantity)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    return figure, axis


def _marks(points: Rows) -> dict[str, Any]:
    """Points as well as lines where there are few: one epoch makes no line."""
    return {"marker": "o", "markersize": 4} if len(points) < 10 else {}


def _plain_log(axis: Any, which: str) -> None:
    """A logarithmic scale with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _legend(axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles[:LEGEND_FOR], names[:LEGEND_FOR], fontsize=8, framealpha=0.8)


def _plain(text: str) -> str:
    """A name as it is: matplotlib would read $ as the start of a formula, and a leading _ as "no legend"."""
    escaped = str(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
