"""MLflow tracking that never stops or slows the work: records go to a local journal, another process sends them.

    with start_run(config, directory=work, name="distill_dsm-fold0") as run:
        run.log_metrics({"train_loss": 0.7}, step=1)

Nothing here imports MLflow (it takes seconds); `sink` does, in the process of `worker`. Journals lie in
`./tracking`, or in the directory that DISTILLDSM_TRACKING_DIR names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from distilldsm.config import TrackingConfig
from distilldsm.core.files import write_json
from distilldsm.core.mapping import flatten, to_mapping
from distilldsm.tracking.delivery import Delivery, clean, live_uri, redact, replay_all
from distilldsm.tracking.flavor import requirements
from distilldsm.tracking.journal import JournalWriter, State, encode_number, pending, writer_identity
from distilldsm.tracking.process import report_first_attempt
from distilldsm.tracking.process import start_worker as _start_worker
from distilldsm.tracking.process import stop_worker as _stop_worker
from distilldsm.tracking.registry import read_receipt
from distilldsm.tracking.sink import sqlite_path
from distilldsm.tracking.values import (
    DIGEST_LENGTH,
    PARAM_LENGTH,
    TAG_LENGTH,
    key_name,
    plain,
    texts,
    version_tags,
)

RUN_FILE = "mlflow_run.json"
CLOSE_TIMEOUT_S, LOCAL_CLOSE_TIMEOUT_S = 20.0, 60.0
logger = logging.getLogger("distilldsm.tracking")


def default_uri() -> str:
    """MLFLOW_TRACKING_URI (a relative SQLite path made absolute), else `mlflow.db` in the current directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    database = sqlite_path(uri)
    if database is None:
        return uri
    query = uri.partition("?")[2]
    return f"sqlite:///{database.absolute()}" + (f"?{query}" if query else "")


def tracking_directory() -> Path:
    """Where the journals lie."""
    return Path(os.environ.get("DISTILLDSM_TRACKING_DIR") or "tracking").absolute()


def start_run(
    config: TrackingConfig,
    *,
    directory: Path,
    name: str,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
    run_key: str | None = None,
    with_system: bool = True,
) -> Run:
    """Start a run, or go on with the one that `directory` (or `run_id`, or `run_key`) names.

    Returns at once whatever the state of the server. Tracks nothing where `config.enabled` is false, in every
    process of a distributed training but the first, and where the journal cannot be written (with a warning).

    Args:
        directory: the training's work directory; `mlflow_run.json` is written into it.
        tags: added to those of the code's and the data's version.
        run_id: an MLflow run to go on with.
        run_key: 32 hexadecimal digits that name the run, where the same work shall always be the same run.
        with_system: sample the machine's load.
    """
    if not config.enabled or os.environ.get("RANK", "0") != "0":
        return Run()
    uri = default_uri()
    identity = _read_run_file(directory)
    if identity is None or (identity["tracking_uri"], identity["experiment"]) != (redact(uri), config.experiment):
        identity = {
            "tracking_uri": redact(uri),
            "experiment": config.experiment,
            "run_id": None,
            "run_key": run_key or uuid.uuid4().hex,
            "started_ms": time.time_ns() // 1_000_000,
        }
    identity["run_id"] = run_id or identity["run_id"]
    all_tags = {**version_tags(), **texts(tags or {}, TAG_LENGTH)}
    run = Run._open(identity, uri, role="train", name=name, tags=all_tags, with_system=with_system)
    if run.run_key is not None:
        with _forgiving("writing " + RUN_FILE):
            write_json(directory / RUN_FILE, identity)
        run._directory = directory
    return run


@contextlib.contextmanager
def attach(model_dir: Path, config: TrackingConfig) -> Iterator[Run]:
    """Yield the training run that `model_dir` belongs to, to add to it; its status and `model_dir` stay as they are.

    Where the model was trained without tracking, or tracking is off, the run yielded records nothing.
    """
    identity = _read_run_file(model_dir)
    if not config.enabled or os.environ.get("RANK", "0") != "0" or identity is None:
        yield Run()
        return
    uri = _uri_to_attach(identity["tracking_uri"])
    run = Run._open(identity, uri, role="attach", name=model_dir.name, tags={}, with_system=False)
    with run:
        yield run


def replay_journals(directory: Path | None = None, *, tracking_uri: str | None = None) -> Delivery:
    """Send what earlier runs could not; each record once, in order. Imports MLflow only if there is something to send.

    Args:
        directory: where the journals lie, by default `tracking_directory()`.
        tracking_uri: another store than the one the records were meant for.
    """
    return replay_all(directory or tracking_directory(), tracking_uri=tracking_uri)


