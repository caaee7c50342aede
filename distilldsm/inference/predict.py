"""From a scan to a mask in the scan's own geometry, with any engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from distilldsm.config import MirrorAxis
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json
from distilldsm.data.geometry import scores_to_scan, to_network_space
from distilldsm.data.plan import Plan
from distilldsm.inference.engines import Engine, OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.inference.ensemble import check_same_task, common_postprocessing
from distilldsm.inference.postprocess import keep_largest
from distilldsm.inference.scores import AXES, Member, Mirror, Scorer, mirror_axes
from distilldsm.inference.windows import MAX_VOXELS, STREAM_SLICES, predict_logits, predict_scores
from distilldsm.io import Volume
from distilldsm.models.package import INT8_FILES, METADATA, RUNTIME_FILES, ModelMetadata, load_metadata, verify

Runtime = Literal["openvino", "onnx", "torch"]
Precision = Literal["f32", "auto", "int8"]


@dataclass(frozen=True, kw_only=True)
class NetworkGeometry:
    """What prediction must know of a network besides its weights."""

    stride: tuple[int, int, int]
    depth_halo: int | None


class Predictor:
    """A trained model, or an ensemble, ready for scans.

    Args:
        engine: runs the network.
        plan: how scans are brought into network space.
        geometry: the network's stride and depth reach.
        max_voxels: largest piece that goes through the network at once.
        metadata: of the exported models, those of the first one first.
        scorer: how scores are computed; by default by `engine` alone.
        keep_largest: labels or regions, with their values, of which masks keep the largest connected component only.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        geometry: NetworkGeometry,
        *,
        max_voxels: int = MAX_VOXELS,
        metadata: Sequence[ModelMetadata] = (),
        scorer: Scorer | None = None,
        keep_largest: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.geometry = geometry
        self.max_voxels = max_voxels
        self.models = tuple(metadata)
        self.scorer = scorer or Scorer([Member(engine)], activation=plan.targets.scores)
        self.keep_largest = dict(keep_largest or {})

    @property
    def metadata(self) -> ModelMetadata | None:
        """Of an exported model; of the first one of an ensemble."""
        return self.models[0] if self.models else None

    def predict(self, volume: Volume) -> npt.NDArray[np.uint8]:
        """The mask of a scan: (X, Y, Z) uint8 label values on the scan's grid."""
        image, record = to_network_space(volume, self.plan)
        scores = predict_scores(
            self.scorer,
            image,
            stride=self.geometry.stride,
            depth_halo=self.geometry.depth_halo,
            max_voxels=self.max_voxels,
            single=self.scorer.single,
        )
        classes = scores_to_scan(scores, record, self.plan.targets)
        mask = np.array(self.plan.class_values, dtype=np.uint8)[classes]
        for values in self.keep_largest.values():
            keep_largest(mask, values)
        return mask

    def logits(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (K, D, H, W) of an image (C, D, H, W) in network space: of the (first) network, not averaged."""
        return predict_logits(
            self.engine,
            image,
            stride=self.geometry.stride,
            depth_halo=self.geometry.depth_halo,
            max_voxels=self.max_voxels,
        )

    def stream_bytes(self, padded: Sequence[int]) -> int | None:
        """Features kept while a volume of padded size (D, H, W) is streamed by OpenVINO; None where it cannot be."""
        halo, engine = self.geometry.depth_halo, self.scorer.single
        if not (halo and self.geometry.stride[0] == 1 and isinstance(engine, OpenVINOEngine)):
            return None
        return engine.stream_bytes((1, len(self.plan.channels), STREAM_SLICES, padded[1], padded[2]), lag=halo)

    @classmethod
    def from_training(
        cls,
        model_dir: Path,
        checkpoint: str = "last",
        *,
        device: str = "auto",
        ensemble: Sequence[Path] = (),
        mirror: Mirror = (),
    ) -> Predictor:
        """The network of a training directory (`models/foldK`) in PyTorch, float32 on a CPU.

        ensemble: further training directories of the same task; scores are averaged.
        mirror: axes to average over the flips of; `trained`: those that each model was trained with.

        Raises:
            DataError: a checkpoint is missing or does not fit, mirroring is wanted that was not trained with, or models
                of an ensemble do not fit together.
        """
        import torch

        from distilldsm.models.checkpoint import load_network

        folders = [model_dir, *ensemble]
        axes = [mirror_axes(mirror, _trained_axes(folder), folder) for folder in folders]
        networks = [load_network(folder, checkpoint) for folder in folders]
        plans = [Plan.load(folder / "plan.json") for folder in folders]
        geometry = _common_geometry(
            folders, plans, [NetworkGeometry(stride=n.stride, depth_halo=n.depth_halo) for n in networks]
        )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engines = [TorchEngine(network, device=device) for network in networks]
        members = [Member(engine, own) for engine, own in zip(engines, axes, strict=True)]
        return cls(engines[0], plans[0], geometry, scorer=Scorer(members, activation=plans[0].targets.scores))

    @classmethod
    def from_export(
        cls,
        model_dir: Path,
        *,
        runtime: Runtime = "openvino",
        precision: Precision = "f32",
        fixed_size: bool = False,
        ensemble: Sequence[Path] = (),
        mirror: Mirror = (),
        postprocess: bool = False,
    ) -> Predictor:
        """An exported model directory, its files checked against their hashes; only `torch` needs torch.

        precision: of OpenVINO: `f32`, `auto` (see `OpenVINOEngine`) or `int8`, the quantised IR.
        fixed_size: compile OpenVINO for each size that comes (half the memory, see `OpenVINOEngine`).
        ensemble: further models of the same task, e.g. other folds; scores are averaged.
        mirror: axes to average over the flips of; `trained`: those that each model was trained with.
        postprocess: keep the largest component of the labels or regions for which the model was exported with that
            decision; of an ensemble, of those for which every model was.

        Raises:
            DataError: a file is missing, damaged or changed, the model has no INT8 IR, was not trained with mirroring
                or carries no decision on post-processing; models of an ensemble do not fit together.
        """
        folders = [model_dir, *ensemble]
        found = [_metadata(folder, runtime, precision) for folder in folders]
        plans = [Plan.load(folder / "plan.json") for folder in folders]
        geometry = _common_geometry(
            folders,
            plans,
            [NetworkGeometry(stride=n.stride, depth_halo=n.depth_halo) for n in (m.network for m in found)],
        )
        axes = [mirror_axes(mirror, m.network.mirror_axes, f) for f, m in zip(folders, found, strict=True)]
        kept = common_postprocessing(list(zip(folders, found, strict=True))) if postprocess else ()
        engines = [_engine(f, m, runtime, precision, fixed_size) for f, m in zip(folders, found, strict=True)]
        return cls(
            engines[0],
            plans[0],
            geometry,
            metadata=found,
            scorer=Scorer(
                [Member(engine, own) for engine, own in zip(engines, axes, strict=True)],
                activation=plans[0].targets.scores,
            ),
            keep_largest={name: plans[0].targets.largest[name] for name in kept},
        )


def _common_geometry(
    folders: Sequence[Path], plans: Sequence[Plan], geometries: Sequence[NetworkGeometry]
) -> NetworkGeometry:
    """Of networks that are averaged: the stride of all and the longest reach; DataError where they do not fit."""
    first, *others = [(f, p, g.stride) for f, p, g in zip(folders, plans, geometries, strict=True)]
    for other in others:
        check_same_task(first, other)
    halos = [geometry.depth_halo for geometry in geometries]
    reach = None if None in halos else max(halo for halo in halos if halo is not None)
    return NetworkGeometry(stride=geometries[0].stride, depth_halo=reach)


def _trained_axes(model_dir: Path) -> tuple[MirrorAxis, ...]:
    path = model_dir / "model.json"
    spec = read_json(path)
    axes = spec.get("mirror_axes", ()) if isinstance(spec, dict) else None
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, str) and axis in AXES for axis in axes):
        raise DataError(
            "describes no network", where=path, seen=repr(axes)[:100], rule=f"mirror_axes: some of {', '.join(AXES)}"
        )
    return tuple(axes)


def _metadata(model_dir: Path, runtime: Runtime, precision: Precision) -> ModelMetadata:
    if runtime == "openvino" and precision == "int8":
        return _require_int8(model_dir)
    return verify(model_dir, RUNTIME_FILES[runtime])


def _engine(
    model_dir: Path, metadata: ModelMetadata, runtime: Runtime, precision: Precision, fixed_size: bool
) -> Engine:
    if runtime == "onnx":
        return OnnxEngine(model_dir / "model.onnx")
    if runtime == "torch":
        return _exported_network(model_dir, metadata)
    name = "int8/model.xml" if precision == "int8" else "model.xml"
    return OpenVINOEngine(model_dir / name, precision="f32" if precision == "f32" else "auto", fixed_size=fixed_size)


def _require_int8(model_dir: Path) -> ModelMetadata:
    metadata = load_metadata(model_dir)
    if not metadata.int8.shipped:
        raise DataError(
            "has no INT8 model",
            where=model_dir,
            seen=metadata.int8.reason,
            hint="--precision auto is the fastest it has",
        )
    return verify(model_dir, ("plan.json", *INT8_FILES))


def _exported_network(model_dir: Path, metadata: ModelMetadata) -> TorchEngine:
    from distilldsm.models.checkpoint import described_network, load_tensors, load_weights

    path = model_dir / "model.safetensors"
    described = metadata.network
    network = described_network(
        described.name, described.options, len(metadata.channels), metadata.targets.channels, where=model_dir / METADATA
    )
    load_weights(network, load_tensors(path)[0], path)
    return TorchEngine(network)
