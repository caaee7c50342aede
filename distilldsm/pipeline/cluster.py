"""Cluster resources (`conf/cluster.yaml`): profiles of CPU, memory, accelerators and volumes, one per stage."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distilldsm.components.registry import STAGES
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import Natural, from_mapping, load_yaml
from distilldsm.core.redaction import is_secret_name, public_address, secret_in_address

_GATED = tuple(stage.name for stage in STAGES if stage.scope == "model")
STEPS = ("check", *(stage.name for stage in STAGES if stage.name not in _GATED), "gate", *_GATED, "finish")
"""The steps of the Kubeflow pipeline, in their order: the stages and three more."""
PROFILE_VARIABLE = "DISTILLDSM_PROFILE"
"""Environment variable of a step: the name of its profile."""
_MAX_RETRY_DAYS = 100
"""Argo counts it from the first attempt: a shorter time would end a long training, and forbid its retry."""
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(m|[KMGT]i?)?$")
_FACTORS = {None: 1.0, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{unit}i": 1024.0**power for power, unit in enumerate("KMGT", start=1)
}


def quantity(text: str, where: str) -> float:
    """A Kubernetes quantity such as `500m` or `16Gi` as a number.

    Raises:
        ConfigError: it is not a quantity.
    """
    found = _QUANTITY.match(text)
    if found is None:
        raise ConfigError("is not a Kubernetes quantity", where=where, seen=repr(text), rule="e.g. 500m, 4, 16Gi")
    return float(found[1]) * _FACTORS[found[2]]


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint of nodes on which the pods of a profile may still run."""

    key: str
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    def __post_init__(self) -> None:
        if (self.operator == "Equal") != (self.value is not None):
            raise ConfigError("'operator: Equal' needs a 'value', and other operators have none", seen=repr(self.value))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A PersistentVolumeClaim mounted into the pods of a profile."""

    claim: str
    """Name of the claim."""
    path: str
    """Where it is mounted."""
    work: bool = False
    """Keep unfinished training here. If its pod is removed, the next pod continues the training."""

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ConfigError("'path' is not absolute", seen=self.path)


def refuse_secrets(env: Mapping[str, str], rule: str) -> None:
    """Raise ConfigError if a plain variable, readable by everyone, looks like a secret or contains one."""
    for key, value in env.items():
        if is_secret_name(key):
            raise ConfigError(f"'env.{key}' looks like a secret", rule=rule)
        if secret_in_address(value) is not None:
            raise ConfigError(f"'env.{key}' is an address that holds a secret", seen=public_address(value), rule=rule)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Resources and settings of a stage's pods."""

    cpu: str = "1"
    """CPU request, e.g. `500m` or `4`."""
    cpu_limit: str | None = None
    """None: as much as the request."""
    memory: str = "4Gi"
    """Memory request and limit."""
    accelerator: str | None = None
    """Resource name, e.g. `nvidia.com/gpu`."""
    accelerators: Natural = 0
    """Number of accelerators; a training runs one process on each."""
    shared_memory: str | None = None
    """Size of a memory-backed /dev/shm; it counts against `memory`."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    volumes: tuple[Volume, ...] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    timeout_s: Natural = 0
    """A pod that runs longer is stopped; 0: never."""
    retries: Natural = 0
    """How many times a failed pod is started again."""
    retry_wait_s: Natural = 30
    """Seconds before the first retry; doubled for each further retry."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables. They must not contain secrets."""

    def __post_init__(self) -> None:
        for key in ("cpu", "cpu_limit", "memory", "shared_memory"):
            if (value := getattr(self, key)) is not None:
                quantity(value, key)
        if (self.accelerator is None) != (self.accelerators == 0):
            raise ConfigError("'accelerator' and 'accelerators' belong together", seen=repr(self.accelerator))
        if self.shared_memory and quantity(self.shared_memory, "shared_memory") > quantity(self.memory, "memory"):
            raise ConfigError("'shared_memory' exceeds 'memory'", seen=f"{self.shared_memory} of {self.memory}")
        if self.cpu_limit and quantity(self.cpu_limit, "cpu_limit") < quantity(self.cpu, "cpu"):
            raise ConfigError("'cpu_limit' is below 'cpu'", seen=f"{self.cpu_limit} below {self.cpu}")
        refuse_secrets(self.env, "secrets come from Kubernetes secrets (`secrets`)")
        if sum(volume.work for volume in self.volumes) > 1:
            raise ConfigError("more than one volume has 'work: true'", rule="one 'work: true' at most")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a profile may request."""

    cpu: str = "64"
    memory: str = "512Gi"
    accelerators: int = 8


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One object store for KFP's artifacts, DVC's remote and MLflow's artifacts."""

    bucket: str | None = None
    """e.g. `s3://team/distilldsm`; None: each service uses its own configuration."""
    endpoint_url: str | None = None
    """Address of an S3-compatible service; None: AWS."""
    region: str | None = None
    mlflow_tracking_uri: str | None = None
    """e.g. `http://mlflow.mlflow:5000`; None: pods track nothing."""

    def __post_init__(self) -> None:
        if self.bucket is not None and not re.match(r"^(s3|gs|minio)://[^/]+", self.bucket):
            raise ConfigError("'bucket' is not the address of a bucket", seen=self.bucket, rule="s3://NAME/PREFIX")
        for key in ("bucket", "endpoint_url", "mlflow_tracking_uri"):
            if secret_in_address(getattr(self, key) or "") is not None:
                raise ConfigError(f"'{key}' contains a user or password", rule="credentials come from secrets")

    def address(self, service: Literal["kfp", "dvc", "mlflow"]) -> str | None:
        """The folder of a service in the bucket; None if no bucket is set."""
        return f"{self.bucket.rstrip('/')}/{service}" if self.bucket else None


