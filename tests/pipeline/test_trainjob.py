"""Trainings beyond one process: the manifest, what happens to a job that fails, and two real processes by the SDK."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest

from distilldsm.config import ModelConfig, PreprocessConfig, TrackingConfig, TrainConfig
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.mapping import from_mapping, load_yaml, to_mapping
from distilldsm.core.output_directory import output_directory
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.pipeline import trainjob
from distilldsm.pipeline.trainjob import run_train
from distilldsm.pipeline.trainjob_follow import JobExistsError, JobGoneError, TrainJobs, follow
from distilldsm.pipeline.trainjob_manifest import RUN_LABEL, SecretVariable, TrainJobConfig, check_manifest, manifest
from tests.data.volumes import write_dataset
from tests.http_answers import answering

ROOT = Path(__file__).resolve().parents[2]
SMALL = TrainConfig(
    model=ModelConfig(name="distill_dsm", options={"width": 0.25}),
    epochs=1,
    batch_size=2,
    device="cpu",
    precision="fp32",
)


def job(**changes) -> TrainJobConfig:
    return TrainJobConfig(**{"image": "i:1", "claim": "c", "poll_s": 0.001, **changes})


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("data") / "preprocessed"
    index = write_dataset(root, cases=6)
    with output_directory(output, stage="preprocess", config={}, inputs={}) as work:
        preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), work)
    return output


class FakeApi:
    """A cluster: the states it goes through, what the log says, and what a finished job leaves."""

    def __init__(self, states, lines=(), finished=lambda built: None):
        self.states, self.lines, self.finished = list(states), list(lines), finished
        self.jobs: dict[str, dict] = {}
        self.created = 0

    def create(self, built):
        if built["metadata"]["name"] in self.jobs:
            raise JobExistsError
        self.jobs[built["metadata"]["name"]] = dict(built)
        self.created += 1

    def state(self, name):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, BaseException):
            raise state
        if state == "Complete":
            self.finished(self.jobs[name])
        return state

    def logs(self, name):
        yield from self.lines

    def delete(self, name):
        if name not in self.jobs:
            raise JobGoneError
        del self.jobs[name]


def test_the_shipped_job_is_what_trainers_api_takes():
    shipped = from_mapping(TrainJobConfig, load_yaml(ROOT / "conf" / "trainjob.yaml"))
    built = manifest(shipped, "n", ["--fold", "1"], {"KFP_RUN_ID": "r"})
    trainer = built["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["command"] + trainer["args"] == ["torchrun", "-m", "distilldsm.components.train", "--fold", "1"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    assert {"name": "KFP_RUN_ID", "value": "r"} in trainer["env"]
    assert built["metadata"]["labels"][RUN_LABEL] == "r"
    [patch] = built["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == 10001
    for variable in trainer["env"]:
        if variable["name"] != "KFP_RUN_ID":
            assert set(variable) == {"name", "valueFrom"}
            assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "trainer", "numNode"), 2),
        (("spec", "trainer", "numNodes"), "two"),
        (("spec", "runtimePatches", 0, "trainingRuntimeSpec", "template", "spec", "jobs"), []),
        (("spec", "runtimePatch"), [{}]),
    ],
)
def test_unknown_fields_and_wrong_types_are_refused(path, value):
    built = json.loads(json.dumps(manifest(job(), "n", [], {})))
    inner = built
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value if value != [] else [{"name": "x"}]
    with pytest.raises(ConfigError, match="not a valid TrainJob"):
        check_manifest(built)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 0}, "nodes"),
        ({"processes": 5000}, "processes"),
        ({"path": "work"}, "absolute"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"env": {"A": "1"}, "secrets": [{"name": "A", "secret": "s", "key": "k"}]}, "in 'env' and in 'secrets'"),
    ],
)
def test_impossible_jobs(changes, words):
    with pytest.raises(ConfigError, match=words):
        from_mapping(TrainJobConfig, {"image": "i:1", "claim": "c", **changes})


def followed(api: FakeApi, **changes) -> list[str]:
    """What is said while the job "n" is followed to its end."""
    said: list[str] = []
    follow(job(**changes), "n", manifest(job(), "n", [], {}), api, say=said.append)
    return said


def test_a_complete_job_is_deleted_and_each_line_of_its_log_shown_once_although_it_is_read_anew():
    api = FakeApi(["Created", *["Running"] * 200, "Complete"], ["epoch 1", "epoch 2"])
    said = followed(api)
    assert not api.jobs
    assert [line for line in said if line.startswith("n: ")] == ["n: Created", "n: Running", "n: Complete"]
    assert [line for line in said if not line.startswith("n: ")] == ["epoch 1", "epoch 2"]


def test_a_failed_job_is_deleted_and_the_error_holds_its_last_lines():
    api = FakeApi(["Running", "Failed"], [f"line {n}" for n in range(100)])
    with pytest.raises(UserError, match="line 99") as caught:
        followed(api)
    assert "line 10\n" not in str(caught.value)
    assert not api.jobs
    kept = FakeApi(["Failed"])
    with pytest.raises(UserError):
        followed(kept, keep="failed")
    assert kept.jobs


@pytest.mark.parametrize(
    ("states", "timeout_s", "words"),
    [
        (["Running"], 0.02, "time limit"),
        (["Running", JobGoneError()], 60, "no longer exists"),
        (["Running", ConnectionError("away"), ConnectionError("away"), "Complete"], 60, None),
    ],
    ids=["time limit", "vanished", "server away for a moment"],
)
def test_however_a_job_ends_it_is_deleted(states, timeout_s, words):
    api = FakeApi(states)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        followed(api, timeout_s=timeout_s)
    assert api.created == 1
    assert not api.jobs


def test_a_running_job_of_the_same_name_is_followed_and_an_ended_one_makes_room():
    for states, created in ((["Running", "Running", "Complete"], 0), (["Failed", "Running", "Complete"], 1)):
        api = FakeApi(states)
        api.jobs["n"] = manifest(job(), "n", [], {})
        said = followed(api)
        assert api.created == created
        assert any("it is followed" in line for line in said) == (not created)


@pytest.mark.parametrize(
    ("verb", "expected_status", "expected"), [("create", 409, JobExistsError), ("delete", 404, JobGoneError)]
)
def test_what_the_cluster_answers_about_a_job(verb, expected_status, expected):
    """The SDK's own client against a server that always answers the same."""
    from kubernetes.client.exceptions import ApiException

    status = expected_status

    def answer(*_: object) -> tuple[int, dict[str, str], bytes]:
        return status, {}, json.dumps({"kind": "Status", "status": "Failure", "code": status}).encode()

    with answering(answer) as address:
        api = cluster_at(address)
        argument = manifest(job(), "n", [], {}) if verb == "create" else "n"
        with pytest.raises(expected):
            getattr(api, verb)(argument)
        status = 404
        with pytest.raises(JobGoneError):
            api.state("n")
        status = 500
        with pytest.raises(ApiException):
            getattr(api, verb)(argument)


