"""A new metric is one entry in the table: it then appears everywhere."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.core.files import read_json
from distilldsm.evaluation import fold_table, tables
from distilldsm.evaluation.metrics import METRICS, Metric, score_case
from distilldsm.export.gate import Gate, decide
from distilldsm.export.scores import Scores
from tests.evaluation.folds import cross_validated
from tests.evaluation.test_report import page


@pytest.fixture(autouse=True)
def jaccard(monkeypatch) -> Metric:
    """Intersection over union, and a distance as its twin: less is better."""
    union = lambda masks: masks.n_truth + masks.n_predicted - masks.n_both  # noqa: E731
    metric = Metric("jaccard", "Jaccard", "", True, 3, lambda masks: masks.n_both / union(masks), main=True)
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


def test_it_is_computed_tabulated_tracked_and_shown(tmp_path):
    truth, prediction = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    truth[0], prediction[0:2] = 1, 1
    (row,) = score_case(truth, prediction, spacing_mm=(1, 1, 1), labels={"a": 1})
    assert row["jaccard"] == 0.5
    rows = [{"case": "one", **row}, {"case": "two", **row, "jaccard": 0.25}]
    tables.write_csv(tmp_path / "cases.csv", rows)
    assert [one["jaccard"] for one in tables.read_rows(tmp_path / "cases.csv")] == [0.5, 0.25]
    summary, intervals = tables.summarise(rows, ["a"]), tables.intervals(rows, ["a"])
    statistics = summary["labels"]["a"]["jaccard"]
    assert (statistics["mean"], statistics["worst"], statistics["worst_case"]) == (0.375, 0.25, "two")
    assert tables.metrics_for_dvc(summary)["jaccard"] == {"mean": 0.375, "a": 0.375}
    tracked = tables.metrics_for_mlflow(summary, intervals)
    assert (tracked["test_jaccard_mean"], tracked["test_jaccard_a"]) == (0.375, 0.375)
    assert {"test_jaccard_mean_ci_low", "test_jaccard_mean_ci_high"} <= tracked.keys()
    head, line, _ = tables.format_table(summary).splitlines()
    assert "Jaccard" in head
    assert "0.375" in line
    text = page(rows)
    assert "<th>Jaccard</th>" in text
    assert "0.375" in text


def test_it_is_cross_validated_and_compared(tmp_path, capsys):
    folders = [cross_validated(tmp_path / name, count=2) for name in "ab"]
    summary = read_json(folders[0] / "summary.json")
    mean = summary["labels"]["core"]["jaccard"]["mean_folds"]
    assert read_json(folders[0] / "metrics.json")["jaccard"]["core"]["mean"] == round(mean, 4)
    assert fold_table.metrics_for_mlflow(summary)["cv_jaccard_core_mean"] == round(mean, 4)
    with open(folders[0] / "table.csv", newline="") as stream:
        assert {row["metric"] for row in csv.DictReader(stream)} == set(METRICS)
    assert "Jaccard" in (folders[0] / "report.html").read_text()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if line[:2] == ["core", "Jaccard"]] == [f"{mean:.3f}"] * 2
    assert main(["compare", f"a={folders[0]}", f"b={folders[1]}", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["scores"]
    assert [row["difference"] for row in compared if row["metric"] == "jaccard"] == [None, 0.0] * 2


def test_the_gate_can_go_by_it():
    facts = {"source": "evaluation", "fold": 0, "checkpoint": "last", "data_hash": "d", "split_hash": "s"}
    low, high = ({"dice": 0.5, "hd95_mm": 1.0, "nsd": 0.5, "jaccard": value} for value in (0.25, 0.5))
    challenger, champion = (Scores(**facts, labels=("a",), cases={"one": {"a": one}}) for one in (high, low))
    decision = decide(challenger, champion, Gate(metric="jaccard", min_cases=1), version="1")
    assert (decision.promoted, decision.difference) == (True, 0.25)
    assert "mean Jaccard difference +0.250" in decision.reason
