"""Injects faults into the pipeline at random moments, as they happen on laptops and clusters.

    python -m benchmarks.faults                      # all of it: about 40 minutes on 2 cores
    python -m benchmarks.faults kills --kills 30
    python -m benchmarks.faults disk memory twice
    python -m benchmarks.faults slowdown --minutes 10   # epoch time with an MLflow server that takes 5 s per request

Prints a table (fault, trials, survived, what was lost). The exit code is 1 if anything was lost. A trial is survived if
no output was ever half written, every expected error was reported, and the repeated command succeeded with the results
of an undisturbed run (bit by bit, except times and ids).
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults import downloads, kills, power, storage, tracking, twice
from benchmarks.faults.report import Row, markdown
from benchmarks.faults.workspace import Workspace
from benchmarks.pipeline import machine

KINDS = ("kills", "repro", "disk", "memory", "twice", "mlflow", "slowdown", "downloads", "power")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of {', '.join(KINDS)}; default: all")
    parser.add_argument(
        "--kills",
        type=int,
        default=100,
        help="kills of stages; dvc repro gets a quarter as many, and a fifth as many power cuts (%(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=10, help="training time in slowdown (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = args.kinds or KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    rows: list[Row] = []
    try:
        if set(kinds) - {"downloads", "power"}:
            reference = Workspace(work / "reference")
            seconds = reference.run_all()
            print("undisturbed: " + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()), flush=True)
        for kind in kinds:
            print(kind, flush=True)
            if kind == "kills":
                rows += kills.stage_kills(reference, seconds, work, kills=args.kills, rng=rng)
            elif kind == "repro":
                rows.append(kills.repro_kills(work, kills=max(1, args.kills // 4), rng=rng))
            elif kind == "disk":
                if storage.can_mount():
                    rows += storage.disk_full(reference, work, shares=(0.05, 0.5, 0.95))
                    rows.append(storage.read_only(reference, work))
                else:
                    print("  skipped: a small file system can be mounted by root only")
            elif kind == "memory":
                rows += storage.worker_killed(reference, work, times=3, rng=rng)
            elif kind == "twice":
                rows += [twice.stages_twice(reference, work), twice.repro_twice(reference, work)]
            elif kind == "mlflow":
                rows += tracking.tracking_faults(reference, work)
            elif kind == "slowdown":
                rows.append(tracking.slowdown(reference, work, minutes=args.minutes))
            elif kind == "power":
                if reason := power.why_not():
                    print(f"  skipped: {reason}")
                else:
                    rows.append(power.power_cuts(work, cuts=max(1, args.kills // 5), rng=rng))
            else:
                rows += downloads.download_faults(work / "downloads", times=20, rng=rng)
                rows += downloads.archive_faults(work / "archives", rng=rng)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{machine()}, {(time.monotonic() - began) / 60:.0f} minutes, seed {args.seed}\n\n{markdown(rows)}")
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
