"""What runs inside a component: the stage's own `run`, between a KFP component's parameters and its artifacts.

Nothing here imports kfp: artifacts are objects with `path` and `metadata`, so the same code runs in a subprocess, in a
container, on a cluster and in a test.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distilldsm.config import (
    CrossValidationConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    Params,
    PreprocessConfig,
    TrackingConfig,
    TrainConfig,
    ValidateConfig,
)
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.files import read_json, sha256_json
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.core.output_directory import content_hash
from distilldsm.core.version import __version__

VERSION_VARIABLE = "DISTILLDSM_PIPELINE_VERSION"
"""Environment variable that names the version the pipeline was compiled with."""
WORK_VARIABLE = "DISTILLDSM_WORK_DIR"
"""Environment variable that names a folder which outlives a pod: there an interrupted training goes on."""

T = TypeVar("T")


class Artifact(Protocol):
    """What is used of a KFP artifact."""

    path: str
    metadata: dict[str, Any]


@contextmanager
def component(name: str) -> Iterator[None]:
    """Run a component's body: the image must fit the pipeline, and the user's errors are told without a traceback."""
    try:
        compiled = os.environ.get(VERSION_VARIABLE)
        if compiled and compiled != __version__:
            raise ConfigError(
                "the image holds another version than the pipeline was compiled with",
                where=name,
                seen=f"distilldsm {__version__} in the image, {compiled} in the pipeline",
                rule="the same version",
                hint="build the images of this version, or compile the pipeline again",
            )
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def whole_numbers(value: Any) -> Any:
    """Whole numbers as int again: KFP passes every number inside a mapping or list as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [whole_numbers(inner) for inner in value]
    return value


def section(cls: type[T], values: Mapping[str, Any], name: str) -> T:
    """A section of `params.yaml` as a component received it.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.
    """
    return from_mapping(cls, whole_numbers(values), where=name)


def check_parameters(folds: Sequence[float], sections: Mapping[str, Mapping[str, Any]]) -> Params:
    """All parameters together, before anything is computed.

    Raises:
        ConfigError: as for `params.yaml`; checks across sections too.
    """
    return section(Params, {"cv": {"folds": list(folds)}, **sections}, "pipeline parameters")


