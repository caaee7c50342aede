"""Delivery: every record once and in order, whatever fails in between."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.tracking import delivery
from distilldsm.tracking.delivery import drain, live_uri, redact, replay_all
from distilldsm.tracking.denial import DeniedError
from distilldsm.tracking.journal import JournalWriter, State, delivery_lock, pending, segments, writer_identity
from tests.tracking.conftest import FakeSink


def opened(
    directory: Path, *, uri: str = "http://fake", role: str = "train", run_id: str | None = None
) -> JournalWriter:
    writer = JournalWriter(directory)
    identity = {"tracking_uri": uri, "experiment": "e", "run_id": run_id, "run_key": directory.name, "started_ms": 1}
    writer.append("open", **identity, role=role, name="n", tags={}, **writer_identity())
    return writer


def metrics(writer: JournalWriter, numbers: range) -> None:
    for number in numbers:
        writer.append("metrics", values={"a": number}, step=number)


def steps(sink: FakeSink) -> list[int]:
    return [record["step"] for record in sink.applied if record["op"] == "metrics"]


def test_everything_arrives_in_order_and_is_then_gone(tmp_path, fake):
    (tmp_path / "f.txt").write_text("x")
    directory = tmp_path / "k"
    writer = opened(directory)
    metrics(writer, range(3))
    writer.append("artifact", path=writer.spool(tmp_path / "f.txt")[1], to=None)
    metrics(writer, range(3, 500))
    writer.append("end", status="FINISHED")
    writer.close()
    result = drain(directory, sinks=lambda uri: fake)
    assert (result.sent, result.left, result.rejected, result.error) == (502, 0, 0, None)
    assert [r["op"] for r in fake.applied] == ["metrics"] * 3 + ["artifact"] + ["metrics"] * 497 + ["end"]
    assert steps(fake) == list(range(500))
    assert len(fake.identities) < 10, "metrics travel together"
    assert State.load(directory).run_id == "run-1"
    assert not segments(directory)
    assert not (directory / "spool").exists()
    assert drain(directory, sinks=lambda uri: fake).sent == 0


@settings(deadline=None, max_examples=30)
@given(outcomes=st.lists(st.booleans(), max_size=30), kinds=st.lists(st.sampled_from(["metrics", "tags"]), min_size=1))
def test_once_and_in_order_however_often_the_store_goes_away(tmp_path_factory, outcomes, kinds):
    directory = tmp_path_factory.mktemp("d")
    writer = opened(directory)
    for number, kind in enumerate(kinds):
        writer.append(kind, values={"n": number}, step=number)
    sink = FakeSink()
    coming = iter(outcomes)

    def decide(record):
        # Asked once for each record of a request: one failure among them and the store is away for all.
        sink.up = next(coming, True) and sink.up
        return "ok" if sink.up else "fail"

    sink.plan = decide
    for _ in range(len(outcomes) + 1):
        sink.up = True
        drain(directory, sinks=lambda uri: sink)
    assert [record["values"]["n"] for record in sink.applied] == list(range(len(kinds)))
    assert pending(directory) == 0


def test_an_unreachable_store_costs_nothing_and_its_password_is_not_kept(tmp_path, fake):
    writer = opened(tmp_path / "k")
    metrics(writer, range(3))
    fake.up = False
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert result.left == 3
    assert "nobody at" in result.error
    assert "secret" not in result.error + (tmp_path / "k" / "state.json").read_text()
    fake.up = True
    assert drain(tmp_path / "k", sinks=lambda uri: fake).error is None
    assert steps(fake) == [0, 1, 2]
    assert State.load(tmp_path / "k").last_error is None


def test_a_refused_record_is_put_aside_alone(tmp_path, fake):
    writer = opened(tmp_path / "k")
    metrics(writer, range(5))
    fake.plan = lambda record: "refuse" if record["step"] == 2 else "ok"
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.sent, result.rejected, result.left) == (4, 1, 0)
    assert steps(fake) == [0, 1, 3, 4]
    aside = json.loads((tmp_path / "k" / "rejected.jsonl").read_text())
    assert aside["record"]["step"] == 2
    assert "never" in aside["reason"]


def test_a_refusal_by_something_before_the_store_is_none(tmp_path, fake):
    """As when a proxy answers 404 for a server that is restarting."""
    metrics(opened(tmp_path / "k"), range(2))

    def proxy(record):
        fake.up = False
        return "refuse"

    fake.plan = proxy
    assert drain(tmp_path / "k", sinks=lambda uri: fake).left == 2
    fake.up, fake.plan = True, lambda record: "ok"
    drain(tmp_path / "k", sinks=lambda uri: fake)
    assert steps(fake) == [0, 1]


def test_a_denied_record_waits_and_keeps_its_place(tmp_path, fake):
    """The server answers and says no, which an administrator can change: nothing is put aside, nothing overtakes."""
    metrics(opened(tmp_path / "k"), range(3))

    def denied(*_):
        raise DeniedError("the MLflow server does not let user 'x' do this")

    apply, fake.apply = fake.apply, denied
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.sent, result.left, result.rejected) == (0, 3, 0)
    assert result.error == "the MLflow server does not let user 'x' do this"
    fake.apply = apply
    assert drain(tmp_path / "k", sinks=lambda uri: fake).sent == 3
    assert [record["step"] for record in fake.applied] == [0, 1, 2]
    assert State.load(tmp_path / "k").last_error is None


def test_a_record_that_the_store_breaks_on_does_not_block_the_rest(tmp_path, fake):
    writer = opened(tmp_path / "k")
    metrics(writer, range(4))
    fake.plan = lambda record: "fail" if record["step"] == 0 else "ok"
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.rejected, result.left) == (1, 0)
    assert steps(fake) == [1, 2, 3]


def test_corrupt_lines_are_put_aside(tmp_path, fake):
    writer = opened(tmp_path / "k")
    metrics(writer, range(2))
    with open(tmp_path / "k" / writer.segment, "ab") as stream:
        stream.write(b'{"op":"metr\n[1]\n{"op":"tags","values":{"a"')
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.sent, result.rejected, result.left, result.error) == (2, 2, 0, None)


def test_a_segment_without_its_opening_is_put_aside(tmp_path, fake):
    opened(tmp_path / "k")
    metrics(JournalWriter(tmp_path / "k"), range(2))
    result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.sent, result.rejected, result.left) == (0, 2, 0)


def test_a_run_is_started_once_for_each_opening(tmp_path, fake):
    writer = opened(tmp_path / "k")
    drain(tmp_path / "k", sinks=lambda uri: fake)
    metrics(writer, range(2))
    drain(tmp_path / "k", sinks=lambda uri: fake)
    opened(tmp_path / "k", role="attach")
    drain(tmp_path / "k", sinks=lambda uri: fake)
    assert [(r["role"], r["known"]) for r in fake.opened] == [("train", None), ("again", "run-1"), ("attach", "run-1")]


def test_who_holds_the_lock_delivers(tmp_path, fake):
    metrics(opened(tmp_path / "k"), range(2))
    with delivery_lock(tmp_path / "k"):
        result = drain(tmp_path / "k", sinks=lambda uri: fake)
    assert (result.sent, result.left, result.error) == (0, 2, None)
    assert not fake.applied


def test_another_store_gets_what_is_still_there_as_a_run_of_its_own(tmp_path, fake):
    metrics(opened(tmp_path / "k"), range(2))
    drain(tmp_path / "k", sinks=lambda uri: fake)
    other = FakeSink()
    drain(tmp_path / "k", tracking_uri="sqlite:////x/mlflow.db", sinks=lambda uri: other)
    assert other.opened[0]["known"] is None
    assert steps(other) == [0, 1]


def test_replay_goes_through_all_runs_and_asks_a_dead_store_once(tmp_path):
    for name in "abc":
        metrics(opened(tmp_path / name, uri="http://down" if name != "b" else "http://up"), range(2))
    (tmp_path / "d").mkdir()
    asked: list[str] = []

    def sinks(uri: str) -> FakeSink:
        asked.append(uri)
        sink = FakeSink(uri)
        sink.up = uri == "http://up"
        return sink

    result = replay_all(tmp_path, sinks=sinks)
    assert asked == ["http://down", "http://up"]
    assert (result.sent, result.left) == (2, 4)
    assert "ConnectionError" in result.error
    assert replay_all(tmp_path, skip=tmp_path / "a", tracking_uri="http://up", sinks=sinks).sent == 2


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pw@host:5000/x?token=1", "http://host:5000/x"),
        ("https://host", "https://host"),
        ("sqlite:////a/mlflow.db?timeout=3", "sqlite:////a/mlflow.db"),
        ("postgresql://u:p@db/mlflow", "postgresql://db/mlflow"),
        ("databricks", "databricks"),
    ],
)
def test_addresses_are_shown_without_secrets(uri, shown):
    assert redact(uri) == shown
    assert redact(shown) == shown


def test_the_environment_knows_the_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@host")
    assert live_uri("http://host") == "http://u:p@host"
    assert live_uri("http://other") == "http://other"


def test_errors_are_cut_and_cleaned():
    text = delivery.clean(ValueError("a\nb http://u:p@host/ " + "x" * 2000))
    assert "\n" not in text
    assert "u:p" not in text
    assert len(text) <= 600


def test_a_store_that_cannot_be_opened_is_an_error_not_an_exception(tmp_path):
    metrics(opened(tmp_path / "k"), range(1))

    def broken(uri: str) -> FakeSink:
        raise ImportError(f"no mlflow for {os.path.basename(uri)}")  # noqa: PTH119

    result = drain(tmp_path / "k", sinks=broken)
    assert result.left == 1
    assert "no mlflow" in result.error
