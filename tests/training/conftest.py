"""A data set that trainings of a second read."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilldsm.config import PreprocessConfig
from distilldsm.data.preprocess import preprocess_dataset
from tests.data.volumes import write_dataset


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory) -> Path:
    """Six cases in three folds."""
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("data") / "preprocessed"
    preprocess_dataset(root, write_dataset(root, cases=6), PreprocessConfig(folds=3, workers=1), output)
    return output
