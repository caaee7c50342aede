"""What a person reads of a run, from answers recorded on a real cluster (KFP 2.17.0, Argo 4.0.5)."""

from __future__ import annotations

import copy
import json
import re
from datetime import UTC, datetime

import pytest

from distilldsm.cli.main import main
from distilldsm.pipeline.cluster import STEPS
from distilldsm.pipeline.failure import error_lines
from distilldsm.pipeline.run_tree import RunTree, node_id
from tests.pipeline.kfp_server import RECORDED_LOG, FakeKfp, recorded, serving

CACHED_DATA = "check {}|download from cache|validate from cache|preprocess from cache"
DATA = "check done|download done|validate done|preprocess done"
NO_MORE = "cross_validate not started|gate not started|export not started|finish done"
GATE_CLOSED = "cross_validate done|export skipped|finish done"
NO_FOLDS = f"train not started|evaluate not started|{NO_MORE}"
ROWS = {
    "run-succeeded": (
        "done",
        f"{DATA}|train fold 0 done|evaluate fold 0 done|cross_validate done|export fold 0 done|finish done",
    ),
    "run-succeeded-partly-cached": (
        "done",
        CACHED_DATA.format("done") + "|train fold 0 from cache|train fold 1 from cache|evaluate fold 0 from cache|"
        "evaluate fold 1 from cache|cross_validate done|export fold 0 done|export fold 1 done|finish done",
    ),
    "run-gate-closed": (
        "gate closed",
        f"{DATA}|train fold 0 done|train fold 1 done|evaluate fold 0 done|evaluate fold 1 done|{GATE_CLOSED}",
    ),
    "run-all-cached-finish-failed": (
        "done",
        CACHED_DATA.format("from cache") + "|train fold 0 from cache|evaluate fold 0 from cache|"
        "cross_validate from cache|export fold 0 from cache|finish failed",
    ),
    "run-validate-failed": (
        "failed",
        f"check done|download from cache|validate failed|preprocess not started|{NO_FOLDS}",
    ),
    "run-download-failed": (
        "failed",
        f"check done|download failed|validate not started|preprocess not started|{NO_FOLDS}",
    ),
    "run-train-out-of-memory": (
        "failed",
        CACHED_DATA.format("done") + f"|train fold 0 failed|evaluate fold 0 not started|{NO_MORE}",
    ),
    "run-train-pod-deleted": (
        "failed",
        CACHED_DATA.format("done") + f"|train fold 0 failed|evaluate fold 0 not started|{NO_MORE}",
    ),
    "run-terminated": (
        "stopped",
        f"{DATA}|train fold 0 stopped|evaluate fold 0 not started|{NO_MORE}",
    ),
    "run-root-driver-failed": (
        "failed",
        "|".join(f"{step} not started" for step in STEPS),
    ),
    "run-succeeded-mlflow-plugin": (
        "done",
        CACHED_DATA.format("done")
        + "|train fold 0 done|evaluate fold 0 done|cross_validate done|export fold 0 done|finish done",
    ),
    "run-running": (
        "running",
        CACHED_DATA.format("done")
        + "|train fold 0 done|evaluate fold 0 done|cross_validate done|export fold 0 running|finish waiting",
    ),
}


def shown(tree: RunTree) -> str:
    return "|".join(f"{step.name} {step.state}" for step in tree.steps())


@pytest.fixture
def fake(monkeypatch):
    with serving(FakeKfp()) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


