"""A server that refuses in every way, and files as they were before."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_answers import answering
from tests.tracking.conftest import empty_store, no_sender

__all__ = ["empty_store", "no_sender"]

ANSWERS = {
    "401": (401, b"You are not authenticated."),
    "host": (403, b"Invalid Host header - possible DNS rebinding attack detected"),
    "403": (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
    "404": (404, b"nothing here"),
    "500": (500, b"oops"),
    "login": (200, b"<html>log in</html>"),
}


class Server:
    """`answer`: a key of ANSWERS, or `close`, or `hang`."""

    answer = "500"
    url = ""

    def __call__(self, *_: object) -> tuple[int, dict[str, str], bytes] | None:
        if self.answer == "hang":
            time.sleep(30)
        if self.answer not in ANSWERS:
            return None
        code, body = ANSWERS[self.answer]
        return code, {}, body


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    with answering(found) as found.url:
        yield found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, empty, and an environment that says nothing."""
    for name in list(os.environ):
        if name.startswith(("DISTILLDSM_", "MLFLOW_", "KF_PIPELINES_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
