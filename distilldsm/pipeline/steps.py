"""The components of the pipeline. Each body only calls the stage's function in the image (`stages`).

kfp reads these functions' source and annotations, so imports stand inside, and annotations are real objects: no
`from __future__ import annotations` here.
"""

# ruff: noqa: UP006, UP035  (kfp reads typing.List)

from typing import List

from kfp.dsl import (
    HTML,
    ClassificationMetrics,
    Dataset,
    Input,
    Markdown,
    Metrics,
    Model,
    Output,
    PipelineTaskFinalStatus,
)


def check(
    folds: list,
    download: dict,
    validate: dict,
    preprocess: dict,
    train: dict,
    evaluate: dict,
    export: dict,
    tracking: dict,
) -> None:
    """Refuse wrong parameters before anything is computed."""
    from distilldsm.pipeline import stages

    sections = {
        "download": download,
        "validate": validate,
        "preprocess": preprocess,
        "train": train,
        "evaluate": evaluate,
        "export": export,
        "tracking": tracking,
    }
    stages.check(folds, sections)


def download(config: dict, data_version: str, dataset: Output[Dataset]) -> None:
    """Fetch the labelled volumes, extract and index them."""
    from distilldsm.pipeline import stages

    stages.download(config, data_version, dataset)


def validate(
    config: dict,
    dataset: Input[Dataset],
    validation: Output[Dataset],
    report: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Check every case against the expectation suite."""
    from distilldsm.pipeline import stages

    stages.validate(config, dataset, validation, report, metrics)


def preprocess(
    config: dict, dataset: Input[Dataset], validation: Input[Dataset], preprocessed: Output[Dataset]
) -> None:
    """Fingerprint, plan, arrays in network space, splits by patient."""
    from distilldsm.pipeline import stages

    stages.preprocess(config, dataset, validation, preprocessed)


def train(
    config: dict,
    tracking: dict,
    trainjob: dict,
    fold: int,
    preprocessed: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Train one fold."""
    from distilldsm.pipeline import stages

    stages.train(config, tracking, trainjob, fold, preprocessed, model, metrics)


def evaluate(
    config: dict,
    tracking: dict,
    fold: int,
    dataset: Input[Dataset],
    validation: Input[Dataset],
    preprocessed: Input[Dataset],
    model: Input[Model],
    evaluation: Output[Dataset],
    report: Output[HTML],
    metrics: Output[Metrics],
    confusion: Output[ClassificationMetrics],
) -> None:
    """Score one fold in the scans' own geometry."""
    from distilldsm.pipeline import stages

    inputs = {"dataset": dataset, "validation": validation, "preprocessed": preprocessed, "model": model}
    stages.evaluate(config, tracking, fold, inputs, evaluation, report, metrics, confusion)


def cross_validate(
    config: dict,
    tracking: dict,
    evaluations: Input[List[Dataset]],
    models: Input[List[Model]],
    folds: Output[Model],
    summary: Output[Markdown],
    metrics: Output[Metrics],
) -> bool:
    """The folds' models in one place, the table over the folds, and whether it passes the quality threshold."""
    from distilldsm.pipeline import stages

    return stages.cross_validate(config, tracking, evaluations, models, folds, summary, metrics)


def export(
    config: dict,
    tracking: dict,
    fold: int,
    models: Input[Model],
    preprocessed: Input[Dataset],
    exported: Output[Model],
    card: Output[Markdown],
    metrics: Output[Metrics],
) -> None:
    """One fold to ONNX and OpenVINO, compared with the network, registered in MLflow."""
    from distilldsm.pipeline import stages

    stages.export(config, tracking, fold, models, preprocessed, exported, card, metrics)


def finish(tracking: dict, status: PipelineTaskFinalStatus) -> None:
    """Say how the run ended, on the page of the run and on its MLflow runs."""
    from distilldsm.pipeline import stages

    stages.finish(status.state, status.error_message or "", tracking)
