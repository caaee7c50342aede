"""PostgreSQL, an S3 server and MLflow's, started here by the commands and settings of docker/compose.yaml."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.tracking import free_port
from tests.services.compose import ROOT, services

ADMIN, TRAINER = "admin", "trainer"


@dataclass(kw_only=True)
class Servers:
    """Where everything is, and all that is secret about it."""

    folder: Path
    """Logs of all servers."""
    secrets: dict[str, str]
    """What docker/.env would hold."""
    postgres_port: int
    s3_url: str
    mlflow_url: str = ""
    passwords: dict[str, str] = field(default_factory=dict)
    """Of MLflow's users."""

    @property
    def postgres(self) -> dict[str, str]:
        """Environment of PostgreSQL's clients."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.postgres_port),
            "PGUSER": "mlflow",
            "PGPASSWORD": self.secrets["POSTGRES_PASSWORD"],
        }

    @property
    def s3(self) -> dict[str, str]:
        """Environment of S3's clients."""
        return {
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.secrets["S3_ACCESS_KEY"],
            "AWS_SECRET_ACCESS_KEY": self.secrets["S3_SECRET_KEY"],
        }

    def tracking(self, user: str = TRAINER) -> dict[str, str]:
        """Environment of MLflow's clients."""
        return {
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[user],
        }

    def words(self) -> set[str]:
        """All that must be found nowhere."""
        return {*self.secrets.values(), *self.passwords.values()}

    def sql(self, query: str, *values: Any, database: str = "mlflow") -> list[tuple[Any, ...]]:
        """What a query gives, asked past MLflow."""
        import psycopg2

        access = {"host": "127.0.0.1", "port": self.postgres_port, "user": "mlflow", "dbname": database}
        connection = psycopg2.connect(**access, password=self.secrets["POSTGRES_PASSWORD"])
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, values or None)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def bucket(self) -> Any:
        """The bucket, asked past MLflow and DVC."""
        import boto3

        return boto3.resource(
            "s3",
            endpoint_url=self.s3_url,
            region_name="us-east-1",
            aws_access_key_id=self.secrets["S3_ACCESS_KEY"],
            aws_secret_access_key=self.secrets["S3_SECRET_KEY"],
        ).Bucket("distilldsm")

    def ask(
        self, path: str, user: str | None = None, *, password: str | None = None, body: dict[str, Any] | None = None
    ) -> tuple[int, Any]:
        """Status and answer of MLflow's REST interface: POST with a body, else GET."""
        headers = {"Content-Type": "application/json"}
        if user is not None:
            pair = f"{user}:{self.passwords[user] if password is None else password}"
            headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        request = urllib.request.Request(self.mlflow_url + path, json.dumps(body).encode() if body else None, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def add_user(self, name: str) -> None:
        """Register a user, as the administrator does."""
        self.passwords[name] = secrets.token_hex(16)
        body = {"username": name, "password": self.passwords[name]}
        status, answer = self.ask("/api/2.0/mlflow/users/create", ADMIN, body=body)
        assert status == 200, answer


@contextmanager
def running() -> Iterator[Servers]:
    """All three, and a user of MLflow; skips where PostgreSQL or a package is missing."""
    for module in ("psycopg2", "boto3", "moto", "flask_wtf", "dvc_s3"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[services]' 'moto[server]'")
    programs = postgres_programs()
    names = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_SECRET_KEY", "MLFLOW_ADMIN_PASSWORD")
    with ExitStack() as stack:
        # Not below pytest's folder, which other users may not enter; and a socket's name has a hundred characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsm-services-")))
        ports = [free_port() for _ in range(3)]
        found = Servers(
            folder=folder,
            secrets={name: secrets.token_hex(20) for name in names},
            postgres_port=ports[0],
            s3_url=f"http://127.0.0.1:{ports[1]}",
        )
        found.passwords[ADMIN] = found.secrets["MLFLOW_ADMIN_PASSWORD"]
        defined = services(found.secrets)
        stack.enter_context(_postgres(found, programs, defined["postgres"]["environment"]))
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports[1])]
        stack.enter_context(_process(found, "s3", moto, {}, lambda: _answers(f"{found.s3_url}/moto-api/")))
        prepared = _natively(defined["prepare"]["command"])
        for expected in ("made", "was there"):  # the second time it changes nothing
            done = subprocess.run(
                prepared, env=_environment(found, defined["prepare"]), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == [expected] * 2
        found.mlflow_url = f"http://127.0.0.1:{ports[2]}"
        command = _natively(defined["mlflow"]["command"], port=ports[2])
        environment = _environment(found, defined["mlflow"])
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(ROOT / "docker/mlflow-auth.ini")
        environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = f"127.0.0.1:{ports[2]}"
        stack.enter_context(
            _process(found, "mlflow", command, environment, lambda: _answers(found.mlflow_url + "/health"))
        )
        found.add_user(TRAINER)
        yield found


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs; skips where there is none, or none may be started."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda name: float(Path(name).parent.name))
    beside = shutil.which("initdb")
    if not folders and beside is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv to start it as another user")
    return Path(folders[-1]) if folders else Path(beside or "").parent


def _as_postgres() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


@contextmanager
def _postgres(found: Servers, programs: Path, settings: dict[str, str]) -> Iterator[None]:
    """A cluster of its own, with the settings that the image's entry point turns into initdb's arguments."""
    place = found.folder / "postgres"
    place.mkdir()
    word = place / "password"
    word.write_text(settings["POSTGRES_PASSWORD"])
    if os.geteuid() == 0:
        found.folder.chmod(0o711)
        for path in (place, word):
            shutil.chown(path, "postgres", "postgres")
    user, data = settings["POSTGRES_USER"], place / "data"
    made = [
        *_as_postgres(), str(programs / "initdb"), f"--username={user}", f"--pwfile={word}", f"--pgdata={data}",
        "--encoding=UTF8", "--no-sync", *settings["POSTGRES_INITDB_ARGS"].split(),
    ]  # fmt: skip
    done = subprocess.run(made, cwd=place, capture_output=True, text=True, check=False)
    word.unlink()
    assert done.returncode == 0, done.stderr
    command = [
        *_as_postgres(), str(programs / "postgres"), "-D", str(data), "-k", str(place), "-p", str(found.postgres_port),
        "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "shared_buffers=16MB",
    ]  # fmt: skip
    ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(found.postgres_port)]
    with _process(
        found, "postgres", command, {}, lambda: subprocess.run(ready, check=False).returncode == 0, cwd=place
    ):
        create = [str(programs / "createdb"), settings["POSTGRES_DB"]]
        subprocess.run(create, env={**os.environ, **found.postgres}, check=True)
        yield


