"""KFP components in containers on this machine, by Docker's API (Docker Engine, Podman).

Takes the place of the task handler behind `kfp.local.DockerRunner`. That one (kfp 2.17) lets the engine remove a
container when it ends, and takes one that is gone for a success: a step that fails at once is then reported as done.
This one waits for the end, reads the exit code, and removes the container itself.
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
"""Label of each container: the process that waits for it. Where that one was killed, its containers can be found."""
PASSED_ON = ("KFP_RUN_ID", "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")
"""Environment variables of the caller that every container gets, and all that begin with PASSED_ON_PREFIXES."""
PASSED_ON_PREFIXES = ("MLFLOW_TRACKING_", "DISTILLDSM_DOWNLOAD_")
_PROBE_TIMEOUT_S, _TIMEOUT_S = 10, 120
_SHARED_MEMORY = "1g"
"""Size of `/dev/shm`, through which a training's processes exchange arrays."""


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """How the containers run: always with a read-only root, a `/tmp` in memory, and no privilege."""

    volumes: tuple[Path, ...] = ()
    """Folders and files that containers may write, each at its own path."""
    read_only_volumes: tuple[Path, ...] = ()
    """The same, for reading only, e.g. where the data set lies."""
    environment: Mapping[str, str] = field(default_factory=dict)
    network: str | None = None
    """`host`, `none` or a network's name; None: the engine's default."""


@contextlib.contextmanager
def container_runner(
    *, images: Sequence[str], root: Path, engine: str | None = None, settings: ContainerSettings | None = None
) -> Iterator[Any]:
    """Yield a runner for `kfp.local.init` under which each component runs in a container of its own.

    Containers see `root`, where the artifacts lie, the MLflow store that the environment names, and what
    `settings` adds. A tracking server on this machine is reached by the host's network.

    Args:
        images: what will run; checked before anything does. No image is ever pulled.
        root: parent of, or the same as, the `pipeline_root` of `kfp.local.init`.
        engine: its address, e.g. `unix:///run/podman/podman.sock`; None: DOCKER_HOST, else Docker's own.

    Raises:
        UserError: the engine does not answer, an image is missing, or was built from another version.
    """
    import kfp.local
    from kfp.local import docker_task_handler, status

    given = settings or ContainerSettings()
    complete = _with_tracking(replace(given, volumes=(*given.volumes, root)))
    with contextlib.closing(connect(engine)) as client:
        check_images(client, images)
    for path in complete.volumes:
        if not path.exists():
            path.mkdir(parents=True)  # else the engine would make it, owned by root

    class TaskHandler:
        """What kfp makes for each task, by keyword."""

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

    # kfp finds the handler by the runner's exact type: a subclass of DockerRunner would not be known to it.
    original = docker_task_handler.DockerTaskHandler
    docker_task_handler.DockerTaskHandler = TaskHandler
    try:
        yield kfp.local.DockerRunner()
    finally:
        docker_task_handler.DockerTaskHandler = original


def connect(engine: str | None = None) -> docker.DockerClient:
    """A client of the engine, which has answered.

    Raises:
        UserError: it does not answer, or the package `docker` is missing.
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
    """Check that the engine holds the images, of this version.

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
    """Run a command in a new container, print its log as it comes, and return its exit code; the container is removed.

    Args:
        environment: comes before that of `settings`.

    Raises:
        UserError: the image is missing, the engine refuses the container, or goes away.
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
                memory = ": it used more memory than it may" if container.attrs["State"].get("OOMKilled") else ""
                print(f"container of {image} ended with exit code {code}{memory}")
            return code
        finally:
            # Also after an interrupt: nobody is left to wait for what goes on in it.
            with contextlib.suppress(DockerException, OSError):
                container.remove(force=True, v=True)
    except APIError as error:
        raise UserError("the engine could not run the container", where=image, seen=error.explanation) from None
    except (DockerException, OSError) as error:
        raise UserError("the container engine went away", where=image, seen=str(error)[:300]) from None


def _print_log(container: Any) -> None:
    """Both streams, as they come. A log that breaks off is no reason to give up the container."""
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
        # The caller owns the outputs; of root only the id: it has no capability.
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
    """What the containers need to reach the MLflow store of the environment."""
    from distilldsm.tracking import default_uri, sqlite_path

    uri = settings.environment.get("MLFLOW_TRACKING_URI") or default_uri()
    volumes, network = settings.volumes, settings.network
    database = sqlite_path(uri)
    if database is not None:
        # The folder, not the file: SQLite writes its journal beside the database, MLflow its artifacts.
        volumes = (*volumes, database.parent.absolute())
    elif network is None and urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1"):
        network = "host"
    environment = {"MLFLOW_TRACKING_URI": uri, **settings.environment}
    return replace(settings, environment=environment, volumes=volumes, network=network)
