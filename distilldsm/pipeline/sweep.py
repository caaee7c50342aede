"""Searches for hyper-parameters of the training: a Katib Experiment of TrainJobs, or experiments in DVC's queue.

Both draw from the same space, `conf/sweep.yaml`. Its keys are those of params.yaml, with the same checks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distilldsm.config import Params, load_params
from distilldsm.config.presets import set_values
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import Count, Natural, from_mapping, load_yaml, to_mapping
from distilldsm.pipeline.dvc_file import run_dvc
from distilldsm.pipeline.trainjob_manifest import NODE, TrainJobConfig, check_against, manifest

FIRST_POD = {"jobset.sigs.k8s.io/replicatedjob-name": NODE, "batch.kubernetes.io/job-completion-index": "0"}
"""Labels of the pod of rank 0, set by JobSet and Kubernetes. Its log contains the metrics."""

HELP = "search for hyper-parameters: Katib, or DVC's queue"


@dataclass(frozen=True, kw_only=True)
class Space:
    """The possible values of one parameter: a list, or a range."""

    values: tuple[Any, ...] | None = None
    min: float | None = None
    max: float | None = None
    log: bool = False
    """Draw uniformly in the logarithm."""
    whole: bool = False
    """Whole numbers only."""

    def __post_init__(self) -> None:
        if (self.values is None) == (self.min is None) or (self.min is None) != (self.max is None):
            raise ConfigError("a parameter needs either 'values', or 'min' and 'max'", seen=to_mapping(self))
        if self.values is not None and not self.values:
            raise ConfigError("'values' is empty")
        if self.min is not None and self.max is not None and not self.min < self.max:
            raise ConfigError("'min' is not below 'max'", seen=(self.min, self.max))
        if self.log and (self.min is None or self.min <= 0):
            raise ConfigError("'log' needs a positive 'min'", seen=self.min)

    def draw(self, generator: random.Random) -> Any:
        """Draw one value."""
        if self.values is not None:
            return generator.choice(self.values)
        assert self.min is not None
        assert self.max is not None
        if self.log:
            value = math.exp(generator.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = generator.uniform(self.min, self.max)
        return round(value) if self.whole else float(f"{value:.6g}")

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values to check: each listed value, or both ends of the range."""
        if self.values is not None:
            return self.values
        assert self.min is not None
        assert self.max is not None
        return (round(self.min), round(self.max)) if self.whole else (self.min, self.max)

    def for_katib(self) -> dict[str, Any]:
        """Type and feasible space in Katib's terms."""
        if self.values is not None:
            return {"parameterType": "categorical", "feasibleSpace": {"list": [json.dumps(v) for v in self.values]}}
        kind = "int" if self.whole else "double"
        limits = {key: f"{value:g}" for key, value in zip(("min", "max"), self.extremes, strict=True)}
        return {
            "parameterType": kind,
            "feasibleSpace": limits | {"distribution": "logUniform" if self.log else "uniform"},
        }


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """All of `conf/sweep.yaml`."""

    parameters: Mapping[str, Space]
    objective: str = "val_dice_mean"
    goal: Literal["maximize", "minimize"] = "maximize"
    algorithm: str = "random"
    max_trials: Count = 12
    parallel_trials: Count = 2
    max_failed_trials: Natural = 3

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ConfigError("'parameters' is empty")


def load_sweep(path: str, params: Mapping[str, Any]) -> SweepConfig:
    """Read a sweep; check every listed value and both ends of every range as in params.yaml.

    Raises:
        ConfigError: a key is not a training parameter, or a value is not allowed.
    """
    sweep = from_mapping(SweepConfig, load_yaml(path), where=path)
    for key, space in sweep.parameters.items():
        if not key.startswith("train."):
            raise ConfigError("is not a training parameter", where=path, seen=key, rule="train...")
        for value in space.extremes:
            from_mapping(Params, set_values(params, [f"{key}={json.dumps(value)}"]), where=path)
    return sweep


def draw(sweep: SweepConfig, trials: int, seed: int) -> list[dict[str, Any]]:
    """The parameter values of each trial, determined by the seed."""
    generator = random.Random(seed)  # noqa: S311  (no secret depends on it)
    return [{key: space.draw(generator) for key, space in sweep.parameters.items()} for _ in range(trials)]


