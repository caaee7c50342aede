"""Builds the Kubeflow pipeline from the stages' records: folds in parallel, then a gate before export."""

from __future__ import annotations

import inspect
import linecache
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, List  # noqa: UP035

from distilldsm.components.registry import STAGES
from distilldsm.config import Params
from distilldsm.core.errors import ConfigError
from distilldsm.core.files import sha256_json
from distilldsm.core.stage import Stage
from distilldsm.core.version import __version__
from distilldsm.pipeline.cluster import Cluster, apply
from distilldsm.pipeline.step import (
    VERSION_VARIABLE,
    check_parameters,
    outputs_for_models,
    sections_of,
    source_of,
    through_gate,
    without_null,
)

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

NAME = "distilldsm"
DESCRIPTION = "Labelled volumes to a trained, evaluated and exported Distill DSM network. Parameters: params.yaml."
SECTIONS = tuple(field.name for field in fields(Params) if field.name != "cv")
"""Sections of params.yaml that are inputs of the pipeline, each a mapping. From `cv` only `folds` is an input."""


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
        """Whether each image is named by digest. KFP's cache then notices a rebuilt image."""
        return all("@sha256:" in image for image in (self.data, self.train, self.export))


def data_version(params: Params) -> str:
    """Identifies the data before it is read. When the value changes, KFP downloads again; empty: unknown."""
    download = params.download
    if download.source == "sample":
        return f"sample-{sha256_json(download.sample)[:12]}"
    return f"sha256-{download.sha256.lower()}" if download.sha256 else ""


def arguments(params: Params) -> dict[str, Any]:
    """The pipeline's inputs for `params.yaml`: `folds`, `budget`, one mapping per section, and the data's version.

    KFP's parameters cannot be null: keys with null are left out, and get the default of their dataclass.

    Raises:
        ConfigError: a null is not the default of its key.
    """
    values = without_null(sections_of(params))
    if check_parameters(values["folds"], {name: values[name] for name in SECTIONS}) != params:
        raise ConfigError("a parameter is null, but null is not its default, and KFP cannot pass null")
    return {**values, "data_version": data_version(params)}


def build_pipeline(
    params: Params, cluster: Cluster, images: Images, stages: Sequence[Stage] = STAGES, *, caching: bool = True
) -> GraphComponent:
    """The pipeline, with `params` as the defaults of its inputs."""
    from kfp import dsl

    inputs: dict[str, tuple[Any, Any]] = {
        name: ({"folds": List[int], "budget": float, "data_version": str}.get(name, dict), default)  # noqa: UP006
        for name, default in arguments(params).items()
    }
    secrets = ("mlflow", "s3", "download")
    inputs |= {"trainjob": (dict, {})} | {f"{name}_secret": (str, name) for name in secrets}

    def distilldsm(*values: Any) -> None:
        _Wiring(dict(zip(inputs, values, strict=True)), cluster, images, stages, caching).build()

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    distilldsm.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind, annotation=a, default=d) for n, (a, d) in inputs.items()], return_annotation=None
    )
    pipeline: GraphComponent = dsl.pipeline(name=NAME, display_name="Distill DSM", description=DESCRIPTION)(distilldsm)
    return pipeline


