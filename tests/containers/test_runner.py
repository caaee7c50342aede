"""The container runner: what ends badly is reported as failed, always; nothing is left behind.

kfp reads the annotations of components as objects: no `from __future__ import annotations` here.
"""

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import docker
import kfp.local
import pytest
from kfp import dsl

from distilldsm.core.errors import UserError
from distilldsm.core.version import __version__
from distilldsm.pipeline import containers
from distilldsm.pipeline.containers import ContainerSettings, connect, container_runner, run_container
from tests.containers.conftest import BuiltImages


@pytest.fixture
def client(images: BuiltImages) -> Iterator[docker.DockerClient]:
    found = connect(images.host)
    yield found
    mine = {"label": f"{containers.CALLER_LABEL}={os.getpid()}"}  # other workers use the engine too
    assert found.containers.list(all=True, filters=mine) == [], "a container was left behind"
    found.close()


@pytest.fixture
def settings() -> ContainerSettings:
    return ContainerSettings(network="none", environment={"ASKED": "for"})


def shell(client: docker.DockerClient, images: BuiltImages, settings: ContainerSettings, script: str, **options) -> int:
    return run_container(client, images.data, ["sh", "-c", script], settings, **options)


@pytest.mark.containers
class TestRunContainer:
    def test_a_failing_container_is_reported_with_its_log(self, client, images, settings, capsys) -> None:
        code = shell(client, images, settings, "echo before; sleep 0.3; echo Grüße >&2; sleep 0.3; echo after; exit 7")
        output = capsys.readouterr().out
        assert code == 7
        assert output.splitlines()[:3] == ["before", "Grüße", "after"]
        assert "ended with exit code 7" in output

    def test_what_a_container_may_do(self, client, images, settings, capsys) -> None:
        script = "grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; echo $ASKED; echo x >/tmp/x"
        assert shell(client, images, settings, f"{script} && ! echo x >/opt/distilldsm/x") == 0
        lines = capsys.readouterr().out.splitlines()
        privileges = [line.split()[1] for line in lines if line.startswith(("Cap", "NoNewPrivs"))]
        assert privileges == ["0000000000000000", "0000000000000000", "1"]
        assert "for" in lines
        assert any("Read-only file system" in line for line in lines)

    def test_outputs_belong_to_the_caller(self, client, images, tmp_path) -> None:
        settings = ContainerSettings(network="none", volumes=(tmp_path,))
        assert shell(client, images, settings, f"echo x >{tmp_path}/file") == 0
        assert (tmp_path / "file").stat().st_uid == os.getuid()

    def test_a_read_only_volume(self, client, images, tmp_path, capsys) -> None:
        (tmp_path / "scan").write_text("voxels\n")
        settings = ContainerSettings(network="none", read_only_volumes=(tmp_path,))
        assert shell(client, images, settings, f"cat {tmp_path}/scan; echo x >{tmp_path}/scan") != 0
        assert "voxels\n" in capsys.readouterr().out
        assert (tmp_path / "scan").read_text() == "voxels\n"

    def test_an_interrupt_ends_the_container(self, client, images, settings, monkeypatch) -> None:
        def interrupted(container: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(containers, "_print_log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shell(client, images, settings, "sleep 60")

    def test_a_command_that_is_not_there(self, client, images, settings) -> None:
        with pytest.raises(UserError, match=r"could not run the container(.|\n)*no-such-command"):
            run_container(client, images.data, ["no-such-command"], settings)

    def test_a_missing_image_is_not_pulled(self, client, images, settings, tmp_path) -> None:
        with pytest.raises(UserError, match=r"absent/image:1: image not found(.|\n)*make images"):
            with container_runner(images=["absent/image:1"], root=tmp_path, engine=images.host):
                pytest.fail("the image was taken")
        with pytest.raises(UserError, match="could not run the container"):
            run_container(client, "absent/image:1", ["true"], settings)

    def test_an_image_of_another_version(self, client, images, settings, tmp_path) -> None:
        text = f"FROM {images.data}\nLABEL org.opencontainers.image.version=0.0.1\n"
        client.images.build(fileobj=io.BytesIO(text.encode()), tag="distilldsm/data:old", forcerm=True)
        with pytest.raises(UserError, match=rf"another version(.|\n)*version=0.0.1(.|\n)*{__version__}"):
            with container_runner(images=["distilldsm/data:old"], root=tmp_path, engine=images.host):
                pytest.fail("the image was taken")


@pytest.mark.containers
@pytest.mark.slow
class TestUnderKfp:
    @pytest.fixture
    def runner(self, images: BuiltImages, tmp_path, monkeypatch) -> Iterator[object]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
        settings = ContainerSettings(network="none")
        tags = [images.data, images.train, images.export]
        with container_runner(images=tags, root=tmp_path / "runs", engine=images.host, settings=settings) as found:
            kfp.local.init(found, pipeline_root=str(tmp_path / "runs"), raise_on_error=True)
            yield found

    def test_an_immediate_failure_is_a_failure_each_time(self, client, images, runner) -> None:
        image = images.data

        @dsl.container_component
        def fails() -> dsl.ContainerSpec:
            return dsl.ContainerSpec(image=image, command=["sh", "-c", "exit 4"])

        for _ in range(5):
            with pytest.raises(RuntimeError, match="FAILURE"):
                fails()

    def test_a_component_writes_its_artifact(self, client, images, runner, tmp_path) -> None:
        @dsl.component(base_image=images.data, install_kfp_package=False)
        def writes(word: str, data: dsl.Output[dsl.Dataset]) -> str:
            import os

            with open(data.path, "w") as stream:
                stream.write(f"{word} {os.environ['MLFLOW_TRACKING_URI']}")
            data.metadata["cases"] = 3
            return word

        task = writes(word="Grüße")
        assert task.output == "Grüße" if "Output" not in task.outputs else task.outputs["Output"] == "Grüße"
        artifact = task.outputs["data"]
        assert artifact.metadata["cases"] == 3
        assert Path(artifact.path).read_text() == f"Grüße sqlite:///{tmp_path}/store/mlflow.db"
        assert Path(artifact.path).is_relative_to(tmp_path / "runs")

    def test_a_failing_component_shows_its_traceback(self, client, images, runner, capsys) -> None:
        @dsl.component(base_image=images.data, install_kfp_package=False)
        def breaks() -> None:
            raise ValueError("what went wrong")

        with pytest.raises(RuntimeError, match="FAILURE"):
            breaks()
        assert "ValueError: what went wrong" in capsys.readouterr().out

    def test_every_image_opens_an_sqlite_store(self, client, images, tmp_path) -> None:
        code = "import sys; from distilldsm.tracking.store import Store; print(Store(sys.argv[1]).reachable())"
        for image in (images.train, images.export):
            settings = ContainerSettings(network="none", volumes=(tmp_path,))
            store = f"sqlite:///{tmp_path}/mlflow.db"
            assert run_container(client, image, ["python", "-c", code, store], settings) == 0


class FakeEngine:
    """What the runner asks of Docker's client; the container ends with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.images = SimpleNamespace(get=lambda name: SimpleNamespace(labels={containers.VERSION_LABEL: __version__}))
        self.containers = SimpleNamespace(create=self.create)
        self.code, self.closed, self.removed, self.options = code, 0, 0, {}

    def create(self, image: str, command: list[str], **options) -> SimpleNamespace:
        self.options = options
        return SimpleNamespace(
            start=lambda: None,
            logs=lambda **_: [b"Gr\xc3", b"\xbc\xc3\x9fe\n"],
            wait=lambda: {"StatusCode": self.code},
            reload=lambda: None,
            attrs={"State": {"OOMKilled": True}},
            remove=self.remove,
        )

    def remove(self, **_: object) -> None:
        self.removed += 1

    def info(self) -> dict:
        return {"SecurityOptions": ["name=selinux"]}

    def close(self) -> None:
        self.closed += 1


def test_tasks_of_kfp_end_as_their_containers_and_its_own_handler_is_back_afterwards(tmp_path, monkeypatch, capsys):
    from kfp.local import docker_task_handler, status

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    before = docker_task_handler.DockerTaskHandler
    for code, expected in ((0, status.Status.SUCCESS), (137, status.Status.FAILURE)):
        engine = FakeEngine(code)
        monkeypatch.setattr(containers, "connect", lambda address, engine=engine: engine)
        with container_runner(images=["i:1"], root=tmp_path / "runs") as runner:
            task = docker_task_handler.DockerTaskHandler(
                image="i:1",
                full_command=["true"],
                pipeline_root=f"{tmp_path}/runs/1",
                runner=runner,
                env_vars={"A": "b"},
            )
            assert task.run() == expected
        assert docker_task_handler.DockerTaskHandler is before
        assert (engine.closed, engine.removed) == (2, 1)
        mounted = {str(tmp_path / name): {"bind": str(tmp_path / name), "mode": "rw,z"} for name in ("runs", "store")}
        assert engine.options["volumes"] == mounted
        assert all(Path(path).is_dir() for path in mounted)
        assert engine.options["environment"]["A"] == "b"
    out = capsys.readouterr().out
    assert out.startswith("Grüße\n")
    assert out.endswith("ended with exit code 137: it exceeded its memory limit\n")


def test_a_socket_that_is_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere.sock: the container engine does not answer(.|\n)*DOCKER_HOST"):
        connect(f"unix://{tmp_path}/nowhere.sock")


def test_a_socket_that_never_answers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(containers, "_PROBE_TIMEOUT_S", 1)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("silent.sock")
        silent.listen()
        with pytest.raises(UserError, match="does not answer"):
            connect(f"unix://{tmp_path}/silent.sock")


def test_tracking_reaches_the_containers(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    found = containers._with_tracking(ContainerSettings())
    assert found.volumes == (tmp_path / "store",)
    assert found.network is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert containers._with_tracking(ContainerSettings()).network == "host"
    assert containers._with_tracking(ContainerSettings(network="none")).network == "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert containers._with_tracking(ContainerSettings()).network is None
