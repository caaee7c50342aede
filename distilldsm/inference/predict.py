"""From a scan to a mask in the scan's own geometry, with any engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from distilldsm.data.geometry import scores_to_scan, to_network_space
from distilldsm.data.plan import Plan
from distilldsm.data.volume import Volume
from distilldsm.errors import DataError
from distilldsm.export.package import INT8_FILES, RUNTIME_FILES, ModelMetadata, load_metadata, verify
from distilldsm.inference.engines import Engine, OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.inference.windows import MAX_VOXELS, predict_logits

Runtime = Literal["openvino", "onnx", "torch"]
Precision = Literal["f32", "auto", "int8"]


@dataclass(frozen=True, kw_only=True)
class NetworkGeometry:
    """What prediction must know of a network besides its weights."""

    stride: tuple[int, int, int]
    depth_halo: int | None


class Predictor:
    """A trained model, ready for scans.

    Args:
        engine: runs the network.
        plan: how scans are brought into network space.
        geometry: the network's stride and depth reach.
        max_voxels: largest piece that goes through the network at once.
        metadata: of an exported model.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        geometry: NetworkGeometry,
        *,
        max_voxels: int = MAX_VOXELS,
        metadata: ModelMetadata | None = None,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.geometry = geometry
        self.max_voxels = max_voxels
        self.metadata = metadata

    def predict(self, volume: Volume) -> npt.NDArray[np.uint8]:
        """The mask of a scan: (X, Y, Z) uint8 label values on the scan's grid."""
        image, record = to_network_space(volume, self.plan)
        classes = scores_to_scan(self.plan.targets.scores(self.logits(image)), record, self.plan.targets)
        return np.array(self.plan.class_values, dtype=np.uint8)[classes]

    def logits(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (K, D, H, W) of an image (C, D, H, W) in network space."""
        return predict_logits(
            self.engine,
            image,
            stride=self.geometry.stride,
            depth_halo=self.geometry.depth_halo,
            max_voxels=self.max_voxels,
        )

    @classmethod
    def from_training(cls, model_dir: Path, checkpoint: str = "last", *, device: str = "auto") -> Predictor:
        """The network of a training directory (`models/foldK`) in PyTorch, float32 on a CPU.

        Raises:
            DataError: the checkpoint is missing or does not fit.
        """
        import torch

        from distilldsm.training.checkpoint import load_network

        network = load_network(model_dir, checkpoint)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        geometry = NetworkGeometry(stride=network.stride, depth_halo=network.depth_halo)
        return cls(TorchEngine(network, device=device), Plan.load(model_dir / "plan.json"), geometry)

    @classmethod
    def from_export(
        cls,
        model_dir: Path,
        *,
        runtime: Runtime = "openvino",
        precision: Precision = "f32",
        fixed_size: bool = False,
    ) -> Predictor:
        """An exported model directory, its files checked against their hashes; only `torch` needs torch.

        precision: of OpenVINO: `f32`, `auto` (see `OpenVINOEngine`) or `int8`, the quantised IR.
        fixed_size: compile OpenVINO for each size that comes (half the memory, see `OpenVINOEngine`).

        Raises:
            DataError: a file is missing, damaged or changed, or the model has no INT8 IR.
        """
        if runtime == "openvino" and precision == "int8":
            metadata = _require_int8(model_dir)
        else:
            metadata = verify(model_dir, RUNTIME_FILES[runtime])
        network = metadata.network
        geometry = NetworkGeometry(stride=network.stride, depth_halo=network.depth_halo)
        engine: Engine
        if runtime == "onnx":
            engine = OnnxEngine(model_dir / "model.onnx")
        elif runtime == "torch":
            engine = _exported_network(model_dir, metadata)
        else:
            name = "model_int8.xml" if precision == "int8" else "model.xml"
            engine = OpenVINOEngine(
                model_dir / name, precision="f32" if precision == "f32" else "auto", fixed_size=fixed_size
            )
        return cls(engine, Plan.load(model_dir / "plan.json"), geometry, metadata=metadata)


def _require_int8(model_dir: Path) -> ModelMetadata:
    metadata = load_metadata(model_dir)
    if not metadata.int8.shipped:
        raise DataError(
            "has no INT8 model",
            where=model_dir,
            seen=metadata.int8.reason,
            mend="--precision auto is the fastest it has",
        )
    return verify(model_dir, ("plan.json", *INT8_FILES))


def _exported_network(model_dir: Path, metadata: ModelMetadata) -> TorchEngine:
    from distilldsm.models.registry import build_model
    from distilldsm.training.checkpoint import load_tensors, load_weights

    path = model_dir / "model.safetensors"
    network = build_model(
        metadata.network.name,
        in_channels=len(metadata.channels),
        out_channels=metadata.targets.channels,
        **metadata.network.options,
    )
    load_weights(network, load_tensors(path)[0], path)
    return TorchEngine(network)
