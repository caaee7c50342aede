"""Runs KFP components in containers on this machine, through Docker's API (Docker Engine, Podman).

It replaces the task handler of `kfp.local.DockerRunner`. kfp's handler (2.17) lets the engine remove a container at its
end and counts a missing container as a success, so a step that fails at once is reported as successful. Our handler
waits for the end, reads the exit code, and removes the container itself.
"""

from __future__ import annotations

import codecs
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distilldsm.core.errors import UserError
from distilldsm.core.version import __version__

if TYPE_CHECKING:
    import docker

VERSION_LABEL = "org.opencontainers.image.version"
CALLER_LABEL = "distilldsm.caller"
"""Label of each container: id of the process that waits for it. Use it to find containers of a killed process."""
PASSED_ON = ("KFP_RUN_ID", "OMP_NUM_THREADS", "PGUSER", "PGPASSWORD")
"""The caller's environment variables that every container gets; also all that begin with PASSED_ON_PREFIXES."""
PASSED_ON_PREFIXES = ("MLFLOW_TRACKING_", "DISTILLDSM_DOWNLOAD_")
_PROBE_TIMEOUT_S, _TIMEOUT_S = 10, 120
_SHARED_MEMORY = "1g"
"""Size of `/dev/shm`, which the processes of a training use to exchange arrays."""


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """Settings of the containers. All have a read-only root, a `/tmp` in memory, and no privileges."""

    volumes: tuple[Path, ...] = ()
    """Folders and files that containers may write, mounted at the same path."""
    read_only_volumes: tuple[Path, ...] = ()
    """The same, but read-only, e.g. the folder of the data set."""
    environment: Mapping[str, str] = field(default_factory=dict)
    network: str | None = None
    """`host`, `none` or a network's name; None: the engine's default."""


@contextlib.contextmanager
def container_runner(
    *, images: Sequence[str], root: Path, engine: str | None = None, settings: ContainerSettings | None = None
) -> Iterator[Any]:
    """Yield a runner for `kfp.local.init` that runs each component in its own container.

    Containers see `root` (the artifacts), the MLflow store of the environment, and the volumes of `settings`. If the
    tracking server runs on this machine, they use the host's network.

    Args:
        images: the images to run; checked before anything starts. No image is ever pulled.
        root: the `pipeline_root` of `kfp.local.init`, or a parent of it.
        engine: address, e.g. `unix:///run/podman/podman.sock`; None: DOCKER_HOST, or else Docker's default.

    Raises:
        UserError: the engine does not answer, or an image is missing or of another version.
    """
    import kfp.local
    from kfp.local import docker_task_handler, status

    settings = settings or ContainerSettings()
    complete = _with_tracking(replace(settings, volumes=(*settings.volumes, root)))
    with contextlib.closing(connect(engine)) as client:
        check_images(client, images)
    for path in complete.volumes:
        if not path.exists():
            path.mkdir(parents=True)  # otherwise the engine creates it, owned by root

    class TaskHandler:
        """kfp creates one per task, with keyword arguments."""

        def __init__(
            self,
            image: str,
            full_command: list[str],
            pipeline_root: str,
            runner: Any,
            env_vars: Mapping[str, str] | None = None,
        ) -> None:
            self._image, self._command, self._environment = image, full_command, dict(env_vars or {})

        def run(self) -> Any:
            with contextlib.closing(connect(engine)) as client:  # several tasks run at once
                code = run_container(client, self._image, self._command, complete, environment=self._environment)
            return status.Status.SUCCESS if code == 0 else status.Status.FAILURE

    # kfp finds the handler by the runner's exact type. It would not accept a subclass of DockerRunner.
    original = docker_task_handler.DockerTaskHandler
    docker_task_handler.DockerTaskHandler = TaskHandler
    try:
        yield kfp.local.DockerRunner()
    finally:
        docker_task_handler.DockerTaskHandler = original


def connect(engine: str | None = None) -> docker.DockerClient:
    """A client of the engine, after the engine has answered.

    Raises:
        UserError: the engine does not answer, or the package `docker` is missing.
    """
    try:
        import docker
        from docker.errors import DockerException
    except ModuleNotFoundError:
        raise UserError("containers need the package 'docker'", hint="pip install '.[pipeline]'") from None

    def client(timeout: int) -> docker.DockerClient:
        if engine is None:
            return docker.from_env(timeout=timeout)
        return docker.DockerClient(base_url=engine, timeout=timeout)

    try:
        probe = client(_PROBE_TIMEOUT_S)
        probe.ping()
        probe.close()
        return client(_TIMEOUT_S)
    except (DockerException, OSError) as error:
        raise UserError(
            "the container engine does not answer",
            where=engine or os.environ.get("DOCKER_HOST") or "Docker's default socket",
            seen=str(error)[:300],
            hint="start Docker or `podman system service`, and name its socket (DOCKER_HOST=unix:///...)",
        ) from None


