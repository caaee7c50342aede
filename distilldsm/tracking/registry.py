"""The model registry: versions, the aliases `challenger` and `champion`, and the decision on a new champion.

The decision is made while publishing: a model that is published late is compared with the champion of that time. Every
step may be repeated: each version is judged only once. The folds of a cross-validation are judged together, by whoever
registers the last of them: the mean over all their held-out cases decides, and the best fold becomes champion.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilldsm.evaluation.metrics import METRICS
from distilldsm.export.gate import BY_HAND, Decision, Gate, decide, gate_from
from distilldsm.export.scores import SCORES, Scores, load_scores, together
from distilldsm.tracking.record import Model

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from distilldsm.tracking.store import Store

CHALLENGER, CHAMPION = "challenger", "champion"
RECORD_TAG = "distilldsm.record"
JUDGED_TAG = "gate.judged"
CV_TAG = "cross_validation"
"""Tag of a version: id of the cross-validation that it is one fold of. The tag `folds` lists them all."""
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
    if JUDGED_TAG not in version.tags:
        # A local store has a lock for all registering processes. On a server, each version waits for the earlier ones.
        if store.registry_lock is None:
            _wait_for_turn(client, name, number)
        with store.registry_lock or nullcontext():
            _name_challenger(client, name, number)
            version = client.get_model_version(name, number)  # another fold may have decided meanwhile
            if JUDGED_TAG not in version.tags:
                _judge(client, model, number, load_scores(source / SCORES))
    tags = client.get_model_version(name, number).tags
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


def _judge(client: MlflowClient, model: Model, number: str, own: Scores | None) -> None:
    """Decide, store the decision as tags, then set the champion: in this order, interrupted work can be repeated.

    Args:
        number: the version that was registered last.
        own: its scores.
    """
    name, gate = str(model.registered_name), gate_from(model.gate)
    members = _members(client, client.get_model_version(name, number))
    missing = _folds(model.version_tags) - members.keys()
    if missing:
        listed = ", ".join(map(str, sorted(missing)))
        reason = f"the champion is decided when the other folds are registered: export fold {listed} too, {BY_HAND}"
        waits = {"gate.decision": CHALLENGER, "gate.outcome": "waits", "gate.reason": reason}
        _tag(client, members[_fold(model.version_tags)], waits)
        return
    scores = {
        fold: own if str(one.version) == number else registered_scores(client, one) for fold, one in members.items()
    }
    for _ in range(_ATTEMPTS):
        champion = _champion(client, name)
        if champion is not None and champion.version in {one.version for one in members.values()}:
            _tag(client, members[_fold(model.version_tags)], {})
            return  # an earlier attempt was interrupted after the last step; its tags are complete
        decision = _decide(client, scores, champion, gate)
        best = _best(scores, gate)
        for fold, one in members.items():
            _tag(client, one, _tags_of(decision, fold, best, members), is_judged=False)
        if not decision.promoted:
            break
        if _aliases(client, name).get(CHAMPION) == decision.champion:  # no other version became champion meanwhile
            client.set_registered_model_alias(name, CHAMPION, str(members[best].version))
            break
    else:
        raise RuntimeError(f"the champion of '{name}' changes faster than it can be compared with")
    for one in members.values():
        _tag(client, one, {})


def _tag(client: MlflowClient, version: Any, tags: Mapping[str, str], *, is_judged: bool = True) -> None:
    """Set tags of a decision on a version and on its run; the mark that it was judged comes last."""
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.version), key, value)
        client.set_tag(version.run_id, key, value)
    client.set_tag(version.run_id, "gate.version", f"{version.name}/{version.version}")
    if is_judged:
        client.set_model_version_tag(version.name, str(version.version), JUDGED_TAG, "true")


def _fold(tags: Mapping[str, str]) -> int:
    return int(tags.get("fold", 0))


def _folds(tags: Mapping[str, str]) -> set[int]:
    """The folds that are judged together: those of the version's cross-validation, or its own."""
    return set(json.loads(tags["folds"])) if CV_TAG in tags else {_fold(tags)}


def _members(client: MlflowClient, version: Any) -> dict[int, Any]:
    """Fold to version, for the versions of the same cross-validation: this one, and the newest of each other fold."""
    members: dict[int, Any] = {}
    if CV_TAG in version.tags:
        condition = f"name = '{version.name}' and tags.{CV_TAG} = '{version.tags[CV_TAG]}'"
        found = client.search_model_versions(condition, max_results=1000)
        members = {_fold(one.tags): one for one in sorted(found, key=lambda one: int(one.version))}
    return {**members, _fold(version.tags): version}


def _decide(client: MlflowClient, scores: Mapping[int, Scores | None], champion: Any, gate: Gate) -> Decision:
    """Compare with the champion, or all folds of its cross-validation, on the folds that both have."""
    if champion is None:
        return decide(_together(scores), None, gate, version=None)
    theirs = {fold: registered_scores(client, one) for fold, one in _members(client, champion).items()}
    shared = scores.keys() & theirs.keys()
    if not shared:
        return decide(_together(scores), registered_scores(client, champion), gate, version=str(champion.version))
    ours, theirs = ({fold: every[fold] for fold in shared} for every in (scores, theirs))
    return decide(_together(ours), _together(theirs), gate, version=str(champion.version))


def _together(scores: Mapping[int, Scores | None]) -> Scores | None:
    known = [one for one in scores.values() if one is not None]
    return together(known) if len(known) == len(scores) else None


def _best(scores: Mapping[int, Scores | None], gate: Gate) -> int:
    """The fold with the best mean over its cases."""
    badness: dict[int, float] = {}
    for fold, one in scores.items():
        values = list(one.per_case(gate.metric).values()) if one is not None else []
        badness[fold] = float(METRICS[gate.metric].badness(np.asarray(values)).mean()) if values else math.inf
    return min(sorted(badness), key=lambda fold: badness[fold])


def _tags_of(decision: Decision, fold: int, best: int, members: Mapping[int, Any]) -> dict[str, str]:
    """The decision as the tags of one version. Of several folds only the best one can be champion."""
    tags = decision.tags()
    if len(members) == 1:
        return tags
    which = f"fold {best} (version {members[best].version}) is the best of folds {', '.join(map(str, sorted(members)))}"
    decided = tags["gate.decision"] if fold == best else CHALLENGER
    return {**tags, "gate.decision": decided, "gate.reason": f"{which}, together: {decision.reason}"}


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
