"""MLflow's store, DVC's remote, Kubeflow and outputs: each refusal has its words, and probes leave nothing."""

from __future__ import annotations

import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from dvc.fs import LocalFileSystem
from mlflow import MlflowClient
from mlflow.entities import ViewType

from distilldsm.cli import doctor
from distilldsm.core.errors import UserError
from distilldsm.doctor import dvc_probe, services
from distilldsm.doctor import tracking_probe as probe
from distilldsm.doctor.checks import run_checks
from distilldsm.tracking import describe
from distilldsm.tracking.publish import publish
from tests.doctor.conftest import contents
from tests.pipeline.kfp_server import FakeKfp, serving
from tests.tracking.store import trained

CHECKS = {check.name: check for check in doctor.CHECKS}


@pytest.fixture
def store(place: Path, empty_store: Path, monkeypatch) -> str:
    """Address of a SQLite store with a run in it."""
    shutil.copyfile(empty_store, place / "mlflow.db")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    location = (place / "mlartifacts/mine").as_uri()
    run = client.create_run(client.create_experiment("mine", artifact_location=location))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "kept", "a.txt")
    return uri


def tables(place: Path) -> list[str]:
    connection = sqlite3.connect(place / "mlflow.db")
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def files(place: Path) -> list[str]:
    return sorted(contents(place))


def test_a_sqlite_store_is_as_it_was(store, place):
    before = tables(place), files(place)
    (found,) = probe.check(10)
    assert (found.status, found.name) == ("ok", "mlflow")
    assert found.seen.endswith("a run with a metric and an artifact was written, read back and deleted")
    assert (tables(place), files(place)) == before


def test_a_probe_that_fails_is_taken_away_too(store, place, monkeypatch):
    def refuse(self, run_id, text, artifact_file):
        assert self.get_run(run_id).data.metrics == {"probe": 0.5}
        raise PermissionError("bucket of https://anna:geheim99@host: AccessDenied")

    before = tables(place), files(place)
    monkeypatch.setattr(probe.MlflowClient, "log_text", refuse)
    with pytest.raises(UserError, match="runs can be written, artifacts cannot") as caught:
        probe.probe_store(store)
    assert "geheim" not in str(caught.value)
    assert (tables(place), files(place)) == before
    monkeypatch.setattr(probe.MlflowClient, "log_text", lambda *_: None)
    monkeypatch.setattr(probe.MlflowClient, "download_artifacts", lambda *_: str(place / "mlartifacts"))
    with pytest.raises(UserError, match="artifact"):
        probe.probe_store(store)
    assert (tables(place), files(place)) == before


def test_a_server_keeps_one_deleted_experiment_however_often_it_is_asked(store, place, monkeypatch):
    """As with a server, where nothing can be deleted for good."""
    monkeypatch.setattr(probe, "sqlite_path", lambda uri: None)
    client = MlflowClient(tracking_uri=store)
    active = {e.name for e in client.search_experiments()}
    for _ in range(2):
        probe.probe_store(store)
    assert {e.name for e in client.search_experiments()} == active
    (deleted,) = client.search_experiments(view_type=ViewType.DELETED_ONLY)
    assert deleted.name == probe.EXPERIMENT
    assert client.search_runs([deleted.experiment_id], run_view_type=ViewType.ACTIVE_ONLY) == []
    assert [e.name for e in client.search_experiments(filter_string="name = 'mine'")] == ["mine"]


@pytest.mark.parametrize(
    ("answer", "problem", "hint"),
    [
        ("401", "access is refused", "MLFLOW_TRACKING_USERNAME"),
        ("403", "access is refused", "the permission EDIT"),
        ("host", "the MLflow server refuses the name by which it was asked", "--allowed-hosts"),
        ("404", "answers, but not as MLflow does", "MLflow's own address"),
        ("login", "answers, but not as MLflow does", "a page to log in"),
        ("500", "the server answers, but fails", "the server's own log"),
        ("close", "the server does not answer", "the VPN"),
        ("hang", "the server does not answer", "the VPN"),
        ("away", "the server does not answer", "the VPN"),
    ],
)
def test_a_server_that_refuses(server, place, monkeypatch, answer, problem, hint):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.answer = answer
    host = server.url if answer != "away" else "http://127.0.0.1:9"
    with pytest.raises(UserError) as caught:
        probe.probe_store(host.replace("://", "://anna:geheim99@"))
    assert caught.value.problem == caught.value.problem.strip()
    assert caught.value.problem.startswith(problem)
    assert hint in caught.value.hint
    assert caught.value.where == host
    assert "geheim" not in str(caught.value)
    assert files(place) == []


