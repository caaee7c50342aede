"""Fixtures of the tracking tests: a clean working directory, and a ready MLflow store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distilldsm.tracking import process, publish


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, empty; no environment that speaks of tracking."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK", "KFP_RUN_ID", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    publish.open_store.cache_clear()
    return tmp_path


@pytest.fixture
def no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are only described, until the test publishes them."""
    monkeypatch.setattr(process, "start", lambda *_, **__: None)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, made once: it takes seconds."""
    from distilldsm.tracking.store import Store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Store(f"sqlite:///{path}")
    return path


@pytest.fixture
def client(place: Path, empty_store: Path) -> Any:
    """MLflow's client of the default store in the current directory."""
    from mlflow import MlflowClient

    shutil.copyfile(empty_store, place / "mlflow.db")
    return MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
