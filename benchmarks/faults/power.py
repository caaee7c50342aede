"""Cuts the power while `dvc repro` runs: the disk keeps only what was written to it, then `dvc repro` runs again.

The project lies on an ext4 file system in a file. At a random moment all processes are stopped and the file is copied:
the copy is the disk after a power cut. Mounting it replays the journal.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.faults.kills import repository
from benchmarks.faults.report import Row
from benchmarks.faults.workspace import OUTPUTS, broken, differences, environment

_SIZE = "512M"
_COMMAND = re.compile(r"(?:hint: |run: ?|: )((?:rm|git checkout|dvc) [^;,()\n]+)")
"""The command that an error of ours or `distilldsm doctor` names."""


def why_not() -> str | None:
    """Why power cannot be cut here; None if it can."""
    if os.geteuid() != 0:
        return "a file system can be mounted by root only"
    missing = [name for name in ("mkfs.ext4", "losetup", "mount", "umount") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    found = subprocess.run(["losetup", "--find"], capture_output=True, text=True)
    return None if found.returncode == 0 else "there are no loop devices"


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image while the block runs."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder / "project"
    finally:
        for process in _processes(folder):
            process.kill()
        for _ in range(50):
            if subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        else:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def power_cuts(work: Path, *, cuts: int, rng: random.Random, targets: Sequence[str] = ()) -> Row:
    """Cut the power of `cuts` runs of `dvc repro`, run it again, and compare with an undisturbed run.

    Args:
        targets: stages up to which the pipeline runs; empty: all.
    """
    row, disk, command = Row("power cut in dvc repro, then again"), work / "disk", ["dvc", "repro", *targets]
    template, image = work / "template.img", work / "disk.img"
    subprocess.run(["truncate", "-s", _SIZE, str(template)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(template)], check=True)
    with mounted(template, disk) as project:
        repository(project)
    reference = repository(work / "undisturbed")
    began = time.monotonic()
    subprocess.run(command, cwd=reference, env=environment(), check=True, capture_output=True)
    whole = time.monotonic() - began
    helped = 0
    for _ in range(cuts):
        shutil.copyfile(template, image)
        with mounted(image, disk) as project:
            _cut(command, project, rng.uniform(0.05, 1) * whole, image, work / "cut.img")
        with mounted(work / "cut.img", disk) as project:
            ended = _repro(command, project)
            if ended.returncode:
                doctor = subprocess.run(
                    ["distilldsm", "doctor"], cwd=project, env=environment(), capture_output=True, text=True
                )
                named = _COMMAND.search(ended.stdout + doctor.stdout)
                if named is not None:
                    helped += 1
                    subprocess.run(named[1].split(), cwd=project, env=environment(), check=False)
                    ended = _repro(command, project)
            problems: list[str | None] = []
            if ended.returncode:
                problems.append(f"dvc repro ended with {ended.returncode}: {ended.stdout[-400:]}")
            for stage, name in OUTPUTS.items():
                if not (reference / name).exists():
                    continue
                problems.append(broken(project / name))
                if other := differences(project / name, reference / name) if (project / name).exists() else [name]:
                    problems.append(f"{stage} differs in {', '.join(other[:5])}")
            row.record(*problems)
            print(f"  {row.tried} of {cuts}, {row.survived} recovered", flush=True)
    row.note = f"{helped} after the command that the error or doctor named"
    return row


def _repro(command: Sequence[str], project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _cut(command: Sequence[str], project: Path, after_s: float, image: Path, copy: Path) -> None:
    """Run a command, stop all processes after a while, and copy the disk as it is then."""
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        stopped = _processes(project)
        for one in stopped:
            with contextlib.suppress(psutil.Error):
                one.send_signal(signal.SIGSTOP)
        shutil.copyfile(image, copy)
        for one in stopped:
            with contextlib.suppress(psutil.Error):
                one.kill()


def _processes(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found
