"""Strict parameters: every mistake is named with file, key, value and rule."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.config import Params, TrainConfig, load_params
from distilldsm.errors import ConfigError
from distilldsm.params import from_mapping, to_mapping


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
        ({"train": {"batch_size": 3, "accumulate": 2}}, ["accumulate", "divides batch_size (3)"]),
        ({"train": []}, ["train", "mapping"]),
        ({"preprocess": {"target_spacing_mm": [1, 1]}}, ["target_spacing_mm", "3 values"]),
        ({"preprocess": {"target_spacing_mm": [1, 1, -1]}}, ["target_spacing_mm", "above 0"]),
        ({"preprocess": {"patch_size": [4, 20, 32]}}, ["patch_size", "multiples of 16"]),
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
