"""Runs the whole pipeline on this machine with kfp's local runner, in subprocesses or in containers."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from distilldsm.config import Params
from distilldsm.core.errors import UserError
from distilldsm.core.machine import thread_limit, usable_cores
from distilldsm.pipeline.cluster import Cluster
from distilldsm.pipeline.compilation import compile_pipeline
from distilldsm.pipeline.definition import SECTIONS, Images, arguments
from distilldsm.pipeline.step import check_parameters, whole_numbers

_FOLDS_AT_ONCE = 2
"""kfp's local runner runs no more folds at once."""


def run_local(
    params: Params,
    cluster: Cluster,
    images: Images,
    *,
    root: Path,
    runner: Literal["subprocess", "docker"] = "subprocess",
    values: Mapping[str, Any] | None = None,
    engine: str | None = None,
) -> str:
    """Compile the pipeline and run it here; return the run's id, which its MLflow runs have as tag `kfp_run_id`.

    Args:
        root: folder of all runs. The artifacts of this run go to `root/RUN_ID`.
        values: inputs of the pipeline that override `params`.
        engine: address of the container engine, e.g. `unix:///run/podman/podman.sock`; None: DOCKER_HOST.

    Raises:
        ConfigError: parameters are wrong.
        UserError: a step failed, or the container engine or an image is missing.
    """
    import kfp.local
    from kfp import components

    inputs = {**arguments(params), **(values or {})}
    check_parameters(inputs["folds"], {name: inputs[name] for name in SECTIONS})
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_id = f"local-{now}-{secrets.token_hex(3)}"
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    local = replace(cluster, retries_everywhere=False)
    source = Path(whole_numbers(inputs["download"]).get("source", ""))
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment(run_id),
        _runner(runner, images, root, engine, source) as chosen,
    ):
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(package, params, local, images)
        kfp.local.init(runner=chosen, pipeline_root=str(root / run_id), raise_on_error=True)
        pipeline = components.load_component_from_file(str(package))
        try:
            pipeline(**inputs)
        except RuntimeError as error:
            raise UserError(
                "the pipeline failed",
                where=root / run_id,
                seen=re.sub(r"\x1b\[[0-9;]*m", "", str(error)),  # without kfp's colours
                hint="see the message of the failed step above",
            ) from None
    return run_id


@contextmanager
def _environment(run_id: str) -> Iterator[None]:
    """Set the variables that steps inherit: the run's id, one MLflow store, and their share of the cores."""
    from distilldsm.tracking import default_uri

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads in (None, str(thread_limit())):
        threads = str(max(1, usable_cores() // _FOLDS_AT_ONCE))
    variables = {
        "KFP_RUN_ID": run_id,
        "MLFLOW_TRACKING_URI": default_uri(),
        "OMP_NUM_THREADS": threads,
    }
    _prepare_store(variables["MLFLOW_TRACKING_URI"])
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _prepare_store(uri: str) -> None:
    """Create a SQLite store before the folds start: if several create it at once, all fail."""
    if uri.startswith("sqlite:///"):
        from distilldsm.tracking.store import Store

        Store(uri)


@contextmanager
def _runner(kind: str, images: Images, root: Path, engine: str | None, source: Path) -> Iterator[Any]:
    import warnings

    import kfp.local

    if kind == "subprocess":
        with warnings.catch_warnings():
            # kfp warns about image names without "python".
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            yield kfp.local.SubprocessRunner(use_venv=False)
        return
    from distilldsm.pipeline.containers import ContainerSettings, container_runner

    # Mount a data set of this machine at its own path, read-only.
    settings = ContainerSettings(read_only_volumes=(source.absolute(),) if source.exists() else ())
    names = (images.data, images.train, images.export)
    with container_runner(images=names, root=root, engine=engine, settings=settings) as runner:
        yield runner
