"""What is installed from a wheel, outside a checkout: one package, and every command works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import COMMANDS, stages

EVERY_HELP = """
import sys
from distilldsm.cli.main import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, name
"""


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves its own files beside what it builds
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(repository / name, source)
    for name in ("conf", "distilldsm"):
        shutil.copytree(repository / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    subprocess.run([*build, str(folder), str(source)], check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """Runs the installed command in an empty folder; returns what it prints."""
    site, empty = wheel.parent / "site", wheel.parent / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "NO_COLOR": "1"}
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import distilldsm; print(distilldsm.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    run.command = str(site / "bin" / "distilldsm")
    return run


def test_it_holds_one_package_and_the_presets(wheel, repository):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"distilldsm"}
    for path in (repository / "conf").rglob("*.*"):
        assert f"distilldsm/{path.relative_to(repository)}" in names
    for folder in ("report", "pretrained"):
        for path in (repository / "distilldsm" / folder).rglob("*.*"):
            if path.suffix != ".pyc":
                assert str(path.relative_to(repository)) in names


def test_every_command_has_its_help(installed):
    shown = installed(installed.command, "--help")
    assert all(name in shown for name in (*stages(), *COMMANDS))
    shown = installed(sys.executable, "-c", EVERY_HELP, *stages(), *COMMANDS)
    assert all(f"usage: distilldsm {name}" in shown for name in (*stages(), *COMMANDS))


def test_commands_without_data(installed):
    assert "distill_dsm" in installed(installed.command, "info", "--models")
    assert installed(installed.command, "params", "train.epochs").startswith("train.epochs: int")
    composed = yaml.safe_load(installed(installed.command, "compose", "dataset=hippocampus", "-o", "-"))
    assert composed["train"]["epochs"] == 40
    found = json.loads(installed(installed.command, "doctor", "--json", "--timeout", "60", "python", "packages"))
    assert {check["status"] for check in found["checks"]} <= {"ok", "warn", "skip"}
    installed(installed.command, "compose", "dataset=sample")
    installed(installed.command, "pipeline", "compile", "-o", "pipeline.yaml")
