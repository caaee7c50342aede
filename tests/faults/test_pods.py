"""Containers and pods: as little as each interface lets us ask for, and a word where it lets us ask for no less."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from distilldsm.config import load_params
from distilldsm.core.mapping import from_mapping, load_yaml, to_mapping
from distilldsm.export.serving import inference_service
from distilldsm.models.package import load_metadata
from distilldsm.pipeline.cluster import STEPS
from distilldsm.pipeline.containers import ContainerSettings, _options
from distilldsm.pipeline.sweep import experiment, load_sweep
from distilldsm.pipeline.trainjob_manifest import TrainJobConfig, manifest

ROOT = Path(__file__).resolve().parents[2]
DROPPED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def job() -> TrainJobConfig:
    return from_mapping(TrainJobConfig, load_yaml(ROOT / "conf/trainjob.yaml"))


def pods_of(trainjob: dict) -> list[dict]:
    """The pod specs in a TrainJob's patches."""
    return [
        replicated["template"]["spec"]["template"]["spec"]
        for patch in trainjob["spec"]["runtimePatches"]
        for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    ]


def test_the_compiled_pipeline_runs_no_step_as_root():
    spec, platform = yaml.safe_load_all((ROOT / "distilldsm/pipeline/distilldsm.yaml").read_text())
    steps = spec["deploymentSpec"]["executors"]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(pods) == set(steps)
    assert len(pods) == len(STEPS)
    for pod in pods.values():
        assert pod["securityContext"] == {"runAsNonRoot": True}
        assert {"mountPath": "/tmp", "volumeName": "tmp"}.items() <= next(
            m for m in pod["emptyDirMounts"] if m["mountPath"] == "/tmp"
        ).items()
        assert not {"hostPathMount", "privileged"} & set(pod)
    for step in steps.values():
        for variable in step["container"].get("env", []):
            assert not re.search(r"PASSWORD|SECRET|TOKEN", variable["name"])


def test_kfp_lets_a_pipeline_ask_for_no_more():
    """Where this fails, kfp-kubernetes has learnt more: ask for it in pipeline/cluster.py, and correct SECURITY.md."""
    from kfp import kubernetes

    known = set(inspect.signature(kubernetes.set_security_context).parameters)
    assert known == {"task", "run_as_user", "run_as_group", "run_as_non_root"}
    documented = (inspect.getdoc(kubernetes.set_security_context) or "").replace("``", "")
    for promise in ("allowPrivilegeEscalation=false", "drop ALL capabilities", "seccompProfile=RuntimeDefault"):
        assert promise in documented
    security = (ROOT / "SECURITY.md").read_text()
    assert "pod-security.kubernetes.io/enforce: restricted" in security
    assert "read-only root" in security


def test_a_trainjobs_pods_have_no_privilege():
    pods = pods_of(manifest(job(), "n", [], {}))
    assert pods
    for pod in pods:
        for container in pod["containers"]:
            assert container["securityContext"] == {**DROPPED, "readOnlyRootFilesystem": True}
            writable = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert writable == {"/tmp", "/dev/shm", "/work"}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_trials_of_a_search_have_no_privilege():
    sweep = load_sweep(str(ROOT / "conf/sweep.yaml"), to_mapping(load_params(ROOT / "params.yaml")))
    built = experiment(sweep, job(), name="s", preprocessed="/work/p", params="/work/params.yaml")
    pods = pods_of(built["spec"]["trialTemplate"]["trialSpec"])
    assert pods == pods_of(manifest(job(), "n", [], {}))


@pytest.mark.parametrize("model_format", ["mlflow", "openvino"])
def test_a_model_server_has_no_privilege(made, model_format):
    served = inference_service(load_metadata(made.export), model_format=model_format)["spec"]["predictor"]["model"]
    # The image of OpenVINO Model Server names its user by a word, which Kubernetes cannot check.
    expected = DROPPED if model_format == "mlflow" else {k: v for k, v in DROPPED.items() if k != "runAsNonRoot"}
    assert served["securityContext"] == expected


def test_local_containers_have_no_privilege():
    class Client:
        def info(self) -> dict:
            return {}

    options = _options(Client(), ContainerSettings(), {})
    assert options["read_only"] is True
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges"]
    assert re.fullmatch(r"\d+:\d+", options["user"])
    assert list(options["tmpfs"]) == ["/tmp"]
    assert not {"privileged", "cap_add", "pid_mode", "ipc_mode", "devices"} & set(options)


def test_the_dockerfile_ends_as_another_user_with_no_secret_in_a_layer():
    text = (ROOT / "docker/Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    runtime = next(stage for stage in stages if stage.split("\n", 1)[0].endswith(" AS runtime"))
    assert re.findall(r"^USER (.*)$", runtime, re.M) == ["10001:10001"]
    for stage in stages:  # whatever is installed as root, none ends as root
        assert (re.findall(r"^USER (.*)$", stage, re.M) or ["10001:10001"])[-1] == "10001:10001"
    for role in ("data", "train", "export"):
        stage = next(s for s in stages if s.startswith(f"runtime AS {role}\n"))
        assert not re.search(r"^(USER|RUN|ADD)", stage, re.M)
    arguments = re.findall(r"^ARG (\w+)", text, re.M)
    variables = re.findall(r"\b([A-Z][A-Z0-9_]+)=", "".join(re.findall(r"^ENV (?:.*\\\n)*.*$", text, re.M)))
    for name in (*arguments, *variables):
        assert not re.search(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|KEY", name), name
    assert not re.search(r"^ADD |curl |wget |chmod .*777|sudo|setuid|--privileged|--security=insecure", text, re.M)
    for mounted in re.findall(r"--mount=type=secret\S*", text):
        assert "target=/run/build/" in mounted