class Run:
    """One tracked run. Its methods only write to the journal, and warn where that fails: they never raise.

    As a context manager it closes itself, with status FINISHED, FAILED or (on an interrupt) KILLED.
    """

    def __init__(self) -> None:
        self._journal: JournalWriter | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._listening: threading.Event | None = None
        self._directory: Path | None = None
        self._state_directory: Path | None = None
        self._role = "none"
        self._receipt: str | None = None
        self._is_local = False
        self._uri = ""
        self.run_key: str | None = None
        """Names the run from its start, before the server has given it an id; None where nothing is tracked."""

    @classmethod
    def _open(
        cls,
        identity: dict[str, Any],
        uri: str,
        *,
        role: str,
        name: str,
        tags: Mapping[str, str],
        with_system: bool,
    ) -> Run:
        run = cls()
        with _forgiving("opening the journal"):
            journal = JournalWriter(tracking_directory() / identity["run_key"])
            opening = {**identity, "tracking_uri": redact(uri), "role": role, "name": name, "tags": dict(tags)}
            journal.append("open", **opening, **writer_identity())
            run._journal, run._role, run.run_key = journal, role, identity["run_key"]
            run._state_directory, run._is_local = journal.directory, sqlite_path(uri) is not None
            run._uri = redact(uri)
            run._worker = _start_worker(journal.directory, uri, with_system=with_system)
            if run._worker is not None:
                run._listening = report_first_attempt(journal.directory, run._worker, run._not_sent)
        return run

    def _not_sent(self, error: str) -> None:
        logger.warning(
            "MLflow: nothing could be sent to %s (%s); the work goes on, its records are kept in %s",
            self._uri,
            error,
            self._state_directory,
        )

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has been reached, and where nothing is tracked."""
        return None if self._state_directory is None else State.load(self._state_directory).run_id

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings become dotted keys, lists and null JSON, over-long values are cut."""
        with _forgiving("parameters"):
            self._record("params", values=texts(flatten(to_mapping(values)), PARAM_LENGTH))

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers (NaN and infinities too) at a step, e.g. the epoch."""
        with _forgiving("metrics"):
            numbers = {key_name(name): encode_number(value) for name, value in values.items()}
            self._record("metrics", values=numbers, step=step or 0)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        with _forgiving("tags"):
            self._record("tags", values=texts(values, TAG_LENGTH))

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str,
        *,
        profile: Mapping[str, Any] | None = None,
        context: str = "training",
    ) -> None:
        """Record an input data set; MLflow keeps 36 characters of the digest, the profile keeps all of it."""
        with _forgiving("a data set"):
            facts = {**to_mapping(dict(profile or {})), "digest": digest}
            self._record(
                "dataset",
                name=name[:500],
                digest=digest[:DIGEST_LENGTH],
                source=redact(source),
                profile=plain(facts),
                context=context,
            )

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Record a file, as it is now, under the folder `artifact_path`."""
        with _forgiving(f"artifact {path}"):
            self._spool("artifact", Path(path), to=artifact_path)

    def log_artifacts(self, directory: Path, artifact_path: str | None = None) -> None:
        """Record all files of a directory, as they are now, under the folder `artifact_path`."""
        with _forgiving(f"artifacts {directory}"):
            self._spool("artifact", Path(directory), to=artifact_path)

    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact_file: str) -> None:
        """Record rows as a table that MLflow's pages can show; NaN becomes an empty cell.

        Args:
            artifact_file: name with the suffix `.json`, possibly within a folder.
        """
        with _forgiving(f"table {artifact_file}"):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
            folder, _, file = artifact_file.rpartition("/")
            if self._journal is not None:
                target, relative = self._journal.spool(name=file)
                target.write_text(json.dumps(plain(to_mapping(table)), allow_nan=False), encoding="utf-8")
                self._record("table", path=relative, to=folder or None, table=artifact_file)

    def log_figure(self, figure: Any, artifact_file: str) -> None:
        """Record a matplotlib figure as the image `artifact_file` (its suffix gives the format)."""
        with _forgiving(f"figure {artifact_file}"):
            folder, _, file = artifact_file.rpartition("/")
            if self._journal is not None:
                target, relative = self._journal.spool(name=file)
                figure.savefig(target, bbox_inches="tight")
                self._record("artifact", path=relative, to=folder or None)

    def add_child(self, model_dir: Path, *, name: str) -> None:
        """Make the training run that `model_dir` belongs to a child of this one, whenever both have arrived.

        A run has one parent: the last one that asked. A model trained without tracking, or into another store, is
        left out, the latter with a warning.

        Args:
            name: of the child's run, should the store not know it yet.
        """
        with _forgiving(f"child {model_dir}"):
            identity = _read_run_file(model_dir)
            if identity is None or self._journal is None:
                return
            store = redact(_uri_to_attach(identity["tracking_uri"]))
            if store != self._uri:
                raise ValueError(f"it was tracked in {store}, not in {self._uri}")
            fields = ("experiment", "run_id", "run_key", "started_ms")
            self._record("child", name=name, **{key: identity[key] for key in fields})

    def log_exported_model(
        self,
        model_dir: Path,
        *,
        name: str = "model",
        registered_name: str | None = None,
        gate: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        version_tags: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        pip_requirements: Sequence[str] | None = None,
    ) -> None:
        """Record an exported model directory as an MLflow model and register it, see `flavor` and `registry`.

        All files of the directory are in the MLflow model, so that downloaded it is a model directory again.

        Args:
            registered_name: name in the model registry; None does not register.
            gate: what it must fulfil to become champion, the fields of `distilldsm.export.gate.Gate`.
            metrics: belong to this very model, on its page and the run's.
            version_tags: tags of the registered version.
            metadata: written into the MLflow model's description.
            pip_requirements: what serving it needs, by default what it imports, pinned to what is installed.
        """
        with _forgiving(f"model {model_dir}"):
            if not (Path(model_dir) / "model.onnx").is_file():
                raise FileNotFoundError(f"{model_dir} holds no model.onnx")
            receipt = uuid.uuid4().hex
            self._spool(
                "model",
                Path(model_dir),
                name=name,
                registered_name=registered_name,
                gate=plain(dict(gate or {})),
                metrics={key_name(key): encode_number(value) for key, value in (metrics or {}).items()},
                version_tags=texts(version_tags or {}, TAG_LENGTH),
                metadata=plain(to_mapping(dict(metadata or {}))),
                pip_requirements=list(pip_requirements or requirements(Path(model_dir))),
                receipt=receipt,
            )
            self._receipt = receipt if registered_name else None

    @property
    def registration(self) -> str | None:
        """What became of the exported model in the registry, one line; None where none is to be registered."""
        if self._receipt is None or self._state_directory is None:
            return None
        with _forgiving("asking what the registry said"):
            line = read_receipt(self._state_directory, self._receipt)
            if line is not None:
                return line
            if not pending(self._state_directory):
                return f"the registry did not take the model, see {self._state_directory}"
        return "the model is not registered yet: that, and who is champion, is decided when the server is back"

    def close(self, timeout: float | None = None, *, status: str = "FINISHED") -> None:
        """End the run and wait for its records to be sent; what is left stays journalled.

        Args:
            timeout: longest wait in seconds; by default 20 for a server, and 60 for a local store, which can be slow
                but not away.
        """
        if self._journal is None:
            return
        journal = self._journal
        with _forgiving("closing the run"):
            if self._role == "train":
                self._record("end", status=status)
        with _forgiving("closing the journal"):
            journal.close()
        with _forgiving("finishing"):
            if self._listening is not None:
                self._listening.set()  # what is left is told below
            if timeout is None:
                timeout = LOCAL_CLOSE_TIMEOUT_S if self._is_local else CLOSE_TIMEOUT_S
            if self._worker is not None:
                _stop_worker(self._worker, timeout)
            state = State.load(journal.directory)
            if self._directory is not None and state.run_id and (self._directory / RUN_FILE).is_file():
                identity = _read_run_file(self._directory)
                if identity is not None and identity["run_id"] != state.run_id:
                    write_json(self._directory / RUN_FILE, {**identity, "run_id": state.run_id})
            left = pending(journal.directory)
            if left:
                logger.warning(
                    "MLflow: %d records are kept in %s and sent by the next run (%s)",
                    left,
                    journal.directory,
                    state.last_error or "the store did not take them in time",
                )
        self._journal = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # SystemExit is how a SIGTERM handler ends a stage.
            self.close(status="FAILED" if issubclass(kind, Exception) else "KILLED")

    def _record(self, op: str, **values: Any) -> None:
        if self._journal is not None:
            self._journal.append(op, **values)

    def _spool(self, op: str, source: Path, **values: Any) -> None:
        if self._journal is not None:
            _, relative = self._journal.spool(source)
            self._record(op, path=relative, **values)


