"""Runs of the pipeline on a cluster: `distilldsm pipeline submit`, `status`, `logs` and `stop`."""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.config import load_params
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import sha256_file
from distilldsm.core.interruption import explains_interrupt
from distilldsm.core.mapping import to_mapping
from distilldsm.core.provenance import SCHEDULE_VARIABLE
from distilldsm.core.version import __version__
from distilldsm.pipeline.cluster import STEPS, Cluster, load_cluster
from distilldsm.pipeline.definition import Images, arguments
from distilldsm.pipeline.server import Server

if TYPE_CHECKING:
    from distilldsm.pipeline.client import Status


def add_arguments(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-commands to those of `distilldsm pipeline`; `common` has the options of every compiled pipeline."""
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--host", help="address of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")
    server.add_argument("--namespace", help="the user's namespace, in a multi-user installation")
    server.add_argument("--ca-file", help="certificates of a private certificate authority")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print a JSON object")
    one_run = argparse.ArgumentParser(add_help=False)
    one_run.add_argument("run_id", metavar="RUN")

    submit = commands.add_parser(
        "submit", parents=[common, server, as_json], help="upload it, and start a run on the cluster"
    )
    submit.add_argument("--experiment", help="default: tracking.experiment")
    submit.add_argument("--name", help="name of the run")
    submit.add_argument("--service-account", help="service account of the pods")
    submit.add_argument("--no-cache", action="store_true", help="run every step, even if its result is in the cache")
    submit.add_argument("--cron", help="repeat the run: six fields, seconds first, e.g. '0 0 2 * * *'")
    submit.add_argument("--trainjob", metavar="FILE", help="train as TrainJobs, e.g. conf/trainjob.yaml")
    submit.add_argument("--mlflow-secret", default="mlflow", help="Kubernetes secret (default: %(default)s)")
    submit.add_argument("--s3-secret", default="s3", help="Kubernetes secret (default: %(default)s)")
    submit.add_argument("--wait", action="store_true", help="follow the run to its end")
    submit.set_defaults(run=submit_command)

    status = commands.add_parser("status", parents=[server, as_json, one_run], help="state of a run and its steps")
    status.add_argument("--wait", action="store_true", help="follow the run to its end")
    status.set_defaults(run=status_command)

    logs = commands.add_parser("logs", parents=[server, one_run], help="print the log of a step of a run")
    logs.add_argument("step", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    logs.add_argument("--fold", type=int, help="needed for a step that runs for several folds")
    logs.set_defaults(run=logs_command)

    stop = commands.add_parser("stop", parents=[server, one_run], help="stop a run")
    stop.set_defaults(run=stop_command)


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The cluster file, with the profiles that `--profile` assigns."""
    overrides = {}
    for assignment in args.profile:
        step, sign, profile = assignment.partition("=")
        if not sign or step not in (*STEPS, "default"):
            raise ConfigError("is not STEP=PROFILE", where="--profile", seen=assignment, rule=f"STEP is one of {STEPS}")
        overrides[step] = profile
    return load_cluster(args.cluster, overrides)


def images_of(args: argparse.Namespace) -> Images:
    """The images that `--image-ROLE` names, or the default ones."""
    named = {role: getattr(args, f"image_{role}") for role in ("data", "train", "export")}
    return Images(**{role: image for role, image in named.items() if image})


def submit_command(args: argparse.Namespace) -> None:
    """Upload the pipeline and start a run."""
    from distilldsm.pipeline.client import submit
    from distilldsm.pipeline.compilation import compile_pipeline

    params, cluster, images = load_params(args.params, args.set), cluster_of(args), images_of(args)
    if args.cron is not None and len(args.cron.split()) != 6:
        raise ConfigError("is not a schedule", where="--cron", seen=args.cron, rule="six fields, seconds first")
    schedule = uuid.uuid4().hex[:12] if args.cron is not None else None
    if schedule:
        cluster = _with_variable(cluster, SCHEDULE_VARIABLE, schedule)
    trainjob = _trainjob(args.trainjob, cluster) if args.trainjob else {}
    server = _server(args)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(package, params, cluster, images, caching=not args.no_cache)
        version = f"{__version__}-{sha256_file(package)[:12]}"
        started = submit(
            server,
            package,
            version_name=version,
            run_name=args.name or f"{params.train.model.name} {version}",
            experiment=args.experiment or params.tracking.experiment,
            arguments={
                **arguments(params),
                "trainjob": trainjob,
                "mlflow_secret": args.mlflow_secret,
                "s3_secret": args.s3_secret,
            },
            service_account=args.service_account,
            pipeline_root=cluster.storage.address("kfp"),
            mlflow_experiment=params.tracking.experiment if params.tracking.enabled else None,
            cron=args.cron,
        )
    condition = f"tags.kfp_schedule = '{schedule}'" if schedule else f"tags.kfp_run_id = '{started.run_id}'"
    mlflow_url = _mlflow_url(cluster, params.tracking.experiment, condition)
    if args.json and not args.wait:
        print(json.dumps({**to_mapping(started), "version": version, "mlflow_url": mlflow_url}, indent=2))
    elif not args.json:
        print(f"{'recurring run' if started.recurring else 'run'} {started.run_id}\nKubeflow  {started.run_url}")
        print(f"MLflow    {mlflow_url or 'not set up: storage.mlflow_tracking_uri in ' + args.cluster}")
        if started.plugin_url:
            print(f"          {started.plugin_url} (KFP's MLflow plugin)")
    if args.wait and not started.recurring:
        _follow(server, started.run_id, as_json=args.json)


def _trainjob(path: str, cluster: Cluster) -> dict[str, Any]:
    """The pipeline's input `trainjob`. The train step must mount the job's claim, because it starts the job."""
    from distilldsm.core.mapping import from_mapping, load_yaml
    from distilldsm.pipeline.trainjob_manifest import TrainJobConfig

    values = load_yaml(path)
    job = from_mapping(TrainJobConfig, values, where=path)
    if not any((v.claim, v.path) == (job.claim, job.path) for v in cluster.profile("train").volumes):
        raise ConfigError(
            "the train step does not mount the job's claim",
            where=path,
            seen=f"{job.claim} at {job.path}",
            rule="a volume of the train step's profile",
            hint="choose a profile with this volume, e.g. --profile train=launcher",
        )
    return values


def _with_variable(cluster: Cluster, name: str, value: str) -> Cluster:
    """The cluster file with an environment variable for every pod."""
    profiles = {key: replace(one, env={**one.env, name: value}) for key, one in cluster.profiles.items()}
    return replace(cluster, profiles=profiles)


def _mlflow_url(cluster: Cluster, experiment: str, condition: str) -> str | None:
    """The page on which MLflow will show this pipeline run: a search, because the MLflow runs do not exist yet."""
    import os
    from urllib.parse import quote

    uri = cluster.storage.mlflow_tracking_uri
    if not uri:
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        from mlflow import MlflowClient

        known = MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment)
    except Exception:  # the address is only a convenience; MLflow may not be reachable from here
        known = None
    page = f"experiments/{known.experiment_id}/runs" if known else "experiments"
    return f"{uri.rstrip('/')}/#/{page}?searchFilter={quote(condition)}"


