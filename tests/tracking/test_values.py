"""Names and values in the form MLflow takes; tags that lead back to code and data."""

from __future__ import annotations

import json
import math
import re
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.files import sha256_file
from distilldsm.core.mapping import flatten
from distilldsm.tracking.values import key_name, plain, texts, version_tags


@settings(deadline=None, max_examples=150)
@given(st.text(min_size=1, max_size=300))
def test_any_name_becomes_one_that_mlflow_takes(name):
    from mlflow.utils.validation import _validate_metric_name

    key = key_name(name)
    _validate_metric_name(key)
    assert len(key) <= 250


@pytest.mark.parametrize("name", ["train.model.options.alpha", "val_dice_grey matter", "system/cpu", "a-b:c"])
def test_good_names_stay(name):
    assert key_name(name) == name


def test_nested_parameters_become_dotted():
    nested = {"train": {"model": {"options": {"alpha": 0.5}}, "empty": {}}, "fold": 0}
    assert flatten(nested) == {"train.model.options.alpha": 0.5, "train.empty": {}, "fold": 0}


def test_values_are_shown_as_in_yaml():
    values = {"a": True, "b": None, "c": 1e-3, "d": [1, 2], "e": "x", "f": np.float32(0.5), "g": (1.0, 2.0), "h": {}}
    assert texts(values, 100) == {
        "a": "true",
        "b": "null",
        "c": "0.001",
        "d": "[1, 2]",
        "e": "x",
        "f": "0.5",
        "g": "[1.0, 2.0]",
        "h": "{}",
    }


def test_long_values_are_cut_and_stay_distinct():
    cut = texts({"a": "x" * 7000 + "1", "b": "x" * 7000 + "2", "c": "y" * 6000}, 6000)
    assert len(cut["a"]) <= 6000
    assert cut["a"] != cut["b"]
    assert re.search(r"x\.\.\. \(sha256 [0-9a-f]{16}\)$", cut["a"])
    assert cut["c"] == "y" * 6000


def test_plain_values_are_strict_json():
    value = {"n": math.nan, "i": np.int64(3), "a": np.array([1.5, math.inf]), 4: (None, True), "o": object}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "n": None,
        "i": 3,
        "a": [1.5, None],
        "4": [None, True],
        "o": "<class 'object'>",
    }


def _git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_tags_tell_commit_changes_data_and_pipeline(place, monkeypatch):
    _git("init", "-q")
    (place / "a.txt").write_text("1")
    (place / "dvc.lock").write_text("schema: '2.0'\n")
    _git("add", "a.txt")
    _git("commit", "-q", "-m", "m", "--no-gpg-sign")
    monkeypatch.setenv("KFP_RUN_ID", "kfp-1")
    tags = version_tags()
    assert tags["git_commit"] == tags["mlflow.source.git.commit"] == _git("rev-parse", "HEAD")
    assert tags["git_dirty"] == "false", "untracked files do not count"
    assert tags["dvc_lock_sha256"] == sha256_file("dvc.lock")
    assert tags["kfp_run_id"] == "kfp-1"
    (place / "a.txt").write_text("2")
    assert version_tags()["git_dirty"] == "true"


def test_tags_without_git(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    assert not {"git_commit", "git_dirty", "dvc_lock_sha256", "kfp_run_id"} & set(version_tags())
    monkeypatch.setenv("GIT_COMMIT", "f" * 40)
    tags = version_tags()
    assert tags["git_commit"] == "f" * 40
    assert "git_dirty" not in tags