def status_of(fake: FakeKfp, run: dict, *arguments: str, capsys) -> tuple[int, str]:
    fake.runs, fake.polls = [{"run_id": run["run_id"]}], [run]
    code = main(["pipeline", "status", run["run_id"], *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("name", ROWS)
def test_one_line_a_step_and_fold_in_the_pipelines_order(name):
    state, steps = ROWS[name]
    tree = RunTree(recorded(name))
    assert (tree.state, shown(tree)) == (state, steps)
    assert all(node.task for node in tree.nodes.values()), "each node's entry was found"


def test_times_folds_and_nodes():
    run = recorded("run-running")
    run["runtime_config"] = {"parameters": {"folds": [3.0]}}
    steps = {step.name: step for step in RunTree(run, datetime(2026, 11, 30, 21, 17, tzinfo=UTC)).steps()}
    assert steps["export fold 3"].seconds == 47  # it began at 21:16:13
    assert steps["train fold 3"].seconds == 53
    validate = next(step for step in RunTree(recorded("run-validate-failed")).steps() if step.step == "validate")
    assert validate.node == "distilldsm-p5q8k-1948918061"  # its log is the recorded one
    assert node_id("distilldsm-p5q8k", "distilldsm-p5q8k") == "distilldsm-p5q8k"


def test_a_cluster_that_tries_once_has_no_attempts_in_the_names_of_its_nodes():
    run = recorded("run-succeeded-partly-cached")
    nodes = RunTree(run).nodes
    renamed = {node.id: node_id("distilldsm-ldp2k", re.sub(r"\(\d+\)", "", node.name)) for node in nodes.values()}
    tasks = []
    for node in nodes.values():
        if f"{node.name}(0)" not in nodes:  # an attempt, or what is never tried again
            above = nodes.get(re.sub(r"\(\d+\)$", "", node.name), node)  # the exit handler follows it
            below = {child["pod_name"] for one in (node, above) for child in one.task.get("child_tasks", ())}
            children = [{"pod_name": renamed[child]} for child in sorted(below - {node.id})]
            display = re.sub(r"\(\d+\)$", "", node.task["display_name"])
            tasks.append({**node.task, "display_name": display, "child_tasks": children})
    run["run_details"]["task_details"] = tasks
    assert shown(RunTree(run)) == ROWS["run-succeeded-partly-cached"][1]


def test_a_second_attempt_counts_and_the_last_one_has_the_log():
    run = recorded("run-train-out-of-memory")
    tree = RunTree(run)
    executor = next(node for node in tree.nodes.values() if node.name.endswith("train(0).executor"))
    second = node_id("distilldsm-j9gdw", f"{executor.name}(1)")
    executor.task["child_tasks"].append({"pod_name": second})
    executor.task["state"] = "RUNNING"
    leaf = next(node for node in tree.nodes.values() if node.name == f"{executor.name}(0)").task
    run["run_details"]["task_details"].append({**leaf, "display_name": "executor(1)", "state": "PENDING"})
    step = next(step for step in RunTree(run).steps() if step.step == "train")
    assert (step.attempts, step.node, step.state) == (2, second, "starting")


def test_of_a_loop_that_was_tried_again_the_last_attempt_counts():
    """With the policy Always, Argo may try whole parts of the pipeline again."""
    run = recorded("run-train-out-of-memory")
    again = recorded("run-train-out-of-memory")["run_details"]["task_details"]
    nodes = RunTree(run).nodes
    loop = next(name for name in nodes if name.endswith(".for-loop-2"))
    ids = {
        node.id: node_id("distilldsm-j9gdw", node.name.replace(f"{loop}(0)", f"{loop}(1)")) for node in nodes.values()
    }
    inside = {id(node.task) for node in nodes.values() if node.name.startswith(f"{loop}(0)")}
    first = run["run_details"]["task_details"]
    for task, copied in zip(first, again, strict=True):
        if id(task) in inside:
            display = {"for-loop-2(0)": "for-loop-2(1)"}.get(copied["display_name"], copied["display_name"])
            state = "SUCCEEDED" if copied.get("state") == "FAILED" else copied.get("state")
            children = [{"pod_name": ids[child["pod_name"]]} for child in copied.get("child_tasks", ())]
            run["run_details"]["task_details"] = [
                *run["run_details"]["task_details"],
                {**copied, "display_name": display, "state": state, "child_tasks": children},
            ]
    nodes[loop].task["child_tasks"].append({"pod_name": node_id("distilldsm-j9gdw", f"{loop}(1)")})
    assert next(step.state for step in RunTree(run).steps() if step.step == "train") == "done"


def test_a_refused_data_set_shows_the_error_of_its_log(fake, capsys):
    run = recorded("run-validate-failed")
    fake.logs["distilldsm-p5q8k-1948918061"] = RECORDED_LOG
    code, text = status_of(fake, run, capsys=capsys)
    assert code == 0
    assert re.search(r"validate +failed 0:09\n      error: /minio/.*the data set cannot be used: 6 errors", text)
    assert f"more lines: distilldsm pipeline logs {run['run_id']} STEP" in text
    assert "launcher_v2.go" not in text
    code, text = status_of(fake, run, "--json", capsys=capsys)
    found = json.loads(text)
    assert found["state"] == "failed"
    error = next(step["error"] for step in found["steps"] if step["step"] == "validate")
    assert error.startswith("error: ")
    assert error.splitlines()[-1].startswith("  mend: read ")
    assert error == error_lines(RECORDED_LOG)


@pytest.mark.parametrize(
    ("name", "message", "log", "words"),
    [
        (
            "run-train-out-of-memory",
            "",
            "E1130 21:00:35.1 15 launcher_v2.go:449] Component failed to execute successfully: exit status 137\n",
            "killed for memory: limit 300Mi; raise `memory` of profile tiny (conf/cluster.yaml)",
        ),
        ("run-train-out-of-memory", "OOMKilled (exit code 137)", "", "killed for memory: limit 300Mi"),
        ("run-train-pod-deleted", "", "", "its pod is gone, and the log with it: the pod was deleted or evicted"),
        ("run-train-pod-deleted", "pod deleted", "", "its pod was deleted or evicted (pod deleted)"),
        ("run-train-pod-deleted", "ImagePullBackOff: Back-off pulling image x", "", "its image cannot be pulled"),
        ("run-train-pod-deleted", "", "Traceback\nValueError: 3\n", "ValueError: 3"),
    ],
)
def test_failures_in_plain_words(fake, capsys, name, message, log, words):
    run = recorded(name)
    container = {
        "resources": {"resourceMemoryLimit": "300Mi"},
        "env": [{"name": "DISTILLDSM_PROFILE", "value": "tiny"}],
    }
    run["pipeline_spec"] = {
        "pipeline_spec": {"deploymentSpec": {"executors": {"exec-train": {"container": container}}}}
    }
    node = next(step.node for step in RunTree(run).steps() if step.step == "train")
    fake.messages, fake.logs = ({node: message} if message else {}), ({node: log} if log else {})
    _, text = status_of(fake, run, capsys=capsys)
    assert words in text.partition("train fold 0")[2]


def test_a_pod_that_waits_for_a_node(fake, capsys):
    run = recorded("run-running")
    export = next(step for step in RunTree(run).steps() if step.step == "export")
    pod = next(
        t
        for t in run["run_details"]["task_details"]
        if t.get("display_name") == "executor(0)" and t["state"] == "RUNNING"
    )
    pod["state"] = "PENDING"
    fake.messages = {str(export.node): "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu."}
    _, text = status_of(fake, run, capsys=capsys)
    assert "export fold 0    starting: no node has room for its pod (Unschedulable: 0/1 nodes" in text


def test_a_driver_that_failed_is_named(fake, capsys):
    run = recorded("run-root-driver-failed")
    fake.logs["distilldsm-5gljp-1370729832"] = (
        "I1130 start\nF1130 20:45:34.1 15 main.go:79] cannot reach the metadata store\n"
    )
    _, text = status_of(fake, run, capsys=capsys)
    assert "KFP's driver of 'root' failed: cannot reach the metadata store" in text
    driver = next(node for node in RunTree(run).nodes.values() if node.name.endswith(".root-driver"))
    driver.task["state"] = "RUNNING"  # Argo tries it again
    assert RunTree(run).failed_driver() is None


def test_a_closed_gate_is_no_failure_and_says_what_was_measured(fake, capsys):
    run = recorded("run-gate-closed")
    run["runtime_config"] = {"parameters": {"folds": [0, 1], "export": {"min_dice": 0.5}}}
    code, text = status_of(fake, run, "--wait", capsys=capsys)
    assert code == 0
    assert "second: gate closed 4:41" in text
    assert re.search(r"export +skipped: the mean Dice is below export.min_dice = 0.5", text)


def test_logs_and_stop(fake, capsys):
    run = recorded("run-gate-closed")
    fake.runs, fake.polls = [{"run_id": run["run_id"]}], [run]
    nodes = {step.name: step.node for step in RunTree(run).steps()}
    workflow, _, number = str(nodes["validate"]).rpartition("-")
    pod = f"{workflow}-system-container-impl-{number}"  # while it runs
    fake.logs = {nodes["train fold 1"]: "of fold 1\n", pod: "validated\n"}
    for arguments, code, words in (
        (["train", "--fold", "1"], 0, "of fold 1"),
        (["validate"], 0, "validated"),
        (["train"], 2, "one of 0, 1"),
        (["train", "--fold", "0"], 1, "the log is gone"),
        (["export"], 1, "has no pod"),
    ):
        assert main(["pipeline", "logs", run["run_id"], *arguments]) == code
        captured = capsys.readouterr()
        assert words in captured.out + captured.err
    assert main(["pipeline", "stop", run["run_id"]]) == 1
    assert "the run is over" in capsys.readouterr().err
    fake.polls = [copy.deepcopy(recorded("run-running"))]
    assert main(["pipeline", "stop", run["run_id"]]) == 0
    assert RunTree(fake.polls[0]).state == "stopping"
