"""The stages in the order in which they run. Importing this module loads no large package."""

from __future__ import annotations

from distilldsm.components import cross_validate, download, evaluate, export, preprocess, train, validate
from distilldsm.core.stage import Stage

STAGES: tuple[Stage, ...] = (
    download.STAGE,
    validate.STAGE,
    preprocess.STAGE,
    train.STAGE,
    evaluate.STAGE,
    cross_validate.STAGE,
    export.STAGE,
)


def find(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)
