"""The train stage on as many processes as there are GPUs: in this pod by torchrun, or as a Kubeflow Trainer TrainJob.

Both start the same entry point, `components.train`. A TrainJob's pods and the one that starts it share a claim: data
and parameters are put there, the model is collected from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from distilldsm.config import TrackingConfig, TrainConfig, load_params
from distilldsm.errors import ConfigError, UserError
from distilldsm.params import from_mapping, load_yaml, to_mapping
from distilldsm.shell import run_shell
from distilldsm.stage import MANIFEST, read_json, sha256_json

NODE = "node"
"""Name that Trainer's torch runtimes give to the training's pods and containers."""
PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "KFP_RUN_ID")
ENDED = ("Complete", "Failed")
LOG_LINES = 20
"""Last lines of the log that an error shows."""


@dataclass(frozen=True, kw_only=True)
class SecretVariable:
    """An environment variable from a Kubernetes secret, which may be missing."""

    name: str
    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class TrainJobConfig:
    """A training on several machines."""

    image: str
    """The train image."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) for data, parameters and model."""
    path: str = "/work"
    """Where the claim is mounted, in the TrainJob's pods and in the pod that starts it."""
    nodes: int = 1
    processes: int = 1
    """Processes per node, one per GPU."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime."""
    namespace: str | None = None
    """None: the one this runs in."""
    cpu: str = "8"
    memory: str = "32Gi"
    gpu: str | None = "nvidia.com/gpu"
    """Resource name of the GPUs, `processes` of them per node; null: CPU only."""
    shared_memory: str = "8Gi"
    """Size of /dev/shm."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()
    secrets: tuple[SecretVariable, ...] = ()
    timeout_s: float = 86400.0
    """After that the job is stopped and deleted."""
    poll_s: float = 5.0
    keep: Literal["never", "failed"] = "never"
    """Whether a failed job stays, for looking at it."""

    def __post_init__(self) -> None:
        for key in ("nodes", "processes"):
            if not 1 <= getattr(self, key) <= 1024:
                raise ConfigError(f"'{key}' has an impossible value", seen=getattr(self, key), rule="1 to 1024")
        if not self.path.startswith("/"):
            raise ConfigError("'path' is not absolute", seen=self.path)
        if self.timeout_s <= 0 or self.poll_s <= 0:
            raise ConfigError("'timeout_s' and 'poll_s' are positive", seen=(self.timeout_s, self.poll_s))


class JobApi(Protocol):
    """What is asked of Kubeflow Trainer."""

    def create(self, manifest: Mapping[str, Any]) -> None: ...

    def state(self, name: str) -> str: ...

    def logs(self, name: str) -> Iterator[str]: ...

    def delete(self, name: str) -> None: ...


class SdkJobApi:
    """Kubeflow Trainer through its SDK."""

    def __init__(self, namespace: str | None = None) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        try:
            self._client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=namespace))
        except Exception as error:  # the SDK raises what its Kubernetes client does, of many kinds
            raise UserError(
                "the cluster does not answer",
                seen=str(error)[:300],
                mend="is there a kubeconfig, or does this run in a pod with a service account?",
            ) from None

    def create(self, manifest: Mapping[str, Any]) -> None:
        # The SDK's own `train` builds a manifest without volumes; its Kubernetes client takes ours.
        backend: Any = self._client.backend
        group, version = str(manifest["apiVersion"]).split("/")
        backend.custom_api.create_namespaced_custom_object(
            group, version, backend.namespace, "trainjobs", dict(manifest)
        )

    def state(self, name: str) -> str:
        return str(self._client.get_job(name).status)

    def logs(self, name: str) -> Iterator[str]:
        yield from self._client.get_job_logs(name, follow=True)

    def delete(self, name: str) -> None:
        self._client.delete_job(name)


def manifest(job: TrainJobConfig, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The TrainJob, checked by the models of Trainer's API.

    Raises:
        ConfigError: the API's models refuse it.
    """
    variables: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in env.items()]
    variables += [
        {"name": s.name, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key, "optional": True}}}
        for s in job.secrets
    ]
    resources = {"cpu": job.cpu, "memory": job.memory} | ({job.gpu: str(job.processes)} if job.gpu else {})
    pod = {
        "containers": [
            {
                "name": NODE,
                "volumeMounts": [
                    {"name": "work", "mountPath": job.path},
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                ],
                "securityContext": {
                    "runAsNonRoot": True,
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
            {"name": "tmp", "emptyDir": {}},
        ],
    } | {
        key: value
        for key, value in (
            ("nodeSelector", dict(job.node_selector)),
            ("tolerations", [dict(toleration) for toleration in job.tolerations]),
        )
        if value
    }
    replicated = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    built = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "distilldsm"}},
        "spec": {
            "runtimeRef": {
                "name": job.runtime,
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
            },
            "activeDeadlineSeconds": max(1, int(job.timeout_s)),
            "trainer": {
                "image": job.image,
                "numNodes": job.nodes,
                "numProcPerNode": job.processes,
                "command": ["torchrun"],
                "args": ["-m", "components.train", *arguments],
                "resourcesPerNode": {"requests": dict(resources), "limits": dict(resources)},
                "env": variables,
            },
            "runtimePatches": [
                {
                    "manager": "distilldsm.org/pipeline",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
                }
            ],
        },
    }
    check_manifest(built)
    return built