def check(folds: Sequence[float], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Component `check`: refuse wrong parameters in seconds rather than after hours."""
    with component("check"):
        params = check_parameters(folds, sections)
        print(
            f"distilldsm {__version__}: {params.train.model.name} on {params.download.source}, folds {params.cv.folds}"
        )


def download(config: Mapping[str, Any], data_version: str, dataset: Artifact) -> None:
    """Component `download`; `data_version` only decides whether an earlier result may be used again."""
    from distilldsm.components import download as stage
    from distilldsm.data.dataset import DatasetIndex

    with component("download"):
        settings = section(DownloadConfig, config, "download")
        if not os.access(Path.cwd(), os.W_OK):  # a container whose file system is read-only
            root = os.environ.get(WORK_VARIABLE) or tempfile.gettempdir()
            settings = replace(settings, archive_dir=str(Path(root) / settings.archive_dir))
        stage.run(settings, {}, {"dataset": Path(dataset.path)})
        index = DatasetIndex.load(Path(dataset.path))
        dataset.metadata.update(
            name=index.name,
            cases=len(index.cases),
            patients=len({case.patient for case in index.cases}),
            channels=[channel.name for channel in index.channels],
            labels=dict(index.labels),
            licence=index.licence,
            source=index.source,
            content_hash=content_hash(dataset.path),
            data_version=data_version,
        )


def validate(
    config: Mapping[str, Any], dataset: Artifact, validation: Artifact, report: Artifact, metrics: Any
) -> None:
    """Component `validate`: the report is shown whether or not the data can be used."""
    from distilldsm.components import validate as stage

    with component("validate"):
        target = Path(validation.path)
        try:
            stage.run(
                section(ValidateConfig, config, "validate"), {"dataset": Path(dataset.path)}, {"validation": target}
            )
        except UserError:
            failed = target.with_name(f"{target.name}-failed")
            if (failed / "report.html").is_file():
                shutil.copyfile(failed / "report.html", report.path)
            raise
        shutil.copyfile(target / "report.html", report.path)
        counts = read_json(target / "metrics.json")
        validation.metadata.update(counts, content_hash=content_hash(target))
        log_metrics(metrics, counts)


def preprocess(config: Mapping[str, Any], dataset: Artifact, validation: Artifact, preprocessed: Artifact) -> None:
    """Component `preprocess`."""
    from distilldsm.components import preprocess as stage
    from distilldsm.data.plan import Plan

    with component("preprocess"):
        target = Path(preprocessed.path)
        inputs = {"dataset": Path(dataset.path), "validation": Path(validation.path)}
        stage.run(section(PreprocessConfig, config, "preprocess"), inputs, {"preprocessed": target})
        plan = Plan.load(target / "plan.json")
        preprocessed.metadata.update(
            name=plan.name,
            depth_axis=plan.depth_axis,
            target_spacing_mm=list(plan.target_spacing_mm),
            patch_size=list(plan.patch_size),
            labels=dict(zip(plan.class_names, plan.class_values, strict=True)),
            content_hash=content_hash(target),
        )


def train(
    config: Mapping[str, Any],
    tracking: Mapping[str, Any],
    trainjob: Mapping[str, Any],
    fold: float,
    preprocessed: Artifact,
    model: Artifact,
    metrics: Any,
) -> None:
    """Component `train`: in this pod, on as many processes as it has GPUs, or as a TrainJob of the cluster."""
    from distilldsm.pipeline.trainjob import run_train
    from distilldsm.pipeline.trainjob_manifest import TrainJobConfig

    with component("train"):
        number = int(fold)
        inputs = {"preprocessed": Path(preprocessed.path)}
        job = section(TrainJobConfig, trainjob, "trainjob") if trainjob else None
        # Other data or parameters are another training: two of them may share the volume.
        key = sha256_json([content_hash(preprocessed.path), config])[:12]
        with resumable_output(model, f"train-fold{number}-{key}") as target:
            run_train(
                section(TrainConfig, config, "train"),
                inputs,
                {"model": target},
                fold=number,
                tracking=section(TrackingConfig, tracking, "tracking"),
                job=job,
            )
        facts = read_json(Path(model.path) / "model.json")
        model.metadata.update(
            framework="pytorch",
            format="safetensors",
            **{key: facts[key] for key in ("name", "options", "parameters", "macs_per_voxel", "fold", "epochs")},
            mlflow_run_id=mlflow_run_id(Path(model.path)),
            content_hash=content_hash(model.path),
        )
        log_metrics(metrics, {key: facts[key] for key in ("parameters", "macs_per_voxel", "best_val_dice")})


@contextmanager
def resumable_output(artifact: Artifact, key: str) -> Iterator[Path]:
    """Where a stage writes: the artifact itself, or below WORK_VARIABLE, from where it is copied when it is whole."""
    root = os.environ.get(WORK_VARIABLE)
    if not root:
        yield Path(artifact.path)
        return
    target = Path(root) / key
    yield target
    shutil.copytree(target, artifact.path, dirs_exist_ok=True)
    shutil.rmtree(target)


def evaluate(
    config: Mapping[str, Any],
    tracking: Mapping[str, Any],
    fold: float,
    inputs: Mapping[str, Artifact],
    evaluation: Artifact,
    report: Artifact,
    metrics: Any,
    confusion: Any,
) -> None:
    """Component `evaluate`: scores, the page with figures, and the confusion matrix of voxels.

    Args:
        inputs: `dataset`, `validation`, `preprocessed`, `model`.
    """
    from distilldsm.components import evaluate as stage

    with component("evaluate"):
        target = Path(evaluation.path)
        stage.run(
            section(EvaluateConfig, config, "evaluate"),
            {name: Path(artifact.path) for name, artifact in inputs.items()},
            {"evaluation": target},
            fold=int(fold),
            tracking=section(TrackingConfig, tracking, "tracking"),
        )
        shutil.copyfile(target / "report.html", report.path)
        summary = read_json(target / "summary.json")
        evaluation.metadata.update(
            fold=int(fold),
            dice=summary["mean"]["dice"],
            mlflow_run_id=mlflow_run_id(Path(inputs["model"].path)),
            content_hash=content_hash(target),
        )
        log_metrics(metrics, flat(read_json(target / "metrics.json")))
        names, matrix = confusion_matrix(target / "plots" / "confusion.csv")
        confusion.log_confusion_matrix(names, matrix)


def confusion_matrix(path: Path) -> tuple[list[str], list[list[int]]]:
    """Counts by true (rows) and predicted label of the file that the evaluation draws from: a line per voxel share."""
    import csv
    from collections import Counter

    with path.open(newline="", encoding="utf-8") as stream:
        counts = Counter((row["actual"], row["predicted"]) for row in csv.DictReader(stream))
    names = sorted({name for pair in counts for name in pair}, key=lambda name: (name != "background", name))
    return names, [[counts[actual, predicted] for predicted in names] for actual in names]


def cross_validate(
    config: Mapping[str, Any],
    tracking: Mapping[str, Any],
    evaluations: Sequence[Artifact],
    models: Sequence[Artifact],
    folds: Artifact,
    summary: Artifact,
    metrics: Any,
) -> bool:
    """Component `cross_validate`: the table over the folds, and whether it passes the threshold of `export.min_dice`.

    The models of all folds go to one artifact `folds`, `fold0`, `fold1` ..., what their exports need of the evaluations
    to `evaluation/fold0` ..., and the stage's output to `cross_validation`: kfp cannot pass collected artifacts on into
    the loop that exports them.

    Returns:
        Whether the models may leave. (One output only: kfp's local runner cannot tell several apart in a condition.)
    """
    from distilldsm.components import cross_validate as stage
    from distilldsm.evaluation.metrics import METRICS

    with component("cross_validate"):
        threshold = section(ExportConfig, config, "export").min_dice
        target = Path(folds.path)
        for model in models:
            shutil.copytree(model.path, target / f"fold{read_json(Path(model.path) / 'model.json')['fold']}")
        heavy = shutil.ignore_patterns("predictions", "figures", "plots")
        numbers = [int(read_json(Path(one.path) / "summary.json")["fold"]) for one in evaluations]
        for one, fold in zip(evaluations, numbers, strict=True):
            shutil.copytree(one.path, target / "evaluation" / f"fold{fold}", ignore=heavy)
        stage.run(
            CrossValidationConfig(folds=tuple(numbers)),
            {"evaluation": target / "evaluation", "models": target},
            {"cross_validation": target / "cross_validation"},
            tracking=section(TrackingConfig, tracking, "tracking"),
        )
        table = read_json(target / "cross_validation" / "summary.json")
        dice = table["mean"]["dice"]["mean_folds"] or 0.0
        passed = dice >= threshold
        verdict = "passed" if passed else "not passed: nothing is exported or registered"
        rows = [(label, of_label["dice"]) for label, of_label in table["labels"].items()]
        lines = ["| label | Dice | sd over folds | sd over cases | folds |", "|---|---|---|---|---|"]
        for label, score in rows:
            cells = (METRICS["dice"].text(score[key]) for key in ("mean_folds", "sd_folds", "sd_cases"))
            lines.append(f"| {label} | {' | '.join(cells)} | {score['folds']} |")
        listed = ", ".join(str(fold) for fold in table["folds"])
        lines += ["", f"Folds {listed}. Mean Dice {dice:.4f}, threshold {threshold:g}: **{verdict}**."]
        Path(summary.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        log_metrics(metrics, {f"dice_{label}": score["mean_folds"] for label, score in rows} | {"dice": dice})
        folds.metadata.update(dice=dice, folds=table["folds"])
        print("\n".join(lines))
        return passed


def export(
    config: Mapping[str, Any],
    tracking: Mapping[str, Any],
    fold: float,
    models: Artifact,
    preprocessed: Artifact,
    exported: Artifact,
    card: Artifact,
    metrics: Any,
) -> None:
    """Component `export` of one fold; `models` holds those of all folds."""
    from distilldsm.components import export as stage

    with component("export"):
        number = int(fold)
        model = Path(models.path) / f"fold{number}"
        scored = Path(models.path) / "evaluation" / f"fold{number}"
        target = Path(exported.path)
        stage.run(
            section(ExportConfig, config, "export"),
            {"model": model, "preprocessed": Path(preprocessed.path), "evaluation": scored},
            {"export": target},
            fold=number,
            tracking=section(TrackingConfig, tracking, "tracking"),
        )
        shutil.copyfile(target / "README.md", card.path)
        metadata = read_json(target / "metadata.json")
        exported.metadata.update(
            framework="openvino",
            name=metadata["name"],
            fold=number,
            labels=metadata["labels"],
            mlflow_run_id=mlflow_run_id(model),
            content_hash=content_hash(target),
        )
        log_metrics(metrics, flat(read_json(target / "metrics.json")))


def finish(state: str, error: str, tracking: Mapping[str, Any]) -> None:
    """Component `finish`, run however the pipeline ended: says how, here and on its MLflow runs."""
    from distilldsm.pipeline.lineage import mark_runs

    run_id = os.environ.get("KFP_RUN_ID", "")
    print(f"pipeline run {run_id or '(no id)'}: {state}" + (f"\n{error}" if error else ""), flush=True)
    if not (run_id and tracking.get("enabled", True)):
        return
    try:
        marked = mark_runs(run_id, {"kfp_state": state, **({"kfp_error": error[:500]} if error else {})})
        print(f"MLflow runs of this pipeline run: {', '.join(marked) or 'none'}")
    except Exception as failure:  # the pipeline's end must not depend on another service
        print(f"MLflow was not told: {type(failure).__name__}: {failure}")


def mlflow_run_id(model: Path) -> str:
    """The MLflow run a model belongs to; empty where it was not tracked."""
    path = model / "mlflow_run.json"
    return str(read_json(path).get("run_id") or "") if path.is_file() else ""


def log_metrics(metrics: Any, values: Mapping[str, Any]) -> None:
    """Numbers to a KFP Metrics artifact; what is no number is left out."""
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics.log_metric(key, float(value))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with joined keys: `{"a": {"b": 1}}` becomes `{"a_b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}_")
        else:
            found[f"{prefix}{key}"] = value
    return found


def sections_of(params: Params) -> dict[str, Any]:
    """The pipeline's arguments for the given parameters: `folds`, then one mapping a section."""
    values = to_mapping(params)
    return {"folds": values.pop("cv")["folds"], **values}
