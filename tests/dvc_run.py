"""The tutorial's commands in a clone, once per test run: what the tests of DVC, documentation and servers look at."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from filelock import FileLock

from distilldsm.core.privacy import SWITCHES
from tests.conftest import OFFLINE

NARROW = "train.model.options.width=0.25"
ROOT = Path(__file__).resolve().parent.parent
NOTHING_TO_DO = "last_repro.txt"
"""What the last `dvc repro` printed, which had nothing to do."""


def run(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of the clone in `cwd` as a user would: no switch of telemetry, no MLflow server, an empty home."""
    home = cwd.parent / "home"
    home.mkdir(exist_ok=True)
    left_out = (*SWITCHES, "CI", "PYTEST_CURRENT_TEST", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{OFFLINE}{os.pathsep}{cwd}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done


def make_clone(target: Path) -> Path:
    """A repository with the files of this working tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if name != "dvc.lock" and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    run("git", "init", "-q", cwd=target)
    run("git", "config", "user.email", "test@example.org", cwd=target)
    run("git", "config", "user.name", "Test", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "clone", cwd=target)
    return target


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def tutorial(tmp_path_factory) -> Path:
    """A folder that all workers share: `clone` after the tutorial's commands, `copy` of it, and NOTHING_TO_DO.

    tests/test_pipeline.py changes the clone, tests/services the copy.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tutorial"
    with FileLock(f"{root}.lock"):
        if not (root / NOTHING_TO_DO).exists():
            shutil.rmtree(root, ignore_errors=True)  # it failed in another worker
            write_scans(root / "mine")
            last = follow_tutorial(make_clone(root / "clone"), root / "mine")
            shutil.copytree(root / "clone", root / "copy", symlinks=True)
            (root / NOTHING_TO_DO).write_text(last)
    return root


def write_scans(data: Path) -> None:
    """Bright ellipsoids: 15 patients of two visits, in the tutorial's layout. A champion needs five scored cases."""
    rng = np.random.default_rng(0)
    for name in ("scans", "masks"):
        (data / name).mkdir(parents=True)
    affine = np.diag([3.0, 1.0, 1.0, 1.0])
    for patient in range(15):
        for visit in "ab":
            grid = np.indices((12, 32, 32)) - np.array([6, *rng.uniform(12, 20, 2)]).reshape(3, 1, 1, 1)
            mask = ((grid * np.array([3, 1, 1]).reshape(3, 1, 1, 1)) ** 2).sum(0) < rng.uniform(60, 100)
            image = (100 + 80 * mask + rng.normal(0, 10, mask.shape)).astype(np.int16)
            nib.save(nib.Nifti1Image(image, affine), data / "scans" / f"p{patient}_{visit}.nii.gz")
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), data / "masks" / f"p{patient}_{visit}_seg.nii.gz")


def follow_tutorial(clone: Path, data: Path) -> str:
    """Run the tutorial's commands, with a narrow network and two epochs; returns what the last `dvc repro` printed."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (preset,) = blocks(text, "yaml")
    more = "train: {validate_every: 1}\nexport: {min_dice: 0}\n"
    (clone / "conf" / "dataset" / "mine.yaml").write_text(preset.replace("/data/mine", str(data)) + more)
    (clone / "scan.nii.gz").write_bytes((data / "scans" / "p0_a.nii.gz").read_bytes())
    last = ""
    for line in "\n".join(blocks(text, "bash")).splitlines():
        if not line or line.startswith(("make demo", "source ", "dvc exp run")):  # elsewhere: .ci/run, test_pipeline.py
            continue
        # Two epochs are enough to see that it goes on; the second `dvc repro` then has nothing to do.
        changed = line.replace("train.epochs=null", "train.epochs=2").replace("=mine", f"=mine {NARROW}")
        done = run(*shlex.split(changed), cwd=clone)
        last = done.stdout if line == "dvc repro" else last
    return last
