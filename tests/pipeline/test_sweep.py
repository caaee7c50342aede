"""Hyper-parameter searches: the space, Katib's experiment, DVC's queue."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.cli.main import main
from distilldsm.components import registry, train
from distilldsm.config import Params, load_params
from distilldsm.config.presets import set_values
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping, load_yaml, to_mapping
from distilldsm.pipeline import sweep as module
from distilldsm.pipeline.sweep import Space, SweepConfig, draw, experiment, load_sweep
from distilldsm.pipeline.trainjob_manifest import TrainJobConfig

ROOT = Path(__file__).resolve().parents[2]
PARAMS = to_mapping(load_params(ROOT / "params.yaml"))
SHIPPED = ROOT / "conf" / "sweep.yaml"


def shipped_experiment() -> dict:
    job = from_mapping(TrainJobConfig, load_yaml(ROOT / "conf" / "trainjob.yaml"))
    return experiment(
        load_sweep(str(SHIPPED), PARAMS), job, name="s", preprocessed="/work/p", params="/work/params.yaml"
    )


def test_the_shipped_sweep_is_an_experiment_that_katib_takes_and_names_every_parameter_once():
    spec = shipped_experiment()["spec"]
    arguments = spec["trialTemplate"]["trialSpec"]["spec"]["trainer"]["args"]
    used = set(re.findall(r"\$\{trialParameters\.([\w-]+)\}", " ".join(arguments)))
    declared = {p["name"]: p["reference"] for p in spec["trialTemplate"]["trialParameters"]}
    assert used == set(declared)
    assert {r for r in declared.values() if not r.startswith("$")} == {p["name"] for p in spec["parameters"]}


def test_metrics_are_read_from_the_pod_of_the_first_process():
    """Pods carry the labels of the Job's pod template, JobSet's and Kubernetes' own; not those of the Job."""
    constants = pytest.importorskip("kubeflow.trainer.constants.constants")
    template = shipped_experiment()["spec"]["trialTemplate"]
    assert template["primaryPodLabels"] == {constants.JOBSET_RJOB_NAME_LABEL: "node", constants.JOB_INDEX_LABEL: "0"}
    assert template["primaryContainerName"] == constants.NODE


def test_a_trials_command_line_is_one_that_the_train_stage_takes(monkeypatch):
    """Katib's placeholders filled in, as Katib does it."""
    spec = shipped_experiment()["spec"]
    values = {"trial": "s-abc", "learning-rate": "0.005", "alpha": "0.25", "rotation-deg": "12.5"}
    arguments = [
        re.sub(r"\$\{trialParameters\.([\w-]+)\}", lambda m: values[m[1]], argument)
        for argument in spec["trialTemplate"]["trialSpec"]["spec"]["trainer"]["args"][2:]
    ]
    arguments[arguments.index("/work/params.yaml")] = str(ROOT / "params.yaml")
    seen = {}

    def run(config, inputs, outputs, **more):
        seen.update(config=config, outputs=outputs)

    monkeypatch.setattr(registry, "STAGES", (dataclasses.replace(train.STAGE, run=run),))
    assert main(["train", *arguments]) == 0
    assert seen["config"].learning_rate == 0.005
    assert seen["config"].model.options["alpha"] == 0.25
    assert seen["config"].augment.rotation_deg == 12.5
    assert seen["outputs"]["model"] == Path("/work/s/s-abc")


def test_the_objective_is_in_the_trainings_log():
    """The pattern is the default of Katib's StdOut collector."""
    from distilldsm.training.loop import Trainer

    class Printed:
        settings = load_params(ROOT / "params.yaml").train

    record = {"epoch": 3, "train_loss": 0.5, "learning_rate": 1e-3, "seconds": 2.0}
    record |= {"val_dice": {"a": 0.8, "b": 0.9}, "val_dice_mean": 0.85}
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as log:
        Trainer._print(Printed(), record, seconds_left=3.0)  # type: ignore[arg-type]
    found = dict(re.findall(r"([\w|-]+)\s*=\s*([+-]?\d*\.?\d+(?:[Ee][+-]?\d+)?)", log.getvalue()))
    assert float(found["val_dice_mean"]) == pytest.approx(0.85)


