"""What an output has to say to MLflow: `tracking.json` in its directory, written by its stage. Imports no MLflow.

The output itself is the journal: the record names what lies in it (a history, files, a model), and copies nothing.
`publish` brings MLflow to that state, as often as it takes.
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
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.mapping import flatten, from_mapping, to_mapping
from distilldsm.models.package import METADATA
from distilldsm.tracking.addresses import default_uri, redact_uri, uri_to_attach
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
"""Beside it where a training is sampled: the machine's load, a JSON object a line."""
PARENT_TAG = "mlflow.parentRunId"
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
logger = logging.getLogger("distilldsm.tracking")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Which run of MLflow an output belongs to."""

    key: str
    """32 hexadecimal digits, a tag of the run: name it before a server has given it an id."""
    experiment: str
    name: str
    started_ms: int
    """Milliseconds since 1970, as all times here."""
    tracking_uri: str
    """The store it was meant for, without user, password and query."""
    id: str | None = None
    """MLflow's id, where it was known when the output was finished."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{32}", self.key):
            raise ConfigError("is no key of a run", seen=self.key, rule="32 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data that a run was made from."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that becomes an artifact of the run."""

    path: str
    """Relative to the output's directory; may lie outside of it (in an input of the stage)."""
    to: str
    """MLflow's folder; for a table the whole name of the artifact."""
    sha256: str
    """What it was when the record was written: a file that has changed since is not sent."""
    table: bool = False
    """A CSV file that MLflow's pages shall show as a table."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The output is an exported model, which becomes a logged and perhaps a registered one."""

    registered_name: str | None = None
    """None does not register."""
    gate: Mapping[str, Any] = field(default_factory=dict)
    """What it must fulfil to become champion, the fields of `distilldsm.export.gate.Gate`."""
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    version_tags: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    pip_requirements: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of `tracking.json`."""

    schema_version: int = 1
    id: str = ""
    """Names this record for ever: what was published of it is known by it."""
    run: RunIdentity | None = None
    """None where nothing is tracked."""
    adds: bool = False
    """Adds to the run of another output, and leaves its status and tags alone."""
    status: Status = "FINISHED"
    time_ms: int = 0
    """When it was written; of its metrics, and the end of the run."""
    process: int | None = None
    """Process id of the writer while the status is RUNNING."""
    host: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    """NaN and the infinities as text."""
    history: str | None = None
    """File with metrics of each epoch, see `publish`."""
    dataset: Dataset | None = None
    files: tuple[File, ...] = ()
    model: Model | None = None
    children: tuple[RunIdentity, ...] = ()
    """Runs that become children of this one."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the record", seen=self.schema_version, rule="1")

    def is_at_work(self) -> bool | None:
        """Whether the process of a record that says RUNNING still lives; None where it ended, or ran elsewhere."""
        if self.status != "RUNNING" or self.process is None or self.host != socket.gethostname():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True


def load(directory: Path) -> Record | None:
    """The record of an output; None where there is none.

    Raises:
        UserError: it cannot be read, or is no record.
    """
    path = directory / FILE
    return from_mapping(Record, read_json(path), where=str(path)) if path.is_file() else None


def identity_of(directory: Path) -> RunIdentity | None:
    """The run that an output belongs to; None where it was made without tracking, or its record is damaged."""
    try:
        record = load(directory)
    except UserError as error:
        logger.warning("MLflow: %s", clean(error))
        return None
    return None if record is None else record.run


def run_key_of(directory: Path) -> str | None:
    """The key of the run that an output belongs to; None where it was made without tracking."""
    identity = identity_of(directory)
    return None if identity is None else identity.key


def run_id_of(directory: Path) -> str:
    """MLflow's id of the run that an output belongs to; empty where that was not known, or nothing is tracked."""
    identity = identity_of(directory)
    return "" if identity is None else identity.id or ""