@contextmanager
def _process(
    found: Servers,
    name: str,
    command: Sequence[str],
    environment: dict[str, str],
    ready: Callable[[], bool],
    cwd: Path | None = None,
) -> Iterator[None]:
    """A server in a process group of its own, from when it answers on; what it says goes to NAME.log."""
    log = found.folder / f"{name}.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=cwd or found.folder,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not ready():
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"{name} has ended:\n{said}"
            assert time.monotonic() < deadline, f"{name} does not answer:\n{said}"
            time.sleep(0.2)
        yield
    finally:
        # PostgreSQL ends at once by this signal, though somebody may still be connected.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _natively(command: Sequence[str], port: int | None = None) -> list[str]:
    """A container's command for this machine: its own programs, one worker, a free port of this host only."""
    changed = {
        "python3": [sys.executable],
        "mlflow": [sys.executable, "-m", "mlflow"],
        "/opt/distilldsm/prepare_services.py": [str(ROOT / "docker/prepare_services.py")],
        "--host=0.0.0.0": ["--host=127.0.0.1"],
        "--port=5000": [f"--port={port}"],
        "--workers=2": ["--workers=1"],
    }
    first, *rest = command
    return [*changed[first], *(word for one in rest for word in changed.get(one, [one]))]


def _environment(found: Servers, service: dict[str, Any]) -> dict[str, str]:
    """A service's own environment, with the addresses of this machine."""
    here = {**found.postgres, **found.s3, "MLFLOW_DISABLE_TELEMETRY": "true"}
    assert {**service["environment"], **here}.items() >= {"PGUSER": "mlflow"}.items()
    return {**os.environ, **service["environment"], **here}
