"""The tracking record of an output, `tracking.json`: a stage writes it, `publish` sends its contents to MLflow.

The record names files in the output (history, figures, a model) and copies none of them. This module does not import
MLflow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distilldsm.config import TrackingConfig
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import read_json, sha256_file, sha256_json, write_json
from distilldsm.core.mapping import flatten, from_mapping, to_mapping
from distilldsm.core.output_directory import is_being_written
from distilldsm.models.package import METADATA
from distilldsm.tracking.addresses import default_uri, recorded, redact_uri, uri_to_attach
from distilldsm.tracking.flavor import requirements
from distilldsm.tracking.values import (
    DIGEST_LENGTH,
    PARAM_LENGTH,
    TAG_LENGTH,
    clean,
    encode_number,
    key_name,
    plain,
    texts,
    version_tags,
)

FILE = "tracking.json"
SYSTEM = "system.jsonl"
"""The machine's load while a training runs, one JSON object per line. Lies beside `tracking.json`."""
PARENT_TAG = "mlflow.parentRunId"
TASK_TAG = "distilldsm.task_run"
"""Tag of a run below a task's run of Kubeflow's MLflow plugin. A cross-validation leaves it there."""
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
logger = logging.getLogger("distilldsm.tracking")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The MLflow run that an output belongs to."""

    key: str
    """32 hexadecimal digits, set as a tag of the run. It identifies the run before MLflow has assigned an id."""
    experiment: str
    name: str
    started_ms: int
    """Milliseconds since 1970, like all times in the record."""
    tracking_uri: str
    """Address of the store, without user, password and query. An SQLite file of the project is relative to it."""
    experiment_id: str | None = None
    """Experiment of the task's run that Kubeflow's MLflow plugin made; None: the one named `experiment`."""
    id: str | None = None
    """MLflow's id of the run, if it was known when the output was finished."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{32}", self.key):
            raise ConfigError("is not the key of a run", seen=self.key, rule="32 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The input data of a run."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that becomes an artifact of the run."""

    path: str
    """Relative to the output's directory. The file may lie outside of it, in an input of the stage."""
    to: str
    """Folder in MLflow; for a table, the full name of the artifact."""
    sha256: str
    """Hash of the file when the record was written. A file that has changed since then is not sent."""
    table: bool = False
    """The file is a CSV file that MLflow's pages show as a table."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An exported model: it is logged in MLflow and, with a `registered_name`, registered."""

    registered_name: str | None = None
    """None: do not register."""
    gate: Mapping[str, Any] = field(default_factory=dict)
    """Conditions for becoming champion: the fields of `distilldsm.export.gate.Gate`."""
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    version_tags: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    pip_requirements: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of `tracking.json`."""

    schema_version: int = 1
    id: str = ""
    """Permanent id of this record. Published items carry it."""
    run: RunIdentity | None = None
    """None: the output is not tracked."""
    adds: bool = False
    """The record adds to the run of another output. It does not change that run's status and tags."""
    status: Status = "FINISHED"
    time_ms: int = 0
    """Time of writing: also the time of the metrics and of the run's end."""
    process: int | None = None
    """Process id of the writer while the status is RUNNING."""
    host: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    """NaN and infinities are text."""
    history: str | None = None
    """Name of the file with the metrics of each epoch."""
    dataset: Dataset | None = None
    files: tuple[File, ...] = ()
    model: Model | None = None
    children: tuple[RunIdentity, ...] = ()
    """Runs that become children of this one."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the record", seen=self.schema_version, rule="1")

    def is_at_work(self, directory: Path) -> bool | None:
        """Whether the process that writes the RUNNING record in `directory` is alive.

        None: not RUNNING, or written on another machine. The lock of the output decides, because another process may
        have the same number, after a restart or in another container.
        """
        if self.status != "RUNNING" or self.process is None or self.host != socket.gethostname():
            return None
        is_locked = is_being_written(final_path(directory))
        if is_locked is not None:
            return is_locked
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True


def load(directory: Path) -> Record | None:
    """The record of an output; None if the output has no record.

    Raises:
        UserError: the file cannot be read, or is not a valid record.
    """
    path = directory / FILE
    return from_mapping(Record, read_json(path), where=str(path)) if path.is_file() else None


def identity_of(directory: Path) -> RunIdentity | None:
    """The run that an output belongs to; None if it was made without tracking or its record is damaged."""
    try:
        record = load(directory)
    except UserError as error:
        logger.warning("MLflow: %s", clean(error))
        return None
    return None if record is None else record.run


def final_path(directory: Path) -> Path:
    """The path that an unfinished output has when its stage is done."""
    name = directory.name
    return directory.with_name(name[1:].removesuffix(".partial")) if name.endswith(".partial") else directory


def run_key_of(directory: Path) -> str | None:
    """The key of the run that an output belongs to; None if it was made without tracking."""
    identity = identity_of(directory)
    return None if identity is None else identity.key


def run_id_of(directory: Path) -> str:
    """MLflow's id of the run that an output belongs to; empty if it is unknown or the output is not tracked."""
    identity = identity_of(directory)
    return "" if identity is None else identity.id or ""


def key_in_pipeline(stage: str, fold: int) -> str | None:
    """The run's key of a step of a Kubeflow run: a pod that is started again goes on in the same MLflow run.

    None outside of Kubeflow.
    """
    run_id = os.environ.get("KFP_RUN_ID")
    return sha256_json([run_id, stage, fold])[:32] if run_id else None


def is_tracked(config: TrackingConfig | None) -> bool:
    """Whether this process tracks. In a distributed training only the first process does."""
    return config is not None and config.enabled and os.environ.get("RANK", "0") == "0"


def describe(
    config: TrackingConfig | None,
    directory: Path,
    *,
    run_of: Path | None = None,
    name: str = "",
    run_key: str | None = None,
    status: Status = "FINISHED",
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    history: str | None = None,
    dataset: Mapping[str, Any] | None = None,
    files: Mapping[str, Sequence[Path]] | None = None,
    tables: Mapping[str, Path] | None = None,
    model: Mapping[str, Any] | None = None,
    children: Mapping[str, Path] | None = None,
) -> None:
    """Write the tracking record of an output. Its files must exist already. A failure is only logged, as a warning.

    A resumed output keeps its run. MLflow does not allow changes to a run's parameters: the first values stay, and
    changed values become tags `resumed.NAME`.

    Args:
        config: None or `enabled: false` writes an empty record.
        run_of: another output; this one adds to its run. None creates a new run.
        name: name of the new run.
        run_key: key of the new run, if repeating the same work must give the same run.
        params: nested parameters get dotted names; lists and null become JSON; values that are too long are cut.
        history: name of the file with the metrics of each epoch.
        dataset: `name`, `digest`, `source` and `profile` of the input data.
        files: folders in MLflow to files or folders. Missing ones are left out.
        tables: names of artifacts (`.json`) to CSV files. MLflow's pages show them as tables.
        model: `registered_name`, `gate`, `metrics`, `version_tags`, `metadata` of the exported model in `directory`.
        children: names to outputs. Their runs become children; outputs without a run in the same store are left out.
    """
    record = Record()
    with forgiving(f"describing {directory}"):
        identity = None
        if config is not None and is_tracked(config):
            record = _earlier_record(config, directory) or record
            identity = record.run or (_attached(run_of) if run_of else _new_identity(config, name, run_key))
        if identity is not None:
            own_tags = texts(tags or {}, TAG_LENGTH)
            all_params = texts(flatten(to_mapping(dict(params or {}))), PARAM_LENGTH)
            changed = {f"resumed.{k}": v for k, v in all_params.items() if record.params.get(k, v) != v}
            is_running = status == "RUNNING"
            record = replace(
                record,
                id=uuid.uuid4().hex if record.status == "FINISHED" else record.id,
                run=identity,
                adds=run_of is not None,
                status=status,
                time_ms=time.time_ns() // 1_000_000,
                process=os.getpid() if is_running else None,
                host=socket.gethostname() if is_running else None,
                tags=own_tags if run_of else {**_origin(), **own_tags, **changed},
                params={**all_params, **record.params},
                metrics=_numbers(metrics or {}),
                history=history,
                dataset=_dataset(**dataset) if dataset else None,
                files=(*_files(directory, files or {}), *_tables(directory, tables or {})),
                model=_model(directory, **model) if model else None,
                children=tuple(_children(identity, children or {})),
            )
    with forgiving(f"writing {directory / FILE}"):
        write_json(directory / FILE, record)


def _earlier_record(config: TrackingConfig, directory: Path) -> Record | None:
    """The record that an earlier attempt has written, if it is readable and of the same store and experiment."""
    try:
        record = load(directory)
    except UserError:  # a power cut
        return None
    if record is None or record.run is None:
        return None
    place = (record.run.tracking_uri, record.run.experiment)
    return record if place == (recorded(default_uri()), config.experiment) else None


def _attached(directory: Path) -> RunIdentity | None:
    identity = identity_of(directory)
    if identity is None:
        return None
    return replace(identity, tracking_uri=recorded(uri_to_attach(identity.tracking_uri, directory)))


def _new_identity(config: TrackingConfig, name: str, run_key: str | None) -> RunIdentity:
    return RunIdentity(
        key=run_key or uuid.uuid4().hex,
        experiment=config.experiment,
        name=name,
        started_ms=time.time_ns() // 1_000_000,
        tracking_uri=recorded(default_uri()),
        experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID") if os.environ.get("MLFLOW_RUN_ID") else None,
    )


def _origin() -> dict[str, str]:
    """Tags of a new run: the versions of code and data, and the parent run.

    Kubeflow's MLflow plugin creates a run for the task and sets MLFLOW_RUN_ID to its id.
    """
    outer = os.environ.get("MLFLOW_RUN_ID")
    return {**version_tags(), **({PARENT_TAG: outer, TASK_TAG: outer} if outer else {})}


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    return {key_name(key): encode_number(value) for key, value in values.items()}


def _dataset(name: str, digest: str, source: str, profile: Mapping[str, Any] | None = None) -> Dataset:
    """MLflow stores only 36 characters of the digest; the profile holds the full digest."""
    facts = plain({**to_mapping(dict(profile or {})), "digest": digest})
    return Dataset(name=name[:500], digest=digest[:DIGEST_LENGTH], source=redact_uri(source), profile=facts)


def _files(directory: Path, files: Mapping[str, Sequence[Path]]) -> Iterator[File]:
    """Every file with its hash, including the files of folders."""
    for to, paths in files.items():
        for path in paths:
            candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in filter(Path.is_file, candidates):
                below = file.parent.relative_to(path).as_posix() if path.is_dir() else "."
                yield _file(directory, file, to if below == "." else f"{to}/{below}")


def _tables(directory: Path, tables: Mapping[str, Path]) -> Iterator[File]:
    for artifact, path in tables.items():
        yield replace(_file(directory, path, artifact), table=True)


def _file(directory: Path, path: Path, to: str) -> File:
    return File(path=Path(os.path.relpath(path, directory)).as_posix(), to=to, sha256=sha256_file(path))


def _model(
    directory: Path,
    *,
    registered_name: str | None = None,
    gate: Any = None,
    metrics: Mapping[str, float] | None = None,
    version_tags: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Model:
    if not (directory / METADATA).is_file():
        raise FileNotFoundError(f"{directory} is not an exported model: {METADATA} is missing")
    return Model(
        registered_name=registered_name,
        gate=plain(to_mapping(gate or {})),
        metrics=_numbers(metrics or {}),
        version_tags=texts(version_tags or {}, TAG_LENGTH),
        metadata=plain(to_mapping(dict(metadata or {}))),
        pip_requirements=tuple(requirements()),
    )


def _children(parent: RunIdentity, children: Mapping[str, Path]) -> Iterator[RunIdentity]:
    for name, place in children.items():
        child = _attached(place)
        if child is None:
            continue
        if child.tracking_uri == parent.tracking_uri:
            yield replace(child, name=name)
        else:
            logger.warning("MLflow: %s was tracked in %s, not in %s", place, child.tracking_uri, parent.tracking_uri)


@contextlib.contextmanager
def forgiving(what: str) -> Iterator[None]:
    """Turn any error into a warning: tracking must not stop the work."""
    try:
        yield
    except Exception as error:
        logger.warning("MLflow: %s failed: %s", what, clean(error))
