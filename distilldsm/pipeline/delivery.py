"""The end of a Kubeflow step: MLflow gets the step's record and those of its inputs, before the pod's disk is gone.

An input may come from KFP's cache, made by a step that MLflow did not hear. Each record is sent once, whoever sends it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distilldsm.config import TrackingConfig
from distilldsm.tracking.record import FILE, forgiving, load

POLL_S = 15.0
_LINE = re.compile(r"^(not )?in MLflow: record (\w+)(?: of (\S+): (.*))?$", re.MULTILINE)
"""What a step prints for each record. Later steps may have sent what an earlier one could not."""


def on_cluster() -> bool:
    """Whether this step runs in a pod, whose disk goes with it. A run on a single machine has an id `local-...`."""
    run_id = os.environ.get("KFP_RUN_ID", "")
    return bool(run_id) and not run_id.startswith("local-")


def patience_s(minutes: float) -> float:
    """How long a step waits for MLflow. On a single machine the outputs stay, so nothing waits."""
    return 60 * minutes if on_cluster() else 0.0


def deliver(config: TrackingConfig | None, places: Mapping[Path, str]) -> None:
    """Publish outputs; wait for a server that is away, at most `tracking.wait_minutes`. Prints a line for each record.

    Never raises: the step's work is done, and KFP keeps the outputs.

    Args:
        places: directory in this pod to its address in the bucket.
    """
    if config is None or not config.enabled:
        return
    with forgiving("publishing"):
        from distilldsm.tracking.publish import publish_all

        records = {path: record for path in places if (record := load(path)) is not None and record.run is not None}
        until = time.monotonic() + patience_s(config.wait_minutes)
        todo = list(records)
        while todo:
            outcomes = list(publish_all(todo))
            for outcome in outcomes:
                if outcome.is_complete:
                    print(f"in MLflow: record {records[outcome.directory].id}", flush=True)
            left = [outcome for outcome in outcomes if not outcome.is_complete]
            todo = [outcome.directory for outcome in left]
            if not todo or time.monotonic() >= until:
                break
            time.sleep(POLL_S)
        for outcome in left if records else ():
            reason = " ".join(" ".join(outcome.problems[:1]).split()) or "its training did not end"
            place = places[outcome.directory]
            print(f"not in MLflow: record {records[outcome.directory].id} of {place}: {reason}", flush=True)


def tracked(paths: Iterable[Path], artifacts: Iterable[Any]) -> dict[Path, str]:
    """The outputs among `paths`, and in their folders `fold0` ..., with their addresses in the bucket."""
    found: dict[Path, str] = {}
    roots = {Path(one.path).resolve(): str(getattr(one, "uri", "") or one.path) for one in artifacts}
    for path in paths:
        for place in (path, *sorted(path.glob("fold*"))):
            if (place / FILE).is_file():
                real = place.resolve()
                root = next((one for one in roots if real.is_relative_to(one)), None)
                below = "" if root in (None, real) else f"/{real.relative_to(root)}"
                found[place] = f"{roots[root] if root else place}{below}"
    return found


def undelivered(logs: Iterable[str]) -> dict[str, str]:
    """Address to reason of what MLflow lacks, from the logs of a run's steps in their order."""
    missing: dict[str, tuple[str, str]] = {}
    for log in logs:
        for match in _LINE.finditer(log):
            if match[1]:
                missing[match[2]] = (match[3] or "", match[4] or "")
            else:
                missing.pop(match[2], None)
    return dict(missing.values())


def advice(missing: Mapping[str, str]) -> list[str]:
    """Lines that say what MLflow lacks, and how to publish it from the bucket."""
    lines = []
    for address, reason in missing.items():
        bucket = re.sub(r"^minio://", "s3://", address)
        name = address.rstrip("/").rpartition("/")[2]
        lines += [
            f"MLflow lacks {address}: {reason}",
            f"  publish it: aws s3 cp --recursive {bucket} {name} && distilldsm publish {name}",
        ]
    return lines
