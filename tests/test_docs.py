"""The documentation's commands exist and its links lead somewhere; the tutorial is run as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import pytest

from distilldsm.cli.main import parser
from tests.config.test_presets import composed
from tests.dvc_run import ROOT, blocks, tutorial

README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), README, ROOT / "SECURITY.md"]


def shown_commands(page: Path) -> Iterator[str]:
    """The commands of a page that can be checked: all of the README's, of other pages those of `distilldsm`."""
    text = page.read_text(encoding="utf-8")
    indented = "\n".join(re.findall(r"^ {4}(distilldsm .*)$", text, flags=re.MULTILINE))
    for line in "\n".join([*blocks(text, "bash"), indented]).replace("\\\n", " ").splitlines():
        for command in line.split("#")[0].split("&&"):
            words = command.strip()
            # Capitals stand for what the reader puts in.
            is_form = re.search(r"\b[A-Z]{3,}\b|\.\.\.|dataset=mine", words)
            known = "distilldsm " if not is_form else ("distilldsm pipeline", "distilldsm lineage")
            if words and (page == README or words.startswith(known)):
                yield words


def test_the_readmes_first_command_is_the_demo():
    assert next(shown_commands(README)) == "make demo"


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in shown_commands(page)}))
def test_a_command_of_the_documentation_is_understood(command):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}: of {sorted(anchors)}"


def test_every_page_is_led_to_from_the_readme():
    """In at most three steps."""
    seen, new = set(), {ROOT / "README.md"}
    for _ in range(3):
        seen |= new
        new = {
            (page.parent / target.partition("#")[0]).resolve()
            for page in new
            for target in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page.read_text(encoding="utf-8"))
            if not target.startswith("https://")
        } - seen
    assert set(PAGES) - seen - new == set()


@pytest.mark.slow
def test_the_tutorial(tmp_path_factory):
    clone = tutorial(tmp_path_factory) / "clone"
    for made in (
        "data/validation/report.html",
        "evaluation/fold0/report.html",
        "export/fold0/model.xml",
        "mask.nii.gz",
    ):
        assert (clone / made).exists(), made
    assert nib.load(clone / "mask.nii.gz").shape == (12, 32, 32)
