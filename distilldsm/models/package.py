"""The directory of an exported model: its metadata, and the check that no file has changed. Imports no runtime.

Files: `model.onnx`, `model.xml` and `model.bin` (OpenVINO IR), `model.safetensors`, `plan.json`, `metadata.json`,
`training_distribution.json` (for `distilldsm drift`), `README.md` (model card), `parity.json`, `metrics.json`,
`manifest.json`, and the folders `int8` (the decision about INT8, and the INT8 IR if it is shipped) and `monai_bundle`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from distilldsm.config import MirrorAxis, Modality
from distilldsm.config.networks import Options
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, read_record, sha256_file
from distilldsm.core.hashes import MANIFEST
from distilldsm.core.mapping import Range
from distilldsm.core.text import is_plain
from distilldsm.data.targets import LARGEST_NOT_TRIED, Region, Targets

METADATA = "metadata.json"
INTENDED_USE = "research; not a medical device"
RUNTIME_FILES: Mapping[str, tuple[str, ...]] = {
    "openvino": ("plan.json", "model.xml", "model.bin"),
    "onnx": ("plan.json", "model.onnx"),
    "torch": ("plan.json", "model.safetensors"),
}
"""The files that prediction with a runtime reads."""
MONAI_BUNDLE = "monai_bundle"
INT8_DECISION = "int8/decision.json"
INT8_FILES = ("int8/model.bin", "int8/model.xml")
SERVICE = "inference_service.yaml"
HASHED_FILES = (
    "README.md",
    SERVICE,
    INT8_DECISION,
    "model.bin",
    "model.onnx",
    "model.safetensors",
    "model.xml",
    "parity.json",
    "plan.json",
    "training_distribution.json",
)
"""The metadata hold the SHA-256 of these files."""
Stride = Annotated[int, Range(1, 256)]
"""Voxels. Prediction pads to the stride: a forged one would fill the memory."""
Halo = Annotated[int, Range(0, 4096)]
"""Slices."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output of the network."""

    name: str
    dtype: str = "float32"
    shape: tuple[int | None, ...]
    """null: any size that `multiple_of` allows."""
    axes: tuple[str, ...] = ("batch", "channel", "depth", "height", "width")
    multiple_of: tuple[Stride, Stride, Stride]
    """Depth, height and width must be multiples of these numbers; prediction pads to them."""


