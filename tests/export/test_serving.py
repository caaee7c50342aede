"""The InferenceService: known fields only, and what it carries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.cli.main import main
from distilldsm.core.errors import ConfigError
from distilldsm.core.privacy import SWITCHES
from distilldsm.export.serving import PLACEHOLDER, inference_service, service_name
from distilldsm.models.package import SERVICE, verify
from tests.export.fake import exported

# Fields and types of KServe 0.21 that a manifest of ours may use, from the models of its Python SDK
# (V1beta1InferenceService, V1beta1PredictorSpec, V1beta1ModelSpec, V1beta1ModelFormat) and of Kubernetes' client
# (V1ResourceRequirements, V1ObjectMeta, V1SecurityContext).
QUANTITIES = {"cpu": str, "memory": str}
SCHEMA: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": {str: str}},
    "spec": {
        "predictor": {
            "minReplicas": int,
            "serviceAccountName": str,
            "model": {
                "modelFormat": {"name": str, "version": str},
                "protocolVersion": str,
                "storageUri": str,
                "runtime": str,
                "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
                "env": list,
                "securityContext": {
                    "runAsNonRoot": bool,
                    "allowPrivilegeEscalation": bool,
                    "capabilities": {"drop": list},
                    "seccompProfile": {"type": str},
                },
            },
        }
    },
}


def check(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in schema or str in schema, f"{where}.{key}"
            check(inner, schema.get(key, schema.get(str)), f"{where}.{key}")
    else:
        assert type(value) is schema, where


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return exported(tmp_path_factory).export


@pytest.mark.parametrize("model_format", ["mlflow", "openvino"])
def test_the_manifest_has_kserves_fields_only(package, model_format):
    metadata = verify(package)
    built = inference_service(metadata, storage_uri="s3://b/m", model_format=model_format, service_account="reader")
    check(built, SCHEMA)
    assert built["apiVersion"] == "serving.kserve.io/v1beta1"
    environment = {one["name"]: one["value"] for one in built["spec"]["predictor"]["model"]["env"]}
    assert environment.items() >= SWITCHES.items(), "the server reports its use"
    assert built["metadata"]["annotations"]["distilldsm.org/weights-sha256"] == metadata.files["model.safetensors"]


def test_the_export_holds_one_with_a_placeholder_and_the_command_fills_it_in(package, tmp_path, capsys):
    shipped = yaml.safe_load((package / SERVICE).read_text())
    check(shipped, SCHEMA)
    assert shipped["spec"]["predictor"]["model"]["storageUri"] == PLACEHOLDER
    assert main(["pipeline", "serving", str(package), "--uri", "s3://b/m", "-o", str(tmp_path / "s.yaml")]) == 0
    filled = yaml.safe_load((tmp_path / "s.yaml").read_text())
    shipped["spec"]["predictor"]["model"]["storageUri"] = "s3://b/m"
    assert filled == shipped
    assert main(["pipeline", "serving", str(package), "--uri", "/a/path", "-o", str(tmp_path / "t.yaml")]) == 2
    assert not (tmp_path / "t.yaml").exists()


@pytest.mark.parametrize("uri", ["models:/m/1", "/local", "file:///x", "s3://", ""])
def test_addresses_that_kserve_does_not_fetch(package, uri):
    with pytest.raises(ConfigError, match="is not a model's address"):
        inference_service(verify(package), storage_uri=uri)


@given(st.text(max_size=80))
def test_names_are_those_of_kubernetes(name):
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", service_name(name))
