"""Dice of whole held-out volumes on the network's grid, during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilldsm.data.targets import Targets
from distilldsm.inference.engines import TorchEngine
from distilldsm.inference.windows import predict_logits
from distilldsm.training.distributed import Processes
from distilldsm.training.patches import open_array


def validate(
    engine: TorchEngine,
    preprocessed: Path,
    case_ids: Sequence[str],
    targets: Targets,
    processes: Processes,
    on_case: Callable[[], object],
) -> dict[str, float]:
    """Mean Dice per structure over the cases. The processes divide the cases among themselves.

    The value only shows the progress of a run. The evaluate stage computes the reported scores, on the scan's grid.
    `on_case` is called after each case of this process's share.
    """
    scores: dict[str, list[float]] = {}
    for case in case_ids[processes.rank :: processes.world]:
        image = np.asarray(open_array(preprocessed / "images" / f"{case}.npy"), dtype=np.float32)
        truth = np.asarray(open_array(preprocessed / "labels" / f"{case}.npy"))
        logits = predict_logits(engine, image)
        scores[case] = structure_dice(targets.classes_of_logits(logits), truth, targets)
        on_case()
    table = np.array([row for _, row in sorted(processes.gather(scores).items())])
    return {name: float(table[:, k].mean()) for k, name in enumerate(targets.structures)}


def spread(cases: Sequence[str], count: int) -> list[str]:
    """At most `count` of the cases, evenly spread over their order."""
    return [cases[k * len(cases) // count] for k in range(count)] if len(cases) > count else list(cases)


def structure_dice(
    prediction: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], targets: Targets
) -> list[float]:
    """Hard Dice of each structure (foreground class or region) in two class arrays; 1 if it is in neither."""
    values = []
    for members in targets.membership():
        a, b = members[prediction], members[truth]
        total = int(a.sum() + b.sum())
        values.append(2 * int((a & b).sum()) / total if total else 1.0)
    return values
