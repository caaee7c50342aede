"""What the MONAI bundle of an exported model is run with: our geometry as MONAI transforms. Needs the package `monai`.

A case is a dictionary: `image`, the paths of its channels, becomes the image (C, D, H, W) in network space; `pred`, the
logits (K, D, H, W), becomes a mask on the scan's own grid. `geometry`, `scan` and `source` (JSON text, a path and a
name, which survive MONAI's collating) lead from one to the other.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.transforms import Transform

from distilldsm.core.errors import DataError
from distilldsm.core.mapping import from_mapping, to_mapping
from distilldsm.data.geometry import GeometryRecord, check_scale, mask_of, to_network_space
from distilldsm.data.plan import Plan
from distilldsm.inference.engines import TorchEngine
from distilldsm.inference.windows import MAX_VOXELS, predict_logits
from distilldsm.io import read_scan
from distilldsm.io.formats import read_file, write_mask
from distilldsm.io.inputs import find_inputs

Case = Mapping[Hashable, Any]


def list_scans(folder: str, channels: int) -> list[dict[str, Any]]:
    """The scans of a folder, named as `distilldsm predict` takes them: {"image": [a path per channel], "source": name}.

    Raises:
        DataError: none, or one that lacks a channel.
    """
    found, _ = find_inputs([Path(folder)], channels)
    for scan in found:
        if scan.format.name != "nifti":
            raise DataError("is no NIfTI scan", where=scan.name, hint="distilldsm predict reads DICOM")
    return [{"image": [str(p) for p in scan.paths], "source": scan.name} for scan in found]


def load_weights(network: torch.nn.Module, path: str) -> torch.nn.Module:
    """The network with the weights of a safetensors file, in evaluation mode."""
    from distilldsm.models.checkpoint import load_tensors
    from distilldsm.models.checkpoint import load_weights as load

    load(network, load_tensors(Path(path))[0], Path(path))  # type: ignore[arg-type]
    return network.eval()


class ToNetworkSpaced(Transform):
    """Paths of a scan to its image in network space: orientation, crop, normalisation and resampling of the plan.

    Raises (when called):
        DataError: what `distilldsm predict` refuses too: a damaged file, more or fewer channels than the plan has, or a
            geometry or voxel size that the network cannot know.
    """

    def __init__(self, plan: str) -> None:
        self.plan = Plan.load(plan)

    def __call__(self, data: Case) -> dict[Hashable, Any]:
        channels = [channel.name for channel in self.plan.channels]
        scan = read_scan([Path(path) for path in data["image"]], len(channels), names=channels)
        check_scale(scan, self.plan)
        image, record = to_network_space(scan, self.plan)
        geometry = json.dumps(to_mapping(record))
        return {**data, "image": torch.from_numpy(image), "geometry": geometry, "scan": str(scan.path)}


class VolumeInferer(Inferer):
    """Volumes of any size; along the depth in exact pieces where they are larger than `max_voxels`."""

    def __init__(self, max_voxels: int = MAX_VOXELS) -> None:
        super().__init__()
        self.max_voxels = max_voxels

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        engine = TorchEngine(network, device=str(inputs.device))
        images = inputs.cpu().numpy().astype(np.float32)
        logits = [predict_logits(engine, image, max_voxels=self.max_voxels) for image in images]
        return torch.from_numpy(np.stack(logits)).to(inputs.device)


class SaveMaskd(Transform):
    """Logits to a mask on the scan's own grid, written as `output_dir/NAME.nii.gz`; `pred` becomes it, (X, Y, Z)."""

    def __init__(self, plan: str, output_dir: str) -> None:
        self.plan, self.output = Plan.load(plan), Path(output_dir)

    def __call__(self, data: Case) -> dict[Hashable, Any]:
        record = from_mapping(GeometryRecord, json.loads(data["geometry"]))
        logits = np.asarray(data["pred"].cpu(), dtype=np.float32)
        mask = mask_of(self.plan.targets.probabilities(logits), record, self.plan)
        self.output.mkdir(parents=True, exist_ok=True)
        write_mask(self.output / f"{data['source']}.nii.gz", mask, read_file(Path(data["scan"])))
        return {**data, "pred": torch.from_numpy(mask)}
