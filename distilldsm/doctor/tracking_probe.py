"""Does MLflow's store take a run, and give it back? Written as a training writes, and taken away again.

In a SQLite store nothing is left. A server only marks as deleted: one experiment, `distilldsm-doctor`, is used again
each time, and its runs go with `mlflow gc`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from distilldsm.core.errors import UserError
from distilldsm.doctor.checks import Finding, clean
from distilldsm.tracking import default_uri, redact
from distilldsm.tracking.sink import sqlite_path

EXPERIMENT = "distilldsm-doctor"
_FILE = "probe.txt"


def check(limit_s: float) -> list[Finding]:
    """The store that MLFLOW_TRACKING_URI names; its requests have a limit of their own, by the environment."""
    uri = default_uri()
    probe_store(uri)
    seen = f"{redact(uri)}: a run with a metric and an artifact was written, read back and deleted"
    return [Finding(name="mlflow", status="ok", seen=seen)]


def probe_store(uri: str) -> None:
    """Write a run, read it, take it away.

    Raises:
        UserError: tells who refused what, and the hint.
    """
    database = sqlite_path(uri)
    with contextlib.ExitStack() as stack:
        artifacts = None
        if database is not None:
            artifacts = stack.enter_context(_folder(database.parent.absolute() / "mlartifacts" / EXPERIMENT))
            stack.enter_context(_nothing_new(Path("mlruns")))  # MLflow makes it, whether or not it is used
        with _explained(uri, "asking for the experiments"):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        with _explained(uri, "writing a run"):
            experiment = _experiment(client, artifacts)
        run_id = None
        try:
            with _explained(uri, "writing a run"):
                run = client.create_run(experiment, run_name="doctor")
                run_id = run.info.run_id
                client.log_metric(run_id, "probe", 0.5)
                stored = client.get_run(run_id).data.metrics
            if stored != {"probe": 0.5}:
                raise UserError("what was written is not what is read", where=redact(uri), seen=stored)
            with _explained(uri, "writing an artifact"):
                _round_trip(client, run_id)
        finally:
            _take_away(client, experiment, run_id, permanently=database is not None)


def _round_trip(client: MlflowClient, run_id: str) -> None:
    text = uuid.uuid4().hex
    client.log_text(run_id, text, _FILE)
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        seen = Path(client.download_artifacts(run_id, _FILE, folder)).read_text()
    if seen != text:
        raise UserError("an artifact is not what was written", seen=seen[:100])


def _experiment(client: MlflowClient, artifacts: Path | None) -> str:
    """An experiment of its own: one that an earlier probe has left marked as deleted, else a new one."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return client.create_experiment(EXPERIMENT, artifact_location=artifacts.as_uri() if artifacts else None)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        for run in client.search_runs([found.experiment_id]):  # they come back with it
            client.delete_run(run.info.run_id)
    return found.experiment_id


def _take_away(client: MlflowClient, experiment: str, run_id: str | None, *, permanently: bool) -> None:
    """Errors are of no use here: what could not be written is told already."""
    with contextlib.suppress(Exception):
        if run_id is not None:
            uri = client.get_run(run_id).info.artifact_uri
            with contextlib.suppress(Exception):  # not every store of artifacts can delete
                get_artifact_repository(uri, tracking_uri=client.tracking_uri).delete_artifacts(_FILE)
            client.set_terminated(run_id)
            client.delete_run(run_id)
        if client.search_runs([experiment], max_results=1):
            return  # another doctor is at it
        client.delete_experiment(experiment)
        if permanently:
            store: Any = client._tracking_client.store  # what `mlflow gc` calls, which has no interface for one run
            for deleted in store._get_deleted_runs():
                if store.get_run(deleted).info.experiment_id == experiment:
                    store._hard_delete_run(deleted)
            store._hard_delete_experiment(experiment)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that MLflow makes when it needs it, and that is gone afterwards, with its parent if that is new."""
    had_parent = path.parent.exists()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if not had_parent:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


@contextlib.contextmanager
def _nothing_new(path: Path) -> Iterator[None]:
    had = path.exists()
    try:
        yield
    finally:
        if not had:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _explained(uri: str, doing: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _told(error, uri, doing) from None


def _told(error: Exception, uri: str, doing: str) -> UserError:
    """Who refused: the password, the network, the server, or the store's disk."""
    text = clean(error, 2000)
    reason = re.search(r"Caused by (.*)\)$", text)
    found = re.search(r"error code (\d{3})|too many (\d{3}) error responses", text)
    code = int(found[1] or found[2]) if found else 0
    name = error.error_code if isinstance(error, MlflowException) else ""
    if code in (401, 403) or name in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        problem = "access is refused: user, password or token are missing, wrong, or not allowed to do this"
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif code >= 500:
        problem, hint = "the server answers, but fails", "look at the server's own log: its database, its disk"
    elif "failed with exception" in text and re.search(r"SSL|certificate", text):
        problem = "the server's certificate is not trusted"
        hint = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the authority's certificate"
    elif "failed with exception" in text:
        problem = "the server does not answer"
        hint = "is MLFLOW_TRACKING_URI right, the server up, the port forwarded, the VPN on?"
    elif "out-of-date database schema" in text:
        problem = "the store was made by another version of MLflow"
        hint = f"keep a copy of it, then mlflow db upgrade {redact(uri)}"
    elif doing.endswith("artifact"):
        problem = "runs can be written, artifacts cannot"
        hint = "the server's store of artifacts (its --artifacts-destination), or your access to it, is what is wrong"
    elif sqlite_path(uri) is not None:
        problem, hint = "the store cannot be used", "can the file be written, is it locked, is the disk full?"
    else:
        problem = "answers, but not as MLflow does"
        hint = "give MLflow's own address in MLFLOW_TRACKING_URI, not that of a page to log in"
    seen = clean(reason[1] if reason else text, 200)
    return UserError(f"{problem} ({doing})", where=redact(uri), seen=seen, hint=hint)