def is_tracked(config: TrackingConfig | None) -> bool:
    """Whether this process tracks: not in any process of a distributed training but the first."""
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
    """Write the record of an output, whose files lie there already; a failure is a warning, never an error.

    An output that was begun before goes on in its run. MLflow lets no run change its parameters: the first ones stay,
    and others become tags `resumed.NAME`.

    Args:
        config: None, or tracking switched off, writes a record that says nothing.
        run_of: another output, whose run this one adds to; None makes a run of its own.
        name: of a run of its own.
        run_key: of a run of its own, where the same work shall always be the same run.
        params: nested ones get dotted names, lists and null become JSON, over-long values are cut.
        history: name of the file with a record an epoch.
        dataset: `name`, `digest`, `source` and `profile` of the input data.
        files: MLflow's folders to files or folders; those that do not exist are left out.
        tables: names of artifacts (`.json`) to CSV files, which MLflow's pages show as tables.
        model: `registered_name`, `gate`, `metrics`, `version_tags`, `metadata`: `directory` is an exported model.
        children: names to outputs whose runs become children; without a run, or in another store, they are left out.
    """
    record = Record()
    with forgiving(f"describing {directory}"):
        identity = None
        if config is not None and is_tracked(config):
            record = _begun(config, directory) or record
            identity = record.run or (_attached(run_of) if run_of else _new_identity(config, name, run_key))
        if identity is not None:
            own = texts(tags or {}, TAG_LENGTH)
            all_params = texts(flatten(to_mapping(dict(params or {}))), PARAM_LENGTH)
            changed = {k: v for k, v in all_params.items() if record.params.get(k, v) != v}
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
                tags=own if run_of else {**_origin(), **own, **{f"resumed.{k}": v for k, v in changed.items()}},
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


def _begun(config: TrackingConfig, directory: Path) -> Record | None:
    """The record of an output that was begun in the same store and experiment."""
    found = load(directory)
    if found is None or found.run is None:
        return None
    place = (found.run.tracking_uri, found.run.experiment)
    return found if place == (redact_uri(default_uri()), config.experiment) else None


def _attached(directory: Path) -> RunIdentity | None:
    identity = identity_of(directory)
    if identity is None:
        return None
    return replace(identity, tracking_uri=redact_uri(uri_to_attach(identity.tracking_uri)))


def _new_identity(config: TrackingConfig, name: str, run_key: str | None) -> RunIdentity:
    return RunIdentity(
        key=run_key or uuid.uuid4().hex,
        experiment=config.experiment,
        name=name,
        started_ms=time.time_ns() // 1_000_000,
        tracking_uri=redact_uri(default_uri()),
    )


def _origin() -> dict[str, str]:
    """Tags of a new run: the versions of code and data, and the run it is nested in.

    Kubeflow's MLflow plugin makes a run for the task and names it in MLFLOW_RUN_ID.
    """
    outer = os.environ.get("MLFLOW_RUN_ID")
    return {**version_tags(), **({PARENT_TAG: outer} if outer else {})}


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    return {key_name(key): encode_number(value) for key, value in values.items()}


def _dataset(name: str, digest: str, source: str, profile: Mapping[str, Any] | None = None) -> Dataset:
    """MLflow keeps 36 characters of the digest, the profile keeps all of it."""
    facts = plain({**to_mapping(dict(profile or {})), "digest": digest})
    return Dataset(name=name[:500], digest=digest[:DIGEST_LENGTH], source=redact_uri(source), profile=facts)


def _files(directory: Path, files: Mapping[str, Sequence[Path]]) -> Iterator[File]:
    """Every file, those of folders too, with its hash."""
    for to, paths in files.items():
        for path in paths:
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in filter(Path.is_file, found):
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
        raise FileNotFoundError(f"{directory} holds no {METADATA}: it is no exported model")
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
    """Turn any error into a warning: the work matters more than its record."""
    try:
        yield
    except Exception as error:
        logger.warning("MLflow: %s failed: %s", what, clean(error))
