"""Secrets come from the environment, and end up nowhere else."""

from __future__ import annotations

import ast
import base64
import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from requests.auth import HTTPBasicAuth

from distilldsm.cli.main import main
from distilldsm.config import DownloadConfig, TrackingConfig
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.redaction import is_secret_name, move_credentials, redact, secret_in_address, split_user
from distilldsm.data.download import Credentials, fetch
from distilldsm.pipeline.cluster import Profile, Storage
from distilldsm.pipeline.step import run as run_step
from distilldsm.pipeline.trainjob_manifest import TrainJobConfig, manifest
from distilldsm.tracking import default_uri, describe, process, send
from distilldsm.tracking.addresses import refuse_foreign_credentials, use
from distilldsm.tracking.publish import known_outputs, publish_all
from distilldsm.tracking.store import Store
from tests.data.volumes import write_case
from tests.faults.payloads import told
from tests.tracking.conftest import empty_store

__all__ = ["empty_store"]

ROOT = Path(__file__).resolve().parents[2]
WORD = "pl4nted+secret/word"
QUOTED = "pl4nted%2Bsecret%2Fword"
TELLTALE = b"pl4nted"
"""In every form of the secret but base64."""
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "KF_PIPELINES_TOKEN")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a file to whoever logs in; /away leads to another server."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", f"{server.elsewhere}?X-Amz-Signature={QUOTED}")
        elif server.allowed and server.allowed not in (self.headers.get("Authorization"), self.path.partition("?")[2]):
            self.send_response(503 if self.path.startswith("/ill") else 401)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)
            return
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving(content: bytes = b"", allowed: str = "", elsewhere: str = "") -> Iterator[http.server.HTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.allowed, server.elsewhere, server.seen = content, allowed, elsewhere, []
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """A data set as an archive."""
    folder = tmp_path_factory.mktemp("packed")
    cases = [write_case(folder / "set/T", f"c{k}", seed=k) for k in range(4)]
    labels = {"0": "background", "1": "shell", "2": "core"}
    training = [{"image": case.images[0], "label": case.label} for case in cases]
    description = {"name": "T", "modality": {"0": "MRI"}, "labels": labels, "training": training}
    (folder / "set/T/dataset.json").write_text(json.dumps(description))
    return Path(shutil.make_archive(str(folder / "x"), "tar", folder / "set")).read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with the shipped configuration, and every secret planted."""
    for name in SECRETS:
        monkeypatch.setenv(name, WORD)
    for name in ("RANK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nowhere(place: Path, *texts: str) -> None:
    """The secret is in no file below `place` and in none of the texts."""
    encoded = [base64.b64encode(WORD.encode()), base64.b64encode(f"me:{WORD}".encode())]
    for text in (*(t.encode() for t in texts), *(p.read_bytes() for p in place.rglob("*") if p.is_file())):
        assert TELLTALE not in text
        assert not any(form in text for form in encoded)
    assert not any(TELLTALE.decode() in str(path) for path in place.rglob("*"))


def params(place: Path, source: str, **more: object) -> Path:
    path = place / "params.yaml"
    small = {"epochs": 1, "batch_size": 2, "model": {"options": {"width": 0.25}}}
    quick = {"int8": {"enabled": False}, "parity_cases": 1}
    values = {"download": {"source": source, **more}, "preprocess": {"folds": 2, "workers": 1}, "train": small}
    path.write_text(yaml.safe_dump({**values, "validate": {"workers": 1}, "evaluate": {"workers": 1}, "export": quick}))
    return path


@pytest.mark.slow
def test_a_small_pipeline_writes_no_secret(place, packed, monkeypatch, capfd, empty_store):
    """Download with a password, all stages, MLflow in SQLite: nothing holds any secret."""
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_USERNAME", "me")
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_PASSWORD", WORD)
    # Sent once, at the end: three processes that import MLflow would take most of the time.
    monkeypatch.setattr(process, "start", lambda *_, **__: None)
    shutil.copyfile(empty_store, place / "mlflow.db")
    allowed = "Basic " + base64.b64encode(f"me:{WORD}".encode()).decode()
    with serving(packed, allowed) as server:
        params(place, f"{server.address}/set.tar?version=2")
        assert main(["download"]) == 0
        assert server.seen == [("/set.tar?version=2", allowed)]
    assert main(["validate"]) == 0
    assert main(["preprocess"]) == 0
    assert main(["train"]) == 0
    assert main(["evaluate"]) == 0
    assert main(["export"]) == 0
    assert main(["pipeline", "compile", "-o", "pipeline.yaml"]) == 0
    nowhere(place)  # the records before they are published
    assert [(one.is_complete, one.notes) for one in publish_all(known_outputs())] == [(True, ())] * 3
    captured = capfd.readouterr()
    assert all((place / name).is_file() for name in ("evaluation/fold0/report.html", "export/fold0/README.md"))
    assert list((place / "mlartifacts").rglob("MLmodel"))
    assert "c3" in captured.out + captured.err + (place / "data/raw/dataset_index.json").read_text()
    nowhere(place, captured.out, captured.err)


def test_an_absent_server_with_a_password_in_its_address(place, monkeypatch, capfd, caplog):
    """The record and the warnings name the server, not the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{QUOTED}@127.0.0.1:9/base?token={QUOTED}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    work = place / "work"
    work.mkdir()
    data = {"name": "d", "digest": "1", "source": f"https://me:{QUOTED}@host/x.tar?sig={QUOTED}"}
    describe(TrackingConfig(), work, name="n", params={"a": 1}, dataset=data)
    send(work)
    captured = capfd.readouterr()
    assert "127.0.0.1" in (work / "tracking.json").read_text()
    assert "127.0.0.1" in caplog.text
    assert "distilldsm publish" in caplog.text
    nowhere(place, captured.out, captured.err, caplog.text)


@pytest.mark.parametrize("path", ["/set.tar", "/ill.tar", "/away"])
def test_failures_of_a_download_tell_no_secret(place, monkeypatch, capsys, path):
    monkeypatch.setattr("distilldsm.data.download.ATTEMPTS", 1)
    monkeypatch.setattr("distilldsm.data.download.time.sleep", lambda _: None)
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_SIGNATURE", f"X-Amz-Signature={QUOTED}&X-Amz-Date=1")
    with serving(allowed="never", elsewhere="http://127.0.0.1:9/x") as server:
        params(place, f"{server.address}{path}")
        assert main(["download"]) == 1
        assert QUOTED in server.seen[0][0]
        message = capsys.readouterr().err
        told(message, server.address, "could not be fetched", "hint: ")
    nowhere(place, message)


def test_other_servers_get_no_password(tmp_path, packed, monkeypatch):
    monkeypatch.setenv("DISTILLDSM_DOWNLOAD_TOKEN", WORD)
    with serving(packed) as mirror, serving(allowed="never", elsewhere=f"{mirror.address}/away2") as server:
        mirror.elsewhere = "http://127.0.0.1:9/x"
        address = f"{server.address}/set.tar"
        fetch([address, f"{mirror.address}/m.tar"], tmp_path / "a", credentials=Credentials.from_environment(address))
        assert server.seen == [("/set.tar", f"Bearer {WORD}")]
        assert mirror.seen == [("/m.tar", None)]
        with pytest.raises(DataError):
            # Another host by its name: what a redirect to a bucket is.
            server.elsewhere = mirror.address.replace("127.0.0.1", "localhost") + "/away"
            address = f"{server.address}/away"
            fetch([address], tmp_path / "b", credentials=Credentials.from_environment(address), sleep=lambda _: None)
        assert mirror.seen[1][1] is None
    assert WORD not in repr(Credentials.from_environment("https://host/x"))


def test_netrc_is_for_its_own_server_and_for_https(tmp_path, packed, monkeypatch):
    """requests sends the login by http, and looks up the target of a redirect, too."""
    netrc = tmp_path / "netrc"
    netrc.write_text("".join(f"machine {host} login me password {WORD}\n" for host in ("127.0.0.1", "localhost")))
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(packed) as mirror, serving(allowed="never", elsewhere="-") as server:
        server.elsewhere = mirror.address.replace("127.0.0.1", "localhost") + "/m.tar"
        fetch([f"{server.address}/away.tar"], tmp_path / "a", sleep=lambda _: None)
        assert server.seen[0][1].startswith("Basic ")
        assert mirror.seen == [(f"/m.tar?X-Amz-Signature={QUOTED}", None)]
        monkeypatch.setattr("distilldsm.data.download._LOCAL", set())
        fetch([f"{mirror.address}/m.tar"], tmp_path / "b", sleep=lambda _: None)
        assert mirror.seen[1] == ("/m.tar", None)


def test_how_to_log_in(monkeypatch):
    with_password = {"DISTILLDSM_DOWNLOAD_USERNAME": "me", "DISTILLDSM_DOWNLOAD_PASSWORD": WORD}
    for name, value in with_password.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"sent unencrypted(.|\n)*https://") as caught:
        Credentials.from_environment("http://example.org/x?a=1")
    assert WORD not in str(caught.value)
    assert Credentials.from_environment("https://example.org/x").applied("https://example.org/y") == (
        "https://example.org/y",
        HTTPBasicAuth(b"me", WORD.encode()),
    )
    assert Credentials.from_environment("https://example.org/x").applied("http://example.org/y")[1] is None
    monkeypatch.delenv("DISTILLDSM_DOWNLOAD_USERNAME")
    with pytest.raises(ConfigError, match="cannot tell how to log in"):
        Credentials.from_environment("https://example.org/x")


