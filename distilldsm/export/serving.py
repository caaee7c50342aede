"""A KServe InferenceService for an exported model.

Fields and formats as of KServe 0.21 (serving.kserve.io/v1beta1). With the format `mlflow`, MLServer serves the model
that the export stage logs to MLflow. With `openvino`, OpenVINO Model Server serves a folder with `1/model.xml` and
`1/model.bin`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from distilldsm.core.errors import ConfigError
from distilldsm.core.privacy import SWITCHES
from distilldsm.core.redaction import public_address, secret_in_address
from distilldsm.models.package import INTENDED_USE, ModelMetadata

PLACEHOLDER = "s3://BUCKET/PATH/OF/THE/MODEL"
"""A placeholder: the export stage does not know the address. `distilldsm pipeline serving` fills it in."""


def inference_service(
    metadata: ModelMetadata,
    *,
    storage_uri: str = PLACEHOLDER,
    model_format: Literal["mlflow", "openvino"] = "mlflow",
    cpu: str = "2",
    memory: str = "4Gi",
    service_account: str | None = None,
) -> dict[str, Any]:
    """The manifest as a mapping.

    Args:
        storage_uri: the model's folder, e.g. `s3://bucket/1/models/m-.../artifacts`.
        service_account: a service account with a secret for the bucket.

    Raises:
        ConfigError: KServe cannot fetch from this address.
    """
    if secret_in_address(storage_uri) is not None:
        raise ConfigError(
            "the model's address contains a secret", seen=public_address(storage_uri), hint="use a service account"
        )
    if not re.match(r"^(s3|gs|pvc|https?|hf|oci)://\S+$", storage_uri):
        raise ConfigError("is not a model's address", seen=storage_uri, rule="s3://, gs://, pvc://, oci:// or https://")
    model: dict[str, Any] = {
        "modelFormat": {"name": "mlflow"} if model_format == "mlflow" else {"name": "openvino_ir", "version": "opset1"},
        "protocolVersion": "v2",
        "storageUri": storage_uri,
        "resources": {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}},
        # The image is not ours, and its server imports MLflow before it loads the model's code.
        "env": [{"name": name, "value": value} for name, value in SWITCHES.items()],
    }
    # No read-only root: the servers choose which files they write.
    model["securityContext"] = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if model_format == "openvino":
        model["runtime"] = "kserve-ovms"
    else:
        # Kubernetes can check this only if the image's user is a number. OpenVINO Model Server's is not.
        model["securityContext"]["runAsNonRoot"] = True
    predictor: dict[str, Any] = {"minReplicas": 1, "model": model}
    if service_account:
        predictor["serviceAccountName"] = service_account
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": service_name(metadata.name),
            "annotations": {
                "distilldsm.org/intended-use": INTENDED_USE,
                "distilldsm.org/fold": str(metadata.fold),
                "distilldsm.org/weights-sha256": metadata.files.get("model.safetensors", ""),
            },
        },
        "spec": {"predictor": predictor},
    }


def service_name(name: str) -> str:
    """A model's name in the form of Kubernetes: lower case letters, digits and dashes, at most 53 characters."""
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:53].strip("-")
    return cleaned if cleaned[:1].isalpha() else f"m-{cleaned}".rstrip("-")[:53]


def to_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as text."""
    import yaml

    return yaml.safe_dump(manifest, sort_keys=False)