def test_a_file_that_is_no_store(place):
    (place / "mlflow.db").write_text("something else" * 100)
    with pytest.raises(UserError, match="is damaged, or no database"):
        probe.probe_store(f"sqlite:///{place}/mlflow.db")
    assert files(place) == ["mlflow.db"]


def test_a_store_that_is_not_there_yet_is_not_made(place, monkeypatch):
    (found,) = services.check_mlflow(1)
    assert (found.status, found.seen) == ("ok", f"{place}/mlflow.db: the first training creates it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/gone/mlflow.db")
    (found,) = services.check_mlflow(1)
    assert (found.status, found.seen) == ("fail", f"{place}/gone: does not exist or is not writable")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(services, "is_installed", lambda package: False)
    assert services.check_mlflow(1)[0].status == "skip"
    assert files(place) == []


def test_a_password_that_is_sent_unencrypted(monkeypatch):
    monkeypatch.setattr(services, "in_child", lambda *_: [])
    for uri, secret, count in (
        ("http://mlflow.example.org:5000", "PASSWORD", 1),
        ("http://mlflow.example.org:5000", "TOKEN", 1),
        ("http://mlflow.example.org:5000", "USERNAME", 0),
        ("https://mlflow.example.org", "PASSWORD", 0),
        ("http://localhost:5000", "PASSWORD", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            patch.setenv(f"MLFLOW_TRACKING_{secret}", "secret")
            assert [one.status for one in services.check_mlflow(1)] == ["warn"] * count


def test_requests_end_before_the_check_does(place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(services, "is_installed", lambda package: True)
    given = []
    monkeypatch.setattr(services, "in_child", lambda *arguments: given.append(arguments) or [])
    services.check_mlflow(9.0)
    _, function, limit_s, environment = given[0]
    assert (function, limit_s) == ("distilldsm.doctor.tracking_probe:check", 9.0)
    assert environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_outputs_that_mlflow_does_not_hold(store, place, no_sender):
    (found,) = services.check_outputs(1)
    assert (found.status, found.seen) == ("ok", "there are no outputs yet")
    for fold in (0, 1):
        trained(place / f"models/fold{fold}")
    assert publish(place / "models/fold1").is_complete
    describe(None, place / "models/fold1")
    trained(place / "models/fold2")
    assert publish(place / "models/fold2").is_complete
    before = contents(place), tables(place)
    (found,) = probe.check_outputs(10)
    assert (contents(place), tables(place)) == before
    assert (found.status, found.seen) == ("warn", "1 of 2 outputs are not, or not completely, in MLflow: models/fold0")
    assert "distilldsm publish" in found.hint
    publish(place / "models/fold0")
    (found,) = probe.check_outputs(10)
    assert (found.status, found.seen) == ("ok", "all 2 outputs are in MLflow")


def repository(place: Path, config: str) -> None:
    (place / ".dvc").mkdir(exist_ok=True)
    (place / ".dvc/config").write_text(config)


def remote(url: object) -> str:
    return f"[core]\n    remote = store\n['remote \"store\"']\n    url = {url}\n"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_dvc_remote_in_a_folder(place, tmp_path, scheme):
    store = tmp_path / "shared/store"
    repository(place, remote(f"{scheme}{store}"))
    before = contents(place)
    (found,) = dvc_probe.check(1)
    assert (found.status, found.name) == ("ok", "dvc remote")
    assert found.seen == f"store: {scheme}{store}: an object was written, read back and deleted"
    assert not store.parent.exists(), "what was made for the probe is gone"
    (store / "files/md5").mkdir(parents=True)
    (store / "files/md5/object").write_bytes(b"kept")
    kept = contents(store)
    assert dvc_probe.check(1)[0].status == "ok"
    assert contents(store) == kept
    assert contents(place) == before


def test_a_dvc_remote_that_refuses(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    repository(place, remote(tmp_path / "file/store"))
    with pytest.raises(UserError, match="file/store cannot be used"):
        dvc_probe.check(1)
    repository(place, remote(tmp_path / "store"))
    for error, problem in (
        (PermissionError(13, "Permission denied"), "is refused"),
        (OSError("An error occurred (403) when calling PutObject"), "is refused"),
        (OSError(5, "Input/output error"), "cannot be used"),
    ):

        def fail(self, path, value, error=error):
            raise error

        monkeypatch.setattr(LocalFileSystem, "pipe_file", fail)
        with pytest.raises(UserError) as caught:
            dvc_probe.check(1)
        assert problem in caught.value.problem
        assert caught.value.hint
    assert not (tmp_path / "store").exists()


def test_a_dvc_repository_without_a_remote(place):
    repository(place, "")
    assert dvc_probe.check(1)[0].status == "skip"
    repository(place, remote("s3://anna:geheim99@bucket/x").replace("[core]\n    remote = store\n", ""))
    (found,) = dvc_probe.check(1)
    assert (found.status, found.hint) == ("warn", "dvc remote default store")


def test_git_and_dvc_where_there_is_nothing(place, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(place.parent))
    git, dvc = run_checks([CHECKS["git"], CHECKS["dvc"]], 10)
    assert (git.status, dvc.status) == ("warn", "warn")
    assert "not a git repository" in git.seen
    (place / "dvc.yaml").write_text("stages: {train: {cmd: a}}")
    (found,) = doctor.check_dvc(1)
    assert (found.status, found.seen) == ("fail", "dvc.yaml is there, but the folder .dvc is missing")
    (place / ".dvc").mkdir()
    monkeypatch.setattr(doctor, "in_child", lambda *_: [])
    (found,) = doctor.check_dvc(1)
    assert (found.status, found.seen) == ("ok", "dvc.yaml: train")
    monkeypatch.setattr(services, "is_installed", lambda package: False)
    assert doctor.check_dvc(1)[0].status == "skip"


@pytest.mark.parametrize(
    ("answer", "seen", "hint"),
    [
        ("401", "access is refused", "KF_PIPELINES_TOKEN"),
        ("404", "is not Kubeflow Pipelines version 2", "ml-pipeline"),
        ("login", "answers, but not as Kubeflow Pipelines", "ml-pipeline"),
        ("500", "HTTP 500", None),
        ("close", "does not answer", "the VPN"),
        ("hang", "does not answer", "the VPN"),
    ],
)
def test_kubeflow_that_refuses(server, place, monkeypatch, answer, seen, hint):
    server.answer = answer
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "geheim99")
    (found,) = run_checks([CHECKS["kubeflow"]], 1.0)
    assert found.status == "fail"
    assert seen in found.seen
    assert (hint or "") in (found.hint or "")
    assert "geheim" not in f"{found}"


def test_kubeflow(place, monkeypatch):
    (found,) = doctor.check_kubeflow(1)
    assert (found.status, found.seen) == ("skip", "not configured (KF_PIPELINES_ENDPOINT)")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "kubeflow.example.org")
    (found,) = run_checks([CHECKS["kubeflow"]], 5)
    assert found.status == "fail"
    assert "http://... or https://..." in found.seen
    with serving(FakeKfp()) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        (found,) = run_checks([CHECKS["kubeflow"]], 5)
    assert (found.status, found.seen) == ("ok", f"{fake.url}: healthy, requested with no token and no cookies")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty|does not hold|ends early"),
        (b"\0" * 50, "YAML"),
        (b"schema: '2.0'\nstages:\n  a:\n    cmd: x\n    deps:\n    - path: [", "YAML"),
        (b"schema: '2.0'\nstages:\n", "ends early"),
        (b"schema: '2.0'\nstages:\n  a:\n", "ends early"),
        (b"schema: '2.0'\nstages:\n  a:\n    cmd: x\n", None),
        (b"schema: '2.0'\nstages: {}\n", None),
    ],
)
def test_a_damaged_dvc_lock_is_seen(place, monkeypatch, content, problem):
    monkeypatch.setattr(doctor, "in_child", lambda *_: [])
    (place / ".dvc").mkdir()
    (place / "dvc.yaml").write_text("stages: {}\n")
    (place / "dvc.lock").write_bytes(content)
    _, *found = doctor.check_dvc(1)
    assert [one.status for one in found] == ([] if problem is None else ["fail"])
    if problem:
        assert re.search(problem, found[0].seen)
        assert found[0].hint.startswith("rm dvc.lock, then dvc repro")
