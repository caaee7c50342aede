"""`distilldsm pipeline`: compile, run, storage, serving, trainings on several machines; runs on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from distilldsm.cli import pipeline_runs
from distilldsm.cli.pipeline_runs import cluster_of, images_of
from distilldsm.config import load_params
from distilldsm.core.assignments import add_parameters
from distilldsm.core.errors import ConfigError
from distilldsm.core.version import __version__
from distilldsm.pipeline import sweep, trainjob
from distilldsm.pipeline.definition import Images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    add_parameters(common)
    common.add_argument("--cluster", default="conf/cluster.yaml", help="resources (default: %(default)s)")
    common.add_argument("--profile", action="append", default=[], metavar="STEP=PROFILE", help="e.g. train=gpu-4")
    for role in ("data", "train", "export"):
        common.add_argument(f"--image-{role}", metavar="IMAGE", help=f"default: {getattr(Images(), role)}")

    compiled = commands.add_parser("compile", parents=[common], help="write the pipeline as YAML")
    compiled.add_argument("-o", "--output", required=True, metavar="FILE")
    compiled.set_defaults(run=compile_command)

    local = commands.add_parser("run", parents=[common], help="run the whole pipeline on this machine")
    local.add_argument("--local", action="store_true", help="(no effect: this command always runs locally)")
    local.add_argument("--runner", choices=("subprocess", "docker"), default="subprocess")
    local.add_argument("--engine", help="socket of Docker or Podman (default: DOCKER_HOST)")
    local.add_argument("--root", type=Path, default=Path("kfp-runs"), help="folder of the runs (default: %(default)s)")
    local.set_defaults(run=run_command)

    pipeline_runs.add_arguments(commands, common)

    storage = commands.add_parser("storage", parents=[common], help="show the bucket of KFP, DVC and MLflow")
    storage.add_argument("--apply", action="store_true", help="make the bucket DVC's default remote")
    storage.add_argument("--namespace", help="with --apply: also configure KFP there, with your kubeconfig")
    storage.add_argument("--s3-secret", default="s3", help="Kubernetes secret with the keys (default: %(default)s)")
    storage.set_defaults(run=storage_command)

    images = commands.add_parser("images", parents=[common], help="list the images of the pods")
    images.set_defaults(run=images_command)

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


def compile_command(args: argparse.Namespace) -> None:
    """Write the pipeline as YAML."""
    from distilldsm.pipeline.compilation import compile_pipeline

    images = images_of(args)
    compile_pipeline(args.output, load_params(args.params, args.set), cluster_of(args), images)
    print(f"{args.output}: distilldsm {__version__}")
    if not images.by_digest:
        print("note: images are named by tag; only with digests (NAME@sha256:...) does KFP's cache see a rebuilt image")


def run_command(args: argparse.Namespace) -> None:
    """Run the whole pipeline on this machine."""
    from distilldsm.pipeline.local import run_local

    params = load_params(args.params, args.set)
    run_id = run_local(
        params, cluster_of(args), images_of(args), root=args.root, runner=args.runner, engine=args.engine
    )
    print(f"{args.root / run_id}: done; distilldsm lineage {run_id} shows the MLflow runs")


def storage_command(args: argparse.Namespace) -> None:
    """Show the addresses in the bucket and KFP's settings for it; `--apply` sets DVC's remote and these settings."""
    import yaml

    from distilldsm.pipeline.cluster_setup import apply_launcher_config, launcher_config
    from distilldsm.pipeline.dvc_file import run_dvc

    cluster = cluster_of(args)
    storage = cluster.storage
    if storage.bucket is None:
        raise ConfigError("'storage.bucket' is not set", where=args.cluster, rule="e.g. s3://team/distilldsm")
    for service in ("kfp", "dvc", "mlflow"):
        print(f"{service:8}{storage.address(service)}")  # type: ignore[arg-type]
    print("MLflow's server: mlflow server --artifacts-destination", storage.address("mlflow"))
    manifest = launcher_config(cluster, args.s3_secret)
    if manifest is not None:
        print("KFP's pods need, in their namespace (kubectl apply -f, or --apply --namespace NAMESPACE):\n---")
        print(yaml.safe_dump(manifest, sort_keys=False, width=1000), end="")
    if args.apply:
        run_dvc("remote", "add", "--force", "--default", "storage", str(storage.address("dvc")))
        for key, value in (("endpointurl", storage.endpoint_url), ("region", storage.region)):
            if value:
                run_dvc("remote", "modify", "storage", key, value)
        print("DVC's default remote is now 'storage'; credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if args.namespace and manifest is not None:
            done = apply_launcher_config(manifest, args.namespace)
            print(f"ConfigMap {manifest['metadata']['name']} in namespace {args.namespace}: {done}")


def images_command(args: argparse.Namespace) -> None:
    """Print the images of the pods, one a line: what a registry without internet must hold."""
    images = images_of(args)
    for image in dict.fromkeys((images.data, images.train, images.export)):
        print(image)


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
