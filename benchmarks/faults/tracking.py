"""An MLflow server that is down, killed, slow or broken while a training runs, and later works again."""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.report import Row
from benchmarks.faults.workspace import Workspace, environment
from distilldsm.core.files import read_json

EPOCHS = 12
SLOWDOWN_EPOCHS = 100
"""Enough epochs that the one-time import of MLflow (some CPU seconds) does not matter."""
MOST_SLOWDOWN = 1.02


class Server:
    """A real MLflow server on SQLite that can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        arguments = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--serve-artifacts"]
        arguments += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), *arguments],
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """Kill the server and its workers with SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests to the server after `delay_s` seconds, or answers 500 while `failing`."""

    daemon_threads = True
    delay_s = 0.0
    failing = False

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.target = target
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that have disconnected."""


class _Pass(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delay_s)
        if self.server.failing:
            self.send_error(500)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815


def free_port() -> int:
    """A port on which no program listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def tracking_faults(reference: Workspace, work: Path) -> list[Row]:
    """Train with each fault of the MLflow server. At the end it must hold every epoch once and in order."""
    return [_faulty(reference, work, name, fault) for name, fault in FAULTS.items()]


def _faulty(reference: Workspace, work: Path, name: str, fault: Callable[[Server, Proxy, float], object]) -> Row:
    row = Row(f"MLflow server {name}")
    place = Workspace(work / f"mlflow-{name.replace(' ', '-')}", changes=[f"train.epochs={EPOCHS}"])
    place.copy_of(reference, "train")
    server = Server(place.folder / "server")
    with _proxied(server) as proxy:
        stop = threading.Event()
        if name != "down at the start":
            server.start()
        injector = threading.Thread(target=fault, args=(server, proxy, 3.0), daemon=True)
        process = place.start("train", MLFLOW_TRACKING_URI=proxy.uri)
        injector.start()
        code = process.wait()
        stop.set()
        injector.join()
        problems = [None if code == 0 else f"exit code {code}: {place.log_text('train')[-300:]}"]
        # Send what did not arrive.
        subprocess.run(
            [sys.executable, "-m", "distilldsm", "publish"],
            cwd=place.folder,
            env=environment(MLFLOW_TRACKING_URI=proxy.uri),
            check=False,
        )
        problems.append(_lacking(server, patience_s=120))
    row.record(*problems)
    return row


@contextmanager
def _proxied(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.kill()


def _lacking(server: Server, patience_s: float) -> str | None:
    from mlflow import MlflowClient

    deadline = time.monotonic() + patience_s
    while True:
        client = MlflowClient(server.uri)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        steps = [
            [m.step for m in sorted(client.get_metric_history(r.info.run_id, "train_loss"), key=lambda m: m.timestamp)]
            for r in runs
        ]
        states = [r.info.status for r in runs]
        if steps == [list(range(1, EPOCHS + 1))] and states == ["FINISHED"]:
            return None
        if time.monotonic() > deadline:
            return f"MLflow holds the epochs {steps}, {states}"
        time.sleep(0.5)


def _late(server: Server, proxy: Proxy, seconds: float) -> None:
    time.sleep(seconds)
    server.start()


def _killed(server: Server, proxy: Proxy, seconds: float) -> None:
    time.sleep(seconds)
    server.kill()
    time.sleep(2 * seconds)
    server.start()


def _slow(server: Server, proxy: Proxy, seconds: float) -> None:
    proxy.delay_s = 5.0
    time.sleep(4 * seconds)
    proxy.delay_s = 0.0


def _broken(server: Server, proxy: Proxy, seconds: float) -> None:
    proxy.failing = True
    time.sleep(2 * seconds)
    proxy.failing = False


FAULTS: dict[str, Callable[[Server, Proxy, float], object]] = {
    "down at the start": _late,
    "killed in mid-training": _killed,
    "slow (5 s a request)": _slow,
    "answering 500": _broken,
}


def slowdown(reference: Workspace, work: Path, *, minutes: float) -> Row:
    """Ratio of the seconds per epoch: with an MLflow server that takes 5 s per request, and without tracking.

    Trainings of both kinds take turns until their epochs have taken `minutes` in total; each kind runs at least once.
    """
    row = Row("training beside a slow MLflow server")
    seconds: dict[str, list[float]] = {"slow": [], "none": []}
    server = Server(work / "slowdown-server")
    with _proxied(server) as proxy:
        server.start()
        proxy.delay_s = 5.0
        number = 0
        while sum(map(sum, seconds.values())) < 60 * minutes:
            for kind in seconds:
                changes = [f"train.epochs={SLOWDOWN_EPOCHS}", f"tracking.enabled={str(kind == 'slow').lower()}"]
                place = Workspace(work / f"slowdown-{kind}-{number}", changes=changes)
                place.copy_of(reference, "train")
                code = place.run("train", MLFLOW_TRACKING_URI=proxy.uri).code
                seconds[kind] += [one["seconds"] for one in read_json(place.output("train") / "history.json")][1:]
                row.record(None if code == 0 else f"exit code {code}")
            number += 1
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratio, whole = medians["slow"] / medians["none"], sum(seconds["slow"]) / sum(seconds["none"])
    row.record(None if ratio <= MOST_SLOWDOWN else f"an epoch took {ratio:.3f} times as long")
    row.note = (
        f"{ratio:.3f} times the seconds of an epoch without tracking (medians of {len(seconds['slow'])}, "
        f"{medians['none']:.2f} s each); all epochs together {whole:.3f} times; "
        f"{sum(map(sum, seconds.values())) / 60:.1f} minutes"
    )
    return row
