"""Figures: what is drawn is what was given, whatever the labels are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distilldsm.report import figures
from distilldsm.report.overlays import overlay

ODD = "$\\frac$ _one"


def points(artist) -> list[list[float]]:
    return np.asarray(artist.get_offsets()).tolist()


def colours(artists) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(artist.get_facecolor()[0] if hasattr(artist, "get_offsets") else artist.get_color()).upper()
            for artist in artists]  # fmt: skip


def test_boxes_show_quartiles_and_every_case():
    values = {"one": [0.1, 0.2, 0.4, 0.9], "_two": [0.5, 0.6], ODD: []}
    (axis,) = figures.score_boxes(values, "Dice").axes
    assert axis.get_xlabel() == "Dice"
    assert [text.get_text().strip() for text in axis.get_yticklabels()] == ["one", "_two", ODD.replace("$", r"\$")]
    assert axis.yaxis_inverted(), "the first label is on top"
    for k, (given, shown) in enumerate(zip(values.values(), axis.collections, strict=True)):
        assert [x for x, _ in points(shown)] == given
        assert all(abs(y - (k + 1)) <= 0.16 for _, y in points(shown))
    assert colours(axis.collections[:2]) == list(figures.COLOURS[1:3])
    box, median = axis.lines[0], axis.lines[5]
    assert (min(box.get_xdata()), max(box.get_xdata())) == pytest.approx(tuple(np.percentile(values["one"], [25, 75])))
    assert median.get_xdata()[0] == pytest.approx(np.median(values["one"]))


def test_panels_have_a_box_per_training():
    given = {"A": {"first": [0.1, 0.3], "second": [0.5, 0.9]}, "B": {"first": [0.2], "second": [0.4]}}
    axes = figures.dice_panels(given).axes
    assert [axis.get_title() for axis in axes] == ["A", "B"]
    for axis, trainings in zip(axes, given.values(), strict=True):
        assert axis.get_ylabel() == "Dice"
        assert [text.get_text() for text in axis.get_xticklabels()] == list(trainings)
        assert [[y for _, y in points(shown)] for shown in axis.collections] == list(trainings.values())


def test_curves_over_epochs():
    (axis,) = figures.over_epochs({"": [(1, 1.0), (2, 0.1)]}, "training loss").axes
    (line,) = axis.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 2], [1.0, 0.1])
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("epoch", "training loss", "log")
    assert line.get_marker() == "o", "few points are shown as such"
    assert axis.get_legend() is None
    many = {"a": [(k, 0.5) for k in range(10)], ODD: [(k, 0.6) for k in range(10)]}
    (axis,) = figures.over_epochs(many, "Dice").axes
    assert axis.get_yscale() == "linear"
    assert colours(axis.lines) == list(figures.COLOURS[1:3])
    assert {line.get_marker() for line in axis.lines} == {"None"}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", ODD.replace("$", r"\$")]
    (axis,) = figures.over_epochs({"": [(1, 1e-3), (2, 1e-5)]}, "learning rate", from_zero=True).axes
    assert (axis.get_yscale(), axis.get_ylim()[0]) == ("linear", 0)
    assert not figures.over_epochs({}, "Dice").axes[0].lines
    negative = figures.over_epochs({"": [(1, 1.0), (2, -0.1)]}, "training loss")
    assert negative.axes[0].get_yscale() == "linear"


def test_points_of_labels_and_the_line_of_equality():
    given = {"one": [(1.0, 2.0), (3.0, 2.5)], "two": [(30.0, 0.5)], "none": []}
    (axis,) = figures.scatter(given, "true", "predicted", diagonal=True).axes
    assert [points(shown) for shown in axis.collections] == [[list(point) for point in of] for of in given.values()]
    assert colours(axis.collections[:2]) == list(figures.COLOURS[1:3])
    (line,) = axis.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 30.0], [0.5, 30.0])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    (axis,) = figures.scatter({"one": [(1.0, -50.0), (19.0, 50.0)]}, "mean", "difference").axes
    assert (axis.get_xscale(), axis.get_yscale(), len(axis.lines)) == ("linear", "linear", 0)
    (axis,) = figures.scatter({"one": [(0.0, 1.0), (90.0, 1.0)]}, "volume", "Dice").axes
    assert axis.get_xscale() == "linear", "zero has no logarithm"
    many = figures.scatter({f"l{k}": [(1.0, 1.0)] for k in range(14)}, "x", "y").axes[0]
    assert len(many.get_legend().get_texts()) == figures.LEGEND_FOR


def test_limits_of_agreement_are_lines_in_the_colour_of_their_label():
    given = {"one": [(1.0, 0.5)], "two": [(2.0, -0.5)], "alone": [(1.0, 0.0)]}
    limits = {"one": (-1.0, 0.25, 1.5), "two": (-2.0, -0.5, 1.0)}
    (axis,) = figures.scatter(given, "mean", "difference", limits=limits).axes
    zero, *lines = axis.lines
    assert zero.get_ydata()[0] == 0
    assert [line.get_ydata()[0] for line in lines] == [-1.0, 0.25, 1.5, -2.0, -0.5, 1.0]
    assert [line.get_linestyle() for line in lines] == ["--", "-", "--"] * 2
    assert colours(lines) == [figures.COLOURS[1]] * 3 + [figures.COLOURS[2]] * 3
    many = {str(k): [(1.0, 0.0)] for k in range(figures.LINES_FOR + 1)}
    crowded = figures.scatter(many, "mean", "difference", limits=dict.fromkeys(many, (-1.0, 0.0, 1.0)))
    assert len(crowded.axes[0].lines) == 1, "only the line at 0"


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path):
    image = np.random.default_rng(0).normal(size=(8, 9, 10))
    truth = np.zeros((8, 9, 10), dtype=np.uint8)
    truth[2:5, 3:6, 4:8] = 1
    labels = {"background": 0, ODD: 1}
    for k in range(2):
        for name, figure in {
            "box": figures.score_boxes({ODD: [0.1, 0.5]}, "Dice"),
            "overlay": overlay(image, truth, truth * 0, affine=np.diag([1.0, 2.0, 3.0, 1.0]), labels=labels),
        }.items():
            figures.save_figure(figure, tmp_path / f"{name}{k}.png")
    for name in ("box", "overlay"):
        assert (tmp_path / f"{name}0.png").read_bytes() == (tmp_path / f"{name}1.png").read_bytes()
