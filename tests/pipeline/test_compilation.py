"""The compiled pipeline: golden file, schema, parity with params.yaml, every profile."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.cli.main import main
from distilldsm.config import Params, load_params
from distilldsm.config.presets import set_values
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.mapping import to_mapping
from distilldsm.core.version import __version__
from distilldsm.pipeline.cluster import STEPS, load_cluster
from distilldsm.pipeline.compilation import check_pipeline, compile_pipeline
from distilldsm.pipeline.definition import SECTIONS, Images, arguments
from distilldsm.pipeline.step import check_parameters, whole_numbers

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "distilldsm" / "pipeline" / "distilldsm.yaml"
CLUSTER = ROOT / "conf" / "cluster.yaml"


def compiled(path: Path, params: Params | None = None, images: Images | None = None, **profiles: str) -> list[dict]:
    compile_pipeline(
        path, params or load_params(ROOT / "params.yaml"), load_cluster(CLUSTER, profiles), images or Images()
    )
    return list(yaml.safe_load_all(path.read_text()))


def test_the_golden_file_is_what_is_compiled_now(tmp_path):
    target = tmp_path / "pipeline.yaml"
    # In a process with another hash seed: the order must not come from a set or a protobuf map.
    command = [sys.executable, "-m", "distilldsm", "pipeline", "compile", "-o", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert target.read_text() == GOLDEN.read_text(), (
        "run: distilldsm pipeline compile -o distilldsm/pipeline/distilldsm.yaml"
    )


def test_the_golden_file_passes_kfps_schema_and_loads_again():
    from kfp import components

    documents = check_pipeline(GOLDEN)
    assert len(documents) == 2
    loaded = components.load_component_from_file(str(GOLDEN))
    assert set(loaded.component_spec.inputs) == {
        "folds", "budget", *SECTIONS, "data_version", "trainjob", "mlflow_secret", "s3_secret",
        "download_secret",
    }  # fmt: skip


def test_inputs_have_the_defaults_of_params_yaml():
    spec = yaml.safe_load_all(GOLDEN.read_text()).__next__()
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    defaults = {name: whole_numbers(inputs[name]["defaultValue"]) for name in ("folds", *SECTIONS)}
    sections = {name: defaults[name] for name in SECTIONS}
    assert check_parameters(defaults["folds"], sections) == load_params(ROOT / "params.yaml")
    fields = {field.name for field in dataclasses.fields(Params)}
    assert fields - {"cv"} == set(SECTIONS), "a section that the pipeline does not have"


@settings(deadline=None, max_examples=50)
@given(
    epochs=st.integers(1, 500),
    rate=st.floats(1e-6, 1.0),
    folds=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
    batch=st.none() | st.integers(1, 8),
)
def test_parameters_survive_kfps_floats(epochs, rate, folds, batch):
    assignments = [f"train.epochs={epochs}", f"train.learning_rate={rate!r}", f"cv.folds={folds}"]
    values = set_values(to_mapping(load_params(ROOT / "params.yaml")), assignments)
    values["train"]["batch_size"] = batch
    from distilldsm.core.mapping import from_mapping

    params = from_mapping(Params, values)

    def as_kfp(value):
        if isinstance(value, dict):
            return {k: as_kfp(v) for k, v in value.items()}
        if isinstance(value, list):
            return [as_kfp(v) for v in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    carried = as_kfp(arguments(params))
    assert check_parameters(carried["folds"], {name: carried[name] for name in SECTIONS}) == params


@pytest.mark.slow
def test_every_profile_compiles_for_every_step_and_reaches_the_pods(tmp_path):
    cluster = load_cluster(CLUSTER)
    for name, profile in cluster.profiles.items():
        spec, platform = compiled(tmp_path / "p.yaml", **dict.fromkeys(STEPS, name))
        executors = spec["deploymentSpec"]["executors"]
        pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert len(executors) == len(STEPS)
        for label, executor in executors.items():
            resources = executor["container"]["resources"]
            assert resources["resourceMemoryLimit"] == profile.memory
            pod = pods[label]
            assert pod["securityContext"]["runAsNonRoot"] is True
            secrets = {s["secretNameParameter"]["componentInputParameter"] for s in pod["secretAsEnv"]}
            own = {"download_secret"} if label == "exec-download" else set()
            expected = {"mlflow_secret", "s3_secret"} | own
            assert {s.removeprefix("pipelinechannel--") for s in secrets} == expected
            assert all(s["optional"] for s in pod["secretAsEnv"])
            if profile.accelerators:
                assert resources["accelerator"]["resourceCount"] == str(profile.accelerators)
                assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
                assert [t["key"] for t in pod["tolerations"]] == ["nvidia.com/gpu"]
                memory = [d for d in pod["emptyDirMounts"] if d["mountPath"] == "/dev/shm"]
                assert [d["medium"] for d in memory] == ["Memory"]
            assert [v["mountPath"] for v in pod.get("pvcMount", [])] == [v.path for v in profile.volumes]


def test_images_retries_and_versions_are_in_the_pipeline(tmp_path):
    digest = "@sha256:" + "a" * 64
    images = Images(data=f"reg:5000/d{digest}", train=f"t{digest}", export=f"e{digest}")
    assert images.by_digest
    assert not Images().by_digest
    spec, _ = compiled(tmp_path / "p.yaml", images=images, train="gpu-work")
    executors = spec["deploymentSpec"]["executors"]
    assert {label: e["container"]["image"][:1] for label, e in executors.items()} == {
        "exec-check": "r", "exec-download": "r", "exec-validate": "r", "exec-preprocess": "r", "exec-train": "t",
        "exec-evaluate": "t", "exec-cross-validate": "t", "exec-gate": "t", "exec-export": "e", "exec-finish": "t",
    }  # fmt: skip
    for executor in executors.values():
        assert {"name": "DISTILLDSM_PIPELINE_VERSION", "value": __version__} in executor["container"]["env"]
    tasks = {name: t for c in spec["components"].values() for name, t in c.get("dag", {}).get("tasks", {}).items()}
    assert tasks["download"]["retryPolicy"]["maxRetryCount"] == 3
    assert tasks["train"]["retryPolicy"] == {
        "maxRetryCount": 2, "backoffDuration": "60s", "backoffFactor": 2.0, "backoffMaxDuration": "8640000s",
    }  # fmt: skip
    assert "retryPolicy" not in tasks["validate"]
    work = {e["name"]: e["value"] for e in executors["exec-train"]["container"]["env"]}
    assert work["DISTILLDSM_WORK_DIR"] == "/work/work"


def test_export_runs_only_where_the_gate_says_so():
    spec = next(yaml.safe_load_all(GOLDEN.read_text()))
    graphs = {name: one["dag"]["tasks"] for name, one in spec["components"].items() if "dag" in one}
    [loop] = [name for name, tasks in graphs.items() if "export" in tasks]
    [branch] = [
        name for name, tasks in graphs.items() if any(t["componentRef"]["name"] == loop for t in tasks.values())
    ]
    [task] = [t for tasks in graphs.values() for t in tasks.values() if t["componentRef"]["name"] == branch]
    assert task["triggerPolicy"]["condition"] == "inputs.parameter_values['pipelinechannel--gate-Output'] == true"


def test_component_bodies_only_call_the_stage():
    """No logic lives in the YAML: the source that a pod executes is one import and one call."""
    spec = next(yaml.safe_load_all(GOLDEN.read_text()))
    for executor in spec["deploymentSpec"]["executors"].values():
        source = executor["container"]["command"][-1]
        body = [line for line in source.splitlines() if line.startswith("    ") and "import" not in line]
        assert sum("step.run(" in line for line in body) == 1
        assert len(source) < 2500
        assert "pip install" not in " ".join(executor["container"]["command"])


@pytest.mark.parametrize(
    ("role", "image"), [("data", "no-tag"), ("train", "UPPER:1"), ("export", "a b:1"), ("data", "x@sha256:12")]
)
def test_image_names_that_are_none(role, image):
    with pytest.raises(ConfigError, match=role):
        Images(**{role: image})


def test_a_broken_file_is_refused(tmp_path):
    broken = tmp_path / "p.yaml"
    text = GOLDEN.read_text()
    for what, by, words in (
        ("executorLabel: exec-train", "executorLabel: exec-nothing", "no executor"),
        ("name: comp-train", "name: comp-nothing", "no component"),
        ("schemaVersion:", "schemaVersionn:", "not a compiled pipeline"),
        ("mountPath: /tmp", "mountPoint: /tmp", "not a compiled pipeline"),
    ):
        assert what in text
        broken.write_text(text.replace(what, by))
        with pytest.raises(UserError, match=words):
            check_pipeline(broken)


def test_nothing_is_left_where_compiling_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", "compile", "-o", str(tmp_path / "p.yaml"), "--profile", "train=huge"]) == 2
    assert "is not a known profile" in capsys.readouterr().err
    assert main(["pipeline", "compile", "-o", str(tmp_path / "none" / "p.yaml")]) == 1
    assert list(tmp_path.iterdir()) == []
