"""What the cluster itself must have, outside of the pipeline: KFP's access to the bucket, and Argo's retries."""

from __future__ import annotations

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


def missing_in_cluster(cluster: Cluster, namespace: str, kfp_namespace: str = "kubeflow") -> list[tuple[str, str]]:
    """What the cluster lacks for this configuration, each with a hint.

    Raises:
        UserError: Kubernetes does not answer, or refuses.
    """
    missing = []
    manifest = launcher_config(cluster)
    with _explained():
        core, apps = kubernetes_client().CoreV1Api(), kubernetes_client().AppsV1Api()
        if manifest is not None:
            known = _found(
                lambda: core.read_namespaced_config_map(LAUNCHER_CONFIG, namespace, _request_timeout=_REQUEST_S)
            )
            if "s3" not in ((known and known.data) or {}).get("providers", ""):
                seen = f"namespace {namespace} has no ConfigMap {LAUNCHER_CONFIG} for {cluster.storage.bucket}"
                missing.append((seen, f"distilldsm pipeline storage --apply --namespace {namespace}"))
        server = _found(
            lambda: apps.read_namespaced_deployment("ml-pipeline", kfp_namespace, _request_timeout=_REQUEST_S)
        )
    if server is not None and any(profile.retries for profile in cluster.profiles.values()):
        containers = server.spec.template.spec.containers
        patch = next((e.value for c in containers for e in c.env or () if e.name == PATCH_VARIABLE), None)
        if "Always" not in (patch or ""):
            command = f"kubectl -n {kfp_namespace} set env deployment/ml-pipeline {PATCH_VARIABLE}="
            missing.append(
                ("`retries` have no effect: Argo's policy is OnError", f"{command}'{json.dumps(RETRY_PATCH)}'")
            )
    return missing


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
