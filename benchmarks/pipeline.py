"""Runs the pipeline on one data set. Prints seconds and peak memory of each stage, and the Dice scores.

    python -m benchmarks.pipeline dataset=hippocampus download.source=PATH/Task04_Hippocampus.tar
    python -m benchmarks.pipeline dataset=sample model=unet2d

The arguments are those of `distilldsm compose`. All files are written below --work (default: build/benchmark). Memory
is the sum of the proportional set sizes (PSS) of the stage's process and all its children, sampled up to ten times a
second. PSS counts shared pages only once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("download", "validate", "preprocess", "train", "evaluate", "export")
PER_FOLD = ("train", "evaluate", "export")


def tree_memory(process: psutil.Process) -> int:
    """PSS of a process and all its children, in bytes."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def measure(command: Sequence[str], work: Path) -> dict[str, float]:
    """Run a command in `work`. Returns its seconds and peak memory (GB)."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=work, env=environment)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        before = time.perf_counter()
        try:
            peak = max(peak, tree_memory(watched))
        except psutil.NoSuchProcess:
            break
        # Reading PSS walks all pages: limit it to two percent of one core.
        time.sleep(max(0.1, 50 * (time.perf_counter() - before)))
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(peak / 1e9, 2)}


def machine() -> str:
    """CPU model and number of cores."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for distilldsm compose, e.g. dataset=acdc train.epochs=30")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmark")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "conf").exists():
        (work / "conf").symlink_to(ROOT / "conf")
    # Relative paths in the overrides refer to the caller's folder, not to the work folder.
    overrides = [
        f"{key}={Path(value).resolve()}" if key == "download.source" and Path(value).exists() else o
        for o in args.overrides
        for key, _, value in [o.partition("=")]
    ]
    subprocess.run(
        [sys.executable, "-m", "distilldsm", "compose", *overrides, "-o", str(work / "params.yaml")],
        check=True,
        cwd=ROOT,
    )
    results = {}
    for stage in args.stages:
        fold = ["--fold", str(args.fold)] if stage in PER_FOLD else []
        results[stage] = measure([sys.executable, "-m", f"distilldsm.components.{stage}", *fold], work)
    scores = json.loads((work / f"evaluation/fold{args.fold}/metrics.json").read_text())
    report = {"machine": machine(), "overrides": overrides, "fold": args.fold, "stages": results, "scores": scores}
    (work / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{machine()}\n{'stage':12}{'seconds':>10}{'peak GB':>10}")
    for stage, result in results.items():
        print(f"{stage:12}{result['seconds']:>10}{result['peak_gb']:>10}")
    print("Dice:", scores.get("dice"))


if __name__ == "__main__":
    main()
