"""Commands call nobody and leave the home folder as it is. The stages and DVC: tests/test_pipeline.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distilldsm.core.files import read_json
from distilldsm.core.privacy import SWITCHES
from tests.conftest import CALLS, OFFLINE, REPOSITORY
from tests.export.fake import exported

FOLDERS = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR")


def alone(*command: str, home: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does who has switched nothing off, with a home folder of its own."""
    left_out = (*SWITCHES, *FOLDERS, "CI", "PYTEST_CURRENT_TEST", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HOME": str(home), "PYTHONPATH": f"{OFFLINE}{os.pathsep}{REPOSITORY}", **variables}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_hook_reaches_child_processes(tmp_path):
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    call = "import urllib.request; urllib.request.urlopen('http://telemetry.example.net/')"
    assert alone("-c", code, call, home=tmp_path, cwd=tmp_path).returncode == 1
    assert "telemetry.example.net" in CALLS.read_text()
    CALLS.write_text("")
    here = (
        "import socket; server = socket.create_server(('localhost', 0)); socket.create_connection(server.getsockname())"
    )
    assert alone("-c", code, here, home=tmp_path, cwd=tmp_path).returncode == 0


RUN = """
import json, sys
from distilldsm.cli.main import main
for command in json.loads(sys.argv[1]):
    print("---", *command, flush=True)
    assert main(command) in (0, 1), command  # summary, lineage: there is none
import nncf, openvino, mlflow, great_expectations
assert not sys.modules["openvino_telemetry"]
"""


@pytest.mark.slow
def test_every_command(tmp_path, tmp_path_factory):
    made = exported(tmp_path_factory)
    images = [str(made.raw / name) for name in read_json(made.raw / "dataset_index.json")["cases"][0]["images"]]
    export, home, place = str(made.export), tmp_path / "home", tmp_path / "place"
    home.mkdir()
    place.mkdir()
    commands = [
        ["predict", export, *images, "-o", "mask.nii.gz"],
        ["predict", export, *images, "-o", "onnx.nii.gz", "--engine", "onnx"],
        ["view", images[0], "mask.nii.gz", "-o", "page.html", "--no-open"],
        ["drift", export, str(made.raw / "imagesTr"), "-o", "drift.html"],
        ["info", export], ["info"], ["plan", str(made.preprocessed)], ["params"], ["compose"], ["summary"],
        ["publish"], ["lineage", "x"], ["pipeline", "compile", "-o", "pipeline.yaml"], ["doctor"],
    ]  # fmt: skip
    done = alone("-c", RUN, json.dumps(commands), home=home, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "onnx.nii.gz").is_file()
    assert not list(home.rglob("*"))


@pytest.mark.slow
def test_a_user_without_name_home_and_locale(tmp_path):
    """As in a pod of a strict cluster. Packages that look for the home folder fail when they are imported."""
    user = ["unshare", "--map-user=54321", "--map-group=54321"]
    if not shutil.which("unshare") or subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot change the user's id here")
    packages = (
        "great_expectations, mlflow, torch._inductor.config, nilearn.image, openvino, onnxruntime, nncf, dvc.repo"
    )
    code = f"import distilldsm, os; assert os.getuid() == 54321; import {packages}, getpass; print(getpass.getuser())"
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*user, sys.executable, "-c", code]
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "user54321\n", done.stderr
    assert not list(tmp_path.iterdir())
