"""The registered model behind a real server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilldsm.core.files import read_json
from distilldsm.inference.engines import OpenVINOEngine
from distilldsm.inference.loading import load_exported
from distilldsm.inference.service import ROOT_VARIABLE
from distilldsm.io import read_labels, read_scan
from distilldsm.tracking import describe
from tests.export.fake import NETWORK, exported
from tests.tracking.store import CONFIG, publish_known


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, payload: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer of the server."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(payload).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_mlflow_serves_what_openvino_computes(place, client, tmp_path_factory):
    made = exported(tmp_path_factory)
    package = made.export
    case = read_json(made.raw / "dataset_index.json")["cases"][0]
    scans = place / "scans"
    scans.mkdir()
    names = [Path(name).name for name in case["images"]]
    for name in case["images"]:
        shutil.copy(made.raw / name, scans)
    export = Path(shutil.copytree(package, place / "export/fold1"))
    describe(CONFIG, export, name="n", model={"registered_name": "served"})
    publish_known()
    port = free_port()
    command = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "-m", "models:/served@challenger"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", ROOT_VARIABLE: str(scans)}
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
        status, answer = ask(port, {"inputs": {"image": image.tolist()}})
        assert status == 200, answer
        logits = np.array(answer["predictions"]["logits"], dtype=np.float32)
        # A signature of tensors wants one: without voxels, for the paths say what is meant.
        nothing = {"image": np.zeros((1, 2, 1, 1, 0)).tolist()}
        status, answer = ask(port, {"inputs": nothing, "params": {"paths": names}})
        assert status == 200, answer
        mask = np.array(answer["predictions"]["mask"])
        status, answer = ask(port, {"inputs": nothing, "params": {"paths": names, "output": "mask.nii.gz"}})
        assert status == 200, answer
        assert answer["predictions"] == {"output": str(scans.resolve() / "mask.nii.gz")}
        for wrong in (["../mlflow.db"], ["none.nii.gz", "none.nii.gz"], names[:1]):
            status, answer = ask(port, {"inputs": nothing, "params": {"paths": wrong}})
            assert status == 400
            assert "scans" in json.dumps(answer), answer
        spoiled = image.copy()
        spoiled[0, 0, 0, 0, 0] = np.nan
        for inputs, params, words in (
            (nothing, {"paths": names, "output": "mask.nii.gz"}, "nothing is overwritten"),
            ({"image": spoiled.tolist()}, {}, "NaN or infinite"),
        ):
            status, answer = ask(port, {"inputs": inputs, "params": params})
            assert (status, words in json.dumps(answer)) == (400, True), answer
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
    expected = OpenVINOEngine(package / "model.xml", NETWORK)(image)
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # as JSON
    label = load_exported(package).predict(read_scan([scans / name for name in names], 2)).mask
    np.testing.assert_array_equal(mask, label)
    np.testing.assert_array_equal(read_labels(scans / "mask.nii.gz").values, label)
