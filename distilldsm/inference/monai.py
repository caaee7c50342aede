"""MONAI transforms with our geometry, for the MONAI bundle of an exported model. Needs the package `monai`.

A case is a dictionary. `image` holds the paths of the channels and becomes the image (C, D, H, W) in network space.
`pred` holds the logits (K, D, H, W) and becomes a mask on the scan's own grid. `geometry` (JSON text), `scan` (a path)
and `source` (a name) carry what the way back needs; MONAI's collation does not change them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from distilldsm.models.base import SegmentationNetwork

Case = Mapping[Hashable, Any]


def list_scans(folder: str, channels: int) -> list[dict[str, Any]]:
    """The scans of a folder with names as for `distilldsm predict`: {"image": [a path per channel], "source": name}.

    Raises:
        DataError: the folder has no scan, or a scan without one of its channels.
    """
    scans, *_ = find_inputs([Path(folder)], channels)
    for scan in scans:
        if scan.format.name != "nifti":
            raise DataError("is not a NIfTI scan", where=scan.name, hint="use distilldsm predict, which reads DICOM")
    return [{"image": [str(p) for p in scan.paths], "source": scan.name} for scan in scans]


def load_weights(network: SegmentationNetwork, path: str) -> SegmentationNetwork:
    """The network with the weights of a safetensors file, in evaluation mode."""
    from distilldsm.models.checkpoint import load_file

    return load_file(network, Path(path))


class ToNetworkSpaced(Transform):
    """Read a scan and bring it to network space with the plan's orientation, crop, normalisation and resampling.

    Raises (when called):
        DataError: as in `distilldsm predict`: a damaged file, another number of channels than in the plan, a refused
            geometry, or a voxel size far from the training scans'.
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
    """Run the network on volumes of any size, in exact pieces along the depth if larger than `max_voxels`."""

    def __init__(self, max_voxels: int = MAX_VOXELS) -> None:
        super().__init__()
        self.max_voxels = max_voxels

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        engine = TorchEngine(network, device=str(inputs.device))
        images = inputs.cpu().numpy().astype(np.float32)
        logits = [predict_logits(engine, image, max_voxels=self.max_voxels) for image in images]
        return torch.from_numpy(np.stack(logits)).to(inputs.device)


class SaveMaskd(Transform):
    """Turn logits into a mask (X, Y, Z) on the scan's own grid, in `pred`, and write `output_dir/NAME.nii.gz`."""

    def __init__(self, plan: str, output_dir: str) -> None:
        self.plan, self.output = Plan.load(plan), Path(output_dir)

    def __call__(self, data: Case) -> dict[Hashable, Any]:
        record = from_mapping(GeometryRecord, json.loads(data["geometry"]))
        logits = np.asarray(data["pred"].cpu(), dtype=np.float32)
        mask = mask_of(self.plan.targets.probabilities(logits), record, self.plan)
        self.output.mkdir(parents=True, exist_ok=True)
        write_mask(self.output / f"{data['source']}.nii.gz", mask, read_file(Path(data["scan"])))
        return {**data, "pred": torch.from_numpy(mask)}
