"""Logs an exported model to MLflow and registers it if the record asks for that."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from distilldsm.tracking.flavor import save
from distilldsm.tracking.record import Model, Record
from distilldsm.tracking.registry import RECORD_TAG, register
from distilldsm.tracking.store import Store, patience


def log_model(store: Store, run: Any, record: Record, directory: Path) -> str | None:
    """Log the directory as a model, once per record, and register it. Returns one line with the result of registering.

    Raises:
        ImportError: a package that the MLflow model needs is not installed. The entry in MLflow is deleted again.
    """
    from mlflow.entities import Metric

    model, client = record.model, store.client
    assert model is not None
    logged = _logged_model(client, run, record.id)
    if str(logged.status) != "READY":
        try:
            _upload(client, run, model, logged, directory)
        except ImportError:
            client.delete_logged_model(logged.model_id)
            raise
    metrics = [
        Metric(key, float(value), record.time_ms, 0, model_id=logged.model_id, run_id=run.info.run_id)
        for key, value in model.metrics.items()
    ]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics, synchronous=True)
    if model.registered_name is None:
        return None
    ids = {"run_id": run.info.run_id, "model_id": logged.model_id, "record_id": record.id}
    return register(store, model, **ids, source=directory)


def _upload(client: Any, run: Any, model: Model, logged: Any, directory: Path) -> None:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model as Description

    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        path = Path(folder) / "model"
        described = Description(
            artifact_path=logged.artifact_location,
            run_id=run.info.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        requirements = list(model.pip_requirements)
        save(directory, path, described, pip_requirements=requirements, metadata=dict(model.metadata))
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        with patience():
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")


def _logged_model(client: Any, run: Any, record_id: str) -> Any:
    """The logged model of this record: the one from an earlier attempt, else a new one."""
    experiment, run_id, page = run.info.experiment_id, run.info.run_id, None
    while True:
        entries = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", page_token=page)
        for logged in entries:
            if (logged.tags or {}).get(RECORD_TAG) == record_id:
                return logged
        page = entries.token
        if not page:
            break
    return client.create_logged_model(
        experiment,
        name="model",
        source_run_id=run_id,
        tags={RECORD_TAG: record_id},
        model_type="segmentation",
    )