@given(st.floats(1e-6, 1.0), st.floats(1.5, 1e4), st.booleans(), st.integers(0, 2**32))
def test_draws_stay_in_their_range(low, factor, log, seed):
    space = Space(min=low, max=low * factor, log=log)
    for _ in range(5):
        assert low * (1 - 1e-5) <= space.draw(random.Random(seed)) <= low * factor * (1 + 1e-5)


def test_logarithmic_draws_are_uniform_in_the_logarithm():
    generator = random.Random(0)
    logs = [math.log10(Space(min=1e-4, max=1.0, log=True).draw(generator)) for _ in range(4000)]
    shares = [sum(-4 + k <= value < -3 + k for value in logs) / len(logs) for k in range(4)]
    assert all(abs(share - 0.25) < 0.03 for share in shares)


def test_draws_repeat_with_the_seed_and_pass_the_parameters_checks():
    sweep = load_sweep(str(SHIPPED), PARAMS)
    trials = draw(sweep, 20, seed=3)
    assert trials == draw(sweep, 20, seed=3) != draw(sweep, 20, seed=4)
    for values in trials:
        from_mapping(Params, set_values(PARAMS, [f"{key}={json.dumps(value)}" for key, value in values.items()]))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"train.learning_rat": {"values": [1]}}, "did you mean 'learning_rate'"),
        ({"train.learning_rate": {"min": -1.0, "max": 1.0}}, "learning_rate"),
        ({"train.epochs": {"min": 1.5, "max": 3.0}}, "whole number"),
        ({"train.optimizer": {"values": ["adamw", "adamx"]}}, "did you mean"),
        ({"preprocess.folds": {"values": [3]}}, "not a training parameter"),
        ({"train.epochs": {"values": [1], "min": 1, "max": 2}}, "either"),
        ({"train.epochs": {"min": 3, "max": 2}}, "not below"),
        ({"train.ema_decay": {"min": 0.0, "max": 0.5, "log": True}}, "positive"),
        ({}, "empty"),
    ],
)
def test_impossible_sweeps(tmp_path, parameters, words):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}))
    with pytest.raises(ConfigError, match=words):
        load_sweep(str(path), PARAMS)


def test_a_sweep_has_at_least_one_trial():
    with pytest.raises(ConfigError, match=r"max_trials(.|\n)*at least 1"):
        from_mapping(SweepConfig, {"parameters": {"train.epochs": {"values": [1]}}, "max_trials": 0})


def test_whole_numbers_stay_whole():
    space = Space(min=2, max=9, whole=True)
    drawn = {space.draw(random.Random(seed)) for seed in range(100)}
    assert drawn == set(range(2, 10))
    assert space.for_katib()["parameterType"] == "int"


@pytest.mark.slow
def test_trials_wait_in_dvcs_queue(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    monkeypatch.chdir(clone)
    for key, value in (("user.name", "t"), ("user.email", "t@example.org")):
        subprocess.run(["git", "config", key, value], check=True)
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    mine = set_values(PARAMS, ["download.source=/data/mine", "train.epochs=3"])
    (clone / "params.yaml").write_text(yaml.safe_dump(mine))
    subprocess.run(["git", "commit", "-qam", "mine"], check=True)
    trials = draw(load_sweep(str(SHIPPED), PARAMS), 2, seed=0)
    module.queue(trials)
    listed = subprocess.run(["dvc", "queue", "status"], capture_output=True, text=True, check=True).stdout
    assert "sweep-0" in listed
    assert "sweep-1" in listed
    assert yaml.safe_load((clone / "params.yaml").read_text()) == mine
    line = ["git", "log", "--walk-reflogs", "--format=%H", "refs/exps/celery/stash"]
    stashed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    for values, commit in zip(reversed(trials), stashed, strict=True):
        text = subprocess.run(["git", "show", f"{commit}:params.yaml"], capture_output=True, check=True).stdout
        assert yaml.safe_load(text) == set_values(mine, [f"{key}={json.dumps(value)}" for key, value in values.items()])
