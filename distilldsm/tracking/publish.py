"""Copies the contents of an output directory to MLflow: each item once, in order. May be repeated until all is sent.

Publishing writes nothing into the directory. It asks MLflow what is already there: it finds the run by its key (a tag),
metrics by their steps, and files by their names and sizes. At the end it sets a tag: the record is complete.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json, sha256_file, sha256_json
from distilldsm.tracking.addresses import live_uri
from distilldsm.tracking.contents import lines_of, numbers_of, table_of
from distilldsm.tracking.logged_model import log_model
from distilldsm.tracking.record import FILE, PARENT_TAG, SYSTEM, TASK_TAG, File, Record, RunIdentity, load
from distilldsm.tracking.store import Store, explain, patience, run_lock
from distilldsm.tracking.values import clean, key_name

PUBLISHED_TAG = "distilldsm.published"
METRICS_PER_BATCH = 900
"""MLflow's REST API accepts at most 1,000 items and 1 MB."""
ITEMS_PER_BATCH = 90
"""Parameters or tags; the API accepts at most 100."""
_MANY_PROBLEMS = 5
_NO_METRICS = ("epoch", "unix_seconds")
_TOPS = ("models/*", "evaluation/*", "export/*", "cross_validation")

open_store = functools.lru_cache(maxsize=4)(Store)
"""Opening a store is slow, therefore cached."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one attempt to publish an output."""

    directory: Path
    run_id: str | None = None
    is_complete: bool = False
    """MLflow holds everything in the record."""
    problems: tuple[str, ...] = ()
    """Items that MLflow refused, or why nothing was sent. The next attempt sends them again."""
    notes: tuple[str, ...] = ()
    """Items that can never be sent, such as a deleted file."""
    registration: str | None = None
    """The result of registering the exported model, one line."""
    is_away: bool = False
    """The store did not answer at all."""


def publish(directory: Path, *, to: str | None = None) -> Outcome:
    """Publish one output. MLflow's errors are listed in the outcome, not raised.

    Args:
        to: address of the store to use instead of the recorded one.
    """
    return Publisher(directory, to=to).publish()


def known_outputs(root: Path = Path()) -> list[Path]:
    """Outputs below `root` with a tracking record, in the order of the stages, including unfinished ones."""
    patterns = [f"{up}{top}/{FILE}" for top in _TOPS for up in ("", "*/", "*/*/")]
    outputs = [path.parent for pattern in patterns for path in sorted(root.glob(pattern))]
    return [path for path in dict.fromkeys(outputs) if not path.name.endswith(".old")]


def publish_all(directories: Iterable[Path], *, to: str | None = None) -> Iterator[Outcome]:
    """Publish outputs one after the other. After a store has failed to answer, its other outputs are not tried.

    The output of a training that runs on this machine is skipped: the training publishes it itself.
    """
    away: dict[str, Outcome] = {}
    for directory in directories:
        publisher = Publisher(directory, to=to)
        if publisher.is_followed:
            outcome = Outcome(directory=directory, notes=("its training is at work, and publishes it",))
        elif publisher.uri is None or publisher.uri not in away:
            outcome = publisher.publish()
            if outcome.is_away and publisher.uri is not None:
                away[publisher.uri] = outcome
        else:
            outcome = replace(away[publisher.uri], directory=directory, run_id=None)
        yield outcome


