"""Compiles the pipeline to reproducible YAML, and checks KFP's schema and all references between its parts."""

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
    path: str | os.PathLike[str],
    params: Params,
    cluster: Cluster,
    images: Images,
    *,
    caching: bool = True,
) -> None:
    """Write the pipeline as YAML, with the Kubernetes settings as a second document.

    Args:
        caching: whether a step's result may come from KFP's cache. (KFP's option for a run does not reach the steps.)

    Raises:
        UserError: the file cannot be written.
    """
    from kfp import compiler

    target = Path(path)
    if not target.parent.is_dir():
        raise UserError("the directory does not exist", where=target.parent, hint="create it first")
    pipeline = build_pipeline(params, cluster, images, caching=caching)
    root = cluster.storage.address("kfp")
    if root:  # otherwise KFP's own setting counts
        pipeline.pipeline_spec.default_pipeline_root = root
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(written))
        documents = check_pipeline(written)
        _write(documents, written)
        os.replace(written, target)


def _write(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write sorted keys: the comment in kfp's own file lists its mappings in a different order each time."""
    import yaml

    text = yaml.safe_dump_all(documents, sort_keys=True, width=120, allow_unicode=True)
    path.write_text(f"# Written by: distilldsm pipeline compile. Inputs mirror params.yaml.\n{text}", encoding="utf-8")
    path.chmod(0o644)


def check_pipeline(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The documents of a compiled file (pipeline, Kubernetes settings), checked as strictly as by the cluster.

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
        raise UserError("is not a compiled pipeline", where=path, seen=" ".join(str(error).split())[:400]) from None
    _check_references(spec, path)
    return documents


def _check_references(spec: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that all referenced components, executors and tasks exist. KFP's schema does not check this."""
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
                    raise UserError(f"task '{task_name}' waits for a task that does not exist", where=path, seen=needed)
