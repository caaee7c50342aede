"""One MLflow store: the connection, its experiments and runs, and explanations of its errors."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from distilldsm.core.errors import UserError
from distilldsm.tracking.addresses import default_uri, redact_uri, refuse_foreign_credentials, sqlite_path
from distilldsm.tracking.record import RunIdentity
from distilldsm.tracking.values import clean

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY_TAG, PLACEHOLDER_TAG = "distilldsm.run_key", "distilldsm.placeholder"
_TABLES_TAG = "mlflow.loggedArtifacts"
_HTTP_TIMEOUT_S, _FILE_TIMEOUT_S = "10", "600"
_DENIALS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}

logger = logging.getLogger("distilldsm.tracking")


def prepare_environment() -> None:
    """Set short timeouts, and files through the server. Call before importing MLflow. User settings stay."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _HTTP_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Otherwise a server on S3 redirects its clients to the bucket, which they may be unable to reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


@contextmanager
def patience() -> Iterator[None]:
    """Use a longer timeout for files: a server answers only when its own storage has received the whole file.

    A timeout that the user has set is kept.
    """
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(variable)
    if before != _HTTP_TIMEOUT_S:
        yield
        return
    os.environ[variable] = _FILE_TIMEOUT_S
    try:
        yield
    finally:
        os.environ[variable] = before


