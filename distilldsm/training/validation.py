"""Dice of whole held-out volumes in network space, while training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from distilldsm.data.patches import open_array
from distilldsm.inference.engines import TorchEngine
from distilldsm.inference.windows import predict_logits
from distilldsm.models.base import SegmentationNetwork
from distilldsm.training.distributed import Processes


def validate(
    network: SegmentationNetwork,
    preprocessed: Path,
    case_ids: Sequence[str],
    class_names: Sequence[str],
    *,
    device: torch.device,
    bf16: bool,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Mean Dice per foreground class over the cases; the cases are shared among the processes.

    The figure is for watching a run: the reported scores are those of the evaluate stage, in the scan's geometry.
    """
    processes = processes or Processes()
    engine = TorchEngine(network, device=device.type, bf16=bf16)
    scores: dict[str, list[float]] = {}
    for case in case_ids[processes.rank :: processes.world]:
        image = np.asarray(open_array(preprocessed / "images" / f"{case}.npy"), dtype=np.float32)
        truth = np.asarray(open_array(preprocessed / "labels" / f"{case}.npy"))
        logits = predict_logits(engine, image, stride=network.stride, depth_halo=network.depth_halo)
        scores[case] = class_dice(logits.argmax(axis=0), truth, len(class_names))
    table = np.array([row for _, row in sorted(processes.gather(scores).items())])
    return {name: float(table[:, k].mean()) for k, name in enumerate(class_names[1:])}


def class_dice(prediction: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], classes: int) -> list[float]:
    """Hard Dice of each foreground class; 1 where it is in neither."""
    values = []
    for k in range(1, classes):
        a, b = prediction == k, truth == k
        total = int(a.sum() + b.sum())
        values.append(2 * int((a & b).sum()) / total if total else 1.0)
    return values
