"""Figures of evaluations. The functions only draw; the caller computes the numbers.

Colour-blind readers can distinguish the colours (Okabe and Ito). Axes carry units.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LINES_FOR = 4
"""Up to this many labels get their own lines in the Bland-Altman plot; more lines would hide the points."""
LEGEND_FOR = 12
MARKED = 10
"""A line with fewer points also shows them as dots, because a single epoch makes no line."""

Points = Sequence[tuple[float, float]]
"""x and y."""


def label_colour(k: int) -> str:
    """Colour of the k-th foreground label, from 0. Plots, overlays and the viewer use the same."""
    return COLOURS[(k + 1) % len(COLOURS)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, so that the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (5.4, 3.7)) -> tuple[Figure, Any]:
    """A figure that does not use pyplot's global state, and its axes (rows, columns)."""
    _load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


@cache
def _load_matplotlib() -> None:
    """Import matplotlib without the user's settings, which would change the figures, and without its cache of fonts.

    Both lie in the home folder. MPLCONFIGDIR names another folder.
    """
    if os.environ.get("MPLCONFIGDIR"):
        return
    folder = tempfile.mkdtemp(prefix="distilldsm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = folder
    importlib.import_module("matplotlib.font_manager")  # reads the variable
    del os.environ["MPLCONFIGDIR"]  # a child process may outlive the folder


def score_boxes(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Box plot of a score with one row per label and one point per case: {label: values}."""
    figure, axes = new_figure(size=(5.4, 1.5 + 0.55 * max(len(values), 2)))
    axis = axes[0, 0]
    axis.boxplot(
        list(values.values()), orientation="horizontal", showfliers=False, widths=0.55, medianprops={"color": "black"}
    )
    rng = np.random.default_rng(0)
    for k, points in enumerate(values.values()):
        jitter = rng.uniform(-0.16, 0.16, len(points))
        axis.scatter(points, k + 1 + jitter, s=16, alpha=0.65, color=label_colour(k), linewidths=0, zorder=3)
    axis.set_yticks(range(1, len(values) + 1), [plain(label) for label in values])
    axis.invert_yaxis()
    axis.set_xlabel(title)
    axis.grid(axis="x", alpha=0.3)
    return figure


def dice_panels(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Box plots of Dice: one panel per label, one box per training, one point per case: {label: {name: values}}."""
    figure, axes = new_figure(len(panels), size=(3.4 * len(panels) + 1, 4.2))
    rng = np.random.default_rng(0)
    for axis, (label, trainings) in zip(axes[0], panels.items(), strict=True):
        axis.boxplot(list(trainings.values()), showfliers=False, widths=0.5, medianprops={"color": "black"})
        for k, points in enumerate(trainings.values()):
            jitter = rng.uniform(-0.14, 0.14, len(points))
            axis.scatter(k + 1 + jitter, points, s=14, alpha=0.6, color=COLOURS[k % len(COLOURS)], linewidths=0)
        axis.set_xticks(range(1, len(trainings) + 1), [plain(name) for name in trainings], rotation=20)
        axis.set_title(plain(label))
        axis.set_ylabel("Dice")
        axis.grid(axis="y", alpha=0.3)
    return figure


def over_epochs(curves: Mapping[str, Points], title: str, *, from_zero: bool = False) -> Figure:
    """One line per label, or a single line with the name "": {label: [(epoch, value)]}.

    The y axis is logarithmic if all values are positive and differ more than fivefold, unless it starts at zero.
    """
    figure, axis = _axis("epoch", title)
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for k, (label, points) in enumerate(curves.items()):
        colour = label_colour(k) if label else COLOURS[0]
        marks = {"marker": "o", "markersize": 4} if len(points) < MARKED else {}
        axis.plot(*_split(points), color=colour, label=plain(label), **marks)
    if from_zero:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.set_ylim(bottom=0)
    elif _is_wide((y for points in curves.values() for _, y in points), 5):
        _plain_log(axis, "y")
    _legend(axis)
    return figure


def scatter(
    points: Mapping[str, Points],
    x_title: str,
    y_title: str,
    *,
    diagonal: bool = False,
    limits: Mapping[str, tuple[float, float, float]] | None = None,
) -> Figure:
    """Points of each label: {label: [(x, y)]}. The x axis is logarithmic if x differs more than twentyfold.

    Args:
        diagonal: x and y are the same quantity. Both axes have one scale; a grey line shows where x and y are equal.
        limits: y is a difference. A grey line marks 0; each label has a lower limit, a mean and an upper limit.
    """
    figure, axis = _axis(x_title, y_title)
    for k, (label, of_label) in enumerate(points.items()):
        x, y = _split(of_label)
        axis.scatter(x, y, s=18, alpha=0.7, color=label_colour(k), label=plain(label), linewidths=0, zorder=3)
    values = [value for of_label in points.values() for point in of_label for value in point[: 1 + diagonal]]
    if _is_wide(values, 20):
        _plain_log(axis, "x")
        if diagonal:
            _plain_log(axis, "y")
    if diagonal and values:
        ends = [min(values), max(values)]
        axis.plot(ends, ends, color="grey", linewidth=1, zorder=0)
    if limits is not None:
        axis.axhline(0, color="grey", linewidth=1, zorder=0)
        for k, label in enumerate(points if len(points) <= LINES_FOR else ()):
            for place, limit in enumerate(limits.get(label, ())):
                style = {"linewidth": 1.4} if place == 1 else {"linewidth": 1.1, "linestyle": "dashed"}
                axis.axhline(limit, color=label_colour(k), **style)
    _legend(axis)
    return figure


def _axis(x_title: str, y_title: str) -> tuple[Figure, Any]:
    figure, axes = new_figure()
    axis = axes[0, 0]
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    axis.grid(alpha=0.3)
    return figure, axis


def _split(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _is_wide(values: Iterable[float], ratio: float) -> bool:
    """Whether to use a logarithmic axis: all values are positive, and largest / smallest is above the given factor."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > ratio * min(known)


def _plain_log(axis: Any, which: str) -> None:
    """A logarithmic scale with plain numbers instead of powers of ten."""
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


def plain(text: str) -> str:
    """Show a name unchanged. Otherwise matplotlib reads $ as the start of a formula and a leading _ as "no legend"."""
    escaped = str(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
