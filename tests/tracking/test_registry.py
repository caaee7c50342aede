"""Champion and challenger in a real registry: who wins, late delivery, repeated delivery, a champion that is gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distilldsm.core.files import write_json
from distilldsm.export.scores import SCORES
from distilldsm.tracking import describe, registry
from distilldsm.tracking.publish import Outcome, publish
from distilldsm.tracking.registry import CHALLENGER, CHAMPION, registered_scores
from tests.export.test_gate import scored
from tests.tracking.store import CONFIG, export_model, run_of

NAME = "m"


class Exports:
    """Exports models one after another, each a run of its own."""

    def __init__(self, place: Path, client: Any) -> None:
        self.place, self.client, self.count = place, client, 0

    def describe(
        self, *scores: float, gate: dict | None = None, with_scores: bool = True, tags: dict | None = None, **facts: Any
    ) -> Path:
        """One more export, not published."""
        self.count += 1
        export = export_model(self.place / f"export/{self.count}")
        write_json(export / SCORES, replace(scored(*scores), **facts))
        if not with_scores:
            (export / SCORES).unlink()
        gate = {"min_dice": 0.0, "min_cases": 1, **(gate or {})}
        metrics = {"test_dice_mean": sum(scores) / max(len(scores), 1)}
        model = {
            "registered_name": NAME,
            "gate": gate,
            "metrics": metrics,
            "version_tags": {"fold": 0, "data_hash": "d", **(tags or {})},
        }
        describe(CONFIG, export, name=export.name, model=model)
        return export

    def __call__(self, *scores: float, **more: Any) -> Outcome:
        outcome = publish(self.describe(*scores, **more))
        assert (outcome.is_complete, outcome.problems) == (True, ())
        return outcome

    @property
    def aliases(self) -> dict[str, str]:
        return {k: str(v) for k, v in self.client.get_registered_model(NAME).aliases.items()}

    def tags(self, version: int) -> dict[str, str]:
        return dict(self.client.get_model_version(NAME, str(version)).tags)


def logged(client: Any, version: Any) -> Any:
    return client.get_logged_model(version.source.removeprefix("models:/"))


@pytest.fixture
def export(place, client) -> Exports:
    return Exports(place, client)


def test_the_first_is_champion_and_says_so_everywhere(export, client):
    run = export(0.5, 0.7)
    assert export.aliases == {CHALLENGER: "1", CHAMPION: "1"}
    assert run.registration == "registered as m version 1, champion: there was no champion"
    tags = export.tags(1)
    assert tags.items() >= {
        "gate.decision": "champion", "gate.outcome": "first", "gate.champion": "none", "fold": "0", "data_hash": "d",
    }.items()  # fmt: skip
    of_run = client.get_run(run.run_id).data.tags
    assert of_run["gate.decision"] == "champion"
    assert of_run["gate.version"] == "m/1"
    version = client.get_model_version_by_alias(NAME, CHAMPION)
    assert logged(client, version).metrics[0].key == "test_dice_mean"
    assert registered_scores(client, version) == scored(0.5, 0.7)
    assert client.get_run(run.run_id).data.metrics == {"test_dice_mean": 0.6}


def test_who_is_better_takes_over_and_who_is_not_does_not(export, client):
    export(0.5, 0.7)
    export(0.4, 0.6)
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "1"}
    assert export.tags(2)["gate.outcome"] == "not_better"
    assert float(export.tags(2)["gate.difference"]) == pytest.approx(-0.1)
    export(0.5, 0.7)
    assert export.aliases == {CHALLENGER: "3", CHAMPION: "1"}
    assert float(export.tags(3)["gate.difference"]) == 0
    run = export(0.6, 0.8)
    assert export.aliases == {CHALLENGER: "4", CHAMPION: "4"}
    assert export.tags(4).items() >= {"gate.champion": "1", "gate.cases": "2", "gate.metric": "dice"}.items()
    assert run.registration.startswith("registered as m version 4, champion: better than version 1")
    assert client.get_run(run.run_id).data.tags["gate.p"] == export.tags(4)["gate.p"] == "0.25"
    run = export(0.7, 0.9, gate={"metric": "dice", "margin": 0.2, "p": None})
    assert export.aliases == {CHALLENGER: "5", CHAMPION: "4"}
    assert "challenger: not better by more than 0.2 than version 4" in run.registration
    export(0.7, 0.9, gate={"metric": "dice", "margin": 0.0, "p": 0.05})
    assert export.tags(6)["gate.outcome"] == "not_significant"
    export(0.7, 0.9, gate={"metric": "hd95_mm", "margin": 0.0, "p": None})
    assert export.aliases[CHAMPION] == "4"  # the same numbers as distances are worse


def fold_of(cv: str, fold: int, *scores: float, folds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Keywords for one fold of a cross-validation; its cases are its own."""
    rows = scored(*scores).cases
    cases = {f"fold{fold}-{case}": row for case, row in rows.items()}
    return {"fold": fold, "cases": cases, "tags": {"fold": fold, "cross_validation": cv, "folds": list(folds)}}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_folds_of_a_cross_validation_are_judged_once_and_together(export, client, order):
    """The fold that registers first must not become champion because there is none yet."""
    means = {0: (0.3, 0.5), 1: (0.7, 0.9)}
    first = export(**fold_of("a", order[0], *means[order[0]]))
    assert export.aliases == {CHALLENGER: "1"}
    assert f"challenger: the champion is decided when the other folds are registered: export fold {order[1]}" in str(
        first.registration
    )
    last = export(**fold_of("a", order[1], *means[order[1]]))
    best = str(1 + order.index(1))
    assert export.aliases == {CHALLENGER: "2", CHAMPION: best}
    for number in (1, 2):
        tags = export.tags(number)
        assert tags["gate.decision"] == (CHAMPION if str(number) == best else CHALLENGER)
        assert tags["gate.reason"] == (
            f"fold 1 (version {best}) is the best of folds 0, 1, together: there was no champion"
        )
        run = client.get_run(client.get_model_version(NAME, str(number)).run_id)
        assert run.data.tags["gate.decision"] == tags["gate.decision"]
    assert tags["gate.reason"] in str(last.registration)

    # Better together, though its best fold is worse than the champion.
    export(**fold_of("b", 0, 0.7, 0.7))
    export(**fold_of("b", 1, 0.6, 0.6))
    assert export.aliases == {CHALLENGER: "4", CHAMPION: "3"}
    assert "mean Dice difference +0.0500 over 4 cases" in export.tags(4)["gate.reason"]
    # Worse together, though one fold is the best of all.
    export(**fold_of("c", 0, 1.0, 1.0))
    export(**fold_of("c", 1, 0.2, 0.2))
    assert export.aliases == {CHALLENGER: "6", CHAMPION: "3"}
    # The mean of all folds must reach the gate's minimum.
    export(**fold_of("d", 0, 1.0, 1.0), gate={"min_dice": 0.95})
    export(**fold_of("d", 1, 0.8, 0.8), gate={"min_dice": 0.95})
    assert export.tags(8)["gate.outcome"] == "not_good_enough"


