"""The documentation's commands exist and its links lead somewhere; the tutorial is run as it stands."""

from __future__ import annotations

import re

import nibabel as nib
import pytest

from tests.dvc_run import ROOT, blocks, tutorial
from tests.test_readme import test_command as check_command

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]


def shown_commands():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        indented = "\n".join(re.findall(r"^ {4}(distilldsm .*)$", text, flags=re.MULTILINE))
        for line in "\n".join([*blocks(text, "bash"), indented]).splitlines():
            for command in line.split("#")[0].split("&&"):
                words = command.strip()
                # Capitals stand for what the reader puts in; a line that goes on is read to its end by no one here.
                stands_for_something = re.search(r"\b[A-Z]{3,}\b|\\$|\.\.\.|dataset=mine", words)
                if words.startswith("distilldsm ") and not stands_for_something:
                    yield words


@pytest.mark.parametrize("command", sorted(set(shown_commands())))
def test_a_command_of_the_documentation_is_understood(command):
    check_command(command)


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
