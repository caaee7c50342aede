"""Runs the train stage with one process per GPU: in this pod with torchrun, or as a Kubeflow Trainer TrainJob.

Both start `distilldsm.components.train`. The pods of a TrainJob and the pod that starts it share a claim. Data and
parameters are copied to the claim, and the model is copied back from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilldsm.config import TrackingConfig, TrainConfig, load_params
from distilldsm.core.assignments import add_parameters
from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json, replace_directory, sha256_file, sha256_json
from distilldsm.core.hashes import MANIFEST
from distilldsm.core.mapping import from_mapping, load_yaml, to_mapping
from distilldsm.core.shell import end_processes, handled, interrupt
from distilldsm.pipeline.trainjob_follow import TrainJobs, follow
from distilldsm.pipeline.trainjob_manifest import TrainJobConfig, manifest, passed_on

COLLECT_POLLS = 12
"""Attempts to find the model: a network file system may show it some seconds late."""

STOP_S = 30.0
"""Seconds that the processes of a training have to end."""

HELP = "train one fold as a Kubeflow TrainJob"


def run_train(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
    job: TrainJobConfig | None = None,
    processes: int = 0,
    api: TrainJobs | None = None,
) -> None:
    """Run the train stage; `inputs` and `outputs` as in distilldsm/components/train.py.

    Args:
        job: settings of the TrainJob; None: train in this pod.
        processes: number of processes in this pod; 0: one per visible GPU, or one without a GPU.
        api: replaces the cluster in tests.

    Raises:
        UserError: the training failed, exceeded its time limit, or left no model.
    """
    settings = {"train": to_mapping(config), "tracking": to_mapping(tracking or TrackingConfig(enabled=False))}
    if job is not None:
        _run_job(settings, inputs["preprocessed"], outputs["model"], fold, job, api or TrainJobs(job.namespace))
        return
    count = processes or _visible_gpus(config.device)
    if count == 1:
        from distilldsm.components.train import run

        run(config, inputs, outputs, fold=fold, tracking=tracking)
        return
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        params.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        arguments = _arguments(params, fold, inputs["preprocessed"], outputs["model"])
        code = _launch([*launcher, "-m", "distilldsm.components.train", *arguments])
    if code:
        raise UserError(f"the training on {count} processes failed", seen=f"exit code {code}; its message is above")


def _launch(command: Sequence[str]) -> int:
    """Run a command and return its exit code. SIGTERM ends the command too."""
    with handled({signal.SIGTERM: interrupt}):
        process = subprocess.Popen(command)
        try:
            return process.wait()
        except BaseException:
            end_processes([process], grace_s=STOP_S)  # torchrun passes the signal on to its workers
            raise


def _arguments(params: Path, fold: int, preprocessed: Path, model: Path) -> list[str]:
    return ["--params", f"{params}", "--fold", f"{fold}", "--preprocessed", f"{preprocessed}", "--output", f"{model}"]


def _visible_gpus(device: str) -> int:
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _run_job(
    settings: Mapping[str, Any], preprocessed: Path, model: Path, fold: int, job: TrainJobConfig, api: TrainJobs
) -> None:
    shared = Path(job.path)
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        raise UserError(
            "the claim is not mounted here or is not writable",
            where=shared,
            hint=f"give the train step a profile with the volume {job.claim} at {job.path}",
        )
    # The name identifies the training. Started again, the same training continues in its folder.
    name = f"distilldsm-fold{fold}-{sha256_json([settings, read_json(preprocessed / MANIFEST)['files'], fold])[:10]}"
    folder = shared / name
    data, params, result = folder / "preprocessed", folder / "params.yaml", folder / "model"
    folder.mkdir(exist_ok=True)
    if not (result / MANIFEST).is_file():  # it exists if an earlier start ended before it collected the model
        if not data.is_dir():
            _copy(preprocessed, data)
        params.write_text(json.dumps(settings), encoding="utf-8")
        follow(job, name, manifest(job, name, _arguments(params, fold, data, result), passed_on()), api)
    for _ in range(COLLECT_POLLS):
        if (result / MANIFEST).is_file():
            break
        time.sleep(job.poll_s)
    _require_complete(result)
    _copy(result, model)
    _require_complete(model)
    shutil.rmtree(folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a directory. `target` is never half written: it stays as it was until the copy is complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial)
    replace_directory(partial, target)


def _require_complete(model: Path) -> None:
    """Raise UserError if a file in the model's manifest is missing or has another SHA-256."""
    if not (model / MANIFEST).is_file():
        raise UserError("the TrainJob is complete but left no model", where=model, hint="see its log above")
    for name, expected in read_json(model / MANIFEST)["files"].items():
        path = model / name
        if not path.is_file() or sha256_file(path) != expected:
            raise UserError(
                "the model is incomplete",
                where=path,
                seen="another SHA-256" if path.is_file() else "no such file",
                rule=f"SHA-256 {expected}",
                hint=f"remove {model} and train again; is the volume full?",
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_parameters(parser)
    parser.add_argument("--job", default="conf/trainjob.yaml", help="nodes, GPUs, claim (default: %(default)s)")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--preprocessed", type=Path, default=Path("data/preprocessed"))
    parser.add_argument("--output", type=Path, default=None, help="default: models/fold<FOLD>")
    parser.add_argument("--manifest-only", action="store_true", help="only write the manifest")
    parser.add_argument("-o", "--manifest", type=Path, default=Path("trainjob.yaml"), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Train one fold as a TrainJob, or write its manifest."""
    import yaml

    params = load_params(args.params, args.set)
    job = from_mapping(TrainJobConfig, load_yaml(args.job), where=args.job)
    if args.manifest_only:
        folder = Path(job.path) / "distilldsm"
        arguments = _arguments(folder / "params.yaml", args.fold, folder / "preprocessed", folder / "model")
        args.manifest.write_text(yaml.safe_dump(manifest(job, "distilldsm", arguments, passed_on())), encoding="utf-8")
        print(f"{args.manifest}: {job.nodes} x {job.processes} processes")
        return
    outputs = {"model": args.output or Path(f"models/fold{args.fold}")}
    inputs = {"preprocessed": args.preprocessed}
    run_train(params.train, inputs, outputs, fold=args.fold, tracking=params.tracking, job=job)
