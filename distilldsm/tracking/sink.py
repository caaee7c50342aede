"""What becomes of journal records in MLflow: the only code that calls MLflow, with clients only, no global state.

Every operation may be repeated without harm, because a record whose acknowledgement was lost is sent again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from distilldsm.core.redaction import redact
from distilldsm.tracking.denial import denials
from distilldsm.tracking.flavor import save
from distilldsm.tracking.journal import Record, spooled
from distilldsm.tracking.registry import RECORD_TAG, register, write_receipt

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY_TAG = "distilldsm.run_key"
_PARENT_TAG, _PLACEHOLDER_TAG = "mlflow.parentRunId", "distilldsm.placeholder"
METRICS_PER_BATCH = 900  # the REST API takes 1,000 items and 1 MB
ITEMS_PER_BATCH = 90  # params or tags; it takes 100
_TABLES_TAG = "mlflow.loggedArtifacts"
_HTTP_TIMEOUT_S, _HTTP_RETRIES = "10", "1"
_FILE_TIMEOUT_S = "600"
_REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "ENDPOINT_NOT_FOUND",
        "NOT_IMPLEMENTED",
        "INVALID_STATE",
        "ABORTED",
    }
)

logger = logging.getLogger("distilldsm.tracking")


class RefusedError(Exception):
    """The store is there and will never take this record."""


def prepare_environment() -> None:
    """Short timeouts, files by way of the server, no telemetry; before MLflow is imported. What is set stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _HTTP_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _HTTP_RETRIES)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Else a server on S3 sends its clients to the bucket, whose address they need not be able to reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


