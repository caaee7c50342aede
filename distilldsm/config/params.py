"""All sections of `params.yaml` together."""

from __future__ import annotations

from dataclasses import dataclass

from distilldsm.config.cross_validation import CrossValidationConfig
from distilldsm.config.download import DownloadConfig
from distilldsm.config.evaluate import EvaluateConfig
from distilldsm.config.export import ExportConfig
from distilldsm.config.preprocess import PreprocessConfig
from distilldsm.config.tracking import TrackingConfig
from distilldsm.config.train import TrainConfig
from distilldsm.config.validate import ValidateConfig
from distilldsm.core.mapping import require


@dataclass(frozen=True, kw_only=True)
class Params:
    """All of `params.yaml`."""

    cv: CrossValidationConfig = CrossValidationConfig()
    download: DownloadConfig = DownloadConfig()
    validate: ValidateConfig = ValidateConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if self.preprocess.splits:  # the number of folds is known only when that file is read
            return
        require(
            max(self.cv.folds) < self.preprocess.folds,
            "cv.folds",
            self.cv.folds,
            f"below preprocess.folds ({self.preprocess.folds})",
        )
        require(
            self.download.source != "sample" or self.preprocess.folds <= self.download.sample.subjects,
            "preprocess.folds",
            self.preprocess.folds,
            f"at most download.sample.subjects ({self.download.sample.subjects})",
        )
