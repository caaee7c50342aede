"""The Kubeflow pipeline: the stages of dvc.yaml as components, one training per fold, a gate before the export.

kfp reads annotations as objects: no `from __future__ import annotations` here.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, List  # noqa: UP035

from distilldsm.config import Params
from distilldsm.core.errors import ConfigError
from distilldsm.core.files import sha256_json
from distilldsm.core.version import __version__
from distilldsm.pipeline.cluster import Cluster, apply
from distilldsm.pipeline.stages import VERSION_VARIABLE, check_parameters, sections_of

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

NAME = "distilldsm"
DESCRIPTION = "Labelled volumes to a trained, evaluated and exported Distill DSM network. Parameters: params.yaml."
SECTIONS = ("download", "validate", "preprocess", "train", "evaluate", "export", "tracking")


@dataclass(frozen=True, kw_only=True)
class Images:
    """The container images by role."""

    data: str = f"distilldsm/data:{__version__}"
    train: str = f"distilldsm/train:{__version__}"
    export: str = f"distilldsm/export:{__version__}"

    def __post_init__(self) -> None:
        for role in ("data", "train", "export"):
            image = getattr(self, role)
            if not re.fullmatch(r"[a-z0-9][\w.\-/:]*(@sha256:[0-9a-f]{64})?", image):
                raise ConfigError(
                    f"image '{role}' has no valid name", seen=repr(image), rule="NAME:TAG or NAME@sha256:..."
                )
            if ":" not in image.rsplit("/", 1)[-1]:
                raise ConfigError(f"image '{role}' has no tag", seen=image, rule="NAME:TAG or NAME@sha256:...")

    @property
    def by_digest(self) -> bool:
        """Whether each image is named by its content, so that KFP's cache is one of content."""
        return all("@sha256:" in image for image in (self.data, self.train, self.export))


def data_version(params: Params) -> str:
    """What the data is, as far as it is known before it is read: another value makes KFP fetch it anew."""
    download = params.download
    if download.source == "sample":
        return f"sample-{sha256_json(download.sample)[:12]}"
    return f"sha256-{download.sha256.lower()}" if download.sha256 else ""


def arguments(params: Params) -> dict[str, Any]:
    """The pipeline's inputs for `params.yaml`: `folds`, a mapping a section, the data's version.

    KFP's parameters know no null: such keys are left out, and the dataclasses' defaults stand for them.
    """
    values = _without_null(sections_of(params))
    if check_parameters(values["folds"], {name: values[name] for name in SECTIONS}) != params:
        raise ConfigError("a null in the parameters is not the default there, and KFP cannot carry it")
    return {**values, "data_version": data_version(params)}


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def build_pipeline(params: Params, cluster: Cluster, images: Images) -> "GraphComponent":
    """The pipeline, with the defaults of `params`."""
    from kfp import dsl

    from distilldsm.pipeline import steps

    defaults = arguments(params)
    of = _components(steps, images)

    @dsl.pipeline(name=NAME, display_name="Distill DSM", description=DESCRIPTION)
    def distilldsm(
        folds: List[int] = defaults["folds"],  # noqa: UP006
        download: dict = defaults["download"],
        validate: dict = defaults["validate"],
        preprocess: dict = defaults["preprocess"],
        train: dict = defaults["train"],
        evaluate: dict = defaults["evaluate"],
        export: dict = defaults["export"],
        tracking: dict = defaults["tracking"],
        data_version: str = defaults["data_version"],
        trainjob: dict = {},  # noqa: B006
        mlflow_secret: str = "mlflow",  # noqa: S107
        s3_secret: str = "s3",  # noqa: S107
        download_secret: str = "download",  # noqa: S107
    ) -> None:
        def step(name: str, title: str, **inputs: Any) -> Any:
            task = of[name](**inputs).set_display_name(title)
            task.set_env_variable(VERSION_VARIABLE, __version__)
            secrets = {"mlflow_secret": mlflow_secret, "s3_secret": s3_secret, "download_secret": download_secret}
            return apply(task, name, cluster, **secrets)

        end = step("finish", "Say how it ended", tracking=tracking)
        end.set_caching_options(False)
        with dsl.ExitHandler(end, name="pipeline"):
            checked = step(
                "check", "Check the parameters", folds=folds, download=download, validate=validate,
                preprocess=preprocess, train=train, evaluate=evaluate, export=export, tracking=tracking,
            )  # fmt: skip
            raw = step("download", "Download", config=download, data_version=data_version).after(checked)
            valid = step("validate", "Validate", config=validate, dataset=raw.outputs["dataset"])
            arrays = step(
                "preprocess", "Preprocess", config=preprocess,
                dataset=raw.outputs["dataset"], validation=valid.outputs["validation"],
            )  # fmt: skip
            with dsl.ParallelFor(folds, name="fold", parallelism=cluster.parallel_folds) as fold:
                trained = step(
                    "train", "Train", config=train, tracking=tracking, trainjob=trainjob, fold=fold,
                    preprocessed=arrays.outputs["preprocessed"],
                )  # fmt: skip
                scored = step(
                    "evaluate", "Evaluate", config=evaluate, tracking=tracking, fold=fold,
                    dataset=raw.outputs["dataset"], validation=valid.outputs["validation"],
                    preprocessed=arrays.outputs["preprocessed"], model=trained.outputs["model"],
                )  # fmt: skip
            verdict = step(
                "cross_validate", "Sum up the folds", config=export, tracking=tracking,
                evaluations=dsl.Collected(scored.outputs["evaluation"]), models=dsl.Collected(trained.outputs["model"]),
            )  # fmt: skip
            with dsl.If(verdict.outputs["Output"] == True, name="quality"):  # noqa: E712, SIM117
                with dsl.ParallelFor(folds, name="export", parallelism=cluster.parallel_folds) as fold:
                    step(
                        "export", "Export and register", config=export, tracking=tracking, fold=fold,
                        models=verdict.outputs["folds"], preprocessed=arrays.outputs["preprocessed"],
                    )  # fmt: skip

    return distilldsm


def _components(steps: Any, images: Images) -> Mapping[str, Callable[..., Any]]:
    from kfp import dsl

    image_of = {
        "check": images.data,
        "download": images.data,
        "validate": images.data,
        "preprocess": images.data,
        "train": images.train,
        "evaluate": images.train,
        "cross_validate": images.train,
        "export": images.export,
        "finish": images.train,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kfp: a package of the image is not to be installed again
        return {
            name: dsl.component(getattr(steps, name), base_image=image, install_kfp_package=False)
            for name, image in image_of.items()
        }