def check_manifest(built: Mapping[str, Any]) -> None:
    """Check a TrainJob against the API's models, unknown fields included (the models silently drop those).

    Raises:
        ConfigError: a wrong type, a missing or an unknown field.
    """
    from kubeflow_trainer_api import models
    from pydantic import ValidationError

    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(json.loads(json.dumps(built)))
    except ValidationError as error:
        raise ConfigError("is no TrainJob", seen=" ".join(str(error).split())[:400]) from None
    assert known is not None
    lost = _lost(json.loads(json.dumps(built)), json.loads(known.to_json()), "")
    if lost:
        raise ConfigError("is no TrainJob: a field that its API does not know", seen=lost)


def _lost(given: Any, kept: Any, where: str) -> str | None:
    """The first field of `given` that is not in `kept`."""
    if isinstance(given, dict):
        if not isinstance(kept, dict):
            return where
        for key, value in given.items():
            if key not in kept and value not in ({}, [], None):
                return f"{where}.{key}".lstrip(".")
            found = _lost(value, kept.get(key, value), f"{where}.{key}")
            if found:
                return found
    if isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=False)):
            found = _lost(one, other, f"{where}[{number}]")
            if found:
                return found
    return None


def run_train(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
    job: TrainJobConfig | None = None,
    processes: int = 0,
    api: JobApi | None = None,
) -> None:
    """Run the train stage: `inputs` and `outputs` as in components/train.py.

    Args:
        job: as a TrainJob of the cluster; None: in this pod.
        processes: in this pod, how many; 0: one per visible GPU, one without a GPU.
        api: stands for the cluster in tests.

    Raises:
        UserError: the training failed, was too slow, or left no model.
    """
    settings = {"train": to_mapping(config), "tracking": to_mapping(tracking or TrackingConfig(enabled=False))}
    if job is not None:
        _run_job(settings, inputs["preprocessed"], outputs["model"], fold, job, api or SdkJobApi(job.namespace))
        return
    count = processes or _visible_gpus(config.device)
    if count == 1:
        from components.train import run

        run(config, inputs, outputs, fold=fold, tracking=tracking)
        return
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        params.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        arguments = _arguments(params, fold, inputs["preprocessed"], outputs["model"])
        code = subprocess.run([*launcher, "-m", "components.train", *arguments]).returncode
    if code:
        raise UserError(f"the training on {count} processes failed", seen=f"exit code {code}; its message is above")


def _arguments(params: Path, fold: int, preprocessed: Path, model: Path) -> list[str]:
    return ["--params", f"{params}", "--fold", f"{fold}", "--preprocessed", f"{preprocessed}", "--output", f"{model}"]


def _visible_gpus(device: str) -> int:
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _run_job(
    settings: Mapping[str, Any], preprocessed: Path, model: Path, fold: int, job: TrainJobConfig, api: JobApi
) -> None:
    shared = Path(job.path)
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        raise UserError(
            "the claim is not mounted here, or cannot be written",
            where=shared,
            mend=f"give the train step a profile with the volume {job.claim} at {job.path}",
        )
    # The name is that of the work: the same training, started again, goes on in the folder where it stopped.
    name = f"distilldsm-fold{fold}-{sha256_json([settings, read_json(preprocessed / MANIFEST)['files'], fold])[:10]}"
    folder = shared / name
    data, params, result = folder / "preprocessed", folder / "params.yaml", folder / "model"
    folder.mkdir(exist_ok=True)
    if not (data / MANIFEST).is_file():
        shutil.copytree(preprocessed, data, dirs_exist_ok=True)
    params.write_text(json.dumps(settings), encoding="utf-8")
    env = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    env |= {"DISTILLDSM_TRACKING_DIR": f"{folder}/tracking"}
    follow(job, name, manifest(job, name, _arguments(params, fold, data, result), env), api)
    if not (result / MANIFEST).is_file():
        raise UserError("the TrainJob is complete but left no model", where=result, mend="look at its log above")
    shutil.copytree(result, model, dirs_exist_ok=True)
    shutil.rmtree(folder)


