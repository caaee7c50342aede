"""Uploads the pipeline to Kubeflow, starts, follows and stops runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.core.errors import ConfigError, UserError
from distilldsm.pipeline.definition import NAME
from distilldsm.pipeline.failure import log_of, not_in_mlflow, run_error, with_reasons
from distilldsm.pipeline.run_tree import RunTree, Step
from distilldsm.pipeline.server import RefusedError, Server, ServerAwayError


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run or recurring run that was started."""

    pipeline_id: str
    version_id: str
    run_id: str
    """Id of the run or of the recurring run."""
    recurring: bool
    run_url: str
    plugin_url: str | None = None
    """The page of this run in MLflow that KFP's MLflow plugin made."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """State of a run and its steps."""

    run_id: str
    name: str
    state: str
    """waiting, running, stopping, done, gate closed, failed, stopped."""
    seconds: float | None
    error: str | None
    """Why the run failed outside of all steps."""
    url: str
    plugin_url: str | None
    steps: tuple[Step, ...]
    not_in_mlflow: Mapping[str, str]
    """Address in the bucket to reason of what MLflow lacks; empty while the run goes on."""

    @property
    def is_over(self) -> bool:
        """Whether nothing changes any more."""
        return self.state in ("done", "gate closed", "failed", "stopped")

    @property
    def has_succeeded(self) -> bool:
        """Whether it ended well. A gate that kept a model from its export is no failure."""
        return self.state in ("done", "gate closed")


def submit(
    server: Server,
    package: Path,
    *,
    version_name: str,
    run_name: str,
    experiment: str,
    arguments: Mapping[str, Any],
    service_account: str | None = None,
    pipeline_root: str | None = None,
    mlflow_experiment: str | None = None,
    cron: str | None = None,
) -> Submitted:
    """Upload a version of the pipeline, and start a run, or with `cron` a recurring run.

    Args:
        mlflow_experiment: the experiment for KFP's MLflow plugin. A server without the plugin ignores it.

    Raises:
        UserError: the server refused a request. Earlier uploads stay, and a later call uses the version again.
    """
    pipeline_id = _pipeline(server, package)
    version_id = _version(server, pipeline_id, version_name)
    if version_id is None:
        uploaded = server.upload("/pipelines/upload_version", package, name=version_name, pipelineid=pipeline_id)
        version_id = str(uploaded["pipeline_version_id"])
    body: dict[str, Any] = {
        "display_name": run_name,
        "experiment_id": _experiment(server, experiment),
        "pipeline_version_reference": {"pipeline_id": pipeline_id, "pipeline_version_id": version_id},
        "runtime_config": {
            "parameters": dict(arguments),
            **({"pipeline_root": pipeline_root} if pipeline_root else {}),
        },
    }
    body |= {"service_account": service_account} if service_account else {}
    body |= {"plugins_input": {"mlflow": {"experiment_name": mlflow_experiment}}} if mlflow_experiment else {}
    if cron is not None:
        trigger = {"trigger": {"cron_schedule": {"cron": cron}}, "mode": "ENABLE", "max_concurrency": "1"}
        run = _start(server, "/recurringruns", {**body, **trigger, "no_catchup": True})
    else:
        run = _start(server, "/runs", body)
    run_id = str(run["recurring_run_id" if cron is not None else "run_id"])
    return Submitted(
        pipeline_id=pipeline_id,
        version_id=version_id,
        run_id=run_id,
        recurring=cron is not None,
        run_url=f"{server.host}/#/{'recurringrun' if cron is not None else 'runs'}/details/{run_id}",
        plugin_url=_plugin_url(run),
    )


def _pipeline(server: Server, package: Path) -> str:
    """The id of our pipeline in the user's namespace; uploaded if it is missing."""
    for attempt in (1, 2):
        found = _named(server, "pipelines", NAME)
        if found:
            return str(found[0]["pipeline_id"])
        about = "Distill DSM, from volumes to model"
        query = {"name": NAME, "description": about, "namespace": server.namespace}
        try:
            return str(server.upload("/pipelines/upload", package, **query)["pipeline_id"])
        except RefusedError as error:
            if error.status != 409 or attempt == 2:  # another submission may have been faster
                raise
    raise AssertionError


def _version(server: Server, pipeline_id: str, name: str) -> str | None:
    """The id of an uploaded version with that name; None: there is no such version."""
    token: str | None = None
    while True:
        page = server.get(f"/pipelines/{pipeline_id}/versions", page_token=token, page_size=100)
        for version in page.get("pipeline_versions") or ():
            if name in (version.get("display_name"), version.get("name")):
                return str(version["pipeline_version_id"])
        token = page.get("next_page_token")
        if not token:
            return None


