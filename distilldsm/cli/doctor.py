"""`distilldsm doctor`: check whether this machine is ready and the services answer. It changes nothing."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import load_yaml
from distilldsm.core.text import unescaped
from distilldsm.doctor import machine, report, services, settings
from distilldsm.doctor.checks import LIMIT_S, Check, Finding, clean, in_child, run_checks


def check_git(limit_s: float) -> list[Finding]:
    """Check git and the repository; its commit is recorded with each run."""
    name = "git"
    if shutil.which("git") is None:
        return [Finding(name=name, status="warn", seen="not installed: runs carry no commit", hint="install git")]
    command = ["git", "rev-parse", "--show-toplevel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode:
        hint = "run the command in the repository; DVC needs one"
        return [Finding(name=name, status="warn", seen=clean(done.stderr) or "no repository", hint=hint)]
    return [Finding(name=name, status="ok", seen=done.stdout.strip())]


def _damaged_lock() -> list[Finding]:
    """A finding if dvc.lock cannot be read: DVC does not wait until the disk holds it."""
    if not Path("dvc.lock").exists():
        return []
    problem = ""
    try:
        lock = load_yaml("dvc.lock")
        stages = lock.get("stages")
        entries = stages.values() if isinstance(stages, dict) else [None]
        if "schema" not in lock or not all(isinstance(one, dict) and "cmd" in one for one in entries):
            problem = "it ends early"
    except ConfigError as error:
        problem = error.problem
    if not problem:
        return []
    tracked = ["git", "ls-files", "--error-unmatch", "dvc.lock"]
    is_tracked = shutil.which("git") and not subprocess.run(tracked, capture_output=True, check=False).returncode
    hint = f"{'git checkout' if is_tracked else 'rm'} dvc.lock, then dvc repro: what is up to date does not run again"
    return [Finding(name="dvc.lock", status="fail", seen=f"dvc.lock: {problem}", hint=hint)]


def check_dvc(limit_s: float) -> list[Finding]:
    """Check dvc.yaml and DVC's repository, then its remote."""
    name = "dvc"
    if not services.is_installed("dvc"):
        return [Finding(name=name, status="skip", seen="not installed (the optional group 'pipeline')")]
    if not Path("dvc.yaml").is_file():
        hint = "run the command in the folder that holds dvc.yaml"
        return [Finding(name=name, status="warn", seen=f"{Path.cwd()}: no dvc.yaml", hint=hint)]
    stages = load_yaml("dvc.yaml").get("stages") or {}
    found = [Finding(name=name, status="ok", seen=f"dvc.yaml: {', '.join(stages)}")]
    if not Path(".dvc").is_dir():
        hint = "clone the repository, or dvc init"
        return [Finding(name=name, status="fail", seen="dvc.yaml is there, but the folder .dvc is missing", hint=hint)]
    found += _damaged_lock()
    return found + in_child("dvc remote", "distilldsm.doctor.dvc_probe:check", limit_s)


def check_kubeflow(limit_s: float) -> list[Finding]:
    """Check whether Kubeflow Pipelines answers at KF_PIPELINES_ENDPOINT."""
    from distilldsm.pipeline.server import SERVICE_ACCOUNT_TOKEN, Server

    name = "kubeflow"
    if not os.environ.get("KF_PIPELINES_ENDPOINT") and not SERVICE_ACCOUNT_TOKEN.is_file():
        return [Finding(name=name, status="skip", seen="not configured (KF_PIPELINES_ENDPOINT)")]
    server = Server.from_environment()
    server.check(limit_s * 0.8)
    return [Finding(name=name, status="ok", seen=f"{server.host}: healthy, requested with {server.credentials}")]


def check_cluster(limit_s: float) -> list[Finding]:
    """Check what the cluster must have for conf/cluster.yaml, where Kubernetes can be asked."""
    from distilldsm.pipeline.cluster import load_cluster
    from distilldsm.pipeline.cluster_setup import has_configuration, missing_in_cluster

    name, file = "cluster", Path("conf/cluster.yaml")
    if not (file.is_file() and has_configuration() and services.is_installed("kubernetes")):
        return [Finding(name=name, status="skip", seen=f"no kubeconfig, no package kubernetes, or no {file}")]
    namespace = os.environ.get("KF_PIPELINES_NAMESPACE") or "kubeflow"
    missing = missing_in_cluster(load_cluster(file), namespace)
    found = [Finding(name=name, status="warn", seen=seen, hint=hint) for seen, hint in missing]
    return found or [Finding(name=name, status="ok", seen=f"has what {file} needs, in namespace {namespace}")]


CHECKS = (
    Check(name="python", about="Python's version", run=machine.check_python),
    Check(name="packages", about="installed packages of each optional group", run=machine.check_packages, loads=True),
    Check(name="cpu", about="cores and vector extensions", run=machine.check_cpu),
    Check(name="openvino", about="the engine that predicts", run=machine.check_openvino, loads=True),
    Check(name="gpu", about="whether PyTorch computes on it", run=machine.check_gpu, loads=True),
    Check(name="memory", about="memory, and the largest scan that fits", run=machine.check_memory, loads=True),
    Check(name="disk", about="space and write permission", run=machine.check_disk),
    Check(name="params", about="params.yaml", run=settings.check_params, loads=True),
    Check(name="environment", about="DISTILLDSM_ variables", run=settings.check_environment),
    Check(name="git", about="the repository", run=check_git),
    Check(name="dvc", about="dvc.yaml and the remote", run=check_dvc, loads=True),
    Check(name="mlflow", about="the store of the runs", run=services.check_mlflow, loads=True),
    Check(name="outputs", about="outputs that MLflow does not hold", run=services.check_outputs, loads=True),
    Check(name="kubeflow", about="Kubeflow Pipelines", run=check_kubeflow),
    Check(name="cluster", about="what conf/cluster.yaml needs of Kubernetes", run=check_cluster),
)


EPILOG = "exit codes: 0 no check failed, 1 a check failed, 2 usage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "checks", metavar="CHECK", nargs="*", help=f"default: all of {', '.join(check.name for check in CHECKS)}"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--timeout", type=float, default=LIMIT_S, metavar="SECONDS", help="for each check (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print their findings; returns 1 if a check failed, else 0."""
    known = {check.name: check for check in CHECKS}
    for name in args.checks:
        if name not in known:
            raise ConfigError("unknown check", where="doctor", seen=name, rule=", ".join(known))
    if not args.timeout > 0:
        raise ConfigError("has an impossible value", where="--timeout", seen=args.timeout, rule="above 0, seconds")
    began = time.monotonic()
    findings = run_checks([known[name] for name in dict.fromkeys(args.checks or known)], args.timeout)
    seconds = time.monotonic() - began
    if args.json:
        print(report.to_json(findings, seconds))
    else:
        print(report.render(findings, seconds, colour=report.wants_colour(sys.stdout)), file=unescaped(sys.stdout))
    return int(report.has_failed(findings))
