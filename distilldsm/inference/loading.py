"""Make a Predictor from a model's files, or from several models that fit together and are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distilldsm.config import MirrorAxis
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json
from distilldsm.core.mapping import to_mapping
from distilldsm.data.plan import Plan
from distilldsm.inference.engines import Engine, OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.inference.predict import Predictor
from distilldsm.inference.probabilities import AXES, Ensemble, Member, Mirror, mirror_axes
from distilldsm.models.catalogue import model_directory
from distilldsm.models.package import (
    INT8_FILES,
    METADATA,
    RUNTIME_FILES,
    ModelMetadata,
    NetworkInfo,
    load_metadata,
    verify,
)

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork

Runtime = Literal["openvino", "onnx", "torch"]
Precision = Literal["f32", "auto", "int8"]


def load_trained(
    model_dir: Path,
    checkpoint: str = "last",
    *,
    device: str = "auto",
    ensemble: Sequence[Path] = (),
    mirror: Mirror = (),
) -> Predictor:
    """Load the network of a training directory (`models/foldK`) in PyTorch; it computes in float32 on a CPU.

    ensemble: further training directories of the same task; probabilities are averaged.
    mirror: average over flips along these axes; `trained`: along the axes of each model's training.

    Raises:
        DataError: a checkpoint is missing or does not fit, `trained` mirroring has no axes, or the models of an
            ensemble do not fit together.
    """
    import torch

    from distilldsm.models.checkpoint import load_network

    folders = [model_dir, *ensemble]
    axes = [mirror_axes(mirror, _trained_axes(folder), folder) for folder in folders]
    networks = [load_network(folder, checkpoint) for folder in folders]
    described = [_described(folder, network) for folder, network in zip(folders, networks, strict=True)]
    plan = _common_plan(folders, described)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    members = [Member(TorchEngine(network, device=device), own) for network, own in zip(networks, axes, strict=True)]
    return Predictor(Ensemble(members, activation=plan.targets.probabilities), plan, described=described)


def load_exported(
    model_dir: Path,
    *,
    runtime: Runtime = "openvino",
    precision: Precision = "f32",
    fixed_size: bool = False,
    ensemble: Sequence[Path] = (),
    mirror: Mirror = (),
    postprocess: bool = False,
) -> Predictor:
    """Load an exported model's directory and check its files against their hashes. Only engine `torch` needs torch.

    model_dir: the directory, or the name of an installed model (`distilldsm models`).

    precision: OpenVINO's precision: `f32`, `auto` (see `OpenVINOEngine`) or `int8` (the quantised IR).
    fixed_size: compile OpenVINO for each image size (half the memory, see `OpenVINOEngine`).
    ensemble: further models of the same task, e.g. other folds; probabilities are averaged.
    mirror: average over flips along these axes; `trained`: along the axes of each model's training.
    postprocess: keep only the largest component of the labels or regions that the model's export decided on; in an
        ensemble, of those that every model's export decided on.

    Raises:
        DataError: a file is missing, damaged or changed, the model has no INT8 IR, was not trained with mirroring
            or has no decision about post-processing, or the models of an ensemble do not fit together.
    """
    folders = [model_directory(folder) for folder in (model_dir, *ensemble)]
    metadata = [_metadata(folder, runtime, precision) for folder in folders]
    described = [one.network for one in metadata]
    plan = _common_plan(folders, described)
    axes = [mirror_axes(mirror, one.mirror_axes, folder) for one, folder in zip(described, folders, strict=True)]
    kept = common_postprocessing(folders, metadata) if postprocess else ()
    engines = [_engine(f, m, runtime, precision, fixed_size) for f, m in zip(folders, metadata, strict=True)]
    for folder, one, engine in zip(folders, metadata, engines, strict=True):
        _require_agreement(folder, one, engine)
    members = [Member(engine, own) for engine, own in zip(engines, axes, strict=True)]
    return Predictor(
        Ensemble(members, activation=plan.targets.probabilities),
        plan,
        described=described,
        metadata=metadata,
        keep_largest={name: plan.targets.largest[name] for name in kept},
    )


def _require_agreement(folder: Path, metadata: ModelMetadata, engine: Engine) -> None:
    """Check that plan, metadata and network speak of the same channels and labels.

    Raises:
        DataError: they do not; the message names the first that differs from the plan.
    """
    plan = Plan.load(folder / "plan.json")
    targets = plan.targets
    channels = (len(plan.channels), targets.channels)
    expected = {
        "labels": (metadata.targets, targets),
        "channels": ([one.name for one in metadata.channels], [one.name for one in plan.channels]),
        "shapes": ((metadata.inputs[0].shape[1:2], metadata.outputs[0].shape[1:2]), tuple((n,) for n in channels)),
        "network": (engine.channels, channels),
    }
    for name, (seen, planned) in expected.items():
        if seen != planned:
            raise DataError(
                "the model's files do not belong together",
                where=folder,
                seen=f"{name}: {to_mapping(seen)}",
                rule=f"{to_mapping(planned)}, as plan.json",
                hint="copy the whole model directory, or export the model again",
            )


def common_postprocessing(folders: Sequence[Path], metadata: Sequence[ModelMetadata]) -> tuple[str, ...]:
    """The labels or regions that keep only their largest component according to every model's own decision.

    Raises:
        DataError: a model has no decision.
    """
    for folder, one in zip(folders, metadata, strict=True):
        if one.postprocessing is None:
            raise DataError(
                "has no decision about post-processing",
                where=folder,
                seen="postprocessing: null",
                rule="the fold was evaluated before it was exported",
                hint="evaluate the fold, then export it again; or predict without --postprocess",
            )
    first, *others = [one.postprocessing or () for one in metadata]
    return tuple(label for label in first if all(label in other for other in others))


def _common_plan(folders: Sequence[Path], described: Sequence[NetworkInfo]) -> Plan:
    """The common plan of models with the same input image and the same output classes.

    Raises:
        DataError: two models do not fit together; the message names them and the first value that differs.
    """
    plans = [Plan.load(folder / "plan.json") for folder in folders]
    expected = _task(plans[0], described[0])
    for folder, plan, network in zip(folders[1:], plans[1:], described[1:], strict=True):
        for name, seen in _task(plan, network).items():
            if seen != expected[name]:
                raise DataError(
                    f"does not fit into the ensemble: it has another {name}",
                    where=folder,
                    seen=f"{name} {to_mapping(seen)}",
                    rule=f"{to_mapping(expected[name])}, as {folders[0]}",
                    hint="give models of the same preprocessed data, e.g. the folds of one cross-validation",
                )
    return plans[0]


def _task(plan: Plan, network: NetworkInfo) -> dict[str, Any]:
    return {
        "set of labels": list(zip(plan.class_names, plan.class_values, strict=True)),
        "set of regions": plan.regions,
        "set of channels": plan.channels,
        "depth axis": plan.depth_axis,
        "spacing in mm (depth, height, width)": plan.target_spacing_mm,
        "normalisation": plan.normalisation,
        "crop to non-zero": plan.crop_to_nonzero,
        "resampling (coarse slices)": plan.coarse_slices,
        # A network that sees the volume's ends would compute other logits with padding for a larger stride.
        "stride of the network": network.stride,
    }


def _described(model_dir: Path, network: SegmentationNetwork) -> NetworkInfo:
    from distilldsm.models.checkpoint import read_model_spec

    spec, cost = read_model_spec(model_dir), network.cost()
    return NetworkInfo(
        name=spec.name,
        options=spec.options,
        stride=network.stride,
        depth_halo=network.depth_halo,
        parameters=cost.parameters,
        macs_per_voxel=cost.macs_per_voxel,
    )


def _trained_axes(model_dir: Path) -> tuple[MirrorAxis, ...]:
    path = model_dir / "model.json"
    spec = read_json(path)
    axes = spec.get("mirror_axes", ()) if isinstance(spec, dict) else None
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, str) and axis in AXES for axis in axes):
        raise DataError("has invalid mirror_axes", where=path, seen=repr(axes)[:100], rule=f"some of {', '.join(AXES)}")
    return tuple(axes)


def _metadata(model_dir: Path, runtime: Runtime, precision: Precision) -> ModelMetadata:
    if not (runtime == "openvino" and precision == "int8"):
        return verify(model_dir, RUNTIME_FILES[runtime])
    metadata = load_metadata(model_dir)
    if not metadata.int8.shipped:
        raise DataError(
            "has no INT8 model",
            where=model_dir,
            seen=metadata.int8.reason,
            hint="use --precision auto, the fastest precision of this model",
        )
    return verify(model_dir, ("plan.json", *INT8_FILES))


def _engine(
    model_dir: Path, metadata: ModelMetadata, runtime: Runtime, precision: Precision, fixed_size: bool
) -> Engine:
    if runtime == "onnx":
        return OnnxEngine(model_dir / "model.onnx", metadata.network)
    if runtime == "openvino":
        path = model_dir / ("int8/model.xml" if precision == "int8" else "model.xml")
        computed: Literal["f32", "auto"] = "f32" if precision == "f32" else "auto"
        return OpenVINOEngine(path, metadata.network, precision=computed, fixed_size=fixed_size)
    from distilldsm.models.checkpoint import described_network, load_file

    described = metadata.network
    network = described_network(
        described.name, described.options, len(metadata.channels), metadata.targets.channels, where=model_dir / METADATA
    )
    return TorchEngine(load_file(network, model_dir / "model.safetensors"))