def _experiment(server: Server, name: str) -> str:
    for experiment in _named(server, "experiments", name):
        if experiment.get("display_name") == name:
            return str(experiment["experiment_id"])
    return str(server.post("/experiments", {"display_name": name, "namespace": server.namespace})["experiment_id"])


def _named(server: Server, kind: str, name: str) -> list[Any]:
    """The pipelines or experiments with that name in the user's namespace."""
    condition = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
    return server.get(f"/{kind}", namespace=server.namespace, filter=condition).get(kind) or []


def _start(server: Server, path: str, body: Mapping[str, Any]) -> Any:
    """Start a run. A server before 2.17 does not know plugins."""
    try:
        return server.post(path, body)
    except RefusedError as error:
        if error.status != 400 or "plugins_input" not in str(error):
            raise
        return server.post(path, {key: value for key, value in body.items() if key != "plugins_input"})


def _plugin_url(run: Mapping[str, Any]) -> str | None:
    entries = ((run.get("plugins_output") or {}).get("mlflow") or {}).get("entries") or {}
    return (entries.get("run_url") or {}).get("value")


def status(server: Server, run_id: str, known: dict[tuple[str, str], str] | None = None) -> Status:
    """State of a run and of its steps, with the reasons of failures.

    Args:
        known: reasons of earlier calls, see `with_reasons`.

    Raises:
        UserError: there is no such run, or the server refuses.
    """
    run = server.get(f"/runs/{run_id}")
    tree = RunTree(run)
    return Status(
        run_id=run_id,
        name=str(run.get("display_name")),
        state=tree.state,
        seconds=tree.seconds,
        error=run_error(server, tree),
        url=f"{server.host}/#/runs/details/{run_id}",
        plugin_url=_plugin_url(run),
        steps=tuple(with_reasons(server, tree, known)),
        not_in_mlflow=not_in_mlflow(server, tree) if tree.is_over else {},
    )


def stop(server: Server, run_id: str) -> None:
    """Terminate a run. Its step `finish` still runs.

    Raises:
        UserError: there is no such run, or it is over.
    """
    if status(server, run_id).is_over:
        raise UserError("the run is over", where=run_id, hint=f"distilldsm pipeline status {run_id}")
    server.post(f"/runs/{run_id}:terminate")


def logs(server: Server, run_id: str, step: str, fold: int | None = None) -> str:
    """The log of a step's last pod.

    Raises:
        ConfigError: the step runs for several folds, or for none that was asked for.
        UserError: the step has not started, or its log is gone.
    """
    tree = RunTree(server.get(f"/runs/{run_id}"))
    found = [one for one in tree.steps() if one.step == step and (fold is None or one.fold in (fold, None))]
    if not found:
        listed = ", ".join(one.name for one in tree.steps())
        raise ConfigError("the run has no such step", where=run_id, seen=step, rule=listed)
    if len(found) > 1:
        folds = ", ".join(str(one.fold) for one in found)
        raise ConfigError("the step runs once a fold", where=step, rule=f"--fold, one of {folds}")
    if found[0].node is None:
        raise UserError("has no pod", where=found[0].name, seen=found[0].state, hint="only a step that ran has a log")
    text = log_of(server, run_id, found[0].node)
    if not text:
        raise UserError(
            "the log is gone",
            where=found[0].name,
            rule="Kubernetes keeps the log of a pod until the pod is deleted; Argo keeps a copy with archiveLogs: true",
        )
    return text


def wait(server: Server, run_id: str, *, say: Callable[[str], None] = print, poll_s: float = 10.0) -> Status:
    """Follow a run to its end. Print a line for each change of a step, and wait for a server that is briefly away.

    Raises:
        UserError: access is refused, or the server stays away for six polls. The run itself continues.
    """
    states: dict[str, str] = {}
    known: dict[tuple[str, str], str] = {}
    misses = 0
    while True:
        try:
            current = status(server, run_id, known)
            misses = 0
        except ServerAwayError:
            misses += 1
            if misses > 6:
                raise
            current = None
        for step in current.steps if current is not None else ():
            reason = step.error.partition("\n")[0] if step.error else ""
            told = f"{step.state}: {reason}" if reason else step.state
            if states.get(step.name, "waiting") != told:
                states[step.name] = told
                say(f"{step.name}: {told}")
        if current is not None and current.is_over:
            return current
        time.sleep(poll_s)
