"""Versions of the code and the data that made a result."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from distilldsm.core.files import sha256_file

SCHEDULE_VARIABLE = "DISTILLDSM_SCHEDULE"
"""Environment variable of a recurring run's pods: an id that all its runs share."""


def provenance() -> dict[str, str]:
    """`git_commit`, `git_dirty`, `dvc_lock_sha256`, `kfp_run_id` and `kfp_schedule`; unknown ones are left out."""
    facts = {}
    commit = _git("rev-parse", "HEAD") or os.environ.get("GIT_COMMIT")
    if commit:
        facts["git_commit"] = commit
        changed = _git("status", "--porcelain", "--untracked-files=no")
        if changed is not None:
            facts["git_dirty"] = str(bool(changed)).lower()
    if Path("dvc.lock").is_file():
        with contextlib.suppress(OSError):
            facts["dvc_lock_sha256"] = sha256_file("dvc.lock")
    for name, variable in (("kfp_run_id", "KFP_RUN_ID"), ("kfp_schedule", SCHEDULE_VARIABLE)):
        if os.environ.get(variable):
            facts[name] = os.environ[variable]
    return facts


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