def test_a_cross_validation_and_a_single_fold_are_compared_on_the_fold_that_both_have(export):
    alone = {key: value for key, value in fold_of("x", 1, 0.5, 0.7).items() if key != "tags"}
    export(**alone, tags={"fold": 1})
    export(**fold_of("a", 0, 0.1, 0.1))
    export(**fold_of("a", 1, 0.6, 0.8))
    assert export.aliases == {CHALLENGER: "3", CHAMPION: "3"}
    assert "over 2 cases" in export.tags(3)["gate.reason"]
    export(**{**alone, "cases": fold_of("x", 1, 0.9, 0.9)["cases"]}, tags={"fold": 1})
    assert export.aliases[CHAMPION] == "4"
    export(**{**alone, "fold": 2}, tags={"fold": 2})
    assert "version 4 was scored on fold 1, this one 2" in export.tags(5)["gate.reason"]


def test_a_decision_that_was_interrupted_is_made_by_the_next_delivery(export, client, monkeypatch):
    export(**fold_of("a", 0, 0.5))
    last = export.describe(**fold_of("a", 1, 0.9))
    whole = registry._decide
    monkeypatch.setattr(registry, "_decide", lambda *_: (_ for _ in ()).throw(ConnectionError("cut")))
    publish(last)
    assert export.aliases == {CHALLENGER: "2"}
    monkeypatch.setattr(registry, "_decide", whole)
    assert "version 2, champion: fold 1 (version 2) is the best" in str(publish(last).registration)
    assert publish(last).is_complete
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "2"}


