"""Folds: drawn from the patients, or given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.components import preprocess
from distilldsm.config import PreprocessConfig, load_params
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.hashes import MANIFEST
from distilldsm.data.splits import check_held_out, load_fold, make_splits, read_splits
from tests.data.test_plan import index_of
from tests.data.volumes import write_dataset


def test_splits_are_by_patient_and_hold_out_every_case_once():
    index = index_of(["a", "a", "b", "c", "d", "d", "e", "f", "g"])
    folds = make_splits(index, count=3, seed=1)
    held_out = [case for fold in folds for case in fold["held_out"]]
    assert sorted(held_out) == sorted(c.id for c in index.cases)
    assert sorted(len({n.split("_")[0] for n in fold["held_out"]}) for fold in folds) == [2, 2, 3]
    for fold in folds:
        assert sorted(fold["train"] + fold["held_out"]) == sorted(c.id for c in index.cases)
        patients = {name.split("_")[0] for name in fold["train"]} & {n.split("_")[0] for n in fold["held_out"]}
        assert not patients
    assert make_splits(index, count=3, seed=1) == folds != make_splits(index, count=3, seed=2)


def test_more_folds_than_patients_is_refused():
    with pytest.raises(ConfigError, match="fewer patients than folds"):
        make_splits(index_of(["a", "a", "b"]), count=3, seed=0)
    assert len(make_splits(index_of(["a", "a", "b"]), count=2, seed=0)) == 2


def test_unknown_or_empty_folds_are_refused(tmp_path: Path):
    write_json(tmp_path / "splits.json", {"folds": [{"train": ["a"], "held_out": []}]})
    for fold in (1, -1):
        with pytest.raises(DataError, match=r"no such fold(.|\n)*rule: 0 to 0"):
            load_fold(tmp_path / "splits.json", fold)
    with pytest.raises(DataError, match="lacks"):
        load_fold(tmp_path / "splits.json", 0)


def test_a_model_is_scored_on_what_it_has_not_seen(tmp_path: Path):
    splits = tmp_path / "splits.json"
    write_json(splits, {"folds": []})
    write_json(tmp_path / "model.json", {"fold": 2, "splits": sha256_file(splits)})
    check_held_out(tmp_path, splits, 2)
    with pytest.raises(DataError, match=r"another fold(.|\n)*seen: fold 2\n"):
        check_held_out(tmp_path, splits, 1)
    write_json(splits, {"folds": [1]})
    with pytest.raises(DataError, match="another split"):
        check_held_out(tmp_path, splits, 2)


INDEX = index_of(["a", "a", "b", "c"])
CASES = [case.id for case in INDEX.cases]


def given_splits(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(content))
    return path


@given(
    patients=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=20),
    count=st.integers(2, 4),
    seed=st.integers(0, 9),
)
def test_what_was_drawn_can_be_given_in_both_forms(tmp_path_factory, patients, count, seed):
    index = index_of(patients)
    try:
        drawn = make_splits(index, count=count, seed=seed)
    except ConfigError:
        return
    tmp_path = tmp_path_factory.mktemp("splits")
    for content in (
        {"schema_version": 1, "seed": seed, "folds": drawn},
        [{"train": fold["train"], "val": fold["held_out"]} for fold in drawn],
    ):
        assert read_splits(given_splits(tmp_path, content), index) == drawn


def test_one_fold_may_leave_cases_unused_and_excluded_ones_are_dropped(tmp_path):
    path = given_splits(tmp_path, [{"train": [CASES[0], CASES[1], "d_9"], "val": [CASES[2]]}])
    assert read_splits(path, INDEX, left_out={"d_9"}) == [{"train": CASES[:2], "held_out": [CASES[2]]}]
    with pytest.raises(DataError, match="names cases that the data set does not have") as caught:
        read_splits(path, INDEX)
    assert caught.value.seen == "1, e.g. d_9"
    strange = given_splits(tmp_path, [{"train": [CASES[0], *"wxyz"], "val": [CASES[2]]}])
    with pytest.raises(DataError) as caught:
        read_splits(strange, INDEX)
    assert caught.value.seen == "4, e.g. w, x, y"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no folds"),
        ([], "holds no folds"),
        ([{"train": CASES}], "holds no folds"),
        ([{"train": "a_0", "val": ["b_2"]}], "holds no folds"),
        ([{"train": [0], "val": ["b_2"]}], "holds no folds"),
        ([{"train": ["b_2"], "val": ["c_3"], "held_out": ["a_0"]}], "holds no folds"),
        ([{"train": ["b_2", "c_3"], "val": ["c_3"]}], "trains on a patient that it holds out"),
        ([{"train": ["a_0", "c_3"], "val": ["a_1"]}], "trains on a patient that it holds out"),
        ([{"train": ["b_2"], "val": ["c_3"]}, {"train": ["a_0"], "val": ["c_3"]}], "held out in two folds"),
        ([{"train": ["b_2"], "val": []}], "has no held-out case"),
        ([{"train": ["gone"], "val": ["b_2"]}], "has no training case"),
    ],
)
def test_impossible_folds_are_refused(tmp_path, content, words):
    path = given_splits(tmp_path, content)
    with pytest.raises(DataError, match=words) as caught:
        read_splits(path, INDEX, left_out={"gone"})
    assert str(caught.value.where) == str(path)


def test_any_of_its_folds_can_be_run(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("preprocess: {splits: splits_final.json}\ncv: {folds: [0, 7]}\n")
    assert load_params(path).cv.folds == (0, 7)
    path.write_text("cv: {folds: [0, 7]}\n")
    with pytest.raises(ConfigError, match=r"cv\.folds"):
        load_params(path)


def test_the_stage_takes_them_and_does_anew_when_the_file_changes(tmp_path, capsys):
    index = write_dataset(tmp_path / "raw", cases=5)
    names = [case.id for case in index.cases]
    write_json(tmp_path / "raw" / MANIFEST, {"files": {}})
    (tmp_path / "validation").mkdir()
    write_json(tmp_path / "validation" / "accepted.json", {"accepted": names[:4]})
    path = given_splits(tmp_path, [{"train": [names[0], names[4]], "val": [names[1]]}])
    config = PreprocessConfig(splits=str(path), workers=1)
    inputs, outputs = (
        {"dataset": tmp_path / "raw", "validation": tmp_path / "validation"},
        {"preprocessed": tmp_path / "out"},
    )

    preprocess.run(config, inputs, outputs)
    assert "1, 1 of 4 cases are held out; 2 cases are in no fold and not used" in capsys.readouterr().out
    assert load_fold(tmp_path / "out" / "splits.json", 0) == ([names[0]], [names[1]])
    assert read_json(tmp_path / "out" / "splits.json")["source"] == "splits_final.json"
    assert read_json(tmp_path / "out" / MANIFEST)["inputs"]["splits"] == sha256_file(path)

    given_splits(tmp_path, [{"train": [names[0]], "val": [names[2]]}])
    preprocess.run(config, inputs, outputs)
    assert load_fold(tmp_path / "out" / "splits.json", 0) == ([names[0]], [names[2]])

    path.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        preprocess.run(config, inputs, outputs)
