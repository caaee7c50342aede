"""Which models can be averaged, and what they have decided together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilldsm.core.errors import DataError
from distilldsm.core.mapping import to_mapping
from distilldsm.data.plan import Plan
from distilldsm.models.package import ModelMetadata

Task = tuple[Path, Plan, tuple[int, int, int]]
"""A model's folder, its plan and its network's stride."""


def check_same_task(first: Task, other: Task) -> None:
    """Check that two models take the same image and mean the same by its scores.

    Raises:
        DataError: names both and the first value that differs.
    """
    for name, (expected, seen) in _values(first, other).items():
        if expected != seen:
            raise DataError(
                f"does not fit into the ensemble: it has another {name}",
                where=other[0],
                seen=f"{name} {to_mapping(seen)}",
                rule=f"{to_mapping(expected)}, as {first[0]}",
                hint="give models of the same preprocessed data, e.g. the folds of one cross-validation",
            )


def _values(first: Task, other: Task) -> dict[str, tuple[Any, Any]]:
    (_, a, our_stride), (_, b, their_stride) = first, other
    labels = [list(zip(plan.class_names, plan.class_values, strict=True)) for plan in (a, b)]
    return {
        "set of labels": (labels[0], labels[1]),
        "set of regions": (a.regions, b.regions),
        "set of channels": (a.channels, b.channels),
        "depth axis": (a.depth_axis, b.depth_axis),
        "spacing in mm (depth, height, width)": (a.target_spacing_mm, b.target_spacing_mm),
        "normalisation": (a.normalisation, b.normalisation),
        "crop to non-zero": (a.crop_to_nonzero, b.crop_to_nonzero),
        "resampling (coarse slices)": (a.coarse_slices, b.coarse_slices),
        # Padding to the larger stride would show to a network that sees the volume's ends.
        "stride of the network": (our_stride, their_stride),
    }


def common_postprocessing(models: Sequence[tuple[Path, ModelMetadata]]) -> tuple[str, ...]:
    """The labels or regions of which every model's own decision keeps the largest component only.

    Raises:
        DataError: a model carries no decision.
    """
    for folder, metadata in models:
        if metadata.postprocessing is None:
            raise DataError(
                "carries no decision on post-processing",
                where=folder,
                seen="postprocessing: null",
                rule="the fold was evaluated before it was exported",
                hint="evaluate the fold, then export it again; or predict without --postprocess",
            )
    first, *others = [metadata.postprocessing or () for _, metadata in models]
    return tuple(label for label in first if all(label in other for other in others))
