"""`images`: the three images, built once, in an engine that all workers of a test run share."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import certifi
import pytest
from filelock import FileLock

from distilldsm.core.version import __version__
from tests.containers import engine

ROLES = ("data", "train", "export")


@dataclass(frozen=True)
class BuiltImages:
    """Tags by role, and where they are."""

    host: str
    """Address of the engine, as for DOCKER_HOST; it knows the networks `none` and `host` only."""
    cli: str
    """The docker command they were built with."""
    folder: str
    """Where the engine keeps everything."""
    secret: str
    """A word that stood in both secrets of the build."""
    commit: str
    """What the working tree was when they were built."""
    cpu: bool
    """Whether PyTorch is the build without CUDA."""
    data: str = f"distilldsm/data:{__version__}"
    train: str = f"distilldsm/train:{__version__}"
    export: str = f"distilldsm/export:{__version__}"

    def tag(self, role: str) -> str:
        return str(getattr(self, role))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[BuiltImages]:
    """The images; skips where no engine can be started, fails where they cannot be built."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    path, lock = shared / "containers.json", FileLock(shared / "containers.lock")
    with lock:
        state = engine.read_state(path)
        if "skipped" in state:
            pytest.skip(state["skipped"])
        if not state:
            try:
                state = _start(shared)
            except pytest.skip.Exception as reason:
                path.write_text(json.dumps({"skipped": str(reason)}))
                raise
        path.write_text(json.dumps({**state, "users": [*state.get("users", []), os.getpid()]}))
    yield BuiltImages(**{name: state[name] for name in ("host", "cli", "folder", "secret", "commit", "cpu")})
    with lock:
        state = engine.read_state(path)
        # A worker that crashed is none any more.
        users = [pid for pid in state["users"] if pid != os.getpid() and Path(f"/proc/{pid}").exists()]
        path.write_text(json.dumps({**state, "users": users} if users else {}))
        if not users:
            engine.stop_engine(state)


def _start(shared: Path) -> dict:
    engine.require_tools()
    cli = engine.docker_cli()
    engine.base_archive()
    wheels = engine.wheelhouse(ROLES)
    word = secrets.token_hex(16)
    passed = {"pip_config": shared / "secret-pip.conf", "ca_bundle": shared / "secret-ca.pem"}
    passed["pip_config"].write_text(f"[global]\nindex-url = https://user:{word}@127.0.0.1:9/simple\n")
    passed["ca_bundle"].write_text(f"# {word}\n{Path(certifi.where()).read_text()}")
    # A short path: a socket's name has a hundred characters at most.
    state = engine.start_engine(Path(tempfile.mkdtemp(prefix="dsm-engine-")))
    commit = engine.git_commit()
    try:
        engine.build_images(cli, str(state["host"]), wheels, passed, shared / "build.log", roles=ROLES)
    except BaseException:
        engine.stop_engine(state)
        raise
    return {**state, "cli": cli, "secret": word, "commit": commit, "cpu": any(wheels.glob("torch-*+cpu-*"))}
