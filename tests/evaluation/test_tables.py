"""Tables: the numbers in them are those that went in."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from distilldsm.core.errors import DataError
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import METRICS


def rows() -> list[dict]:
    """Three cases of one label; the sensitivity of one is undefined."""
    made = []
    for case, dice, sensitivity in (("a", 0.9, 0.8), ("b", 0.5, None), ("<c>", 0.7, 0.6)):
        row = dict.fromkeys(METRICS, 0.5) | {"case": case, "label": "one", "dice": dice, "sensitivity": sensitivity}
        row |= {"hd95_mm": 10 * (1 - dice), "volume_truth_ml": 2.0, "volume_predicted_ml": 2.5}
        made.append(row | {"volume_error_ml": 0.5})
    return made


def two_labels(second: str = "two") -> list[dict]:
    """The same, and a label with other scores."""
    return rows() + [row | {"label": second, "dice": row["dice"] / 2, "precision": None} for row in rows()]


def test_summary():
    summary = tables.summarise(rows(), ["one"])
    dice, sensitivity = summary["labels"]["one"]["dice"], summary["labels"]["one"]["sensitivity"]
    assert dice == {
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(0.2),
        "median": 0.7,
        "worst": 0.5,
        "worst_case": "b",
        "defined": 3,
        "cases": 3,
    }
    assert sensitivity | {"mean": 0, "sd": 0} == {
        "mean": 0,
        "sd": 0,
        "median": pytest.approx(0.7),
        "worst": 0.6,
        "worst_case": "<c>",
        "defined": 2,
        "cases": 3,
    }
    assert (sensitivity["mean"], sensitivity["sd"]) == (pytest.approx(0.7), pytest.approx(0.2 / 2**0.5))
    assert summary["labels"]["one"]["hd95_mm"]["worst_case"] == "b"
    assert summary["cases"] == 3
    json.dumps(summary, allow_nan=False)
    error = [row | {"volume_error_ml": value} for row, value in zip(rows(), (0.5, -3.0, 2.0), strict=True)]
    assert tables.summarise(error, ["one"])["labels"]["one"]["volume_error_ml"]["worst"] == -3.0, "by its size"
    one = tables.summarise(rows()[:1], ["one"])["labels"]["one"]["dice"]
    assert (one["mean"], one["sd"], one["defined"]) == (0.9, None, 1)


def test_the_mean_is_that_of_the_labels_that_have_one():
    summary = tables.summarise(two_labels(), ["two", "one"])
    assert list(summary["labels"]) == ["two", "one"]
    assert summary["mean"]["dice"] == pytest.approx((0.7 + 0.35) / 2)
    assert summary["mean"]["precision"] == 0.5
    nowhere = summary["labels"]["two"]["precision"]
    assert nowhere == {**dict.fromkeys(("mean", "sd", "median", "worst", "worst_case")), "defined": 0, "cases": 3}
    undefined = tables.summarise([row | {"precision": None} for row in rows()], ["one"])
    assert undefined["mean"]["precision"] is None
    assert tables.metrics_for_dvc(undefined)["precision"] == {}
    assert "test_precision_mean" not in tables.metrics_for_mlflow(undefined)


def test_what_dvc_and_mlflow_get():
    long = [row | {"dice": 0.1234567, "hd95_mm": 1.23456} for row in rows()]
    dvc = tables.metrics_for_dvc(tables.summarise(long, ["one"]))
    assert dvc["dice"] == {"mean": 0.12346, "one": 0.12346}
    assert dvc["hd95_mm"] == {"mean": 1.235, "one": 1.235}
    assert list(dvc) == list(METRICS)
    summary = tables.summarise(two_labels(), ["one", "two"])
    found = tables.metrics_for_mlflow(summary, tables.intervals(two_labels(), ["one", "two"]))
    main = {"dice", "hd95_mm", "nsd"}
    assert found.keys() == {
        *(f"test_{name}_mean" for name in METRICS),
        *(f"test_{name}_{label}" for name in main for label in ("one", "two")),
        *(f"test_{name}_mean_ci_{end}" for name in main for end in ("low", "high")),
    }
    assert found["test_dice_two"] == pytest.approx(0.35)
    assert found["test_dice_mean"] == pytest.approx(0.525)
    assert 0.375 <= found["test_dice_mean_ci_low"] < 0.525 < found["test_dice_mean_ci_high"] <= 0.675
    assert tables.metrics_for_mlflow(summary, tables.intervals(rows()[:1], ["one"])) == {
        key: value for key, value in found.items() if "_ci_" not in key
    }, "one case has no interval"


def test_a_label_named_mean_does_not_take_the_place_of_the_mean():
    summary = tables.summarise(two_labels("mean"), ["one", "mean"])
    assert tables.metrics_for_dvc(summary)["dice"] == {"mean": 0.525, "one": 0.7, "label_mean": 0.35}
    mlflow = tables.metrics_for_mlflow(summary)
    assert (mlflow["test_dice_mean"], mlflow["test_dice_label_mean"]) == (pytest.approx(0.525), pytest.approx(0.35))
    assert [line.split()[:2] for line in tables.format_table(summary).splitlines()[1:]] == [
        ["one", "0.7000"],
        ["label_mean", "0.3500"],
        ["mean", "0.5250"],
    ]
    names = ["mean", "label_mean", "label_label_mean", "meaning", "a_mean"]
    keys = [tables.label_key(name) for name in names]
    assert keys == ["label_mean", "label_label_mean", "label_label_label_mean", "meaning", "a_mean"]


def test_the_table_for_the_terminal():
    text = tables.format_table(tables.summarise(rows(), ["one"]), "title")
    assert text.splitlines() == [
        "title",
        "label    Dice      sd   worst  HD95 mm     NSD  cases",
        "one    0.7000  0.2000  0.5000     3.00  0.5000      3",
        "mean   0.7000                     3.00  0.5000       ",
    ]
    one = tables.format_table(tables.summarise(rows()[:1], ["one"]))
    assert one.splitlines()[1].split() == ["one", "0.9000", "-", "0.9000", "1.00", "0.5000", "1"]


def test_files_hold_six_digits_and_are_read_again(tmp_path):
    path = tmp_path / "cases.csv"
    tables.write_csv(path, [row | {"dice": row["dice"] / 3, "fold": 1} for row in rows()])
    with open(path, newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["dice"] for row in written] == ["0.3", "0.166667", "0.233333"]
    assert written[1]["sensitivity"] == ""
    read = tables.read_rows(path)
    assert (read[0]["case"], read[0]["dice"], read[1]["sensitivity"]) == ("a", 0.3, None)
    tables.write_csv(tmp_path / "empty.csv", [], ("case", "dice"))
    assert (tmp_path / "empty.csv").read_text() == "case,dice\n"
    with pytest.raises(DataError, match=r"none\.csv: is missing"):
        tables.read_rows(tmp_path / "none.csv")
    text = path.read_text()
    for broken, words in (
        (text.replace("dice", "dise"), "lacks dice"),
        (text.splitlines()[0], "lacks all rows"),
        (text.replace("0.3", "good"), "a score is not a number(.|\n)*good"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=words):
            tables.read_rows(path)


def test_scores_as_arrays():
    made = [row | ({"patient": "p"} if row["case"] == "a" else {}) for row in two_labels()]
    table = tables.ScoreTable.of(made)
    assert (table.cases, table.labels, table.patients) == (("a", "b", "<c>"), ("one", "two"), ("p", "b", "<c>"))
    part = table.select(["<c>", "a"], ["two", "one"])
    assert (part.cases, part.labels, part.patients) == (("<c>", "a"), ("two", "one"), ("<c>", "p"))
    np.testing.assert_array_equal(part.scores["dice"], [[0.35, 0.7], [0.45, 0.9]])
    np.testing.assert_array_equal(table.scores["precision"], [[0.5, np.nan]] * 3)
    np.testing.assert_allclose(tables.case_means(table, "dice"), [0.675, 0.375, 0.525])
    np.testing.assert_allclose(tables.case_means(table, "precision"), [0.5] * 3)


def test_intervals_are_of_what_the_summary_calls_mean():
    rng = np.random.default_rng(5)
    made = [
        {"case": f"c{k}", "label": label, **dict.fromkeys(METRICS, 0.5), "dice": rng.uniform(low, 1)}
        for k in range(15)
        for label, low in (("large", 0.8), ("small", 0.2))
    ]
    made[0]["sensitivity"] = None
    summary, found = tables.summarise(made, ["large", "small"]), tables.intervals(made, ["large", "small"])
    for label in ("large", "small"):
        low, high = found["labels"][label]["dice"]
        assert low < summary["labels"][label]["dice"]["mean"] < high
    low, high = found["mean"]["dice"]
    assert low < summary["mean"]["dice"] < high
    assert found["labels"]["large"]["sensitivity"] == (0.5, 0.5)
    assert found == tables.intervals(made, ["large", "small"])
    assert (found["level"], found["resamples"], found["seed"]) == (0.95, 4999, 0)
    assert tables.intervals(made[:2], ["large", "small"])["mean"]["dice"] is None
    whose = [row | {"patient": f"p{int(row['case'][1:]) // 5}"} for row in made]
    wide = tables.intervals(whose, ["large", "small"])["mean"]["dice"]
    assert wide != found["mean"]["dice"], "patients are drawn, not cases"
