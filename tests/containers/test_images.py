"""The images: what is in them, what is not, and that they run as a cluster would run them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import docker
import pytest

from distilldsm.core.privacy import SWITCHES
from distilldsm.core.version import __version__
from distilldsm.pipeline.containers import connect
from tests.containers.conftest import ROLES, BuiltImages
from tests.containers.engine import ROOT

pytestmark = [pytest.mark.containers, pytest.mark.slow]

LIMIT_MB = {"data": 600, "train": 1600, "export": 1250}


@pytest.fixture(scope="module")
def client(images: BuiltImages) -> Iterator[docker.DockerClient]:
    found = connect(images.host)
    yield found
    found.close()


def run(client: docker.DockerClient, image: str, *command: str, user: str = "54321:54321") -> str:
    """A command's output, run as hardened clusters do: a user id the image does not know, read-only, no network."""
    options = {"read_only": True, "tmpfs": {"/tmp": "rw,mode=1777"}, "cap_drop": ["ALL"], "network_mode": "none"}
    options["security_opt"] = ["no-new-privileges"]
    return client.containers.run(image, list(command), user=user, stderr=True, remove=True, **options).decode()


@pytest.mark.parametrize("role", ROLES)
def test_labels_and_configuration(images: BuiltImages, client: docker.DockerClient, role: str) -> None:
    config = client.images.get(images.tag(role)).attrs["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"] == f"distilldsm {role}"
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == images.commit
    assert config["User"] == "10001:10001"
    assert not config["Entrypoint"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["GIT_COMMIT"] == labels["org.opencontainers.image.revision"]
    assert SWITCHES.items() <= environment.items()


@pytest.mark.parametrize("role", ROLES)
def test_entry_point_with_a_read_only_root(images: BuiltImages, client: docker.DockerClient, role: str) -> None:
    script = "distilldsm --version; sh -lc 'command -v python'"
    assert run(client, images.tag(role), "sh", "-c", script).split() == [
        "distilldsm",
        __version__,
        "/opt/venv/bin/python",
    ]


@pytest.mark.parametrize("role", ROLES)
def test_no_compiler_and_no_pip(images: BuiltImages, client: docker.DockerClient, role: str) -> None:
    names = "gcc cc c99 g++ c++ clang tcc cpp ld as make cmake nvcc pip pip3"
    searched = "find / -xdev -name cc1 -o -xdev -name cc1plus -o -xdev -name 'libgcc.a' 2>/dev/null; true"
    script = f"for n in {names}; do command -v $n; done; {searched}"
    assert run(client, images.tag(role), "sh", "-c", script, user="0:0") == ""


def test_no_torch_in_the_data_image(images: BuiltImages, client: docker.DockerClient) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'openvino', 'mlflow', 'onnx') if u.find_spec(n)])"
    assert run(client, images.data, "python", "-c", code) == "[]\n"


def test_no_training_code_in_the_export_image(images: BuiltImages, client: docker.DockerClient) -> None:
    library = "/opt/distilldsm/lib"
    there = run(client, images.export, "sh", "-c", f"cd {library} && find . -name '*.py'").split()
    training = {name.rpartition("/")[2] for name in there if name.startswith("./distilldsm/training/")}
    assert training == {"__init__.py", "patches.py", "validation.py", "distributed.py"}
    assert "./distilldsm/evaluation/scoring.py" not in there
    everything = run(client, images.train, "sh", "-c", f"cd {library} && find . -name '*.py'").split()
    assert "./distilldsm/training/loop.py" in everything


def test_the_train_image_has_torchrun(images: BuiltImages, client: docker.DockerClient) -> None:
    assert "usage: torchrun" in run(client, images.train, "sh", "-lc", "torchrun --help")


@pytest.mark.parametrize("role", ROLES)
def test_size(images: BuiltImages, client: docker.DockerClient, role: str) -> None:
    if role != "data" and not images.cpu:
        pytest.skip("PyTorch's build with CUDA has another size")
    size_mb = client.images.get(images.tag(role)).attrs["Size"] / 1e6
    print(f"{role}: {size_mb:.0f} MB")
    assert size_mb < LIMIT_MB[role]


def test_a_secret_of_the_build_is_in_no_layer(images: BuiltImages) -> None:
    """Nor anywhere else where the engine keeps what it has built: each layer is a folder there."""
    known = "Distill DSM: volumetric segmentation"  # a sentence of the package's source
    search = ["grep", "-rhoaF", "--exclude-dir=merged", "-e", images.secret, "-e", known, f"{images.folder}/data"]
    done = subprocess.run(search, capture_output=True, text=True, check=False)
    assert set(done.stdout.splitlines()) == {known}


def test_the_pip_configuration_reaches_pip(images: BuiltImages, tmp_path) -> None:
    """A configuration that pip refuses must fail the build: else the secret would have no effect."""
    context = tmp_path / "context"
    context.mkdir()
    for name in ("docker", "distilldsm", "conf"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, context)
    (context / "README.md").write_text("another README, so that no cached layer is taken")
    refused = tmp_path / "pip.conf"
    refused.write_text("[global]\ntimeout = soon\n")
    command = [
        images.cli, "--host", images.host, "build", "--network=none", "--target=code", "--file=docker/Dockerfile",
        "--build-arg=BASE_IMAGE=distilldsm/test-base:bookworm", f"--build-arg=WHEELS=distilldsm/wheels:{__version__}",
        "--secret", f"id=pip_config,src={refused}", ".",
    ]  # fmt: skip
    environment = {"DOCKER_BUILDKIT": "1", "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=context, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "option timeout: invalid" in done.stdout + done.stderr
