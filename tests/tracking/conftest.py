"""Fixtures of the tracking tests: a clean working directory, a ready MLflow store, a store that only remembers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distilldsm import tracking
from distilldsm.config import TrackingConfig
from distilldsm.tracking.journal import Record
from distilldsm.tracking.sink import RefusedError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, empty but for the training's `work`; no environment that speaks of tracking."""
    for name in ("MLFLOW_TRACKING_URI", "RANK", "DISTILLDSM_TRACKING_DIR", "KFP_RUN_ID", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    return tmp_path


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records stay in the journal until the test sends them."""
    monkeypatch.setattr(tracking, "_start_worker", lambda *_, **__: None)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, made once: it takes seconds."""
    from distilldsm.tracking.sink import Sink

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Sink(f"sqlite:///{path}")
    return path


@pytest.fixture
def client(place: Path, empty_store: Path) -> Any:
    """MLflow's client of the default store in the current directory."""
    from mlflow import MlflowClient

    shutil.copyfile(empty_store, place / "mlflow.db")
    return MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")


@pytest.fixture
def run(place: Path, no_worker: None) -> Iterator[tracking.Run]:
    with tracking.start_run(TrackingConfig(), directory=place / "work", name="test") as opened:
        yield opened


class FakeSink:
    """Remembers what it is given; `plan` decides what becomes of each attempt."""

    def __init__(self, uri: str = "http://fake") -> None:
        self.uri = uri
        self.opened: list[Record] = []
        self.applied: list[Record] = []
        self.identities: list[str] = []
        self.up = True
        self.plan: Callable[[Record], str] = lambda record: "ok"

    def reachable(self) -> bool:
        return self.up

    def open_run(self, record: Record, known_run_id: str | None) -> str:
        if not self.up:
            raise ConnectionError("nobody at http://user:secret@fake/")
        self.opened.append({**record, "known": known_run_id})
        return known_run_id or "run-1"

    def apply(self, records: list[Record], directory: Path, identity: str) -> None:
        outcomes = {self.plan(record) for record in records}
        if "refuse" in outcomes:
            raise RefusedError("never")
        if "fail" in outcomes:
            raise ConnectionError("away")
        for record in records:
            if "path" in record:
                assert (directory / record["path"]).exists()
        self.applied += records
        self.identities.append(identity)


@pytest.fixture
def fake() -> FakeSink:
    return FakeSink()