class _Wiring:
    """Adds the tasks of one pipeline, and connects outputs with inputs."""

    def __init__(
        self, channels: Mapping[str, Any], cluster: Cluster, images: Images, stages: Sequence[Stage], caching: bool
    ) -> None:
        self.channels, self.cluster, self.images, self.stages, self.caching = channels, cluster, images, stages, caching
        self.outputs: dict[str, Any] = {}
        """Outputs of the tasks added so far, by name."""

    def build(self) -> None:
        """Add the tasks: data, every fold, all folds together, the gate, every model."""
        from kfp import dsl

        channels = self.channels
        end = self.task("finish", "Report how the pipeline ended", FINISH, channels)
        with dsl.ExitHandler(end, name="pipeline"):
            checked = self.task("check", "Check all parameters before anything is computed", CHECK, channels)
            for stage in self.of("data"):
                task = self.stage(stage)
                if not stage.inputs:
                    task.after(checked)
            with dsl.ParallelFor(channels["folds"], name="fold", parallelism=self.cluster.parallel_folds) as fold:
                for stage in self.of("fold"):
                    self.stage(stage, fold)
            for stage in self.of("folds"):
                self.stage(stage)
            verdict = self.gate()
            with dsl.If(verdict == True, name="quality"):  # noqa: E712, SIM117
                with dsl.ParallelFor(channels["folds"], name="model", parallelism=self.cluster.parallel_folds) as fold:
                    for stage in self.of("model"):
                        self.stage(stage, fold)

    def of(self, scope: str) -> list[Stage]:
        """The stages of a scope."""
        return [stage for stage in self.stages if stage.scope == scope]

    def stage(self, stage: Stage, fold: Any = None) -> Any:
        """Add a stage's task."""
        from kfp import dsl

        values = {**self.channels, "config": self.channels.get(stage.section), "fold": fold}
        for one in stage.inputs:
            source = source_of(one, self.stages)
            if not through_gate(stage, source):
                made = self.outputs[source.stage.output.name]
                values[one.name] = dsl.Collected(made) if source.collected else made
        values["collected"] = self.outputs.get("collected")
        task = self.task(stage.name, stage.help, step_parameters(stage, self.stages), values, stage.image)
        self.outputs[stage.output.name] = task.outputs[stage.output.name]
        return task

    def gate(self) -> Any:
        """Add the gate's task; return its output, true if the models may be exported."""
        from kfp import dsl

        read = {output.name: output for output, _ in outputs_for_models(self.stages)}
        parameters = {
            "config": "dict",
            **{name: f"Input[List[{output.kind}]]" for name, output in read.items()},
            "cross_validation": "Input[Dataset]",
            "collected": "Output[Model]",
            "summary": "Output[Markdown]",
        }
        values = {"config": self.channels["export"], "cross_validation": self.outputs["cross_validation"]}
        values |= {name: dsl.Collected(self.outputs[name]) for name in read}
        title = "Check the quality threshold, and collect the models for their export"
        task = self.task("gate", title, parameters, values, returns="bool")
        self.outputs["collected"] = task.outputs["collected"]
        return task.outputs["Output"]

    def task(
        self,
        name: str,
        title: str,
        parameters: Mapping[str, str],
        values: Mapping[str, Any],
        image: str | None = None,
        returns: str = "None",
    ) -> Any:
        """Add the task of a step."""
        role = image or {"check": "data"}.get(name, "train")
        made = component(name, title, parameters, returns, getattr(self.images, role))
        needed = {
            key: values[key] for key, kind in parameters.items() if not kind.startswith(("Output", "PipelineTask"))
        }
        task = made(**needed).set_display_name(name.replace("_", " ").capitalize())
        task.set_caching_options(self.caching and name != "finish")
        task.set_env_variable(VERSION_VARIABLE, __version__)
        secrets = {key: value for key, value in self.channels.items() if key.endswith("_secret")}
        return apply(task, name, self.cluster, **secrets)


CHECK = {"folds": "list", "budget": "float", **dict.fromkeys(SECTIONS, "dict")}
FINISH = {"tracking": "dict", "trainjob": "dict", "status": "PipelineTaskFinalStatus", "report": "Output[Markdown]"}


def step_parameters(stage: Stage, stages: Sequence[Stage] = STAGES) -> dict[str, str]:
    """The parameters of a stage's component, with their annotations."""
    parameters = {"folds": "list"} if stage.section == "cv" else {"config": "dict"}
    parameters |= dict.fromkeys(stage.also_by_name, "float")
    parameters |= {} if stage.inputs else {"data_version": "str"}
    parameters |= {"tracking": "dict"} if stage.scope != "data" else {}
    parameters |= {"trainjob": "dict"} if stage.distributed else {}
    parameters |= {"fold": "int"} if stage.per_fold else {}
    for one in stage.inputs:
        source = source_of(one, stages)
        kind = source.stage.output.kind
        if through_gate(stage, source):
            parameters["collected"] = "Input[Model]"
        else:
            parameters[one.name] = f"Input[List[{kind}]]" if source.collected else f"Input[{kind}]"
    return parameters | {out.name: f"Output[{out.kind}]" for out in stage.outputs if out.kind}


def component(name: str, title: str, parameters: Mapping[str, str], returns: str, image: str) -> Callable[..., Any]:
    """The component that runs a step in an image.

    kfp copies the source of a function into the pipeline. This source is generated from the step's parameters, and put
    into `linecache`, where `inspect` finds it. (`attrs` does the same with its methods.)
    """
    from kfp import dsl

    listed = "".join(f"    {key}: {annotation},\n" for key, annotation in parameters.items())
    values = ", ".join(f"{key}={key}" for key in parameters)
    source = (
        f'def {name}(\n{listed}) -> {returns}:\n    """{title[0].upper()}{title[1:]}."""\n'
        f"    from distilldsm.pipeline import step\n\n    return step.run({name!r}, {values})\n"
    )
    file = f"<step {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {**vars(dsl), "List": List}  # noqa: UP006
    exec(compile(source, file, "exec", dont_inherit=True), names)  # noqa: S102 - source from above
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp warns about packages that it does not install: the image has them
        made: Callable[..., Any] = dsl.component(names[name], base_image=image, install_kfp_package=False)
    return made