@dataclass(frozen=True, kw_only=True)
class ChannelInfo:
    """A channel of the input, in order."""

    name: str
    modality: Modality
    normalisation: str
    """In words; the numbers are in plan.json."""


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """What the network is, and what prediction must know about it besides its weights."""

    name: str
    options: Options
    stride: tuple[Stride, Stride, Stride]
    depth_halo: Halo | None
    """The logits of a slice depend on this many slices on each side; null: on the whole depth."""
    parameters: int
    macs_per_voxel: float
    mirror_axes: tuple[MirrorAxis, ...] = ()
    """Axes of the random flips in training."""


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What the network was trained on."""

    name: str
    licence: str
    reference: str
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Int8Report:
    """Result of the quantisation; in `parity.json` and `metadata.json`."""

    shipped: bool
    reason: str
    """In words, with the numbers."""
    speedup: float | None = None
    """Time of `predict` in OpenVINO's default precision (bf16 if the CPU has it) divided by its time in INT8."""
    pairs: int = 0
    """Number of timed pairs of calls."""
    instruction_set: str = ""
    """Vector extensions of the CPU that was measured."""
    dice_loss: float | None = None
    """Mean Dice over labels and held-out cases of the float32 IR minus that of the INT8 IR."""
    cases: int = 0
    """Number of held-out cases in this measurement."""
    calibration_cases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """The contents of `metadata.json`."""

    schema_version: int = 1
    name: str
    intended_use: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    channels: tuple[ChannelInfo, ...]
    labels: Mapping[str, int]
    """Label name to value in the masks, ascending from background."""
    regions: tuple[Region, ...] = ()
    """The regions of the output channels (sigmoid each). Without regions the channels are the labels (softmax)."""
    network: NetworkInfo
    openvino_weights: Literal["FP16", "FP32"]
    """How model.bin stores the weights."""
    int8: Int8Report = Int8Report(shipped=False, reason="not made")
    """Whether there is an IR in `int8`, and the reason."""
    postprocessing: tuple[str, ...] | None = None
    """`distilldsm predict --postprocess` keeps only the largest component of these labels or regions. The held-out
    cases decide; null: not decided, because the fold was not evaluated."""
    data: DataInfo
    fold: int
    """The fold that was held out from training."""
    checkpoint: str
    files: Mapping[str, str]
    """SHA-256 (hex) of each file beside this one."""
    versions: Mapping[str, str]
    """Packages used for the export, with their versions."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the metadata", seen=self.schema_version, rule="1")
        if not all(is_plain(name) for name in (self.name, *(channel.name for channel in self.channels))):
            raise ConfigError("a name holds control characters", rule="one line of text")
        largest = self.targets.largest  # also checks that the regions fit the labels, and the labels' names and values
        if not set(self.postprocessing or ()) <= largest.keys():
            raise ConfigError(
                "'postprocessing' names an unknown label or region, or one that cannot be post-processed",
                seen=self.postprocessing,
                rule=", ".join(largest) or LARGEST_NOT_TRIED,
            )

    @property
    def targets(self) -> Targets:
        """What the network's output channels stand for."""
        return Targets(tuple(self.labels), tuple(self.labels.values()), self.regions)


def model_name(dataset: str) -> str:
    """The registry name of a model of this data set: lower case, digits and hyphens only."""
    return "distilldsm-" + (re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "model")


def load_metadata(model_dir: str | os.PathLike[str]) -> ModelMetadata:
    """Read `metadata.json` of an exported model. The other files are not checked (see `verify`).

    Raises:
        DataError: there is not an exported model, or its metadata are damaged or of an unknown version.
    """
    path = Path(model_dir) / METADATA
    if not path.is_file():
        raise DataError(
            "is not an exported model",
            where=model_dir,
            seen=f"no {METADATA}" if Path(model_dir).is_dir() else "no such directory",
            hint="give the directory that the export stage wrote, e.g. export/fold0",
        )
    return read_record(ModelMetadata, path, hint="export the model again")


def verify(model_dir: str | os.PathLike[str], names: Iterable[str] | None = None) -> ModelMetadata:
    """Check files of an exported model against the hashes in its metadata, and the metadata against the manifest.

    Args:
        model_dir: the directory that the export stage wrote.
        names: the files to check; by default all files in the metadata.

    Raises:
        DataError: names the first file that is missing or has changed.
    """
    root = Path(model_dir)
    metadata = load_metadata(root)
    expected = dict(metadata.files)
    if (root / MANIFEST).is_file():
        manifest = read_json(root / MANIFEST)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or METADATA not in files:
            raise DataError("has no file hashes", where=root / MANIFEST, hint="export the model again")
        _check(root / METADATA, files[METADATA])
    for name in expected:
        if PurePosixPath(name).is_absolute() or {"..", ""} & set(name.split("/")) or "\\" in name:
            raise DataError("names a file outside the model", where=root / METADATA, seen=name, rule="a file beside it")
    for name in expected if names is None else names:
        if name not in expected:
            raise DataError(f"has no hash of {name}", where=root / METADATA, hint="export the model again")
        _check(root / name, expected[name])
    return metadata


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError("is missing", where=path, hint="copy the whole model directory, or export the model again")
    seen = sha256_file(path)
    if seen != expected:
        raise DataError(
            "has changed since the export",
            where=path,
            seen=f"SHA-256 {seen}",
            rule=f"SHA-256 {expected}",
            hint="copy the model directory again, or export the model again",
        )
