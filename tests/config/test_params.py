"""Strict parameters: every mistake is named with file, key, value and rule."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.config import Params, TrainConfig, load_params
from distilldsm.core.assignments import read_assignment
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping, load_yaml, to_mapping


def test_defaults_survive_the_round_trip():
    assert from_mapping(Params, to_mapping(Params())) == Params()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, ["trian", "did you mean 'train'"]),
        ({"train": {"epoch": 3}}, ["params.yaml.train", "epoch", "did you mean 'epochs'"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "'many'", "whole number"]),
        ({"train": {"epochs": 2.5}}, ["train.epochs", "2.5", "whole number"]),
        ({"train": {"epochs": True}}, ["train.epochs", "True"]),
        ({"train": {"epochs": 0}}, ["epochs", "0", "at least 1"]),
        ({"train": {"optimizer": "adamww"}}, ["train.optimizer", "adamww", "did you mean 'adamw'"]),
        ({"train": {"model": {"name": "distildsm"}}}, ["train.model", "distildsm", "distill_dsm"]),
        ({"train": {"deterministic": 1}}, ["train.deterministic", "true or false"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate", "finite"]),
        ({"train": {"learning_rate": 10**400}}, ["train.learning_rate", "finite"]),
        ({"preprocess": {"memory_gb": -1}}, ["preprocess.memory_gb", "above 0"]),
        ({"train": {"batch_size": 3, "accumulate": 2}}, ["accumulate", "must divide batch_size (3)"]),
        ({"train": []}, ["train", "mapping"]),
        ({"preprocess": {"target_spacing_mm": [1, 1]}}, ["target_spacing_mm", "3 values"]),
        ({"preprocess": {"target_spacing_mm": [1, 1, -1]}}, ["target_spacing_mm", "above 0"]),
        ({"preprocess": {"patch_size": [4, 20, 0]}}, ["patch_size[2]", "at least 1"]),
        ({"download": {"layout": "pattern"}}, ["pattern", "layout: pattern"]),
        ({"download": {"sha256": "abc"}}, ["sha256", "64"]),
        ({"download": {"patient_pattern": "("}}, ["patient_pattern", "regular expression"]),
        ({"download": {"patient_pattern": "abc"}}, ["patient_pattern", "(group)"]),
        ({"cv": {"folds": [0, 7]}}, ["cv.folds", "below preprocess.folds (5)"]),
        ({"cv": {"folds": [1, 1]}}, ["folds", "distinct"]),
        ({"train": {"augment": {"mirror_axes": ["up"]}}}, ["mirror_axes[0]", "depth, height, width"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, values, words):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in ["params.yaml", *words]:
        assert word in message, message


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "\x00"])
def test_files_that_are_no_parameters(tmp_path: Path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(path)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_params("nowhere.yaml")


def test_yaml_numbers_without_a_dot_are_numbers():
    assert from_mapping(TrainConfig, yaml.safe_load("learning_rate: 4e-3")).learning_rate == 4e-3


def test_whole_floats_are_whole_numbers():
    assert from_mapping(Params, {"cv": {"folds": [0.0, 1.0]}}).cv.folds == (0, 1)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_anything_is_either_parameters_or_a_config_error(value):
    for mapping in (value, {"train": value, "download": value}):
        with contextlib.suppress(ConfigError):
            from_mapping(Params, mapping)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"preprocess": {"regions": {"a": [1, 2]}}},
            ["preprocess.regions", "rule: labels, or names of labels, e.g. {a: [organ, lesion]}"],
        ),
        ({"preprocess": {"regions": "label"}}, ["rule: labels, or names of labels"]),
        (
            {"download": {"pattern": {"labels": {0: "background", 1: "organ"}}}},
            ["download.pattern.labels", "seen: 0 (int)", "rule: NAME: VALUE", "did you mean 'background: 0'?"],
        ),
        ({"download": {"modalities": {1: "MRI"}}}, ["download.modalities", "put the name in quotes"]),
    ],
)
def test_mappings_by_name_say_what_they_hold(values, words):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Params, values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", "seen: train.epochs, lines 2 and 4"),
        ("train: {seed: 1}\ncv: {}\n'train': {}\n", "seen: train, lines 1 and 3"),
        ("a: [{b: 1}, {b: 1, b: 2}]\n", r"seen: a\[1\].b, lines 1 and 1"),
    ],
)
def test_a_key_is_given_once(tmp_path, text, words):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"params\.yaml: a key is given twice\n +{words}\n(.|\n)*hint: "):
        load_yaml(path)


@pytest.mark.parametrize("number", ["010", "0b11", "1:30", "12:30:45", "1_000", "-010", "1_0.5"])
def test_numbers_that_programs_read_differently_are_refused(tmp_path, number):
    """DVC reads YAML 1.2, where 010 is 10 and 1:30 is a text."""
    path = tmp_path / "params.yaml"
    path.write_text(f"train:\n  epochs: {number}\n")
    for read in (lambda: load_yaml(path), lambda: read_assignment(f"train.epochs={number}", where="x")):
        with pytest.raises(ConfigError, match="read differently") as caught:
            read()
        assert "train.epochs" in str(caught.value)
        assert f"{number}, line " in str(caught.value.seen)
    path.write_text(f"a: [0, 10, 0.5, -3, 1e-3, 2.0e+09, 0x10, 2024-01-31, '{number}', 99:99]\n")
    assert load_yaml(path)["a"][-2:] == [number, "99:99"]


def test_what_only_looks_like_a_key_twice_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("x: {y: &y {<<: &z {k: 1, l: 1}, k: 2}}\nb: {<<: *y, l: 3}\nc: [*y, *y]\n")
    assert load_yaml(path)["b"] == {"k": 2, "l": 3}
    assert load_yaml(path)["c"] == [{"k": 2, "l": 1}] * 2


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 " + "x" * 100 + "".join(f"\na{k}: &a{k} [{f'*a{k - 1}, ' * 9}]" for k in range(1, 30)),
        "a0: &a0 {k: v}" + "".join(f"\na{k}: &a{k} {{<<: [{f'*a{k - 1}, ' * 9}]}}" for k in range(1, 30)),
        "a: &a [*a]",
        "a: " + "x" * 10_000_001,
    ],
    ids=["lists", "merges", "a list of itself", "text"],
)
def test_yaml_that_stands_for_too_much_is_refused(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is too large, or its aliases stand for too much"):
        load_yaml(path)


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read\n(.|\n)*hint: .*distilldsm compose.*--params"):
        load_params(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[9,80,80]", [9, 80, 80]),
        ("{a: [organ]}", {"a": ["organ"]}),
        ("{a:[organ, b c]}", {"a": ["organ", "b c"]}),
        ('{T1:MRI,b:"x y", c:{d:1,e:2}}', {"T1": "MRI", "b": "x y", "c": {"d": 1, "e": 2}}),
        ("{a: http://x, 'b:c': null}", {"a": "http://x", "b:c": None}),
        ("null", None),
        ("my set", "my set"),
        ('"2"', "2"),
        ("1e-3", 0.001),
        ("2024-01-31", "2024-01-31"),
        ("msd:Task04_Hippocampus", "msd:Task04_Hippocampus"),
        (r"(p\d+)_.*", r"(p\d+)_.*"),
        ("/data/a=b", "/data/a=b"),
        ("~/Dataset501_Thing", "~/Dataset501_Thing"),
        ("true", True),
    ],
)
def test_values_of_assignments(text, value):
    assert read_assignment(f"a.b={text}", where="x") == (["a", "b"], value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a=[", "a=%x", "a={b: 1, b: 2}", "a=!!python/name:os.system ''"])
def test_what_is_no_assignment(text):
    with pytest.raises(ConfigError, match=r"^x"):
        read_assignment(text, where="x")