PASSWORDS = ("plain", "p@ss", "a/b", "a:b/c", "a?b", "a#b@c/d", "1/2", "100%", "sp ace", "ü\"'")


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("quoted", [False, True])
def test_user_and_password_leave_the_address_whatever_they_hold(password, quoted):
    written = quote(password, safe="") if quoted else password
    for address, variables in (
        ("http://{}host:5000/base", ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")),
        ("postgresql+psycopg2://{}host/db?sslmode=require", ("PGUSER", "PGPASSWORD")),
    ):
        plain, full = address.format(""), address.format(f"me:{written}@")
        assert split_user(full) == (plain, f"me:{written}")
        assert secret_in_address(full) == "user"
        environment = {"MLFLOW_TRACKING_URI": full, "MLFLOW_REGISTRY_URI": plain}
        move_credentials(environment)
        assert environment == {
            "MLFLOW_TRACKING_URI": plain,
            "MLFLOW_REGISTRY_URI": plain,
            **dict(zip(variables, ("me", password), strict=True)),
        }
        assert split_user(plain) == (plain, "")


@pytest.mark.parametrize("address", ["s3://b/a@b", "https://h/@scope/x?mail=a@b", "sqlite:////home/a@b/x", "a:b@c/d"])
def test_an_at_sign_elsewhere_is_no_user(address):
    assert split_user(address) == (address, "")


def test_libraries_see_no_password(place, monkeypatch):
    """MLflow logs and stores addresses. So a child process, too, has the password in a variable only."""
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pl4nted/@127.0.0.1:9")
    code = "import os, distilldsm; print({k: os.environ[k] for k in os.environ if k.startswith('MLFLOW_TRACKING_')})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = {"URI": "http://127.0.0.1:9", "USERNAME": "me", "PASSWORD": "pl4nted/", "TOKEN": WORD}
    assert ast.literal_eval(done.stdout) == {f"MLFLOW_TRACKING_{name}": value for name, value in expected.items()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+pymysql://me:pl4nted@host/db")
    with pytest.raises(ConfigError, match=r"holds a password(.|\n)*mysql\+pymysql://host/db(.|\n)*hint") as caught:
        default_uri()
    assert TELLTALE.decode() not in str(caught.value)


def test_the_password_of_one_mlflow_server_is_not_for_another(place, monkeypatch):
    """A copied model names the server that it was tracked on: whoever wrote the model would get the password."""
    for uri in ("", "http://127.0.0.1:8"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9: the password(.|\n)*hint"):
            Store("http://127.0.0.1:9")
    assert use("http://you:other%2B@127.0.0.1:9") == "http://127.0.0.1:9"
    refuse_foreign_credentials("http://127.0.0.1:9")
    assert [os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD", "TOKEN")] == [
        "you", "other+", None,
    ]  # fmt: skip


ADDRESSES = (
    f"https://me:{QUOTED}/@host/x.tar",
    f"https://host/x.tar#access_token={QUOTED}",
    f"https://me:{QUOTED}@host/x.tar",
    f"https://{QUOTED}@host/x.tar",
    f"s3://me:{QUOTED}@bucket/x.tar",
    f"https://host/x.tar?X-Amz-Signature={QUOTED}",
    f"https://host/x.tar?se=1&sig={QUOTED}",
    f"https://host/x.tar?access_token={QUOTED}",
    f"https://host/x.tar?a=1&key={QUOTED}",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("key", ["source", "mirrors"])
def test_an_address_with_a_secret_is_refused_in_the_parameters(place, capsys, key, address):
    params(place, **({"source": address} if key == "source" else {"source": "x.tar", "mirrors": [address]}))
    commands = [
        ["download"], ["train"], ["pipeline", "compile", "-o", "out.yaml"], ["pipeline", "run", "--local"],
        ["pipeline", "compile", "-o", "out.yaml", "--params", str(ROOT / "params.yaml"), "--set",
         f"download.source={address}"],
    ]  # fmt: skip
    for command in commands if key == "source" else commands[:1]:
        assert main(command) == 2
        text = capsys.readouterr()
        told(text.err, "holds a secret", "rule: ", "hint: put it in the environment: DISTILLDSM_DOWNLOAD_USERNAME")
        assert TELLTALE.decode() not in text.out + text.err
    assert not (place / "out.yaml").exists()
    with pytest.raises(SystemExit):
        run_step("check", folds=[0], download={"source": address})
    assert TELLTALE.decode() not in capsys.readouterr().err


def test_addresses_without_a_secret_are_taken():
    for address in ("sample", "msd:Task04_Hippocampus", "https://host/x.tar?version=2&design=a", "a@b/x.tar", "C:\\x"):
        assert DownloadConfig(source=address).source == address
        assert secret_in_address(address) is None


def test_manifests_hold_no_secret(place):
    job = TrainJobConfig(image="i:1", claim="c")
    written = json.dumps(manifest(job, "n", [], {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}))
    assert main(["pipeline", "compile", "--params", str(ROOT / "params.yaml"), "-o", "pipeline.yaml"]) == 0
    katib = ["sweep", "--params", str(ROOT / "params.yaml"), "katib", "-o", "sweep.yaml"]
    assert main(["pipeline", *katib]) == 0
    nowhere(place, written)


@pytest.mark.parametrize("address", ADDRESSES[:1] + ADDRESSES[3:4])
def test_values_that_everyone_may_read_hold_no_secret(address):
    refused = [
        lambda: Profile(env={"SOME_TOKEN": WORD}),
        lambda: Profile(env={"PROXY": address}),
        lambda: Storage(endpoint_url=address),
        lambda: Storage(bucket=f"s3://me:{QUOTED}@bucket/x"),
        lambda: TrainJobConfig(image="i:1", claim="c", env={"MLFLOW_TRACKING_PASSWORD": WORD}),
        lambda: TrainJobConfig(image="i:1", claim="c", env={"PROXY": address}),
        lambda: manifest(TrainJobConfig(image="i:1", claim="c"), "n", [], {"MLFLOW_TRACKING_URI": address}),
    ]
    for build in refused:
        with pytest.raises(ConfigError) as caught:
            build()
        assert TELLTALE.decode() not in str(caught.value)


def test_what_is_struck_out(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", WORD)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/token")
    text = redact(f"a {WORD} b {QUOTED} http://u:p@h/x?a=1&sig#b (/var/run/token) 'x?token=t' did you mean? x=3")
    assert text == "a *** b *** http://h/x?a=***&***#*** (/var/run/token) 'x?token=***' did you mean? x=3"
    assert redact(text) == text
    assert redact("{'Authorization': 'Basic YWI='}\nauthorization: AWS4 Credential=a, Signature=b\nbearer xyz.") == (
        "{'Authorization': '***'}\nauthorization: ***\nbearer ***"
    )
    assert redact("exceeded with url: /a?pl4nted (cause)", {}) == "exceeded with url: /a?*** (cause)"
    assert redact("sent pl4nted by me", {"HTTPS_PROXY": "http://me:pl4nted@proxy:80"}) == "sent *** by me"
    assert [is_secret_name(n) for n in ("MLFLOW_TRACKING_USERNAME", "HOME", "aws_secret_access_key")] == [
        False, False, True,
    ]  # fmt: skip
    assert WORD not in str(UserError("x", seen=f"server said {WORD}"))
