"""The registered model behind a real server on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from distilldsm.inference.engines import OpenVINOEngine
from distilldsm.tracking import replay_journals
from tests.export.fake import exported


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_mlflow_serves_what_openvino_computes(place, client, run, tmp_path_factory):
    package = exported(tmp_path_factory).export
    run.log_exported_model(package, registered_name="served")
    assert replay_journals().rejected == 0
    port = free_port()
    command = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "-m", "models:/served@champion"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = place / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        image = np.random.default_rng(0).normal(size=(1, 2, 3, 16, 32)).astype(np.float32)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({"inputs": {"image": image.tolist()}}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                logits = np.array(json.load(answer)["predictions"]["logits"], dtype=np.float32)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[-1500:]) from None
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
    expected = OpenVINOEngine(package / "model.xml")(image)
    np.testing.assert_allclose(logits, expected, atol=5e-3)  # the IR holds half-precision weights
