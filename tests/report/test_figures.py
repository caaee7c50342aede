"""Figures: what is drawn is what went in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from distilldsm.report import figures
from distilldsm.report.figures import label_colour


def row(case: str, label: str, truth: float, predicted: float, dice: float | None = 0.5) -> dict:
    return {"case": case, "label": label, "volume_truth_ml": truth, "volume_predicted_ml": predicted, "dice": dice}


ROWS = [row("a", "one", 2.0, 3.0, 0.9), row("b", "one", 4.0, 4.0, 0.5), row("a", "$two", 1.0, 0.5, 0.25)]
LABELS = ["one", "$two", "absent"]
HISTORY = [
    {"epoch": 1, "train_loss": 1.0, "learning_rate": 0.1},
    {"epoch": 2, "train_loss": 0.5, "learning_rate": 0.2, "val_dice": {"one": 0.4, "two": 0.1}},
    {"epoch": 3, "train_loss": 0.15, "val_dice": {"one": 0.6, "two": 0.2}},
]


def points(figure: Figure) -> list[np.ndarray]:
    """Of each scatter of the first axis its points (points, 2)."""
    return [np.asarray(one.get_offsets()) for one in figure.axes[0].collections]


def lines(figure: Figure) -> list[list[list[float]]]:
    return [[list(one.get_xdata()), list(one.get_ydata())] for one in figure.axes[0].lines]


def test_boxes_hold_every_case_and_their_quartiles():
    figure = figures.score_boxes(
        [*ROWS, row("c", "one", 1, 1, None), row("d", "one", 1, 1, 0.6)], LABELS, "dice", "Dice"
    )
    (axis,) = figure.axes
    one, two, absent = points(figure)
    assert (one[:, 0].tolist(), two[:, 0].tolist(), absent.size) == ([0.9, 0.5, 0.6], [0.25], 0)
    assert (abs(one[:, 1] - 1) <= 0.16).all(), "beside the box of their label"
    assert (abs(two[:, 1] - 2) <= 0.16).all()
    assert len(set(one[:, 1])) == 3
    assert [text.get_text() for text in axis.get_yticklabels()] == ["one", r"\$two", "absent"]
    assert axis.get_xlabel() == "Dice"
    assert axis.yaxis_inverted()
    medians = [one.get_xdata()[0] for one in axis.lines if abs(np.ptp(one.get_ydata()) - 0.55) < 1e-9]
    assert 0.6 in medians
    assert 0.25 in medians
    assert [tuple(one.get_facecolor()[0][:3]) for one in axis.collections[:2]] == [
        pytest.approx(rgb(label_colour(k))) for k in range(2)
    ]


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def test_panels_have_a_box_for_each_training():
    figure = figures.dice_panels({"one": {"_a": [0.5, 0.7], "b": [0.9]}, "two": {"_a": [0.1], "b": [0.2]}})
    assert [axis.get_title() for axis in figure.axes] == ["one", "two"]
    for axis, values in zip(figure.axes, ([[0.5, 0.7], [0.9]], [[0.1], [0.2]]), strict=True):
        drawn = [np.asarray(one.get_offsets()) for one in axis.collections]
        assert [one[:, 1].tolist() for one in drawn] == values
        assert all((abs(one[:, 0] - k) <= 0.14).all() for k, one in enumerate(drawn, start=1))
        assert [text.get_text() for text in axis.get_xticklabels()] == [" _a", "b"]
        assert axis.get_ylabel() == "Dice"


def test_curves_over_epochs():
    loss, rate, dice = figures.training_loss(HISTORY), figures.learning_rate(HISTORY), figures.training_dice(HISTORY)
    assert lines(loss) == [[[1, 2, 3], [1.0, 0.5, 0.15]]]
    assert loss.axes[0].get_yscale() == "log", "it fell to less than a fifth"
    assert figures.training_loss(HISTORY[:2]).axes[0].get_yscale() == "linear"
    negative = [one | {"train_loss": one["train_loss"] - 1} for one in HISTORY]
    assert figures.training_loss(negative).axes[0].get_yscale() == "linear"
    assert lines(rate) == [[[1, 2], [0.1, 0.2]]]
    assert rate.axes[0].get_ylim()[0] == 0
    assert lines(dice) == [[[2, 3], [0.4, 0.6]], [[2, 3], [0.1, 0.2]]]
    assert [one.get_color() for one in dice.axes[0].lines] == [label_colour(0), label_colour(1)]
    assert [text.get_text() for text in dice.axes[0].get_legend().get_texts()] == ["one", "two"]
    assert figures.training_dice(HISTORY[:1]).axes[0].get_legend() is None
    assert [figure.axes[0].get_ylabel() for figure in (loss, rate, dice)] == [
        "training loss",
        "learning rate",
        "Dice of held-out volumes",
    ]
    assert {figure.axes[0].get_xlabel() for figure in (loss, rate, dice)} == {"epoch"}
    many = [{"epoch": k, "train_loss": 1.0} for k in range(10)]
    assert [figures.training_loss(many[:n]).axes[0].lines[0].get_marker() for n in (9, 10)] == ["o", "None"]


def differences(rows: list[dict], labels: list[str]) -> Figure:
    return figures.volume_differences(rows, labels, {})


@pytest.mark.parametrize(
    ("draw", "expected", "axes"),
    [
        (figures.volume_agreement, [[2, 3], [4, 4], [1, 0.5]], ("true volume (ml)", "predicted volume (ml)")),
        (
            differences,
            [[2.5, 1], [4, 0], [0.75, -0.5]],
            ("mean of true and predicted volume (ml)", "predicted minus true (ml)"),
        ),
        (figures.dice_by_volume, [[2, 0.9], [4, 0.5], [1, 0.25]], ("true volume (ml)", "Dice")),
    ],
)
def test_scatters_of_volumes(draw: Callable[..., Figure], expected, axes):
    figure = draw(ROWS, LABELS)
    (axis,) = figure.axes
    one, two, absent = points(figure)
    assert (one.tolist(), two.tolist(), absent.size) == (expected[:2], expected[2:], 0)
    assert (axis.get_xlabel(), axis.get_ylabel()) == axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", r"\$two", "absent"]
    assert axis.get_xscale() == "linear", "4 ml are less than 20 times .5 ml"
    assert draw([*ROWS, row("c", "one", 100.0, 100.0)], LABELS).axes[0].get_xscale() == "log"
    assert (
        draw([*ROWS, row("c", "one", 100.0, 100.0), row("d", "one", 0.0, 0.0)], LABELS).axes[0].get_xscale() == "linear"
    )
    assert draw([], ["one"]).axes
    many = [f"l{k}" for k in range(14)]
    assert len(draw(ROWS, many).axes[0].get_legend().get_texts()) == 12


def test_volumes_agree_on_the_diagonal():
    figure = figures.volume_agreement(ROWS, LABELS)
    assert lines(figure) == [[[0.5, 4.0], [0.5, 4.0]]]
    wide = figures.volume_agreement([*ROWS, row("c", "one", 100.0, 100.0)], LABELS)
    assert (wide.axes[0].get_xscale(), wide.axes[0].get_yscale()) == ("log", "log")


def test_limits_of_agreement_are_lines_where_there_are_few_labels():
    limits = {"one": (-1.0, 0.5, 2.0), "$two": (-3.0, -2.0, -1.0)}
    drawn = figures.volume_differences(ROWS, LABELS, limits).axes[0].lines
    assert [(one.get_ydata()[0], one.get_linestyle()) for one in drawn] == [
        (0, "-"),
        (0.5, "-"),
        (-1.0, "--"),
        (2.0, "--"),
        (-2.0, "-"),
        (-3.0, "--"),
        (-1.0, "--"),
    ]
    assert [one.get_color() for one in drawn[1:]] == [label_colour(0)] * 3 + [label_colour(1)] * 3
    four, five = (figures.volume_differences(ROWS, ["one", *"abcd"[:n]], limits).axes[0].lines for n in (3, 4))
    assert (len(four), len(five)) == (4, 1)


def test_colours_begin_after_that_of_the_background_and_repeat():
    assert [label_colour(0), label_colour(5), label_colour(6)] == [figures.COLOURS[k] for k in (1, 6, 0)]