@pytest.mark.parametrize("change", [{"fold": 1}, {"data_hash": "other"}, {"scores": (0.9, 0.9, 0.9)}])
def test_what_cannot_be_compared_stays_challenger(export, change):
    export(0.1, 0.2)
    run = export(*change.pop("scores", (0.9, 0.9)), **change)
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "1"}
    assert export.tags(2)["gate.outcome"] == "not_comparable"
    assert "not comparable" in run.registration
    assert "set the alias champion by hand" in run.registration


def test_a_champion_without_scores_is_not_beaten(export, client):
    export(0.1, with_scores=False)
    assert export.tags(1)["gate.outcome"] == "not_good_enough"
    assert export.aliases == {CHALLENGER: "1"}
    client.set_registered_model_alias(NAME, CHAMPION, "1")  # the hint that was named
    export(0.9)
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "1"}
    assert "version 1 has no scores per case" in export.tags(2)["gate.reason"]
    client.set_registered_model_alias(NAME, CHAMPION, "2")  # the hint that was named
    export(0.95)
    assert export.aliases[CHAMPION] == "3"


def test_scores_of_a_damaged_file_are_none(export, client):
    export(0.1)
    version = client.get_model_version_by_alias(NAME, CHAMPION)
    location = logged(client, version).artifact_location
    (Path(location.removeprefix("file://")) / SCORES).write_text('{"schema_version": 1, "fold": "one"}')
    assert registered_scores(client, version) is None
    assert registered_scores(client, SimpleNamespace(source="runs:/0/model")) is None
    assert registered_scores(client, SimpleNamespace(source="models:/m-" + "0" * 32)) is None


def test_a_deleted_champion_leaves_the_place_free(export, client):
    export(0.9)
    client.delete_model_version(NAME, "1")
    run = export(0.1)
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "2"}
    assert "there was no champion" in run.registration


def test_an_alias_of_a_version_that_is_gone_is_no_champion(export, client, monkeypatch):
    export(0.9)
    sound = registry._aliases
    monkeypatch.setattr(registry, "_aliases", lambda *a: {**sound(*a), CHAMPION: "77"} if export.count == 2 else {})
    dropped = []
    monkeypatch.setattr(type(client), "delete_registered_model_alias", lambda *a: dropped.append(a[1:]))
    assert registry._champion(client, NAME) is None
    export.count = 2
    assert registry._champion(client, NAME) is None
    assert dropped == [(NAME, CHAMPION)]


def test_a_late_record_is_judged_when_it_comes_and_once(export, client):
    """What was champion at the export does not matter, what is champion at the delivery does."""
    export(0.5)
    late = export.describe(0.6)
    export(0.7)
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "2"}
    outcome = publish(late)
    assert export.aliases == {CHALLENGER: "3", CHAMPION: "2"}
    assert outcome.registration.startswith("registered as m version 3, challenger: not better")
    export(0.8)
    before = {version: export.tags(version) for version in range(1, 5)}
    forget(client, late)
    assert publish(late).is_complete
    assert export.aliases == {CHALLENGER: "4", CHAMPION: "4"}
    assert {version: export.tags(version) for version in range(1, 5)} == before


