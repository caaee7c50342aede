"""A small Kubeflow Pipelines API server on loopback: it answers what the real client asks for, and remembers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.http_answers import answering

TOKEN = "fresh-token"


class FakeKfp:
    """State of the server; tests set `states` to what a run's polls see, and `refuse` to break a request."""

    def __init__(self) -> None:
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring: list[dict[str, Any]] = []
        self.packages: list[list[Any]] = []
        self.states: list[str] = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.tasks: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.token: str | None = None
        self.refuse: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.url = ""

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        path = urlsplit(target).path
        query = {k: v[0] for k, v in parse_qs(urlsplit(target).query).items()}
        self.requests.append((method, target, headers))
        refused = self.refuse(method, path)
        if refused is not None:
            return refused[0], {"error_message": refused[1]}
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error_message": "token is expired"}
        path = path.removeprefix("/apis/v2beta1")
        if path == "/healthz":
            return 200, {"multi_user": False}
        if path == "/pipelines" and method == "GET":
            wanted = json.loads(query["filter"])["predicates"][0]
            wanted = wanted.get("stringValue") or wanted.get("string_value")
            return 200, {"pipelines": [p for p in self.pipelines if p["display_name"] == wanted]}
        if path == "/pipelines/upload":
            found = {"pipeline_id": f"p{len(self.pipelines)}", "display_name": query["name"]}
            self.pipelines.append(found)
            self.packages.append(self._package(body))
            return 200, found
        if path == "/pipelines/upload_version":
            if any(v["display_name"] == query["name"] for v in self.versions):
                return 409, {"error_message": "version exists"}
            found = {
                "pipeline_id": query["pipelineid"],
                "pipeline_version_id": f"v{len(self.versions)}",
                "display_name": query["name"],
            }
            self.versions.append(found)
            self.packages.append(self._package(body))
            return 200, found
        if re.fullmatch(r"/pipelines/[^/]+/versions", path):
            return 200, {"pipeline_versions": self.versions}
        if path == "/experiments" and method == "GET":
            return 200, {"experiments": self.experiments}
        if path == "/experiments":
            self.experiments.append({**json.loads(body), "experiment_id": f"e{len(self.experiments)}"})
            return 200, self.experiments[-1]
        if path == "/runs" and method == "POST":
            self.runs.append({**json.loads(body), "run_id": f"run-{len(self.runs)}"})
            return 200, self.runs[-1]
        if path == "/recurringruns" and method == "POST":
            self.recurring.append({**json.loads(body), "recurring_run_id": f"rec-{len(self.recurring)}"})
            return 200, self.recurring[-1]
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            run = next((r for r in self.runs if r["run_id"] == unquote(match[1])), None)
            if run is None:
                return 404, {"error_message": f"Run {match[1]} not found"}
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            error = {"error": {"code": 1, "message": "a step failed"}} if state == "FAILED" else {}
            return 200, {**run, "state": state, "run_details": {"task_details": self.tasks}, **error}
        return 404, {"error_message": f"no {method} {path}"}

    @staticmethod
    def _package(body: bytes) -> list[Any]:
        """The YAML inside a multipart upload."""
        text = body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0].decode()
        return list(yaml.safe_load_all(text))


@contextmanager
def serving(fake: FakeKfp) -> Iterator[FakeKfp]:
    """Answer on loopback while the block runs."""

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        code, value = fake.answer(method, target, headers, body)
        if isinstance(value, bytes):
            return code, {"Content-Type": "text/html"}, value
        return code, {"Content-Type": "application/json"}, json.dumps(value).encode()

    with answering(answer) as fake.url:
        yield fake
