"""Tables: the numbers in them are those that went in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import METRICS


def rows() -> list[dict]:
    made = []
    for case, dice, sensitivity in (("a", 0.9, 0.8), ("b", 0.5, None), ("<c>", 0.7, 0.6)):
        row = dict.fromkeys(METRICS, 0.5) | {"case": case, "label": "one", "dice": dice, "sensitivity": sensitivity}
        row |= {"hd95_mm": 10 * (1 - dice), "volume_truth_ml": 2.0, "volume_predicted_ml": 2.5, "volume_error_ml": 0.5}
        made.append(row)
    return made


def test_summary():
    summary = tables.summarise(rows(), ["one"])
    dice = summary["labels"]["one"]["dice"]
    assert dice["mean"] == pytest.approx(0.7)
    assert dice["sd"] == pytest.approx(np.std([0.9, 0.5, 0.7], ddof=1))
    assert (dice["median"], dice["worst"], dice["worst_case"]) == (0.7, 0.5, "b")
    assert summary["labels"]["one"]["hd95_mm"]["worst_case"] == "b"
    sensitivity = summary["labels"]["one"]["sensitivity"]
    assert (sensitivity["defined"], sensitivity["cases"]) == (2, 3)
    assert sensitivity["mean"] == pytest.approx(0.7)
    assert summary["cases"] == 3
    assert summary["mean"]["dice"] == pytest.approx(0.7)
    json.dumps(summary, allow_nan=False)


def test_undefined_everywhere_stays_undefined():
    undefined = [row | {"precision": None} for row in rows()]
    summary = tables.summarise(undefined, ["one"])
    assert summary["mean"]["precision"] is None
    assert "mean" not in tables.metrics_for_dvc(summary)["precision"]
    assert tables.metrics_for_dvc(summary)["dice"] == {"mean": 0.7, "one": 0.7}


def test_one_value_has_no_standard_deviation():
    one = tables.summarise(rows()[:1], ["one"])
    assert one["labels"]["one"]["dice"]["sd"] is None
    assert tables.format_table(one).splitlines()[1].split() == ["one", "0.9000", "-", "0.9000", "1.00", "0.5000", "1"]
    defined_once = [row | {"precision": None if row["case"] != "a" else 0.5} for row in rows()]
    assert tables.summarise(defined_once, ["one"])["labels"]["one"]["precision"]["sd"] is None


def test_table_and_csv(tmp_path: Path):
    text = tables.format_table(tables.summarise(rows(), ["one"]), "title")
    assert text.splitlines()[0] == "title"
    assert "0.7000" in text
    tables.write_csv(tmp_path / "x.csv", rows())
    with open(tmp_path / "x.csv") as stream:
        read = list(csv.DictReader(stream))
    assert [r["dice"] for r in read] == ["0.9", "0.5", "0.7"]
    assert read[1]["sensitivity"] == ""
