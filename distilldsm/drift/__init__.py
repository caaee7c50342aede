"""Whether new scans look like those a model was trained on; needs neither torch nor a network."""

from distilldsm.drift.run import drift_of_files

__all__ = ["drift_of_files"]