@contextlib.contextmanager
def _forgiving(what: str) -> Iterator[None]:
    """Turn any error into a warning: the work matters more than its record."""
    try:
        yield
    except Exception as error:
        logger.warning("MLflow: %s failed: %s", what, clean(error))


def run_key_of(model_dir: Path) -> str | None:
    """The key of the run that a model belongs to; None where it was trained without tracking."""
    identity = _read_run_file(model_dir)
    return None if identity is None else str(identity["run_key"])


def _read_run_file(directory: Path) -> dict[str, Any] | None:
    """What `mlflow_run.json` says; None where there is none, or none that can be used."""
    try:
        stored = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        identity = {key: stored[key] for key in ("tracking_uri", "experiment", "run_id", "run_key", "started_ms")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The key becomes the name of a directory.
    return identity if re.fullmatch(r"[0-9a-f]{32}", str(identity["run_key"])) else None


def _uri_to_attach(recorded: str) -> str:
    """Where a recorded run is now: its own store, by the name that the environment gives to it.

    A server may be known by another name here than where the training ran, and a SQLite file may have been moved.
    """
    current = default_uri()
    database = sqlite_path(recorded)
    if database is not None:
        return recorded if database.is_file() or sqlite_path(current) is None else current
    return current if sqlite_path(current) is None else live_uri(recorded)