def cluster_at(address: str) -> TrainJobs:
    from kubernetes import client

    configuration = client.Configuration(host=address)
    configuration.retries = False
    return TrainJobs("team", configuration)


def test_a_job_that_cannot_be_created():
    api = FakeApi(["Running"])
    api.create = lambda built: (_ for _ in ()).throw(RuntimeError("quota exceeded"))
    with pytest.raises(UserError, match="quota exceeded"):
        followed(api)


def test_sigterm_as_of_a_deleted_pod_leaves_no_orphan():
    api, before = FakeApi(["Running"]), signal.getsignal(signal.SIGTERM)

    def log(name):  # the job has been created by now, and SIGTERM has its handler
        if api.created == 1:
            api.created = 2
            os.kill(os.getpid(), signal.SIGTERM)
        yield from ()

    api.logs = log
    with pytest.raises(KeyboardInterrupt):
        followed(api, timeout_s=60)
    assert api.created == 2
    assert not api.jobs
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_model_is_collected_and_the_claim_left_clean(tmp_path, preprocessed, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    shared, model = tmp_path / "work", tmp_path / "model"
    shared.mkdir()

    def train(built):
        arguments = built["spec"]["trainer"]["args"]
        value = {arguments[n]: arguments[n + 1] for n in range(2, len(arguments), 2)}
        assert value["--fold"] == "1"
        assert from_mapping(TrainConfig, load_yaml(value["--params"])["train"]) == SMALL
        assert read_json(Path(value["--preprocessed"]) / "manifest.json") == read_json(preprocessed / "manifest.json")
        result = Path(value["--output"])
        result.mkdir()
        (result / "last.safetensors").write_text("weights")
        files = {"last.safetensors": sha256_file(result / "last.safetensors")}
        (result / "manifest.json").write_text(json.dumps({"files": files}))

    api = FakeApi(["Running", "Complete"], finished=train)
    run_train(SMALL, {"preprocessed": preprocessed}, {"model": model}, fold=1, job=job(path=str(shared)), api=api)
    assert (model / "last.safetensors").read_text() == "weights"
    assert list(shared.iterdir()) == []

    def again(api, path=shared):
        run_train(SMALL, {"preprocessed": preprocessed}, {"model": model}, fold=1, job=job(path=str(path)), api=api)

    # One that fails leaves its work on the claim, and the next finds it under the same name.
    for _ in range(2):
        with pytest.raises(UserError, match="failed"):
            again(FakeApi(["Failed"]))
    assert len(list(shared.iterdir())) == 1
    with pytest.raises(UserError, match="left no model"):
        again(FakeApi(["Complete"]))
    # Half a model is refused and stays where it was.
    (folder,) = shared.iterdir()

    def half(built):
        train(built)
        (folder / "model" / "last.safetensors").write_text("wei")

    shutil.rmtree(model)
    with pytest.raises(UserError, match="incomplete"):
        again(FakeApi(["Complete"], finished=half))
    assert not model.exists()
    assert (folder / "model").is_dir()


def test_a_claim_that_is_not_mounted(tmp_path, preprocessed):
    with pytest.raises(UserError, match="not mounted"):
        run_train(
            SMALL,
            {"preprocessed": preprocessed},
            {"model": tmp_path / "m"},
            fold=0,
            job=job(path=str(tmp_path / "no")),
            api=FakeApi(["Running"]),
        )


def test_a_password_in_an_address_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as caught:
        manifest(job(), "n", [], {"MLFLOW_TRACKING_URI": "https://me:planted@mlflow"})
    assert "planted" not in str(caught.value)


def test_secrets_are_never_values(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    secret = SecretVariable(name="AWS_SECRET_ACCESS_KEY", secret="s3", key="secretkey")
    assert "planted" not in json.dumps(manifest(job(secrets=(secret,)), "n", [], {}))


@pytest.mark.slow
def test_two_processes_in_one_pod(tmp_path, preprocessed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model = tmp_path / "model"
    run_train(SMALL, {"preprocessed": preprocessed}, {"model": model}, fold=0, processes=2)
    assert read_json(model / "manifest.json")["stage"] == "train"
    with pytest.raises(UserError, match="2 processes failed"):
        run_train(SMALL, {"preprocessed": preprocessed}, {"model": model}, fold=9, processes=2)


def shim(folder: Path) -> Path:
    """A wheel called torch whose torchrun is that of this environment: the SDK's backend installs it into its venv."""
    wheel = folder / "torch-0.0.1-py3-none-any.whl"
    info = "torch-0.0.1.dist-info"
    launch = "os.execv(python, [python, '-m', 'torch.distributed.run', *[a for a in sys.argv[1:] if a]])"
    code = f"import os, sys\n\npython = {sys.executable!r}\n\n\ndef main():\n    {launch}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch_shim.py", code)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\ntorchrun = torch_shim:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def entry_point(arguments):
    """What the SDK copies into a file of its own and runs on every rank: the very command of a TrainJob's pods."""
    import sys

    from distilldsm.cli.main import main

    sys.exit(main(["train", *arguments]))


@pytest.mark.slow
def test_the_entry_point_on_two_processes_through_the_sdks_local_backend(tmp_path, preprocessed):
    from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient

    params, model = tmp_path / "params.yaml", tmp_path / "model"
    settings = {"train": to_mapping(SMALL), "tracking": to_mapping(TrackingConfig(enabled=False))}
    params.write_text(json.dumps(settings))
    arguments = trainjob._arguments(params, 0, preprocessed, model)
    client = TrainerClient(backend_config=LocalProcessBackendConfig())
    trainer = CustomTrainer(
        func=entry_point,
        func_args=arguments,  # type: ignore[arg-type]
        packages_to_install=[f"torch @ {shim(tmp_path).as_uri()}"],
        env={"PET_NPROC_PER_NODE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
    )
    name = client.train(runtime="torch-distributed", trainer=trainer)
    log = list(client.get_job_logs(name, follow=True))
    done = client.wait_for_job_status(name, status={"Complete", "Failed"}, timeout=240)
    assert done.status == "Complete", "\n".join(log)
    assert read_json(model / "manifest.json")["stage"] == "train"
    assert read_json(model / "model.json")["epochs"] == 1
