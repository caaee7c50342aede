"""Section `cv` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass

from distilldsm.core.mapping import Natural, require


@dataclass(frozen=True, kw_only=True)
class CrossValidationConfig:
    """Which folds to run. How many there are is `preprocess.folds`, or what `preprocess.splits` holds."""

    folds: tuple[Natural, ...] = (0,)
    """Folds to train, score and export, from 0, e.g. [0, 1, 2, 3, 4]. Several make a cross-validation."""

    def __post_init__(self) -> None:
        require(len(set(self.folds)) == len(self.folds) >= 1, "folds", self.folds, "distinct fold numbers from 0")
