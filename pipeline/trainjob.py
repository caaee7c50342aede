"""The train stage on as many processes as there are GPUs: in this pod by torchrun, or as a Kubeflow Trainer TrainJob.

Both start the same entry point, `components.train`. A TrainJob's pods and the one that starts it share a claim: data
and parameters are put there, the model is collected from there.
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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from distilldsm.config import TrackingConfig, TrainConfig, load_params
from distilldsm.errors import UserError
from distilldsm.params import from_mapping, load_yaml, to_mapping
from distilldsm.shell import run_shell
from distilldsm.stage import MANIFEST, read_json, sha256_json
from pipeline.trainjob_manifest import TrainJobConfig, manifest

PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "KFP_RUN_ID")
ENDED = ("Complete", "Failed")
LOG_LINES = 20
"""Last lines of the log that an error shows."""


class JobApi(Protocol):
    """What is asked of Kubeflow Trainer."""

    def create(self, manifest: Mapping[str, Any]) -> None: ...

    def state(self, name: str) -> str: ...

    def logs(self, name: str) -> Iterator[str]: ...

    def delete(self, name: str) -> None: ...


class SdkJobApi:
    """Kubeflow Trainer through its SDK."""

    def __init__(self, namespace: str | None = None) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        try:
            self._client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=namespace))
        except Exception as error:  # the SDK raises what its Kubernetes client does, of many kinds
            raise UserError(
                "the cluster does not answer",
                seen=str(error)[:300],
                mend="is there a kubeconfig, or does this run in a pod with a service account?",
            ) from None

    def create(self, manifest: Mapping[str, Any]) -> None:
        # The SDK's own `train` builds a manifest without volumes; its Kubernetes client takes ours.
        backend: Any = self._client.backend
        group, version = str(manifest["apiVersion"]).split("/")
        backend.custom_api.create_namespaced_custom_object(
            group, version, backend.namespace, "trainjobs", dict(manifest)
        )

    def state(self, name: str) -> str:
        return str(self._client.get_job(name).status)

    def logs(self, name: str) -> Iterator[str]:
        yield from self._client.get_job_logs(name, follow=True)

    def delete(self, name: str) -> None:
        self._client.delete_job(name)


def run_train(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
    job: TrainJobConfig | None = None,
    processes: int = 0,
    api: JobApi | None = None,
) -> None:
    """Run the train stage: `inputs` and `outputs` as in components/train.py.

    Args:
        job: as a TrainJob of the cluster; None: in this pod.
        processes: in this pod, how many; 0: one per visible GPU, one without a GPU.
        api: stands for the cluster in tests.

    Raises:
        UserError: the training failed, was too slow, or left no model.
    """
    settings = {"train": to_mapping(config), "tracking": to_mapping(tracking or TrackingConfig(enabled=False))}
    if job is not None:
        _run_job(settings, inputs["preprocessed"], outputs["model"], fold, job, api or SdkJobApi(job.namespace))
        return
    count = processes or _visible_gpus(config.device)
    if count == 1:
        from components.train import run

        run(config, inputs, outputs, fold=fold, tracking=tracking)
        return
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        params.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        arguments = _arguments(params, fold, inputs["preprocessed"], outputs["model"])
        code = subprocess.run([*launcher, "-m", "components.train", *arguments]).returncode
    if code:
        raise UserError(f"the training on {count} processes failed", seen=f"exit code {code}; its message is above")


def _arguments(params: Path, fold: int, preprocessed: Path, model: Path) -> list[str]:
    return ["--params", f"{params}", "--fold", f"{fold}", "--preprocessed", f"{preprocessed}", "--output", f"{model}"]


def _visible_gpus(device: str) -> int:
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _run_job(
    settings: Mapping[str, Any], preprocessed: Path, model: Path, fold: int, job: TrainJobConfig, api: JobApi
) -> None:
    shared = Path(job.path)
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        raise UserError(
            "the claim is not mounted here, or cannot be written",
            where=shared,
            mend=f"give the train step a profile with the volume {job.claim} at {job.path}",
        )
    # The name is that of the work: the same training, started again, goes on in the folder where it stopped.
    name = f"distilldsm-fold{fold}-{sha256_json([settings, read_json(preprocessed / MANIFEST)['files'], fold])[:10]}"
    folder = shared / name
    data, params, result = folder / "preprocessed", folder / "params.yaml", folder / "model"
    folder.mkdir(exist_ok=True)
    if not (data / MANIFEST).is_file():
        shutil.copytree(preprocessed, data, dirs_exist_ok=True)
    params.write_text(json.dumps(settings), encoding="utf-8")
    env = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    env |= {"DISTILLDSM_TRACKING_DIR": f"{folder}/tracking"}
    follow(job, name, manifest(job, name, _arguments(params, fold, data, result), env), api)
    if not (result / MANIFEST).is_file():
        raise UserError("the TrainJob is complete but left no model", where=result, mend="look at its log above")
    shutil.copytree(result, model, dirs_exist_ok=True)
    shutil.rmtree(folder)


def follow(
    job: TrainJobConfig, name: str, built: Mapping[str, Any], api: JobApi, *, say: Callable[[str], None] = print
) -> None:
    """Create a TrainJob, print its log and states, and wait for its end; it is deleted however this ends.

    Raises:
        UserError: it cannot be created, failed, or took longer than `timeout_s`; with the log's last lines.
        KeyboardInterrupt: cancelled (Ctrl-C, or SIGTERM as of a pod that is deleted).
    """
    tail: deque[str] = deque(maxlen=LOG_LINES)
    keep = False
    with _terminable():
        try:
            api.create(built)
        except Exception as error:  # of Kubernetes' client, of many kinds
            raise UserError("the TrainJob cannot be created", where=name, seen=str(error)[:400]) from None
        try:
            state, reader, begun = "", None, time.monotonic()
            while state not in ENDED:
                new = _state(api, name, state)
                if new != state:
                    say(f"{name}: {new}")
                    state = new
                if state == "Running" and reader is None:
                    reader = threading.Thread(target=_read, args=(api, name, tail, say), daemon=True)
                    reader.start()
                if state not in ENDED:
                    if time.monotonic() - begun > job.timeout_s:
                        raise _failure("the TrainJob took too long", name, f"{job.timeout_s:g} s", tail)
                    time.sleep(job.poll_s)
            if reader is None:
                _read(api, name, tail, say)
            else:
                reader.join(timeout=30)
            if state == "Failed":
                keep = job.keep == "failed"
                raise _failure("the TrainJob failed", name, state, tail)
        finally:
            if not keep:
                _delete(api, name, say)


def _state(api: JobApi, name: str, last: str) -> str:
    try:
        return api.state(name)
    except Exception:  # the API server may be away for a moment; the time limit ends it if it stays so
        return last


def _read(api: JobApi, name: str, tail: deque[str], say: Callable[[str], None]) -> None:
    try:
        for line in api.logs(name):
            tail.append(line.rstrip("\n"))
            say(tail[-1])
    except Exception as error:  # the log is a help; the job's state decides
        say(f"{name}: the log broke off: {error}")


def _delete(api: JobApi, name: str, say: Callable[[str], None]) -> None:
    try:
        api.delete(name)
    except Exception as error:
        say(f"{name}: could not be deleted ({error}); kubectl delete trainjob {name}")


def _failure(problem: str, name: str, seen: str, tail: Sequence[str]) -> UserError:
    return UserError(problem, where=name, seen="\n    ".join([seen, *tail]))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C, so that what was started is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """`distilldsm pipeline trainjob`: one fold as a TrainJob, or its manifest."""
    parser = argparse.ArgumentParser(prog="distilldsm pipeline trainjob", description=main.__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
    parser.add_argument("--job", default="conf/trainjob.yaml", help="nodes, GPUs, claim (default: %(default)s)")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--preprocessed", type=Path, default=Path("data/preprocessed"))
    parser.add_argument("--output", type=Path, default=None, help="default: models/fold<FOLD>")
    parser.add_argument("--manifest-only", action="store_true", help="write the manifest, start nothing")
    parser.add_argument("-o", "--manifest", type=Path, default=Path("trainjob.yaml"), help="(default: %(default)s)")
    args = parser.parse_args(argv)

    def command() -> None:
        import yaml

        params = load_params(args.params, args.set)
        job = from_mapping(TrainJobConfig, load_yaml(args.job), where=args.job)
        if args.manifest_only:
            folder = Path(job.path) / "distilldsm"
            arguments = _arguments(folder / "params.yaml", args.fold, folder / "preprocessed", folder / "model")
            args.manifest.write_text(yaml.safe_dump(manifest(job, "distilldsm", arguments, {})), encoding="utf-8")
            print(f"{args.manifest}: {job.nodes} x {job.processes} processes")
            return
        outputs = {"model": args.output or Path(f"models/fold{args.fold}")}
        inputs = {"preprocessed": args.preprocessed}
        run_train(params.train, inputs, outputs, fold=args.fold, tracking=params.tracking, job=job)

    return run_shell(command)


if __name__ == "__main__":
    raise SystemExit(main())
