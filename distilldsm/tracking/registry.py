"""The model registry: versions, the aliases `challenger` and `champion`, and the decision on a new champion.

The decision is made while publishing: a model that is published late is compared with the champion of that time. Every
step may be repeated: each version is judged only once.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.export.gate import Decision, decide, gate_from
from distilldsm.export.scores import SCORES, Scores, load_scores
from distilldsm.tracking.record import Model

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from distilldsm.tracking.store import Store

CHALLENGER, CHAMPION = "challenger", "champion"
RECORD_TAG = "distilldsm.record"
JUDGED_TAG = "gate.judged"
_ATTEMPTS = 5
_TURN_S, _POLL_S = 15.0, 0.5


def register(store: Store, model: Model, *, run_id: str, model_id: str, record_id: str, source: Path) -> str:
    """Register a logged model as a version, make it the challenger, and the champion if it passes the gate.

    Args:
        record_id: id of the record. A second attempt uses it to find the version that the first one has registered.
        source: the exported model's directory. Without `scores.json` there the model cannot be compared.

    Returns:
        One line with the result.
    """
    from mlflow.exceptions import MlflowException

    client, name = store.client, str(model.registered_name)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _version(client, model, run_id, model_id, record_id)
    number = str(version.version)
    tags: Mapping[str, str] = dict(version.tags or {})
    if JUDGED_TAG not in tags:
        # A local store has a lock for all registering processes. On a server, each version waits for the earlier ones.
        if store.registry_lock is None:
            _wait_for_turn(client, name, number)
        with store.registry_lock or nullcontext():
            _name_challenger(client, name, number)
            tags = _judge(client, model, number, run_id, load_scores(source / SCORES))
    title = "champion" if tags.get("gate.decision") == CHAMPION else CHALLENGER
    return f"registered as {name} version {number}, {title}: {tags.get('gate.reason', '')}"


def _version(client: MlflowClient, model: Model, run_id: str, model_id: str, record_id: str) -> Any:
    name = str(model.registered_name)
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name and (version.tags or {}).get(RECORD_TAG) == record_id:
            return version
    with _as_default_store(client.tracking_uri):
        return client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            tags={**model.version_tags, RECORD_TAG: record_id},
            model_id=model_id,
            await_creation_for=30,
        )


@contextmanager
def _as_default_store(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default store. A local registry looks for logged models there, not in the client's store."""
    import mlflow
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    if uri.startswith("http") or mlflow.get_tracking_uri() == uri:
        yield
        return
    variable = "MLFLOW_TRACKING_URI"
    before = os.environ.get(variable)
    try:
        with _use_tracking_uri(uri):
            yield
    finally:  # MLflow writes the variable too, and does not put it back
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _wait_for_turn(client: MlflowClient, name: str, number: str) -> None:
    """Wait until the versions registered shortly before this one have been judged: one version is judged at a time.

    A server has no lock and no "set if unchanged", but it numbers the versions. They are judged in this order. The wait
    ends after `_TURN_S` seconds, and ignores versions that were registered more than `_TURN_S` seconds before this one:
    an earlier version may never be judged, because its process was killed.
    """
    for _ in range(round(_TURN_S / _POLL_S)):
        versions = client.search_model_versions(f'name = "{name}"', max_results=100, order_by=["version_number DESC"])
        created_ms = next((one.creation_timestamp for one in versions if str(one.version) == number), 0)
        is_early = any(
            int(version.version) < int(number)
            and RECORD_TAG in version.tags
            and JUDGED_TAG not in version.tags
            and created_ms - version.creation_timestamp < 1000 * _TURN_S
            for version in versions
        )
        if not is_early:
            return
        time.sleep(_POLL_S)


def _name_challenger(client: MlflowClient, name: str, number: str) -> None:
    """Make the version the challenger, unless a newer version already is."""
    challenger = _aliases(client, name).get(CHALLENGER)
    if challenger is None or int(challenger) < int(number):
        client.set_registered_model_alias(name, CHALLENGER, number)


def _judge(client: MlflowClient, model: Model, number: str, run_id: str, scores: Scores | None) -> Mapping[str, str]:
    """Decide, store the decision as tags, then set the champion: in this order, interrupted work can be repeated."""
    name = str(model.registered_name)
    for _ in range(_ATTEMPTS):
        champion = _champion(client, name)
        if champion is not None and str(champion.version) == number:
            # An earlier attempt was interrupted after the last step; its tags are complete.
            tags = dict(champion.tags or {})
            break
        decision = _decide(client, model, scores, champion)
        tags = decision.tags()
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)
        if not decision.promoted:
            break
        if _aliases(client, name).get(CHAMPION) == decision.champion:  # no other version became champion meanwhile
            client.set_registered_model_alias(name, CHAMPION, number)
            break
    else:
        raise RuntimeError(f"the champion of '{name}' changes faster than it can be compared with")
    verdict = {key: value for key, value in tags.items() if key.startswith("gate.")}
    for key, value in {**verdict, "gate.version": f"{name}/{number}"}.items():
        client.set_tag(run_id, key, value)
    client.set_model_version_tag(name, number, JUDGED_TAG, "true")
    return verdict


def _decide(client: MlflowClient, model: Model, scores: Scores | None, champion: Any) -> Decision:
    champion_scores = None if champion is None else registered_scores(client, champion)
    version = None if champion is None else str(champion.version)
    return decide(scores, champion_scores, gate_from(model.gate), version=version)


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in (client.get_registered_model(name).aliases or {}).items()}


def _champion(client: MlflowClient, name: str) -> Any:
    """The champion's version; None if there is none. An alias of a deleted version is removed."""
    from mlflow.exceptions import MlflowException

    number = _aliases(client, name).get(CHAMPION)
    if number is None:
        return None
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.delete_registered_model_alias(name, CHAMPION)
        return None


def registered_scores(client: MlflowClient, version: Any) -> Scores | None:
    """The scores that are stored with a registered version; None if there are none."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    model_id = str(version.source or "").removeprefix("models:/")
    if not model_id.startswith("m-"):  # not registered by distilldsm
        return None
    try:
        location = client.get_logged_model(model_id).artifact_location
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    files = get_artifact_repository(location, tracking_uri=client.tracking_uri)
    # List first: stores report a missing file in different ways, and a store that is down must not look like one.
    if SCORES not in {file.path for file in files.list_artifacts(None)}:
        return None
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        return load_scores(Path(files.download_artifacts(SCORES, folder)))