class Store:
    """An MLflow store with the operations that publishing needs. Uses only MLflow's client, no global state."""

    def __init__(self, uri: str) -> None:
        refuse_foreign_credentials(uri)
        prepare_environment()
        from mlflow import MlflowClient

        self.uri = uri
        self.registry_lock: FileLock | None = None
        self._artifact_root: Path | None = None
        database = sqlite_path(uri)
        if database is None:
            self.client: MlflowClient = MlflowClient(tracking_uri=uri)
            return
        if uri == default_uri():
            database.parent.mkdir(parents=True, exist_ok=True)
        elif not database.parent.is_dir():
            hint = "give the store's place now: distilldsm publish --to URI, or MLFLOW_TRACKING_URI"
            raise UserError("the folder of the recorded store is gone", where=database.parent, hint=hint)
        self._artifact_root = database.parent.absolute() / "mlartifacts"
        self.registry_lock = FileLock(f"{database}.lock")
        # MLflow fails if several processes create the tables of a new file at once.
        with self.registry_lock:
            self.client = MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)

    def reachable(self) -> bool:
        """Whether the store answers at all."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def experiment(self, name: str) -> str:
        """The id of an experiment. A missing one is created, a deleted one is restored."""
        from mlflow.exceptions import MlflowException

        for _ in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                if experiment.lifecycle_stage == "deleted":
                    logger.warning("experiment '%s' had been deleted and is restored", name)
                    self.client.restore_experiment(experiment.experiment_id)
                return str(experiment.experiment_id)
            location = None
            if self._artifact_root is not None:
                location = (self._artifact_root / re.sub(r"[^\w.-]+", "_", name)).as_uri()
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                    raise
        raise RuntimeError(f"experiment '{name}' can be neither found nor created")

    def find_run(self, identity: RunIdentity) -> Any:
        """The run of an identity, found by MLflow's id or by the tag with the key; None if it is missing or deleted."""
        from mlflow.exceptions import MlflowException

        if identity.id is not None:
            try:
                run = self.client.get_run(identity.id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        if identity.experiment_id is not None:
            experiment_id = identity.experiment_id
        else:
            experiment = self.client.get_experiment_by_name(identity.experiment)
            if experiment is None or experiment.lifecycle_stage == "deleted":
                return None
            experiment_id = experiment.experiment_id
        condition = f"tags.`{RUN_KEY_TAG}` = '{identity.key}'"
        runs = self.client.search_runs([experiment_id], condition, max_results=1)
        return runs[0] if runs else None

    def run(self, identity: RunIdentity, *, is_placeholder: bool, tags: dict[str, str] | None = None) -> Any:
        """The run of an identity. A missing one is created.

        Args:
            is_placeholder: another output needs the run before its own output is published, which later sets the name.
            tags: tags of a run that is created here.
        """
        with run_lock(identity.key):
            run = self.find_run(identity)
            if run is None:
                marks = {RUN_KEY_TAG: identity.key, **({PLACEHOLDER_TAG: "true"} if is_placeholder else {})}
                created = self.client.create_run(
                    identity.experiment_id or self.experiment(identity.experiment),
                    start_time=identity.started_ms,
                    tags={**(tags or {}), **marks},
                    run_name=identity.name,
                )
                if not created.info.run_id:
                    raise RuntimeError("the answer to the creation of a run names no run")
                return created
        if not is_placeholder and run.data.tags.get(PLACEHOLDER_TAG):
            self.client.update_run(run.info.run_id, name=identity.name)
            self.client.delete_tag(run.info.run_id, PLACEHOLDER_TAG)
        return run

    def artifact_sizes(self, run_id: str, folder: str) -> dict[str, int]:
        """Size in bytes of each artifact in a folder of a run."""
        entries = self.client.list_artifacts(run_id, folder or None)
        return {entry.path: int(entry.file_size or 0) for entry in entries if not entry.is_dir}

    def check_artifacts(self, run_id: str, sizes: Mapping[str, int]) -> None:
        """Raise a UserError for an artifact that the store has cut or lost. `sizes`: artifact to its size in bytes."""
        folders = {artifact.rpartition("/")[0] for artifact in sizes}
        seen = {name: size for folder in folders for name, size in self.artifact_sizes(run_id, folder).items()}
        for artifact, size in sizes.items():
            if seen.get(artifact) != size:
                raise UserError(
                    f"{artifact} did not arrive whole",
                    where=redact_uri(self.uri),
                    seen=f"{seen.get(artifact, 0):,} of {size:,} bytes",
                    hint="check the server's artifact storage: is its disk full? The next publish sends the file again",
                )

    def announce_table(self, run_id: str, artifact: str) -> None:
        """Add a table to the list that MLflow's pages can show and compare across runs."""
        tables = json.loads(self.client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
        entry = {"path": artifact, "type": "table"}
        if entry not in tables:
            self.client.set_tag(run_id, _TABLES_TAG, json.dumps([*tables, entry]))


@contextmanager
def run_lock(key: str, timeout_s: float = 60) -> Iterator[None]:
    """Lock a run: no other process of this user on this machine may publish it at the same time.

    Raises:
        filelock.Timeout: another process held the lock for `timeout_s` seconds.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    # A singleton lock is re-entrant: `Store.run` takes it again while `publish` holds it.
    lock = FileLock(Path(tempfile.gettempdir()) / f"distilldsm-{user}-{key}.lock", is_singleton=True)
    with lock.acquire(timeout=timeout_s):
        yield


@contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Raise errors of MLflow inside the block as `explain` does."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise explain(error, uri, doing) from None


def explain(error: Exception, uri: str, doing: str = "") -> UserError:
    """Turn an error of MLflow into a message with the cause and a hint: password, network, server or disk.

    Args:
        doing: the operation that failed, e.g. `writing an artifact`.
    """
    text = clean(str(error))
    reason = re.search(r"Caused by (.*)\)$", text)
    status = re.search(r"error code (\d{3})|too many (\d{3}) error responses", text)
    code = _DENIALS.get(str(getattr(error, "error_code", None)))
    # A file upload through the server fails with an HTTPError of requests.
    code = code or getattr(getattr(error, "response", None), "status_code", None)
    code = code or (int(status[1] or status[2]) if status else 0)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    who = f"user '{user}'" if user else "a client without a user's name"
    if code == 401:
        problem = f"access is refused: the MLflow server does not let {who} in"
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif "Invalid Host header" in text:
        problem = "the MLflow server refuses the name by which it was asked"
        hint = "start it with --allowed-hosts NAME (mlflow server), or use a name that it allows"
    elif code == 403:
        problem = f"access is refused: the MLflow server does not let {who} do this"
        hint = "ask its administrator for the permission EDIT on the experiment, and on the registered model"
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
        hint = f"keep a copy of it, then mlflow db upgrade {redact_uri(uri)}"
    elif doing.endswith("artifact"):
        problem = "runs can be written, artifacts cannot"
        hint = "check the server's artifact storage (its --artifacts-destination) and your access to it"
    elif "not a database" in text or "malformed" in text:
        problem = "is damaged, or no database"
        hint = "move it away, or put a copy of it back; then distilldsm publish sends the outputs again"
    elif sqlite_path(uri) is not None:
        problem, hint = "the store cannot be used", "can the file be written, is it locked, is the disk full?"
    else:
        problem = "answers, but not as MLflow does"
        hint = "give MLflow's own address in MLFLOW_TRACKING_URI, not that of a page to log in"
    where = f"{problem} ({doing})" if doing else problem
    return UserError(where, where=redact_uri(uri), seen=clean(reason[1] if reason else text)[:200], hint=hint)
