"""Turn a training directory into the directory of an exported model (models/package.py lists its files)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distilldsm.config import Int8Config
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.hashes import package_versions
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.splits import check_held_out, load_fold
from distilldsm.data.training_distribution import DISTRIBUTION, distribution_of_fold
from distilldsm.export import parity
from distilldsm.export.card import model_card
from distilldsm.export.int8 import make_int8
from distilldsm.export.monai_bundle import write_monai_bundle
from distilldsm.export.onnx_export import INPUT, OUTPUT, export_onnx
from distilldsm.export.openvino_export import export_openvino
from distilldsm.export.scores import Scores
from distilldsm.export.serving import inference_service, to_yaml
from distilldsm.inference.engines import Engine, NetworkFacts, OnnxEngine, OpenVINOEngine, TorchEngine
from distilldsm.models.package import (
    HASHED_FILES,
    INT8_DECISION,
    INT8_FILES,
    INTENDED_USE,
    METADATA,
    SERVICE,
    ChannelInfo,
    DataInfo,
    ModelMetadata,
    NetworkInfo,
    TensorInfo,
    model_name,
)

PARITY_SIZES = 3
"""The exported models are compared on volumes of at least this many different sizes."""
_SCHEMES: Mapping[str, str] = {
    "zscore": "z-score of the non-zero voxels",
    "zscore_foreground": "z-score of the non-zero voxels, zero stays zero",
    "none": "none",
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """The result of `build_package`."""

    metadata: ModelMetadata
    summary: Mapping[str, Mapping[str, float]]
    """Parity per runtime, see `parity.summary`."""


def build_package(
    model_dir: Path,
    preprocessed: Path,
    output: Path,
    *,
    fold: int,
    checkpoint: str = "last",
    parity_cases: int = 3,
    max_voxel_difference: float = 1e-4,
    int8: Int8Config | None = None,
    postprocessing: tuple[str, ...] | None = None,
    scores: Scores | None = None,
) -> Built:
    """Export a trained network into the empty directory `output`, and compare the export with the network.

    The IR stores its weights in half precision, or in float32 if half precision alone changes more voxels than
    allowed. An INT8 IR is added if it is clearly faster and as accurate (see int8.py); by default none is made.
    `postprocessing` is copied into the metadata, `scores` into the card.

    Raises:
        DataError: an input is missing or damaged, or belongs to another fold or plan than the model.
        UserError: an exported model differs from the network in more voxels than `max_voxel_difference` allows.
    """
    from distilldsm.models.checkpoint import load_network

    spec = read_json(model_dir / "model.json")
    check_held_out(model_dir, preprocessed / "splits.json", fold)
    plan = _common_plan(model_dir, preprocessed)
    index = DatasetIndex.load(preprocessed)
    training, held_out = load_fold(preprocessed / "splits.json", fold)
    network = load_network(model_dir, checkpoint)
    described = _network_info(spec, network.depth_halo)  # the halo of the built network, not of the file

    export_onnx(network, output / "model.onnx")
    shutil.copyfile(model_dir / f"{checkpoint}.safetensors", output / "model.safetensors")
    plan.save(output / "plan.json")
    write_json(output / DISTRIBUTION, distribution_of_fold(preprocessed, training, plan))

    compare = partial(
        parity.compare,
        TorchEngine(network),
        preprocessed=preprocessed,
        case_ids=parity.choose_cases(preprocessed, held_out, parity_cases),
        targets=plan.targets,
        sizes=PARITY_SIZES,
        remembered={},
    )
    rows, weights = _agreeing_ir(network, output, compare, max_voxel_difference)
    ir, quantised_ir = output / "model.xml", output / "int8" / "model.xml"
    quantised_ir.parent.mkdir()
    quantised = make_int8(
        ir,
        quantised_ir,
        preprocessed,
        config=int8 or Int8Config(enabled=False),
        training_cases=training,
        held_out=held_out,
        network=described,
        plan=plan,
    )
    write_json(output / INT8_DECISION, quantised)
    # These are faster, but some labels differ. The differences are reported; Dice decides.
    faster: dict[str, Engine] = {"openvino-auto": OpenVINOEngine(ir, network, precision="auto")}
    if quantised.shipped:
        faster["openvino-int8"] = OpenVINOEngine(quantised_ir, network, precision="auto")
    rows += compare(faster)

    summary = parity.summary(rows)
    write_json(output / "parity.json", parity.report(rows, max_voxel_difference, weights, quantised))
    write_json(output / "metrics.json", _metrics(summary, output))
    metadata = _metadata(spec, described, plan, index, weights, fold=fold, checkpoint=checkpoint)
    metadata = replace(metadata, int8=quantised, postprocessing=postprocessing)
    return Built(metadata=_write_documents(metadata, plan, summary, scores, output), summary=summary)


def _agreeing_ir(
    network: NetworkFacts, output: Path, compare: Callable[..., list[parity.CaseParity]], limit: float
) -> tuple[list[parity.CaseParity], Literal["FP16", "FP32"]]:
    """Write the IR with the smallest weights that agree with the network; returns the comparisons and the weights.

    Raises:
        UserError: the ONNX model, or the IR with weights in float32, differs in more voxels than `limit` allows.
    """
    onnx, ir = output / "model.onnx", output / "model.xml"
    export_openvino(onnx, ir, fp16=True)
    weights: Literal["FP16", "FP32"] = "FP16"
    rows = compare({"onnx": OnnxEngine(onnx, network), "openvino": OpenVINOEngine(ir, network)})
    if any(row.runtime == "openvino" for row in parity.beyond_limit(rows, limit)):
        export_openvino(onnx, ir, fp16=False)
        weights = "FP32"
        rows = [row for row in rows if row.runtime != "openvino"]
        rows += compare({"openvino": OpenVINOEngine(ir, network)})
    parity.require_parity(rows, limit)
    return rows, weights


def _write_documents(
    metadata: ModelMetadata,
    plan: Plan,
    summary: Mapping[str, Mapping[str, float]],
    scores: Scores | None,
    output: Path,
) -> ModelMetadata:
    """Write the card, the service, the bundle and the metadata; returns these with the hashes of all files."""
    card = model_card(metadata, plan_spacing_mm=plan.target_spacing_mm, summary=summary, scores=scores)
    (output / "README.md").write_text(card, encoding="utf-8")
    weights = "model.safetensors"
    known = replace(metadata, files={weights: sha256_file(output / weights)})
    (output / SERVICE).write_text(to_yaml(inference_service(known)), encoding="utf-8")
    bundle = write_monai_bundle(output, metadata, plan)
    hashed = (*HASHED_FILES, *(INT8_FILES if metadata.int8.shipped else ()), *bundle)
    metadata = replace(metadata, files={name: sha256_file(output / name) for name in hashed})
    write_json(output / METADATA, metadata)
    return metadata


def describe_normalisation(rule: Normalisation) -> str:
    """A normalisation in words."""
    if rule.scheme == "ct":
        return f"clipped to [{rule.low:g}, {rule.high:g}], minus {rule.mean:g}, divided by {rule.sd:g}"
    return _SCHEMES[rule.scheme]


def _common_plan(model_dir: Path, preprocessed: Path) -> Plan:
    plan = Plan.load(model_dir / "plan.json")
    if Plan.load(preprocessed / "plan.json") != plan:
        raise DataError(
            "is not the plan the model was trained with",
            where=preprocessed / "plan.json",
            rule=f"equal to {model_dir / 'plan.json'}",
            hint="train again on this data (dvc repro)",
        )
    return plan


def _network_info(spec: Mapping[str, Any], depth_halo: int | None) -> NetworkInfo:
    d, h, w = spec["stride"]
    return NetworkInfo(
        name=spec["name"],
        options=spec["options"],
        stride=(d, h, w),
        depth_halo=depth_halo,
        parameters=spec["parameters"],
        macs_per_voxel=spec["macs_per_voxel"],
        mirror_axes=tuple(spec.get("mirror_axes", ())),
    )


def _metadata(
    spec: Mapping[str, Any],
    network: NetworkInfo,
    plan: Plan,
    index: DatasetIndex,
    weights: Literal["FP16", "FP32"],
    *,
    fold: int,
    checkpoint: str,
) -> ModelMetadata:
    channels, classes = int(spec["in_channels"]), int(spec["out_channels"])
    return ModelMetadata(
        name=model_name(index.name),
        intended_use=INTENDED_USE,
        inputs=(TensorInfo(name=INPUT, shape=(1, channels, None, None, None), multiple_of=network.stride),),
        outputs=(TensorInfo(name=OUTPUT, shape=(1, classes, None, None, None), multiple_of=network.stride),),
        channels=tuple(
            ChannelInfo(name=c.name, modality=c.modality, normalisation=describe_normalisation(rule))
            for c, rule in zip(plan.channels, plan.normalisation, strict=True)
        ),
        labels=dict(zip(plan.class_names, plan.class_values, strict=True)),
        regions=plan.regions,
        network=network,
        openvino_weights=weights,
        data=DataInfo(
            name=index.name, licence=index.licence, reference=index.reference, source=index.source, note=index.note
        ),
        fold=fold,
        checkpoint=checkpoint,
        files={},
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    import importlib.metadata

    return package_versions() | {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript")}


def _metrics(summary: Mapping[str, Mapping[str, float]], output: Path) -> dict[str, Any]:
    """Numbers for `dvc metrics show`."""
    network_seconds = max(row["seconds_per_mvoxel_network"] for row in summary.values())
    return {
        "max_logit_difference": {name: row["max_logit_difference"] for name, row in summary.items()},
        "voxel_difference": {name: row["voxel_difference"] for name, row in summary.items()},
        "dice_difference": {name: row["dice_difference"] for name, row in summary.items()},
        "seconds_per_mvoxel": {
            parity.NETWORK: round(network_seconds, 4),
            **{name: round(row["seconds_per_mvoxel"], 4) for name, row in summary.items()},
        },
        "size_mb": {
            "onnx": _megabytes(output / "model.onnx"),
            "openvino": _megabytes(output / "model.xml", output / "model.bin"),
        },
    }


def _megabytes(*paths: Path) -> float:
    return round(sum(p.stat().st_size for p in paths) / 1e6, 3)
