"""A Kubeflow Pipelines API server on loopback. It replays answers recorded from KFP 2.17.0, and remembers requests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.http_answers import answering

TOKEN = "fresh-token"
DATA = Path(__file__).with_name("data")
RECORDED_LOG = (DATA / "log-of-failed-node.txt").read_text()


def recorded(name: str) -> dict[str, Any]:
    """A recorded run, e.g. `run-succeeded`. What the tests do not need was left out."""
    return json.loads((DATA / f"{name}.json").read_text())


class FakeKfp:
    """State of the server; tests set `polls` to what a run's polls see, and `refuse` to break a request."""

    def __init__(self) -> None:
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring: list[dict[str, Any]] = []
        self.packages: list[list[Any]] = []
        self.polls: list[dict[str, Any]] = [{"state": "PENDING"}, recorded("run-running"), recorded("run-succeeded")]
        self.logs: dict[str, str] = {}
        """Node to the log of its pod."""
        self.messages: dict[str, str] = {}
        """Node to Argo's message."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.plugins_output: dict[str, Any] = {}
        self.token: str | None = None
        self.refuse: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.redirect: str | None = None
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
            mine = [
                p for p in self.pipelines if p["display_name"] == wanted and p["namespace"] == query.get("namespace")
            ]
            return 200, {"pipelines": mine}
        if path == "/pipelines/upload":
            found = {
                "pipeline_id": f"p{len(self.pipelines)}",
                "display_name": query["name"],
                "namespace": query.get("namespace"),
            }
            if any(one["namespace"] == found["namespace"] for one in self.pipelines):
                return 409, {"error_message": "pipeline exists"}
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
            return 200, {**self.runs[-1], "plugins_output": self.plugins_output}
        if path == "/recurringruns" and method == "POST":
            self.recurring.append({**json.loads(body), "recurring_run_id": f"rec-{len(self.recurring)}"})
            return 200, self.recurring[-1]
        if re.fullmatch(r"/runs/[^/]+:terminate", path):
            self.polls = [{**self.polls[0], "state": "CANCELING"}]
            return 200, {}
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            run = next((r for r in self.runs if r["run_id"] == unquote(match[1])), None)
            if run is None:
                return 404, json.loads((DATA / "error-404.json").read_text())
            poll = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
            return 200, {**poll, **run}
        if match := re.fullmatch("/apis/v1alpha1/runs/[^/]+/nodes/([^/]+)/log", path):
            gone = json.dumps({"error_message": "Failed to read logs for run", "error_details": "..."})
            return 200, self.logs.get(match[1], gone).encode()
        if re.fullmatch("/apis/v1beta1/runs/[^/]+", path) and self.messages:
            nodes = {node: {"message": message} for node, message in self.messages.items()}
            return 200, {"pipeline_runtime": {"workflow_manifest": json.dumps({"status": {"nodes": nodes}})}}
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
        if fake.redirect:
            return 302, {"Location": fake.redirect}, b""
        code, value = fake.answer(method, target, headers, body)
        if isinstance(value, bytes):
            return code, {"Content-Type": "text/html"}, value
        return code, {"Content-Type": "application/json"}, json.dumps(value).encode()

    with answering(answer) as fake.url:
        yield fake
