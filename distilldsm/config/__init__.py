"""The parameters of every stage: one frozen dataclass, in a file of its own, for each section of `params.yaml`.

A field's default, range and text stand at the field only. The reference, the JSON schema, the comments of
`params.yaml` and the checks are made from them. Checks across fields stand in `__post_init__`.
"""

from distilldsm.config.cross_validation import CrossValidationConfig as CrossValidationConfig
from distilldsm.config.download import DownloadConfig as DownloadConfig
from distilldsm.config.download import Modality as Modality
from distilldsm.config.download import PatternConfig as PatternConfig
from distilldsm.config.download import SampleConfig as SampleConfig
from distilldsm.config.evaluate import EvaluateConfig as EvaluateConfig
from distilldsm.config.export import ExportConfig as ExportConfig
from distilldsm.config.export import Int8Config as Int8Config
from distilldsm.config.params import Params as Params
from distilldsm.config.preprocess import PreprocessConfig as PreprocessConfig
from distilldsm.config.presets import load_params as load_params
from distilldsm.config.tracking import TrackingConfig as TrackingConfig
from distilldsm.config.train import AugmentConfig as AugmentConfig
from distilldsm.config.train import MirrorAxis as MirrorAxis
from distilldsm.config.train import ModelConfig as ModelConfig
from distilldsm.config.train import TrainConfig as TrainConfig
from distilldsm.config.validate import ValidateConfig as ValidateConfig
