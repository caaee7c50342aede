"""What an exported model says about its scores, and when an evaluation is not its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.evaluation.metrics import METRICS, VOLUMES
from distilldsm.evaluation.tables import summarise, write_csv
from distilldsm.export.scores import Scores, collect_scores, load_scores


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Directories of a model, of preprocessed data and of an evaluation, as far as scores are taken from them."""
    model, preprocessed, evaluation = (tmp_path / name for name in ("model", "preprocessed", "evaluation"))
    for folder in (model, preprocessed, evaluation):
        folder.mkdir()
    write_json(model / "model.json", {"best_val_dice": 0.75})
    write_json(model / "history.json", [{"epoch": 1, "val_dice_mean": 0.7}, {"epoch": 2}])
    write_json(preprocessed / "splits.json", {"folds": []})
    write_json(preprocessed / "manifest.json", {"inputs": {"dataset": "data-hash"}, "files": {}})
    rows = [
        {"case": case, "label": label, **dict.fromkeys((*METRICS, *VOLUMES), value)}
        | {"hd95_mm": 10 * value, "precision": None}
        for case, value in (("one", 0.5), ("two", 1.0))
        for label in ("a", "b")
    ]
    write_csv(evaluation / "cases.csv", rows)
    write_json(evaluation / "summary.json", {"fold": 1, **summarise(rows, ["a", "b"])})
    write_json(
        evaluation / "manifest.json",
        {
            "fold": 1,
            "config": {"checkpoint": "last", "nsd_tolerance_mm": 2.0, "mirror": False},
            "inputs": {"dataset": "data-hash", "splits": "split-hash", "model": content_hash(model)},
        },
    )
    return model, preprocessed, evaluation


def collected(trained, **more) -> Scores:
    model, preprocessed, evaluation = trained
    return collect_scores(model, preprocessed, evaluation, **{"fold": 1, "checkpoint": "last", **more})


def test_the_evaluations_scores_case_by_case(trained, tmp_path):
    scores = collected(trained)
    assert (scores.source, scores.note, scores.nsd_tolerance_mm, scores.labels) == ("evaluation", "", 2.0, ("a", "b"))
    assert (scores.data_hash, scores.split_hash) == ("data-hash", "split-hash")
    assert scores.cases["one"]["b"] == {"dice": 0.5, "nsd": 0.5, "hd95_mm": 5.0}
    assert scores.per_case("hd95_mm") == {"one": 5.0, "two": 10.0}
    assert scores.mean["test_dice_mean"] == scores.mean["test_dice_a"] == 0.75
    write_json(tmp_path / "scores.json", scores)
    assert load_scores(tmp_path / "scores.json") == scores


def test_patients_are_told_where_the_evaluation_tells_them(trained, tmp_path):
    assert collected(trained).patients == {}
    path = trained[2] / "cases.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"patient,{head}", *(f"p-{line.split(',')[0]},{line}" for line in lines)]))
    scores = collected(trained)
    assert scores.patients == {"one": "p-one", "two": "p-two"}
    write_json(tmp_path / "scores.json", scores)
    assert load_scores(tmp_path / "scores.json") == scores


def test_without_an_evaluation_there_is_what_training_saw(trained):
    model, preprocessed, _ = trained
    scores = collect_scores(model, preprocessed, None, fold=1, checkpoint="last")
    assert (scores.source, scores.cases, dict(scores.mean)) == ("validation", {}, {"val_dice_mean": 0.7})
    assert (scores.data_hash, scores.split_hash) == ("data-hash", sha256_file(preprocessed / "splits.json"))
    best = collect_scores(model, preprocessed, None, fold=1, checkpoint="best")
    assert dict(best.mean) == {"val_dice_mean": 0.75}
    (model / "history.json").unlink()
    assert not collect_scores(model, preprocessed, preprocessed / "none", fold=1, checkpoint="last").mean


def test_an_evaluation_of_something_else_is_not_used(trained):
    assert collected(trained, fold=0).note == "the evaluation is of fold 1"
    assert "checkpoint 'last', exported is 'best'" in collected(trained, checkpoint="best").note
    write_json(trained[0] / "model.json", {"best_val_dice": 0.8})
    scores = collected(trained)
    assert (scores.source, scores.note) == ("validation", "the evaluation is of another training")


def test_a_damaged_evaluation_stops(trained):
    evaluation = trained[2]
    text = (evaluation / "cases.csv").read_text()
    unreadable = r"evaluation: is not a readable evaluation[\s\S]*evaluate the fold"
    for broken, words in (
        (text.replace("0.5", "x", 1), r"cases\.csv: a score is not a number"),
        (text.replace("one,b", "one,c"), unreadable),
        (text.replace("0.5", "nan", 1), unreadable),
        (text.replace("0.5", "", 1), unreadable),
    ):
        (evaluation / "cases.csv").write_text(broken)
        with pytest.raises(DataError, match=words):
            collected(trained)
    (evaluation / "cases.csv").unlink()
    with pytest.raises(DataError, match=r"cases\.csv: is missing"):
        collected(trained)
    shutil.copy(trained[0] / "model.json", evaluation / "manifest.json")
    with pytest.raises(DataError, match="KeyError"):
        collected(trained)


def test_a_file_of_another_version_is_none(trained, tmp_path):
    path = tmp_path / "scores.json"
    assert load_scores(path) is None
    write_json(path, collected(trained))
    for change in ({"schema_version": 2}, {"fold": "x"}, {"new": 1}, {"labels": ["a"]}):
        path.write_text(json.dumps(read_json(path) | change))
        assert load_scores(path) is None
        write_json(path, collected(trained))
    assert load_scores(path).per_case("dice") == {"one": 0.5, "two": 1.0}
