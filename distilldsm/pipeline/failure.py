"""Why a step of a Kubeflow run failed or does not start, from its pod's log and from Argo's messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distilldsm.core.errors import UserError
from distilldsm.pipeline.cluster import PROFILE_VARIABLE
from distilldsm.pipeline.delivery import undelivered
from distilldsm.pipeline.run_tree import RunTree, Step
from distilldsm.pipeline.server import RefusedError, Server

_FOREIGN_LINE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d|\[KFP |time=\"")
"""The beginning of a line that KFP's launcher, kfp or Argo writes."""
_TEMPLATES = ("system-container-impl", "retry-system-container-impl", "system-container-driver", "system-dag-driver")
"""Names of KFP's templates of pods."""
_GATE = re.compile(r"Mean Dice ([\d.]+), threshold ([\d.]+)")


def log_of(server: Server, run_id: str, node: str) -> str:
    """The log of a node's pod. It is empty if the pod is gone and Argo kept no log.

    The server answers a failure with status 200 and a JSON object at the end of what it could read.
    """
    workflow, _, number = node.rpartition("-")
    # The server finds the log of a finished pod by the node's id, and that of a running pod only by the pod's name.
    for name in (node, *(f"{workflow}-{template}-{number}" for template in _TEMPLATES)):
        try:
            text = server.text(f"/apis/v1alpha1/runs/{run_id}/nodes/{name}/log")
        except RefusedError:
            continue
        start = text.rfind('{"error_message"')
        if start:
            return text[:start] if start > 0 else text
    return ""


def with_reasons(server: Server, tree: RunTree, known: dict[tuple[str, str], str] | None = None) -> list[Step]:
    """The steps, those that failed, were skipped or do not start with the reason.

    Args:
        known: reasons of earlier calls, by node and state; filled here. Logs are read once.
    """
    known = {} if known is None else known
    messages: Mapping[str, str] | None = None
    explained = []
    for one in tree.steps():
        place = (one.node or one.step, one.state)
        if one.state in ("failed", "starting") and one.node and place not in known:
            messages = argo_messages(server, str(tree.run["run_id"])) if messages is None else messages
            text = _why_failed(server, tree, one, messages) if one.state == "failed" else messages.get(one.node, "")
            if one.state == "starting":
                explained.append(replace(one, error=_plain(text) or None))
                continue
            known[place] = text
        elif one.state == "skipped" and place not in known:
            known[place] = _why_skipped(server, tree)
        explained.append(replace(one, error=known.get(place)))
    return explained


def run_error(server: Server, tree: RunTree) -> str | None:
    """Why a run failed outside of all steps; None if it did not."""
    failed = None if tree.state in ("stopped", "stopping") else tree.failed_driver()
    if failed is None:
        return None
    name, node = failed
    return f"KFP's driver of '{name}' failed: {_last_error(_log(server, tree, node)) or 'its log is gone'}"


def argo_messages(server: Server, run_id: str) -> dict[str, str]:
    """Node to Argo's message, such as `OOMKilled (exit code 137)`; empty if this server does not give them.

    Only version 1 of the API has them, in the workflow that it returns.
    """
    with suppress(UserError, ValueError, AttributeError, TypeError):
        answer = json.loads(server.text(f"/apis/v1beta1/runs/{run_id}"))
        workflow = json.loads((answer.get("pipeline_runtime") or {}).get("workflow_manifest") or "{}")
        nodes = (workflow.get("status") or {}).get("nodes") or {}
        return {key: str(node["message"]) for key, node in nodes.items() if node.get("message")}
    return {}


def not_in_mlflow(server: Server, tree: RunTree) -> dict[str, str]:
    """Address in the bucket to reason of what MLflow lacks of a run that is over, as its steps' logs say."""
    return undelivered(_log(server, tree, step.node) for step in tree.steps() if step.node and step.state == "done")


