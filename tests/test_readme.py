"""The README's commands exist and mean what it says; the pipeline test runs them, here each is checked for its form."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from distilldsm.cli.main import parser
from tests.config.test_presets import composed

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    command.strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    for command in line.split("#")[0].split("&&")
    if command.strip()
]


def test_the_first_command_is_the_demo():
    assert COMMANDS[0] == "make demo"


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[:2] == ["distilldsm", "compose"]:
        composed(*[word for word in words[2:] if word != "--keep"])
    elif words[0] == "distilldsm":
        parser(words[1]).parse_args(words[2:])
    elif words[:3] == ["dvc", "exp", "run"]:
        composed(*[word for word in words[3:] if word != "-S"])
    elif "distilldsm.components.train" in words:
        assert (ROOT / "distilldsm" / "components" / "train.py").is_file()
    elif words[:3] == ["python", "-m", "benchmarks.pipeline"]:
        composed(*[word for word in words[3:] if "=" in word])
    else:
        assert command in ("dvc repro", "dvc repro preprocess", "source .venv/bin/activate"), f"no check for: {command}"


PIPELINE_COMMANDS = sorted(
    {
        line.split("#")[0].split("&&")[0].strip()
        for page in (ROOT / "docs").glob("*.md")
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(("distilldsm pipeline", "distilldsm lineage"))
    }
)


@pytest.mark.parametrize("command", PIPELINE_COMMANDS)
def test_pipeline_command_of_the_documentation(command):
    test_command(command)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
