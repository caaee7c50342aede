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
from distilldsm.export.package import RUNTIME_FILES, verify
from distilldsm.inference.engines import Engine, OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.inference.windows import MAX_VOXELS, predict_logits, softmax


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
    """

    def __init__(self, engine: Engine, plan: Plan, geometry: NetworkGeometry, *, max_voxels: int = MAX_VOXELS) -> None:
        self.engine = engine
        self.plan = plan
        self.geometry = geometry
        self.max_voxels = max_voxels

    def predict(self, volume: Volume) -> npt.NDArray[np.uint8]:
        """The mask of a scan: (X, Y, Z) uint8 label values on the scan's grid."""
        image, record = to_network_space(volume, self.plan)
        scores = softmax(self.logits(image))
        classes = scores_to_scan(scores, record)
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
        runtime: Literal["openvino", "onnx"] = "openvino",
        precision: Literal["f32", "auto"] = "f32",
    ) -> Predictor:
        """An exported model directory, its files checked against their hashes; needs no torch.

        Raises:
            DataError: a file is missing, damaged or changed.
        """
        network = verify(model_dir, RUNTIME_FILES[runtime]).network
        geometry = NetworkGeometry(stride=network.stride, depth_halo=network.depth_halo)
        engine: Engine
        if runtime == "onnx":
            engine = OnnxEngine(model_dir / "model.onnx")
        else:
            engine = OpenVINOEngine(model_dir / "model.xml", precision=precision)
        return cls(engine, Plan.load(model_dir / "plan.json"), geometry)
