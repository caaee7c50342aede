"""The stages as commands. Their command lines lie with the stages, in `distilldsm.components`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

STAGES: Mapping[str, str] = {
    "download": "fetch labelled volumes, or make the embedded sample",
    "validate": "check every case",
    "preprocess": "fingerprint, plan, arrays for training, splits",
    "train": "train one fold",
    "evaluate": "score one fold in the scans' own geometry",
    "export": "one fold to ONNX and OpenVINO, compared with the network",
}
"""Stage to its line in `--help`."""


def run_stage(name: str, arguments: Sequence[str]) -> int:
    """Run one stage with the arguments of its command line; returns the exit code."""
    code: int = importlib.import_module(f"distilldsm.components.{name}").main(arguments)
    return code
