"""Scores of one mask against the truth, on the scan's own grid.

Convention for empty masks (also in docs/metrics.md):

| truth | prediction | Dice, NSD | HD95 | sensitivity | precision |
|---|---|---|---|---|---|
| empty | empty | 1 | 0 | undefined | undefined |
| empty | not empty | 0 | diagonal of the volume | undefined | 0 |
| not empty | empty | 0 | diagonal of the volume | 0 | undefined |

Undefined values are None and left out of means, and the number of defined ones is reported. The diagonal is the largest
distance there can be: a missed structure costs, but one case cannot make a mean infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

METRICS = ("dice", "hd95_mm", "nsd", "sensitivity", "specificity", "precision", "volume_error_ml")


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """Scores of one label in one case."""

    label: str
    dice: float
    """2 |A and B| / (|A| + |B|)."""
    hd95_mm: float
    """The larger of the two 95th percentiles of surface distances, truth to prediction and back, mm."""
    nsd: float
    """Normalised surface Dice (Nikolov et al., 2018): share of both surfaces within the tolerance of the other."""
    sensitivity: float | None
    """True positives / truth."""
    specificity: float | None
    """True negatives / voxels that are not truth, over the whole volume."""
    precision: float | None
    """True positives / prediction."""
    volume_truth_ml: float
    volume_predicted_ml: float
    volume_error_ml: float
    """Predicted minus true volume."""


def score_case(
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    *,
    spacing_mm: Sequence[float],
    labels: Mapping[str, int | Sequence[int]],
    tolerance_mm: float = 1.0,
) -> list[LabelScore]:
    """Score every foreground label, or region of several labels.

    Args:
        truth, prediction: (X, Y, Z) label values on one grid.
        spacing_mm: voxel size along the three axes.
        labels: name to value, or to the values of a region; the value 0 (background) is not scored.
        tolerance_mm: of the NSD.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} lie on different grids")
    return [
        score_label(name, np.isin(truth, value), np.isin(prediction, value), spacing_mm, tolerance_mm)
        for name, value in labels.items()
        if value != 0
    ]


def score_label(
    name: str, truth: Mask, prediction: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> LabelScore:
    """Score one binary mask; see `LabelScore` and the module's convention for empty masks."""
    n_truth, n_predicted = int(truth.sum()), int(prediction.sum())
    both = int((truth & prediction).sum())
    negatives = truth.size - n_truth
    hd95_mm, nsd = _surface_scores(truth, prediction, spacing_mm, tolerance_mm)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return LabelScore(
        label=name,
        dice=2 * both / (n_truth + n_predicted) if n_truth + n_predicted else 1.0,
        hd95_mm=hd95_mm,
        nsd=nsd,
        sensitivity=both / n_truth if n_truth else None,
        specificity=(negatives - (n_predicted - both)) / negatives if negatives else None,
        precision=both / n_predicted if n_predicted else None,
        volume_truth_ml=n_truth * voxel_ml,
        volume_predicted_ml=n_predicted * voxel_ml,
        volume_error_ml=(n_predicted - n_truth) * voxel_ml,
    )


def _surface_scores(
    truth: Mask, prediction: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """HD95 (mm) and NSD."""
    if not truth.any() and not prediction.any():
        return 0.0, 1.0
    if not truth.any() or not prediction.any():
        return float(np.linalg.norm(np.array(truth.shape) * np.array(spacing_mm))), 0.0
    import surface_distance

    window = _bounding_box(truth | prediction)
    distances = surface_distance.compute_surface_distances(
        np.ascontiguousarray(truth[window]), np.ascontiguousarray(prediction[window]), tuple(spacing_mm)
    )
    hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
    return float(hd95), float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around a mask, one voxel wider: distances there are those of the whole volume."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        box.append(slice(max(int(hit[0]) - 1, 0), int(hit[-1]) + 2))
    return tuple(box)


def confusion(
    truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], values: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Voxels by true (row) and predicted (column) label, in the order of `values`."""
    index = np.full(256, 0)
    index[list(values)] = np.arange(len(values))
    joint = index[truth].ravel() * len(values) + index[prediction].ravel()
    return np.bincount(joint, minlength=len(values) ** 2).reshape(len(values), -1)