def experiment(sweep: SweepConfig, job: TrainJobConfig, *, name: str, preprocessed: str, params: str) -> dict[str, Any]:
    """The Katib Experiment, checked against the models of its API.

    Args:
        preprocessed, params: paths of the data and of params.yaml on the claim.

    Raises:
        ConfigError: the models reject it.
    """
    short = {key: key.rsplit(".", 1)[-1].replace("_", "-") for key in sweep.parameters}
    if len(set(short.values())) < len(short):
        short = {key: key.replace(".", "-").replace("_", "-") for key in sweep.parameters}
    arguments = ["--params", params, "--preprocessed", preprocessed]
    arguments += ["--output", f"{job.path}/{name}/${{trialParameters.trial}}"]
    for key, alias in short.items():
        arguments += ["--set", f"{key}=${{trialParameters.{alias}}}"]
    trial = manifest(job, "trial", arguments, {})
    del trial["metadata"]  # Katib names the trials
    built = {
        "apiVersion": "kubeflow.org/v1beta1",
        "kind": "Experiment",
        "metadata": {"name": name},
        "spec": {
            "objective": {"type": sweep.goal, "objectiveMetricName": sweep.objective},
            "algorithm": {"algorithmName": sweep.algorithm},
            "maxTrialCount": sweep.max_trials,
            "parallelTrialCount": sweep.parallel_trials,
            "maxFailedTrialCount": sweep.max_failed_trials,
            "metricsCollectorSpec": {"collector": {"kind": "StdOut"}},
            "parameters": [{"name": short[key], **space.for_katib()} for key, space in sweep.parameters.items()],
            "trialTemplate": {
                "primaryContainerName": NODE,
                "primaryPodLabels": FIRST_POD,
                "successCondition": 'status.conditions.#(type=="Complete")#|#(status=="True")#',
                "failureCondition": 'status.conditions.#(type=="Failed")#|#(status=="True")#',
                "trialParameters": [
                    {"name": "trial", "description": "the trial's own folder", "reference": "${trialSpec.Name}"},
                    *({"name": alias, "description": key, "reference": alias} for key, alias in short.items()),
                ],
                "trialSpec": trial,
            },
        },
    }
    from kubeflow_katib_api import models

    check_against(models.V1beta1Experiment, built, "Katib Experiment")
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--sweep", default="conf/sweep.yaml", help="file with the search space (default: %(default)s)")
    parser.add_argument("--params", default="params.yaml")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    katib = commands.add_parser("katib", help="write the Experiment; start it with kubectl apply -f")
    katib.add_argument("-o", "--output", required=True, metavar="FILE")
    katib.add_argument("--job", default="conf/trainjob.yaml", help="TrainJob of every trial (default: %(default)s)")
    katib.add_argument("--name", default="distilldsm-sweep")
    katib.add_argument("--preprocessed", default="/work/preprocessed", help="path on the claim (default: %(default)s)")
    katib.add_argument("--params-on-claim", default="/work/params.yaml", help="path on claim (default: %(default)s)")
    local = commands.add_parser("local", help="queue the trials as DVC experiments; start them with dvc queue start")
    local.add_argument("--trials", type=int, help="number of trials (default: max_trials)")
    local.add_argument("--seed", type=int, default=0)
    local.add_argument("--dry-run", action="store_true", help="only print the commands")


def run(args: argparse.Namespace) -> None:
    """Search for hyper-parameters, with Katib or with DVC's queue."""
    sweep = load_sweep(args.sweep, to_mapping(load_params(args.params)))
    if args.command == "katib":
        _write_katib(sweep, args)
    else:
        queue(draw(sweep, args.trials or sweep.max_trials, args.seed), dry_run=args.dry_run)


def _write_katib(sweep: SweepConfig, args: argparse.Namespace) -> None:
    import yaml

    job = from_mapping(TrainJobConfig, load_yaml(args.job), where=args.job)
    built = experiment(sweep, job, name=args.name, preprocessed=args.preprocessed, params=args.params_on_claim)
    Path(args.output).write_text(yaml.safe_dump(built, sort_keys=False), encoding="utf-8")
    print(f"{args.output}: {sweep.max_trials} trials over {', '.join(sweep.parameters)}")


def queue(trials: Sequence[Mapping[str, Any]], *, dry_run: bool = False) -> None:
    """Queue each trial as a DVC experiment.

    Raises:
        UserError: DVC rejects a trial; the trials before it stay queued.
    """
    for number, values in enumerate(trials):
        changes = [part for key, value in values.items() for part in ("-S", f"{key}={json.dumps(value)}")]
        line = ["exp", "run", "--queue", "--name", f"sweep-{number}", *changes]
        print("dvc", " ".join(line))
        if not dry_run:
            run_dvc(*line)
