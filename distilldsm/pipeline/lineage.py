"""Finds the runs, models and data of an identifier: MLflow run, KFP run, git commit, dvc.lock or model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilldsm.core.errors import DataError
from distilldsm.core.files import sha256_file
from distilldsm.core.mapping import load_yaml
from distilldsm.tracking import default_uri, redact_uri, run_key_of
from distilldsm.tracking.record import PARENT_TAG
from distilldsm.tracking.store import RUN_KEY_TAG, prepare_environment

TAGS = {"dvc": "dvc_lock_sha256", "kfp": "kfp_run_id", "git": "git_commit"}
PLUGIN_TAG = "kfp.pipeline_run_id"
"""KFP's MLflow plugin sets it on its own run of a pipeline, and we on ours."""
SHORTEST = 8
"""Least number of characters of an abbreviated identifier."""


def client() -> Any:
    """MLflow's client for the configured store."""
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=default_uri())


def end_runs(kfp_run_id: str, tags: Mapping[str, str], status: str) -> list[str]:
    """Tag every MLflow run of a KFP run, and end those that are RUNNING; return their ids.

    Their children that no KFP run has written belong to them: they stand for folds whose record never arrived.
    """
    mlflow = client()
    runs = search(mlflow, f"tags.{TAGS['kfp']} = '{kfp_run_id}'")
    for run in runs:
        for key, value in tags.items():
            mlflow.set_tag(run.info.run_id, key, value)
        runs += [
            child
            for child in search(mlflow, f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")
            if not child.data.tags.get(TAGS["kfp"]) and child.info.run_id not in {one.info.run_id for one in runs}
        ]
    for run in runs:
        if run.info.status == "RUNNING":
            mlflow.set_terminated(run.info.run_id, status)
    return [run.info.run_id for run in runs]


def search(mlflow: Any, condition: str) -> list[Any]:
    """Runs of all experiments that match an MLflow filter, newest first."""
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    return list(mlflow.search_runs(experiments, filter_string=condition, order_by=["attributes.start_time DESC"]))


def lineage(identifier: str, root: Path = Path()) -> dict[str, Any]:
    """Find the runs of `identifier`, with their ids, data and models.

    Args:
        identifier: an MLflow run id, a KFP run id, the SHA-256 of dvc.lock, a git commit (each also abbreviated to
            8 characters or more), or the name of a registered model as `NAME/VERSION`.
        root: the repository. Its dvc.lock is compared with the runs' tags.

    Returns:
        `{"identifier", "kind", "runs": [{mlflow_run_id, run_key, name, status, fold, parent, kfp_run_id,
        dvc_lock_sha256, git_commit, datasets: [{name, digest, source}], models: [{name, version, aliases}]}],
        "dvc_lock": {...} or None}`; `parent` is the MLflow run of a cross-validation.

    Raises:
        DataError: no run has the identifier.
    """
    mlflow = client()
    lock = _dvc_lock(root)
    kind, runs = _of_this_lock(mlflow, identifier, lock)
    if not runs:
        kind, runs = _find(mlflow, identifier)
    if not runs:
        raise DataError(
            "no MLflow run has this identifier",
            where=redact_uri(default_uri()),
            seen=identifier,
            rule="an MLflow run id, a KFP run id, dvc.lock's SHA-256, a git commit, or MODEL/VERSION",
            hint="is MLFLOW_TRACKING_URI the store that holds the run?",
        )
    return {
        "identifier": identifier,
        "kind": kind,
        "runs": [_describe(mlflow, run) for run in runs],
        "dvc_lock": lock,
    }


def _of_this_lock(mlflow: Any, identifier: str, lock: Mapping[str, Any] | None) -> tuple[str, list[Any]]:
    """Runs of the models in this dvc.lock.

    The run's own tag is not enough: it holds the hash of dvc.lock from before DVC added the run's model.
    """
    if lock is None or len(identifier) < SHORTEST or not lock["sha256"].startswith(identifier):
        return "dvc", []
    return "dvc", [run for key in lock["mlflow_run_keys"] for run in search(mlflow, f"tags.`{RUN_KEY_TAG}` = '{key}'")]


def _find(mlflow: Any, identifier: str) -> tuple[str, list[Any]]:
    from mlflow.exceptions import MlflowException

    if "'" in identifier or "%" in identifier:
        return "none", []
    name, _, version = identifier.rpartition("/")
    if name and version.isdigit():
        try:
            return "model", [mlflow.get_run(mlflow.get_model_version(name, version).run_id)]
        except MlflowException:
            return "none", []
    with contextlib.suppress(MlflowException):
        return "mlflow", [mlflow.get_run(identifier)]
    conditions = [f"= '{identifier}'", f"LIKE '{identifier}%'"]
    for condition in conditions if len(identifier) >= SHORTEST else conditions[:1]:
        for kind, tag in TAGS.items():
            runs = search(mlflow, f"tags.`{PLUGIN_TAG if kind == 'kfp' else tag}` {condition}")
            if runs:
                return kind, runs
    every = search(mlflow, "") if len(identifier) >= SHORTEST else []
    return "mlflow", [run for run in every if run.info.run_id.startswith(identifier)]


def _describe(mlflow: Any, run: Any) -> dict[str, Any]:
    tags = run.data.tags
    versions = mlflow.search_model_versions(f"run_id = '{run.info.run_id}'")
    return {
        "mlflow_run_id": run.info.run_id,
        "run_key": tags.get(RUN_KEY_TAG),
        "name": run.info.run_name,
        "status": run.info.status,
        "fold": tags.get("fold"),
        "parent": tags.get("mlflow.parentRunId"),
        "kfp_run_id": tags.get(TAGS["kfp"]) or tags.get(PLUGIN_TAG),
        "dvc_lock_sha256": tags.get(TAGS["dvc"]),
        "git_commit": tags.get(TAGS["git"]),
        "datasets": [
            {"name": one.dataset.name, "digest": one.dataset.digest, "source": _source(one.dataset.source)}
            for one in run.inputs.dataset_inputs
        ],
        "models": [{"name": v.name, "version": str(v.version), "aliases": list(v.aliases)} for v in versions],
    }


def _source(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dvc_lock(root: Path) -> dict[str, Any] | None:
    """SHA-256 of the repository's dvc.lock, the data's hashes in it, and the run keys of its models."""
    path = root / "dvc.lock"
    if not path.is_file():
        return None
    outs = [out for stage in load_yaml(path).get("stages", {}).values() for out in stage.get("outs", [])]
    keys = [run_key_of(root / out["path"]) for out in outs if out["path"].startswith("models/")]
    return {
        "sha256": sha256_file(path),
        "data": {out["path"]: out.get("md5") for out in outs if out["path"].startswith("data/")},
        "mlflow_run_keys": [key for key in keys if key is not None],
    }


def format_lineage(found: Mapping[str, Any]) -> str:
    """The result of `lineage` as text."""
    lines = [f"{found['identifier']} ({found['kind']})"]
    for run in found["runs"]:
        lines.append(f"MLflow run   {run['mlflow_run_id']}  {run['name']}  {run['status']}")
        rows = [
            ("parent", run["parent"]),
            ("KFP run", run["kfp_run_id"]),
            ("dvc.lock", run["dvc_lock_sha256"]),
            ("git commit", run["git_commit"]),
        ]
        rows += [("data", f"{d['name']}  {d['digest']}") for d in run["datasets"]]
        rows += [("model", f"{m['name']}/{m['version']} {' '.join(m['aliases'])}".rstrip()) for m in run["models"]]
        lines += [f"  {key:11}{value}" for key, value in rows if value]
    lock = found["dvc_lock"]
    if lock is not None:
        same = any(run["run_key"] in lock["mlflow_run_keys"] for run in found["runs"])
        lines.append(f"dvc.lock here {'belongs to this run' if same else 'belongs to other runs'}: {lock['sha256']}")
        lines += [f"  {path:34}{md5}" for path, md5 in lock["data"].items()]
    return "\n".join(lines)
