"""A server that refuses in every way, and files as they were before."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.conftest import empty_store, no_sender

__all__ = ["empty_store", "no_sender"]

ANSWERS = {
    "401": (401, b"You are not authenticated."),
    "403": (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
    "404": (404, b"nothing here"),
    "500": (500, b"oops"),
    "login": (200, b"<html>log in</html>"),
}


class Server(http.server.ThreadingHTTPServer):
    """`answer`: a key of ANSWERS, or `close`, or `hang`."""

    daemon_threads = True
    block_on_close = False
    answer = "500"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = self.server.answer
        if answer == "hang":
            time.sleep(30)
        if answer in ANSWERS:
            code, body = ANSWERS[answer]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


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
