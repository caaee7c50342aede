"""A full disk, a read-only disk, and worker processes that the kernel kills when memory runs out."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.faults.report import Row
from benchmarks.faults.workspace import OUTPUTS, Ended, Workspace, broken, differences

BLOCK = 4096


def can_mount() -> bool:
    """Whether this process may mount a small file system (root on Linux)."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes on `folder` while the block runs."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        for _ in range(50):  # the process that publishes to MLflow may still be sending
            if subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
                break
            time.sleep(1)
        else:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system's options."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def bytes_used(folder: Path) -> int:
    """Bytes that a folder's files take on disk, in whole blocks."""
    return sum(-(-p.stat().st_size // BLOCK) * BLOCK + BLOCK for p in folder.rglob("*"))


def disk_full(
    reference: Workspace, work: Path, *, shares: Sequence[float], stages: Sequence[str] = tuple(OUTPUTS)
) -> list[Row]:
    """Run each stage on a disk with room for a share of its output; then repeat the command with more room."""
    rows = []
    for stage in stages:
        row = Row(f"disk full in {stage}")
        for share in shares:
            with small_disk(work / f"full-{stage}-{share}", 1 << 30) as disk:
                place = Workspace(disk / "w", changes=["tracking.enabled=false"])
                place.copy_of(reference, stage)
                room = bytes_used(disk) + int(share * bytes_used(reference.output(stage))) + 2 * BLOCK
                remount(disk, f"size={room}")
                ended = _logged_elsewhere(place, stage, work)
                if ended.code == 0 and not broken(place.output(stage)):
                    continue  # the stage writes so little that it fits
                problems = [_wrong_answer(ended, ("no space left", "needs", "space")), broken(place.output(stage))]
                remount(disk, "size=1g")
                problems += _again(place, stage, reference)
            row.record(*problems)
        rows.append(row)
    return rows


def read_only(reference: Workspace, work: Path) -> Row:
    """Run each stage on a read-only file system; then make it writable and run the same command again."""
    row = Row("output cannot be written")
    for stage in OUTPUTS:
        with small_disk(work / f"ro-{stage}", 1 << 30) as disk:
            place = Workspace(disk / "w", changes=["tracking.enabled=false"])
            place.copy_of(reference, stage)
            remount(disk, "ro")
            ended = _logged_elsewhere(place, stage, work)
            problems = [_wrong_answer(ended, ("read-only",)), broken(place.output(stage))]
            remount(disk, "rw")
            problems += _again(place, stage, reference)
        row.record(*(p and f"{stage}: {p}" for p in problems))
    return row


def _logged_elsewhere(place: Workspace, stage: str, work: Path) -> Ended:
    """Run a stage on a bad disk. Its log is written to a good one."""
    log = work / f"{stage}-on-a-bad-disk.log"
    target = place.folder / f"{stage}.log"
    if not target.is_symlink():
        remount_back = os.statvfs(place.folder).f_flag & os.ST_RDONLY
        if remount_back:
            remount(place.folder.parent, "rw")
        target.symlink_to(log)
        if remount_back:
            remount(place.folder.parent, "ro")
    return place.run(stage)


def _wrong_answer(ended: Ended, words: tuple[str, ...]) -> str | None:
    if ended.code == 0:
        return "ended with 0"
    if "Traceback" in ended.text:
        return f"a traceback: {ended.text.strip().splitlines()[-1][:200]}"
    if not any(word in ended.text.lower() for word in words):
        return f"no clear error: {ended.text[-200:]}"
    return None


def _again(place: Workspace, stage: str, reference: Workspace) -> list[str | None]:
    ended = place.run(stage)
    if ended.code:
        return [f"afterwards exit code {ended.code}: {ended.text[-300:]}"]
    other = differences(place.output(stage), reference.output(stage))
    return [broken(place.output(stage)), f"differs in {', '.join(other[:5])}" if other else None]


def worker_killed(
    reference: Workspace,
    work: Path,
    *,
    times: int,
    rng: random.Random,
    stages: Sequence[str] = ("preprocess", "train", "evaluate"),
) -> list[Row]:
    """Kill one worker process of a stage, as the kernel does when memory runs out; then run the command again."""
    rows = []
    for stage in stages:
        row = Row(f"worker of {stage} killed")
        for number in range(times):
            place = Workspace(work / f"worker-{stage}-{number}", changes=["tracking.enabled=false"])
            place.copy_of(reference, stage)
            process = place.start(stage)
            killed = _kill_a_worker(process, rng.uniform(0.0, 0.5))
            code = process.wait()
            ended = Ended(code, 0.0, place.log_text(stage))
            problems = [_wrong_answer(ended, ("killed",)) if killed else None, broken(place.output(stage))]
            if code == 0 and killed:
                problems[0] = None if not broken(place.output(stage)) else "ended with 0"
            problems += _again(place, stage, reference)
            row.record(*problems)
            shutil.rmtree(place.folder)
        rows.append(row)
    return rows


def _kill_a_worker(process: subprocess.Popen[str], delay_s: float) -> bool:
    """Wait for a worker, wait `delay_s` more, kill it. Returns False if the stage ended without a worker to kill."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            children = [c for c in watched.children() if _is_worker(c)]
        except psutil.NoSuchProcess:
            break
        if children:
            time.sleep(delay_s)
            try:
                children[0].kill()
            except psutil.NoSuchProcess:
                return False
            return True
        time.sleep(0.01)
    return False


def _is_worker(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    # A spawned worker has multiprocessing's command line, a forked one that of its parent.
    return "spawn_main" in words or "distilldsm.components." in words
