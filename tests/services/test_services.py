"""The pipeline against a real MLflow server with users, PostgreSQL and S3, and what comes of wrong passwords."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from distilldsm.config import TrackingConfig
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.export.scores import SCORES
from distilldsm.tracking import describe, followed, process, registry
from distilldsm.tracking.publish import publish, publish_all
from distilldsm.tracking.record import Model, RunIdentity
from distilldsm.tracking.store import Store
from tests.export.test_gate import scored
from tests.services.compose import ROOT
from tests.services.conftest import ELSEWHERE, Job
from tests.services.servers import ADMIN, TRAINER, Servers, postgres_programs

pytestmark = pytest.mark.slow
GUEST = "guest"
MODEL = "distilldsm-mine"


@pytest.fixture
def as_user(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process a client of the server, in an empty directory; by default as the user who trains."""
    for name in [name for name in os.environ if name.startswith(ELSEWHERE)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")

    def become(user: str = TRAINER, **changed: str) -> None:
        for name, value in {**servers.tracking(user), **changed}.items():
            monkeypatch.setenv(name, value)

    become()
    return become


@pytest.fixture(scope="module")
def logged(servers: Servers, job: Job) -> str:
    """MLflow's id of the job's run."""
    [(run_id,)] = servers.sql("select run_uuid from runs where name = 'distill_dsm-fold0'")
    return str(run_id)


def test_parameters_metrics_and_tags_are_in_the_data_base(servers, job, logged):
    assert servers.sql("select status, name from runs where run_uuid = %s", logged) == [
        ("FINISHED", "distill_dsm-fold0")
    ]
    history = read_json(job.place / "models/fold0/history.json")
    stored = servers.sql("select step, value from metrics where run_uuid = %s and key = 'train_loss'", logged)
    assert sorted(stored) == [(epoch["epoch"], pytest.approx(epoch["train_loss"])) for epoch in history]
    evaluated = servers.sql("select distinct value from metrics where run_uuid = %s and key = 'test_dice_mean'", logged)
    scores = read_json(job.place / "evaluation/fold0/summary.json")["mean"]
    assert evaluated == [(pytest.approx(scores["dice"]),)]
    params = dict(servers.sql("select key, value from params where run_uuid = %s", logged))
    assert params["train.epochs"] == "2"
    tags = dict(servers.sql("select key, value from tags where run_uuid = %s", logged))
    assert tags["fold"] == "0"
    assert len(tags["git_commit"]) == 40
    assert servers.sql("select count(*) from inputs where destination_id = %s", logged) != [(0,)]


def test_all_outputs_are_published_once(servers, job, as_user):
    before = servers.sql("select count(*) from metrics")
    for name in ("models/fold0", "evaluation/fold0", "export/fold0", "cross_validation"):
        assert publish(job.place / name, to=servers.mlflow_url).is_complete
    assert servers.sql("select count(*) from metrics") == before != [(0,)]


def test_artifacts_and_the_registered_model_are_in_the_bucket(servers, job, logged):
    keys = {found.key for found in servers.bucket().objects.all()}
    assert any(key.startswith("mlflow/") and f"/{logged}/artifacts/" in key for key in keys)
    [(name, version, source)] = servers.sql(
        "select v.name, v.version, v.source from model_versions v join registered_model_aliases a "
        "on a.name = v.name and a.version = v.version where a.alias = 'champion'"
    )
    assert (name, version) == (MODEL, 1)
    folder = next(key for key in keys if source.removeprefix("models:/") in key).split("/artifacts/")[0]
    for file in (job.place / "export/fold0").iterdir():
        if file.is_file():
            stored = servers.bucket().Object(f"{folder}/artifacts/{file.name}").get()["Body"].read()
            assert hashlib.sha256(stored).hexdigest() == sha256_file(file), file.name


def test_the_champion_loads_from_the_server_and_predicts_as_the_exported_files_do(servers, job):
    code = """
import mlflow, numpy as np
from pathlib import Path
model = mlflow.pyfunc.load_model("models:/distilldsm-mine@champion")
from distilldsm.inference.loading import load_exported
from distilldsm.inference.service import answer
image = np.random.default_rng(0).normal(size=(1, 1, 8, 32, 32)).astype(np.float32)
theirs = model.predict({"image": image})
ours = answer(load_exported(Path("export/fold0")), {"image": image}, None, remote=False)
theirs, ours = [x["logits"] if isinstance(x, dict) else x for x in (theirs, ours)]
assert theirs.shape[2:] == image.shape[2:], theirs.shape
np.testing.assert_array_equal(theirs, ours)
print("predicted", theirs.shape)
"""
    through_the_server = {
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    }
    assert "predicted" in job.run(sys.executable, "-c", code, **servers.tracking(), **through_the_server).stdout


def test_dvc_pushes_to_the_bucket_and_a_fresh_clone_pulls_the_same(servers, job, tmp_path):
    """The remote is in `.dvc/config.local`, which git ignores; the credentials are in the environment alone."""
    stages = ("download", "validate", "preprocess", "train@0", "evaluate@0", "export@0")
    job.run("dvc", "remote", "add", "--local", "--default", "storage", "s3://distilldsm/dvc")
    job.run("dvc", "push", **servers.s3)
    job.run("git", "add", "-A")
    job.run("git", "commit", "-qm", "trained")
    fresh = Job(place=tmp_path / "fresh")
    subprocess.run(["git", "clone", "-q", str(job.place), str(fresh.place)], check=True)
    assert not (fresh.place / ".dvc/config.local").exists()
    (fresh.place / ".dvc/config.local").write_bytes((job.place / ".dvc/config.local").read_bytes())
    fresh.run("dvc", "pull", *stages, **servers.s3)
    assert "in sync" in fresh.run("dvc", "status", "--cloud", *stages, **servers.s3).stdout
    locked = yaml.safe_load((job.place / "dvc.lock").read_text())["stages"]
    paths = [out["path"] for stage in stages for out in locked[stage]["outs"]]
    kept = [path for path in paths if not path.endswith("metrics.json")]  # these are in no cache
    assert {"data/raw", "data/preprocessed", "models/fold0", "export/fold0/model.onnx"} <= set(kept)
    for path in kept:
        assert _hashes(fresh.place / path) == _hashes(job.place / path), path


def _hashes(path: Path) -> dict[str, str]:
    """Name to hash of a file, or of all files of a folder."""
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    assert files, f"{path} is empty"
    return {str(file.relative_to(path)): sha256_file(file) for file in files}


def test_a_large_file_reaches_the_bucket_in_parts(servers, as_user, tmp_path):
    """One request to S3 takes 5 GB at most: the server must not send larger files in one."""
    (tmp_path / "large.bin").write_bytes(os.urandom(20_000_000))
    described = {"name": "large", "files": {"x": [tmp_path / "large.bin"]}}
    describe(TrackingConfig(experiment="large"), tmp_path / "work", **described)
    assert publish(tmp_path / "work").is_complete
    [key] = [found.key for found in servers.bucket().objects.all() if found.key.endswith("large.bin")]
    stored = servers.bucket().Object(key)
    assert "-" in stored.e_tag, "the ETag of an upload in parts ends in their number"
    assert hashlib.sha256(stored.get()["Body"].read()).hexdigest() == sha256_file(tmp_path / "large.bin")


def test_a_wrong_password_is_told_at_the_start_and_loses_nothing(servers, as_user, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    as_user(MLFLOW_TRACKING_PASSWORD="wr0ng-and-secret")
    work = tmp_path / "work"
    with followed(TrackingConfig(experiment="wrong"), work, name="wrong", history="history.json", at_end={}):
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.2)
        [message] = caplog.messages  # the training has not said anything yet
        assert "does not let user 'trainer' in" in message
        assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in message
        write_json(work / "history.json", [{"epoch": 1, "train_loss": 0.5}])
    assert "is published" in caplog.messages[-1]
    assert "wr0ng" not in caplog.text + (work / "tracking.json").read_text()
    as_user()
    assert publish(work).is_complete
    query = "select m.value, r.status from metrics m join runs r on r.run_uuid = m.run_uuid where r.name = 'wrong'"
    assert servers.sql(query) == [(0.5, "FINISHED")]


def test_records_wait_for_the_right_to_write(servers, as_user, tmp_path, monkeypatch):
    """Whoever may only read another's experiment sends the output, also its files, when that is fixed."""
    monkeypatch.setattr(process, "start", lambda *_, **__: None)
    servers.add_user(GUEST)
    config, work, evaluation = TrackingConfig(experiment="ours"), tmp_path / "work", tmp_path / "evaluation"
    describe(config, work, name="ours")
    assert publish(work).is_complete
    evaluation.mkdir()
    (evaluation / "note.txt").write_text("kept")
    as_user(GUEST)
    files = {"notes": [evaluation / "note.txt"]}
    describe(config, evaluation, run_of=work, metrics={"test_dice_mean": 0.9}, files=files)
    denied = publish(evaluation)
    assert not denied.is_complete
    assert "does not let user 'guest' do this" in denied.problems[0]
    [(experiment,)] = servers.sql("select experiment_id from experiments where name = 'ours'")
    grant = {"username": GUEST, "resource_type": "experiment", "resource_id": str(experiment), "permission": "EDIT"}
    status, answer = servers.ask("/api/3.0/mlflow/users/permissions/grant", ADMIN, body=grant)
    assert status == 200, answer
    assert [one.is_complete for one in publish_all([work, evaluation])] == [True, True]
    assert any(found.key.endswith("/note.txt") for found in servers.bucket().objects.all())


def test_the_administrators_lines_of_the_page(servers, job, as_user, monkeypatch):
    as_user(ADMIN)
    monkeypatch.setenv("ANNS_PASSWORD", servers.secrets["S3_ACCESS_KEY"])
    monkeypatch.setenv("ANNS_NEW_PASSWORD", servers.secrets["S3_SECRET_KEY"])
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/services.md").read_text(), flags=re.DOTALL)
    exec(lines.replace("distilldsm-mni152sample", MODEL), {})
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert servers.ask(search, "ann", password=servers.secrets["S3_SECRET_KEY"])[0] == 200
    model = {"name": MODEL, "key": "seen", "value": "yes"}
    status, answer = servers.ask(
        "/api/2.0/mlflow/registered-models/set-tag", "ann", password=servers.secrets["S3_SECRET_KEY"], body=model
    )
    assert status == 200, answer


def test_the_upgrade_of_the_page(servers):
    from click.testing import CliRunner
    from mlflow.cli import cli

    [line] = [line for line in (ROOT / "docs/services.md").read_text().splitlines() if "mlflow db upgrade" in line]
    command = shlex.split(line.partition(" run --rm mlflow ")[2])
    assert command.pop(0) == "mlflow"
    done = CliRunner().invoke(cli, command, env=servers.postgres)
    assert done.exit_code == 0, done.output
    assert servers.sql("select count(*) from alembic_version") == [(1,)]


def test_nobody_gets_in_without_a_password(servers):
    for path in ("/api/2.0/mlflow/experiments/search?max_results=1", "/api/2.0/mlflow-artifacts/artifacts", "/"):
        assert servers.ask(path)[0] == 401, path
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert servers.ask(search, ADMIN, password="password1234")[0] == 401  # what MLflow once came with
    assert servers.ask(search, TRAINER)[0] == 200
    assert servers.ask("/api/2.0/mlflow/users/create", TRAINER, body={"username": "x", "password": "y" * 20})[0] == 403


def test_folds_that_start_and_register_at_once(servers, as_user, tmp_path):
    """One experiment and one champion, whoever comes first: a server has no lock that they could share."""

    def fold(number: int) -> tuple[str, str]:
        store = Store(servers.mlflow_url)
        identity = RunIdentity(
            key=f"{number:032x}", experiment="race", name=f"fold{number}", started_ms=1, tracking_uri=store.uri
        )
        client, run_id = store.client, store.run(identity, is_placeholder=False).info.run_id
        source = tmp_path / f"export{number}"
        source.mkdir()
        write_json(source / SCORES, scored(0.5, 0.6, fold=number))
        model = client.create_logged_model(client.get_run(run_id).info.experiment_id, name="m", source_run_id=run_id)
        client.log_model_artifacts(model.model_id, str(source))
        client.finalize_logged_model(model.model_id, "READY")
        line = registry.register(
            store,
            Model(registered_name="race", gate={"min_cases": 1}),
            run_id=run_id,
            model_id=model.model_id,
            record_id=f"s:{number}",
            source=source,
        )
        return run_id, line

    with ThreadPoolExecutor(4) as pool:
        told = dict(pool.map(fold, range(4)))
    assert len(told) == 4
    assert servers.sql("select count(*) from experiments where name = 'race'") == [(1,)]
    aliases = dict(servers.sql("select alias, version from registered_model_aliases where name = 'race'"))
    assert aliases["challenger"] == 4
    promoted = [line for line in told.values() if "champion: there was no champion" in line]
    assert [line.startswith(f"registered as race version {aliases['champion']},") for line in promoted] == [True]


@pytest.fixture(scope="module")
def everything(servers: Servers, job: Job) -> dict[str, bytes]:
    """Name to content of all that the job and the servers have written."""
    found = {f"said {number}": text.encode() for number, text in enumerate(job.said)}
    for path in job.place.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
    for stored in servers.bucket().objects.filter(Prefix="mlflow/"):
        found[stored.key] = stored.get()["Body"].read()
    for name in ("mlflow", "postgres", "s3"):
        found[f"{name}.log"] = (servers.folder / f"{name}.log").read_bytes()
    for database in ("mlflow", "mlflow_auth"):
        dump = [str(postgres_programs() / "pg_dump"), database]
        environment = {**os.environ, **servers.postgres}
        found[database] = subprocess.run(dump, env=environment, capture_output=True, check=True).stdout
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found[str(path)] = path.read_bytes()
    return found


def test_no_secret_is_written_anywhere(servers, everything):
    """Not even in the bucket's log: there it would stand if MLflow sent its clients to the bucket."""
    searched = json.dumps({name: len(content) for name, content in everything.items()})
    assert all(name in searched for name in ("config.local", "mlflow_auth", "model.onnx"))
    for name, content in everything.items():
        for word in servers.words():
            assert word.encode() not in content, name
