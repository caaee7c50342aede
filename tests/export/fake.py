"""A trained model that nobody trained: random weights in the files that the train stage would have written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from distilldsm.config import ExportConfig, Int8Config, PreprocessConfig
from distilldsm.core.files import sha256_file, write_json
from distilldsm.data.preprocess import preprocess_dataset
from distilldsm.data.targets import Targets
from distilldsm.models import build_model
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.checkpoint import save_tensors
from distilldsm.models.package import NetworkInfo
from tests.data.volumes import write_dataset

FOLD = 1
CHANNELS = 2
CLASSES = 3
NETWORK = NetworkInfo(
    name="distill_dsm", options={}, stride=(1, 1, 1), depth_halo=8, parameters=1000, macs_per_voxel=1.0
)
"""What engines must know of the exported network."""
TARGETS = Targets(("background", "a", "b"), (0, 1, 2))


@dataclass(frozen=True)
class Exported:
    """Directories of one exported model; shared by many tests, so nobody writes into them."""

    raw: Path
    preprocessed: Path
    model: Path
    export: Path


def random_network(name: str, *, seed: int = 0, **options) -> SegmentationNetwork:
    """A network in evaluation mode whose norms are not the identity and whose logits differ from voxel to voxel."""
    torch.manual_seed(seed)
    network = build_model(name, in_channels=CHANNELS, out_channels=CLASSES, **options)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.05, 0.2)
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
                module.weight.uniform_(0.8, 1.2)
                module.bias.uniform_(-0.2, 0.2)
        getattr(network, "network", network).head.weight.mul_(5)
    return network.eval()


def write_model(directory: Path, preprocessed: Path, *, name: str = "distill_dsm", fold: int = FOLD, **options) -> None:
    """What the train stage leaves, as far as later stages read it."""
    directory.mkdir(parents=True)
    network = random_network(name, **options)
    cost = network.cost()
    save_tensors(directory / "last.safetensors", network.state_dict(), {"epoch": 2})
    (directory / "plan.json").write_bytes((preprocessed / "plan.json").read_bytes())
    write_json(
        directory / "model.json",
        {
            "schema_version": 1,
            "name": name,
            "options": options,
            "in_channels": CHANNELS,
            "out_channels": CLASSES,
            "stride": network.stride,
            "depth_halo": network.depth_halo,
            "parameters": cost.parameters,
            "macs_per_voxel": cost.macs_per_voxel,
            "fold": fold,
            "splits": sha256_file(preprocessed / "splits.json"),
            "epochs": 2,
            "best_val_dice": 0.5,
            "labels": {"background": 0, "shell": 1, "core": 2},
        },
    )


def exported(tmp_path_factory) -> Exported:
    """The shared model, exported by the real stage once per test run (tracing takes many seconds)."""
    from distilldsm.components.export import run

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root = base / "shared-export"
    found = Exported(root / "raw", root / "preprocessed", root / "models/fold1", root / "export/fold1")
    with FileLock(base / "shared-export.lock"):
        if not found.export.exists():
            index = write_dataset(found.raw, cases=10, channels=CHANNELS)
            preprocess_dataset(found.raw, index, PreprocessConfig(folds=2, workers=1), _made(found.preprocessed))
            write_model(found.model, found.preprocessed, width=0.5, alpha=0.5)
            run(
                # INT8 always comes with it: whether it is worth it is a matter of timing.
                ExportConfig(parity_cases=3, int8=Int8Config(min_speedup=1e-3, max_dice_loss=1.0)),
                {"model": found.model, "preprocessed": found.preprocessed},
                {"export": found.export},
                fold=FOLD,
            )
    return found


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
