"""A Docker Engine of the tests' own: its own folders and socket, no network, nothing of the host's engine touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = "distilldsm/test-base:bookworm"
NEEDED_GB = 10


def cache_directory() -> Path:
    """Where the base system and the wheels are kept between test runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distilldsm-tests"
    folder = Path(os.environ.get("DISTILLDSM_TEST_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def docker_cli() -> str:
    """A docker command that can build with secrets; skips where there is none."""
    for found in dict.fromkeys(filter(None, (shutil.which("docker"), "/usr/bin/docker"))):
        if not Path(found).is_file():
            continue
        version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        words = version.split()
        bundled = len(words) > 2 and words[2].split(".")[0].isdigit() and int(words[2].split(".")[0]) < 23
        # From 23 on, BuildKit is a plug-in that may be missing.
        if bundled or subprocess.run([found, "buildx", "version"], capture_output=True, check=False).returncode == 0:
            return found
    pytest.skip("no docker command that can build with secrets (apt-get install docker.io)")


def require_tools() -> None:
    """Skip, and say why, where no engine can be started."""
    missing = [tool for tool in ("dockerd", "mmdebstrap", "git") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install docker.io mmdebstrap)")
    if os.geteuid() != 0:
        pytest.skip("starting dockerd takes root")
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < NEEDED_GB:
        pytest.skip(f"{free:.0f} GB free for temporary files, {NEEDED_GB} are needed")


def start_engine(folder: Path) -> dict[str, object]:
    """Start dockerd with everything below `folder`; skips where it does not come up."""
    host = f"unix://{folder}/docker.sock"
    command = [
        "dockerd", "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
        "--userland-proxy=false", f"--host={host}", f"--data-root={folder}/data", f"--exec-root={folder}/exec",
        f"--pidfile={folder}/docker.pid", "--exec-opt=native.cgroupdriver=cgroupfs", "--storage-driver=overlay2",
    ]  # fmt: skip
    log = folder / "dockerd.log"
    with open(log, "wb") as stream:
        # A session of its own: it outlives the worker that started it, as others may still use it.
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    for _ in range(120):
        if process.poll() is not None:
            break
        if subprocess.run(["docker", "--host", host, "info"], capture_output=True, check=False).returncode == 0:
            return {"host": host, "pid": process.pid, "folder": str(folder)}
        time.sleep(0.5)
    stop_engine({"pid": process.pid, "folder": str(folder)}, keep=True)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    shutil.rmtree(folder, ignore_errors=True)
    pytest.skip(f"dockerd cannot be started here: {''.join(last)[:300]}")


def stop_engine(state: dict, *, keep: bool = False) -> None:
    """End the engine and its containers, and remove its folders."""
    pid = int(state["pid"])
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(60):
            # Gone, or ended and waiting for a parent that does not care.
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.5)
        else:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if not keep:
        # In the background: some disks take minutes for the gigabytes of the images.
        subprocess.Popen(["rm", "-rf", "--", state["folder"]], start_new_session=True, stderr=subprocess.DEVNULL)


def base_archive() -> Path:
    """A minimal Debian 12 with Python, made once."""
    archive = cache_directory() / "base-bookworm-1.tar"
    if not archive.is_file():
        partial = archive.with_suffix(f".{os.getpid()}.tar")
        exclude = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
        include = "--include=ca-certificates,python3,python3-venv"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", include, *exclude, "bookworm", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            partial.unlink(missing_ok=True)
            pytest.skip(f"mmdebstrap cannot make a base system here: {done.stderr.strip()[-300:]}")
        partial.rename(archive)
    return archive


def wheelhouse(roles: Sequence[str]) -> Path:
    """The wheels of all images, by the pip that runs the tests and its configuration; made once per set of pins."""
    lists = [
        subprocess.run(
            [sys.executable, str(ROOT / "docker/requirements.py"), role, str(ROOT / "pyproject.toml")],
            capture_output=True, text=True, check=True,
        ).stdout
        for role in roles
    ]  # fmt: skip
    constraints = (ROOT / "constraints.txt").read_text()
    torch = next(line for line in constraints.splitlines() if line.startswith("torch=="))
    key = hashlib.sha256("\n".join([*lists, constraints]).encode()).hexdigest()[:12]
    folder = cache_directory() / f"wheels-{key}"
    if not folder.is_dir():
        for old in cache_directory().glob("wheels-*"):
            shutil.rmtree(old, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        partial.mkdir()
        names = partial / "requirements.txt"
        names.write_text("\n".join([torch, *lists, "setuptools>=77", "wheel"]))
        # The base system's Python, whatever runs the tests.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--python-version=3.11", "--only-binary=:all:"]
        pip += ["--dest", str(partial), "--constraint", str(ROOT / "constraints.txt")]
        for more in (["--requirement", str(names)], ["--no-deps", "kfp"]):
            subprocess.run([*pip, *more], check=True)
        partial.rename(folder)
    return folder


def build_images(
    cli: str, host: str, wheels: Path, secrets: dict[str, Path], log: Path, *, roles: Sequence[str]
) -> None:
    """Import the base system and build the images by docker/build.py, the way `make images` does."""
    environment = {**os.environ, "DOCKER_HOST": host}
    environment.pop("DOCKER_CONTEXT", None)
    subprocess.run([cli, "import", str(base_archive()), BASE], check=True, env=environment, capture_output=True)
    cpu = any(wheels.glob("torch-*+cpu-*"))
    command = [
        sys.executable, str(ROOT / "docker/build.py"), "--engine", cli, "--base-image", BASE, "--network", "none",
        "--wheelhouse", str(wheels), f"--torch-build={'+cpu' if cpu else ''}",
        "--pip-config", str(secrets["pip_config"]), "--ca-bundle", str(secrets["ca_bundle"]), *roles,
    ]  # fmt: skip
    with open(log, "wb") as stream:
        done = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False)
    if done.returncode:
        pytest.fail("the images cannot be built:\n" + log.read_text(errors="replace")[-3000:])


def git_commit() -> str:
    """The commit of the working tree."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def read_state(path: Path) -> dict:
    """What the worker that started the engine left for the others."""
    return json.loads(path.read_text()) if path.is_file() else {}
