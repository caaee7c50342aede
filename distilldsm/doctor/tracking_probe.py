"""Checks that MLflow's store can be written and read, with a run like that of a training, which is deleted at once.

Nothing stays in a SQLite store. A server only marks things as deleted: the experiment `distilldsm-doctor` stays and is
used again each time, and `mlflow gc` removes its runs.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from distilldsm.core.errors import UserError
from distilldsm.doctor.checks import Finding, leaving_no_folder
from distilldsm.tracking import default_uri, redact_uri, sqlite_path
from distilldsm.tracking.publish import Publisher, known_outputs
from distilldsm.tracking.store import explained

EXPERIMENT = "distilldsm-doctor"
_FILE = "probe.txt"


def check(limit_s: float) -> list[Finding]:
    """Check the store that MLFLOW_TRACKING_URI names. The environment sets the time limit of each request."""
    uri = default_uri()
    probe_store(uri)
    seen = f"{redact_uri(uri)}: a run with a metric and an artifact was written, read back and deleted"
    return [Finding(name="mlflow", status="ok", seen=seen)]


def check_outputs(limit_s: float) -> list[Finding]:
    """Find outputs below the current directory that are not, or not completely, in MLflow."""
    name, missing = "mlflow outputs", []
    outputs = [one for one in map(Publisher, known_outputs()) if one.uri is not None]
    for one in outputs:
        uri = str(one.uri)
        with explained(uri, "searching the runs"):
            if _is_new(uri) or not one.is_published():
                missing.append(str(one.directory))
    if not missing:
        return [Finding(name=name, status="ok", seen=f"all {len(outputs)} outputs are in MLflow")]
    seen = f"{len(missing)} of {len(outputs)} outputs are not, or not completely, in MLflow: {', '.join(missing[:3])}"
    hint = "distilldsm publish sends them now; otherwise the next stage does"
    return [Finding(name=name, status="warn", seen=seen + (" ..." if len(missing) > 3 else ""), hint=hint)]


def _is_new(uri: str) -> bool:
    """Whether a SQLite store does not exist yet. A query would create it with all its tables."""
    database = sqlite_path(uri)
    return database is not None and not database.is_file()


def probe_store(uri: str) -> None:
    """Write a run, read it, delete it.

    Raises:
        UserError: the store refuses a request, or returns something else than was written.
    """
    database = sqlite_path(uri)
    with contextlib.ExitStack() as stack:
        artifacts = None
        if database is not None:
            artifacts = database.parent.absolute() / "mlartifacts" / EXPERIMENT
            stack.enter_context(leaving_no_folder(artifacts.parent))
            stack.callback(shutil.rmtree, artifacts, ignore_errors=True)
            stack.enter_context(leaving_no_folder(Path("mlruns")))  # MLflow creates it even if it is not used
        with explained(uri, "listing the experiments"):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        with explained(uri, "writing a run"):
            experiment = _experiment(client, artifacts)
        run_id = None
        try:
            with explained(uri, "writing a run"):
                run = client.create_run(experiment, run_name="doctor")
                run_id = run.info.run_id
                client.log_metric(run_id, "probe", 0.5)
                stored = client.get_run(run_id).data.metrics
            if stored != {"probe": 0.5}:
                raise UserError("the metrics read differ from those written", where=redact_uri(uri), seen=stored)
            with explained(uri, "writing an artifact"):
                _round_trip(client, run_id)
        finally:
            _take_away(client, experiment, run_id, permanently=database is not None)


def _round_trip(client: MlflowClient, run_id: str) -> None:
    text = uuid.uuid4().hex
    client.log_text(run_id, text, _FILE)
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        seen = Path(client.download_artifacts(run_id, _FILE, folder)).read_text()
    if seen != text:
        raise UserError("the artifact read differs from the one written", seen=seen[:100])


def _experiment(client: MlflowClient, artifacts: Path | None) -> str:
    """The id of the probe's experiment. If an earlier probe left it marked as deleted, it is restored."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return client.create_experiment(EXPERIMENT, artifact_location=artifacts.as_uri() if artifacts else None)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        for run in client.search_runs([experiment.experiment_id]):  # the experiment's old runs are restored with it
            client.delete_run(run.info.run_id)
    return experiment.experiment_id


def _take_away(client: MlflowClient, experiment: str, run_id: str | None, *, permanently: bool) -> None:
    """Errors are ignored: a failed write has been reported already."""
    with contextlib.suppress(Exception):
        if run_id is not None:
            uri = client.get_run(run_id).info.artifact_uri
            with contextlib.suppress(Exception):  # not every store of artifacts can delete
                get_artifact_repository(uri, tracking_uri=client.tracking_uri).delete_artifacts(_FILE)
            client.set_terminated(run_id)
            client.delete_run(run_id)
        if client.search_runs([experiment], max_results=1):
            return  # another doctor uses it now
        client.delete_experiment(experiment)
        if permanently:
            store: Any = client._tracking_client.store  # as `mlflow gc` does, which cannot delete a single run
            for deleted in store._get_deleted_runs():
                if store.get_run(deleted).info.experiment_id == experiment:
                    store._hard_delete_run(deleted)
            store._hard_delete_experiment(experiment)
