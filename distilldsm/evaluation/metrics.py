"""The metrics: scores of one mask against the truth, on the scan's own grid.

`METRICS` lists all of them. Tables, reports, `cases.csv`, DVC, MLflow, cross-validation, comparison and gate read it.
To add a metric, add one entry there.

Convention for empty masks (also in docs/metrics.md):

| truth | prediction | Dice, NSD | HD95 | sensitivity | precision |
|---|---|---|---|---|---|
| empty | empty | 1 | 0 | undefined | undefined |
| empty | not empty | 0 | diagonal of the volume | undefined | 0 |
| not empty | empty | 0 | diagonal of the volume | 0 | undefined |

Undefined values are None and left out of means; the number of defined values is reported. The diagonal is the largest
possible distance. So a missed structure lowers the score, but a single case cannot make a mean infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
VOLUMES = ("volume_truth_ml", "volume_predicted_ml")
"""Measured for each mask in addition to the metrics."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskPair:
    """A true and a predicted mask, (X, Y, Z) on one grid, and quantities that several metrics use."""

    truth: Mask
    prediction: Mask
    spacing_mm: Sequence[float]
    tolerance_mm: float
    """Tolerance of the NSD."""

    @cached_property
    def n_truth(self) -> int:
        """Number of voxels of the truth."""
        return int(self.truth.sum())

    @cached_property
    def n_predicted(self) -> int:
        """Number of voxels of the prediction."""
        return int(self.prediction.sum())

    @cached_property
    def n_both(self) -> int:
        """Number of voxels in both masks: the true positives."""
        return int((self.truth & self.prediction).sum())

    def volume_ml(self, voxels: int) -> float:
        """Volume of a number of voxels, ml."""
        return voxels * float(np.prod(self.spacing_mm)) / 1000

    @cached_property
    def surface_scores(self) -> tuple[float, float]:
        """HD95 (mm) and NSD.

        HD95 is the larger of the two 95th percentiles of surface distances, truth to prediction and back. NSD
        (normalised surface Dice, Nikolov et al., 2018) is the share of both surfaces within the tolerance of the other.
        """
        if not self.n_truth and not self.n_predicted:
            return 0.0, 1.0
        if not self.n_truth or not self.n_predicted:
            return float(np.linalg.norm(np.array(self.truth.shape) * np.array(self.spacing_mm))), 0.0
        import surface_distance

        window = _bounding_box(self.truth | self.prediction)
        distances = surface_distance.compute_surface_distances(
            np.ascontiguousarray(self.truth[window]),
            np.ascontiguousarray(self.prediction[window]),
            tuple(self.spacing_mm),
        )
        hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
        return float(hd95), float(surface_distance.compute_surface_dice_at_tolerance(distances, self.tolerance_mm))


@dataclass(frozen=True)
class Metric:
    """One score of a predicted mask."""

    name: str
    """Column of `cases.csv` and key in all files."""
    title: str
    """Title for readers, without the unit."""
    unit: str
    """Unit; empty for a fraction."""
    higher_is_better: bool | None
    """None: the best value is 0, and both signs are errors."""
    digits: int
    """Decimals in tables for readers; `metrics.json` has one more."""
    compute: Callable[[MaskPair], float | None]
    """Computes the score; None if it is undefined."""
    main: bool = False
    """A main metric is defined for all masks and shown first. MLflow gets it per label and with its interval. The gate
    may use it (`ExportConfig.gate_metric`)."""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} {self.unit}".rstrip()

    def text(self, value: float | None, sign: str = "") -> str:
        """A value as text; a dash if it is undefined. `sign` "+" shows plus signs."""
        return "-" if value is None else f"{value:{sign}.{self.digits}f}"

    def badness(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Values of any shape, with the sign changed if needed, so that a larger value is worse."""
        if self.higher_is_better is None:
            return np.abs(values)
        return -values if self.higher_is_better else values


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _dice(masks: MaskPair) -> float:
    """2 |A and B| / (|A| + |B|)."""
    voxels = masks.n_truth + masks.n_predicted
    return 2 * masks.n_both / voxels if voxels else 1.0


def _specificity(masks: MaskPair) -> float | None:
    """True negatives / voxels that are not truth, over the whole volume."""
    negatives = masks.truth.size - masks.n_truth
    return _share(negatives - (masks.n_predicted - masks.n_both), negatives)


def _volume_error_ml(masks: MaskPair) -> float:
    """Predicted minus true volume."""
    return masks.volume_ml(masks.n_predicted - masks.n_truth)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (  # name, title, unit, whether higher is better, digits, how it is computed
        Metric("dice", "Dice", "", True, 4, _dice, main=True),
        Metric("hd95_mm", "HD95", "mm", False, 2, lambda masks: masks.surface_scores[0], main=True),
        Metric("nsd", "NSD", "", True, 4, lambda masks: masks.surface_scores[1], main=True),
        Metric("sensitivity", "sensitivity", "", True, 4, lambda masks: _share(masks.n_both, masks.n_truth)),
        Metric("specificity", "specificity", "", True, 4, _specificity),
        Metric("precision", "precision", "", True, 4, lambda masks: _share(masks.n_both, masks.n_predicted)),
        Metric("volume_error_ml", "volume error", "ml", None, 2, _volume_error_ml),
        Metric("volume_error_abs_ml", "|volume error|", "ml", False, 2, lambda masks: abs(_volume_error_ml(masks))),
    )
}
"""Name to metric, in the order of all tables."""


def main_metrics() -> list[Metric]:
    """The metrics that are shown first, see `Metric.main`."""
    return [metric for metric in METRICS.values() if metric.main]


def score_case(
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    *,
    spacing_mm: Sequence[float],
    labels: Mapping[str, int | Sequence[int]],
    tolerance_mm: float = 1.0,
) -> list[dict[str, Any]]:
    """Score every foreground label, or region of several labels.

    Args:
        truth, prediction: (X, Y, Z) label values on one grid.
        spacing_mm: voxel size along the three axes.
        labels: name to value, or to the values of a region; the value 0 (background) is not scored.
        tolerance_mm: tolerance of the NSD.

    Returns:
        One row per label: `label`, every metric (None if undefined), and VOLUMES.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} lie on different grids")
    rows: list[dict[str, Any]] = []
    for name, value in labels.items():
        if value == 0:
            continue
        masks = MaskPair(
            truth=np.isin(truth, value),
            prediction=np.isin(prediction, value),
            spacing_mm=spacing_mm,
            tolerance_mm=tolerance_mm,
        )
        scores = {metric.name: metric.compute(masks) for metric in METRICS.values()}
        volumes = (masks.volume_ml(masks.n_truth), masks.volume_ml(masks.n_predicted))
        rows.append({"label": name, **scores, **dict(zip(VOLUMES, volumes, strict=True))})
    return rows


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around a mask plus one voxel. Surface distances are the same as in the whole volume."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        box.append(slice(max(int(hit[0]) - 1, 0), int(hit[-1]) + 2))
    return tuple(box)


def confusion(
    truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], values: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Number of voxels by true (row) and predicted (column) label, in the order of `values`."""
    index = np.full(256, 0)
    index[list(values)] = np.arange(len(values))
    joint = index[truth].ravel() * len(values) + index[prediction].ravel()
    return np.bincount(joint, minlength=len(values) ** 2).reshape(len(values), -1)
