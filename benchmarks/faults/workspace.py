"""A folder in which the stages run on a tiny data set, and checks of their outputs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from distilldsm.core.files import read_json
from distilldsm.core.hashes import MANIFEST, file_hashes

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "download.sample.subjects=6",
    "preprocess.folds=3",
    "preprocess.workers=2",
    "train.model.options.width=0.25",
    "train.epochs=3",
    "train.validate_every=1",
    "train.samples_per_case=2",
    "train.checkpoint_minutes=0",
    "train.workers=1",
    "evaluate.workers=2",
    "export.parity_cases=1",
    "export.int8.enabled=false",  # its result depends on measured speed
)
OUTPUTS = {
    "download": "data/raw",
    "validate": "data/validation",
    "preprocess": "data/preprocessed",
    "train": "models/fold0",
    "evaluate": "evaluation/fold0",
    "export": "export/fold0",
}
"""Stage to its output folder, in the order of the pipeline."""
CLOCK = (
    "cost.json",
    "timing.json",
    "timing",
    "plots",
    "tracking.json",
    "system.jsonl",
    "inference_service.yaml",
    "README.md",
)
"""Files and folders with times or ids of MLflow runs: they differ between any two runs."""
CLOCK_KEYS = ("seconds", "files", "cost", "milliseconds", "speed", "created", "git_commit", "run", "inputs")
"""Keys in JSON files with times, ids, or hashes of files that contain these: they are not compared."""


@dataclass(frozen=True)
class Ended:
    """Exit code, run time and output of a finished command."""

    code: int
    seconds: float
    text: str


def environment(**more: str) -> dict[str, str]:
    """Environment variables of a stage: this checkout's code, one thread per process, and only `more` for MLflow."""
    values = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{values['PATH']}"
    for name in [n for n in values if n.startswith("MLFLOW_TRACKING")]:
        del values[name]
    return {**values, "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false", **more}


class Workspace:
    """One folder with parameters and the outputs of the stages that ran in it."""

    def __init__(self, folder: Path, *, changes: Sequence[str] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "conf").exists():
            shutil.copytree(ROOT / "conf", folder / "conf")
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for change in (*TINY, *changes):
            name, _, value = change.partition("=")
            *sections, key = name.split(".")
            section = params
            for one in sections:
                section = section[one]
            section[key] = yaml.safe_load(value)
        (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    def command(self, stage: str) -> list[str]:
        """The command line of a stage."""
        fold = ["--fold", "0"] if stage in ("train", "evaluate", "export") else []
        return [sys.executable, "-m", f"distilldsm.components.{stage}", *fold]

    def start(self, stage: str, **more: str) -> subprocess.Popen[str]:
        """Start a stage in a new process group. Its messages go to STAGE.log."""
        log = open(self.folder / f"{stage}.log", "w", encoding="utf-8")  # noqa: SIM115 - the process writes to it
        with log:
            return subprocess.Popen(
                self.command(stage),
                cwd=self.folder,
                env=environment(**more),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, stage: str, **more: str) -> Ended:
        """Run a stage and wait for its end."""
        began = time.monotonic()
        process = self.start(stage, **more)
        code = process.wait(600)
        return Ended(code, time.monotonic() - began, self.log_text(stage))

    def run_all(self, stages: Sequence[str] = tuple(OUTPUTS), **more: str) -> dict[str, float]:
        """Run stages one after the other. Returns the seconds of each.

        Raises:
            RuntimeError: a stage failed.
        """
        seconds = {}
        for stage in stages:
            ended = self.run(stage, **more)
            if ended.code:
                raise RuntimeError(f"{stage} ended with {ended.code}:\n{ended.text}")
            seconds[stage] = ended.seconds
        return seconds

    def log_text(self, stage: str) -> str:
        """The messages that a stage has printed."""
        return (self.folder / f"{stage}.log").read_text(encoding="utf-8", errors="replace")

    def output(self, stage: str) -> Path:
        """The output folder of a stage."""
        return self.folder / OUTPUTS[stage]

    def copy_of(self, other: Workspace, before: str) -> None:
        """Copy the outputs of all stages before `before` from another workspace."""
        for stage, name in OUTPUTS.items():
            if stage == before:
                break
            shutil.copytree(other.folder / name, self.folder / name)


def kill(process: subprocess.Popen[str], *, whole_group: bool) -> None:
    """Send SIGKILL to the process alone (as the kernel does when memory runs out) or to its whole group."""
    if whole_group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def left_behind(folder: Path, patience_s: float = 15) -> list[str]:
    """Processes that still run in a folder, except the publishing process, which ends by itself."""
    deadline = time.monotonic() + patience_s
    while True:
        running = []
        for process in psutil.process_iter(["pid", "cmdline", "cwd", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            here = process.info["cwd"] == str(folder) and process.info["status"] != psutil.STATUS_ZOMBIE
            if here and "distilldsm.tracking.follower" not in words:
                running.append(words[:120])
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.2)


def broken(output: Path) -> str | None:
    """Why an output is incomplete; None if it is complete or absent."""
    if not output.exists():
        return None
    if not (output / MANIFEST).is_file():
        return f"{output.name}: files without a manifest"
    try:
        wanted = read_json(output / MANIFEST)["files"]
    except Exception as error:
        return f"{output.name}: {error}"
    seen = file_hashes(output)
    other = sorted(name for name in wanted.keys() | seen.keys() if wanted.get(name) != seen.get(name))
    return f"{output.name}: {', '.join(other[:5])} not as in the manifest" if other else None


def differences(output: Path, reference: Path) -> list[str]:
    """Names of files that differ between two outputs, bit by bit. Times and ids in JSON files are ignored."""
    seen, wanted = _comparable(output), _comparable(reference)
    return sorted(name for name in seen.keys() | wanted.keys() if seen.get(name) != wanted.get(name))


def _comparable(root: Path) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root)
        if any(part in CLOCK for part in name.parts):
            contents[str(name)] = None
        elif path.suffix == ".json":
            try:
                contents[str(name)] = _without_clock(json.loads(path.read_text()))
            except ValueError:
                contents[str(name)] = path.read_bytes()  # damaged: it differs from any whole file
        elif path.suffix in (".html", ".png"):
            contents[str(name)] = None  # drawn from the files that are compared
        else:
            contents[str(name)] = path.read_bytes()
    return contents


def _without_clock(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_clock(v) for k, v in value.items() if not any(word in k for word in CLOCK_KEYS)}
    if isinstance(value, list):
        return [_without_clock(v) for v in value]
    return value
