"""Follows a TrainJob from creation to end: shows its log and states, then deletes it from the cluster."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distilldsm.core.errors import UserError
from distilldsm.core.shell import handled, interrupt
from distilldsm.pipeline.trainjob_manifest import TrainJobConfig

ENDED = ("Complete", "Failed")
LOG_LINES = 20
"""Number of last log lines that an error shows."""
REQUEST_S = (5, 30)
"""Connect and read timeouts of the API server, seconds: a deletion must end within the pod's grace period."""
DELETE_ATTEMPTS = 3


class JobExistsError(Exception):
    """A job with that name exists already."""


class JobGoneError(Exception):
    """There is no job with that name."""


class TrainJobs:
    """The TrainJobs of a cluster, through Kubeflow Trainer's SDK.

    Args:
        namespace: Kubernetes namespace; None: the current one.
        configuration: for Kubernetes' client; None: kubeconfig, or the pod's service account.

    Raises:
        UserError: the cluster does not answer.
    """

    def __init__(self, namespace: str | None = None, configuration: Any = None) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        config = KubernetesBackendConfig(namespace=namespace, client_configuration=configuration)
        try:
            self._client = TrainerClient(backend_config=config)
        except Exception as error:  # the SDK passes on many kinds of errors of its Kubernetes client
            raise UserError(
                "the cluster does not answer",
                seen=str(error)[:300],
                hint="is there a kubeconfig, or does this run in a pod with a service account?",
            ) from None
        backend: Any = self._client.backend
        self._objects = backend.custom_api
        self._address = ("trainer.kubeflow.org", "v1alpha1", backend.namespace, "trainjobs")

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Create a job; raises JobExistsError. (The SDK's own `train` builds a manifest without volumes.)"""
        with _translated(409, JobExistsError):
            self._objects.create_namespaced_custom_object(
                *self._address, body=dict(manifest), _request_timeout=REQUEST_S
            )

    def state(self, name: str) -> str:
        """The job's state; raises JobGoneError."""
        try:
            return str(self._client.get_job(name).status)
        except Exception:
            # The SDK raises the same error for a missing job, a missing runtime and a server that is away.
            with _translated(404, JobGoneError):
                self._objects.get_namespaced_custom_object(*self._address, name, _request_timeout=REQUEST_S)
            raise

    def logs(self, name: str) -> Iterator[str]:
        """Log lines from the first one on. Ends with the pod, or at once if there is no pod yet."""
        yield from self._client.get_job_logs(name, follow=True)

    def delete(self, name: str) -> None:
        """Delete the job; raises JobGoneError."""
        with _translated(404, JobGoneError):
            self._objects.delete_namespaced_custom_object(*self._address, name, _request_timeout=REQUEST_S)


@contextmanager
def _translated(status: int, to: type[Exception]) -> Iterator[None]:
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        if error.status == status:
            raise to(error.reason) from None
        raise


def follow(
    job: TrainJobConfig, name: str, built: Mapping[str, Any], api: TrainJobs, *, say: Callable[[str], None] = print
) -> None:
    """Create a TrainJob, print its log and states, wait for its end, and delete it. Errors delete it too.

    If a job with this name is already running, it is followed instead: a pod ended before it could delete the job.
    With `job.keep: failed`, a failed job is not deleted.

    Raises:
        UserError: the job cannot be created, fails, disappears or exceeds `timeout_s`; shows the log's last lines.
        KeyboardInterrupt: cancelled by Ctrl-C or SIGTERM (a deleted pod).
    """
    log = _Log(api, name, job.poll_s, say)
    keep = False
    with handled({signal.SIGTERM: interrupt}):
        try:
            until = time.monotonic() + job.timeout_s
            _create(api, name, built, until, job.poll_s, say)
            log.start()
            state = _wait(api, name, job, until, log.tail, say)
            log.finish()
            if state == "Failed":
                keep = job.keep == "failed"
                raise _failure("the TrainJob failed", name, state, log.tail)
        finally:
            log.stop()
            if not keep:
                with handled({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_IGN}):
                    _delete(api, name, job.poll_s, say)


def _wait(
    api: TrainJobs, name: str, job: TrainJobConfig, until: float, tail: Sequence[str], say: Callable[[str], None]
) -> str:
    """Wait for the job's end and return its last state; print each change of the state."""
    state, is_away = "", False
    while True:
        try:
            new, is_away = api.state(name), False
        except JobGoneError:
            raise _failure("the TrainJob no longer exists", name, "deleted by somebody else", tail) from None
        except Exception as error:  # the server may be away for a moment; if it stays away, the time limit ends this
            if not is_away:
                say(f"{name}: its state cannot be read, trying again: {error}")
            new, is_away = state, True
        if new != state:
            say(f"{name}: {new}")
            state = new
        if state in ENDED:
            return state
        if time.monotonic() > until:
            raise _failure("the TrainJob exceeded its time limit", name, f"{job.timeout_s:g} s", tail)
        time.sleep(job.poll_s)


def _create(
    api: TrainJobs, name: str, built: Mapping[str, Any], until: float, poll_s: float, say: Callable[[str], None]
) -> None:
    """Create the job. A running job with this name does the same work and is kept; an ended one is deleted first."""
    while True:
        try:
            api.create(built)
            return
        except JobExistsError:
            pass
        except Exception as error:  # Kubernetes' client raises many kinds of errors
            raise UserError("the TrainJob cannot be created", where=name, seen=str(error)[:400]) from None
        try:
            if api.state(name) not in ENDED:
                say(f"{name}: exists already and does the same work; it is followed")
                return
            api.delete(name)
        except JobGoneError:
            pass
        except Exception as error:
            say(f"{name}: exists already, but its state cannot be read: {error}")
        if time.monotonic() > until:
            raise UserError("an ended TrainJob with this name could not be deleted", where=name, hint="delete it")
        time.sleep(poll_s)


class _Log:
    """Prints a job's log as it comes. Each line is printed once, although each connection starts at the first line."""

    def __init__(self, api: TrainJobs, name: str, poll_s: float, say: Callable[[str], None]) -> None:
        self.tail: deque[str] = deque(maxlen=LOG_LINES)
        self._api, self._name, self._poll_s, self._say = api, name, poll_s, say
        self._seen: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Read the rest of the log of an ended job."""
        self._ended.set()
        self._thread.join(timeout=30)

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        broken = False
        while True:
            last = self._ended.is_set()
            try:
                self._read()
            except Exception as error:  # the log only informs; the job's state decides
                if not broken:
                    self._say(f"{self._name}: the log was interrupted: {error}")
                broken = True
            if last:
                return
            self._ended.wait(self._poll_s)

    def _read(self) -> None:
        for number, line in enumerate(self._api.logs(self._name)):
            text = line.rstrip("\n")
            if number < len(self._seen) and self._seen[number] != hash(text):
                del self._seen[number:]  # a new pod: the training was started again
            if number == len(self._seen):
                self._seen.append(hash(text))
                self.tail.append(text)
                self._say(text)


def _delete(api: TrainJobs, name: str, poll_s: float, say: Callable[[str], None]) -> None:
    for attempt in range(DELETE_ATTEMPTS):
        try:
            api.delete(name)
            return
        except JobGoneError:
            return
        except Exception as error:
            if attempt + 1 == DELETE_ATTEMPTS:
                say(f"{name}: could not be deleted ({error}); run: kubectl delete trainjob {name}")
            else:
                time.sleep(poll_s)


def _failure(problem: str, name: str, seen: str, tail: Sequence[str]) -> UserError:
    return UserError(problem, where=name, seen="\n    ".join([seen, *tail]))
