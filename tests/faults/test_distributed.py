"""Several training processes: what one process would have computed, and an end for all when one is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distilldsm.cli.main import main
from distilldsm.config import PreprocessConfig
from distilldsm.core.output_directory import output_directory
from distilldsm.data.preprocess import preprocess_dataset
from tests.data.volumes import write_dataset

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

MEDDLING = """
import os, signal, sys
from distilldsm.training.loop import Trainer

rank, epoch, flag = int(os.environ["RANK"]), int(sys.argv.pop(1)), sys.argv.pop(1)
step = Trainer.step

def killed(self, images, labels, size, at, number):
    if rank == 1 and at == epoch and number == 1 and not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, images, labels, size, at, number)

Trainer.step = killed
from distilldsm.cli.main import main
raise SystemExit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small cases; five held out, which two processes cannot share evenly."""
    root = tmp_path_factory.mktemp("distributed")
    with output_directory(root / "raw", stage="download", config={}, inputs={}) as raw:
        index = write_dataset(raw, cases=10)
    config = PreprocessConfig(folds=2, workers=1)
    with output_directory(root / "preprocessed", stage="preprocess", config=config, inputs={}) as work:
        preprocess_dataset(root / "raw", index, config, work)
    return root / "preprocessed"


def params(folder: Path, **changes) -> Path:
    """Everything random but white noise, which each process draws for itself."""
    folder.mkdir(exist_ok=True)
    augment = {
        "spatial_probability": 0.8,
        "elastic_probability": 0.5,
        "low_resolution_probability": 0.5,
        "intensity_probability": 0.0,
        "mirror_axes": ["width"],
    }
    train = {
        "model": {"name": "distill_dsm", "options": {"width": 0.25}},
        "augment": augment,
        "epochs": 3,
        # AdamW divides a gradient by its own size: one that is zero but for rounding becomes a whole step.
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "batch_size": 4,
        "samples_per_case": 4,
        "validate_every": 1,
        "checkpoint_minutes": 0,
        "precision": "fp32",
        **changes,
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"train": train, "tracking": {"enabled": False}}))
    return path


def launch(folder: Path, data: Path, *options: str, meddle: int | None = None) -> subprocess.CompletedProcess[str]:
    """torchrun of two processes in `folder`; with `meddle`, rank 1 is killed once, in that epoch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "distilldsm.components.train"]
    if meddle is not None:
        script = folder / "meddled.py"
        script.write_text(MEDDLING)
        program = [str(script), str(meddle), str(folder / "flag")]
    arguments = ["--params", "params.yaml", "--preprocessed", str(data), "--output", "model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options, *program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "model" / "history.json").read_text())


@pytest.fixture(scope="module")
def two(preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training by two processes."""
    folder = tmp_path_factory.mktemp("two")
    params(folder)
    done = launch(folder, preprocessed)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without torchrun."""
    folder = tmp_path_factory.mktemp("one")
    arguments = ["--params", params(folder), "--preprocessed", preprocessed, "--output", folder / "model"]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


def test_two_processes_compute_what_one_does(one, two):
    """In float32, to 1e-3 in the loss of every epoch: sums in another order are all that differs."""
    for a, b in zip(history(one), history(two), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["val_dice"] == pytest.approx(a["val_dice"], abs=1e-3)
    weights = [load_file(folder / "model" / "last.safetensors") for folder in (one, two)]
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=5e-3), name


def test_a_killed_process_ends_all_and_the_next_start_goes_on(two, preprocessed, tmp_path):
    params(tmp_path)
    began = time.monotonic()
    done = launch(tmp_path, preprocessed, meddle=1)
    flag = (tmp_path / "flag").stat()
    assert time.monotonic() - began < 90
    assert time.time() - flag.st_mtime < 30
    assert done.returncode != 0
    ours = done.stderr.partition("torch/distributed/elastic")[0]
    assert ours.count("another process of this training has ended") <= 1
    assert "Traceback" not in ours.split("SignalException")[0].split("ChildFailedError")[0]
    assert not (tmp_path / "model").exists()
    again = launch(tmp_path, preprocessed)
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch 1" in again.stderr
    assert_same_model(two, tmp_path)


def test_torchruns_own_restart_goes_on(two, preprocessed, tmp_path):
    params(tmp_path)
    done = launch(tmp_path, preprocessed, "--max-restarts", "1", meddle=2)
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch 2" in done.stderr
    assert_same_model(two, tmp_path)


def assert_same_model(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "model" / "last.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[epoch["train_loss"] for epoch in history(folder)] for folder in (a, b)]
    assert losses[0] == losses[1]
