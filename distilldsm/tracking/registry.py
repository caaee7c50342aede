"""The model registry: versions, the aliases `challenger` and `champion`, and what decides who is champion.

The decision is made here, where the registry can be asked, so that a record delivered late is judged against the
champion of that time. Every step may be repeated: a version that has been judged is not judged again.
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
_TURN_S, _GLANCE_S = 15.0, 0.5


def register(store: Store, model: Model, *, run_id: str, model_id: str, record_id: str, source: Path) -> str:
    """Register a logged model as a version, name it challenger, and champion where it passes the gate.

    Args:
        record_id: names the record for ever: a second attempt finds the first one's version by it.
        source: the exported model's directory; holds `scores.json`, or the model is not comparable.

    Returns:
        What became of it, one line.
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
        # Where all who register share a lock it orders them; else each waits for the versions before it.
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
    """A local registry looks for the logged model in MLflow's default store, whatever store the client is of."""
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
    """Wait until the versions registered just before this one have been judged, so that no two are judged at once.

    A server has no lock and no "set if unchanged", but it numbers the versions: that is the order. One that stays
    unjudged (its process was killed) is waited for by those that come within `_TURN_S` seconds, and only so long.
    """
    for _ in range(round(_TURN_S / _GLANCE_S)):
        found = client.search_model_versions(f'name = "{name}"', max_results=100, order_by=["version_number DESC"])
        own = next((version.creation_timestamp for version in found if str(version.version) == number), 0)
        ahead = any(
            int(version.version) < int(number)
            and RECORD_TAG in version.tags
            and JUDGED_TAG not in version.tags
            and own - version.creation_timestamp < 1000 * _TURN_S
            for version in found
        )
        if not ahead:
            return
        time.sleep(_GLANCE_S)


def _name_challenger(client: MlflowClient, name: str, number: str) -> None:
    """The newest version is the challenger; an older record delivered again does not take the name back."""
    now = _aliases(client, name).get(CHALLENGER)
    if now is None or int(now) < int(number):
        client.set_registered_model_alias(name, CHALLENGER, number)


def _judge(client: MlflowClient, model: Model, number: str, run_id: str, scores: Scores | None) -> Mapping[str, str]:
    """Decide, write it down, name the champion: in this order, so that what is interrupted can be taken up again."""
    name = str(model.registered_name)
    for _ in range(_ATTEMPTS):
        champion = _champion(client, name)
        if champion is not None and str(champion.version) == number:
            # An attempt before this one was interrupted after the last step; its tags are whole.
            tags = dict(champion.tags or {})
            break
        decision = _decide(client, model, scores, champion)
        tags = decision.tags()
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)
        if not decision.promoted:
            break
        if _aliases(client, name).get(CHAMPION) == decision.champion:  # nobody else became champion meanwhile
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
    theirs = None if champion is None else registered_scores(client, champion)
    version = None if champion is None else str(champion.version)
    return decide(scores, theirs, gate_from(model.gate), version=version)


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in (client.get_registered_model(name).aliases or {}).items()}


def _champion(client: MlflowClient, name: str) -> Any:
    """The champion's version; None where there is none, or it has been deleted and the alias was left behind."""
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
    """The scores that travel with a registered version; None where it carries none."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    model_id = str(version.source or "").removeprefix("models:/")
    if not model_id.startswith("m-"):  # registered by something else than this
        return None
    try:
        location = client.get_logged_model(model_id).artifact_location
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    files = get_artifact_repository(location, tracking_uri=client.tracking_uri)
    # Asked for first: stores say in different ways that a file is missing, and "away" must not pass for "missing".
    if SCORES not in {file.path for file in files.list_artifacts(None)}:
        return None
    with tempfile.TemporaryDirectory(prefix="distilldsm-") as folder:
        return load_scores(Path(files.download_artifacts(SCORES, folder)))