def error_lines(log: str) -> str:
    """Our error in a log: from the last line that starts with `error:` to the next line of KFP; empty without one."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error:")]
    if not starts:
        return ""
    found = [lines[starts[-1]]]
    for line in lines[starts[-1] + 1 :]:
        if _FOREIGN_LINE.match(line) or not line.startswith("  "):
            break
        found.append(line)
    return "\n".join(found)


def _log(server: Server, tree: RunTree, node: str) -> str:
    try:
        return log_of(server, str(tree.run["run_id"]), node)
    except UserError:  # the state of a run must not depend on its logs
        return ""


def _why_failed(server: Server, tree: RunTree, step: Step, messages: Mapping[str, str]) -> str:
    assert step.node is not None
    log, message = _log(server, tree, step.node), messages.get(step.node, "")
    if step.is_driver:
        return f"KFP's driver of this step failed: {_last_error(log) or message or 'its log is gone'}"
    ours = error_lines(log)
    if ours:
        return ours
    if "exit status 137" in log or "OOMKilled" in message or "exit code 137" in message:
        limit, profile = _limit_of(tree.run, step.step)
        where = f"of profile {profile}" if profile else f"of the profile of {step.step}"
        return f"killed for memory{f': limit {limit}' if limit else ''}; raise `memory` {where} (conf/cluster.yaml)"
    if message:
        return _plain(message)
    if not log:
        return "its pod is gone, and the log with it: the pod was deleted or evicted, or its node was lost"
    return _last_error(log)


def _plain(message: str) -> str:
    """Argo's message, with what to do about it."""
    for words, meaning in (
        ("pod deleted", "its pod was deleted or evicted"),
        ("Evicted", "its pod was evicted"),
        ("ImagePullBackOff", "its image cannot be pulled: check its name, and `image_pull_secrets`"),
        ("ErrImagePull", "its image cannot be pulled: check its name, and `image_pull_secrets`"),
        ("InvalidImageName", "its image cannot be pulled: the name is not valid"),
        ("Unschedulable", "no node has room for its pod"),
        ("nodes are available", "no node has room for its pod"),
        ("exceeded its deadline", "it ran longer than `timeout_s` of its profile"),
        ("DeadlineExceeded", "it ran longer than `timeout_s` of its profile"),
    ):
        if words in message:
            return f"{meaning} ({message})"
    return message


def _last_error(log: str) -> str:
    """The last line of a log that tells of an error: Python's exception, or KFP's `E` and `F` lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[EF]\d{4} |\w*(Error|Exception)\b", line)]
    return re.sub(r"^[EF]\d{4} \S+\s+\d+ \S+\] ", "", (told or lines or [""])[-1])[:400]


def _why_skipped(server: Server, tree: RunTree) -> str:
    gate = next((one for one in tree.steps() if one.step == "gate" and one.node), None)
    measured = _GATE.search(_log(server, tree, str(gate.node))) if gate else None
    if measured:
        return f"mean Dice {float(measured[1]):.2f} is below {float(measured[2]):.2f} (export.min_dice)"
    parameters = (tree.run.get("runtime_config") or {}).get("parameters") or {}
    threshold = (parameters.get("export") or {}).get("min_dice")
    return f"the mean Dice is below export.min_dice{f' = {threshold:g}' if threshold is not None else ''}"


def _limit_of(run: Mapping[str, Any], step: str) -> tuple[str | None, str | None]:
    """Memory limit and profile of a step, from the pipeline that the run has used; None: unknown."""
    spec = run.get("pipeline_spec") or {}
    spec = spec.get("pipeline_spec") or spec
    executors = (spec.get("deploymentSpec") or spec.get("deployment_spec") or {}).get("executors") or {}
    container = (executors.get(f"exec-{step.replace('_', '-')}") or {}).get("container") or {}
    profile = next((e.get("value") for e in container.get("env") or () if e.get("name") == PROFILE_VARIABLE), None)
    return (container.get("resources") or {}).get("resourceMemoryLimit"), profile
