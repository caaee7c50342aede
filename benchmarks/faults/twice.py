"""Runs the same command twice at the same time."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.kills import repository
from benchmarks.faults.report import Row
from benchmarks.faults.workspace import OUTPUTS, Workspace, broken, differences, environment


def stages_twice(reference: Workspace, work: Path, *, stages: Sequence[str] = tuple(OUTPUTS)) -> Row:
    """Start each stage twice. One process does the work; the other must report that the first one is writing."""
    row = Row("two processes of one stage")
    for stage in stages:
        place = Workspace(work / f"twice-{stage}", changes=["tracking.enabled=false"])
        place.copy_of(reference, stage)
        first = place.start(stage)
        (place.folder / f"{stage}.log").rename(place.folder / "first.log")
        second = place.start(stage)
        codes = [first.wait(), second.wait()]
        texts = [(place.folder / "first.log").read_text(), place.log_text(stage)]
        errors = [text for code, text in zip(codes, texts, strict=True) if code]
        problems = [broken(place.output(stage))]
        if 0 not in codes:
            problems.append(f"both failed: {texts}")
        if any("another process is writing" not in text for text in errors):
            problems.append(f"unclear: {errors}")
        if other := differences(place.output(stage), reference.output(stage)):
            problems.append(f"differs in {', '.join(other)}")
        row.record(*(p and f"{stage}: {p}" for p in problems))
    return row


def repro_twice(reference: Workspace, work: Path) -> Row:
    """Start `dvc repro` twice in one repository. One does the work; the other must wait or report the lock."""
    row = Row("two dvc repro")
    place = repository(work / "repro-twice")
    both = [
        subprocess.Popen(
            ["dvc", "repro"],
            cwd=place,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    texts = [one.communicate()[0] for one in both]
    codes = [one.returncode for one in both]
    problems: list[str | None] = [None if 0 in codes else f"both failed: {texts}"]
    for code, text in zip(codes, texts, strict=True):
        if code and "lock" not in text and "another process" not in text:
            problems.append(f"unclear: {text[-300:]}")
    again = subprocess.run(["dvc", "repro"], cwd=place, env=environment(), capture_output=True, text=True)
    problems.append(None if again.returncode == 0 else f"afterwards: {again.stderr[-300:]}")
    for stage, name in OUTPUTS.items():
        if not (place / name).exists():
            problems.append(f"no {name}")
        elif other := differences(place / name, reference.output(stage)):
            problems.append(f"{stage} differs in {', '.join(other[:5])}")
    row.record(*problems)
    return row