class Publisher:
    """Publishes one output. Each further call of `publish` sends only what is new.

    Args:
        to: address of the store to use instead of the recorded one.
        stores: opens the store of an address.
    """

    def __init__(self, directory: Path, *, to: str | None = None, stores: Callable[[str], Store] = open_store) -> None:
        self.directory, self._to, self._stores = directory, to, stores
        self._run: Any = None
        self._sent: set[str] = set()
        self._steps: dict[str, set[int]] = {}
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._listings: dict[str, dict[str, int]] | None = None
        self._uploaded: dict[str, int] = {}
        self._registration: str | None = None

    @property
    def uri(self) -> str | None:
        """The store's address; None for an output without a tracked run."""
        record = self._readable()
        if record is None or record.run is None:
            return None
        return self._to or live_uri(record.run.tracking_uri, self.directory)

    @property
    def is_followed(self) -> bool:
        """Whether the process that writes the output is running. It then publishes the output itself."""
        record = self._readable()
        return record is not None and record.is_at_work(self.directory) is True

    def _readable(self) -> Record | None:
        with contextlib.suppress(UserError):
            return load(self.directory)
        return None

    def is_published(self) -> bool:
        """Whether MLflow holds everything in the record. Sends nothing.

        Raises:
            Exception: the store does not answer.
        """
        record = load(self.directory)
        if record is None or record.run is None:
            return True
        run = self._stores(str(self.uri)).find_run(self._asked_for(record.run))
        return run is not None and run.data.tags.get(_mark(record)) == _digest(record)

    def publish(self, *, is_abandoned: bool = False, patience_s: float = 60) -> Outcome:
        """Send what MLflow does not have yet.

        Args:
            is_abandoned: the process that wrote the output has died. An unfinished run then ends as KILLED.
            patience_s: seconds to wait for another process that publishes the same run.
        """
        self._problems, self._notes = [], []
        is_complete = is_away = False
        try:
            record = load(self.directory)
            if record is None or (identity := record.run) is None:
                return Outcome(directory=self.directory, is_complete=True)
            if record.status == "RUNNING" and (is_abandoned or record.is_at_work(self.directory) is False):
                record = replace(record, status="KILLED")
            with run_lock(identity.key, patience_s):
                is_complete = self._send_new(record, identity)
        except Timeout:
            self._problems.append("another process is publishing the same run")
        except UserError as error:
            self._problems.append(clean(str(error)))
        except Exception as error:
            is_away, self._run = True, None
            self._problems.append(_error_text(error, self.uri))
        return Outcome(
            directory=self.directory,
            run_id=None if self._run is None else str(self._run.info.run_id),
            is_complete=is_complete,
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            registration=self._registration,
            is_away=is_away,
        )

    def _send_new(self, record: Record, identity: RunIdentity) -> bool:
        """Send what is new, in order. Returns True when the record is final and MLflow holds all of it."""
        store = self._stores(self._to or live_uri(identity.tracking_uri, self.directory))
        self._store, self._client = store, store.client
        mark, digest = _mark(record), _digest(record)
        if self._run is None:
            self._run = store.run(self._asked_for(identity), is_placeholder=record.adds)
            self._sent.clear()
            self._steps.clear()
            # Another record of the same kind may have sent a file of the same name and size: then send all files again.
            kind = mark.rpartition(".")[0]
            is_only_record = [tag for tag in self._run.data.tags if tag.startswith(f"{kind}.")] == [mark]
            self._listings = {} if is_only_record else None
        if self._run.data.tags.get(mark) == digest:
            return True
        run_id = self._run.info.run_id
        if not record.adds and record.status == "RUNNING" and self._run.info.status != "RUNNING":
            self._once("status RUNNING", lambda: self._client.update_run(run_id, status="RUNNING"))
        self._once_each("tag", {**record.tags, mark: "begun"}, self._send_tags)
        self._once_each("parameter", record.params, self._send_params)
        if record.dataset is not None:
            self._once("data set", lambda: self._send_dataset(record))
        self._send_history(record)
        self._once("metrics", lambda: self._send_values(record))
        for file in record.files:
            self._once(f"file {file.to} {file.path}", functools.partial(self._send_file, file))
        self._once(f"files {sorted(self._uploaded)}", lambda: store.check_artifacts(run_id, self._uploaded))
        for child in record.children:
            self._once(f"child {child.name}", functools.partial(self._send_child, child))
        if record.model is not None:
            self._once("model", lambda: self._send_model(record))
        if record.status == "RUNNING":
            return False
        if not record.adds:
            self._once(
                f"status {record.status}",
                lambda: self._client.set_terminated(run_id, record.status, max(record.time_ms, identity.started_ms)),
            )
        if self._problems or record.status == "KILLED":
            return False
        self._client.set_tag(run_id, mark, digest)
        return True

    def _asked_for(self, identity: RunIdentity) -> RunIdentity:
        """The identity by which the store finds the run. Another store has never heard of the recorded ids."""
        return replace(identity, id=None, experiment_id=None) if self._to else identity

    def _once(self, what: str, send: Callable[[], object]) -> bool:
        """Send an item, unless this process has sent it before. If the store refuses only this item, note the problem.

        Raises:
            Exception: the store does not answer at all.
        """
        if what in self._sent:
            return True
        try:
            send()
        except Exception as error:
            if not self._store.reachable():
                raise
            self._problems.append(f"{what}: {_error_text(error, self.uri)}")
            return False
        self._sent.add(what)
        return True

    def _once_each(self, what: str, values: Mapping[str, str], send: Callable[[Mapping[str, str]], object]) -> None:
        todo = [(key, value) for key, value in values.items() if f"{what} {key}={value}" not in self._sent]
        for start in range(0, len(todo), ITEMS_PER_BATCH):
            self._in_halves(what, todo[start : start + ITEMS_PER_BATCH], lambda part: send(dict(part)))
            self._sent |= {f"{what} {key}={value}" for key, value in todo[start : start + ITEMS_PER_BATCH]}

    def _in_halves(self, what: str, items: Sequence[Any], send: Callable[[Sequence[Any]], object]) -> None:
        """Send items together. If the store refuses, send each half: one bad item must not block the others."""
        try:
            send(items)
        except Exception as error:
            if not self._store.reachable():
                raise
            if len(items) == 1 or len(self._problems) >= _MANY_PROBLEMS:
                name = f" {items[0][0]}" if isinstance(items[0], tuple) else ""
                self._problems.append(f"{what}{name}: {_error_text(error, self.uri)}")
                return
            half = len(items) // 2
            self._in_halves(what, items[:half], send)
            self._in_halves(what, items[half:], send)

    def _send_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in values.items() if self._run.data.tags.get(key) != value]
        if tags:
            self._client.log_batch(self._run.info.run_id, tags=tags, synchronous=True)

    def _send_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in values.items() if self._run.data.params.get(key) != value]
        if params:
            self._client.log_batch(self._run.info.run_id, params=params, synchronous=True)

    def _send_dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = record.dataset
        assert data is not None
        dataset = Dataset(
            name=data.name,
            digest=data.digest,
            source_type="external",
            source=json.dumps({"uri": data.source}),
            profile=json.dumps(data.profile),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._run.info.run_id, [DatasetInput(dataset, tags)])

    def _send_history(self, record: Record) -> None:
        """Send the metrics of each epoch and the machine's load. An epoch that was trained twice is sent once."""
        from mlflow.entities import Metric

        rows = []
        if record.history is not None and (self.directory / record.history).is_file():
            for row in read_json(self.directory / record.history):
                numbers = {key: value for key, value in row.items() if key not in _NO_METRICS}
                time_ms = round(1000 * row.get("unix_seconds", record.time_ms / 1000))
                rows.append((time_ms, int(row["epoch"]), dict(numbers_of(numbers))))
        if record.history is not None:
            rows += [
                (int(row["time_ms"]), int(row["step"]), row["values"]) for row in lines_of(self.directory / SYSTEM)
            ]
        metrics = [
            Metric(key_name(key), float(value), time_ms, step)
            for time_ms, step, values in rows
            for key, value in values.items()
            if step not in self._known_steps(key_name(key))
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._in_halves("metrics", metrics[start : start + METRICS_PER_BATCH], self._send_metrics)

    def _send_metrics(self, metrics: Sequence[Any]) -> None:
        self._client.log_batch(self._run.info.run_id, metrics=list(metrics), synchronous=True)
        for metric in metrics:
            self._steps[metric.key].add(metric.step)

    def _known_steps(self, key: str) -> set[int]:
        if key not in self._steps:
            known = key in self._run.data.metrics
            history = self._client.get_metric_history(self._run.info.run_id, key) if known else []
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]

    def _send_values(self, record: Record) -> None:
        """Send metrics without an epoch, at step 0, if MLflow's latest value differs."""
        from mlflow.entities import Metric

        known, run_id = self._run.data.metrics, self._run.info.run_id

        def time_ms(key: str) -> int:
            """MLflow shows the value with the latest time, also if the clock went back since the last one."""
            earlier = self._client.get_metric_history(run_id, key) if key in known else []
            return max(record.time_ms, *(one.timestamp + 1 for one in earlier), 0)

        metrics = [
            Metric(key, float(value), time_ms(key), 0)
            for key, value in record.metrics.items()
            if str(known.get(key)) != str(float(value))
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH], synchronous=True)

    def _send_file(self, file: File) -> None:
        path = self.directory / file.path
        if not path.is_file() or sha256_file(path) != file.sha256:
            self._notes.append(f"{file.path} was deleted or has changed since it was recorded")
            return
        run_id = self._run.info.run_id
        if file.table:
            if self._size_in_store(file.to) is None:
                with patience():
                    self._client.log_dict(run_id, table_of(path), file.to)
            self._store.announce_table(run_id, file.to)
        elif self._size_in_store(f"{file.to}/{path.name}") != path.stat().st_size:
            with patience():
                self._client.log_artifact(run_id, str(path), file.to)
            self._uploaded[f"{file.to}/{path.name}"] = path.stat().st_size

    def _size_in_store(self, artifact: str) -> int | None:
        """Size in bytes of an artifact that an earlier attempt has sent, else None."""
        if self._listings is None:
            return None
        folder = artifact.rpartition("/")[0]
        if folder not in self._listings:
            self._listings[folder] = self._store.artifact_sizes(self._run.info.run_id, folder)
        return self._listings[folder].get(artifact)

    def _send_child(self, child: RunIdentity) -> None:
        """Make this run the parent of `child`. If the child has no run in MLflow yet, create it; it is filled later."""
        run = self._store.run(child, is_placeholder=True)
        if TASK_TAG not in run.data.tags:
            self._client.set_tag(run.info.run_id, PARENT_TAG, self._run.info.run_id)

    def _send_model(self, record: Record) -> None:
        try:
            self._registration = log_model(self._store, self._run, record, self.directory)
        except ImportError as error:
            self._notes.append(f"{error.name} is not installed: the exported model is kept as plain artifacts")
            with patience():
                self._client.log_artifacts(self._run.info.run_id, str(self.directory), "exported_model")


def _digest(record: Record) -> str:
    """Hash of the record's contents, without the run's address and id."""
    return sha256_json(replace(record, run=None))[:16]


def _mark(record: Record) -> str:
    """The tag that marks a record as begun or published. Records of the same kind may have files of the same names."""
    kind = record.files[0].to.partition("/")[0] if record.files else "values"
    return f"{PUBLISHED_TAG}.{kind}.{record.id[:12]}"


def _error_text(error: Exception, uri: str | None) -> str:
    return clean(str(error) if isinstance(error, UserError) else str(explain(error, uri or "")))
