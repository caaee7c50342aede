"""The documentation's commands exist and its links lead somewhere; the tutorial is run as it stands."""

from __future__ import annotations

import re
import shlex

import nibabel as nib
import numpy as np
import pytest

from tests.test_pipeline import ROOT, make_clone, run
from tests.test_readme import test_command as check_command

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


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
def test_the_tutorial(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    data, clone = tmp_path / "mine", make_clone(tmp_path / "clone")
    rng = np.random.default_rng(0)
    for name in ("scans", "masks"):
        (data / name).mkdir(parents=True)
    affine = np.diag([3.0, 1.0, 1.0, 1.0])
    for patient in range(5):
        for visit in "ab":
            grid = np.indices((12, 32, 32)) - np.array([6, *rng.uniform(12, 20, 2)]).reshape(3, 1, 1, 1)
            mask = ((grid * np.array([3, 1, 1]).reshape(3, 1, 1, 1)) ** 2).sum(0) < rng.uniform(60, 100)
            image = (100 + 80 * mask + rng.normal(0, 10, mask.shape)).astype(np.int16)
            nib.save(nib.Nifti1Image(image, affine), data / "scans" / f"p{patient}_{visit}.nii.gz")
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), data / "masks" / f"p{patient}_{visit}_seg.nii.gz")
    (preset,) = blocks(text, "yaml")
    smaller = "train:\n  model: {options: {width: 0.25}}\n"
    (clone / "conf" / "dataset" / "mine.yaml").write_text(preset.replace("/data/mine", str(data)) + smaller)
    (clone / "scan.nii.gz").write_bytes((data / "scans" / "p0_a.nii.gz").read_bytes())
    for line in "\n".join(blocks(text, "bash")).splitlines():
        if not line or line.startswith(("make demo", "source ", "dvc exp run")):  # elsewhere: .ci/run, test_pipeline.py
            continue
        # Two epochs are enough to see that it goes on; the second `dvc repro` then has nothing to do.
        run(*shlex.split(line.replace("train.epochs=60", "train.epochs=2")), cwd=clone)
    for made in (
        "data/validation/report.html",
        "evaluation/fold0/report.html",
        "export/fold0/model.xml",
        "mask.nii.gz",
    ):
        assert (clone / made).exists(), made
    assert nib.load(clone / "mask.nii.gz").shape == (12, 32, 32)