@contextmanager
def _patience() -> Iterator[None]:
    """Wait longer for files: a server answers only when it has passed the whole file on to its own store.

    A large one would run into the short time-out each time, and then count as one that the server breaks on. What the
    user has set stays.
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


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///` address; None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


class Sink:
    """One MLflow store, and one run in it once `open_run` has been called.

    Errors: `RefusedError` for what cannot ever succeed, `DeniedError` for what the server does not let this user do;
    anything else may succeed later.
    """

    def __init__(self, uri: str) -> None:
        prepare_environment()
        from mlflow import MlflowClient

        database = sqlite_path(uri)
        self._artifact_root: Path | None = None
        self._registry_lock: FileLock | None = None
        if database is None:
            self._client: MlflowClient = MlflowClient(tracking_uri=uri)
        else:
            database.parent.mkdir(parents=True, exist_ok=True)
            self._artifact_root = database.parent.absolute() / "mlartifacts"
            self._registry_lock = FileLock(f"{database}.lock")
            # MLflow fails where several processes create the tables of a new file at once.
            with self._registry_lock:
                self._client = MlflowClient(tracking_uri=uri)
                self._client.search_experiments(max_results=1)
        self._run_id = ""
        self._experiment_id = ""
        self._last_step: dict[str, int] | None = None

    def reachable(self) -> bool:
        """Whether the store answers at all."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    @denials()
    def open_run(self, record: Record, known_run_id: str | None) -> str:
        """Find the run of an `open` record, or create it, and return its id.

        The run is looked for by the id known from before, then by the id in the record, then by the run key's tag.

        Raises:
            DeniedError: the server does not let this user in, or not create a run.
        """
        self._experiment_id = self._experiment(record["experiment"])
        run = self._find_run(record, known_run_id, self._experiment_id)
        self._last_step = {} if run is not None and record["role"] == "train" else None
        if run is None:
            tags = {**record["tags"], RUN_KEY_TAG: record["run_key"]}
            run = self._client.create_run(
                self._experiment_id, start_time=record["time_ms"], tags=tags, run_name=record["name"]
            )
        elif record["role"] == "train":
            # What was made for a parent before the training arrived gets the training's name.
            name = record["name"] if run.data.tags.get(_PLACEHOLDER_TAG) else None
            self._client.update_run(run.info.run_id, status="RUNNING", name=name)
            if name is not None:
                self._client.delete_tag(run.info.run_id, _PLACEHOLDER_TAG)
            self._tags(run.info.run_id, record["tags"])
        self._run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        return self._run_id

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        for _ in range(2):
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    logger.warning("experiment '%s' had been deleted and is restored", name)
                    self._client.restore_experiment(found.experiment_id)
                return found.experiment_id
            location = None
            if self._artifact_root is not None:
                folder = re.sub(r"[^\w.-]+", "_", name)
                location = (self._artifact_root / folder).as_uri()
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                    raise
        raise RuntimeError(f"experiment '{name}' can be neither found nor created")

    def _find_run(self, record: Record, known_run_id: str | None, experiment_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        for run_id in dict.fromkeys((known_run_id, record["run_id"])):
            if not run_id:
                continue
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                continue
            if run.info.lifecycle_stage == "active":
                return run
        key = record["run_key"]
        found = self._client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        return found[0] if found else None

    @denials()
    def apply(self, records: Sequence[Record], directory: Path, identity: str) -> None:
        """Send records of one kind (several only of `metrics`) to the open run.

        Args:
            directory: the journal's, to which paths in the spool are relative.
            identity: names the record for ever; keeps a model from being logged twice.

        Raises:
            RefusedError: the store will never take it.
            DeniedError: the server does not let this user.
        """
        from mlflow.exceptions import MlflowException

        first = records[0]
        try:
            match first["op"]:
                case "metrics":
                    self._metrics(records)
                case "params":
                    self._params(first["values"])
                case "tags":
                    self._tags(self._run_id, first["values"])
                case "dataset":
                    self._dataset(first)
                case "artifact":
                    self._artifact(_spooled(first, directory), first["to"])
                case "table":
                    self._artifact(_spooled(first, directory), first["to"])
                    self._announce_table(first["table"])
                case "model":
                    self._model(first, directory, identity)
                case "child":
                    self._child(first)
                case "end":
                    self._client.set_terminated(self._run_id, first["status"], first["time_ms"])
                case other:
                    raise RefusedError(f"unknown kind of record '{other}'")
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise RefusedError(str(error)) from error
            raise

    def _metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), record["time_ms"], record["step"])
            for record in records
            for key, value in record["values"].items()
            if not self._is_known(key, record["step"])
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[start : start + METRICS_PER_BATCH]
            self._client.log_batch(self._run_id, metrics=batch, synchronous=True)

    def _is_known(self, key: str, step: int) -> bool:
        """Whether a training that goes on after its last checkpoint repeats an epoch the run has already."""
        if self._last_step is None or key.startswith("system/"):
            return False
        if key not in self._last_step:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_step[key] = max((metric.step for metric in history), default=-1)
        return step <= self._last_step[key]

    def _params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        known = self._client.get_run(self._run_id).data.params
        changed = {key for key, value in values.items() if known.get(key, value) != value}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), ITEMS_PER_BATCH):
            batch = new[start : start + ITEMS_PER_BATCH]
            try:
                self._client.log_batch(self._run_id, params=batch, synchronous=True)
            except MlflowException as error:
                # Older servers take shorter values; one that is refused must not take the others along.
                if error.error_code not in _REFUSALS or len(values) == 1:
                    raise
                for param in batch:
                    try:
                        self._params({param.key: param.value})
                    except MlflowException as single:
                        if single.error_code not in _REFUSALS:
                            raise
                        logger.warning("parameter '%s' was refused: %s", param.key, redact(str(single)))
        if changed:
            raise RefusedError("MLflow does not let a run change its parameters: " + ", ".join(sorted(changed)))

    def _tags(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in values.items()]
        for start in range(0, len(tags), ITEMS_PER_BATCH):
            self._client.log_batch(run_id, tags=tags[start : start + ITEMS_PER_BATCH], synchronous=True)

    def _child(self, record: Record) -> None:
        """Tag another run with the open one as its parent.

        A run that has not arrived (its journal may lie on another machine) is made here, and found by its key when
        its own records come, as that of an evaluation is that comes before its training.
        """
        experiment = self._experiment(record["experiment"])
        run = self._find_run(record, None, experiment)
        if run is not None:
            self._tags(run.info.run_id, {_PARENT_TAG: self._run_id})
            return
        tags = {RUN_KEY_TAG: record["run_key"], _PARENT_TAG: self._run_id, _PLACEHOLDER_TAG: "true"}
        self._client.create_run(experiment, start_time=record["started_ms"], tags=tags, run_name=record["name"])

    def _dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"],
            source_type="external",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        tags = [InputTag("mlflow.data.context", record["context"])]
        self._client.log_inputs(self._run_id, [DatasetInput(dataset, tags)])

    def _artifact(self, source: Path, artifact_path: str | None) -> None:
        with _patience():
            if source.is_dir():
                self._client.log_artifacts(self._run_id, str(source), artifact_path)
            else:
                self._client.log_artifact(self._run_id, str(source), artifact_path)

    def _announce_table(self, path: str) -> None:
        """List the table among those that MLflow's pages can show and compare across runs."""
        tags = self._client.get_run(self._run_id).data.tags
        tables = json.loads(tags.get(_TABLES_TAG, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in tables:
            self._client.set_tag(self._run_id, _TABLES_TAG, json.dumps([*tables, entry]))

    def _model(self, record: Record, directory: Path, identity: str) -> None:
        source = _spooled(record, directory)
        logged = self._logged_model(record, identity)
        if str(logged.status) != "READY":
            try:
                self._upload_model(record, source, logged)
            except ImportError as error:
                logger.warning("%s is not installed here: the exported model is kept as plain artifacts", error.name)
                self._client.delete_logged_model(logged.model_id)
                self._artifact(source, "exported_model")
                return
        self._model_metrics(record, logged.model_id)
        if record["registered_name"]:
            line = register(
                self._client,
                record,
                run_id=self._run_id,
                model_id=logged.model_id,
                identity=identity,
                source=source,
                lock=self._registry_lock,
            )
            write_receipt(directory, record, line)
            logger.info("%s", line)

    def _upload_model(self, record: Record, source: Path, logged: Any) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
            path = Path(folder) / "model"
            described = Model(
                artifact_path=logged.artifact_location,
                run_id=self._run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            )
            save(
                source,
                path,
                described,
                pip_requirements=list(record["pip_requirements"]),
                metadata=record["metadata"],
            )
            self._client.log_outputs(self._run_id, [LoggedModelOutput(logged.model_id, step=0)])
            with _patience():
                self._client.log_model_artifacts(logged.model_id, str(path))
            self._client.finalize_logged_model(logged.model_id, "READY")

    def _model_metrics(self, record: Record, model_id: str) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), record["time_ms"], 0, model_id=model_id, run_id=self._run_id)
            for key, value in record.get("metrics", {}).items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def _logged_model(self, record: Record, identity: str) -> Any:
        """The model entry of this very record, from an attempt before or new."""
        page = None
        while True:
            found = self._client.search_logged_models(
                [self._experiment_id], f"source_run_id = '{self._run_id}'", page_token=page
            )
            for model in found:
                if (model.tags or {}).get(RECORD_TAG) == identity:
                    return model
            page = found.token
            if not page:
                break
        return self._client.create_logged_model(
            self._experiment_id,
            name=record["name"],
            source_run_id=self._run_id,
            tags={RECORD_TAG: identity},
            model_type="segmentation",
        )


def _spooled(record: Record, directory: Path) -> Path:
    try:
        path = spooled(directory, record)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if not path.exists():
        raise RefusedError(f"the spooled copy is gone: {record['path']}")
    return path
