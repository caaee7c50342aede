"""The pipeline as YAML: deterministic, checked against KFP's own schema and for references that lead nowhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilldsm.config import Params
from distilldsm.core.errors import UserError
from distilldsm.pipeline.cluster import Cluster
from distilldsm.pipeline.definition import Images, build_pipeline


def compile_pipeline(
    path: str | os.PathLike[str], params: Params, cluster: Cluster, images: Images, *, root: str | None = None
) -> None:
    """Write the pipeline as YAML: the pipeline and, as a second document, what is Kubernetes'.

    Args:
        root: where KFP keeps artifacts; None: what the cluster is configured with.

    Raises:
        UserError: the file cannot be written.
    """
    from kfp import compiler

    target = Path(path)
    if not target.parent.is_dir():
        raise UserError("the directory does not exist", where=target.parent, hint="make it first")
    pipeline = build_pipeline(params, cluster, images)
    root = root or cluster.storage.address("kfp")
    if root:
        pipeline.pipeline_spec.default_pipeline_root = root
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(written))
        documents = check_pipeline(written)
        _write(documents, written)
        os.replace(written, target)


def _write(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """In one order: kfp's own file begins with a comment whose mappings are in another order each time."""
    import yaml

    text = yaml.safe_dump_all(documents, sort_keys=True, width=120, allow_unicode=True)
    path.write_text(f"# Written by: distilldsm pipeline compile. Inputs mirror params.yaml.\n{text}", encoding="utf-8")
    path.chmod(0o644)


def check_pipeline(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The documents of a compiled file (the pipeline, then Kubernetes' part), checked as strictly as the cluster does.

    Raises:
        UserError: unknown fields, wrong types, or a reference to a component or executor that does not exist.
    """
    import yaml
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes
    from kfp.pipeline_spec import pipeline_spec_pb2 as schema

    try:
        documents = list(yaml.safe_load_all(Path(path).read_text(encoding="utf-8")))
        spec = documents[0]
        json_format.ParseDict(spec, schema.PipelineSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, schema.PlatformSpec())
            for settings in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
                json_format.ParseDict(settings, kubernetes.KubernetesExecutorConfig())
    except (OSError, yaml.YAMLError, json_format.ParseError, KeyError, TypeError, IndexError) as error:
        raise UserError("is no compiled pipeline", where=path, seen=" ".join(str(error).split())[:400]) from None
    _check_references(spec, path)
    return documents


def _check_references(spec: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """KFP's schema accepts the name of a component that is not there."""
    components, executors = spec.get("components", {}), spec.get("deploymentSpec", {}).get("executors", {})
    graphs = {"root": spec["root"], **components}
    for name, component in graphs.items():
        if "executorLabel" in component and component["executorLabel"] not in executors:
            raise UserError(f"'{name}' has no executor", where=path, seen=component["executorLabel"])
        tasks = component.get("dag", {}).get("tasks", {})
        for task_name, task in tasks.items():
            if task["componentRef"]["name"] not in components:
                raise UserError(f"task '{task_name}' has no component", where=path, seen=task["componentRef"]["name"])
            for needed in task.get("dependentTasks", []):
                if needed not in tasks:
                    raise UserError(f"task '{task_name}' waits for no task", where=path, seen=needed)
