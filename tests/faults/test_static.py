"""The linter forbids what could carry out what a file says (pyproject.toml: ruff's bandit rules and banned names)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = """import pickle
import joblib
from dill import loads
import shelve as s
from monai.bundle import ConfigParser
from monai import bundle
torch.load(path, weights_only=False)
np.load(path)
np.load(path, allow_pickle=True)
yaml.load(text, Loader=yaml.Loader)
yaml.unsafe_load(text)
eval(text)
exec(text)
subprocess.run('x', shell=True)
os.system('x')
archive.extractall(target)
shutil.unpack_archive(x)
pd.read_pickle(x)
mlflow.pyfunc.load_model(x)"""
ALLOWED = """f(x).eval()
yaml.safe_load(text)
re.compile(x)
archive.extractall(target, filter='data')
subprocess.run(['x'], check=True)
json.load(stream)"""
IMPORTS = "import json, mlflow, os, re, shutil, subprocess, tarfile, torch, yaml\nimport numpy as np, pandas as pd\n"


@pytest.mark.parametrize("folder", ["distilldsm", "docker", "benchmarks", ".ci"])
def test_what_the_linter_finds(folder):
    lines = (FORBIDDEN + "\n" + ALLOWED).splitlines()
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    done = subprocess.run(
        [*command, "--stdin-filename", str(ROOT / folder / "x.py"), "-"],
        input=IMPORTS + "\n".join(lines), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {int(line) for line in re.findall(r"^\S+?:(\d+):\d+: (?:S\d|TID251)", done.stdout, re.MULTILINE)}
    head = IMPORTS.count("\n")
    assert [line for number, line in enumerate(lines, head + 1) if number in found] == FORBIDDEN.splitlines()


def test_shell_scripts_evaluate_nothing():
    for path in [*(ROOT / "docker").glob("*.sh"), ROOT / ".ci/run"]:
        assert "eval " not in path.read_text(encoding="utf-8"), path
