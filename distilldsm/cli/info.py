"""`distilldsm info`: facts about an exported model, the networks or the installation."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", nargs="?", help="an exported model; checks its files too")
    parser.add_argument("--models", action="store_true", help="list the networks and their options")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Print facts about a model directory, the networks or the installation."""
    from distilldsm.config.networks import MODELS
    from distilldsm.core.mapping import to_mapping

    if args.model_dir is not None:
        from distilldsm.models.catalogue import model_directory
        from distilldsm.models.package import verify

        metadata = verify(model_directory(args.model_dir))
        if args.json:
            print(json.dumps(to_mapping(metadata), indent=2))
        else:
            _print_model(metadata)
    elif args.models:
        if args.json:
            print(
                json.dumps(
                    {name: {"summary": e.summary, "options": dict(e.options)} for name, e in MODELS.items()}, indent=2
                )
            )
            return
        for name, entry in MODELS.items():
            options = ", ".join(f"{key}={value}" for key, value in entry.options.items())
            print(f"{name:14}{entry.summary}\n{'':14}options: {options}")
    else:
        from distilldsm.core.hashes import package_versions

        facts = {"python": sys.version.split()[0], **package_versions()}
        if args.json:
            print(json.dumps({"packages": facts, "models": list(MODELS)}, indent=2))
            return
        for name, version in facts.items():
            print(f"{name:20}{version}")


def _print_model(metadata: Any) -> None:
    network, data = metadata.network, metadata.data
    options = ", ".join(f"{key}={value}" for key, value in network.options.items())
    rows = [
        ("name", metadata.name),
        ("use", metadata.intended_use),
        ("network", f"{network.name}({options}), {network.parameters:,} parameters"),
        ("cost", f"{network.macs_per_voxel:,.0f} convolution MACs per voxel"),
        ("channels", "; ".join(f"{c.name} ({c.modality}, {c.normalisation})" for c in metadata.channels)),
        ("labels", ", ".join(f"{value} {label}" for label, value in metadata.labels.items())),
        ("regions", metadata.targets.describe_regions()),
        ("trained on", f"{data.name}, without fold {metadata.fold}, checkpoint {metadata.checkpoint}"),
        ("licence", data.licence),
        ("reference", data.reference),
        ("note", data.note),
        ("weights", f"float32 (ONNX), {metadata.openvino_weights} (OpenVINO)"),
        ("INT8", f"{'shipped' if metadata.int8.shipped else 'not shipped'}: {metadata.int8.reason}"),
        ("mirroring", ", ".join(network.mirror_axes) or "none in training"),
        ("postprocess", _postprocessing(metadata)),
        ("files", f"{len(metadata.files)}, unchanged since the export"),
    ]
    for key, value in rows:
        if value:
            print(f"{key:12}{value}")


def _postprocessing(metadata: Any) -> str:
    from distilldsm.data.targets import LARGEST_NOT_TRIED

    largest_only = metadata.postprocessing
    if largest_only is None:
        return "not decided (exported without an evaluation)"
    if not metadata.targets.largest:
        return f"none: {LARGEST_NOT_TRIED}"
    return f"largest component of {', '.join(largest_only)}" if largest_only else "none: it brought no improvement"