def forget(client: Any, export: Path) -> None:
    """As after a crash between the last record's arrival and the tag that says so."""
    (run,) = client.search_runs(["1"], f"tags.`distilldsm.run_key` = '{run_of(export)['key']}'")
    for tag in run.data.tags:
        if tag.startswith("distilldsm.published"):
            client.delete_tag(run.info.run_id, tag)


@pytest.mark.parametrize("step", ["set_model_version_tag", "set_registered_model_alias", "set_tag"])
@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_decision_is_taken_up_again(export, client, monkeypatch, step, call):
    """The process dies before or after any of the registry's writes."""
    export(0.5)
    late = export.describe(0.6)
    sound: Callable = getattr(type(client), step)
    calls = []

    def dying(self, *args):
        calls.append(args)
        if call % 2:
            sound(self, *args)
        if len(calls) == 1 + call // 2:
            raise ConnectionError("away")
        return None if call % 2 else sound(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(client), step, dying)
        patch.setattr("distilldsm.tracking.store.Store.reachable", lambda self: False)
        outcome = publish(late)
    assert outcome.is_away, calls
    run = publish(late)
    assert run.is_complete
    assert export.aliases == {CHALLENGER: "2", CHAMPION: "2"}
    assert export.tags(2).items() >= {"gate.outcome": "better", "gate.champion": "1", "gate.judged": "true"}.items()
    assert client.get_run(run.run_id).data.tags["gate.decision"] == "champion"
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 2


def test_somebody_who_becomes_champion_meanwhile_is_compared_with_too(export, client, monkeypatch):
    export(0.5)
    export(0.4)
    sound, once = registry._decide, []

    def deciding(*args):
        decision = sound(*args)
        if not once:
            once.append(client.set_registered_model_alias(NAME, CHAMPION, "2"))
        return decision

    monkeypatch.setattr(registry, "_decide", deciding)
    export(0.6)
    assert export.aliases[CHAMPION] == "3"
    assert export.tags(3)["gate.champion"] == "2"


def test_versions_are_judged_in_the_order_of_their_numbers(monkeypatch):
    """Version 3 waits for 2, which another process is judging; not for 1, whose process was killed long ago."""

    def version(number: int, seconds: float, **tags: str) -> SimpleNamespace:
        carried = {registry.RECORD_TAG: "s:1", **tags}
        return SimpleNamespace(version=number, creation_timestamp=1000 * seconds, tags=carried)

    judged = {registry.JUDGED_TAG: "true"}
    others = [[version(2, 999)], [version(2, 999)], [version(2, 999, **judged)]]
    asked, slept = [], []

    def search(query: str, **_: Any) -> list[SimpleNamespace]:
        asked.append(query)
        return [version(4, 1001), version(3, 1000), *others[len(asked) - 1], version(1, 1)]

    monkeypatch.setattr(registry.time, "sleep", slept.append)
    registry._wait_for_turn(SimpleNamespace(search_model_versions=search), NAME, "3")
    assert len(asked) == 3
    assert len(slept) == 2
    others = [[version(2, 999)]] * 1000
    registry._wait_for_turn(SimpleNamespace(search_model_versions=search), NAME, "3")
    assert sum(slept[2:]) == registry._TURN_S, "the wait has an end"


def test_a_store_that_is_not_the_default_gets_its_model(export, empty_store, monkeypatch):
    from mlflow import MlflowClient

    shutil.copyfile(empty_store, export.place / "other.db")
    uri = f"sqlite:///{export.place}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    late = export.describe(0.5)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run = publish(late)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert MlflowClient(tracking_uri=uri).get_model_version_by_alias(NAME, CHAMPION).run_id == run.run_id


def test_what_is_not_registered_says_so(place, client):
    export = export_model(place / "export/0")
    describe(CONFIG, export, name="n", model={"registered_name": None})
    assert publish(export).registration is None
    describe(CONFIG, export, name="n", model={"registered_name": "no/name"})
    outcome = publish(export)
    assert (outcome.registration, outcome.is_complete) == (None, False)
    assert outcome.problems[0].startswith("model: ")