def check_images(client: docker.DockerClient, images: Sequence[str]) -> None:
    """Check that the engine has the images, in this version.

    Raises:
        UserError: an image is missing, or its version label is not this package's version.
    """
    from docker.errors import ImageNotFound

    for name in dict.fromkeys(images):
        try:
            image = client.images.get(name)
        except ImageNotFound:
            raise UserError("image not found", where=name, hint="build it (make images); none is pulled") from None
        seen = (image.labels or {}).get(VERSION_LABEL)
        if seen != __version__:
            raise UserError(
                "the image was built from another version",
                where=name,
                seen=f"{VERSION_LABEL}={seen}",
                rule=f"{__version__}, the version of this package",
                hint="build it again (make images)",
            )


def run_container(
    client: docker.DockerClient,
    image: str,
    command: Sequence[str],
    settings: ContainerSettings,
    *,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command in a new container, print its log, return its exit code, and remove the container.

    Args:
        environment: variables; those of `settings` override them.

    Raises:
        UserError: the image is missing, the engine refuses the container, or the engine stops.
    """
    from docker.errors import APIError, DockerException

    try:
        options = _options(client, settings, environment or {})
        container = client.containers.create(image, list(command), entrypoint="", detach=True, **options)
        try:
            container.start()
            _print_log(container)
            code = int(container.wait()["StatusCode"])
            if code:
                container.reload()
                memory = ": it exceeded its memory limit" if container.attrs["State"].get("OOMKilled") else ""
                print(f"container of {image} ended with exit code {code}{memory}")
            return code
        finally:
            # Also after an interrupt: nobody would wait for the container.
            with contextlib.suppress(DockerException, OSError):
                container.remove(force=True, v=True)
    except APIError as error:
        raise UserError("the engine could not run the container", where=image, seen=error.explanation) from None
    except (DockerException, OSError) as error:
        raise UserError("the connection to the container engine broke", where=image, seen=str(error)[:300]) from None


def _print_log(container: Any) -> None:
    """Print stdout and stderr as they come. If the log breaks off, the container continues."""
    from docker.errors import DockerException

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for chunk in container.logs(stream=True, follow=True):
            print(decoder.decode(chunk), end="", flush=True)
    except (DockerException, OSError) as error:
        print(f"(the log breaks off: {error})")


def _options(
    client: docker.DockerClient, settings: ContainerSettings, environment: Mapping[str, str]
) -> dict[str, Any]:
    passed = {k: v for k, v in os.environ.items() if k in PASSED_ON or k.startswith(PASSED_ON_PREFIXES)}
    security = client.info().get("SecurityOptions") or []
    label = ",z" if any("selinux" in option for option in security) else ""
    mounts = {str(p.absolute()): "ro" for p in settings.read_only_volumes}
    mounts |= {str(p.absolute()): "rw" for p in settings.volumes}
    return {
        "environment": {**passed, **environment, **settings.environment},
        "volumes": {path: {"bind": path, "mode": mode + label} for path, mode in mounts.items()},
        # The caller owns the outputs. If the caller is root, the container has root's id but no capabilities.
        "user": f"{os.getuid()}:{os.getgid()}",
        "labels": {CALLER_LABEL: str(os.getpid())},
        "read_only": True,
        "tmpfs": {"/tmp": "rw,mode=1777"},  # noqa: S108 - the container's own
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "shm_size": _SHARED_MEMORY,
        "network_mode": settings.network,
    }


def _with_tracking(settings: ContainerSettings) -> ContainerSettings:
    """Add what the containers need to reach the MLflow store of the environment."""
    from distilldsm.tracking import default_uri, sqlite_path

    uri = settings.environment.get("MLFLOW_TRACKING_URI") or default_uri()
    volumes, network = settings.volumes, settings.network
    database = sqlite_path(uri)
    if database is not None:
        # Mount the folder, not the file: SQLite writes its journal beside the database, and MLflow its artifacts.
        volumes = (*volumes, database.parent.absolute())
    elif network is None and urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1"):
        network = "host"
    environment = {"MLFLOW_TRACKING_URI": uri, **settings.environment}
    return replace(settings, environment=environment, volumes=volumes, network=network)
