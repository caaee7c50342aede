"""Trainings side by side, against SciPy and a slow Holm."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from distilldsm.cli.main import main
from distilldsm.config import EvaluateConfig
from distilldsm.core.errors import DataError
from distilldsm.evaluation import comparison
from distilldsm.evaluation.comparison import compare
from distilldsm.evaluation.metrics import METRICS, VOLUMES
from distilldsm.evaluation.trainings import load_training
from tests.evaluation import folds as crossval


def write_fold(
    directory: Path,
    cases: dict[str, dict[str, float | None]],
    *,
    patients: dict[str, str] | None = None,
    truth_ml: float = 2.0,
    labels: tuple[str, ...] = ("A", "B"),
) -> Path:
    """A fold with two labels; the second has half of every score."""
    directory.mkdir(parents=True)
    with open(directory / "cases.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", *(["patient"] if patients else []), "label", *METRICS, *VOLUMES])
        for case, row in cases.items():
            for label, factor in zip(labels, (1.0, 0.5), strict=False):
                values = [None if row[m] is None else row[m] * factor for m in METRICS]
                names = [case, *([patients[case]] if patients else []), label]
                writer.writerow([*names, *("" if v is None else v for v in values), truth_ml, 2.5])
    return directory


def random_cases(names: list[str], seed: int) -> dict[str, dict[str, float | None]]:
    rng = np.random.default_rng(seed)
    high = {"hd95_mm": 5.0}
    rows = {}
    for name in names:
        row = {metric: rng.uniform(0, high.get(metric, 1)) for metric in METRICS}
        error = rng.normal(0, 3)
        rows[name] = row | {"volume_error_ml": error, "volume_error_abs_ml": abs(error)}
    return rows


def test_numbers_are_those_of_numpy_and_scipy(tmp_path):
    names = [f"c{k}" for k in range(12)]
    a, b = random_cases(names, 0), random_cases(names, 1)
    folds = [
        [write_fold(tmp_path / f"{name}{k}", dict(list(rows.items())[6 * k : 6 * k + 6])) for k in range(2)]
        for name, rows in (("a", a), ("b", b))
    ]
    rows = compare([load_training(name, directories) for name, directories in zip("ab", folds, strict=True)])
    assert [(r.metric, r.label, r.training) for r in rows[:4]] == [
        ("dice", "A", "a"),
        ("dice", "A", "b"),
        ("dice", "B", "a"),
        ("dice", "B", "b"),
    ]
    first, second = rows[:2]
    values = np.array([[rows[n]["dice"] for n in names] for rows in (a, b)])
    assert second.cases == 12
    assert second.mean == pytest.approx(values[1].mean())
    assert second.sd == pytest.approx(values[1].std(ddof=1))
    assert second.sd_folds == pytest.approx(np.std([values[1, :6].mean(), values[1, 6:].mean()], ddof=1))
    assert second.difference == pytest.approx((values[1] - values[0]).mean())
    assert second.p == pytest.approx(wilcoxon(values[1], values[0]).pvalue)
    assert second.p_holm == pytest.approx(min(1, 2 * second.p))  # two labels, the same differences but for a factor
    assert (first.difference, first.p, first.p_holm) == (None, None, None)
    (size,) = (r for r in rows if (r.training, r.label, r.metric) == ("b", "A", "volume_error_abs_ml"))
    errors = np.abs([[rows[n]["volume_error_ml"] for n in names] for rows in (a, b)])
    assert size.mean == pytest.approx(errors[1].mean())
    assert size.p == pytest.approx(wilcoxon(errors[1], errors[0]).pvalue)


def test_a_patient_is_one_pair(tmp_path):
    names = [f"c{k}" for k in range(14)]
    patients = {name: f"p{k // 2}" for k, name in enumerate(names)}
    a, b = random_cases(names, 0), random_cases(names, 1)
    folders = [write_fold(tmp_path / n, rows, patients=patients) for n, rows in (("a", a), ("b", b))]
    found = compare([load_training(name, [folder]) for name, folder in zip("ab", folders, strict=True)])
    (row,) = (r for r in found if (r.training, r.label, r.metric) == ("b", "A", "dice"))
    differences = np.array([b[n]["dice"] - a[n]["dice"] for n in names])
    assert (row.cases, row.patients) == (14, 7)
    assert row.difference == pytest.approx(differences.mean())
    assert row.p == pytest.approx(wilcoxon(differences.reshape(7, 2).mean(axis=1)).pvalue)
    assert row.p != pytest.approx(wilcoxon(differences).pvalue)


def test_another_truth_is_refused(tmp_path):
    rows = random_cases(["c0", "c1"], 0)
    folders = [write_fold(tmp_path / "a", rows, truth_ml=1.0), write_fold(tmp_path / "b", rows, truth_ml=7.0)]
    with pytest.raises(DataError, match="another truth") as caught:
        compare([load_training(name, [folder]) for name, folder in zip("ab", folders, strict=True)])
    assert "c0, A: 1 ml and 7 ml" in str(caught.value)


def test_what_was_scored_in_another_way_is_told(tmp_path, capsys):
    for name, config in (("a", EvaluateConfig(workers=3)), ("b", EvaluateConfig(mirror=True, checkpoint="best"))):
        crossval.cross_validated(tmp_path / name, evaluate=config)
    for kind in ("cv", "evaluation"):
        assert main(["compare", *(f"{name}={tmp_path / name / kind}" for name in "ab")]) == 0
        assert capsys.readouterr().err.splitlines() == [
            "compare: evaluate.checkpoint differs (a: last; b: best)",
            "compare: evaluate.mirror differs (a: False; b: True)",
        ]
    assert main(["compare", *(f"{name}={tmp_path / 'a' / 'cv'}" for name in "ab")]) == 0
    assert capsys.readouterr().err == ""


def test_surface_dice_of_different_tolerances_is_refused(tmp_path):
    for name, tolerance in (("a", 1.0), ("b", 3.0)):
        crossval.cross_validated(tmp_path / name, evaluate=EvaluateConfig(nsd_tolerance_mm=tolerance))
    for one, other in (("cv", "cv"), ("evaluation", "cv"), ("evaluation", "evaluation")):
        a, b = load_training("a", [tmp_path / "a" / one]), load_training("b", [tmp_path / "b" / other])
        with pytest.raises(DataError, match=r"tolerances of the NSD(.|\n)*a: 1 mm; b: 3 mm"):
            compare([a, b])
        assert compare([a, a])


def test_a_fold_of_an_earlier_split_that_was_left_is_told(tmp_path):
    _, rows = crossval.write_folds(tmp_path)
    assert load_training("ours", [tmp_path / "evaluation"])
    crossval.write_fold(tmp_path, 7, rows[2], splits=crossval.write_splits(tmp_path / "other", [["a"], ["b"]]))
    shutil.rmtree(tmp_path / "evaluation" / "fold2")
    with pytest.raises(DataError, match=r"evaluation/fold7: are folds of different splits(.|\n)*in ours"):
        load_training("ours", [tmp_path / "evaluation"])


def test_what_is_left_out_is_said(tmp_path, capsys):
    a, b = random_cases(["c0", "c1", "c2", "c3"], 0), random_cases(["c2", "c3"], 1)
    write_fold(tmp_path / "a", a)
    write_fold(tmp_path / "b", b, labels=("A",))
    assert main(["compare", f"a={tmp_path}/a", f"b={tmp_path}/b"]) == 0
    said = capsys.readouterr().err
    assert "a: 2 of 4 cases left out (c0, c1)" in said
    assert "a: 1 of 2 labels left out (B)" in said
    assert "b:" not in said


def test_only_common_cases_count_and_undefined_scores_do_not(tmp_path):
    a = random_cases(["c0", "c1", "c2", "c3"], 0)
    b = random_cases(["c1", "c2", "c3", "c4"], 1)
    b["c3"]["hd95_mm"] = None
    folders = [write_fold(tmp_path / "a", a), write_fold(tmp_path / "b", b)]
    rows = compare([load_training(name, [folder]) for name, folder in zip("ab", folders, strict=True)])
    cases = {r.metric: r.cases for r in rows}
    assert cases.pop("hd95_mm") == 2
    assert set(cases.values()) == {3}
    assert {r.sd_folds for r in rows} == {None}


def test_the_figure_shows_the_cases_of_the_table(tmp_path, monkeypatch):
    rows = random_cases(["c0", "c1", "c2"], 0)
    folders = [write_fold(tmp_path / "a", rows), write_fold(tmp_path / "b", {n: rows[n] for n in ("c2", "c1")})]
    drawn = []
    monkeypatch.setattr(comparison, "save_figure", lambda figure, path: drawn.append(figure))
    comparison.draw([load_training(name, [at]) for name, at in zip("ab", folders, strict=True)], tmp_path / "x.png")
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["A", "B"]
    for axis, factor in zip(figure.axes, (1.0, 0.5), strict=True):
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["a", "b"]
        assert axis.get_ylabel() == "Dice"
        for points in axis.collections:
            np.testing.assert_allclose(
                points.get_offsets()[:, 1], [factor * rows[name]["dice"] for name in ("c1", "c2")]
            )
        assert len(axis.collections) == 2


def test_a_single_case_has_no_standard_deviation(tmp_path, capsys):
    for name in "ab":
        write_fold(tmp_path / name, random_cases(["c0"], 0))
    trainings = [f"{name}={tmp_path}/{name}" for name in "ab"]
    assert main(["compare", *trainings, "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3] == "-"
    with open(tmp_path / "out" / "comparison.csv", newline="") as stream:
        assert {row["sd"] for row in csv.DictReader(stream)} == {""}
    assert main(["compare", *trainings, "--json"]) == 0
    assert {row["sd"] for row in json.loads(capsys.readouterr().out)["scores"]} == {None}


def test_equal_trainings_do_not_differ(tmp_path):
    folder = write_fold(tmp_path / "a", random_cases(["c0", "c1", "c2"], 0))
    rows = compare([load_training(name, [folder]) for name in "ab"])
    assert {r.p_holm for r in rows if r.training == "b"} == {1.0}


def test_bad_tables_are_named(tmp_path):
    with pytest.raises(DataError, match="is not an evaluated fold"):
        load_training("a", [tmp_path])
    folder = write_fold(tmp_path / "a", random_cases(["c0"], 0))
    with pytest.raises(DataError, match="scored in two folds"):
        load_training("a", [folder, folder])
    other = write_fold(tmp_path / "b", random_cases(["c1"], 0))
    with pytest.raises(DataError, match="no case was scored in all") as caught:
        compare([load_training("a", [folder]), load_training("b", [other])])
    for words in (f"{folder}, {other}: ", "seen: a: c0; b: c1\n", "rule: ", "hint: compare cross-validations"):
        assert words in str(caught.value)
    text = (folder / "cases.csv").read_text()
    (folder / "cases.csv").write_text(re.sub("c0,A,[^,]*", "c0,A,good", text))
    with pytest.raises(DataError, match="a score is not a number"):
        load_training("a", [folder])
    (folder / "cases.csv").write_text("case,dice\n")
    with pytest.raises(DataError, match="is not a table of scores"):
        load_training("a", [folder])


def test_the_command(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        for fold in range(2):
            write_fold(tmp_path / name / f"fold{fold}", random_cases([f"c{2 * fold}", f"c{2 * fold + 1}"], seed))
    trainings = [f"{name}={tmp_path}/{name}/fold*" for name in "ab"]
    assert main(["compare", *trainings, "-o", str(tmp_path / "out")]) == 0
    assert "p (Holm)" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.png", "costs.csv"}
    assert main(["compare", *trainings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scores"]
    with open(tmp_path / "out" / "comparison.csv", newline="") as stream:
        assert [row["training"] for row in csv.DictReader(stream)] == [row["training"] for row in found]
    assert found[0]["cases"] == 4
    assert main(["compare", trainings[0]]) == 2
    assert main(["compare", trainings[0], trainings[0]]) == 2
    assert main(["compare", "a", trainings[1]]) == 2
    assert main(["compare", f"a={tmp_path}/nowhere", trainings[1]]) == 1


def test_cross_validations_are_compared_with_their_costs(tmp_path, capsys):
    """As a cross-validation, as a folder of folds, and fold by fold: the same numbers."""
    for name in "ab":
        splits, rows = crossval.write_folds(tmp_path / name, count=2)
        better = [{**row, "dice": row["dice"] + 0.1 * (name == "b")} for row in rows[1]]
        crossval.write_fold(tmp_path / name, 1, better, splits=splits, seconds=5.0)
        crossval.cross_validated(tmp_path / name, count=2)
    found = []
    for form in ("{}/cv", "{}/evaluation", "{0}/evaluation/fold0,{0}/evaluation/fold1"):
        capsys.readouterr()
        trainings = [f"{name}={form.format(tmp_path / name)}" for name in "ab"]
        assert main(["compare", *trainings, "-o", str(tmp_path / "out"), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    dice = [row for row in found[0]["scores"] if row["metric"] == "dice" and row["training"] == "b"]
    assert [row["difference"] for row in dice] == pytest.approx([0.1 * 5 / 9] * 2)
    assert all(row["sd_folds"] is not None for row in found[0]["scores"])
    assert main(["compare", *trainings]) == 0
    text = capsys.readouterr().out
    assert [row["seconds_per_epoch"] for row in found[0]["costs"]] == [3.5, 3.5]
    assert "macs_per_voxel" in text
    assert "gpu" not in text, "what nobody measured is no column"
    capsys.readouterr()
    fold = tmp_path / "a" / "evaluation" / "fold0"
    for _ in ("no table", "a table without rows"):
        with pytest.raises(DataError, match=r"fold0: has no scores after(.|\n)*cases_postprocessed.csv"):
            load_training("a", [fold], postprocessed=True)
        (fold / "cases_postprocessed.csv").write_text("case,label\n")
    with open(tmp_path / "out" / "costs.csv", newline="") as stream:
        assert [(row["training"], row["parameters"]) for row in csv.DictReader(stream)] == [
            ("a", "1000"),
            ("b", "1000"),
        ]


def test_folds_of_earlier_parameters_are_left_out(tmp_path, capsys):
    for fold in (0, 1, 2):
        write_fold(tmp_path / f"evaluation/fold{fold}", random_cases([f"c{fold}"], fold))
    assert len(load_training("a", [tmp_path / "evaluation"]).folders) == 1
    assert set(load_training("a", [tmp_path / "evaluation"]).fold_of) == {"c0", "c1", "c2"}
    (tmp_path / "params.yaml").write_text("cv: {folds: [0]}\n")
    assert set(load_training("a", [tmp_path / "evaluation"]).fold_of) == {"c0"}
    assert re.search(r"left out: \S+fold1, \S+fold2", capsys.readouterr().err)
    assert set(load_training("a", [tmp_path / "evaluation/fold1"]).fold_of) == {"c1"}, "named itself"
    (tmp_path / "cross_validation").mkdir()
    (tmp_path / "cross_validation/summary.json").write_text(json.dumps({"folds": [0, 2]}))
    assert set(load_training("a", [tmp_path / "evaluation"]).fold_of) == {"c0", "c2"}