def _server(args: argparse.Namespace) -> Server:
    server = Server.from_environment(args.host, args.namespace, args.ca_file)
    server.check()
    return server


def status_command(args: argparse.Namespace) -> None:
    """Show the state of a run."""
    from distilldsm.pipeline.client import status

    server = _server(args)
    if args.wait:
        _follow(server, args.run_id, as_json=args.json)
    else:
        _show(status(server, args.run_id), as_json=args.json)


def logs_command(args: argparse.Namespace) -> None:
    """Print the log of a step."""
    from distilldsm.pipeline.client import logs

    print(logs(_server(args), args.run_id, args.step, args.fold), end="")


def stop_command(args: argparse.Namespace) -> None:
    """Stop a run."""
    from distilldsm.pipeline.client import stop

    stop(_server(args), args.run_id)
    print(f"{args.run_id}: is being stopped; its step finish still runs (distilldsm pipeline status {args.run_id})")


def _follow(server: Server, run_id: str, *, as_json: bool) -> None:
    from distilldsm.pipeline.client import wait

    def say(line: str) -> None:
        if not as_json:
            print(line, flush=True)

    with explains_interrupt(lambda: f"run {run_id} goes on; to stop it: distilldsm pipeline stop {run_id}"):
        end = wait(server, run_id, say=say)
    _show(end, as_json=as_json)
    if not end.has_succeeded:
        failed = next((step for step in end.steps if step.state == "failed"), None)
        what = f"step {failed.name} failed" if failed else end.error or end.state
        raise UserError("the pipeline run did not succeed", where=end.url, seen=what)


def _show(found: Status, *, as_json: bool) -> None:
    from distilldsm.pipeline.delivery import advice
    from distilldsm.pipeline.run_tree import clock, lines_of

    if as_json:
        print(json.dumps(to_mapping(found), indent=2))
        return
    print(f"{found.name}: {found.state} {clock(found.seconds)}\n{found.url}")
    if found.plugin_url:
        print(f"{found.plugin_url} (KFP's MLflow plugin)")
    if found.error:
        print(f"  {found.error}")
    lines = [*lines_of(found.steps, f"distilldsm pipeline logs {found.run_id} STEP"), *advice(found.not_in_mlflow)]
    print("\n".join(lines))
