"""What the cluster itself must have: KFP's access to the bucket, Argo's retries, and the pods' permissions."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distilldsm.core.errors import UserError
from distilldsm.pipeline.cluster import Cluster

LAUNCHER_CONFIG = "kfp-launcher"
"""Name of the ConfigMap that KFP's launcher reads, in the namespace of the pods."""
PATCH_VARIABLE = "COMPILED_PIPELINE_SPEC_PATCH"
"""Environment variable of KFP's API server: JSON that is merged into each workflow's spec."""
RETRY_PATCH = {"templateDefaults": {"retryStrategy": {"limit": "2", "retryPolicy": "Always"}}}
"""Its value with which `retries` has an effect: Argo then starts a failed or deleted pod again."""
KFP_NAMESPACE = "kubeflow"
"""Where KFP's API server runs."""
ROLE_FILE = Path("conf/trainjob-role.yaml")
"""The permissions that the pods need for TrainJobs."""
TRAINER_GROUP = "trainer.kubeflow.org"
"""API group of Kubeflow Trainer's objects."""
_REQUEST_S = 10.0


def launcher_config(cluster: Cluster, s3_secret: str = "s3") -> dict[str, Any] | None:  # noqa: S107 - a secret's name
    """The ConfigMap with which KFP reads and writes an `s3://` bucket; None for another kind of bucket.

    Without it KFP's launcher asks for `http://BUCKET.HOST/...`, which only AWS answers.
    """
    storage = cluster.storage
    if storage.bucket is None or not storage.bucket.startswith("s3://"):
        return None
    region = storage.region or "us-east-1"
    address = urlsplit(storage.endpoint_url or f"https://s3.{region}.amazonaws.com")
    keys = {variable: key for key, variable in cluster.secrets.s3.items()}
    default = {
        "endpoint": address.netloc,
        "region": region,
        "disableSSL": address.scheme == "http",
        "forcePathStyle": storage.endpoint_url is not None,
        "credentials": {
            "fromEnv": False,
            "secretRef": {
                "secretName": s3_secret,
                "accessKeyKey": keys.get("AWS_ACCESS_KEY_ID", "accesskey"),
                "secretKeyKey": keys.get("AWS_SECRET_ACCESS_KEY", "secretkey"),
            },
        },
    }
    # JSON is YAML: KFP reads either, and nothing here needs a YAML writer.
    data = {
        "defaultPipelineRoot": storage.address("kfp"),
        "providers": json.dumps({"s3": {"default": default}}),
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": LAUNCHER_CONFIG}, "data": data}


def has_configuration() -> bool:
    """Whether there is a configuration for Kubernetes: a kubeconfig, or the service account of this pod."""
    files = os.environ.get("KUBECONFIG", str(Path.home() / ".kube" / "config")).split(os.pathsep)
    return any(Path(file).is_file() for file in files if file) or "KUBERNETES_SERVICE_HOST" in os.environ


def apply_launcher_config(manifest: Mapping[str, Any], namespace: str) -> str:
    """Create the ConfigMap, or change its two keys; returns what was done.

    Raises:
        UserError: Kubernetes does not answer, or refuses.
    """
    with _explained():
        api = kubernetes_client().CoreV1Api()
        known = _found(lambda: api.read_namespaced_config_map(LAUNCHER_CONFIG, namespace, _request_timeout=_REQUEST_S))
        if known is None:
            api.create_namespaced_config_map(namespace, manifest, _request_timeout=_REQUEST_S)
            return "created"
        if {key: (known.data or {}).get(key) for key in manifest["data"]} == manifest["data"]:
            return "unchanged"
        body = {"data": dict(manifest["data"])}
        api.patch_namespaced_config_map(LAUNCHER_CONFIG, namespace, body, _request_timeout=_REQUEST_S)
        return "changed"


def missing_in_cluster(cluster: Cluster, namespace: str) -> list[tuple[str, str]]:
    """What the cluster lacks for this configuration, each with a hint.

    Args:
        namespace: of the pipeline's pods.

    Raises:
        UserError: Kubernetes does not answer, or refuses.
    """
    with _explained():
        api = kubernetes_client()
        found = (
            _bucket_access(api, cluster, namespace),
            _retry_policy(api, cluster),
            _trainjob_permissions(api, namespace),
        )
    return [one for one in found if one is not None]


def _bucket_access(api: Any, cluster: Cluster, namespace: str) -> tuple[str, str] | None:
    if launcher_config(cluster) is None:
        return None
    core = api.CoreV1Api()
    known = _found(lambda: core.read_namespaced_config_map(LAUNCHER_CONFIG, namespace, _request_timeout=_REQUEST_S))
    if "s3" in ((known and known.data) or {}).get("providers", ""):
        return None
    seen = f"namespace {namespace} has no ConfigMap {LAUNCHER_CONFIG} for {cluster.storage.bucket}"
    return seen, f"distilldsm pipeline storage --apply --namespace {namespace}"


def _retry_policy(api: Any, cluster: Cluster) -> tuple[str, str] | None:
    if not any(profile.retries for profile in cluster.profiles.values()):
        return None
    apps = api.AppsV1Api()
    server = _found(lambda: apps.read_namespaced_deployment("ml-pipeline", KFP_NAMESPACE, _request_timeout=_REQUEST_S))
    if server is None:
        return None
    containers = server.spec.template.spec.containers
    patch = next((e.value for c in containers for e in c.env or () if e.name == PATCH_VARIABLE), None)
    if "Always" in (patch or ""):
        return None
    command = f"kubectl -n {KFP_NAMESPACE} set env deployment/ml-pipeline {PATCH_VARIABLE}="
    return "`retries` have no effect: Argo's policy is OnError", f"{command}'{json.dumps(RETRY_PATCH)}'"


def _trainjob_permissions(api: Any, namespace: str) -> tuple[str, str] | None:
    """What the pods' account may not do of ROLE_FILE; None also for a cluster without Kubeflow Trainer."""
    if not ROLE_FILE.is_file():
        return None
    groups = api.ApisApi().get_api_versions(_request_timeout=_REQUEST_S).groups
    if TRAINER_GROUP not in {group.name for group in groups}:
        return None
    import yaml
    from kubernetes.client.exceptions import ApiException

    manifests = list(yaml.safe_load_all(ROLE_FILE.read_text(encoding="utf-8")))
    account = next(one["subjects"][0]["name"] for one in manifests if one["kind"] == "RoleBinding")
    user = f"system:serviceaccount:{namespace}:{account}"
    reviews = api.AuthorizationV1Api()
    refused = []
    for manifest in (one for one in manifests if one["kind"] in ("Role", "ClusterRole")):
        scope = namespace if manifest["kind"] == "Role" else None
        for group, resource, verb in _permissions(manifest["rules"]):
            name, _, below = resource.partition("/")
            asked = {"group": group, "resource": name, "subresource": below, "verb": verb, "namespace": scope}
            body = {"spec": {"user": user, "resourceAttributes": {key: value for key, value in asked.items() if value}}}
            try:
                answer = reviews.create_subject_access_review(body, _request_timeout=_REQUEST_S)
            except ApiException as error:
                if error.status != 403:
                    raise
                hint = f"kubectl auth can-i create trainjobs.{TRAINER_GROUP} -n {namespace} --as {user}"
                return f"you may not ask what {user} may do with TrainJobs", f"an administrator may: {hint}"
            if not answer.status.allowed:
                refused.append(f"{verb} {resource}")
    if not refused:
        return None
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    return f"{user} may not {', '.join(refused[:3])}{more}", f"kubectl apply -n {namespace} -f {ROLE_FILE}"


def _permissions(rules: list[dict[str, list[str]]]) -> Iterator[tuple[str, str, str]]:
    """Group, resource and verb of everything that rules of a Role allow."""
    for rule in rules:
        yield from itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"])


def kubernetes_client() -> Any:
    """The package `kubernetes.client`, configured by the kubeconfig or by the service account of this pod."""
    from kubernetes import client, config

    file = os.environ.get("KUBECONFIG")  # the package reads it only when it is imported
    config.load_config(**({"config_file": file} if file else {}))
    return client


def _found(read: Any) -> Any:
    """What `read` returns; None if there is no such object."""
    from kubernetes.client.exceptions import ApiException

    try:
        return read()
    except ApiException as error:
        if error.status != 404:
            raise
        return None


@contextmanager
def _explained() -> Iterator[None]:
    import urllib3
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config.config_exception import ConfigException

    try:
        yield
    except ApiException as error:
        raise UserError("Kubernetes refused the request", seen=f"HTTP {error.status}: {error.reason}") from None
    except (ConfigException, urllib3.exceptions.HTTPError) as error:
        hint = "is there a kubeconfig, and does `kubectl get pods` work?"
        raise UserError("Kubernetes does not answer", seen=str(error)[:300], hint=hint) from None
