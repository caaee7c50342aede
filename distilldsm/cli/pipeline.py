"""`distilldsm pipeline`: compile, run, submit, status, storage, serving, and trainings on several machines."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from distilldsm.config import load_params
from distilldsm.core.assignments import add_parameters
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import sha256_file
from distilldsm.core.mapping import to_mapping
from distilldsm.core.version import __version__
from distilldsm.pipeline import sweep, trainjob
from distilldsm.pipeline.cluster import STEPS, Cluster, load_cluster
from distilldsm.pipeline.definition import Images, arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    add_parameters(common)
    common.add_argument("--cluster", default="conf/cluster.yaml", help="resources (default: %(default)s)")
    common.add_argument("--profile", action="append", default=[], metavar="STEP=PROFILE", help="e.g. train=gpu-4")
    for role in ("data", "train", "export"):
        common.add_argument(f"--image-{role}", metavar="IMAGE", help=f"default: {getattr(Images(), role)}")

    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--host", help="address of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")
    server.add_argument("--namespace", help="the user's namespace, in a multi-user installation")
    server.add_argument("--ca-file", help="certificates of a private certificate authority")
    server.add_argument("--json", action="store_true", help="print a JSON object")

    compiled = commands.add_parser("compile", parents=[common], help="write the pipeline as YAML")
    compiled.add_argument("-o", "--output", required=True, metavar="FILE")
    compiled.set_defaults(run=compile_command)

    local = commands.add_parser("run", parents=[common], help="run the whole pipeline on this machine")
    local.add_argument("--local", action="store_true", help="(no effect: this command always runs locally)")
    local.add_argument("--runner", choices=("subprocess", "docker"), default="subprocess")
    local.add_argument("--engine", help="socket of Docker or Podman (default: DOCKER_HOST)")
    local.add_argument("--root", type=Path, default=Path("kfp-runs"), help="folder of the runs (default: %(default)s)")
    local.set_defaults(run=run_command)

    submit = commands.add_parser("submit", parents=[common, server], help="upload it, and start a run on the cluster")
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

    status = commands.add_parser("status", parents=[server], help="state of a run and its steps")
    status.add_argument("run_id")
    status.add_argument("--wait", action="store_true", help="follow the run to its end")
    status.set_defaults(run=status_command)

    storage = commands.add_parser("storage", parents=[common], help="show the bucket of KFP, DVC and MLflow")
    storage.add_argument("--apply", action="store_true", help="make the bucket DVC's default remote")
    storage.set_defaults(run=storage_command)

    serving = commands.add_parser("serving", help="write a KServe InferenceService for an exported model")
    serving.add_argument("model_dir", metavar="MODEL_DIR")
    serving.add_argument("--uri", required=True, help="address of the model, e.g. s3://bucket/1/models/m-1/artifacts")
    serving.add_argument("--format", choices=("mlflow", "openvino"), default="mlflow")
    serving.add_argument("--service-account", help="service account with the secret for the bucket")
    serving.add_argument("-o", "--output", required=True, metavar="FILE")
    serving.set_defaults(run=serving_command)

    for name, module in (("trainjob", trainjob), ("sweep", sweep)):
        inner = commands.add_parser(name, help=module.HELP)
        module.add_arguments(inner)
        inner.set_defaults(run=module.run)


def run(args: argparse.Namespace) -> None:
    """Run the sub-command."""
    args.run(args)


def _cluster(args: argparse.Namespace) -> Cluster:
    overrides = {}
    for assignment in args.profile:
        step, sign, profile = assignment.partition("=")
        if not sign or step not in (*STEPS, "default"):
            raise ConfigError("is not STEP=PROFILE", where="--profile", seen=assignment, rule=f"STEP is one of {STEPS}")
        overrides[step] = profile
    return load_cluster(args.cluster, overrides)


def _images(args: argparse.Namespace) -> Images:
    named = {role: getattr(args, f"image_{role}") for role in ("data", "train", "export")}
    return Images(**{role: image for role, image in named.items() if image})


def compile_command(args: argparse.Namespace) -> None:
    """Write the pipeline as YAML."""
    from distilldsm.pipeline.compilation import compile_pipeline

    images = _images(args)
    compile_pipeline(args.output, load_params(args.params, args.set), _cluster(args), images)
    print(f"{args.output}: distilldsm {__version__}")
    if not images.by_digest:
        print("note: images are named by tag; only with digests (NAME@sha256:...) does KFP's cache see a rebuilt image")


def run_command(args: argparse.Namespace) -> None:
    """Run the whole pipeline on this machine."""
    from distilldsm.pipeline.local import run_local

    params = load_params(args.params, args.set)
    run_id = run_local(params, _cluster(args), _images(args), root=args.root, runner=args.runner, engine=args.engine)
    print(f"{args.root / run_id}: done; distilldsm lineage {run_id} shows the MLflow runs")


def submit_command(args: argparse.Namespace) -> None:
    """Upload the pipeline and start a run."""
    from distilldsm.pipeline.client import Connection, connect, submit
    from distilldsm.pipeline.compilation import compile_pipeline

    params, cluster, images = load_params(args.params, args.set), _cluster(args), _images(args)
    if args.cron is not None and len(args.cron.split()) != 6:
        raise ConfigError("is not a schedule", where="--cron", seen=args.cron, rule="six fields, seconds first")
    trainjob = _trainjob(args.trainjob, cluster) if args.trainjob else {}
    connection = Connection.from_environment(args.host, args.namespace, args.ca_file)
    client = connect(connection)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(package, params, cluster, images)
        version = f"{__version__}-{sha256_file(package)[:12]}"
        started = submit(
            client,
            connection,
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
            enable_caching=not args.no_cache,
            service_account=args.service_account,
            pipeline_root=cluster.storage.address("kfp"),
            cron=args.cron,
        )
    mlflow_url = _mlflow_url(cluster, params.tracking.experiment, started.run_id)
    if args.json and not args.wait:
        print(json.dumps({**to_mapping(started), "version": version, "mlflow_url": mlflow_url}, indent=2))
    elif not args.json:
        print(f"{'recurring run' if started.recurring else 'run'} {started.run_id}\nKubeflow  {started.run_url}")
        print(f"MLflow    {mlflow_url or 'not set up: storage.mlflow_tracking_uri in ' + args.cluster}")
    if args.wait and not started.recurring:
        _follow(client, connection, started.run_id, as_json=args.json)


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


def _mlflow_url(cluster: Cluster, experiment: str, run_id: str) -> str | None:
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
    condition = quote(f"tags.kfp_run_id = '{run_id}'")
    page = f"experiments/{known.experiment_id}/runs" if known else "experiments"
    return f"{uri.rstrip('/')}/#/{page}?searchFilter={condition}"


def status_command(args: argparse.Namespace) -> None:
    """Show the state of a run."""
    from distilldsm.pipeline.client import Connection, connect, status

    connection = Connection.from_environment(args.host, args.namespace, args.ca_file)
    client = connect(connection)
    if args.wait:
        _follow(client, connection, args.run_id, as_json=args.json)
    else:
        _show(status(client, connection, args.run_id), as_json=args.json)


def _follow(client: Any, connection: Any, run_id: str, *, as_json: bool) -> None:
    from distilldsm.pipeline.client import wait

    def say(line: str) -> None:
        if not as_json:
            print(line, flush=True)

    end = wait(client, connection, run_id, say=say)
    _show(end, as_json=as_json)
    if end["state"] != "SUCCEEDED":
        raise UserError("the pipeline run did not succeed", where=end["url"], seen=end["error"] or end["state"])


def _show(state: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(state, indent=2))
        return
    print(f"{state['name']}: {state['state']}\n{state['url']}")
    for task in state["tasks"]:
        print(f"  {task['state'] or '-':12}{task['name']}" + (f"  {task['error']}" if task["error"] else ""))


def storage_command(args: argparse.Namespace) -> None:
    """Show the addresses in the bucket; with `--apply` set DVC's remote."""
    from distilldsm.pipeline.dvc_file import run_dvc

    storage = _cluster(args).storage
    if storage.bucket is None:
        raise ConfigError("'storage.bucket' is not set", where=args.cluster, rule="e.g. s3://team/distilldsm")
    for service in ("kfp", "dvc", "mlflow"):
        print(f"{service:8}{storage.address(service)}")  # type: ignore[arg-type]
    print("MLflow's server: mlflow server --artifacts-destination", storage.address("mlflow"))
    if args.apply:
        run_dvc("remote", "add", "--force", "--default", "storage", str(storage.address("dvc")))
        for key, value in (("endpointurl", storage.endpoint_url), ("region", storage.region)):
            if value:
                run_dvc("remote", "modify", "storage", key, value)
        print("DVC's default remote is now 'storage'; credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def serving_command(args: argparse.Namespace) -> None:
    """Write a KServe manifest for an exported model at an address."""
    from distilldsm.export.serving import inference_service, to_yaml
    from distilldsm.models.package import verify

    metadata = verify(args.model_dir)
    built = inference_service(
        metadata, storage_uri=args.uri, model_format=args.format, service_account=args.service_account
    )
    Path(args.output).write_text(to_yaml(built), encoding="utf-8")
    print(f"{args.output}: {built['metadata']['name']}; kubectl apply -f {args.output}")
