"""Measures seconds to compile the pipeline and to run it in subprocesses, and a component's overhead over its stage.

    python -m benchmarks.kubeflow [--repeats 5]

Prints JSON. The pipeline runs on a tiny embedded sample with two folds. A component's overhead is the median time of
the component `check` in kfp's local runner, minus the median time to load the parameters in a new Python process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "download.sample.subjects=6",
    "preprocess.folds=3",
    "cv.folds=[0,1]",
    "train.model.options.width=0.25",
    "train.epochs=1",
    "export.parity_cases=1",
)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(folder: Path, *arguments: str) -> None:
    """Run a Python module in `folder`. Its output is shown only if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])


def component_seconds(folder: Path, repeats: int) -> list[float]:
    """Seconds of the component `check`, which only loads the parameters: the least that any component costs."""
    import contextlib
    import io
    import warnings

    import kfp.local

    from distilldsm.config import load_params
    from distilldsm.pipeline.definition import CHECK, arguments, component

    warnings.simplefilter("ignore")
    kfp.local.init(kfp.local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "component"))
    check = component("check", "Only loads the parameters", CHECK, "None", "python")
    inputs = arguments(load_params(ROOT / "params.yaml"))
    chosen = {name: inputs[name] for name in CHECK}
    with contextlib.redirect_stdout(io.StringIO()):
        return [seconds(lambda: check(**chosen)) for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shared in ("params.yaml", "conf"):
            (folder / shared).symlink_to(ROOT / shared)
        compile_s = [
            seconds(lambda: command(folder, "distilldsm", "pipeline", "compile", "-o", "p.yaml"))
            for _ in range(repeats)
        ]
        stage = "from distilldsm.config import load_params; load_params()"
        bare = [
            seconds(lambda: subprocess.run([sys.executable, "-c", stage], cwd=ROOT, check=True)) for _ in range(repeats)
        ]
        components = component_seconds(folder, repeats)
        sets = [part for assignment in TINY for part in ("--set", assignment)]
        pipeline_s = seconds(lambda: command(folder, "distilldsm", "pipeline", "run", "--local", *sets))
    print(
        json.dumps(
            {
                "compile_s": round(statistics.median(compile_s), 2),
                "tiny_pipeline_two_folds_s": round(pipeline_s, 1),
                "component_overhead_s": round(statistics.median(components) - statistics.median(bare), 2),
                "repeats": repeats,
                "cores": len(os.sched_getaffinity(0)),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
