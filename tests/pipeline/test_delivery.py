"""What a step leaves in MLflow before its pod is gone, and what a person learns of what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from distilldsm.cli.main import main
from distilldsm.config import TrackingConfig
from distilldsm.pipeline import delivery
from distilldsm.pipeline.delivery import deliver, tracked, undelivered
from distilldsm.pipeline.run_tree import RunTree
from distilldsm.tracking import describe, publish
from distilldsm.tracking.publish import Outcome
from distilldsm.tracking.record import load
from tests.pipeline.kfp_server import FakeKfp, recorded, serving


@pytest.fixture
def clock(monkeypatch):
    """Time passes only while the step waits; returns the pauses."""
    pauses: list[float] = []
    time = SimpleNamespace(monotonic=lambda: float(sum(pauses)), sleep=pauses.append)
    monkeypatch.setattr(delivery, "time", time)
    return pauses


@pytest.fixture
def output(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    describe(TrackingConfig(), tmp_path / "model", name="m")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("run_id", "minutes", "away", "waited_s", "arrives"),
    [("r", 10, 3, 45, True), ("r", 1, 1000, 60, False), ("local-1", 10, 1000, 0, False), ("", 10, 0, 0, True)],
)
def test_a_step_waits_for_a_server_that_is_away(
    monkeypatch, capsys, clock, output, run_id, minutes, away, waited_s, arrives
):
    monkeypatch.setenv("KFP_RUN_ID", run_id)
    answers = iter([False] * away + [True])

    def publish_all(directories):
        for directory in directories:
            is_there = next(answers)
            problems = () if is_there else ("the server does not answer\nnow",)
            yield Outcome(directory=directory, is_complete=is_there, problems=problems, is_away=not is_there)

    monkeypatch.setattr(publish, "publish_all", publish_all)
    deliver(TrackingConfig(wait_minutes=minutes), {output: "s3://b/train/model"})
    record = load(output)
    assert record is not None
    line = f"not in MLflow: record {record.id} of s3://b/train/model: the server does not answer now"
    assert capsys.readouterr().out == (f"in MLflow: record {record.id}\n" if arrives else f"{line}\n")
    assert sum(clock) == waited_s


def test_an_input_that_the_cache_gave_is_delivered_too(tmp_path, output, capsys, monkeypatch):
    """All of a step's inputs, those of all folds too, with their addresses in the bucket."""
    together = tmp_path / "models"
    together.mkdir()
    (together / "fold3").symlink_to(output)
    model = SimpleNamespace(path=str(output), uri="minio://b/train/model", metadata={})
    assert tracked([together], [model]) == {together / "fold3": "minio://b/train/model"}
    collected = SimpleNamespace(path=str(tmp_path), uri="s3://b/gate/collected", metadata={})
    assert tracked([output], [collected]) == {output: "s3://b/gate/collected/model"}
    assert tracked([tmp_path], [collected]) == {}
    monkeypatch.setattr(publish, "publish_all", lambda _: pytest.fail("tracking is off"))
    deliver(TrackingConfig(enabled=False), {output: "x"})
    deliver(TrackingConfig(), {})
    assert capsys.readouterr().out == ""


def test_a_later_step_may_send_what_an_earlier_one_could_not():
    first = "epoch 1\nnot in MLflow: record a1 of s3://b/m: away\nnot in MLflow: record b2 of s3://b/e: away: 3\n"
    assert undelivered([first]) == {"s3://b/m": "away", "s3://b/e": "away: 3"}
    assert undelivered([first, "in MLflow: record a1\n"]) == {"s3://b/e": "away: 3"}


def test_status_lists_what_mlflow_lacks_with_the_command_that_publishes_it(capsys, monkeypatch):
    run = recorded("run-succeeded")
    with serving(FakeKfp()) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        fake.runs, fake.polls = [{"run_id": run["run_id"]}], [run]
        train = next(step for step in RunTree(run).steps() if step.step == "train")
        fake.logs = {str(train.node): "not in MLflow: record a1 of minio://b/train/model: refused\n"}
        assert main(["pipeline", "status", run["run_id"]]) == 0
    assert capsys.readouterr().out.endswith(
        "MLflow lacks minio://b/train/model: refused\n"
        "  publish it: aws s3 cp --recursive s3://b/train/model model && distilldsm publish model\n"
    )
