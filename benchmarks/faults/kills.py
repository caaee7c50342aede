"""Kills every stage, and `dvc repro`, with SIGKILL at random moments, then runs the same command again."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.report import Row
from benchmarks.faults.workspace import (
    OUTPUTS,
    ROOT,
    TINY,
    Workspace,
    broken,
    differences,
    environment,
    kill,
    left_behind,
)

IMPORTS_S = 0.8
"""Seconds to load Python and packages. Nothing can be lost in this time, so most kills come later."""


def stage_kills(
    reference: Workspace,
    seconds: dict[str, float],
    work: Path,
    *,
    kills: int,
    rng: random.Random,
    stages: Sequence[str] = tuple(OUTPUTS),
) -> list[Row]:
    """Kill each stage in turn up to three times at random moments, let it finish, and compare with the reference.

    Args:
        reference: workspace in which all stages ran undisturbed.
        seconds: run time of each stage in the reference.
        kills: minimum number of kills in total.
    """
    rows = {stage: Row(f"SIGKILL of {stage}, then again") for stage in stages}
    done = 0
    for number, stage in enumerate(itertools.cycle(stages)):
        if done >= kills and number >= len(stages):
            break
        place = Workspace(work / f"kill-{number}")
        place.copy_of(reference, stage)
        problems: list[str | None] = []
        in_trial = 0
        for _ in range(rng.randint(1, 3)):
            process = place.start(stage)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(min(IMPORTS_S, seconds[stage] / 2), seconds[stage]))
            if process.poll() is not None:
                problems.append(None if process.returncode == 0 else f"ended with {process.returncode}")
                break
            kill(process, whole_group=rng.random() < 0.5)
            in_trial += 1
            problems.append(broken(place.output(stage)))
            if left := left_behind(place.folder):
                problems.append(f"left behind: {left}")
            if place.output(stage).exists():  # the stage had finished: the same command finds it up to date
                break
        ended = place.run(stage)
        if ended.code:
            problems.append(f"afterwards exit code {ended.code}: {ended.text[-300:]}")
        else:
            problems.append(broken(place.output(stage)))
            if other := differences(place.output(stage), reference.output(stage)):
                problems.append(f"differs in {', '.join(other[:5])}")
            if stage == "train":
                problems.append(wrong_in_mlflow(place.folder, epochs=3))
        rows[stage].record(*problems)
        rows[stage].note = f"{in_trial + int(rows[stage].note.split()[0] if rows[stage].note else 0)} kills"
        done += in_trial
        shutil.rmtree(place.folder, ignore_errors=True)
    return list(rows.values())


def wrong_in_mlflow(folder: Path, *, epochs: int, patience_s: float = 60) -> str | None:
    """Check MLflow: one run with every epoch once, in order. Returns the problem, or None."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    deadline = time.monotonic() + patience_s
    while True:
        client = MlflowClient(uri)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        steps = [[m.step for m in client.get_metric_history(run.info.run_id, "train_loss")] for run in runs]
        if steps == [list(range(1, epochs + 1))]:
            return None
        if time.monotonic() > deadline:
            return f"MLflow holds the epochs {steps}"
        time.sleep(0.5)


def repro_kills(work: Path, *, kills: int, rng: random.Random) -> Row:
    """Kill `dvc repro` and its children repeatedly until one run finishes. Compare with an undisturbed run."""
    row = Row("SIGKILL of dvc repro, then again")
    reference = repository(work / "repro-reference")
    began = time.monotonic()
    subprocess.run(["dvc", "repro"], cwd=reference, env=environment(), check=True, capture_output=True)
    whole = time.monotonic() - began
    done = 0
    for number in itertools.count():
        if done >= kills:
            break
        place = repository(work / f"repro-{number}")
        problems: list[str | None] = []
        # After each kill it may run longer: a stage that cannot resume must be able to finish.
        for attempt in itertools.count(1):
            process = subprocess.Popen(
                ["dvc", "repro"],
                cwd=place,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                text, _ = process.communicate(timeout=rng.uniform(0.02, 0.15 + 0.05 * attempt) * whole)
            except subprocess.TimeoutExpired:
                kill(process, whole_group=True)
                assert process.stdout is not None
                process.stdout.close()
                done += 1
                continue
            if process.returncode:
                problems.append(f"dvc repro ended with {process.returncode}: {text[-300:]}")
            break
        for stage, name in OUTPUTS.items():
            problems.append(broken(place / name) if stage != "validate" else None)
            if (place / name).exists() and (other := differences(place / name, reference / name)):
                problems.append(f"{stage} differs in {', '.join(other[:5])}")
        row.record(*problems)
        row.note = f"{done} kills"
        shutil.rmtree(place, ignore_errors=True)
    return row


def repository(folder: Path) -> Path:
    """Create a git repository with this working tree's files and the tiny parameters."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git = ["git", "-c", "user.email=faults@example.org", "-c", "user.name=Faults"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "faults"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    subprocess.run(
        ["distilldsm", "compose", *TINY], cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL
    )
    return folder
