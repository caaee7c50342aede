"""Submission against a server that speaks Kubeflow Pipelines' API."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.pipeline import client
from distilldsm.pipeline.client import status, wait
from distilldsm.pipeline.server import Server
from tests.pipeline.kfp_server import TOKEN, FakeKfp, recorded, serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch):
    for name in ("ENDPOINT", "TOKEN", "COOKIES", "NAMESPACE", "SA_TOKEN_PATH"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(ROOT)
    with serving(FakeKfp()) as server:
        yield server


def run_cli(*arguments: str, capsys) -> tuple[int, str, str]:
    code = main(["pipeline", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_submit_uploads_a_version_starts_a_run_with_the_parameters_and_prints_the_addresses(fake, capsys):
    command = ("submit", "--host", fake.url, "--json", "--set", "train.epochs=3", "--set", "cv.folds=[0,2]")
    code, out, err = run_cli(*command, "--mlflow-secret", "our-mlflow", "--experiment", "exp", capsys=capsys)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["run_url"] == f"{fake.url}/#/runs/details/run-0"
    run = fake.runs[0]
    assert run["experiment_id"] == "e0"
    assert fake.experiments[0]["display_name"] == "exp"
    assert run["pipeline_version_reference"] == {"pipeline_id": "p0", "pipeline_version_id": "v0"}
    inputs = run["runtime_config"]["parameters"]
    assert inputs["train"]["epochs"] == 3
    assert inputs["folds"] == [0, 2]
    assert inputs["mlflow_secret"] == "our-mlflow"
    assert fake.packages[0][0]["pipelineInfo"]["name"] == "distilldsm"

    # The same pipeline again: no second version.
    code, out, _ = run_cli(*command, capsys=capsys)
    assert code == 0
    assert (len(fake.versions), len(fake.pipelines), len(fake.runs)) == (1, 1, 2)
    # Another one: a second version of the same pipeline.
    code, _, _ = run_cli(*command, "--profile", "train=gpu-4", capsys=capsys)
    assert code == 0
    assert (len(fake.versions), len(fake.pipelines)) == (2, 1)


def test_a_trainjob_is_passed_on_and_its_claim_must_be_mounted(fake, capsys):
    command = ("submit", "--host", fake.url, "--trainjob", "conf/trainjob.yaml")
    code, _, err = run_cli(*command, capsys=capsys)
    assert code == 2
    assert "train=launcher" in err
    assert not fake.requests
    code, _, err = run_cli(*command, "--profile", "train=launcher", capsys=capsys)
    assert code == 0, err
    assert fake.runs[0]["runtime_config"]["parameters"]["trainjob"]["nodes"] == 2


def test_caching_service_account_and_schedule_are_passed_on(fake, capsys, tmp_path):
    values = yaml.safe_load((ROOT / "conf" / "cluster.yaml").read_text())
    values["storage"] = {"mlflow_tracking_uri": "http://127.0.0.1:9"}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(values))
    command = ("submit", "--host", fake.url, "--service-account", "trainer", "--no-cache", "--cron", "0 0 2 * * *")
    command += ("--cluster", str(cluster))
    code, out, err = run_cli(*command, capsys=capsys)
    assert code == 0, err
    assert "recurring run rec-0" in out
    job = fake.recurring[0]
    env = fake.packages[0][0]["deploymentSpec"]["executors"]["exec-train"]["container"]["env"]
    schedule = next(one["value"] for one in env if one["name"] == "DISTILLDSM_SCHEDULE")
    assert f"tags.kfp_schedule%20%3D%20%27{schedule}%27" in out  # its runs' ids are not known yet
    assert job["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"
    assert job["service_account"] == "trainer"
    assert not fake.runs
    spec = fake.packages[0][0]
    tasks = [
        task
        for one in (spec["root"], *spec["components"].values())
        for task in one.get("dag", {}).get("tasks", {}).values()
    ]
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks)


def test_wait_prints_each_change_and_ends_with_success_only_for_success(fake, capsys):
    code, out, _ = run_cli("submit", "--host", fake.url, "--wait", capsys=capsys)
    assert code == 0
    assert out.count("export fold 0: running\n") == out.count("export fold 0: done\n") == 1
    for end in ("run-train-pod-deleted", "run-terminated", "run-root-driver-failed"):
        fake.polls = [recorded("run-running"), recorded(end)]
        code, out, err = run_cli("status", "run-0", "--host", fake.url, "--wait", capsys=capsys)
        assert code == 1
        assert "did not succeed" in err


def test_wait_outlives_a_server_that_is_away_for_a_while(fake):
    server = Server(host=fake.url)
    fake.runs.append({"run_id": "r", "display_name": "n"})
    failures = iter([503, 503, 503])
    fake.refuse = lambda method, path: (code, "later") if "/runs/" in path and (code := next(failures, None)) else None
    assert wait(server, "r", say=lambda line: None).state == "done"
    fake.refuse = lambda method, path: (503, "gone") if "/runs/" in path else None
    with pytest.raises(UserError, match="gone"):
        wait(server, "r", say=lambda line: None)


def test_an_interrupt_says_that_the_run_goes_on(fake, capsys, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", interrupt)
    code, _, err = run_cli("submit", "--host", fake.url, "--wait", capsys=capsys)
    assert code == 130
    assert "run run-0 goes on; to stop it: distilldsm pipeline stop run-0" in err


def test_status_of_a_run_that_is_not_there(fake):
    with pytest.raises(UserError, match="Failed to get a run"):
        status(Server(host=fake.url), "nothing or 'other'")


def test_the_mlflow_plugin_gets_our_experiment_and_its_page_is_shown(fake, capsys):
    fake.plugins_output = recorded("run-running")["plugins_output"]
    code, out, _ = run_cli("submit", "--host", fake.url, "--set", "tracking.experiment=brains", capsys=capsys)
    assert code == 0
    assert fake.runs[0]["plugins_input"] == {"mlflow": {"experiment_name": "brains"}}
    assert "http://mlflow.kubeflow:5000/#/experiments/2/runs/5e4b1dcaa1484c5ab137aa84a79239df" in out
    # A server that does not know plugins yet.
    fake.refuse = lambda method, path: None
    answer, bodies = fake.answer, []

    def old(method, target, headers, body):
        if method == "POST" and target.endswith("/runs"):
            bodies.append(json.loads(body))
            if "plugins_input" in bodies[-1]:
                return 400, {"error_message": 'unknown field "plugins_input"'}
        return answer(method, target, headers, body)

    fake.answer = old  # type: ignore[method-assign]
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert (code, len(bodies)) == (0, 2), err


def test_a_second_submission_in_a_namespace_uses_its_pipeline(fake, capsys):
    for _ in range(2):
        code, _, err = run_cli("submit", "--host", fake.url, "--namespace", "team", capsys=capsys)
        assert code == 0, err
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert code == 0, err
    assert [one["namespace"] for one in fake.pipelines] == ["team", None]
    assert [one.get("namespace") for one in fake.experiments] == ["team"]


def test_credentials_do_not_follow_a_redirect(fake, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
    with serving(FakeKfp()) as other:
        login = f"{other.url}/dex/auth?state=x"
        fake.redirect = login
        with pytest.raises(UserError, match="asks for a log-in"):
            Server.from_environment(fake.url).check()
        assert not other.requests


def test_token_and_cookies_come_from_the_environment_and_reach_every_request(fake, capsys, monkeypatch):
    fake.token = TOKEN
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert code == 1
    assert "no token and no cookies" in err
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale")
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert code == 1
    assert "expired" in err
    assert "stale" not in err
    monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
    monkeypatch.setenv("KF_PIPELINES_COOKIES", "authservice_session=abc")
    fake.requests.clear()
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert code == 0, err
    for _, target, headers in fake.requests:
        assert headers["authorization"] == f"Bearer {TOKEN}", target
        assert headers["cookie"] == "authservice_session=abc", target


def test_a_token_that_expires_in_the_middle(fake, capsys):
    fake.refuse = lambda method, path: (401, "expired") if path.endswith("/runs") and method == "POST" else None
    code, _, err = run_cli("submit", "--host", fake.url, capsys=capsys)
    assert code == 1
    assert "KF_PIPELINES_TOKEN" in err


def test_the_token_of_a_pod_is_read_again_for_each_request(fake, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("old\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    server = Server.from_environment(fake.url)
    for token in ("old", TOKEN):
        (tmp_path / "token").write_text(f"{token}\n")
        server.check()
        assert fake.requests[-1][2]["authorization"] == f"Bearer {token}"


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (None, "KF_PIPELINES_ENDPOINT"),
        ("kubeflow.example", "http://"),
        ("http://me:secret@kubeflow.example", "KF_PIPELINES_TOKEN"),
    ],
)
def test_hosts_that_are_none(fake, host, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Server.from_environment(host)
    assert "secret" not in str(caught.value)


def test_nobody_there_and_somebody_else_there(fake):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="does not answer"):
        Server(host=f"http://127.0.0.1:{port}").check()
    fake.refuse = lambda method, path: (404, "what?")
    with pytest.raises(UserError, match="not Kubeflow Pipelines version 2"):
        Server(host=fake.url).check()
    fake.refuse = lambda method, path: None
    fake.answer = lambda *request: (200, b"<html>Log in</html>")  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not as Kubeflow Pipelines"):
        Server(host=fake.url).check()


def test_wrong_parameters_are_refused_before_the_server_is_asked(fake, capsys):
    for wrong, words in (
        ("train.epoch=3", "did you mean 'epochs'"),
        ("cv.folds=[7]", "below preprocess.folds"),
        ("preprocess.folds=99", "at most download.sample.subjects"),
        ("train.model.name=unet", "one of"),
    ):
        code, _, err = run_cli("submit", "--host", fake.url, "--set", wrong, capsys=capsys)
        assert code == 2
        assert words in err
    code, _, err = run_cli("submit", "--host", fake.url, "--cron", "2 * * *", capsys=capsys)
    assert code == 2
    assert not fake.requests
