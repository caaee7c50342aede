"""Step `finish`: always runs; finds out how the pipeline ended, and leaves no MLflow run of it RUNNING.

KFP hands an exit task a state that is RUNNING for most runs, also for successes with cached steps. So the step asks
the server for its run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distilldsm.config import TrackingConfig
from distilldsm.core.errors import UserError
from distilldsm.pipeline.cluster_setup import kubernetes_client
from distilldsm.pipeline.delivery import POLL_S, advice, on_cluster, patience_s
from distilldsm.pipeline.failure import not_in_mlflow, run_error, with_reasons
from distilldsm.pipeline.run_tree import RunTree, Step, lines_of
from distilldsm.pipeline.server import Server
from distilldsm.pipeline.step import section
from distilldsm.pipeline.trainjob_manifest import RUN_LABEL

State = Literal["SUCCEEDED", "SUCCEEDED, gate closed", "FAILED", "CANCELED", "unknown"]
MLFLOW_STATUS: Mapping[State, str] = {
    "SUCCEEDED": "FINISHED",
    "SUCCEEDED, gate closed": "FINISHED",
    "FAILED": "FAILED",
    "CANCELED": "KILLED",
    "unknown": "KILLED",
}
"""How an MLflow run ends that is still RUNNING."""
_SETTLE_S, _POLL_S = 60.0, 5.0
"""The server learns of a step's end some seconds later."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a pipeline run ended."""

    state: State
    error: str = ""
    """The failed step and why, or why the state is unknown."""
    steps: tuple[Step, ...] = ()
    not_in_mlflow: Mapping[str, str] = field(default_factory=dict)
    """Address in the bucket to reason of what MLflow lacks."""


def finish(tracking: Mapping[str, Any], trainjob: Mapping[str, Any], status: Any, report: Any) -> None:
    """Report how the pipeline ended: in the log, on the run's page, and as tags of its MLflow runs.

    Args:
        tracking: the section of `params.yaml`.
        trainjob: the pipeline's input: settings of the TrainJobs, or empty.
        status: what KFP says of the pipeline; used only where no server can be asked.
        report: the artifact that the run's page shows.
    """
    run_id = os.environ.get("KFP_RUN_ID", "")
    ending = _ending(run_id, status)
    lines = [f"pipeline run {run_id or '(no id)'}: {ending.state}", *ending.error.splitlines()]
    lines += lines_of(ending.steps, f"distilldsm pipeline logs {run_id} STEP")
    lines += advice(ending.not_in_mlflow)
    if run_id and trainjob:
        lines.append(_delete_trainjobs(run_id, trainjob.get("namespace")))
    if run_id and tracking.get("enabled", True):
        lines.append(_end_mlflow_runs(run_id, ending, section(TrackingConfig, tracking, "tracking").wait_minutes))
    print("\n".join(lines), flush=True)
    Path(report.path).write_text("```\n" + "\n".join(lines) + "\n```\n", encoding="utf-8")


def _ending(run_id: str, status: Any) -> Ending:
    """Ask the server. Without one, as on a single machine, KFP's own state counts where it can be relied on."""
    if on_cluster():
        try:
            return ask(Server.in_cluster(), run_id)
        except UserError as error:
            reason = f"Kubeflow Pipelines could not be asked for this run: {error}"
    else:
        reason = ""
    known: dict[str, State] = {"COMPLETE": "SUCCEEDED", "SUCCEEDED": "SUCCEEDED", "FAILED": "FAILED"}
    state = known.get(str(status.state), "unknown")
    return Ending(state=state, error=status.error_message or (reason if state == "unknown" else ""))


def ask(server: Server, run_id: str) -> Ending:
    """The end of a run whose last step is running.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    until = time.monotonic() + _SETTLE_S
    while True:
        tree = RunTree(server.get(f"/runs/{run_id}"))
        state = tree.ending()
        if state is not None or time.monotonic() > until:
            break
        time.sleep(_POLL_S)
    steps = tuple(step for step in with_reasons(server, tree) if step.step != "finish")
    if state is None:
        return Ending(state="unknown", error="the server does not know the end of all steps", steps=steps)
    failed = [f"{step.name}: {step.error}" for step in steps if step.state == "failed"]
    error = (failed or [run_error(server, tree) or ""])[0]
    return Ending(state=state, error=error, steps=steps, not_in_mlflow=not_in_mlflow(server, tree))


def _delete_trainjobs(run_id: str, namespace: str | None) -> str:
    """Delete the TrainJobs that this run has left; one line that says so. A lost pod could not delete its own."""
    place = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        namespace = namespace or place.read_text().strip()
        client = kubernetes_client()
        address = ("trainer.kubeflow.org", "v1alpha1", namespace, "trainjobs")
        label = f"{RUN_LABEL}={run_id}"
        client.CustomObjectsApi().delete_collection_namespaced_custom_object(*address, label_selector=label)
        return f"TrainJobs of this run in namespace {namespace}: none is left"
    except Exception as failure:
        return f"the TrainJobs of this run could not be deleted: {type(failure).__name__}: {failure}"


def _end_mlflow_runs(run_id: str, ending: Ending, wait_minutes: float) -> str:
    """Tag the MLflow runs of this pipeline run, and end those that are RUNNING; one line that says so.

    Waits for a server that is away, as the other steps do.
    """
    from distilldsm.pipeline.lineage import end_runs

    tags = {"kfp_state": ending.state} | ({"kfp_error": ending.error[:500]} if ending.error else {})
    until = time.monotonic() + patience_s(wait_minutes)
    while True:
        try:
            marked = end_runs(run_id, tags, MLFLOW_STATUS[ending.state])
            return f"MLflow runs of this pipeline run: {', '.join(marked) or 'none'}"
        except Exception as failure:  # the pipeline's end must not depend on another service
            if time.monotonic() >= until:
                return f"the MLflow runs could not be marked: {type(failure).__name__}: {failure}"
        time.sleep(POLL_S)