def follow(
    job: TrainJobConfig, name: str, built: Mapping[str, Any], api: JobApi, *, say: Callable[[str], None] = print
) -> None:
    """Create a TrainJob, print its log and states, and wait for its end; it is deleted however this ends.

    Raises:
        UserError: it cannot be created, failed, or took longer than `timeout_s`; with the log's last lines.
        KeyboardInterrupt: cancelled (Ctrl-C, or SIGTERM as of a pod that is deleted).
    """
    tail: deque[str] = deque(maxlen=LOG_LINES)
    keep = False
    with _terminable():
        try:
            api.create(built)
        except Exception as error:  # of Kubernetes' client, of many kinds
            raise UserError("the TrainJob cannot be created", where=name, seen=str(error)[:400]) from None
        try:
            state, reader, begun = "", None, time.monotonic()
            while state not in ENDED:
                new = _state(api, name, state)
                if new != state:
                    say(f"{name}: {new}")
                    state = new
                if state == "Running" and reader is None:
                    reader = threading.Thread(target=_read, args=(api, name, tail, say), daemon=True)
                    reader.start()
                if state not in ENDED:
                    if time.monotonic() - begun > job.timeout_s:
                        raise _failure("the TrainJob took too long", name, f"{job.timeout_s:g} s", tail)
                    time.sleep(job.poll_s)
            if reader is None:
                _read(api, name, tail, say)
            else:
                reader.join(timeout=30)
            if state == "Failed":
                keep = job.keep == "failed"
                raise _failure("the TrainJob failed", name, state, tail)
        finally:
            if not keep:
                _delete(api, name, say)


def _state(api: JobApi, name: str, last: str) -> str:
    try:
        return api.state(name)
    except Exception:  # the API server may be away for a moment; the time limit ends it if it stays so
        return last


def _read(api: JobApi, name: str, tail: deque[str], say: Callable[[str], None]) -> None:
    try:
        for line in api.logs(name):
            tail.append(line.rstrip("\n"))
            say(tail[-1])
    except Exception as error:  # the log is a help; the job's state decides
        say(f"{name}: the log broke off: {error}")


def _delete(api: JobApi, name: str, say: Callable[[str], None]) -> None:
    try:
        api.delete(name)
    except Exception as error:
        say(f"{name}: could not be deleted ({error}); kubectl delete trainjob {name}")


def _failure(problem: str, name: str, seen: str, tail: Sequence[str]) -> UserError:
    return UserError(problem, where=name, seen="\n    ".join([seen, *tail]))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C, so that what was started is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """`distilldsm pipeline trainjob`: one fold as a TrainJob, or its manifest."""
    parser = argparse.ArgumentParser(prog="distilldsm pipeline trainjob", description=main.__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
    parser.add_argument("--job", default="conf/trainjob.yaml", help="nodes, GPUs, claim (default: %(default)s)")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--preprocessed", type=Path, default=Path("data/preprocessed"))
    parser.add_argument("--output", type=Path, default=None, help="default: models/fold<FOLD>")
    parser.add_argument("--manifest-only", action="store_true", help="write the manifest, start nothing")
    parser.add_argument("-o", "--manifest", type=Path, default=Path("trainjob.yaml"), help="(default: %(default)s)")
    args = parser.parse_args(argv)

    def command() -> None:
        import yaml

        params = load_params(args.params, args.set)
        job = from_mapping(TrainJobConfig, load_yaml(args.job), where=args.job)
        if args.manifest_only:
            folder = Path(job.path) / "distilldsm"
            arguments = _arguments(folder / "params.yaml", args.fold, folder / "preprocessed", folder / "model")
            args.manifest.write_text(yaml.safe_dump(manifest(job, "distilldsm", arguments, {})), encoding="utf-8")
            print(f"{args.manifest}: {job.nodes} x {job.processes} processes")
            return
        outputs = {"model": args.output or Path(f"models/fold{args.fold}")}
        inputs = {"preprocessed": args.preprocessed}
        run_train(params.train, inputs, outputs, fold=args.fold, tracking=params.tracking, job=job)

    return run_shell(command)


if __name__ == "__main__":
    raise SystemExit(main())
