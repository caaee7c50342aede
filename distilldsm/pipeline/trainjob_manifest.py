"""Builds the manifest of a Kubeflow Trainer v2 TrainJob, and checks manifests against the models of their API."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import Positive, Range
from distilldsm.core.redaction import secret_in_address
from distilldsm.pipeline.cluster import refuse_secrets

NODE = "node"
"""Name of the training's pods and containers in Trainer's torch runtimes."""
RUN_LABEL = "distilldsm.org/kfp-run"
"""Label of a TrainJob: the Kubeflow run that started it. The step `finish` deletes what is left of it."""
IMAGE_USER = 10001
"""User of our images."""
PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "KFP_RUN_ID")
"""Environment variables that the pods get from the process that starts them."""


Processes = Annotated[int, Range(1, 1024)]


def passed_on() -> dict[str, str]:
    """The variables of PASSED_ON that are set here, with their values."""
    return {key: os.environ[key] for key in PASSED_ON if key in os.environ}


@dataclass(frozen=True, kw_only=True)
class SecretVariable:
    """An environment variable from a Kubernetes secret. The secret may be missing."""

    name: str
    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class TrainJobConfig:
    """Settings of a TrainJob, `conf/trainjob.yaml`: a training on several machines."""

    image: str
    """The train image."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) for data, parameters and model."""
    path: str = "/work"
    """Where the claim is mounted, in the TrainJob's pods and in the pod that starts it."""
    nodes: Processes = 1
    processes: Processes = 1
    """Processes per node, one per GPU."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime."""
    namespace: str | None = None
    """None: the current namespace."""
    cpu: str = "8"
    memory: str = "32Gi"
    gpu: str | None = "nvidia.com/gpu"
    """Resource name of the GPUs; each node gets `processes` of them. null: CPU only."""
    shared_memory: str = "8Gi"
    """Size of /dev/shm."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment variables. Everyone who may read the job can read them."""
    secrets: tuple[SecretVariable, ...] = ()
    """Environment variables from Kubernetes secrets."""
    timeout_s: Positive = 86400.0
    """Seconds until the job is stopped and deleted."""
    poll_s: Positive = 5.0
    keep: Literal["never", "failed"] = "never"
    """Whether a failed job stays on the cluster for inspection."""

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ConfigError("'path' is not absolute", seen=self.path)
        refuse_secrets(self.env, "secrets come from Kubernetes secrets (`secrets`)")
        twice = sorted(set(self.env) & {s.name for s in self.secrets})
        if twice:
            raise ConfigError("a variable is in 'env' and in 'secrets'", seen=", ".join(twice), rule="one of them")


def manifest(job: TrainJobConfig, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The TrainJob, checked against the models of Trainer's API.

    Args:
        arguments: command line of `distilldsm.components.train`.
        env: environment variables; those of `job.env` override them.

    Raises:
        ConfigError: the models reject it, or an address in a variable contains a secret.
    """
    resources = {"cpu": job.cpu, "memory": job.memory} | ({job.gpu: str(job.processes)} if job.gpu else {})
    replicated = {"name": NODE, "template": {"spec": {"template": {"spec": _pod(job)}}}}
    run_label = {RUN_LABEL: env["KFP_RUN_ID"]} if env.get("KFP_RUN_ID") else {}
    built = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "distilldsm", **run_label}},
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
                "args": ["-m", "distilldsm.components.train", *arguments],
                "resourcesPerNode": {"requests": dict(resources), "limits": dict(resources)},
                "env": _variables(job, env),
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


def _variables(job: TrainJobConfig, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """Environment variables. Those from secrets are references."""
    secret = {s.name for s in job.secrets}
    plain = {key: value for key, value in {**env, **job.env}.items() if key not in secret}
    for key, value in plain.items():
        if secret_in_address(value) is not None:
            raise ConfigError(
                "an address with a secret would be readable in the TrainJob",
                where=key,
                hint="remove it from the address; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD as secrets",
            )
    variables: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plain.items()]
    variables += [
        {"name": s.name, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key, "optional": True}}}
        for s in job.secrets
    ]
    return variables


def _pod(job: TrainJobConfig) -> dict[str, Any]:
    """Additions to the runtime's pods: volumes, no privileges, and the nodes on which they may run."""
    return {
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
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }
        ],
        # The claim's files get this group, so that the user of the images may write them.
        "securityContext": {"fsGroup": IMAGE_USER, "fsGroupChangePolicy": "OnRootMismatch"},
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


def check_manifest(built: Mapping[str, Any]) -> None:
    """Check a TrainJob against the API's models.

    Raises:
        ConfigError: a wrong type, a missing or an unknown field.
    """
    from kubeflow_trainer_api import models

    check_against(models.TrainerV1alpha1TrainJob, built, "TrainJob")


def check_against(model: Any, built: Mapping[str, Any], kind: str) -> None:
    """Check a manifest against a model of its API, including unknown fields, which the models silently drop.

    Raises:
        ConfigError: a wrong type, a missing or an unknown field.
    """
    from pydantic import ValidationError

    plain = json.loads(json.dumps(built))
    try:
        known = model.from_dict(plain)
    except ValidationError as error:
        raise ConfigError(f"is not a valid {kind}", seen=" ".join(str(error).split())[:400]) from None
    lost = unknown_field(plain, json.loads(known.to_json()))
    if lost:
        raise ConfigError(f"is not a valid {kind}: its API does not have this field", seen=lost)


def unknown_field(ours: Any, parsed: Any, where: str = "") -> str | None:
    """The first field of `ours` that is missing in `parsed`, the API model's version of it; None: none is missing."""
    if isinstance(ours, dict):
        if not isinstance(parsed, dict):
            return where
        for key, value in ours.items():
            if key not in parsed and value not in ({}, [], None):
                return f"{where}.{key}".lstrip(".")
            unknown = unknown_field(value, parsed.get(key, value), f"{where}.{key}")
            if unknown:
                return unknown
    if isinstance(ours, list) and isinstance(parsed, list):
        for number, (one, other) in enumerate(zip(ours, parsed, strict=False)):
            unknown = unknown_field(one, other, f"{where}[{number}]")
            if unknown:
                return unknown
    return None
