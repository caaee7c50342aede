"""The exported model as a MONAI bundle: a folder that MONAI's own bundle runner executes.

Layout and metadata follow MONAI's bundle specification (configs/, models/, docs/, LICENSE). Pre- and post-processing
follow the plan (distilldsm/inference/monai.py), so the masks are the same as those of `distilldsm predict`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distilldsm.core.files import write_json
from distilldsm.core.text import markdown
from distilldsm.core.version import __version__
from distilldsm.data.plan import Plan
from distilldsm.models.package import MONAI_BUNDLE, ModelMetadata

MONAI_VERSION = "1.5.0"
"""The oldest supported version of MONAI."""
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
RUN = (
    "python -m monai.bundle run --bundle_root . --meta_file configs/metadata.json --config_file configs/inference.json "
    "--dataset_dir SCANS --output_dir MASKS"
)


def write_monai_bundle(export: Path, metadata: ModelMetadata, plan: Plan) -> list[str]:
    """Write `monai_bundle/` into an exported model's directory; return the paths of its files, relative to `export`."""
    root = export / MONAI_BUNDLE
    for folder in ("configs", "models", "docs"):
        (root / folder).mkdir(parents=True)
    write_json(root / "configs/metadata.json", _inert(_metadata(metadata)))
    write_json(root / "configs/inference.json", _inference(metadata))
    plan.save(root / "configs/plan.json")
    shutil.copyfile(export / "model.safetensors", root / "models/model.safetensors")
    (root / "docs/README.md").write_text(_readme(metadata), encoding="utf-8")
    (root / "LICENSE").write_text(_licence(metadata), encoding="utf-8")
    return sorted(str(path.relative_to(export)) for path in root.rglob("*") if path.is_file())


def _inert(value: Any) -> Any:
    """Return the value without text that MONAI would evaluate ($), look up (@) or read from a file (%).

    Names, licence and reference come from the data set, so its author could put such text there.
    """
    if isinstance(value, dict):
        return {key: _inert(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_inert(inner) for inner in value]
    return f" {value}" if isinstance(value, str) and value[:1] in ("$", "@", "%") else value


def _metadata(model: ModelMetadata) -> dict[str, Any]:
    """Bundle metadata in the form of MONAI's schema."""
    versions = dict(model.versions)
    d, h, w = model.network.stride
    image: dict[str, Any] = {
        "type": "image",
        "format": "magnitude" if any(c.modality != "CT" for c in model.channels) else "hounsfield",
        "modality": "/".join(dict.fromkeys(c.modality for c in model.channels)),
        "num_channels": len(model.channels),
        "spatial_shape": [f"{d}*n", f"{h}*n", f"{w}*n"],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(k): c.name for k, c in enumerate(model.channels)},
    }
    output = {**image, "format": "segmentation", "num_channels": model.targets.channels, "channel_def": {}}
    output["channel_def"] = {str(k): name for k, name in enumerate(model.targets.channel_names)}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": MONAI_VERSION,
        "pytorch_version": versions.get("torch", "2.6.0").split("+")[0],
        "numpy_version": versions.get("numpy", "2.0.0"),
        "required_packages_version": {
            "distilldsm": __version__,
            "nibabel": versions.get("nibabel", "5.3.0"),
            "safetensors": versions.get("safetensors", "0.5.0"),
            "pytorch-ignite": "0.5.0",
        },
        "name": model.name,
        "task": f"segmentation of {', '.join(name for name, value in model.labels.items() if value)}",
        "description": f"{model.network.name}, {model.network.parameters:,} parameters, trained on {model.data.name}",
        "authors": "",
        "copyright": f"weights: the licence of the data applies, {model.data.licence}",
        "data_source": model.data.source,
        "data_type": "nifti",
        "image_classes": ", ".join(c.name for c in model.channels),
        "label_classes": ", ".join(f"{value} {name}" for name, value in model.labels.items()),
        "pred_classes": ", ".join(f"{value} {name}" for name, value in model.labels.items()),
        "eval_metrics": {},
        "intended_use": model.intended_use,
        "references": [model.data.reference],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": output}},
    }


def _inference(model: ModelMetadata) -> dict[str, Any]:
    """The workflow for MONAI's runner; names follow MONAI's own bundles."""
    network = model.network
    return {
        "imports": [
            "$import torch",
            "$from distilldsm.inference.monai import list_scans",
            "$from distilldsm.inference.monai import load_weights",
        ],
        "bundle_root": ".",
        "dataset_dir": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "plan": "$@bundle_root + '/configs/plan.json'",
        "datalist": f"$list_scans(@dataset_dir, {len(model.channels)})",
        "network_def": {
            "_target_": "distilldsm.models.build_model",
            "name": network.name,
            "in_channels": len(model.channels),
            "out_channels": model.targets.channels,
            **_inert(dict(network.options)),
        },
        "network": "$load_weights(@network_def, @bundle_root + '/models/model.safetensors').to(@device)",
        "preprocessing": {"_target_": "distilldsm.inference.monai.ToNetworkSpaced", "plan": "@plan"},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {"_target_": "distilldsm.inference.monai.VolumeInferer"},
        "postprocessing": {
            "_target_": "distilldsm.inference.monai.SaveMaskd",
            "plan": "@plan",
            "output_dir": "@output_dir",
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _readme(model: ModelMetadata) -> str:
    return (
        f"# {markdown(model.name)} as a MONAI bundle\n\n"
        f"Intended use: **{model.intended_use}**. With `distilldsm[monai]` installed, in "
        f"this folder:\n\n    {RUN}\n\n"
        "SCANS holds NIfTI files (NAME.nii.gz, or NAME_0000.nii.gz and so on for several channels); the masks lie on "
        "the scans' own grids. The model card is in the directory above.\n"
    )


def _licence(model: ModelMetadata) -> str:
    return (
        "Code: Apache License 2.0.\n"
        f"Weights: trained on {model.data.name}, whose licence is: {model.data.licence}. It may bind what is done with "
        "them.\n"
    )
