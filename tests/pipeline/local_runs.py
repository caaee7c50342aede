"""`distilldsm pipeline run --local` on a tiny data set, for the tests of both runners."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "download.sample.subjects=6",
    "preprocess.folds=3",
    "train.model.options.width=0.25",
    "train.epochs=1",
    "train.validate_every=1",
    "export.parity_cases=1",
    "export.min_dice=0",
)


def run_pipeline(cwd: Path, *assignments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run it in `cwd`, with the shipped parameters, TINY and `assignments`."""
    shutil.copytree(ROOT / "conf", cwd / "conf", dirs_exist_ok=True)
    shutil.copy(ROOT / "params.yaml", cwd)
    command = [sys.executable, "-m", "distilldsm", "pipeline", "run", "--local", *options]
    for assignment in (*TINY, *assignments):
        command += ["--set", assignment]
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "KFP_RUN_ID")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def artifacts(cwd: Path, name: str) -> list[Path]:
    """Files and folders of that name in the runs below `cwd`."""
    return sorted((cwd / "kfp-runs").rglob(name))