DOWNLOAD_KEYS = ("username", "password", "token", "signature")


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Which environment variable gets each key of a secret. The secrets' names are parameters of the pipeline."""

    mlflow: Mapping[str, str] = field(
        default_factory=lambda: {
            "username": "MLFLOW_TRACKING_USERNAME",
            "password": "MLFLOW_TRACKING_PASSWORD",
            "token": "MLFLOW_TRACKING_TOKEN",
        }
    )
    s3: Mapping[str, str] = field(
        default_factory=lambda: {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
    )
    download: Mapping[str, str] = field(
        default_factory=lambda: {key: f"DISTILLDSM_DOWNLOAD_{key.upper()}" for key in DOWNLOAD_KEYS}
    )
    """For the server of `download.source`; only the download's pod gets it."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All of `conf/cluster.yaml`."""

    profiles: Mapping[str, Profile]
    stages: Mapping[str, str]
    """Profile name of each step; `default` applies to all other steps."""
    limits: Limits = Limits()
    storage: Storage = Storage()
    secrets: Secrets = Secrets()
    image_pull_secrets: tuple[str, ...] = ()
    parallel_folds: Natural = 0
    """Number of folds that run at once; 0: all."""
    mlflow_plugin: bool = False
    """The cluster has KFP's MLflow plugin with `injectUserEnvVars`: pods get MLflow's address and secrets from it."""
    retries_everywhere: bool = True
    """False: no step is retried, e.g. in tests."""

    def __post_init__(self) -> None:
        for step, name in self.stages.items():
            if step not in (*STEPS, "default"):
                raise ConfigError(f"'stages.{step}' is not a step", rule=", ".join(("default", *STEPS)))
            if name not in self.profiles:
                raise ConfigError(f"'stages.{step}' is not a known profile", seen=name, rule=", ".join(self.profiles))
        if "default" not in self.stages:
            raise ConfigError("'stages.default' is missing", rule="it names the profile of all other steps")
        for name, profile in self.profiles.items():
            self._check_limits(name, profile)

    def _check_limits(self, name: str, profile: Profile) -> None:
        for key in ("cpu", "cpu_limit", "memory"):
            value = getattr(profile, key)
            most = getattr(self.limits, key.removesuffix("_limit"))
            if value is not None and quantity(value, key) > quantity(most, f"limits.{key}"):
                raise ConfigError(
                    f"'profiles.{name}.{key}' exceeds the limit", seen=value, rule=f"at most {most} (limits)"
                )
        if profile.accelerators > self.limits.accelerators:
            raise ConfigError(
                f"'profiles.{name}.accelerators' exceeds the limit",
                seen=profile.accelerators,
                rule=f"at most {self.limits.accelerators} (limits)",
            )

    def profile(self, step: str) -> Profile:
        """The profile of a step."""
        return self.profiles[self.stages.get(step, self.stages["default"])]


def load_cluster(path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> Cluster:
    """Read and check the cluster file; `overrides` assigns other profiles to steps.

    Raises:
        ConfigError: the file has an unknown key or a value that is not allowed.
    """
    values: dict[str, Any] = load_yaml(path)
    if overrides:
        values = {**values, "stages": {**values.get("stages", {}), **overrides}}
    return from_mapping(Cluster, values, where=os.fspath(path))


def apply(
    task: Any, step: str, cluster: Cluster, *, mlflow_secret: Any, s3_secret: Any, download_secret: Any = None
) -> Any:
    """Apply the profile of a step to its KFP task. The secrets' names may be pipeline parameters."""
    from kfp import kubernetes

    profile = cluster.profile(step)
    task.set_cpu_request(profile.cpu).set_cpu_limit(profile.cpu_limit or profile.cpu)
    task.set_memory_request(profile.memory).set_memory_limit(profile.memory)
    if profile.accelerator:
        task.set_accelerator_type(profile.accelerator).set_accelerator_limit(profile.accelerators)
    if profile.shared_memory:
        size = profile.shared_memory
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=size)  # noqa: S108
    # The image's root file system may be read-only; temporary files go here.
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")  # noqa: S108
    for label, value in profile.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in profile.tolerations:
        kubernetes.add_toleration(
            task,
            toleration.key,
            toleration.operator,
            toleration.value,
            toleration.effect,  # type: ignore[arg-type]
        )
    for volume in profile.volumes:
        kubernetes.mount_pvc(task, pvc_name=volume.claim, mount_path=volume.path)
        if volume.work:
            task.set_env_variable("DISTILLDSM_WORK_DIR", f"{volume.path}/work")
    kubernetes.set_image_pull_policy(task, profile.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    # kfp-kubernetes supports only this part of a security context; SECURITY.md describes the rest.
    kubernetes.set_security_context(task, run_as_non_root=True)
    if profile.timeout_s:
        kubernetes.set_timeout(task, profile.timeout_s)
    if profile.retries and cluster.retries_everywhere:
        task.set_retry(
            profile.retries,
            backoff_duration=f"{profile.retry_wait_s}s",
            backoff_factor=2.0,
            backoff_max_duration=f"{_MAX_RETRY_DAYS * 86400}s",
        )
    _environment(task, step, profile, cluster, mlflow_secret, s3_secret)
    if step == "download" and download_secret is not None:
        kubernetes.use_secret_as_env(task, download_secret, dict(cluster.secrets.download), optional=True)
    return task


def _environment(task: Any, step: str, profile: Profile, cluster: Cluster, mlflow_secret: Any, s3_secret: Any) -> None:
    from kfp import kubernetes

    storage = cluster.storage
    known = {
        "MLFLOW_TRACKING_URI": None if cluster.mlflow_plugin else storage.mlflow_tracking_uri,
        "MLFLOW_S3_ENDPOINT_URL": storage.endpoint_url,
        "AWS_ENDPOINT_URL": storage.endpoint_url,
        "AWS_DEFAULT_REGION": storage.region,
    }
    known[PROFILE_VARIABLE] = cluster.stages.get(step, cluster.stages["default"])
    for name, value in {**{k: v for k, v in known.items() if v}, **profile.env}.items():
        task.set_env_variable(name, value)
    # The run's id comes from the pod. As a parameter it would differ in each run, and nothing would be cached.
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    if not cluster.mlflow_plugin:
        kubernetes.use_secret_as_env(task, mlflow_secret, dict(cluster.secrets.mlflow), optional=True)
    kubernetes.use_secret_as_env(task, s3_secret, dict(cluster.secrets.s3), optional=True)
