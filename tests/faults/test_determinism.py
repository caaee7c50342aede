"""Same seed, same machine, same bytes: every stage twice, in other places and with other numbers of workers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distilldsm.components import evaluate, export, preprocess, train, validate
from distilldsm.config import (
    EvaluateConfig,
    ExportConfig,
    Int8Config,
    ModelConfig,
    PreprocessConfig,
    TrackingConfig,
    TrainConfig,
    ValidateConfig,
)
from distilldsm.core.files import read_json
from distilldsm.data.training_distribution import DISTRIBUTION
from distilldsm.models.package import RUNTIME_FILES
from distilldsm.training.setup import seed_everything
from tests.components.test_evaluate import without
from tests.data.volumes import write_dataset
from tests.export.fake import FOLD

TIMED = {
    "validation": set(),
    "preprocessed": set(),
    "model": {"history.json", "cost.json"},
    "evaluation": {"timing.json", "report.html"},
}
"""Files that hold times, or hashes of files that do; and every manifest.json (hashes of all files)."""

SETTINGS = TrainConfig(model=ModelConfig(name="distill_dsm", options={"width": 0.25}), epochs=2, batch_size=2)
NO_TRACKING = TrackingConfig(enabled=False)


def all_stages(raw: Path, root: Path, *, workers: int) -> dict[str, Path]:
    made = {name: root / name for name in TIMED}

    def into(config: object, stage: ModuleType, output: str, *inputs: str, **options: object) -> None:
        given = {name: raw if name == "dataset" else made[name] for name in inputs}
        stage.run(config, given, {output: made[output]}, **options)

    into(ValidateConfig(workers=workers), validate, "validation", "dataset")
    into(PreprocessConfig(folds=2, workers=workers), preprocess, "preprocessed", "dataset", "validation")
    settings = replace(SETTINGS, workers=workers - 1)
    into(settings, train, "model", "preprocessed", fold=0, tracking=NO_TRACKING)
    into(EvaluateConfig(workers=workers), evaluate, "evaluation", "dataset", "preprocessed", "model", "validation",
         fold=0)  # fmt: skip
    return made


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> list[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("twice")
    write_dataset(folder / "raw", cases=4)
    return [all_stages(folder / "raw", folder / name, workers=workers) for name, workers in (("a", 1), ("b", 3))]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(TIMED))
def test_two_runs_write_the_same_bytes(twice, stage):
    one, two = (contents(run[stage]) for run in twice)
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= TIMED[stage] | {"manifest.json"}


def test_the_report_differs_in_cost_and_provenance_only(twice):
    one, two = ((run["evaluation"] / "report.html").read_text() for run in twice)
    assert one != two
    assert without(one, "cost", "provenance") == without(two, "cost", "provenance")


def test_the_histories_differ_in_times_only(twice):
    histories = [
        [{k: v for k, v in epoch.items() if "seconds" not in k} for epoch in read_json(run["model"] / "history.json")]
        for run in twice
    ]
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_a_second_export_writes_the_same_bytes(made, tmp_path):
    """But for INT8: whether it is shipped depends on how fast it is."""
    config = ExportConfig(parity_cases=1, register_model=False, int8=Int8Config(enabled=False))
    inputs = {"model": made.model, "preprocessed": made.preprocessed}
    export.run(config, inputs, {"export": tmp_path / "export"}, fold=FOLD)
    for name in (*RUNTIME_FILES["openvino"], *RUNTIME_FILES["onnx"], "model.safetensors", DISTRIBUTION):
        assert (tmp_path / "export" / name).read_bytes() == (made.export / name).read_bytes(), name
    one, two = (read_json(folder / "metadata.json") for folder in (made.export, tmp_path / "export"))
    assert {key for key in one if one[key] != two[key]} <= {"files", "int8"}


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_sets_everything(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seed_everything(3, deterministic=deterministic)
    assert torch.initial_seed() == 3
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is (torch.cuda.is_available() and not deterministic)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what the user set stays
    seed_everything(3, deterministic=deterministic)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    seed_everything(0, deterministic=True)
