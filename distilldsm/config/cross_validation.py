"""Section `cv` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass

from distilldsm.core.mapping import Natural, require


@dataclass(frozen=True, kw_only=True)
class CrossValidationConfig:
    """Which folds to run. Their number is set by `preprocess.folds`, or by the file `preprocess.splits`."""

    folds: tuple[Natural, ...] = (0,)
    """Folds to train, evaluate and export, from 0, e.g. [0, 1, 2, 3, 4]. Several folds are a cross-validation."""

    def __post_init__(self) -> None:
        require(len(set(self.folds)) == len(self.folds) >= 1, "folds", self.folds, "distinct fold numbers from 0")
