"""The step `finish` finds the true end of a run: answers recorded on a real cluster, and a real MLflow store."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

from distilldsm.pipeline import finish as module
from distilldsm.pipeline import lineage, step
from distilldsm.pipeline.run_tree import RunTree
from tests.http_answers import answering
from tests.pipeline.kfp_server import RECORDED_LOG, FakeKfp, recorded, serving

ENDINGS = {
    "run-succeeded": ("SUCCEEDED", "FINISHED", ""),
    "run-succeeded-partly-cached": ("SUCCEEDED", "FINISHED", ""),
    "run-all-cached-finish-failed": ("SUCCEEDED", "FINISHED", ""),
    "run-succeeded-mlflow-plugin": ("SUCCEEDED", "FINISHED", ""),
    "run-gate-closed": ("SUCCEEDED, gate closed", "FINISHED", ""),
    "run-validate-failed": ("FAILED", "FAILED", "validate: error: /minio/"),
    "run-download-failed": ("FAILED", "FAILED", "download: "),
    "run-train-out-of-memory": ("FAILED", "FAILED", "train fold 0: killed for memory"),
    "run-train-pod-deleted": ("FAILED", "FAILED", "train fold 0: its pod is gone"),
    "run-terminated": ("CANCELED", "KILLED", ""),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def fake(monkeypatch, store):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with serving(FakeKfp()) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


def as_finish_sees_it(run: dict) -> dict:
    """The recorded run, while its last step runs."""
    run = copy.deepcopy(run)
    run["state"] = "CANCELING" if any(s["state"] == "CANCELING" for s in run["state_history"]) else "RUNNING"
    tree = RunTree(run)
    for node in tree.nodes.values():
        if ".finish" in node.name or ".onExit" in node.name:
            node.task["state"] = "RUNNING"
    return run


def ended(
    monkeypatch, tmp_path: Path, run_id: str, state: str = "RUNNING", trainjob: dict | None = None, **tracking
) -> str:
    monkeypatch.setenv("KFP_RUN_ID", run_id)
    report = SimpleNamespace(path=str(tmp_path / "report"))
    status = SimpleNamespace(state=state, error_message="")
    step.run("finish", tracking=tracking, trainjob=trainjob or {}, status=status, report=report)
    return (tmp_path / "report").read_text()


@pytest.mark.parametrize("name", ENDINGS)
def test_the_true_end_is_reported_and_no_mlflow_run_stays_running(fake, monkeypatch, tmp_path, name):
    state, status, error = ENDINGS[name]
    run = as_finish_sees_it(recorded(name))
    fake.runs, fake.polls = [{"run_id": run["run_id"]}], [run]
    fake.logs["distilldsm-p5q8k-1948918061"] = RECORDED_LOG
    nodes = {one.name: one.node for one in RunTree(run).steps()}
    if "memory" in name:
        fake.messages[str(nodes["train fold 0"])] = "OOMKilled (exit code 137)"
    mlflow = lineage.client()
    begun = [mlflow.create_run("0", tags={"kfp_run_id": run["run_id"]}).info.run_id for _ in range(2)]
    mlflow.set_terminated(begun[1], "FINISHED")
    child = mlflow.create_run("0", tags={"mlflow.parentRunId": begun[1]}).info.run_id
    foreign = [
        mlflow.create_run("0", tags=tags).info.run_id
        for tags in ({"mlflow.parentRunId": begun[1], "kfp_run_id": "earlier"}, {"kfp_run_id": "another"})
    ]
    page = ended(monkeypatch, tmp_path, run["run_id"])
    assert f"pipeline run {run['run_id']}: {state}\n{error}" in page
    assert "check" in page
    found = {one: mlflow.get_run(one) for one in (*begun, child)}
    assert [one.info.status for one in found.values()] == [status, "FINISHED", status]
    assert {one.data.tags["kfp_state"] for one in found.values()} == {state}
    assert all(one.data.tags.get("kfp_error", "").startswith(error) for one in found.values())
    assert {mlflow.get_run(one).info.status for one in foreign} == {"RUNNING"}


def test_a_step_whose_end_the_server_learns_later_is_waited_for(fake, monkeypatch, tmp_path):
    done = as_finish_sees_it(recorded("run-succeeded"))
    fake.runs, fake.polls = [{"run_id": done["run_id"]}], [recorded("run-running"), done]
    monkeypatch.setattr(module, "_SETTLE_S", 30.0)
    assert ": SUCCEEDED" in ended(monkeypatch, tmp_path, done["run_id"], enabled=False)
    fake.polls = [recorded("run-running")]
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)
    assert ": unknown\nthe server does not know" in ended(monkeypatch, tmp_path, done["run_id"], enabled=False)


@pytest.mark.parametrize(
    ("said", "state"), [("RUNNING", "unknown"), ("COMPLETE", "SUCCEEDED"), ("FAILED", "FAILED"), ("", "unknown")]
)
def test_without_a_server_only_states_that_are_reliable_count(fake, monkeypatch, tmp_path, said, state):
    fake.refuse = lambda method, path: (403, "no")
    page = ended(monkeypatch, tmp_path, "some-run", said, enabled=False)
    assert f"pipeline run some-run: {state}\n" in page
    assert ("could not be asked" in page) == (state == "unknown")
    assert "RUNNING" not in page


def test_mlflow_that_is_away_does_not_fail_the_step(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "could not be marked" in ended(monkeypatch, tmp_path, "local-1", "SUCCEEDED")
    answers = iter([ConnectionError("away"), ["r1"]])  # it comes back while the step waits

    def end_runs(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(lineage, "end_runs", end_runs)
    assert "MLflow runs of this pipeline run: r1" in ended(monkeypatch, tmp_path, "in-a-pod", "COMPLETE")


def test_trainjobs_that_a_lost_pod_left_are_deleted(fake, monkeypatch, tmp_path):
    seen = []

    def answer(method, target, headers, body):
        seen.append((method, unquote(target)))
        return 200, {"Content-Type": "application/json"}, b"{}"

    with answering(answer) as url:
        cluster, context = {"server": url}, {"cluster": "k", "user": "u"}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "k", "cluster": cluster}], "contexts": [{"name": "c", "context": context}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        page = ended(monkeypatch, tmp_path, "local-7", "FAILED", trainjob={"namespace": "ns"}, enabled=False)
    assert "TrainJobs of this run in namespace ns: none is left" in page
    path = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ns/trainjobs?labelSelector=distilldsm.org/kfp-run=local-7"
    assert seen == [("DELETE", path)]
